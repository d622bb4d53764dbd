//! Clients that write and read while their connections go from thread to thread.
use super::crews::Pace;
use super::{Client, Connections};
use crate::chain::{Chain, Layer};
use crate::disk::{DataFile, Disk};
use crate::export::gate::{Gate, Route};
use crate::export::roll::Member;
use crate::export::session::Directory;
use crate::io::{File, FileStorage};
use formats::nbd::{BlockSizes, ExportInfo, Exports};
use formats::raw::Raw;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const CLIENTS: u64 = 6;

/// One export, `vda`.
pub(super) struct One {
    info: ExportInfo,
    pub gate: Arc<Gate>,
}

impl One {
    pub fn new() -> Arc<Self> {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(SIZE).expect("a file of holes");
        let storage = Arc::new(FileStorage::new(file.try_clone().expect("a descriptor")));
        let (image, file) = (Box::new(Raw::new(storage, SIZE)), DataFile::buffered(File::new(file)));
        let layer = Layer { image, file, path: "disk".into(), format: "raw", apart: None };
        let disk = Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false));
        let info = ExportInfo {
            name: "vda".into(),
            description: String::new(),
            size: SIZE,
            read_only: false,
            multi_conn: true,
            fast_zero: true,
            block_sizes: BlockSizes::default(),
            bitmaps: Vec::new(),
        };
        Arc::new(Self { info, gate: Arc::new(Gate::new(Route { disk, mirror: None })) })
    }
}

impl Exports for One {
    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        [self.info.clone()].lookup(name)
    }

    fn list(&self) -> Vec<ExportInfo> {
        vec![self.info.clone()]
    }
}

impl Directory for One {
    fn enter(&self, name: &str, socket: File) -> Option<(Arc<Gate>, Member)> {
        (name == self.info.name).then(|| (Arc::clone(&self.gate), self.gate.roll.join(socket)))
    }
}

/// A client with an export, and what it asks for.
fn client(connections: &mut Connections) -> UnixStream {
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    connections.begin(Client::New(File::new(theirs))).expect("a thread");
    ours.read_exact(&mut [0; 18]).expect("the greeting");
    ours.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03vda").expect("a server that listens");
    ours.read_exact(&mut [0; 10]).expect("the export's size and flags");
    ours
}

fn request(command: u32, at: u64) -> Vec<u8> {
    let head = [0x2560_9513_u32.to_be_bytes(), command.to_be_bytes()].concat();
    [&head, &[0; 8][..], &at.to_be_bytes(), &(BLOCK as u32).to_be_bytes()].concat()
}

/// Writes its own blocks and reads them, eight at a time, until `rounds` are over.
fn works(mut stream: UnixStream, number: u64, rounds: u64) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for round in 0..rounds {
            let at = |place: u64| (place * CLIENTS + number) * BLOCK;
            let byte = |place: u64| (round * 8 + place + number) as u8;
            let writes = (0..8).map(|place| [request(1, at(place)), vec![byte(place); BLOCK as usize]].concat());
            stream.write_all(&writes.collect::<Vec<_>>().concat()).expect("a server that listens");
            stream.read_exact(&mut [0; 8 * 16]).expect("eight answers");
            for place in 0..8 {
                stream.write_all(&request(0, at(place))).expect("a server that listens");
                let mut answer = vec![1; 16 + BLOCK as usize];
                stream.read_exact(&mut answer).expect("an answer");
                assert!(
                    answer[4..8] == [0; 4] && answer[16..].iter().all(|found| *found == byte(place)),
                    "round {round}"
                );
            }
        }
    })
}

/// Every thread takes itself for busy, and has time to spare for others.
fn restless() -> Pace {
    Pace { window: Duration::from_millis(1), busy: 0, spare: 100, threads_max: 3 }
}

#[test]
fn requests_are_answered_rightly_while_connections_go_from_thread_to_thread() {
    let mut connections = Connections::at(restless(), One::new(), None);
    let clients: Vec<_> = (0..CLIENTS).map(|_| client(&mut connections)).collect();
    let working: Vec<_> = clients.into_iter().zip(0..).map(|(stream, number)| works(stream, number, 300)).collect();
    working.into_iter().for_each(|thread| thread.join().expect("answers to what was asked"));
    assert!(connections.moves() > 10, "{} connections went to another thread", connections.moves());
    assert!(connections.end(false).is_empty());
}

/// Each is either with its client or with who takes over, and what was not begun goes along.
#[test]
fn all_are_handed_over_wherever_they_are() {
    let directory = One::new();
    let mut connections = Connections::at(restless(), Arc::clone(&directory) as _, None);
    let clients: Vec<_> = (0..CLIENTS).map(|_| client(&mut connections)).collect();
    let working: Vec<_> = clients.into_iter().zip(0..).map(|(stream, number)| works(stream, number, 300)).collect();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(5));
        let handed = connections.end(true);
        connections = Connections::at(restless(), Arc::clone(&directory) as _, None);
        handed.into_iter().for_each(|handed| connections.begin(Client::Handed(handed)).expect("a thread"));
    }
    working.into_iter().for_each(|thread| thread.join().expect("answers to what was asked"));
    assert!(connections.end(false).is_empty());
}

#[test]
fn a_disk_has_one_thread_until_that_is_busy() {
    let mut connections = Connections::at(Pace { busy: 101, spare: 100, ..restless() }, One::new(), None);
    let clients: Vec<_> = (0..CLIENTS).map(|_| client(&mut connections)).collect();
    let working: Vec<_> = clients.into_iter().zip(0..).map(|(stream, number)| works(stream, number, 20)).collect();
    // Answered, so all are on their disk's thread.
    working.into_iter().for_each(|thread| thread.join().expect("answers to what was asked"));
    assert_eq!(connections.moves(), CLIENTS - 1);
    assert!(connections.end(false).is_empty());
}
