//! What commands answer and events say, by QEMU's names; `schema` tells clients of it.
use crate::control::jobs::{ErrorAction, IoStatus, JobStatus};
use serde::{Deserialize, Serialize};

/// An object without members.
#[derive(Serialize, Deserialize)]
pub(super) struct Empty {}

#[derive(Serialize, Deserialize)]
pub(super) struct VersionInfo {
    pub(super) qemu: VersionTriple,
    pub(super) package: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct VersionTriple {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) micro: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) struct CommandInfo {
    pub(super) name: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum JobType {
    Mirror,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct JobInfo {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: JobType,
    pub(super) status: JobStatus,
    pub(super) current_progress: u64,
    pub(super) total_progress: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockJobInfo {
    #[serde(rename = "type")]
    pub(super) kind: JobType,
    pub(super) device: String,
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) busy: bool,
    pub(super) paused: bool,
    pub(super) speed: u64,
    pub(super) io_status: IoStatus,
    pub(super) ready: bool,
    pub(super) status: JobStatus,
    pub(super) auto_finalize: bool,
    pub(super) auto_dismiss: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    pub(super) actively_synced: bool,
}

/// `JOB_STATUS_CHANGE`.
#[derive(Serialize, Deserialize)]
pub(super) struct JobStatusChange {
    pub(super) id: String,
    pub(super) status: JobStatus,
}

/// `BLOCK_JOB_READY` and `BLOCK_JOB_CANCELLED`.
#[derive(Serialize, Deserialize)]
pub(super) struct BlockJobProgress {
    #[serde(rename = "type")]
    pub(super) kind: JobType,
    pub(super) device: String,
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) speed: u64,
}

/// `BLOCK_JOB_COMPLETED`; with an error it has failed.
#[derive(Serialize, Deserialize)]
pub(super) struct BlockJobCompleted {
    #[serde(rename = "type")]
    pub(super) kind: JobType,
    pub(super) device: String,
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) speed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// `BLOCK_JOB_PENDING`.
#[derive(Serialize, Deserialize)]
pub(super) struct BlockJobPending {
    #[serde(rename = "type")]
    pub(super) kind: JobType,
    pub(super) id: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum IoOperation {
    Read,
    Write,
}

/// `BLOCK_JOB_ERROR`, with members of our own at its end.
#[derive(Serialize, Deserialize)]
pub(super) struct BlockJobError {
    pub(super) device: String,
    pub(super) operation: IoOperation,
    pub(super) action: ErrorAction,
    pub(super) export: String,
    pub(super) message: String,
}

/// `BLKMIRROR_PHASE`.
#[derive(Serialize, Deserialize)]
pub(super) struct Phase {
    pub(super) export: String,
    pub(super) job: String,
    pub(super) phase: String,
    pub(super) paused: bool,
}

/// `BLKMIRROR_BACK_OFF`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BackOff {
    pub(super) export: String,
    pub(super) job: String,
    pub(super) active: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rest_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) message: Option<String>,
}

/// `BLKMIRROR_MISMATCH`.
#[derive(Serialize, Deserialize)]
pub(super) struct Mismatch {
    pub(super) export: String,
    pub(super) job: String,
    pub(super) offset: u64,
    pub(super) mismatches: u64,
}

/// `BLKMIRROR_VERIFIED`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Verified {
    pub(super) export: String,
    pub(super) job: String,
    pub(super) verified_bytes: u64,
    pub(super) mismatches: u64,
}

/// One entry of `query-qmp-schema`: which members there are depends on `meta-type`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct SchemaInfo {
    pub(super) name: String,
    pub(super) meta_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) json_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) element_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) members: Option<Vec<SchemaMember>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) values: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) arg_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ret_type: Option<String>,
}

/// A member of an object, or a word of an enumeration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct SchemaMember {
    pub(super) name: String,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<String>,
    /// There, and null, where the member may be left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) default: Option<()>,
}
