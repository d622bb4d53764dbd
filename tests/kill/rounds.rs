//! A hundred kills at moments that a seed decides, under a guest that writes all the time and knows what was answered.
//!
//! One story is one disk that moves from place to place. On each way its daemon is killed while it begins to serve,
//! while the job begins, in the copy, when it is ready, in the pivot or the cancel, and behind it. After every kill the
//! guest looks at the whole disk; the job that was begun is still there, or the one that was over is not; and the side
//! that is served is the one that it must be. What holds does not depend on what a kill meets, so nothing here depends on
//! how fast the machine is: only how often each phase is met does, and that is told.
//!
//! ```sh
//! SEED=7 cargo test --test kill a_hundred -- --nocapture       one story again
//! STORIES=500 cargo test --test kill a_hundred -- --nocapture  more of them
//! ```
use super::support::daemon::Daemon;
use super::support::images::{Chain, create, three_layers};
use super::support::nbd::{Client, Replies};
use super::support::random::Random;
use super::support::tools::{check_leaks_allowed, content};
use super::support::writer::{Habits, Writer};
use super::support::{assert_same, folder};
use serde_json::Value;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const DISK_LEN: u64 = 6 << 20;
/// Requests that the guest has in flight, at most.
const DEPTH_MAX: u64 = 16;
/// Kills in a normal run, at least.
const KILLS_MIN: usize = 100;
const STORIES: u64 = 6;

/// What the kills of a run met, and how long each restart took.
#[derive(Default)]
struct Figures {
    met: BTreeMap<&'static str, usize>,
    restarts: Vec<Duration>,
    pivots: usize,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_hundred_kills_lose_nothing() {
    let seeds: Vec<u64> = match number("SEED") {
        Some(seed) => vec![seed],
        None => (0..number("STORIES").unwrap_or(STORIES)).map(|story| number("FIRST").unwrap_or(1) + story).collect(),
    };
    let mut figures = Figures::default();
    let begun = Instant::now();
    for seed in &seeds {
        let told = catch_unwind(AssertUnwindSafe(|| Story::begin(*seed, &mut figures).tell()));
        if let Err(panic) = told {
            eprintln!("seed {seed}: repeat it with SEED={seed} cargo test --test kill a_hundred -- --nocapture");
            resume_unwind(panic);
        }
    }
    let Figures { met, mut restarts, pivots } = figures;
    restarts.sort();
    let count = restarts.len();
    println!(
        "{count} kills in {} s, none lost anything: {met:?}; {pivots} pivots; a restart took {} ms in the middle, {} ms \
         at most",
        begun.elapsed().as_secs(),
        restarts[count / 2].as_millis(),
        restarts[count - 1].as_millis(),
    );
    assert!(count >= KILLS_MIN * seeds.len() / STORIES as usize, "{count} kills");
    assert!(number("SEED").is_some() || pivots > 0, "no story came to a pivot");
}

/// One disk, its daemon and its guest.
struct Story<'a> {
    // Dropped in this order: a guest whose daemon goes first would wait for it.
    guest: Option<Writer>,
    daemon: Daemon,
    folder: tempfile::TempDir,
    random: Random,
    figures: &'a mut Figures,
    /// The image that is served, and its format.
    serving: (PathBuf, &'static str),
}

impl<'a> Story<'a> {
    fn begin(seed: u64, figures: &'a mut Figures) -> Self {
        let mut random = Random::new(seed);
        let folder = folder();
        let chain = if random.one_in(3) {
            let top = folder.path().join("disk.raw");
            create(&top, "raw", DISK_LEN, &[]);
            Chain { top: top.clone(), format: "raw", layers: vec![(top, "raw")], told: "raw".into() }
        } else {
            three_layers(folder.path(), DISK_LEN, seed)
        };
        let cache = if random.one_in(2) { "none" } else { "writeback" };
        let daemon = Daemon::serve_with(folder.path(), &[chain.export("vda")], &["--cache", cache]);
        let habits = Habits {
            seed,
            depth: random.within(1..DEPTH_MAX) as usize,
            len_max: 64 << 10,
            flush_one_in: 50,
            pause: Duration::from_micros(random.below(1500)),
            ..Habits::default()
        };
        let guest = Some(Writer::start(&daemon.socket(), "vda", chain.content(), habits));
        Self { guest, daemon, folder, random, figures, serving: (chain.top, chain.format) }
    }

    fn tell(mut self) {
        for way in 0..2 {
            let format = if self.random.one_in(2) { "raw" } else { "qcow2" };
            let target = self.folder.path().join(format!("target{way}"));
            self.write(20);
            self.kill("no job");
            self.start_job(&target, format);
            for _ in 0..self.random.within(2..4) {
                self.kill_copying(&target);
            }
            self.catch_up();
            self.write(10);
            self.kill("ready");
            self.assert_has_job(&target);
            self.catch_up();
            if self.random.one_in(4) {
                self.cancel(&target, format);
            } else {
                self.pivot(&target, format);
            }
            self.write(10);
            self.kill("over");
            self.assert_serves();
        }
        let truth = self.guest.take().expect("a guest").stop();
        let mut client = Client::connect(&self.daemon.socket(), "vda", Replies::Structured).expect("a connection");
        assert_same("the disk that is served", &client.content(), &truth);
        self.daemon.stop();
        let (image, format) = &self.serving;
        assert_same("the image on its own", &content(image, format), &truth);
        check_leaks_allowed(image, format);
    }

    /// Starts a job, which the kill may meet before it is one: twice at most, for that goes by how busy the machine is.
    fn start_job(&mut self, target: &Path, format: &str) {
        let name = target.display().to_string();
        let words = ["vda", &name, "--format", format, "--speed", "2M", "--mode", "auto"];
        for _ in 0..2 {
            let mirror = self.ask("mirror", &words);
            let begun = self.kill_while("beginning", mirror);
            if self.status()["target"] == name {
                return;
            }
            assert!(!begun, "the job was begun, and is lost: {}", self.status());
            self.assert_serves();
            // Made for a job that was not begun.
            let _ = std::fs::remove_file(target);
        }
        self.daemon.ok("mirror", &words);
    }

    fn kill_copying(&mut self, target: &Path) {
        // Faster each time, so that some kills meet the end of the copy.
        let speed = (1 << 20) * self.random.within(1..24);
        self.daemon.ok("set", &["vda", "--speed", &speed.to_string()]);
        self.kill("copying");
        self.assert_has_job(target);
    }

    /// A job that goes on has the speed of its beginning.
    fn catch_up(&self) {
        self.daemon.ok("set", &["vda", "--speed", "0"]);
        self.daemon.wait_for("vda", "ready");
    }

    fn pivot(&mut self, target: &Path, format: &'static str) {
        let pivot = self.ask("pivot", &["vda"]);
        let pivoted = self.kill_while("pivoting", pivot);
        let name = target.display().to_string();
        if self.status()["serving"] != name {
            assert!(!pivoted, "the pivot was done, and is undone: {}", self.status());
            self.assert_has_job(target);
            self.catch_up();
            self.daemon.pivot("vda");
        }
        self.serving = (target.to_owned(), format);
        self.figures.pivots += 1;
        self.assert_serves();
        self.kill("pivoted");
        self.assert_serves();
    }

    fn cancel(&mut self, target: &Path, format: &'static str) {
        let cancel = self.ask("cancel", &["vda", "--force"]);
        let cancelled = self.kill_while("cancelling", cancel);
        if self.status()["target"] == target.display().to_string() {
            assert!(!cancelled, "the job was given up, and is there again: {}", self.status());
            // Nobody was told that it was over: it goes on, and comes to its end.
            self.assert_has_job(target);
            self.catch_up();
            return self.pivot(target, format);
        }
        self.assert_serves();
    }

    /// A verb whose answer nobody waits for.
    fn ask(&self, verb: &str, words: &[&str]) -> Child {
        let mut command = self.daemon.command(verb, words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program")
    }

    /// A kill some time after `verb` was begun. Says whether that one was told that it was done.
    fn kill_while(&mut self, met: &'static str, mut verb: Child) -> bool {
        self.kill(met);
        verb.wait().expect("reaping our child").success()
    }

    /// Waits until the guest has been answered so often.
    fn write(&self, count: u64) {
        self.guest.as_ref().expect("a guest").wait(count);
    }

    /// A kill at some moment, and the restart; one in four meets a second kill while the daemon begins. Returns when the
    /// guest was answered again, which has looked at everything by then.
    fn kill(&mut self, met: &'static str) {
        std::thread::sleep(Duration::from_micros(self.random.below(40_000)));
        self.daemon.kill();
        *self.figures.met.entry(met).or_default() += 1;
        let mut begun = Instant::now();
        if self.random.one_in(4) {
            self.daemon.begin();
            std::thread::sleep(Duration::from_micros(self.random.below(60_000)));
            self.daemon.kill();
            *self.figures.met.entry("starting").or_default() += 1;
            self.figures.restarts.push(begun.elapsed());
            begun = Instant::now();
        }
        self.daemon.start();
        self.figures.restarts.push(begun.elapsed());
        // More than were on their way before.
        self.write(DEPTH_MAX + 1);
    }

    fn status(&self) -> Value {
        self.daemon.status("vda")
    }

    #[track_caller]
    fn assert_has_job(&self, target: &Path) {
        let status = self.status();
        assert_eq!(status["target"], target.display().to_string(), "the job is lost: {status}");
        let phase = status["phase"].as_str().unwrap_or_default();
        assert!(["seeding", "converging", "ready"].contains(&phase), "{status}\n{}", self.daemon.log());
        self.assert_serves();
    }

    #[track_caller]
    fn assert_serves(&self) {
        let status = self.status();
        assert_eq!(status["serving"], self.serving.0.display().to_string(), "{status}\n{}", self.daemon.log());
    }
}
