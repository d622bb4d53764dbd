//! `mirror`: starts a job, and with `--wait`, `--pivot` or `--finish` stays with it.
use crate::args::Mirror;
use crate::bar::Bar;
use crate::client::Client;
use crate::creation;
use crate::failure::Failure;
use crate::output::{remark, tell};
use crate::place::place;
use crate::text;
use engine::control::{Code, MirrorRequest, Started, Status, TargetFormat};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// How often progress is looked at.
const EVERY: Duration = Duration::from_millis(200);

/// Starts a mirror and stays with it for as long as was asked.
pub fn run(args: Mirror) -> Result<(), Failure> {
    let mut client = Client::connect(&args.daemon.control)?;
    let (stay, form) = (Stay::of(&args), args.form);
    let request = request(args)?;
    let started: Started = client.call_and_wait("blkmirror-mirror", &request)?;
    if !form.json {
        started.notes.iter().for_each(|note| remark(format!("{}: {note}", request.export)));
    }
    let MirrorRequest { export, target, .. } = &request;
    let Started { job, notes } = &started;
    let (result, words) = match stay {
        Stay::DryRun => ("possible", format!("{export}: could be mirrored to {target}")),
        Stay::Started => ("started", format!("{export}: mirror to {target} started, job {job}")),
        Stay::Ready => {
            until_ready(&mut client, &request)?;
            ("ready", format!("{export}: ready, target {target}"))
        }
        Stay::Pivoted => {
            let arguments = json!({ "export": export, "verified": request.verify });
            when_ready(&mut client, &request, "blkmirror-pivot", &arguments)?;
            ("pivoted", format!("{export}: pivoted, serving {}", client.status(export)?.serving))
        }
        Stay::Finished => {
            when_ready(&mut client, &request, "blkmirror-finish", &json!({ "export": export }))?;
            ("finished", format!("{export}: finished, {target} is a copy of this instant"))
        }
    };
    let object = json!({ "export": export, "job": job, "target": target, "result": result, "notes": notes });
    tell(form, &object, || words)
}

/// What is waited for.
#[derive(Clone, Copy)]
enum Stay {
    DryRun,
    Started,
    Ready,
    Pivoted,
    Finished,
}

impl Stay {
    fn of(args: &Mirror) -> Self {
        match args {
            Mirror { dry_run: true, .. } => Self::DryRun,
            Mirror { pivot: true, .. } => Self::Pivoted,
            Mirror { finish: true, .. } => Self::Finished,
            Mirror { wait: true, .. } => Self::Ready,
            _ => Self::Started,
        }
    }
}

fn request(args: Mirror) -> Result<MirrorRequest, Failure> {
    Ok(MirrorRequest {
        export: args.export,
        // One of the two is given.
        target: name(args.chain.as_ref().or(args.target.as_ref()).map_or("", String::as_str))?,
        chain: args.chain.is_some(),
        shallow: args.shallow,
        reuse_external: args.reuse_external,
        format: if args.raw { Some(TargetFormat::Raw) } else { args.format },
        block_device: args.blockdev,
        mode: args.mode,
        speed: args.speed,
        granularity: args.granularity,
        on_source_error: args.on_source_error,
        on_target_error: args.on_target_error,
        pause_budget: args.pause_budget,
        buf_size: args.buf_size,
        latency_factor: args.latency_factor,
        deadline: args.deadline,
        max_lag: args.max_lag,
        max_slowdown: args.max_slowdown,
        unmap: !args.no_unmap,
        reflink: !args.no_reflink,
        dry_run: args.dry_run,
        job_id: args.job_id,
        relative_backing: args.relative_backing,
        options: creation::all(&args.options).map_err(Failure::new)?,
        verify: args.verify,
        ..MirrorRequest::default()
    })
}

/// The daemon has a working folder of its own, so a path is made absolute here.
pub(super) fn name(target: &str) -> Result<String, Failure> {
    let named = place(Path::new(target))?.into_os_string().into_string();
    named.map_err(|_| Failure::new("the working folder's name is not UTF-8"))
}

/// Ends the job by `command` when it is ready.
fn when_ready(client: &mut Client, request: &MirrorRequest, command: &str, arguments: &Value) -> Result<(), Failure> {
    loop {
        until_ready(client, request)?;
        let ended: Result<Value, _> = client.call_and_wait(command, arguments);
        match ended {
            Ok(_) => return Ok(()),
            // The guest wrote more meanwhile than a pause allows to bring over: again when that is done.
            Err(failure) if failure.is(Code::BlockCopyActive) => client.wait_for_event(EVERY)?,
            Err(failure) => return Err(failure),
        }
    }
}

/// Waits until the job is ready, and verified where that was asked for, with a progress bar where stderr is a terminal.
fn until_ready(client: &mut Client, request: &MirrorRequest) -> Result<(), Failure> {
    let bar = Bar::new(&request.export);
    let mut last_error = None;
    loop {
        let status = client.status(&request.export)?;
        bar.show(&status);
        if status.error.is_some() && status.error != last_error && status.is_active() {
            bar.remark(&text::line(&status));
        }
        if is_ready(&status)? && (status.verified || !request.verify) {
            return Ok(());
        }
        last_error = status.error;
        client.wait_for_event(EVERY)?;
    }
}

/// Whether the job is ready; an error where it has ended without us.
fn is_ready(status: &Status) -> Result<bool, Failure> {
    let Status { export, phase, .. } = status;
    match phase.as_str() {
        "ready" => Ok(!status.paused),
        "failed" => {
            let error = status.error.as_deref().unwrap_or("no reason was given");
            Err(Failure::new(format!("{export}: the mirror failed: {error}")))
        }
        "cancelled" | "pivoted" | "none" => {
            Err(Failure::new(format!("{export}: somebody else ended the mirror ({phase})")))
        }
        _ => Ok(false),
    }
}
