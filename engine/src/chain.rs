//! Layers, top first, seen as one disk: the first layer that has a byte decides.
use crate::data_file::DataFile;
use crate::io::File;
use formats::error::{Context, Error, Result};
use formats::image::{Extent, Image, Place, Progress, Settle};
use formats::range::ByteRange;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One image of a chain, with the file that its payload is in.
pub struct Layer {
    /// The map.
    pub image: Box<dyn Image>,
    /// The bytes.
    pub file: DataFile,
    /// Where it lies.
    pub path: PathBuf,
    /// The format's name: `raw`, `qcow2`.
    pub format: &'static str,
    /// Present where the bytes are not in the image's own file.
    pub apart: Option<Apart>,
}

/// An image whose payload is in an external data file.
pub struct Apart {
    /// The image's own file, which has its tables.
    pub tables: File,
    /// Where the data file lies.
    pub data_path: PathBuf,
}

/// A backing chain: the top layer first, the base last.
#[derive(Clone)]
pub struct Chain {
    layers: Vec<Arc<Layer>>,
}

/// Where a run of guest bytes lives in the whole chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// As they are, in the file of this layer, from `host` on.
    Data {
        /// Number of the layer, the top being 0.
        layer: usize,
        /// Offset in its file.
        host: u64,
    },
    /// They read as zeroes.
    Zero,
    /// In one compressed cluster of this layer; see `Place::Compressed`.
    Compressed {
        /// Number of the layer, the top being 0.
        layer: usize,
        /// Offset in its file of the compressed bytes.
        host: u64,
        /// How many they are at most.
        len: u32,
        /// Where in the inflated cluster the run begins.
        skip: u32,
        /// Length of the inflated cluster.
        inflated: u32,
    },
}

/// How closely to look at where data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// What the images say: for reading.
    Images,
    /// And what the file systems say of holes: for copying and for block status.
    Holes,
}

impl Chain {
    /// A chain of `layers`, top first; at least one.
    pub fn new(layers: Vec<Arc<Layer>>) -> Self {
        assert!(!layers.is_empty(), "a chain has a top");
        Self { layers }
    }

    /// Size in bytes of the disk that the chain shows: its top's.
    pub fn size(&self) -> u64 {
        self.top().image.size()
    }

    /// The layer that takes the guest's writes.
    pub fn top(&self) -> &Arc<Layer> {
        &self.layers[0]
    }

    /// All layers, top first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The run from `at` on, cut to `len_max`.
    pub fn map(&self, at: u64, len_max: u64, look: Look) -> Result<(ByteRange, Source)> {
        let mut guest = ByteRange { start: at, end: self.size().min(at.saturating_add(len_max)) };
        for (number, layer) in self.layers.iter().enumerate() {
            // A backing image shorter than its overlay reads as zeroes past its end.
            if at >= layer.image.size() {
                break;
            }
            let extent = layer.map(guest, look)?;
            guest = extent.guest;
            match extent.place {
                Place::Absent => {}
                Place::Zero => break,
                Place::Data { host } => return Ok((guest, Source::Data { layer: number, host })),
                Place::Compressed { host, len, skip, inflated } => {
                    return Ok((guest, Source::Compressed { layer: number, host, len, skip, inflated }));
                }
            }
        }
        Ok((guest, Source::Zero))
    }

    /// The run from `at` on, cut to `len_max`, and the number of the layer that decides what it holds,
    /// counted from one at the top; 0 where none does.
    pub fn depth(&self, at: u64, len_max: u64) -> Result<(ByteRange, usize)> {
        let mut guest = ByteRange { start: at, end: self.size().min(at.saturating_add(len_max)) };
        for (number, layer) in (1..).zip(&self.layers) {
            // What a shorter backing image leaves to nobody is its own zeroes.
            if at >= layer.image.size() {
                return Ok((guest, number));
            }
            let extent = layer.map(guest, Look::Images)?;
            guest = extent.guest;
            if extent.place != Place::Absent {
                return Ok((guest, number));
            }
        }
        Ok((guest, 0))
    }

    /// The run from `at` on, cut to `len_max`, and whether the top layer itself has it (zeroes
    /// included): what a shallow copy has to bring.
    pub fn map_top(&self, at: u64, len_max: u64) -> Result<(ByteRange, bool)> {
        let extent = self.top().image.map(at, len_max)?;
        Ok((extent.guest, extent.place != Place::Absent))
    }
}

impl Layer {
    /// Makes durable what was done to the image. Waits, and nobody else may be using it: for
    /// starting and stopping.
    pub fn settle_now(&self) -> Result<()> {
        self.settle_by(&|file| file.flush_now().context(|| "flush"))
    }

    /// Leaves the image as tidy as it can be: durable, and no longer than it has to be. As
    /// `settle_now`. Nobody writes to it any more.
    pub fn close(&self) -> Result<()> {
        self.close_by(&|file| file.flush_now().context(|| "flush"))
    }

    /// The same, leaving it to the system when the bytes become durable.
    pub fn close_unsafely(&self) -> Result<()> {
        self.close_by(&|_| Ok(()))
    }

    /// Makes durable what is in its files. Waits.
    pub fn flush_now(&self) -> Result<()> {
        self.tables().flush_now().context(|| "flush")?;
        match &self.apart {
            None => Ok(()),
            Some(apart) => self.file.file().flush_now().context(|| format!("{}: flush", apart.data_path.display())),
        }
    }

    /// The image's own file.
    pub fn tables(&self) -> &File {
        self.apart.as_ref().map_or_else(|| self.file.file(), |apart| &apart.tables)
    }

    /// Where its bytes lie.
    pub fn data_path(&self) -> &Path {
        self.apart.as_ref().map_or(&self.path, |apart| &apart.data_path)
    }

    /// All its files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let apart = self.apart.as_ref().map(|apart| apart.data_path.as_path());
        std::iter::once(self.path.as_path()).chain(apart)
    }

    fn settle_by(&self, flush: &dyn Fn(&File) -> Result<()>) -> Result<()> {
        let mut progress = Progress::default();
        loop {
            match self.image.settle(&mut progress)? {
                Settle::Done => return Ok(()),
                Settle::Flush => flush(self.tables())?,
                Settle::FlushPayload => {
                    flush(self.file.file()).map_err(|error| error.at(self.data_path().display()))?;
                }
                Settle::Busy => return Err(Error::invalid("somebody else is settling the image")),
            }
        }
    }

    fn close_by(&self, flush: &dyn Fn(&File) -> Result<()>) -> Result<()> {
        let closed = self.settle_by(flush).and_then(|()| {
            // What was given up is free now that nobody is inside, and its tables say so next.
            self.image.recycle();
            self.settle_by(flush)?;
            let flush = || flush(self.tables());
            self.image.close(&flush)?;
            flush()?;
            self.tables().only_read();
            self.file.only_read();
            Ok(())
        });
        closed.map_err(|error| error.at(self.path.display()))
    }

    fn map(&self, guest: ByteRange, look: Look) -> Result<Extent> {
        let extent = match look {
            Look::Images => self.image.map(guest.start, guest.len()),
            Look::Holes => self.image.map_thin(guest.start, guest.len()),
        };
        extent.map_err(|error| error.at(self.path.display()))
    }
}
