//! Writes what happens to jobs down as QEMU's events, in QEMU's order, and as some of our own.
use super::answers::{
    BackOff, BlockJobCompleted, BlockJobError, BlockJobPending, BlockJobProgress, IoOperation, JobStatusChange,
    JobType, Mismatch, Phase, Verified,
};
use super::render::{error, value};
use super::schema::Schema;
use super::shape::shape;
use crate::control::Event;
use crate::control::jobs::{JobInfo, JobStatus};
use serde_json::{Value, json};
use std::time::Duration;

const STATUS_CHANGE: &str = "JOB_STATUS_CHANGE";
const READY: &str = "BLOCK_JOB_READY";
const PENDING: &str = "BLOCK_JOB_PENDING";
const COMPLETED: &str = "BLOCK_JOB_COMPLETED";
const CANCELLED: &str = "BLOCK_JOB_CANCELLED";
const ERROR: &str = "BLOCK_JOB_ERROR";
const PHASE: &str = "BLKMIRROR_PHASE";
const BACK_OFF: &str = "BLKMIRROR_BACK_OFF";
const MISMATCH: &str = "BLKMIRROR_MISMATCH";
const VERIFIED: &str = "BLKMIRROR_VERIFIED";

/// The messages that tell a client of `event`, which happened `now` after the Unix epoch.
pub(super) fn messages(event: &Event, now: Duration) -> Vec<Value> {
    let mut messages = Vec::new();
    let mut say = |name: &str, data: Value| messages.push(message(name, data, now));
    match event {
        Event::Job { job, path } => {
            path.windows(2).for_each(|pair| moved(job, pair[0], pair[1], &mut say));
            // To be forgotten is no phase.
            if job.stands != JobStatus::Null {
                say(PHASE, value(&phase(job)));
            }
        }
        Event::IoError { export, job, target, action, message } => {
            let operation = if *target { IoOperation::Write } else { IoOperation::Read };
            let (device, export, message) = (job.clone(), export.clone(), message.clone());
            say(ERROR, value(&BlockJobError { device, operation, action: *action, export, message }));
        }
        Event::BackOff { export, job, rest_ms, message } => {
            let (export, job, message) = (export.clone(), job.clone(), message.clone());
            say(BACK_OFF, value(&BackOff { export, job, active: rest_ms.is_some(), rest_ms: *rest_ms, message }));
        }
        Event::Mismatch { export, job, offset, mismatches } => {
            let (export, job, offset, mismatches) = (export.clone(), job.clone(), *offset, *mismatches);
            say(MISMATCH, value(&Mismatch { export, job, offset, mismatches }));
        }
        Event::Verified { export, job, verified_bytes, mismatches } => {
            let (export, job, verified_bytes, mismatches) = (export.clone(), job.clone(), *verified_bytes, *mismatches);
            say(VERIFIED, value(&Verified { export, job, verified_bytes, mismatches }));
        }
    }
    messages
}

/// Tells clients which events there are.
pub(super) fn describe(schema: &mut Schema) {
    schema.event(STATUS_CHANGE, &shape::<JobStatusChange>());
    for name in [READY, CANCELLED] {
        schema.event(name, &shape::<BlockJobProgress>());
    }
    schema.event(COMPLETED, &shape::<BlockJobCompleted>());
    schema.event(PENDING, &shape::<BlockJobPending>());
    schema.event(ERROR, &shape::<BlockJobError>());
    schema.event(PHASE, &shape::<Phase>());
    schema.event(BACK_OFF, &shape::<BackOff>());
    schema.event(MISMATCH, &shape::<Mismatch>());
    schema.event(VERIFIED, &shape::<Verified>());
}

/// One step of a job. How it ended is told before that it has.
fn moved(job: &JobInfo, from: JobStatus, to: JobStatus, say: &mut impl FnMut(&str, Value)) {
    match to {
        JobStatus::Concluded if job.at.phase == "cancelled" && !job.complete => say(CANCELLED, value(&progress(job))),
        JobStatus::Concluded => say(COMPLETED, value(&completed(job))),
        _ => {}
    }
    say(STATUS_CHANGE, value(&JobStatusChange { id: job.id.clone(), status: to }));
    match to {
        // A ready job that was paused and goes on is no more ready than before.
        JobStatus::Ready if from != JobStatus::Standby => say(READY, value(&progress(job))),
        JobStatus::Pending if !job.auto_finalize => {
            say(PENDING, value(&BlockJobPending { kind: JobType::Mirror, id: job.id.clone() }));
        }
        _ => {}
    }
}

fn progress(job: &JobInfo) -> BlockJobProgress {
    BlockJobProgress {
        kind: JobType::Mirror,
        device: job.id.clone(),
        len: job.at.total_bytes,
        offset: job.at.copied_bytes,
        speed: job.at.speed_bytes_per_s,
    }
}

fn completed(job: &JobInfo) -> BlockJobCompleted {
    let BlockJobProgress { kind, device, len, offset, speed } = progress(job);
    BlockJobCompleted { kind, device, len, offset, speed, error: error(job) }
}

fn phase(job: &JobInfo) -> Phase {
    Phase { export: job.at.export.clone(), job: job.id.clone(), phase: job.at.phase.clone(), paused: job.at.paused }
}

fn message(name: &str, data: Value, now: Duration) -> Value {
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    json!({ "event": name, "data": data, "timestamp": timestamp })
}
