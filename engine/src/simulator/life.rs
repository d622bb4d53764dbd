//! One life of the daemon in a world: its guests, its job, its copier, and what each of them waits for.
use super::files::SimIo;
use super::guest::Guest;
use crate::copier::{Copier, Progress};
use crate::disk::Tools;
use crate::export::gate::Gate;
use crate::io::{Arena, Completion, Io, Wait, Waker};
use crate::job::{Job, Phase};
use crate::journal::WordJournal;
use crate::mirror::Mirror;
use std::sync::Arc;

/// One life of the daemon.
pub struct Life {
    pub gate: Arc<Gate>,
    pub guests: Vec<Guest>,
    pub control: SimIo,
    pub arena: Arena,
    pub waker: Waker,
    pub job: Option<(Job, Option<Arc<WordJournal>>, Copier, SimIo)>,
    /// What follows its pivot.
    pub back: Option<(Arc<Mirror>, Copier, SimIo)>,
    pub copier_arena: Arena,
    pub copier_waker: Waker,
    pub copier_waits: bool,
    /// It leaves time to guests.
    pub copier_yields: bool,
    /// The guests are on the target.
    pub switched: bool,
    /// How many requests were answered, and how many had been when the job became pending.
    pub answered: u64,
    pub answered_before: Option<u64>,
    /// It was told to end.
    pub stopping: bool,
}

impl Life {
    /// True where no guest has anything left to ask.
    pub fn is_silent(&self) -> bool {
        self.guests.iter().all(|guest| guest.left == 0 && guest.is_answered())
    }

    /// True where no job is ending: then the daemon sees to that first.
    pub fn may_stop(&self) -> bool {
        self.job.as_ref().is_some_and(|(job, ..)| !job.is_ending() && job.phase() != Phase::Pivoting)
    }

    pub fn step_copier(&mut self) {
        let Some((_, _, copier, io)) = &mut self.job else { return };
        // As its thread does: it waits in its ring for an operation's end, or for its waker.
        if self.copier_waits && io.is_empty() && !self.copier_waker.was_woken() {
            return;
        }
        self.copier_waits = true;
        let mut done: Vec<Completion> = Vec::new();
        io.reap(Wait::No, &mut done).expect("a simulated queue");
        let progress = copier.step(&mut Tools { io, arena: &self.copier_arena, waker: &self.copier_waker }, &mut done);
        if let Progress::Throttled(_) = progress {
            assert!(self.copier_yields, "nobody set a limit");
            self.copier_waits = false;
        }
    }

    /// Who waits for what.
    pub fn describe(&self) -> String {
        let guests: Vec<bool> = self.guests.iter().map(Guest::is_idle).collect();
        let job = self.job.as_ref().map(|(job, _, copier, io)| {
            let mirror = job.mirror();
            let (left, settled) = (mirror.dirty.marked_bytes(), mirror.is_settled());
            format!(
                "{:?}, {left} marked, settled: {settled}, copier idle: {} {}",
                job.phase(),
                copier.is_idle(),
                io.is_empty()
            )
        });
        format!("guests idle: {guests:?}; job: {job:?}")
    }

    pub fn die(mut self) {
        self.control.abandon();
        self.guests.drain(..).for_each(Guest::die);
        if let Some((job, journal, copier, mut io)) = self.job.take() {
            io.abandon();
            std::mem::forget((job, journal, copier));
        }
        if let Some((mirror, copier, mut io)) = self.back.take() {
            io.abandon();
            std::mem::forget((mirror, copier));
        }
    }
}
