//! The order of events, and what is said of them.
use super::chain;
use super::daemon::Daemon;
use super::disk::Truth;
use super::guest::Guest;
use super::nbd::Nbd;
use super::proof;
use crate::args::Demo;
use crate::bar::Bar;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{remark, say};
use crate::plot::Plot;
use crate::size;
use engine::control::{Code, MirrorRequest, Started, Status};
use serde_json::{Value, json};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// The disk's name.
const EXPORT: &str = "vda";
/// How long the guest writes before the mirror, when it is ready, and after the pivot.
const ACT: Duration = Duration::from_millis(750);
/// Columns and rows of the plot.
const PLOT_WIDTH: usize = 60;
const PLOT_HEIGHT: usize = 5;
/// How often the backlog is looked at.
const EVERY: Duration = Duration::from_millis(15);
/// How long the mirror may take.
const MIRROR_MAX: Duration = Duration::from_secs(600);
/// What the guest writes, and where, follows from this.
const SEED: u64 = 1;

/// Moves a disk under a guest, and proves that nothing was lost.
pub fn run(args: &Demo) -> Result<(), Failure> {
    let parent = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new().prefix("blkmirror-demo-").tempdir_in(&parent);
    let folder = folder.map_err(|error| Failure::new(format!("a folder in {}: {error}", parent.display())))?;
    let told = tell(folder.path(), args.size);
    if told.is_err() {
        remark(format!("images and the daemon's log are kept in {}", folder.keep().display()));
    }
    told
}

fn tell(folder: &Path, len: u64) -> Result<(), Failure> {
    say(format!("disk     {} in {}: base.raw <- snap1.qcow2 <- snap2.qcow2", size::format(len), folder.display()))?;
    let mut truth = Truth::new(len);
    let top = chain::make(folder, &mut truth)?;
    let daemon = Daemon::start(folder, EXPORT, &top)?;
    let guest = Guest::start(Nbd::connect(&daemon.socket(), EXPORT)?, truth, SEED)?;
    let mut scene = Scene::new(guest, daemon.client()?);
    scene.let_time_pass(ACT)?;
    say("guest    writes 4 to 64 KiB at random places, and goes on")?;

    let wait_before = scene.guest.take_longest_wait();
    let target = folder.join("new.qcow2");
    let copy = scene.mirror(&target)?;
    let wait_copying = scene.guest.take_longest_wait();
    let pivot = scene.pivot()?;
    let wait_pivoting = scene.guest.take_longest_wait();
    scene.let_time_pass(ACT)?;
    let (writes, bytes) = (scene.guest.writes(), scene.guest.bytes());
    let truth = scene.guest.stop()?;

    for line in scene.plot.lines(PLOT_WIDTH, PLOT_HEIGHT) {
        say(line)?;
    }
    say(format!("{:>10} R ready, P pivot: what is still to copy, over time", ""))?;
    say(format!("copy     {}", copy.in_words()))?;
    say(format!("pivot    {} under load; now serving {}", in_ms(pivot.took), pivot.serving))?;
    say(format!("guest    {writes} writes, {}, none failed", size::format(bytes)))?;
    say(format!(
        "waits    longest {} before, {} while copying, {} at the pivot",
        in_ms(wait_before),
        in_ms(wait_copying),
        in_ms(wait_pivoting)
    ))?;

    proof::over_nbd(&mut Nbd::connect(&daemon.socket(), EXPORT)?, &truth)?;
    let _: Value = scene.client.call("quit", &json!({}))?;
    daemon.wait()?;
    proof::in_image(&target, &truth)?;
    say(format!(
        "verdict  every acknowledged write is there: {} blocks compared, over NBD and in the closed image",
        truth.blocks()
    ))
}

/// A guest that writes, and whoever watches it.
struct Scene {
    guest: Guest,
    client: Client,
    plot: Plot,
    begun: Instant,
}

/// What a copy came to.
struct Copy {
    status: Status,
    took: Duration,
    guest_bytes: u64,
}

/// What a pivot came to.
struct Pivot {
    took: Duration,
    serving: String,
}

impl Scene {
    fn new(guest: Guest, client: Client) -> Self {
        Self { guest, client, plot: Plot::default(), begun: Instant::now() }
    }

    fn let_time_pass(&mut self, how_much: Duration) -> Result<(), Failure> {
        let until = Instant::now() + how_much;
        while Instant::now() < until {
            self.look()?;
        }
        Ok(())
    }

    fn mirror(&mut self, target: &Path) -> Result<Copy, Failure> {
        let begun = Instant::now();
        let guest_bytes = self.guest.bytes();
        let target = target.display().to_string();
        let request = MirrorRequest { export: EXPORT.into(), target, ..MirrorRequest::default() };
        let _: Started = self.client.call_and_wait("blkmirror-mirror", &request)?;
        let status = self.until_ready()?;
        let copy = Copy { status, took: begun.elapsed(), guest_bytes: self.guest.bytes() - guest_bytes };
        self.plot.mark(self.begun.elapsed(), 'R');
        self.let_time_pass(ACT)?;
        Ok(copy)
    }

    fn pivot(&mut self) -> Result<Pivot, Failure> {
        loop {
            self.until_ready()?;
            self.guest.take_longest_wait();
            let begun = Instant::now();
            let pivoted: Result<Value, _> = self.client.call_and_wait("blkmirror-pivot", &json!({ "export": EXPORT }));
            match pivoted {
                Ok(_) => {
                    let took = begun.elapsed();
                    self.plot.mark(self.begun.elapsed(), 'P');
                    // The write that waited for the pivot is answered after it.
                    self.guest.wait_for_writes(2)?;
                    return Ok(Pivot { took, serving: self.look()?.serving });
                }
                Err(failure) if failure.is(Code::BlockCopyActive) => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    fn until_ready(&mut self) -> Result<Status, Failure> {
        let until = Instant::now() + MIRROR_MAX;
        let bar = Bar::new("copy");
        while Instant::now() < until {
            let status = self.look()?;
            bar.show(&status);
            match status.phase.as_str() {
                "ready" => return Ok(status),
                "failed" => return Err(Failure::new(status.error.unwrap_or_else(|| "the mirror failed".into()))),
                _ => {}
            }
        }
        Err(Failure::new(format!("the mirror is not ready after {} s", MIRROR_MAX.as_secs())))
    }

    /// Notes how things stand.
    fn look(&mut self) -> Result<Status, Failure> {
        thread::sleep(EVERY);
        self.guest.check()?;
        let status = self.client.status(EXPORT)?;
        let backlog = if status.is_active() { status.remaining_bytes } else { 0 };
        self.plot.sample(self.begun.elapsed(), backlog);
        Ok(status)
    }
}

impl Copy {
    fn in_words(&self) -> String {
        let copied = self.status.copied_bytes;
        let rate = copied as f64 / self.took.as_secs_f64().max(1e-6);
        format!(
            "{} in {:.2} s, {}/s, while the guest wrote {}",
            size::format(copied),
            self.took.as_secs_f64(),
            size::format(rate as u64),
            size::format(self.guest_bytes)
        )
    }
}

fn in_ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}
