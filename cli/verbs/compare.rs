//! `compare`: whether two images read alike, whatever their formats. Ends as `qemu-img compare` does.
use crate::args::Compare;
use crate::bar::Bar;
use crate::failure::Failure;
use crate::image;
use crate::manifest;
use crate::output::tell;
use engine::control::TargetFormat;
use engine::daemon::{Comparison, Incomparable, compare};
use engine::disk::Disk;
use formats::error::Error;
use serde_json::json;
use std::path::Path;

/// Exit statuses for what is worse than a difference, which is 1.
const NOT_OPENED: u8 = 2;
const NOT_MAPPED: u8 = 3;
const NOT_READ: u8 = 4;

/// Compares two images.
pub fn run(args: &Compare) -> Result<(), Failure> {
    let [a, b] = [open(args, &args.a, args.a_format)?, open(args, &args.b, args.b_format)?];
    let len = a.size().max(b.size());
    let bar = Bar::new("compare");
    let compared = compare(a, b, args.strict, |bytes| bar.set(bytes, len));
    drop(bar);
    let (words, object) = match compared.map_err(in_words)? {
        Comparison::Same => ("the images read alike".to_owned(), json!({ "result": "same" })),
        Comparison::DifferAt(offset) => {
            (format!("the images differ at byte {offset}"), json!({ "result": "content-differs", "offset": offset }))
        }
        Comparison::SizesDiffer([a, b]) => {
            let words = format!("the images differ in size: {a} and {b} bytes");
            (words, json!({ "result": "sizes-differ", "sizes": [a, b] }))
        }
        Comparison::MappedOtherwiseAt(offset) => {
            let words = format!("the images are mapped otherwise at byte {offset}");
            (words, json!({ "result": "mapping-differs", "offset": offset }))
        }
    };
    let is_same = object["result"] == "same";
    if let Some(path) = args.manifest.as_ref().filter(|_| is_same) {
        manifest::write(path, open(args, &args.a, args.a_format)?)?;
    }
    tell(args.form, &object, || words)?;
    if is_same { Ok(()) } else { Err(Failure::Told) }
}

fn open(args: &Compare, path: &Path, named: Option<TargetFormat>) -> Result<Disk, Failure> {
    let chain =
        image::open_chain(path, named, &args.servers, args.sharing).map_err(|error| failed(NOT_OPENED, &error))?;
    Ok(Disk::new(chain, true))
}

fn in_words(why: Incomparable) -> Failure {
    match why {
        Incomparable::Mapping(error) => failed(NOT_MAPPED, &error),
        Incomparable::Reading(error) => failed(NOT_READ, &error),
    }
}

fn failed(status: u8, error: &Error) -> Failure {
    Failure::FailedWith { status, message: error.one_line() }
}
