//! qcow2 with several threads: tables that are read without the lock, and requests that meet.

use crate::support::disk::Disk;
use crate::support::random::Random;
use formats::image::{Image, Place, Progress, Reserve, Settle, Zeroed, Zeroing};
use formats::journal::Forgetful;
use formats::qcow2::{Create, Open, Qcow2, check, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const CLUSTER: u64 = 512;
/// Guest clusters of one L2 table, which is one slice here.
const TABLE: u64 = 64;
/// Guest clusters that threads share.
const CLUSTERS: u64 = 20 * TABLE;
const OPEN: Open = Open { writable: true, has_backing: false, metadata_bytes_max: 0 };

type Meanwhile = Box<dyn FnOnce() + Send>;

/// A file on which something happens between a read and its answer.
struct Interrupted {
    disk: Disk,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl Storage for Interrupted {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(at, bytes)?;
        let meanwhile = self.meanwhile.lock().expect("one thread").take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        Ok(())
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.write_at(at, bytes)
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.disk.next_data(at)
    }

    fn next_hole(&self, at: u64) -> io::Result<u64> {
        self.disk.next_hole(at)
    }
}

fn write(image: &Qcow2, cluster: u64) {
    let guest = ByteRange { start: cluster * CLUSTER, end: (cluster + 1) * CLUSTER };
    let Ok(Reserve::Room(room)) = image.reserve(guest) else { panic!("nobody else writes") };
    image.commit(room).expect("a valid image");
}

fn settle(image: &Qcow2) {
    let mut progress = Progress::default();
    while image.settle(&mut progress).expect("a valid image") == Settle::Flush {}
}

fn place(image: &Qcow2, cluster: u64) -> Place {
    image.map(cluster * CLUSTER, CLUSTER).expect("a valid image").place
}

#[test]
fn a_table_that_changed_while_it_was_read_is_read_again() {
    let tables = 40;
    let storage = Arc::new(Interrupted { disk: Disk::default(), meanwhile: Mutex::new(None) });
    create(&*storage, &Create { cluster_bits: 9, ..Create::new(tables * TABLE * CLUSTER) }).expect("valid options");
    let image = Arc::new(Qcow2::open(storage.clone(), Arc::new(Forgetful), OPEN).expect("a valid image"));
    for table in 0..tables {
        write(&image, table * TABLE);
        settle(&image);
    }
    // By now the first table's slice has made room for others.
    let other = image.clone();
    let meanwhile = move || {
        write(&other, 1);
        settle(&other);
        for table in 1..tables {
            place(&other, table * TABLE);
        }
    };
    *storage.meanwhile.lock().expect("one thread") = Some(Box::new(meanwhile));
    let found = place(&image, 1);
    assert!(storage.meanwhile.lock().expect("one thread").is_none(), "the slice was in memory: nothing was tested");
    assert!(matches!(found, Place::Data { .. }), "{found:?}");
}

#[test]
fn threads_that_share_tables_lose_nothing() {
    share(&Create { cluster_bits: 9, ..Create::new(CLUSTERS * CLUSTER) });
}

/// What is a cluster to the threads is a subcluster here, so they share entries as well.
#[test]
fn threads_that_share_entries_lose_nothing() {
    share(&Create { cluster_bits: 14, extended_l2: true, ..Create::new(CLUSTERS * CLUSTER) });
}

fn share(asked: &Create) {
    const THREADS: u64 = 3;
    let disk = Arc::new(Disk::default());
    create(&*disk, asked).expect("valid options");
    let image = Qcow2::open(disk.clone(), Arc::new(Forgetful), OPEN).expect("a valid image");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (image, disk) = (&image, &disk);
                // Clusters belong to threads in turn, so that all share all tables.
                scope.spawn(move || live(image, disk, thread, THREADS, CLUSTERS))
            })
            .collect();
        let settler = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let mut progress = Progress::default();
                while image.settle(&mut progress).expect("a valid image") == Settle::Flush {
                    std::thread::yield_now();
                }
            }
        });
        let truth: Vec<Vec<(u64, u64)>> = writers.into_iter().map(|writer| writer.join().expect("no panic")).collect();
        done.store(true, Ordering::Release);
        settler.join().expect("no panic");
        for (cluster, tag) in truth.into_iter().flatten() {
            assert_eq!(tag_at(&image, &disk, cluster), tag, "cluster {cluster}");
        }
    });
    settle(&image);
    image.recycle();
    settle(&image);
    let storage: Arc<dyn Storage> = disk;
    let found = check(&*storage).expect("it can be walked");
    assert_eq!((found.leaks, found.corruptions), (0, 0), "{:#?}", found.problems);
}

/// One thread's requests on its own clusters; returns what it left in them.
fn live(image: &Qcow2, disk: &Disk, thread: u64, threads: u64, clusters: u64) -> Vec<(u64, u64)> {
    let mut random = Random::new(thread + 1);
    let mut tags = vec![0; (clusters / threads) as usize];
    for step in 0..4000 {
        let own = random.below(tags.len() as u64);
        let cluster = own * threads + thread;
        let guest = ByteRange { start: cluster * CLUSTER, end: (cluster + 1) * CLUSTER };
        assert_eq!(tag_at(image, disk, cluster), tags[own as usize], "cluster {cluster}, step {step}");
        if random.one_in(4) {
            match image.zero(guest, Zeroing::Unmap).expect("a valid image") {
                Zeroed::Done(_) => tags[own as usize] = 0,
                Zeroed::Settle => std::thread::yield_now(),
                Zeroed::Busy if image.info().extended_l2 => std::thread::yield_now(),
                other => panic!("{other:?}"),
            }
            continue;
        }
        match image.reserve(guest).expect("a valid image") {
            Reserve::Room(room) => {
                let tag = (thread << 32) + step + 1;
                disk.write_at(room.host, &tag.to_le_bytes()).expect("memory");
                image.commit(room).expect("a valid image");
                tags[own as usize] = tag;
            }
            Reserve::Settle => std::thread::yield_now(),
            Reserve::Busy => assert!(image.info().extended_l2, "nobody else writes here"),
        }
    }
    let own = |(own, tag): (u64, u64)| (own * threads + thread, tag);
    (0..).zip(tags).map(own).collect()
}

fn tag_at(image: &Qcow2, disk: &Disk, cluster: u64) -> u64 {
    let Place::Data { host } = place(image, cluster) else { return 0 };
    let mut tag = [0; 8];
    disk.read_at(host, &mut tag).expect("written before");
    u64::from_le_bytes(tag)
}
