//! What the state folder of a world keeps of its job: the planes, through kills and reboots.
use crate::dirty::DirtyBitmap;
use crate::fault::kill_at_store;
use crate::io::Words;
use crate::journal::WORDS;
use crate::planes::{Planes, TakenUp, lay_out};
use formats::planes::{Header, Left};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Guest writes in flight: one fewer than there are guests, so that some wait for a place.
const FLIGHTS: u32 = 2;

thread_local! {
    /// The journals' memory, for one world of a thread after the other: what dies is not dropped, and would keep it.
    static JOURNALS: [Arc<Words>; 2] = std::array::from_fn(|_| Arc::new(Words::in_memory(WORDS)));
}

/// Two empty journals.
pub fn journals() -> [Arc<Words>; 2] {
    JOURNALS.with(|journals| {
        journals.iter().flat_map(|words| words.iter()).for_each(|word| word.store(0, Ordering::Relaxed));
        journals.clone()
    })
}

#[derive(Default)]
pub struct Kept {
    planes: Option<(Header, Arc<Words>)>,
    /// The job goes from the target to the source.
    pub goes_back: bool,
    /// The job in the other direction, that begins with the pivot of this number.
    back: Option<(u64, Header, Arc<Words>)>,
    boot: u64,
}

impl Kept {
    /// A job begins.
    pub fn begin(&mut self, size: u64, chunk_bits: u32) -> TakenUp {
        let header = Header {
            boot: [7, self.boot],
            job: 1,
            size,
            chunk_bits,
            flights: FLIGHTS,
            source: (1, 1),
            target: (2, 2),
            target_is_zero: true,
        };
        self.planes = Some((header, Arc::new(Words::in_memory(0))));
        self.goes_back = false;
        TakenUp::nothing(&header)
    }

    /// A job in the other direction, which counts if the pivot of this number is recorded.
    pub fn prepare_back(&mut self, generation: u64) -> (DirtyBitmap, Planes) {
        let (header, _) = self.planes.as_ref().expect("a job");
        let header = Header { boot: [7, self.boot], job: header.job + 1, target_is_zero: false, ..*header };
        let words = Arc::new(Words::in_memory(header.layout().words()));
        lay_out(&words, &header, &TakenUp { seen: header.size, ..TakenUp::nothing(&header) });
        let planes = Planes::on(&words, &header, true);
        self.back = Some((generation, header, words));
        planes
    }

    /// The number of the pivot with which a job in the other direction begins, and whether that goes back.
    pub fn back(&self) -> Option<(u64, bool)> {
        self.back.as_ref().map(|(generation, ..)| (*generation, !self.goes_back))
    }

    /// It begins, or does not.
    pub fn adopt_back(&mut self, begins: bool) {
        if let Some((_, header, words)) = self.back.take().filter(|_| begins) {
            self.planes = Some((header, words));
            self.goes_back = !self.goes_back;
        }
    }

    /// What the job goes on with, if there is one.
    pub fn take_up(&mut self) -> Option<TakenUp> {
        let (_, words) = self.planes.as_ref()?;
        let words = load(words);
        let left = Left::parse(&words).expect("our own planes");
        Some(TakenUp::of(&left, [7, self.boot]))
    }

    /// New planes for what a job begins or goes on with: the old ones are not touched.
    pub fn lay_out(&mut self, taken: &TakenUp, settles: bool) -> (DirtyBitmap, Planes) {
        let (header, words) = self.planes.as_mut().expect("a job");
        (header.boot, header.target_is_zero) = ([7, self.boot], taken.target_is_zero);
        *words = Arc::new(Words::in_memory(header.layout().words()));
        lay_out(words, header, taken);
        Planes::on(words, header, settles)
    }

    /// The daemon is killed after so many more stores, if it is.
    pub fn kill_at_store(&self, stores: Option<u64>) {
        let words = self.planes.as_ref().map(|(_, words)| Arc::clone(words));
        kill_at_store(words.zip(stores));
    }

    /// Another run of the system.
    pub fn reboot(&mut self) {
        self.boot += 1;
    }

    /// The job is over.
    pub fn forget(&mut self) {
        self.planes = None;
    }
}

fn load(words: &Words) -> Vec<u64> {
    words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
}
