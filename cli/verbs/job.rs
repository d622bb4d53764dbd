//! The verbs that a running job, or the daemon, is told in one sentence.
use crate::args::{Cancel, Form, Job, Pivot, Quit, Set};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::tell;
use engine::control::PivotRequest;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Duration;

/// How long a daemon may take to end.
const END_MAX: Duration = Duration::from_secs(60);

/// Makes the target the disk that is served; returns when it is.
///
/// Of several exports all are switched at one instant, or none is.
pub fn pivot(pivot: &Pivot) -> Result<(), Failure> {
    let mut client = Client::connect(&pivot.daemon.control)?;
    if let [export] = &pivot.exports[..] {
        let Pivot { verified, keep_source, back, .. } = *pivot;
        let request = PivotRequest { export: export.clone(), verified, keep_source, back };
        let _: Value = client.call_and_wait("blkmirror-pivot", &request)?;
        return ended(&mut client, export, "pivoted", pivot.form);
    }
    if pivot.keep_source || pivot.back {
        return Err(Failure::new("--keep-source and --back are of one export: ask for one at a time"));
    }
    let arguments = json!({ "exports": pivot.exports, "verified": pivot.verified });
    let _: Value = client.call_and_wait("blkmirror-pivot-together", &arguments)?;
    let mut all = Vec::new();
    for export in &pivot.exports {
        let serving = client.status(export)?.serving;
        all.push((json!({ "export": export, "result": "pivoted", "serving": serving }), serving));
    }
    let objects: Vec<&Value> = all.iter().map(|(object, _)| object).collect();
    tell(pivot.form, &json!(objects), || {
        let lines = pivot.exports.iter().zip(&all);
        let lines: Vec<String> =
            lines.map(|(export, (_, serving))| format!("{export}: pivoted, serving {serving}")).collect();
        lines.join("\n")
    })
}

/// Ends the job; returns when it has ended.
pub fn cancel(cancel: &Cancel) -> Result<(), Failure> {
    let Cancel { job, force } = cancel;
    let mut client = Client::connect(&job.daemon.control)?;
    let _: Value = client.call_and_wait("blkmirror-cancel", &json!({ "export": job.export, "force": force }))?;
    ended(&mut client, &job.export, "cancelled", job.form)
}

/// Ends the way back from a pivot; returns when it has ended.
pub fn commit(job: &Job) -> Result<(), Failure> {
    let mut client = Client::connect(&job.daemon.control)?;
    let _: Value = client.call_and_wait("blkmirror-commit", &json!({ "export": job.export }))?;
    ended(&mut client, &job.export, "committed", job.form)
}

/// Stops copying.
pub fn pause(job: &Job) -> Result<(), Failure> {
    change(job, "blkmirror-pause", &json!({ "export": job.export }), ["paused", "paused"])
}

/// Goes on copying.
pub fn resume(job: &Job) -> Result<(), Failure> {
    change(job, "blkmirror-resume", &json!({ "export": job.export }), ["resumed", "goes on"])
}

/// Changes a running job.
pub fn set(set: &Set) -> Result<(), Failure> {
    let changes = [
        ("speed", json!(set.speed)),
        ("mode", json!(set.mode)),
        ("on-target-error", json!(set.on_target_error)),
        ("on-source-error", json!(set.on_source_error)),
        ("pause-budget", json!(set.pause_budget)),
        ("buf-size", json!(set.buf_size)),
        ("latency-factor", json!(set.latency_factor)),
        ("deadline", json!(set.deadline)),
        ("max-lag", json!(set.max_lag)),
        ("max-slowdown", json!(set.max_slowdown)),
    ];
    let mut arguments = json!({ "export": set.job.export });
    for (name, value) in changes.into_iter().filter(|(_, value)| !value.is_null()) {
        arguments[name] = value;
    }
    change(&set.job, "blkmirror-set", &arguments, ["changed", "changed"])
}

/// Ends the daemon; returns when it has gone.
pub fn quit(quit: &Quit) -> Result<(), Failure> {
    let path = quit.daemon.control.display();
    let mut client = Client::connect(&quit.daemon.control)?;
    let _: Value = client.call("quit", &json!({}))?;
    if !client.wait_for_end(END_MAX)? {
        let seconds = END_MAX.as_secs();
        return Err(Failure::new(format!("{path}: the daemon has not ended after {seconds} s: its log says why")));
    }
    let result = json!({ "control": quit.daemon.control, "result": "ended" });
    tell(quit.form, &result, || format!("{path}: the daemon has ended"))
}

/// Tells the job something; says what came of it in a word for a program and one for people.
fn change(job: &Job, command: &str, arguments: &impl Serialize, [result, word]: [&str; 2]) -> Result<(), Failure> {
    let _: Value = Client::connect(&job.daemon.control)?.call(command, arguments)?;
    tell(job.form, &json!({ "export": job.export, "result": result }), || format!("{}: {word}", job.export))
}

pub(super) fn ended(client: &mut Client, export: &str, result: &str, form: Form) -> Result<(), Failure> {
    let serving = client.status(export)?.serving;
    let object = json!({ "export": export, "result": result, "serving": serving });
    tell(form, &object, || format!("{export}: {result}, serving {serving}"))
}
