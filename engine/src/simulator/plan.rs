//! What a world is like, by its seed.
use super::files::Dice;
use super::modes::Switches;
use crate::control::Mode;
use crate::job::Limits;
use std::time::Duration;

/// How a life of the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// When everything is done.
    Lives,
    /// The process is killed at this step.
    Killed(u64),
    /// The process is killed in the middle of a step: after so many stores to the planes of its job.
    KilledAtStore(u64),
    /// The power goes at this step.
    PowerCut(u64),
    /// The process is told to end at this step, and the power goes when it has.
    Stopped(u64),
}

/// What a world is like.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub fate: Fate,
    pub raw_source: bool,
    pub raw_target: bool,
    pub shallow: bool,
    pub mode: Mode,
    /// When it is switched.
    pub switches: Switches,
    /// Guests discard, too.
    pub discards: bool,
    /// One operation in so many fails; 0 for none.
    pub fail_one_in: u64,
    /// The job starts while a guest makes zeroes, and its copier moves far more often than the guests.
    pub eager: bool,
    /// The qcow2 images among the two have external data files.
    pub data_files: bool,
    /// The pivot waits to be finalized, until a guest was answered meanwhile.
    pub held: bool,
    /// Nothing fails any more after the first life.
    pub mends: bool,
    /// A chunk of the job's bitmap has 2 to this bytes: one part, or several.
    pub chunk_bits: u32,
    /// How many times as long as alone guests' requests may take; 0 for no bound.
    pub courtesy: u64,
    /// Blocks of the source are shared with a raw target.
    pub shares: bool,
    /// What the job is bounded by.
    pub limits: Limits,
    /// Between these steps of the first life the target has no space, and the job backs off.
    pub full: Option<(u64, u64)>,
    /// From this step of the first life on the target answers nothing: to that step, or until no guest waits for
    /// anything.
    pub hung: Option<(u64, Option<u64>)>,
    /// The pivot waits until everything was read back from the target.
    pub verify: bool,
    /// A byte of the target rots when it is about to be read back; the target is raw then.
    pub rots: bool,
    /// The pivot keeps its source, and later there is one back.
    pub keeps: bool,
}

impl Plan {
    /// Everything by the seed.
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x5eed);
        let fate = match dice.roll(6) {
            0 => Fate::Lives,
            1 | 2 => Fate::Killed(dice.roll(1500)),
            3 => Fate::KilledAtStore(1 + dice.roll(400)),
            4 => Fate::Stopped(dice.roll(1500)),
            _ => Fate::PowerCut(dice.roll(1500)),
        };
        let raw_source = dice.one_in(4);
        Self {
            seed,
            fate,
            raw_source,
            raw_target: dice.one_in(3),
            shallow: !raw_source && dice.one_in(3),
            mode: [Mode::Background, Mode::WriteBlocking, Mode::Auto][dice.roll(3) as usize],
            switches: if seed % 7 == 3 { Switches::OneIn(60) } else { Switches::Never },
            discards: true,
            fail_one_in: if dice.one_in(3) { 40 } else { 0 },
            eager: false,
            data_files: false,
            held: dice.one_in(4),
            mends: false,
            courtesy: if seed.is_multiple_of(3) { 2 } else { 0 },
            shares: seed.is_multiple_of(2),
            limits: match seed % 5 {
                0 => Limits { deadline: Some(Duration::from_millis(seed % 3000)), ..Limits::default() },
                1 => Limits { lag_max: 8 << 10, slowdown_max: 50, ..Limits::default() },
                _ => Limits::default(),
            },
            chunk_bits: 12 + (seed / 5 % 4) as u32,
            full: None,
            hung: None,
            verify: dice.one_in(3),
            rots: false,
            keeps: dice.one_in(3),
        }
    }

    /// True where what is left to copy is watched: nothing is marked for another reason than a guest's write.
    pub fn is_watched(&self) -> bool {
        !self.discards && self.fail_one_in == 0 && self.full.is_none() && self.hung.is_none()
    }
}
