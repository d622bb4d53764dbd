//! `map`: where a disk's bytes live, as `qemu-img map` tells it.
use crate::args::Map;
use crate::failure::Failure;
use crate::image;
use crate::output::Results;
use engine::chain::Chain;
use engine::daemon::{Run, Runs};
use formats::error::Error;
use serde::Serialize;
use std::path::Path;

/// Tells of each run as it is found.
pub fn run(args: &Map) -> Result<(), Failure> {
    let chain = image::open_chain(&args.file, args.format, &args.servers, args.sharing).map_err(in_words)?;
    if args.form.json { array(&chain) } else { table(&chain, &args.file) }
}

fn in_words(error: Error) -> Failure {
    Failure::new(error.one_line())
}

/// A run, by the names that `qemu-img map --output=json` has.
#[derive(Serialize)]
struct Entry {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl From<Run> for Entry {
    fn from(run: Run) -> Self {
        let Run { guest, depth, present, zero, data, compressed, host } = run;
        Self { start: guest.start, length: guest.len(), depth, present, zero, data, compressed, offset: host }
    }
}

fn array(chain: &Chain) -> Result<(), Failure> {
    let mut results = Results::new();
    let mut before = "[";
    for run in Runs::new(chain) {
        let entry = Entry::from(run.map_err(in_words)?);
        let line = serde_json::to_string(&entry).map_err(|error| Failure::new(error.to_string()))?;
        results.write(format_args!("{before}{line}"))?;
        before = ",\n";
    }
    // A disk of no bytes has no runs.
    results.write(format_args!("{}]\n", if before == "[" { "[" } else { "" }))?;
    results.end()
}

/// What is in a file as it is; zeroes are not told of.
fn table(chain: &Chain, file: &Path) -> Result<(), Failure> {
    let mut results = Results::new();
    results.write(format_args!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"))?;
    for run in Runs::new(chain) {
        let Run { guest, depth, zero, data, host, .. } = run.map_err(in_words)?;
        let (true, false) = (data, zero) else { continue };
        let Some(host) = host else {
            return Err(Failure::new(format!(
                "{}: {guest} are compressed and have no place of their own to tell: use --json",
                file.display()
            )));
        };
        // The top goes by the name that it was given, as in qemu-img's table.
        let layer = &chain.layers()[depth];
        let name = match &layer.apart {
            Some(apart) => &apart.data_path,
            None if depth == 0 => file,
            None => &layer.path,
        };
        let [start, len, host] = [guest.start, guest.len(), host].map(hex);
        results.write(format_args!("{start:<16}{len:<16}{host:<16}{}\n", name.display()))?;
    }
    results.end()
}

fn hex(number: u64) -> String {
    // C's `%#x` has no prefix for zero.
    if number == 0 { "0".into() } else { format!("{number:#x}") }
}
