//! The verbs that a running job, or the daemon, is told in one sentence.
use crate::args::{Cancel, Daemon, Job, Set};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::say;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Duration;

/// How long a daemon may take to end.
const END_MAX: Duration = Duration::from_secs(60);

/// Makes the target the disk that is served; returns when it is.
pub fn pivot(job: &Job) -> Result<(), Failure> {
    let mut client = Client::connect(&job.daemon.control)?;
    let _: Value = client.call_and_wait("blkmirror-pivot", &json!({ "export": job.export }))?;
    let status = client.status(&job.export)?;
    say(format!("{}: pivoted, serving {}", job.export, status.serving))
}

/// Ends the job; returns when it has ended.
pub fn cancel(cancel: &Cancel) -> Result<(), Failure> {
    let Cancel { job, force } = cancel;
    let mut client = Client::connect(&job.daemon.control)?;
    let _: Value = client.call_and_wait("blkmirror-cancel", &json!({ "export": job.export, "force": force }))?;
    let status = client.status(&job.export)?;
    say(format!("{}: cancelled, serving {}", job.export, status.serving))
}

/// Stops copying.
pub fn pause(job: &Job) -> Result<(), Failure> {
    tell(job, "blkmirror-pause", &json!({ "export": job.export }))?;
    say(format!("{}: paused", job.export))
}

/// Goes on copying.
pub fn resume(job: &Job) -> Result<(), Failure> {
    tell(job, "blkmirror-resume", &json!({ "export": job.export }))?;
    say(format!("{}: goes on", job.export))
}

/// Changes a running job.
pub fn set(set: &Set) -> Result<(), Failure> {
    let mut arguments = json!({ "export": set.job.export });
    if let Some(speed) = set.speed {
        arguments["speed"] = json!(speed);
    }
    if let Some(mode) = set.mode {
        arguments["mode"] = json!(mode);
    }
    tell(&set.job, "blkmirror-set", &arguments)?;
    say(format!("{}: changed", set.job.export))
}

/// Ends the daemon; returns when it has gone.
pub fn quit(daemon: &Daemon) -> Result<(), Failure> {
    let path = daemon.control.display();
    let mut client = Client::connect(&daemon.control)?;
    let _: Value = client.call("quit", &json!({}))?;
    if !client.wait_for_end(END_MAX)? {
        return Err(Failure::new(format!("{path}: the daemon has not ended after {} s", END_MAX.as_secs())));
    }
    say(format!("{path}: the daemon has ended"))
}

fn tell(job: &Job, command: &str, arguments: &impl Serialize) -> Result<Value, Failure> {
    Client::connect(&job.daemon.control)?.call(command, arguments)
}
