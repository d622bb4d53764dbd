//! Whether a job goes on after its daemon has ended, and from where: by its request and its planes.
//!
//! What cannot be believed is refused by name and kept as it is; the source is served all the same. From then on
//! its guest's writes are followed by nobody, so the request says that the planes count no more: when the
//! job can go on after all, source and target are compared.
use super::exports::Export;
use crate::control::{Code, MirrorRequest, Refusal};
use crate::open::{identity, same_image};
use crate::pivot::{RecordFile, recorded_as};
use crate::planes::TakenUp;
use crate::state::{KeptJob, StateFolder, owner};
use crate::target::Reached;
use formats::error::{Error, Result};
use formats::planes::{Header, Left};
use std::path::Path;

/// From where a job begins.
pub(super) enum Begin {
    /// From its start, with what was made ready for it.
    New(Reached),
    /// From what was left; the planes' tie to the request, and a chunk's length.
    Taken { taken: TakenUp, job: u64, chunk_len: u64 },
    /// From a comparison, and why.
    Compare(&'static str),
}

impl Begin {
    /// What the first planes of a job with `header` have.
    pub fn taken_up(self, header: &Header) -> TakenUp {
        match self {
            Self::New(_) => TakenUp::nothing(header),
            Self::Taken { taken, .. } => taken,
            Self::Compare(why) => TakenUp::everything(header, why),
        }
    }
}

/// What of a job is kept beside its request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kept {
    /// An operator has it rest.
    pub paused: bool,
    /// It is the way back from a pivot.
    pub rollback: bool,
}

/// A job that does not go on, and why.
pub(super) type Unresumed = Box<(MirrorRequest, Refusal)>;

/// The job that was under way, from where it goes on, and what else is kept of it; `None` where there was none, or its pivot
/// happened.
pub(super) fn find(
    export: &Export,
    state: &StateFolder,
) -> std::result::Result<Option<(MirrorRequest, Begin, Kept)>, Unresumed> {
    if let Err(error) = adopt(export, state) {
        // From now on nobody follows the guest: what is kept of either direction must not be believed later.
        let forgotten = state.forget_rollback(&export.name);
        forgotten.unwrap_or_else(|error| tracing::error!("{}", error.one_line()));
        let request = MirrorRequest { export: export.name.clone(), ..MirrorRequest::default() };
        return Err(refused(export, state, request, error.into()));
    }
    let kept = match state.kept_job(&export.name) {
        Ok(Some(kept)) => kept,
        Ok(None) => return Ok(None),
        Err(error) => {
            // Who understands it later must not believe what it says of the planes.
            let refusal = match state.set_job_aside(&export.name) {
                Ok(()) => error.into(),
                Err(moving) => {
                    Refusal::new(Code::OperationFailed, format!("{}; {}", error.one_line(), moving.one_line()))
                }
            };
            return Err(Box::new((MirrorRequest { export: export.name.clone(), ..MirrorRequest::default() }, refusal)));
        }
    };
    if same_image(Path::new(&kept.request.target), Path::new(&export.serving())) {
        // Killed between the record and the end of the job: the pivot happened.
        return Ok(None);
    }
    match begin(export, state, &kept) {
        Ok(begin) => {
            let mut request = kept.request;
            if let Begin::Taken { chunk_len, .. } = begin {
                request.granularity = chunk_len;
            }
            Ok(Some((request, begin, Kept { paused: kept.paused, rollback: kept.rollback })))
        }
        Err(error) => Err(refused(export, state, kept.request, error.into())),
    }
}

/// A way back counts if the pivot that it is of was recorded, and nothing since.
fn adopt(export: &Export, state: &StateFolder) -> Result<()> {
    let Some(kept) = state.kept_rollback(&export.name)? else { return state.forget_rollback(&export.name) };
    let newest = export.record.as_ref().and_then(RecordFile::newest);
    let is_source = |truth: &str| same_image(Path::new(truth), Path::new(&kept.job.source));
    match recorded_as(newest, kept.generation, is_source) && is_source(&export.serving()) {
        true => state.adopt_rollback(&kept),
        false => state.forget_rollback(&export.name),
    }
}

/// A job that does not go on: what it knows counts no more, for its source is served without it.
pub(super) fn refused(export: &Export, state: &StateFolder, request: MirrorRequest, refusal: Refusal) -> Unresumed {
    if let Ok(Some(kept)) = state.kept_job(&export.name)
        && kept.planes.is_some()
        && let Err(error) = state.keep_job(&KeptJob { planes: None, ..kept })
    {
        tracing::error!("{}", error.one_line());
    }
    Box::new((request, refusal))
}

fn give_up(export: &Export, state: &StateFolder) -> String {
    format!("to give the job up, remove {}", state.job_path(&export.name).display())
}

/// Refuses a job whose source or target is another file now.
pub(super) fn refuse_others(export: &Export, state: &StateFolder, kept: &KeptJob) -> Result<()> {
    let (source, target, give_up) = (export.serving(), &kept.request.target, give_up(export, state));
    match identity(Path::new(target)) {
        Ok(found) if found == kept.target_identity && same_image(Path::new(&source), Path::new(&kept.source)) => Ok(()),
        Err(error) => Err(Error::invalid(format!(
            "the job that was interrupted does not go on, for its target cannot be found ({}): bring it back and start \
             the daemon again; {give_up}",
            error.one_line()
        ))),
        Ok(_) => Err(Error::invalid(format!(
            "the job that was interrupted copied {} to {target}, and one of them is another file now: it does not go on; \
             bring that file back and start the daemon again; {give_up}",
            kept.source
        ))),
    }
}

fn begin(export: &Export, state: &StateFolder, kept: &KeptJob) -> Result<Begin> {
    refuse_others(export, state, kept)?;
    let (source, target, give_up) = (export.serving(), &kept.request.target, give_up(export, state));
    let path = state.planes_path(&export.name);
    let compare = format!("to have source and target compared, remove {} and start the daemon again", path.display());
    let Some(words) = state.planes_left(&export.name)? else {
        return Ok(Begin::Compare("nobody noted what the target lacks"));
    };
    let refuse = |what: &str| {
        Error::invalid(format!("{}: {what}: the job does not go on; {compare}; {give_up}", path.display()))
    };
    let left = Left::parse(&words).map_err(|error| refuse(&error.one_line()))?;
    let Some(number) = kept.planes else {
        return Ok(Begin::Compare("the source was served without the job meanwhile"));
    };
    let header = &left.header;
    if header.job != number {
        return Err(refuse("it is of another job"));
    }
    if header.source != owner(Path::new(&source))? || header.size != export.gate.route().disk.size() {
        return Err(refuse(&format!("it is of another source than {source} is now")));
    }
    if header.target != owner(Path::new(target))? {
        return Err(refuse(&format!("it is of another target than {target} is now")));
    }
    let taken = TakenUp::of(&left, state.boot());
    Ok(Begin::Taken { taken, job: number, chunk_len: 1 << header.chunk_bits })
}
