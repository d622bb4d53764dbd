//! Manifests in files: written of a disk, and held against one.
use crate::bar::Bar;
use crate::failure::Failure;
use engine::daemon::hashes;
use engine::disk::Disk;
use formats::error::{Context, Error, Result};
use formats::manifest::{Entry, Header, LINE_LEN_MAX};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

/// What a manifest said of a disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// The disk is as the manifest says.
    Same,
    /// The ranges of so many bytes in all differ, the first one from this offset on.
    Differs { at: u64, bytes: u64 },
    /// The disk has so many bytes, and not as many as the manifest says.
    Size(u64, u64),
}

/// Writes the manifest of `disk` to `path`: all of it or none.
pub fn write(path: &Path, disk: Disk) -> std::result::Result<(), Failure> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let written = write_to(part, disk).and_then(|()| fs::rename(part, path).context(|| "rename"));
    written.map_err(|error| {
        // Of no use to anybody.
        let _ = fs::remove_file(part);
        Failure::new(format!("the manifest {}: {}", path.display(), error.one_line()))
    })
}

fn write_to(path: &Path, disk: Disk) -> Result<()> {
    let mut file = BufWriter::new(File::create(path).context(|| "create")?);
    let header = Header::of(disk.size());
    let bar = Bar::new("manifest");
    let writing = || "write";
    writeln!(file, "{header}").context(writing)?;
    hashes(disk, header, |entry| {
        bar.set(entry.at, header.size);
        writeln!(file, "{entry}").context(writing)
    })?;
    let file = file.into_inner().map_err(|error| Error::io("write", error.into_error()))?;
    file.sync_all().context(|| "flush")
}

/// Holds `disk` against the manifest at `path`.
pub fn check(path: &Path, disk: Disk) -> std::result::Result<Found, Failure> {
    let failed = |error: Error| Failure::new(format!("the manifest {}: {}", path.display(), error.one_line()));
    let mut lines = Lines(BufReader::new(File::open(path).map_err(|error| failed(Error::io("open", error)))?));
    let header = lines.next().and_then(|line| Header::parse(&line.unwrap_or_default())).map_err(failed)?;
    if header.size != disk.size() {
        return Ok(Found::Size(disk.size(), header.size));
    }
    let bar = Bar::new("verify");
    let (mut first, mut bytes) = (None, 0);
    hashes(disk, header, |found| {
        bar.set(found.at, header.size);
        let of_manifest = |error: Error| error.at(format!("the manifest {}", path.display()));
        let missing = || Error::malformed(format!("it ends before the range at {}", found.at));
        let line = lines.next().and_then(|line| line.ok_or_else(missing)).map_err(of_manifest)?;
        let said = Entry::parse(&line).map_err(of_manifest)?;
        if said.at != found.at {
            let what = format!("a line of {} where that of {} belongs", said.at, found.at);
            return Err(of_manifest(Error::malformed(what)));
        }
        if said.hash != found.hash {
            first.get_or_insert(found.at);
            bytes += header.range(found.at).len();
        }
        Ok(())
    })
    .map_err(|error| Failure::new(error.one_line()))?;
    if lines.next().map_err(failed)?.is_some() {
        return Err(failed(Error::malformed("it goes on behind the disk's last range")));
    }
    Ok(first.map_or(Found::Same, |at| Found::Differs { at, bytes }))
}

/// The lines of a file, none longer than a manifest's are.
struct Lines(BufReader<File>);

impl Lines {
    fn next(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let mut limited = (&mut self.0).take(LINE_LEN_MAX as u64);
        limited.read_line(&mut line).context(|| "read")?;
        match line.pop() {
            None => Ok(None),
            Some('\n') => Ok(Some(line)),
            Some(_) => Err(Error::malformed("a line has no end, or is longer than any of a manifest")),
        }
    }
}
