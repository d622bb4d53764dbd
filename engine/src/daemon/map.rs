//! `map`: where a disk's bytes live, run by run, in the words of `qemu-img map`.
use crate::chain::{Chain, Layer};
use formats::error::Result;
use formats::image::Description;
use formats::range::ByteRange;

/// QEMU counts a raw file's bytes in sectors: the last one is whole.
const SECTOR: u64 = 512;

/// A run of a disk's bytes that are all alike and, where they have a place, in the file one after
/// the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The bytes.
    pub guest: ByteRange,
    /// Number of the layer that decides, the top being 0.
    pub depth: usize,
    /// That layer has something of its own to say; otherwise nobody has, and they are zeroes.
    pub present: bool,
    /// They read as zeroes, as far as is known without reading them.
    pub zero: bool,
    /// They have payload in the layer's file.
    pub data: bool,
    /// They are compressed.
    pub compressed: bool,
    /// Offset of their place in the layer's file, if they have one.
    pub host: Option<u64>,
}

impl Run {
    /// Takes `next` in where it goes on with the same.
    fn join(&mut self, next: &Self) -> bool {
        let host = self.host.map(|host| host + self.guest.len());
        let guest = ByteRange { start: self.guest.start, end: next.guest.end };
        let joined = Self { guest, host: self.host, ..*next };
        let alike = host == next.host && joined == Self { guest, ..*self };
        if alike {
            self.guest = guest;
        }
        alike
    }
}

/// The runs of a disk, first to last; no two neighbours could be one. Holds no more than one of them.
pub struct Runs<'a> {
    chain: &'a Chain,
    /// Bytes of the disk that were looked at.
    at: u64,
    /// Looked at and not told yet: it may grow.
    last: Option<Run>,
}

impl<'a> Runs<'a> {
    /// All runs of `chain`.
    pub fn new(chain: &'a Chain) -> Self {
        Self { chain, at: 0, last: None }
    }

    /// The run from `at` on, as far as one look at each layer tells.
    fn look(&self) -> Result<Run> {
        let layers = self.chain.layers();
        let mut len_max = size(&layers[0]) - self.at;
        let mut depth = 0;
        loop {
            let told = describe(&layers[depth], self.at, len_max)?;
            let present = told.data || told.zero;
            let below = layers.get(depth + 1).map_or(0, |below| size(below).saturating_sub(self.at));
            if present || below == 0 {
                let Description { guest, data, compressed, host, .. } = told;
                // What nobody has, and what is past the end of a shorter backing image, are zeroes.
                return Ok(Run { guest, depth, present, zero: told.zero || !present, data, compressed, host });
            }
            len_max = told.guest.len().min(below);
            depth += 1;
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.at < size(self.chain.top()) {
            let run = match self.look() {
                Ok(run) => run,
                Err(error) => {
                    // What lies behind it is not told of.
                    (self.at, self.last) = (u64::MAX, None);
                    return Some(Err(error));
                }
            };
            self.at = run.guest.end;
            if self.last.as_mut().is_some_and(|last| last.join(&run)) {
                continue;
            }
            if let Some(whole) = self.last.replace(run) {
                return Some(Ok(whole));
            }
        }
        self.last.take().map(Ok)
    }
}

fn size(layer: &Layer) -> u64 {
    let size = layer.image.size();
    if layer.format == "raw" { size.next_multiple_of(SECTOR) } else { size }
}

fn describe(layer: &Layer, at: u64, len_max: u64) -> Result<Description> {
    if at >= layer.image.size() {
        // The rest of a raw file's last sector.
        let guest = ByteRange { start: at, end: at + len_max };
        return Ok(Description { guest, data: false, zero: true, compressed: false, host: Some(at) });
    }
    layer.image.describe(at, len_max).map_err(|error| error.at(layer.path.display()))
}

#[cfg(test)]
mod tests {
    use super::{ByteRange, Run};

    fn run(start: u64, end: u64, host: Option<u64>) -> Run {
        let guest = ByteRange { start, end };
        Run { guest, depth: 0, present: true, zero: false, data: true, compressed: false, host }
    }

    #[test]
    fn runs_join_where_they_go_on_in_the_file() {
        let first = run(0, 10, Some(100));
        let mut joined = first;
        assert!(joined.join(&run(10, 30, Some(110))));
        assert_eq!(joined, run(0, 30, Some(100)));
        let others = [
            run(10, 30, Some(111)),
            run(10, 30, None),
            Run { depth: 1, ..run(10, 30, Some(110)) },
            Run { zero: true, ..run(10, 30, Some(110)) },
            Run { compressed: true, ..run(10, 30, Some(110)) },
            Run { present: false, ..run(10, 30, Some(110)) },
        ];
        for other in others {
            let mut joined = first;
            assert!(!joined.join(&other), "{other:?}");
            assert_eq!(joined, first);
        }
        let mut compressed = Run { compressed: true, ..run(0, 10, None) };
        assert!(compressed.join(&Run { compressed: true, ..run(10, 20, None) }), "what has no place has no order");
    }
}
