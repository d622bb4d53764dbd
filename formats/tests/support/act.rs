//! One guest who does one thing after the other, beside a plain copy of the disk.
use super::file::Layer;
use super::random::Random;
use formats::image::Zeroing;
use formats::range::ByteRange;

/// Writes, zeroes, discards or settles something, and does the same to `model`.
pub fn act(layer: &Layer, model: &mut [u8], random: &mut Random) {
    let size = model.len() as u64;
    let start = random.below(size);
    let most = if random.one_in(3) { 1 << 20 } else { 20_000 };
    let len = 1 + random.below(most.min(size - start));
    let range = ByteRange { start, end: start + len };
    let here = &mut model[start as usize..][..len as usize];
    match random.below(6) {
        0 => {
            here.fill(0);
            layer.zero(range, [Zeroing::Unmap, Zeroing::Keep][random.below(2) as usize]);
        }
        1 => {
            // A discard may leave what it likes; what it left is the truth from then on.
            layer.zero(range, Zeroing::Discard);
            let before = here.to_vec();
            layer.read(start, here);
            assert!(before.iter().zip(&*here).all(|(before, now)| now == before || *now == 0));
        }
        2 => layer.settle(),
        _ => {
            here.fill(random.below(256) as u8);
            layer.write(start, here);
        }
    }
}

/// The same bytes, or a panic that says where not.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    if let Some(at) = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs) {
        panic!("byte {at} is {:#x}, expected {:#x}: {what}", ours[at], theirs[at]);
    }
}
