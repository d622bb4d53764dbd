//! The way back from a pivot: a job from its target to its source, made ready before the pivot and following the guest
//! from the switch on.
//!
//! The source stays open, with its journal awake: what it was told before the switch is in the image or in the journal, so
//! after a kill the journal is brought in before the job goes on.
use super::super::exports::Export;
use super::super::threads::Worker;
use super::{Active, FLIGHTS, copiers, job_number, parts};
use crate::control::{Code, MirrorRequest, Mode, Refusal, TargetFormat};
use crate::job::Job;
use crate::mirror::Mirror;
use crate::open::identity;
use crate::planes::{Planes, TakenUp};
use crate::state::{KeptJob, KeptRollback, StateFolder, owner};
use formats::error::{Context, Error};
use formats::planes::Header;
use std::path::PathBuf;
use std::sync::Arc;

/// What the names of such jobs end with.
const SUFFIX: &str = "-back";

/// A way back that is ready.
pub(super) struct Back {
    pub mirror: Arc<Mirror>,
    kept: KeptRollback,
    id: String,
    threads: Vec<Worker>,
    room: super::Room,
}

impl Back {
    /// Ends its threads: it will not be gone.
    pub fn end(self) {
        self.threads.into_iter().for_each(Worker::end);
    }
}

impl Active {
    /// True where it is the way back from a pivot.
    pub fn rolls_back(&self) -> bool {
        self.kept.rollback
    }

    /// The name of the job that goes the other way, if this one's pivot keeps its source.
    pub fn name_of_back(&self) -> String {
        match self.job.id().strip_suffix(SUFFIX) {
            Some(id) if self.rolls_back() => id.to_owned(),
            _ => format!("{}{SUFFIX}", self.job.id()),
        }
    }

    /// The same where it is ready already.
    pub fn id_of_back(&self) -> Option<&str> {
        self.back.as_ref().map(|back| back.id.as_str())
    }

    /// True where the pivot that is under way keeps its source.
    pub fn keeps_source(&self) -> bool {
        self.back.is_some()
    }

    /// Makes the way back ready, which counts when the pivot has been recorded.
    pub fn prepare_back(&mut self, export: &Export, state: &StateFolder) -> Result<(), Refusal> {
        self.drop_back(state);
        let forward = Arc::clone(self.job.mirror());
        let top = forward.source.chain().top();
        if forward.source.is_remote() {
            let message = format!(
                "export {}: {} is another server's export, and is not kept up to date: leave out --keep-source",
                export.name,
                forward.source.name()
            );
            return Err(Refusal { code: Code::OperationUnsupported, message });
        }
        if !top.image.bitmap_names()?.is_empty() {
            let message = format!(
                "export {}: {} has persistent bitmaps, which go on in the target: they would not come back with the \
                 source, so it is not kept",
                export.name,
                top.path.display()
            );
            return Err(Refusal { code: Code::OperationUnsupported, message });
        }
        let generation = export.record.as_ref().map_or(0, |record| record.generation()) + 1;
        let back = self.back_of(&forward, generation, export, state)?;
        self.back = Some(Box::new(back));
        Ok(())
    }

    fn back_of(
        &self,
        forward: &Arc<Mirror>,
        generation: u64,
        export: &Export,
        state: &StateFolder,
    ) -> Result<Back, Error> {
        let top = forward.source.chain().top();
        let (source, target) = (&self.target, &top.path);
        let header = Header {
            boot: state.boot(),
            job: job_number(),
            size: forward.source.size(),
            chunk_bits: forward.dirty.chunk_len().trailing_zeros(),
            flights: FLIGHTS,
            source: owner(source)?,
            target: owner(target)?,
            target_is_zero: false,
        };
        // Both sides are equal when it begins.
        let taken = TakenUp { seen: header.size, ..TakenUp::nothing(&header) };
        let id = self.name_of_back();
        let request = MirrorRequest {
            export: export.name.clone(),
            target: target.display().to_string(),
            reuse_external: true,
            format: Some(if top.format == "raw" { TargetFormat::Raw } else { TargetFormat::Qcow2 }),
            job_id: Some(id.clone()),
            // Nobody waits for a disk that may never be used again.
            mode: Mode::Background,
            pause_budget: self.kept.request.pause_budget,
            latency_factor: self.kept.request.latency_factor,
            granularity: forward.dirty.chunk_len(),
            unmap: self.kept.request.unmap,
            ..MirrorRequest::default()
        };
        let job = KeptJob {
            source: forward.target.name(),
            target_identity: identity(target)?,
            planes: Some(header.job),
            paused: false,
            rollback: true,
            named: false,
            top: false,
            request,
        };
        let kept = KeptRollback { generation, job };
        let words = state.keep_rollback(&kept, &header, &taken)?;
        let settles = top.format != "raw";
        let planes = Planes::on(&words, &header, settles);
        let mut mirror = Mirror::on(planes, Arc::clone(&forward.target), Arc::clone(&forward.source), false);
        mirror.zeroing = forward.zeroing;
        mirror.courtesy.set_factor(self.kept.request.latency_factor);
        let mirror = Arc::new(mirror);
        let threads = copiers(&mirror, 0).context(|| format!("starting the copy threads of export {}", export.name));
        let (threads, room) = threads.inspect_err(|_| drop(state.forget_rollback(&export.name)))?;
        Ok(Back { mirror, kept, id, threads, room })
    }

    /// No pivot that keeps its source is under way any more.
    pub fn drop_back(&mut self, state: &StateFolder) {
        let Some(back) = self.back.take() else { return };
        if let Err(error) = state.forget_rollback(&back.kept.job.request.export) {
            tracing::warn!("{}", error.one_line());
        }
        back.end();
    }

    /// The job that follows, where the pivot that is over has kept its source. It has been in the guest's way since the
    /// switch.
    pub fn take_back(&mut self, export: &Export, state: &StateFolder) -> Option<Self> {
        let Back { mirror, kept, id, threads, room } = *self.back.take()?;
        if let Err(error) = state.adopt_rollback(&kept) {
            tracing::warn!("the way back does not outlive this daemon: {}", error.one_line());
        }
        let (request, target) = (&kept.job.request, PathBuf::from(&kept.job.request.target));
        let job = Job::follow(parts(request, id, mirror, export));
        Some(Self::of(job, threads, target, kept.job, room))
    }
}
