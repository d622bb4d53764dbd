//! Bitmaps that an image keeps, as clients are told of them.
use super::world::{Scene, disk, disk_with};
use super::{BLOCK_STATUS, Reply, SIZE, extended, greeted_for, reply};
use crate::export::gate::Route;
use formats::nbd::Style;
use formats::nbd::wire::command_flag as flag;
use formats::qcow2::bitmaps::Bits;
use formats::range::ByteRange;
use std::collections::BTreeMap;
use std::sync::Arc;

fn told(scene: &mut Scene, flags: u16, offset: u64, len: u64) -> Reply {
    scene.say(&extended(BLOCK_STATUS, flags, 5, offset, len));
    scene.run();
    reply(scene)
}

/// A pivot carries an image's bitmaps to the target, or drops them; a connection goes on with what there is.
#[test]
fn bitmaps_of_the_image_are_told_as_they_are_then() {
    let (piece, kept) = (4096, || Arc::new(Bits::new(SIZE, 12)));
    let (live, other, carried) = (kept(), kept(), kept());
    let bitmaps = vec![("live", Arc::clone(&live)), ("mirror", Arc::clone(&other))];
    let first = Scene::on(disk_with(0, SIZE, bitmaps), 2, SIZE);
    assert_eq!(first.gate.route().bitmaps(), ["live"], "the other name is that of a job");
    let mut scene = greeted_for(first, Style::Extended, &["qemu:dirty-bitmap:mirror", "qemu:dirty-bitmap:live"]);
    other.set(ByteRange { start: 0, end: SIZE });
    assert_eq!(told(&mut scene, 0, 0, SIZE).extents, BTreeMap::from([(3, vec![(SIZE, 0)])]), "never the other one");
    live.set(ByteRange { start: 5000, end: 5001 });
    let all = vec![(piece, 0), (piece, 1), (SIZE - 2 * piece, 0)];
    assert_eq!(told(&mut scene, 0, 0, SIZE).extents[&3], all);
    assert_eq!(told(&mut scene, 0, 4000, 200).extents[&3], [(96, 0), (104, 1)]);
    assert_eq!(told(&mut scene, flag::REQ_ONE, 4000, 200).extents[&3], [(96, 0)]);
    carried.set(ByteRange { start: 0, end: 1 });
    scene.gate.replace(Route { disk: disk_with(1, SIZE, vec![("live", carried)]), mirror: None });
    assert_eq!(told(&mut scene, 0, 0, SIZE).extents[&3], [(piece, 1), (SIZE - piece, 0)]);
    scene.gate.replace(Route { disk: disk(1, SIZE), mirror: None });
    assert_eq!(told(&mut scene, 0, 0, SIZE).error, 22, "it is gone");
}
