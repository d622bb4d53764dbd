//! A client, a disk and a queue in memory: everything is done in an order that a seed decides, in
//! pieces of any size.
use super::super::{Directory, Ending, Progress, Session};
use crate::chain::{Chain, Layer};
use crate::disk::{DataFile, Disk};
use crate::export::gate::{Gate, Route};
use crate::export::roll::Member;
use crate::io::{Arena, Completion, File, Gather, Io, Op, Token, Until, Wait, Waker};
use crate::tls::Credentials;
use formats::error::Result;
use formats::image::{Extent, Image, Place, Progress as Stage, Reservation, Reserve, Settle, Zeroed, Zeroing};
use formats::nbd::{BlockSizes, ExportInfo, Exports};
use formats::qcow2::bitmaps::Bits;
use formats::range::ByteRange;
use rustls::{ClientConfig, ClientConnection};
use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const PAGE: u64 = 4096;
const BASE: Token = Token(1 << 40);

/// The same numbers for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// What an operation was, for tests that look at the order of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Receive,
    Send,
    Read,
    Write,
    Zero,
    Flush,
}

/// The queue, with the files and the socket behind it.
pub struct World {
    pub random: Random,
    /// Contents of the files, by number.
    pub files: Vec<Vec<u8>>,
    /// From the client; what was not received yet.
    pub to_server: VecDeque<u8>,
    /// What the client took.
    pub to_client: Vec<u8>,
    /// The client closed its end.
    pub hung_up: bool,
    /// The client takes nothing.
    pub deaf: bool,
    /// The disk ends nothing.
    pub disk_rests: bool,
    /// Operations move all they can.
    pub whole: bool,
    /// The time of every timeout has come.
    pub expired: bool,
    /// A waker was called: the simulated one tells nobody.
    pub rung: bool,
    /// The system's error for operations of this kind.
    pub failing: Option<(Done, i32)>,
    pub log: Vec<Done>,
    pub pending: Vec<(Token, Op)>,
}

impl World {
    pub fn new(seed: u64, files: Vec<Vec<u8>>) -> Self {
        Self {
            random: Random::new(seed),
            files,
            to_server: VecDeque::new(),
            to_client: Vec::new(),
            hung_up: false,
            deaf: false,
            disk_rests: false,
            whole: false,
            expired: false,
            rung: false,
            failing: None,
            log: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// How many operations of a kind are under way.
    pub fn under_way(&self, kind: Done) -> usize {
        self.pending.iter().filter(|(_, op)| kind_of(op) == Some(kind)).count()
    }

    fn can_end(&self, op: &Op) -> bool {
        match op {
            Op::Read { .. } | Op::Write { .. } | Op::Zero { .. } | Op::Flush { .. } | Op::Prefetch { .. } => {
                !self.disk_rests
            }
            Op::Receive { buf, until, .. } => {
                let wanted = if *until == Until::Full && self.whole { buf.len() } else { 1 };
                self.hung_up || self.to_server.len() >= wanted
            }
            Op::Send { .. } => !self.deaf || self.hung_up,
            Op::Timeout { .. } => self.expired,
            Op::Wake { .. } => self.rung,
            Op::Compute { .. } | Op::Clone { .. } => true,
            Op::Accept { .. } | Op::Connect { .. } => false,
        }
    }

    /// How many of `len` bytes an operation moves.
    fn count(&mut self, len: usize) -> usize {
        match self.whole || len == 0 || self.random.below(4) > 0 {
            true => len,
            false => 1 + self.random.below(len as u64) as usize,
        }
    }

    fn end(&mut self, op: &mut Op) -> io::Result<u32> {
        let kind = kind_of(op);
        self.log.extend(kind);
        if let Some((failing, errno)) = self.failing.filter(|(failing, _)| Some(*failing) == kind) {
            assert_eq!(Some(failing), kind);
            return Err(io::Error::from_raw_os_error(errno));
        }
        match op {
            Op::Read { file, at, buf } => {
                let count = self.count(buf.len());
                let bytes = &self.files[number(file)][*at as usize..][..count];
                buf[..count].copy_from_slice(bytes);
                Ok(count as u32)
            }
            Op::Write { file, at, buf } => {
                let count = self.count(buf.len());
                self.files[number(file)][*at as usize..][..count].copy_from_slice(&buf[..count]);
                Ok(count as u32)
            }
            Op::Zero { file, at, len, .. } => {
                self.files[number(file)][*at as usize..][..*len as usize].fill(0);
                Ok(0)
            }
            Op::Receive { buf, .. } => {
                let len = buf.len().min(self.to_server.len());
                let count = self.count(len);
                self.to_server.read_exact(&mut buf[..count])?;
                Ok(count as u32)
            }
            Op::Send { .. } if self.hung_up => Err(io::ErrorKind::BrokenPipe.into()),
            Op::Send { gather, .. } => {
                let count = self.count(gather.remaining());
                let mut left = count;
                for slice in gather.slices() {
                    let len = slice.len().min(left);
                    self.to_client.extend_from_slice(&slice[..len]);
                    left -= len;
                }
                Ok(count as u32)
            }
            Op::Compute { from, to, work } => work.run(from, to),
            Op::Clone { .. } => unreachable!("there is no copier here"),
            Op::Wake { .. } => {
                self.rung = false;
                Ok(8)
            }
            Op::Flush { .. } | Op::Prefetch { .. } | Op::Timeout { .. } | Op::Accept { .. } | Op::Connect { .. } => {
                Ok(0)
            }
        }
    }
}

impl Io for World {
    fn submit(&mut self, token: Token, op: Op) {
        assert!(self.pending.iter().all(|(other, _)| *other != token), "{token:?} is under way already");
        self.pending.push((token, op));
    }

    fn send_at_once(&mut self, _: &File, gather: &Gather) -> usize {
        if self.deaf || self.hung_up || self.failing.is_some() || self.random.below(2) == 0 {
            return 0;
        }
        self.log.push(Done::Send);
        let count = self.count(gather.remaining());
        self.to_client.extend(gather.slices().flatten().take(count));
        count
    }

    fn reap(&mut self, _: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        for _ in 0..=self.random.below(3) {
            let able: Vec<_> = (0..self.pending.len()).filter(|n| self.can_end(&self.pending[*n].1)).collect();
            if able.is_empty() {
                break;
            }
            let chosen = able[self.random.below(able.len() as u64) as usize];
            let (token, mut op) = self.pending.swap_remove(chosen);
            let result = self.end(&mut op);
            done.push(Completion { token, op, result });
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

fn number(file: &File) -> usize {
    file.number().expect("a simulated file") as usize
}

fn kind_of(op: &Op) -> Option<Done> {
    Some(match op {
        Op::Receive { .. } => Done::Receive,
        Op::Send { .. } => Done::Send,
        Op::Read { .. } => Done::Read,
        Op::Write { .. } => Done::Write,
        Op::Zero { .. } => Done::Zero,
        Op::Flush { .. } => Done::Flush,
        Op::Compute { .. }
        | Op::Clone { .. }
        | Op::Prefetch { .. }
        | Op::Timeout { .. }
        | Op::Wake { .. }
        | Op::Accept { .. }
        | Op::Connect { .. } => {
            return None;
        }
    })
}

/// An image whose pages are holes until they are written.
struct Holey {
    size: u64,
    data: Mutex<BTreeSet<u64>>,
    bitmaps: Vec<(&'static str, Arc<Bits>)>,
}

impl Image for Holey {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        let data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let here = data.contains(&(at / PAGE));
        let end = self.size.min(at + len_max);
        let same = (at / PAGE..end.div_ceil(PAGE)).take_while(|page| data.contains(page) == here).last();
        let end = same.map_or(end, |page| end.min((page + 1) * PAGE));
        let place = if here { Place::Data { host: at } } else { Place::Zero };
        Ok(Extent { guest: ByteRange { start: at, end }, place })
    }

    fn reserve(&self, guest: ByteRange) -> Result<Reserve> {
        Ok(Reserve::Room(Reservation { guest, host: guest.start, fill: [None, None], zeroed: true, hold: None }))
    }

    fn commit(&self, reservation: Reservation) -> Result<()> {
        let guest = reservation.guest;
        let mut data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        data.extend(guest.start / PAGE..guest.end.div_ceil(PAGE));
        Ok(())
    }

    fn zero(&self, guest: ByteRange, _: Zeroing) -> Result<Zeroed> {
        Ok(Zeroed::Host { guest, host: guest.start })
    }

    fn bitmap_names(&self) -> Result<Vec<String>> {
        Ok(self.bitmaps.iter().map(|(name, _)| (*name).to_owned()).collect())
    }

    fn bitmap(&self, name: &str) -> Result<Option<Arc<Bits>>> {
        Ok(self.bitmaps.iter().find(|(own, _)| *own == name).map(|(_, bits)| Arc::clone(bits)))
    }

    fn settle(&self, progress: &mut Stage) -> Result<Settle> {
        progress.stage += 1;
        Ok(if progress.stage == 1 { Settle::Flush } else { Settle::Done })
    }
}

/// A disk on the file of this number, all of it a hole.
pub fn disk(file: u32, size: u64) -> Arc<Disk> {
    disk_with(file, size, Vec::new())
}

/// The same, whose image keeps bitmaps: what they have set is the test's to say.
pub fn disk_with(file: u32, size: u64, bitmaps: Vec<(&'static str, Arc<Bits>)>) -> Arc<Disk> {
    disk_of(file, Box::new(Holey { size, data: Mutex::default(), bitmaps }), false)
}

/// A disk of one image on the file of this number.
pub fn disk_of(file: u32, image: Box<dyn Image>, read_only: bool) -> Arc<Disk> {
    let file = DataFile::buffered(File::simulated(file));
    let layer = Layer { image, file, path: "disk".into(), format: "holey", apart: None };
    Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), read_only))
}

/// One export, `vda`.
pub struct One {
    pub info: ExportInfo,
    pub gate: Arc<Gate>,
}

impl Exports for One {
    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        let bitmaps = self.gate.route().bitmaps();
        [ExportInfo { bitmaps, ..self.info.clone() }].lookup(name)
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

/// A world with one session in it.
pub struct Scene {
    pub world: World,
    pub session: Session,
    pub gate: Arc<Gate>,
    pub disk: Arc<Disk>,
    /// The client's end of a socket that carries nothing: dropped, the client is gone.
    pub theirs: Option<UnixStream>,
    /// The client's TLS, once it has begun: what it says and hears goes through it.
    pub tls: Option<ClientConnection>,
    /// Once in so many steps the session is told to go to another process; 0 for never.
    pub hand_over_one_in: u64,
    /// How often it did.
    pub handed_over: u64,
    /// Once in so many steps the session is asked to rest, where it may go to another thread; 0 for never.
    pub rest_one_in: u64,
    /// How often it went to another thread.
    pub moved: Rc<Cell<u64>>,
    base: Token,
    waker: Waker,
    directory: Arc<One>,
    done: Vec<Completion>,
}

impl Scene {
    pub fn new(seed: u64, size: u64) -> Self {
        Self::on(disk(0, size), seed, size)
    }

    /// The first client of `disk`, in a world whose files have so many bytes.
    pub fn on(disk: Arc<Disk>, seed: u64, file_len: u64) -> Self {
        let gate = Arc::new(Gate::new(Route { disk: Arc::clone(&disk), mirror: None }));
        Self::at(gate, disk, seed, file_len)
    }

    /// Another client of the same export, in a world of its own.
    pub fn beside(&self) -> Self {
        Self::at(Arc::clone(&self.gate), Arc::clone(&self.disk), 1, self.disk.size())
    }

    fn at(gate: Arc<Gate>, disk: Arc<Disk>, seed: u64, file_len: u64) -> Self {
        let size = disk.size();
        let info = ExportInfo {
            name: "vda".into(),
            description: String::new(),
            size,
            read_only: disk.read_only(),
            multi_conn: true,
            fast_zero: true,
            block_sizes: BlockSizes::default(),
            bitmaps: Vec::new(),
        };
        let directory = Arc::new(One { info, gate: Arc::clone(&gate) });
        // Less than a session gets: buffers of their own come in too.
        let arena = Arena::new(1 << 20);
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let waker = Waker::simulated(0);
        let session = Session::new(File::new(ours), Arc::clone(&directory) as _, arena, waker.clone(), BASE);
        let files = (0..2).map(|_| vec![0; file_len as usize]).collect();
        Self {
            world: World::new(seed, files),
            session,
            gate,
            disk,
            theirs: Some(theirs),
            tls: None,
            hand_over_one_in: 0,
            handed_over: 0,
            rest_one_in: 0,
            moved: Rc::default(),
            base: BASE,
            waker,
            directory,
            done: Vec::new(),
        }
    }

    /// What came of everything that was under way, which is cancelled: a receive may have brought something.
    fn take_back(&mut self) -> Vec<Completion> {
        let mut done = std::mem::take(&mut self.done);
        for (token, mut op) in std::mem::take(&mut self.world.pending) {
            let receives = matches!(op, Op::Receive { .. });
            let brings = receives && !self.world.to_server.is_empty() && self.world.random.below(2) == 0;
            let cancelled = || Err(io::Error::from_raw_os_error(rustix::io::Errno::CANCELED.raw_os_error()));
            let result = if brings { self.world.end(&mut op) } else { cancelled() };
            assert!(receives || matches!(op, Op::Wake { .. } | Op::Timeout { .. }), "{op:?} is under way");
            done.push(Completion { token, op, result });
        }
        done
    }

    /// The session goes to another process.
    fn hand_over(&mut self) {
        let done = self.take_back();
        let arena = || Arena::new(1 << 20);
        let directory = || Arc::clone(&self.directory) as Arc<dyn Directory>;
        let nobody = Session::new(File::simulated(9), directory(), arena(), Waker::simulated(0), BASE);
        let handed = std::mem::replace(&mut self.session, nobody).hand_over(done).expect("a connection");
        self.session =
            Session::resumed(handed, directory(), arena(), self.waker.clone(), BASE).expect("the export is there");
        self.handed_over += 1;
    }

    /// The session goes to another thread.
    fn move_on(&mut self) {
        let done = self.take_back();
        self.base = Token(self.base.0 + (1 << 20));
        self.session.move_to(Arena::new(1 << 20), self.base, done);
        self.moved.set(self.moved.get() + 1);
    }

    /// One step, and some of what can end ends.
    pub fn step(&mut self) -> Progress {
        if self.hand_over_one_in > 0 && self.world.random.below(self.hand_over_one_in) == 0 {
            self.session.hand_over_soon();
        }
        if self.rest_one_in > 0 && self.world.random.below(self.rest_one_in) == 0 {
            self.session.rest();
        }
        let mut progress = self.session.step(&mut self.world, &mut self.done);
        if progress == Progress::Over(Ending::HandedOver) {
            self.hand_over();
            progress = self.session.step(&mut self.world, &mut self.done);
        }
        if progress == Progress::Resting {
            if self.world.random.below(2) == 0 {
                self.move_on();
            }
            self.session.begin();
            progress = self.session.step(&mut self.world, &mut self.done);
        }
        if progress == Progress::Running {
            self.world.rung |= self.waker.was_woken();
            self.world.reap(Wait::No, &mut self.done).expect("a queue in memory");
        }
        progress
    }

    /// Steps until nothing can end any more, or the session is over.
    pub fn run(&mut self) -> Progress {
        loop {
            let progress = self.step();
            if progress != Progress::Running || self.done.is_empty() {
                return progress;
            }
        }
    }

    pub fn say(&mut self, bytes: &[u8]) {
        match &mut self.tls {
            None => self.world.to_server.extend(bytes),
            Some(tls) => {
                tls.writer().write_all(bytes).expect("memory takes all");
                self.say_tls();
            }
        }
    }

    /// What the client took since it was last asked.
    pub fn heard(&mut self) -> Vec<u8> {
        let heard = std::mem::take(&mut self.world.to_client);
        let Some(tls) = &mut self.tls else { return heard };
        let (mut rest, mut inside) = (&heard[..], Vec::new());
        while !rest.is_empty() {
            tls.read_tls(&mut rest).expect("the client takes all");
            tls.process_new_packets().expect("the server's TLS is right");
            // An error says that there is no more now.
            let _ = tls.reader().read_to_end(&mut inside);
        }
        self.say_tls();
        inside
    }

    /// Sends what the client's TLS has to say.
    pub fn say_tls(&mut self) {
        while let Some(tls) = self.tls.as_mut().filter(|tls| tls.wants_write()) {
            let mut said = Vec::new();
            tls.write_tls(&mut said).expect("memory takes all");
            self.world.to_server.extend(said);
        }
    }

    /// The same, for clients that go on inside TLS.
    pub fn with_tls(self, credentials: Credentials) -> Self {
        Self { session: self.session.with_tls(Some(Arc::new(credentials))), ..self }
    }

    /// Takes the client into TLS, behind the ACK: as far as both can come.
    pub fn start_tls(&mut self, config: Arc<ClientConfig>) -> Progress {
        let mut tls = ClientConnection::new(config, "localhost".try_into().expect("a name")).expect("a client");
        tls.set_buffer_limit(None);
        self.tls = Some(tls);
        self.say_tls();
        loop {
            let progress = self.run();
            let inside = self.heard();
            assert!(inside.is_empty(), "nobody has asked for anything");
            if progress != Progress::Running || self.world.to_server.is_empty() {
                return progress;
            }
        }
    }
}
