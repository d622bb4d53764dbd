//! `compare`: whether two images read alike, whatever their formats.
use crate::args::Compare;
use crate::bar::Bar;
use crate::failure::Failure;
use crate::image;
use crate::output::say;
use engine::control::TargetFormat;
use engine::control::options::Cache;
use engine::daemon::{Comparison, compare};
use engine::disk::Disk;
use engine::open::{Access, open_disk_at};
use formats::backing::Location;
use formats::probe::Probed;
use std::path::Path;

/// Compares two images.
pub fn run(args: &Compare) -> Result<(), Failure> {
    let disks = [open(&args.a, args.a_format)?, open(&args.b, args.b_format)?];
    let len = disks.iter().map(Disk::size).max().unwrap_or(0);
    let [a, b] = disks;
    let bar = Bar::new("compare");
    let compared = compare(a, b, |bytes| bar.set(bytes, len));
    drop(bar);
    match compared.map_err(|error| Failure::new(error.one_line()))? {
        Comparison::Same => say("the images read alike"),
        Comparison::DifferAt(offset) => {
            say(format!("the images differ at byte {offset}"))?;
            Err(Failure::Told)
        }
    }
}

fn open(path: &Path, named: Option<TargetFormat>) -> Result<Disk, Failure> {
    let in_words = |error: formats::error::Error| Failure::new(error.one_line());
    let location = Location::of_argument(path).map_err(in_words)?;
    // A header that is not known leaves only raw, and as raw no other file is followed.
    let format = match (named, &location) {
        (None, Location::File(path)) if image::probe(path).map_err(in_words)? == Probed::Unknown => {
            Some(TargetFormat::Raw)
        }
        (named, _) => named,
    };
    open_disk_at(&location, format, Access::read_only(Cache::None)).map_err(in_words)
}
