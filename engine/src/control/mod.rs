//! What an operator can ask of a running daemon, and what the daemon answers.
//!
//! `Request` and `Reply` are the API: QMP is one way to write them down, the command line another.
//!
//! ```text
//! qmp      one client's session: bytes to requests, replies and events to bytes
//! creation how a target is made
//! jobs     where a job stands, by QEMU's names
//! libvirt  the same requests by libvirt's numbers
//! options  what a daemon is started with
//! ```
pub mod creation;
pub mod jobs;
pub mod libvirt;
pub mod options;
pub mod qmp;

use creation::CreateOptions;
use jobs::{ErrorAction, IoStatus, JobInfo, JobStatus};
use options::ExportOptions;
use serde::{Deserialize, Serialize};

/// One wish of an operator.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Start a mirror job.
    Mirror(MirrorRequest),
    /// How one export stands, or all of them.
    Status(Option<String>),
    /// The jobs: those under way, and those that nobody has dismissed yet.
    Jobs,
    /// How the chunks of a job's disk stand, in so many parts.
    Map {
        /// Whose job.
        export: String,
        /// How many parts, `CELLS_MAX` at most.
        cells: u64,
    },
    /// Make the target the disk that is served. Answered when it is done.
    ///
    /// The job of a request with `auto_finalize: false` waits for `Finalize` before it is ended with a whole target,
    /// unless whoever asks for the end waits for it.
    Pivot(PivotRequest),
    /// End the job, the guest staying on the source. Answered when it is done; of the wait the same is true.
    Cancel {
        /// Whose job.
        export: String,
        /// Give up at once, also when ready.
        force: bool,
    },
    /// End a ready job, its target a copy of that instant; refused before ready, where `Cancel` gives
    /// up. Answered when it is done.
    Finish(String),
    /// Carry out the end that was asked for.
    Finalize(String),
    /// Forget a job that has ended, by its own name.
    Dismiss(String),
    /// Stop copying; guest writes are still tracked.
    Pause(String),
    /// Go on copying.
    Resume(String),
    /// Change a running job, also for its next life.
    Set {
        /// Whose job.
        export: String,
        /// What.
        changes: Changes,
    },
    /// Make the targets of several exports the disks that are served, at one instant. Answered when it is done.
    PivotTogether {
        /// Of which.
        exports: Vec<String>,
        /// Only where each of them was verified.
        verified: bool,
    },
    /// End the way back from a pivot that kept its source. Answered when it is done.
    Commit(String),
    /// Read back from the target of a ready job what it has, and hold it against the source. Answered when everything was
    /// equal once; who does not wait is answered when it has begun.
    Verify(String),
    /// Put a new overlay on top of an export's chain. Answered when it is done.
    Snapshot(SnapshotRequest),
    /// Make an export's disk larger. Answered when it is; clients see it when they connect again.
    Resize {
        /// Whose disk.
        export: String,
        /// Its bytes from then on.
        size: u64,
    },
    /// Serve one more disk, also after a restart.
    AddExport(ExportOptions),
    /// Serve a disk no more. Answered when it is closed.
    RemoveExport {
        /// Which.
        export: String,
        /// Also where clients are connected: their connections end.
        force: bool,
    },
    /// Give the sockets, the connections and the images to another process, which asks for them.
    HandOver(HandOver),
    /// End the daemon.
    Quit,
}

/// Who wants to take over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HandOver {
    /// Which words it understands.
    pub version: u32,
    /// What it was started with.
    pub options: Vec<String>,
}

/// What of a running job is changed, in whatever phase it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Bytes a second, 0 for no limit.
    pub speed: Option<u64>,
    /// How guest writes are handled.
    pub mode: Option<Mode>,
    /// What to do when the source fails.
    pub on_source_error: Option<OnError>,
    /// What to do when the target fails.
    pub on_target_error: Option<OnError>,
    /// How long guests may be kept waiting for the last pass of an end, in milliseconds.
    pub pause_budget: Option<u64>,
    /// How many bytes may be under way, 0 for as many as there is memory for.
    pub buf_size: Option<u64>,
    /// How many times as long as without the copy guest requests may take, 0 for no bound.
    pub latency_factor: Option<u64>,
    /// When it is to be ready, in seconds since 1970, 0 for no such time.
    pub deadline: Option<u64>,
    /// How many times as slow guest writes may be made for a bound.
    pub max_slowdown: Option<u64>,
    /// How many bytes the target may be behind, 0 for no bound.
    pub max_lag: Option<u64>,
}

impl Changes {
    /// Changes what is asked of a job that has not begun.
    pub fn apply(self, request: &mut MirrorRequest) {
        request.speed = self.speed.unwrap_or(request.speed);
        request.mode = self.mode.unwrap_or(request.mode);
        request.on_source_error = self.on_source_error.unwrap_or(request.on_source_error);
        request.on_target_error = self.on_target_error.unwrap_or(request.on_target_error);
        request.pause_budget = self.pause_budget.unwrap_or(request.pause_budget);
        request.buf_size = self.buf_size.unwrap_or(request.buf_size);
        request.latency_factor = self.latency_factor.unwrap_or(request.latency_factor);
        request.deadline = self.deadline.unwrap_or(request.deadline);
        request.max_slowdown = self.max_slowdown.unwrap_or(request.max_slowdown);
        request.max_lag = self.max_lag.unwrap_or(request.max_lag);
    }
}

/// How long guests may be kept waiting for the last pass of an end, in milliseconds: from 1 to this.
pub const PAUSE_BUDGET_MAX: u64 = 60 * 60 * 1000;

/// The same where nobody said it.
pub const PAUSE_BUDGET: u64 = 5000;

/// How many times as long as without the copy guest requests may take, where nobody says otherwise.
pub const LATENCY_FACTOR: u64 = 2;

/// How many times as slow guest writes may be made for a bound, where nobody says otherwise.
pub const MAX_SLOWDOWN: u64 = 10;

/// Into how many parts a map can divide a disk.
pub const CELLS_MAX: u64 = 4096;

/// A copy request; what its flags mean together is in `docs/flags.md`.
///
/// Its serialised form is the arguments of `blkmirror-mirror`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MirrorRequest {
    /// The export whose disk is copied.
    pub export: String,
    /// Where to.
    pub target: String,
    /// Copy only what the top layer holds.
    #[serde(default)]
    pub shallow: bool,
    /// The target is there already.
    #[serde(default)]
    pub reuse_external: bool,
    /// The target's format, where it was named.
    #[serde(default)]
    pub format: Option<TargetFormat>,
    /// The target has to be a block device.
    #[serde(default)]
    pub block_device: bool,
    /// How guest writes are handled.
    #[serde(default)]
    pub mode: Mode,
    /// Bytes a second, 0 for no limit.
    #[serde(default)]
    pub speed: u64,
    /// Bytes a chunk: a power of two from 512 to 64 MiB; 0 leaves the choice to the engine.
    #[serde(default)]
    pub granularity: u64,
    /// What to do when the source fails.
    #[serde(default)]
    pub on_source_error: OnError,
    /// What to do when the target fails.
    #[serde(default = "back_off")]
    pub on_target_error: OnError,
    /// How long guests may be kept waiting for the last pass of an end, in milliseconds.
    #[serde(default = "pause_budget")]
    pub pause_budget: u64,
    /// How many bytes may be under way; 0 leaves the choice to the engine.
    #[serde(default)]
    pub buf_size: u64,
    /// How many times as long as without the copy guest requests may take; 0 is no bound.
    #[serde(default = "latency_factor")]
    pub latency_factor: u64,
    /// When it is to be ready, in seconds since 1970; 0 is no such time.
    #[serde(default)]
    pub deadline: u64,
    /// How many times as slow guest writes may be made for a bound, from 1 on.
    #[serde(default = "max_slowdown")]
    pub max_slowdown: u64,
    /// How many bytes the target may be behind once everything was brought over; 0 is no bound.
    #[serde(default)]
    pub max_lag: u64,
    /// Zeroes become holes, where data becomes zeroes.
    #[serde(default = "yes")]
    pub unmap: bool,
    /// Blocks are shared with the source instead of moved, where a raw target lies on its file system and that can.
    #[serde(default = "yes")]
    pub reflink: bool,
    /// Answer whether it could be done, and do nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Name of the job; the export's name where it is not given.
    #[serde(default)]
    pub job_id: Option<String>,
    /// The end that is asked for is carried out at once, and not when the job is told to finalize.
    #[serde(default = "yes")]
    pub auto_finalize: bool,
    /// The job is forgotten when it has ended, and not when it is dismissed.
    #[serde(default = "yes")]
    pub auto_dismiss: bool,
    /// How the target is made.
    #[serde(default, skip_serializing_if = "CreateOptions::is_empty")]
    pub options: CreateOptions,
    /// A target that is made names its backing by the way from its own folder.
    #[serde(default, skip_serializing_if = "is_false")]
    pub relative_backing: bool,
    /// The target is a folder, to which every layer of the chain goes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub chain: bool,
    /// When the job is ready, everything is read back from the target and held against the source.
    #[serde(default, skip_serializing_if = "is_false")]
    pub verify: bool,
}

/// A request to make the target of an export's job the disk that is served.
///
/// Its serialised form is the arguments of `blkmirror-pivot`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PivotRequest {
    /// Whose job.
    pub export: String,
    /// Only where everything was verified since the job began.
    #[serde(default, skip_serializing_if = "is_false")]
    pub verified: bool,
    /// The source is kept up to date from then on, to go back to.
    #[serde(default, skip_serializing_if = "is_false")]
    pub keep_source: bool,
    /// Back to the source that a pivot before has kept.
    #[serde(default, skip_serializing_if = "is_false")]
    pub back: bool,
}

impl PivotRequest {
    /// The plain pivot of an export.
    pub fn of(export: impl Into<String>) -> Self {
        Self { export: export.into(), ..Self::default() }
    }
}

/// A request for an external snapshot: a new overlay becomes the top of an export's chain, and what was the top is not
/// written to any more.
///
/// Its serialised form is the arguments of `blkmirror-snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Whose disk.
    pub export: String,
    /// The overlay's file.
    pub file: String,
    /// The overlay is there already; its contents hide the disk's.
    #[serde(default)]
    pub reuse_external: bool,
    /// Its format: qcow2, which is what there is.
    #[serde(default)]
    pub format: Option<TargetFormat>,
    /// How it is made.
    #[serde(default, skip_serializing_if = "CreateOptions::is_empty")]
    pub options: CreateOptions,
    /// It names its backing by the way from its own folder.
    #[serde(default, skip_serializing_if = "is_false")]
    pub relative_backing: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde asks")]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl Default for MirrorRequest {
    fn default() -> Self {
        Self {
            export: String::new(),
            target: String::new(),
            shallow: false,
            reuse_external: false,
            format: None,
            block_device: false,
            mode: Mode::default(),
            speed: 0,
            granularity: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::BackOff,
            pause_budget: PAUSE_BUDGET,
            buf_size: 0,
            latency_factor: LATENCY_FACTOR,
            deadline: 0,
            max_slowdown: MAX_SLOWDOWN,
            max_lag: 0,
            unmap: true,
            reflink: true,
            dry_run: false,
            job_id: None,
            auto_finalize: true,
            auto_dismiss: true,
            options: CreateOptions::default(),
            relative_backing: false,
            chain: false,
            verify: false,
        }
    }
}

fn yes() -> bool {
    true
}

fn back_off() -> OnError {
    OnError::BackOff
}

fn pause_budget() -> u64 {
    PAUSE_BUDGET
}

fn latency_factor() -> u64 {
    LATENCY_FACTOR
}

fn max_slowdown() -> u64 {
    MAX_SLOWDOWN
}

/// Formats that a target can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetFormat {
    /// Guest offset and file offset are the same.
    Raw,
    /// QEMU's own.
    Qcow2,
}

/// How guest writes are handled while a mirror runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The engine chooses.
    #[default]
    Auto,
    /// Marked, and copied later.
    Background,
    /// Written to both sides where the copy has been already.
    WriteBlocking,
}

/// What a job does when one side fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// End the job with the error.
    #[default]
    Report,
    /// Pause until it is resumed.
    Stop,
    /// Pause when there is no space, else end: QEMU's `auto` for a job.
    #[serde(alias = "auto")]
    Enospc,
    /// Try again, and again.
    Ignore,
    /// Rest, try again with what failed, and go on when that succeeds; the rests grow.
    BackOff,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// Nothing to say.
    Done {},
    /// The named export's status.
    One(Box<Status>),
    /// Everybody's.
    All(Vec<Status>),
    /// The jobs.
    Jobs(Vec<JobInfo>),
    /// A job was started, or would be.
    Started(Started),
    /// How the chunks of a job's disk stand.
    Map(MirrorMap),
}

/// How the chunks of a job's disk stand, part by part: the parts are equally long, and each list has a number of
/// chunks for each of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MirrorMap {
    /// The export's name.
    pub export: String,
    /// The job's name.
    pub job: String,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    /// How many were looked at: all of them, but on very large disks.
    pub chunks: Vec<u64>,
    /// The target has them.
    pub copied: Vec<u64>,
    /// They have to be copied, some of them again.
    pub dirty: Vec<u64>,
    /// They are being copied. What is none of the three never had to be: it reads as zeroes, the layers below both
    /// disks have it, or the seeding has not been there.
    pub copying: Vec<u64>,
}

/// What a copy request came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Started {
    /// The job's name.
    pub job: String,
    /// What the request was taken to mean, a sentence each: a shallow copy that became a full one.
    pub notes: Vec<String>,
}

/// How one export stands. The field names are a contract.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The export's name.
    pub export: String,
    /// Path of the image that is the truth.
    pub serving: String,
    /// `none`, `seeding`, `converging`, `ready`, `pivoting`, `pivoted`, `cancelled`, `failed`.
    pub phase: String,
    /// True while no copying is done on an operator's wish or after an error.
    pub paused: bool,
    /// The job's name.
    pub job: Option<String>,
    /// How guest writes are handled.
    pub mode: Option<Mode>,
    /// What the job has to bring over, new writes included.
    pub total_bytes: u64,
    /// What it has brought over.
    pub copied_bytes: u64,
    /// What is left: never 0 before `ready`.
    pub remaining_bytes: u64,
    /// What is marked in the bitmap.
    pub dirty_bytes: u64,
    /// The limit; 0 is none.
    pub speed_bytes_per_s: u64,
    /// What is done when the source fails.
    #[serde(default)]
    pub on_source_error: Option<OnError>,
    /// What is done when the target fails.
    #[serde(default)]
    pub on_target_error: Option<OnError>,
    /// What its last error did to the job: `ok`, `failed` or `nospace`.
    #[serde(default)]
    pub io_status: IoStatus,
    /// For how long the job rests before it tries again what failed; none where it does not back off.
    #[serde(default)]
    pub back_off_ms: Option<u64>,
    /// What could not be copied, and was not since.
    #[serde(default)]
    pub failed_bytes: u64,
    /// Whether guests write to the source alone because the target took too long for one of them.
    #[serde(default)]
    pub fell_back: bool,
    /// What the target has not answered of what guests wrote to both sides, and wait for no more.
    #[serde(default)]
    pub late_bytes: u64,
    /// How long guests may be kept waiting for the last pass of an end.
    #[serde(default)]
    pub pause_budget_ms: Option<u64>,
    /// How many bytes may be under way.
    #[serde(default)]
    pub buf_size_bytes: Option<u64>,
    /// Memory for what is known of each chunk, and of writes under way; in part only where few were marked.
    #[serde(default)]
    pub bitmap_memory_bytes: Option<u64>,
    /// Memory that the tables of all images of source and target may take.
    #[serde(default)]
    pub tables_memory_bytes: Option<u64>,
    /// Memory that the copy threads have for what is under way.
    #[serde(default)]
    pub buffers_memory_bytes: Option<u64>,
    /// How many times as long as without the copy guest requests may take; 0 is no bound.
    #[serde(default)]
    pub latency_factor: Option<u64>,
    /// The 99th percentile of how long guest requests took of late; none where no bound is kept, or nobody asked.
    #[serde(default)]
    pub guest_p99_us: Option<u64>,
    /// The same while nothing was copied.
    #[serde(default)]
    pub guest_p99_alone_us: Option<u64>,
    /// In how many seconds the job is to be ready: 0 where it is late, none where nobody asked for it.
    #[serde(default)]
    pub deadline_s: Option<u64>,
    /// How many bytes the target may be behind; none where that has no bound.
    #[serde(default)]
    pub max_lag_bytes: Option<u64>,
    /// How many times as slow guest writes may be made for either.
    #[serde(default)]
    pub max_slowdown: Option<u64>,
    /// How many times as slow they are made now.
    #[serde(default)]
    pub slowdown: Option<f64>,
    /// Why one of these bounds will not be kept.
    #[serde(default)]
    pub warning: Option<String>,
    /// What of the copy shares the source's blocks.
    #[serde(default)]
    pub shared_bytes: u64,
    /// When the job may be ready, at the present rate.
    pub eta_s: Option<u64>,
    /// When it would be at the rate of the fastest second of late.
    #[serde(default)]
    pub eta_low_s: Option<u64>,
    /// When it would be at that of the slowest; none where it never would.
    #[serde(default)]
    pub eta_high_s: Option<u64>,
    /// What the source held when the job began, as far as it was looked at.
    #[serde(default)]
    pub data_bytes: u64,
    /// How many times over that has been copied: 1 where each byte was brought over once.
    #[serde(default)]
    pub redundancy: Option<f64>,
    /// What copiers have brought over of late.
    #[serde(default)]
    pub copy_rate_bytes_per_s: u64,
    /// What guests have marked anew of late.
    #[serde(default)]
    pub dirty_rate_bytes_per_s: u64,
    /// What guests have written of late.
    #[serde(default)]
    pub guest_rate_bytes_per_s: u64,
    /// How long a guest's write has waited for the job of late, on average: for a claim, and for the target where
    /// both sides are written.
    #[serde(default)]
    pub guest_delay_us: Option<u64>,
    /// How far the target is behind; none before everything was brought over once.
    #[serde(default)]
    pub lag_bytes: Option<u64>,
    /// For how long what it lacks has been missing.
    #[serde(default)]
    pub lag_s: Option<f64>,
    /// What was read back from the target and equal once, since that was asked for; none where it was not.
    #[serde(default)]
    pub verified_bytes: Option<u64>,
    /// Everything was.
    #[serde(default)]
    pub verified: bool,
    /// It is being read back, or will be when the job is ready again.
    #[serde(default)]
    pub verifying: bool,
    /// How often the target had other bytes than it was given. They were copied again.
    #[serde(default)]
    pub mismatches: Option<u64>,
    /// The job keeps the source of the last pivot up to date, to go back to.
    #[serde(default)]
    pub rollback: bool,
    /// Path of the source's top image.
    pub source: String,
    /// Path of the target.
    pub target: Option<String>,
    /// Why the job failed or is paused.
    pub error: Option<String>,
    /// What the last job's request was taken to mean.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl Status {
    /// True while a job is under way on this export.
    pub fn is_active(&self) -> bool {
        matches!(self.phase.as_str(), "seeding" | "converging" | "ready" | "pivoting")
    }
}

/// A refusal, with the name that libvirt has for it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Which kind.
    pub code: Code,
    /// What was wrong and what to do.
    pub message: String,
}

/// What was tried, and failed.
impl From<formats::error::Error> for Refusal {
    fn from(error: formats::error::Error) -> Self {
        Self::new(Code::OperationFailed, error.one_line())
    }
}

impl Refusal {
    /// A refusal of kind `code`, in words.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// libvirt's names of refusals, without their prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    /// An argument is wrong in itself.
    InvalidArg,
    /// The combination asks for what cannot be.
    ConfigUnsupported,
    /// Not in this state.
    OperationInvalid,
    /// Not by this program, or not on this file.
    OperationUnsupported,
    /// An argument asks for what this program has not.
    ArgumentUnsupported,
    /// Tried, and failed.
    OperationFailed,
    /// A copy is under way on this export, or is not ready for what was asked.
    BlockCopyActive,
}

/// Something that happened to a job, for everybody who listens.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It stands elsewhere now, is in another phase, or was paused or resumed.
    Job {
        /// The job as it is now.
        job: Box<JobInfo>,
        /// Where it stood when it was told of last, where it stands now, and what was between.
        path: Vec<JobStatus>,
    },
    /// One side failed.
    IoError {
        /// Whose job.
        export: String,
        /// The job's name.
        job: String,
        /// True where the target failed, false where the source did.
        target: bool,
        /// What the job does about it.
        action: ErrorAction,
        /// The error.
        message: String,
    },
    /// A job backs off, or goes on.
    BackOff {
        /// Whose job.
        export: String,
        /// The job's name.
        job: String,
        /// For how long it rests first; `None` where it goes on.
        rest_ms: Option<u64>,
        /// Why it rests.
        message: Option<String>,
    },
    /// The target of a job has other bytes than it was given.
    Mismatch {
        /// Whose job.
        export: String,
        /// The job's name.
        job: String,
        /// Where the last one was found.
        offset: u64,
        /// How many there are since the verification began.
        mismatches: u64,
    },
    /// Everything was read back from the target of a job.
    Verified {
        /// Whose job.
        export: String,
        /// The job's name.
        job: String,
        /// Bytes of the disk.
        verified_bytes: u64,
        /// How many mismatches were found, and mended.
        mismatches: u64,
    },
}
