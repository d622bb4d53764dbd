//! Modes that are switched while guests write, and what is left to copy while they write to both sides.
use super::files::Dice;
use super::life::Life;
use crate::control::Mode;
use crate::job::{Job, Phase};
use crate::mirror::Mirror;
use formats::range::ByteRange;

/// When the mode of a job is switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switches {
    Never,
    /// At one step in so many, to any other mode.
    OneIn(u64),
    /// At these two steps: to both sides and back, or the other way round.
    At(u64, u64),
}

/// Switches, and watches.
pub struct Modes {
    dice: Dice,
    /// Guests write to both sides, and the job has looked everywhere.
    both: bool,
    /// What each guest had still to ask for when that began, where a request of it was under way.
    before: Vec<Option<u32>>,
    /// Which chunks were marked at the last look.
    marked: Vec<bool>,
    /// What each guest had left to ask for, and which chunks were marked at any time since its last request began.
    seen: Vec<(u32, Vec<bool>)>,
}

impl Modes {
    pub fn new(seed: u64) -> Self {
        Self { dice: Dice::new(seed ^ 0x5517), both: false, before: Vec::new(), marked: Vec::new(), seen: Vec::new() }
    }

    /// Switches the mode of the job under way, if it is time for that.
    pub fn switch(&mut self, switches: Switches, step: u64, life: &mut Life) {
        let Some((job, ..)) = life.job.as_mut().filter(|(job, ..)| !job.phase().is_over()) else { return };
        let other = |mode: &Mode| *mode != job.mode();
        let modes = match switches {
            Switches::OneIn(count) if self.dice.one_in(count) => {
                [Mode::Background, Mode::WriteBlocking, Mode::Auto].into_iter().filter(other).collect()
            }
            Switches::At(first, second) if [first, second].contains(&step) => {
                [Mode::WriteBlocking, Mode::Background].into_iter().find(other).into_iter().collect()
            }
            _ => Vec::new(),
        };
        if !modes.is_empty() {
            job.set_mode(modes[self.dice.roll(modes.len() as u64) as usize]);
        }
    }

    /// Where guests write to both sides, and what they began before is done, a request marks no chunk that was not marked
    /// while it was under way: whatever guests write, what is not left to copy when they begin is not left when they end.
    /// For worlds in which nothing fails and nobody discards.
    pub fn watch(&mut self, life: &Life) {
        let follows = |phase| matches!(phase, Phase::Converging | Phase::Ready);
        let job = life.job.as_ref().map(|(job, ..)| job).filter(|job| follows(job.phase()) && !life.switched);
        let Some(mirror) = job.map(Job::mirror).filter(|mirror| mirror.write_both()) else {
            self.both = false;
            return;
        };
        let now = marked(mirror);
        if !std::mem::replace(&mut self.both, true) {
            self.before = life.guests.iter().map(|guest| (!guest.is_answered()).then_some(guest.left)).collect();
            self.seen = life.guests.iter().map(|guest| (guest.left, now.clone())).collect();
            self.marked.clone_from(&now);
        }
        let done = self.before.iter().all(Option::is_none);
        for (guest, before) in life.guests.iter().zip(&mut self.before) {
            *before = before.filter(|left| !guest.is_answered() && guest.left == *left);
        }
        let was = std::mem::replace(&mut self.marked, now.clone());
        if done {
            let was_seen = |chunk: usize| was[chunk] || self.seen.iter().any(|(_, seen)| seen[chunk]);
            let anew = (0..now.len()).find(|chunk| now[*chunk] && !was_seen(*chunk));
            assert_eq!(anew, None, "a chunk is left to copy that was not: guests write to both sides");
        }
        for (guest, (left, seen)) in life.guests.iter().zip(&mut self.seen) {
            if std::mem::replace(left, guest.left) != guest.left {
                seen.clone_from(&was);
            }
            seen.iter_mut().zip(&now).for_each(|(seen, now)| *seen |= now);
        }
    }
}

/// Which chunks are marked.
fn marked(mirror: &Mirror) -> Vec<bool> {
    let (size, len) = (mirror.source.size(), mirror.dirty.chunk_len());
    let chunks = (0..size.div_ceil(len)).map(|chunk| chunk * len);
    chunks.map(|start| mirror.dirty.is_marked(ByteRange { start, end: (start + len).min(size) })).collect()
}
