//! Writes what happens to jobs down as QEMU's events, and as one of our own.
use super::render::{job_status, progress};
use crate::control::{Event, Status};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// What one client was last told of each job under way.
#[derive(Debug, Default)]
pub(super) struct Told {
    statuses: BTreeMap<String, &'static str>,
}

impl Told {
    /// The messages that tell a client of `event`, which happened `now` after the Unix epoch.
    pub(super) fn messages(&mut self, event: &Event, now: Duration) -> Vec<Value> {
        let events = match event {
            Event::Phase { export, job, phase, complete, status } => {
                let now = job_status(phase, status.paused);
                let before = self.replace(job, now);
                let mut events = job_status_changes(job, before, now, *complete);
                // A ready job that was paused and goes on is no more ready than before.
                let was_ready = matches!(before, Some("ready" | "standby"));
                events
                    .extend(block_job(job, phase, *complete, status).filter(|(name, _)| *name != READY || !was_ready));
                events.push(("BLKMIRROR_PHASE", phase_data(export, job, phase, status)));
                events
            }
            Event::IoError { export, job, target, action, message } => {
                vec![("BLOCK_JOB_ERROR", io_error_data(export, job, *target, action, message))]
            }
        };
        events.into_iter().map(|(name, data)| message(name, &data, now)).collect()
    }

    /// Notes where a job stands; returns where it stood.
    fn replace(&mut self, job: &str, now: &'static str) -> Option<&'static str> {
        match now {
            "concluded" => self.statuses.remove(job),
            _ => self.statuses.insert(job.into(), now),
        }
    }
}

type Named = (&'static str, Value);

const READY: &str = "BLOCK_JOB_READY";

fn job_status_changes(job: &str, before: Option<&str>, now: &'static str, complete: bool) -> Vec<Named> {
    // A client that was not there yet hears of the present state alone, but for a job's start.
    let changes: &[&str] = match (before, now) {
        (Some(before), now) if before == now => &[],
        (None, "running") => &["created", "running"],
        (_, "concluded") if complete => &["pending", "concluded", "null"],
        (_, "concluded") => &["aborting", "concluded", "null"],
        _ => &[now],
    };
    changes.iter().map(|status| ("JOB_STATUS_CHANGE", json!({ "id": job, "status": status }))).collect()
}

fn block_job(job: &str, phase: &str, complete: bool, status: &Status) -> Option<Named> {
    let mut data = progress(job, status);
    let name = match phase {
        "ready" => READY,
        "pivoted" | "cancelled" if complete => "BLOCK_JOB_COMPLETED",
        "cancelled" => "BLOCK_JOB_CANCELLED",
        "failed" => {
            data["error"] = json!(status.error.as_deref().unwrap_or("the job failed"));
            "BLOCK_JOB_COMPLETED"
        }
        _ => return None,
    };
    Some((name, data))
}

fn phase_data(export: &str, job: &str, phase: &str, status: &Status) -> Value {
    json!({ "export": export, "job": job, "phase": phase, "paused": status.paused })
}

fn io_error_data(export: &str, job: &str, target: bool, action: &str, message: &str) -> Value {
    let operation = if target { "write" } else { "read" };
    json!({ "device": job, "operation": operation, "action": action, "export": export, "message": message })
}

fn message(name: &str, data: &Value, now: Duration) -> Value {
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    json!({ "event": name, "data": data, "timestamp": timestamp })
}
