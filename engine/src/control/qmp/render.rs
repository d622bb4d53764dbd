//! Writes the daemon's replies down in QEMU's words.
use super::answers::{BlockJobInfo, JobInfo, JobType};
use crate::control::jobs::{self, JobStatus};
use crate::control::{Mode, Reply, Status};
use serde::Serialize;
use serde_json::{Value, json};

/// How a reply becomes a `return` member.
pub(super) type Render = fn(&Reply) -> Value;

/// A value of ours in JSON.
pub(super) fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).expect("no map of ours has keys other than text")
}

/// The reply as it is, for our own commands.
pub(super) fn whole(reply: &Reply) -> Value {
    value(reply)
}

/// An empty object, for commands whose QEMU namesakes have nothing to say.
pub(super) fn nothing(_: &Reply) -> Value {
    json!({})
}

/// `query-block-jobs`.
pub(super) fn block_jobs(reply: &Reply) -> Value {
    all(reply).iter().map(|job| value(&block_job(job))).collect()
}

/// `query-jobs`.
pub(super) fn jobs(reply: &Reply) -> Value {
    all(reply).iter().map(|job| value(&self::job(job))).collect()
}

/// The job called `id`.
pub(super) fn find<'a>(reply: &'a Reply, id: &str) -> Option<&'a jobs::JobInfo> {
    all(reply).iter().find(|job| job.id == id)
}

/// Why a job ended, or rests. In QEMU a cancelled job has an error as well.
pub(super) fn error(job: &jobs::JobInfo) -> Option<String> {
    let ended = matches!(job.stands, JobStatus::Concluded | JobStatus::Null);
    match (&job.at.error, ended && !job.complete) {
        (Some(error), _) => Some(error.clone()),
        (None, true) if job.at.phase == "failed" => Some("the job failed".to_owned()),
        (None, true) => Some("Operation canceled".to_owned()),
        (None, false) => None,
    }
}

fn all(reply: &Reply) -> &[jobs::JobInfo] {
    match reply {
        Reply::Jobs(jobs) => jobs,
        Reply::Done {} | Reply::One(_) | Reply::All(_) | Reply::Started(_) | Reply::Map(_) => &[],
    }
}

fn block_job(job: &jobs::JobInfo) -> BlockJobInfo {
    let Status { paused, remaining_bytes, .. } = *job.at;
    BlockJobInfo {
        kind: JobType::Mirror,
        device: job.id.clone(),
        len: job.at.total_bytes,
        offset: job.at.copied_bytes,
        busy: !paused && remaining_bytes > 0 && job.stands != JobStatus::Concluded,
        paused,
        speed: job.at.speed_bytes_per_s,
        io_status: job.io_status,
        ready: job.at.phase == "ready",
        status: job.stands,
        auto_finalize: job.auto_finalize,
        auto_dismiss: job.auto_dismiss,
        error: error(job),
        actively_synced: is_actively_synced(&job.at),
    }
}

fn job(job: &jobs::JobInfo) -> JobInfo {
    JobInfo {
        id: job.id.clone(),
        kind: JobType::Mirror,
        status: job.stands,
        current_progress: job.at.copied_bytes,
        total_progress: job.at.total_bytes,
        error: error(job),
    }
}

/// Every guest write reaches both sides, and nothing is left of what came before.
fn is_actively_synced(status: &Status) -> bool {
    status.phase == "ready" && status.mode == Some(Mode::WriteBlocking) && status.dirty_bytes == 0
}
