//! Finding zeroes fast: a run of zeroes becomes a hole instead of being written.

/// True where every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // The first bytes decide most of the time; the rest is then compared with itself, shifted,
    // which the standard library does as fast as memory goes.
    let (head, rest) = bytes.split_at(bytes.len().min(16));
    head.iter().all(|byte| *byte == 0) && bytes[..rest.len()] == *rest
}

/// The runs of `bytes`, each all zero or not, cut at multiples of `granule`: `(is zero, length)`.
pub fn runs(bytes: &[u8], granule: usize) -> impl Iterator<Item = (bool, usize)> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let zero = is_zero(rest.chunks(granule).next()?);
        let len = rest.chunks(granule).take_while(|part| is_zero(part) == zero).map(<[u8]>::len).sum();
        rest = &rest[len..];
        Some((zero, len))
    })
}

#[cfg(test)]
mod tests {
    use super::{is_zero, runs};

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [0, 1, 15, 16, 17, 4096, 4099] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn runs_are_cut_at_granules() {
        let mut bytes = vec![0; 10 * 8 + 3];
        bytes[17] = 1;
        bytes[82] = 1;
        let found: Vec<_> = runs(&bytes, 8).collect();
        assert_eq!(found, [(true, 16), (false, 8), (true, 56), (false, 3)]);
        assert_eq!(runs(&[], 8).count(), 0);
    }
}
