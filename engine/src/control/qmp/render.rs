//! Writes the daemon's replies down in QEMU's words.
use crate::control::{Mode, Reply, Status};
use serde_json::{Value, json};

/// How a reply becomes a `return` member.
pub(super) type Render = fn(&Reply) -> Value;

/// The reply as it is, for our own commands.
pub(super) fn whole(reply: &Reply) -> Value {
    serde_json::to_value(reply).expect("a reply has no map with keys other than text")
}

/// An empty object, for commands whose QEMU namesakes have nothing to say.
pub(super) fn nothing(_: &Reply) -> Value {
    json!({})
}

/// `query-block-jobs`.
pub(super) fn block_jobs(reply: &Reply) -> Value {
    active(reply).map(|(job, status)| block_job(job, status)).collect()
}

/// `query-jobs`.
pub(super) fn jobs(reply: &Reply) -> Value {
    active(reply).map(|(job, status)| self::job(job, status)).collect()
}

/// The export whose job under way is called `job`.
pub(super) fn export_of(reply: &Reply, job: &str) -> Option<String> {
    active(reply).find(|(name, _)| *name == job).map(|(_, status)| status.export.clone())
}

/// QEMU's name of where a job stands; it has fewer phases, and a pause is one of them.
pub(super) fn job_status(phase: &str, paused: bool) -> &'static str {
    match (phase, paused) {
        ("ready", false) => "ready",
        ("ready", true) => "standby",
        ("pivoting", _) => "waiting",
        ("pivoted" | "cancelled" | "failed", _) => "concluded",
        (_, true) => "paused",
        (_, false) => "running",
    }
}

/// The members that QEMU's events and queries about a job's progress share.
pub(super) fn progress(job: &str, status: &Status) -> Value {
    json!({
        "type": "mirror",
        "device": job,
        "len": status.total_bytes,
        "offset": status.copied_bytes,
        "speed": status.speed_bytes_per_s,
    })
}

fn active(reply: &Reply) -> impl Iterator<Item = (&str, &Status)> {
    let all: &[Status] = match reply {
        Reply::All(all) => all,
        Reply::One(one) => std::slice::from_ref(one.as_ref()),
        Reply::Done {} | Reply::Started(_) | Reply::Map(_) => &[],
    };
    all.iter().filter(|status| status.is_active()).filter_map(|status| Some((status.job.as_deref()?, status)))
}

fn block_job(job: &str, status: &Status) -> Value {
    let mut members = progress(job, status);
    members["busy"] = json!(!status.paused && status.remaining_bytes > 0);
    members["paused"] = json!(status.paused);
    members["io-status"] = json!(if status.paused && status.error.is_some() { "failed" } else { "ok" });
    members["ready"] = json!(status.phase == "ready");
    members["status"] = json!(job_status(&status.phase, status.paused));
    members["auto-finalize"] = json!(true);
    members["auto-dismiss"] = json!(true);
    members["actively-synced"] = json!(is_actively_synced(status));
    if let Some(error) = &status.error {
        members["error"] = json!(error);
    }
    members
}

fn job(job: &str, status: &Status) -> Value {
    let mut members = json!({
        "id": job,
        "type": "mirror",
        "status": job_status(&status.phase, status.paused),
        "current-progress": status.copied_bytes,
        "total-progress": status.total_bytes,
    });
    if let Some(error) = &status.error {
        members["error"] = json!(error);
    }
    members
}

/// Every guest write reaches both sides, and nothing is left of what came before.
fn is_actively_synced(status: &Status) -> bool {
    status.phase == "ready" && status.mode == Some(Mode::WriteBlocking) && status.dirty_bytes == 0
}
