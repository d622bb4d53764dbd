//! The arguments of each command, by QEMU's names where QEMU has the command.
use super::answers::JobType;
use super::problem::Problem;
use crate::control::creation::CreateOptions;
use crate::control::{CELLS_MAX, Changes, MirrorRequest, Mode, OnError, Request, SnapshotRequest, TargetFormat};
use serde::Deserialize;

/// No arguments.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// What a client wants to enable.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Capabilities {
    #[serde(default)]
    pub(super) enable: Vec<String>,
}

/// A job, by the name that `block-job-*` has for it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Device {
    pub(super) device: String,
}

/// A job, by the name that `job-*` has for it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JobId {
    pub(super) id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CancelJob {
    pub(super) device: String,
    #[serde(default)]
    pub(super) force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetSpeed {
    pub(super) device: String,
    pub(super) speed: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ChangeJob {
    pub(super) id: String,
    #[serde(rename = "type")]
    _type: JobType,
    pub(super) copy_mode: Mode,
}

/// An export that has to be named.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedExport {
    pub(super) export: String,
}

/// Exports that are pivoted at one instant.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedExports {
    pub(super) exports: Vec<String>,
    #[serde(default)]
    pub(super) verified: bool,
}

/// An export whose job is verified.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Verify {
    pub(super) export: String,
    #[serde(default)]
    pub(super) wait: bool,
}

/// An export that is to go.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoveExport {
    pub(super) export: String,
    #[serde(default)]
    pub(super) force: bool,
}

/// An export whose disk gets another size.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Resize {
    pub(super) export: String,
    pub(super) size: u64,
}

/// The arguments of QEMU's `block_resize`: an export has one name, which may be given by either.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct BlockResize {
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    node_name: Option<String>,
    size: u64,
}

impl BlockResize {
    /// # Errors
    /// That no export is named, or two.
    pub(super) fn into_request(self) -> Result<Request, Problem> {
        match (self.device, self.node_name) {
            (Some(export), None) | (None, Some(export)) => Ok(Request::Resize { export, size: self.size }),
            _ => Err(Problem::invalid("block_resize: one of 'device' and 'node-name' has to name the export")),
        }
    }
}

/// The arguments of QEMU's `blockdev-snapshot-sync`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct SnapshotSync {
    /// QEMU takes a node's name instead, which exports have not.
    #[serde(default)]
    pub(super) device: Option<String>,
    pub(super) snapshot_file: String,
    #[serde(default)]
    pub(super) format: Option<TargetFormat>,
    #[serde(default = "absolute_paths")]
    pub(super) mode: NewImageMode,
}

fn absolute_paths() -> NewImageMode {
    NewImageMode::AbsolutePaths
}

impl SnapshotSync {
    /// # Errors
    /// That no export is named.
    pub(super) fn into_request(self) -> Result<SnapshotRequest, Problem> {
        let unnamed = || Problem::invalid("blockdev-snapshot-sync: 'device' has to name the export");
        Ok(SnapshotRequest {
            export: self.device.ok_or_else(unnamed)?,
            file: self.snapshot_file,
            reuse_external: self.mode == NewImageMode::Existing,
            format: self.format,
            ..SnapshotRequest::default()
        })
    }
}

/// One export, or all of them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MaybeExport {
    #[serde(default)]
    pub(super) export: Option<String>,
}

/// A job's disk, and in how many parts it is wanted.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MapCells {
    export: String,
    #[serde(default = "some_cells")]
    cells: u64,
}

impl MapCells {
    pub(super) fn into_request(self) -> Result<Request, Problem> {
        let Self { export, cells } = self;
        match cells {
            1..=CELLS_MAX => Ok(Request::Map { export, cells }),
            _ => {
                Err(Problem::invalid(format!("blkmirror-map: argument 'cells': {cells} is not from 1 to {CELLS_MAX}")))
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cancel {
    pub(super) export: String,
    #[serde(default)]
    pub(super) force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Set {
    export: String,
    #[serde(default)]
    speed: Option<u64>,
    #[serde(default)]
    mode: Option<Mode>,
    #[serde(default)]
    on_source_error: Option<OnError>,
    #[serde(default)]
    on_target_error: Option<OnError>,
    #[serde(default)]
    pause_budget: Option<u64>,
    #[serde(default)]
    buf_size: Option<u64>,
    #[serde(default)]
    latency_factor: Option<u64>,
    #[serde(default)]
    deadline: Option<u64>,
    #[serde(default)]
    max_slowdown: Option<u64>,
    #[serde(default)]
    max_lag: Option<u64>,
}

impl Set {
    pub(super) fn into_request(self) -> Result<Request, Problem> {
        let changes = Changes {
            speed: self.speed,
            mode: self.mode,
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            pause_budget: self.pause_budget,
            buf_size: self.buf_size,
            latency_factor: self.latency_factor,
            deadline: self.deadline,
            max_slowdown: self.max_slowdown,
            max_lag: self.max_lag,
        };
        match changes == Changes::default() {
            true => Err(Problem::invalid(
                "blkmirror-set: give 'speed', 'mode', 'on-source-error', 'on-target-error', 'pause-budget', 'buf-size', \
                 'latency-factor', 'deadline', 'max-slowdown' or 'max-lag'",
            )),
            false => Ok(Request::Set { export: self.export, changes }),
        }
    }
}

/// libvirt's `virDomainBlockRebase`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockRebase {
    pub(super) export: String,
    #[serde(default)]
    pub(super) base: Option<String>,
    #[serde(default)]
    pub(super) bandwidth: u64,
    #[serde(default)]
    pub(super) flags: u32,
    #[serde(default)]
    pub(super) dry_run: bool,
}

/// libvirt's `virDomainBlockJobAbort`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JobAbort {
    pub(super) export: String,
    #[serde(default)]
    pub(super) flags: u32,
}

/// QEMU's `drive-mirror`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DriveMirror {
    device: String,
    target: String,
    sync: Sync,
    #[serde(default)]
    format: Option<TargetFormat>,
    #[serde(default)]
    mode: NewImageMode,
    #[serde(default)]
    job_id: Option<String>,
    #[serde(default)]
    speed: u64,
    #[serde(default)]
    granularity: u64,
    #[serde(default)]
    buf_size: u64,
    #[serde(default)]
    on_source_error: OnError,
    #[serde(default)]
    on_target_error: OnError,
    #[serde(default)]
    copy_mode: Mode,
    /// Ours alone: how the target is made.
    #[serde(default)]
    options: CreateOptions,
    /// Ours alone: answer whether it could be done.
    #[serde(default)]
    dry_run: bool,
    /// Ours alone: everything is read back when the job is ready.
    #[serde(default)]
    verify: bool,
    #[serde(default = "yes")]
    unmap: bool,
    #[serde(default = "yes")]
    auto_finalize: bool,
    #[serde(default = "yes")]
    auto_dismiss: bool,
}

/// What is copied.
#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Sync {
    Full,
    Top,
    None,
}

/// Whether the target is there already.
#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum NewImageMode {
    Existing,
    #[default]
    AbsolutePaths,
}

impl DriveMirror {
    /// The same wish as a mirror request.
    ///
    /// # Errors
    /// What QEMU has and this program has not, by the argument's name.
    pub(super) fn into_request(self) -> Result<MirrorRequest, Problem> {
        if self.sync == Sync::None {
            return Err(Problem::unsupported(
                "drive-mirror: 'sync' 'none' is not supported, for its target is a copy of no instant: take 'full' or \
                 'top', or a snapshot, whose overlay has what is written from then on",
            ));
        }
        Ok(MirrorRequest {
            export: self.device,
            target: self.target,
            shallow: self.sync == Sync::Top,
            reuse_external: self.mode == NewImageMode::Existing,
            format: self.format,
            mode: self.copy_mode,
            speed: self.speed,
            granularity: self.granularity,
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            buf_size: self.buf_size,
            unmap: self.unmap,
            dry_run: self.dry_run,
            job_id: self.job_id,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            options: self.options,
            verify: self.verify,
            ..MirrorRequest::default()
        })
    }
}

fn some_cells() -> u64 {
    256
}

fn yes() -> bool {
    true
}
