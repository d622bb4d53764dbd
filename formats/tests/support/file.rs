//! Images in files, read and written the slow and obvious way.
use formats::backing::{BackingName, Location};
use formats::error::Result;
use formats::image::{Image, Place, Progress, Reserve, Settle, Zeroed, Zeroing};
use formats::journal::Forgetful;
use formats::qcow2::{Open, Qcow2};
use formats::range::ByteRange;
use formats::raw::Raw;
use formats::storage::Storage;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// A file of the system, through the page cache.
pub struct FileStorage(File);

impl FileStorage {
    pub fn open(path: &Path, writable: bool) -> io::Result<Arc<Self>> {
        let file = OpenOptions::new().read(true).write(writable).create(writable).truncate(false).open(path)?;
        Ok(Arc::new(Self(file)))
    }
}

impl Storage for FileStorage {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, at)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok((at < self.len()?).then_some(at))
    }

    fn next_hole(&self, _: u64) -> io::Result<u64> {
        self.len()
    }
}

/// One image and what is below it.
pub struct Layer {
    pub image: Box<dyn Image>,
    /// What the payload is in.
    storage: Arc<FileStorage>,
    below: Option<Box<Layer>>,
}

impl Layer {
    /// Opens `path` and everything below; `format` is qcow2 or raw.
    pub fn open(path: &Path, format: &str, writable: bool) -> Self {
        let storage = FileStorage::open(path, writable).expect("a file");
        if format == "raw" {
            let size = storage.len().expect("a length").next_multiple_of(512);
            return Self { image: Box::new(Raw::new(storage.clone(), size)), storage, below: None };
        }
        let header = formats::qcow2::read_header(&*storage).expect("a valid header");
        let open = Open { writable, has_backing: header.backing.is_some(), metadata_bytes_max: 1 << 16 };
        let mut image = Qcow2::open(storage.clone(), Arc::new(Forgetful), open).expect("a valid image");
        let below = image.backing().map(|backing| {
            let name = BackingName::parse(&backing.name).expect("a name").location;
            let Ok(Location::File(below)) = name.seen_from(&Location::File(path.into())) else {
                panic!("{}: not a file's name", backing.name)
            };
            Box::new(Self::open(&below, backing.format.as_deref().expect("a recorded format"), false))
        });
        let storage = match &image.header().data_file {
            None => storage,
            Some(data_file) => {
                let path = data_file.resolve(path).expect("a path");
                let data = FileStorage::open(&path, writable).expect("a file");
                image = image.with_data_file(data.clone());
                data
            }
        };
        Self { image: Box::new(image), storage, below }
    }

    /// The whole disk.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.image.size() as usize];
        self.read(0, &mut bytes);
        bytes
    }

    /// Fills `bytes` from guest byte `at`; what is past this layer's end reads as zeroes.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        let inside = bytes.len().min(self.image.size().saturating_sub(at) as usize);
        let (bytes, past) = bytes.split_at_mut(inside);
        past.fill(0);
        let mut done = 0;
        while done < bytes.len() {
            let extent = self.image.map(at + done as u64, (bytes.len() - done) as u64).expect("a valid image");
            let here = &mut bytes[done..][..extent.guest.len() as usize];
            done += here.len();
            match extent.place {
                Place::Data { host } => self.read_file(host, here),
                Place::Zero => here.fill(0),
                Place::Absent => match &self.below {
                    Some(below) => below.read(extent.guest.start, here),
                    None => here.fill(0),
                },
                Place::Compressed { host, len, skip, inflated } => {
                    let mut compressed = vec![0; len as usize];
                    self.read_file(host, &mut compressed);
                    let mut cluster = vec![0; inflated as usize];
                    self.image.inflate(&compressed, &mut cluster).expect("a valid cluster");
                    here.copy_from_slice(&cluster[skip as usize..][..here.len()]);
                }
            }
        }
    }

    /// Bytes of the file; zeroes past its end.
    fn read_file(&self, at: u64, bytes: &mut [u8]) {
        let inside = bytes.len().min(self.storage.len().expect("a length").saturating_sub(at) as usize);
        self.storage.read_at(at, &mut bytes[..inside]).expect("inside the file");
        bytes[inside..].fill(0);
    }

    /// Writes like a guest.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let rest = ByteRange { start: at + done as u64, end: at + bytes.len() as u64 };
            let room = match self.image.reserve(rest).expect("a valid image") {
                Reserve::Room(room) => room,
                Reserve::Busy => panic!("nobody else writes"),
                Reserve::Settle => {
                    self.settle();
                    continue;
                }
            };
            for part in room.fill.into_iter().flatten() {
                let mut fill = vec![0; part.len() as usize];
                self.read(part.start, &mut fill);
                self.storage
                    .write_at(room.host.wrapping_add(part.start.wrapping_sub(room.guest.start)), &fill)
                    .expect("room");
            }
            let len = room.guest.len() as usize;
            self.storage.write_at(room.host, &bytes[done..][..len]).expect("room");
            self.image.commit(room).expect("a valid image");
            done += len;
        }
    }

    /// Zeroes or discards like a guest.
    pub fn zero(&self, range: ByteRange, zeroing: Zeroing) {
        let mut rest = range;
        while !rest.is_empty() {
            rest.start = match self.image.zero(rest, zeroing).expect("a valid image") {
                Zeroed::Done(done) => done.end,
                Zeroed::Host { guest, host } => {
                    self.storage.write_at(host, &vec![0; guest.len() as usize]).expect("room");
                    guest.end
                }
                Zeroed::Write(part) => {
                    self.write(part.start, &vec![0; part.len() as usize]);
                    part.end
                }
                Zeroed::Busy => panic!("nobody else writes"),
                Zeroed::Settle => {
                    self.settle();
                    rest.start
                }
            };
        }
    }

    /// Makes the disk larger.
    pub fn grow(&self, size: u64) -> Result<()> {
        let below = self.below.as_ref().map_or(0, |below| below.image.size());
        let range = self.image.grow(size, below, &|| Ok(()))?;
        self.zero(range, Zeroing::Unmap);
        self.settle();
        self.image.keep_size(&|| Ok(()))
    }

    /// Brings the metadata into the file. Nobody cuts the power here, so nothing is flushed.
    pub fn settle(&self) {
        let mut progress = Progress::default();
        loop {
            match self.image.settle(&mut progress).expect("a valid image") {
                Settle::Flush | Settle::FlushPayload => {}
                Settle::Done => break,
                Settle::Busy => panic!("nobody else settles"),
            }
        }
        self.image.recycle();
    }

    /// Closes the image as a clean end does.
    pub fn close(self) {
        self.settle();
        self.settle();
        self.image.close(&|| Ok(())).expect("a valid image");
    }
}
