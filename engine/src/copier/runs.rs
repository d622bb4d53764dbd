//! What is to be done with bytes that were read: runs of them, each alike.
use crate::zero;

/// What a run of bytes asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    /// To be written.
    Data,
    /// Zeroes, which become a hole.
    Zero,
    /// The target has them.
    Same,
}

/// Differences are written in blocks of this many bytes, which any device takes.
const BLOCK: usize = 4096;

/// The runs of `bytes`, cut at multiples of `granule`.
pub(super) fn runs(bytes: &[u8], granule: usize) -> impl Iterator<Item = (Run, usize)> {
    zero::runs(bytes, granule).map(|(zero, len)| (if zero { Run::Zero } else { Run::Data }, len))
}

/// The same where the target has `there`: what is alike on both sides is left alone.
pub(super) fn differences(bytes: &[u8], there: &[u8], granule: usize) -> impl Iterator<Item = (Run, usize)> {
    assert!(bytes.len() == there.len(), "the same bytes of both sides");
    let mut at = 0;
    let mut found: Vec<(Run, usize)> = Vec::new();
    for (run, len) in runs(bytes, granule) {
        let (ours, theirs) = (&bytes[at..at + len], &there[at..at + len]);
        match run {
            Run::Data => {
                let blocks = ours.chunks(BLOCK).zip(theirs.chunks(BLOCK));
                blocks.for_each(|(ours, theirs)| {
                    add(&mut found, if ours == theirs { Run::Same } else { run }, ours.len())
                });
            }
            run => add(&mut found, if ours == theirs { Run::Same } else { run }, len),
        }
        at += len;
    }
    found.into_iter()
}

fn add(runs: &mut Vec<(Run, usize)>, run: Run, len: usize) {
    match runs.last_mut() {
        Some((last, so_far)) if *last == run => *so_far += len,
        _ => runs.push((run, len)),
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Run, differences};

    #[test]
    fn only_what_differs_is_brought() {
        let mut ours = vec![7; 6 * BLOCK + 100];
        ours[2 * BLOCK..4 * BLOCK].fill(0);
        let mut theirs = ours.clone();
        assert_eq!(differences(&ours, &theirs, 2 * BLOCK).collect::<Vec<_>>(), [(Run::Same, ours.len())]);
        theirs[BLOCK + 5] = 1;
        theirs[3 * BLOCK] = 1;
        theirs[6 * BLOCK + 99] = 1;
        let found: Vec<_> = differences(&ours, &theirs, 2 * BLOCK).collect();
        let wanted =
            [(Run::Same, BLOCK), (Run::Data, BLOCK), (Run::Zero, 2 * BLOCK), (Run::Same, 2 * BLOCK), (Run::Data, 100)];
        assert_eq!(found, wanted);
    }
}
