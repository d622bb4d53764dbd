//! What is in a state folder, for who wants to know: read only, without the folder's lock, so also while a daemon
//! runs. Then what it says may be of two instants.
use super::planes::read_words;
use super::{KeptJob, boot_id};
use crate::io::Words;
use crate::journal::{BootId, WORDS, WordJournal};
use formats::error::{Context, Error, Result};
use formats::planes::Left;
use formats::record::Record;
use serde::Serialize;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

/// One file of a state folder.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub file: String,
    /// What it says.
    #[serde(flatten)]
    pub what: What,
}

/// What a file of a state folder says.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum What {
    /// Which image is the truth.
    Record {
        /// Of this export.
        export: String,
        /// The image that its command line names.
        origin: String,
        /// The image that has the guest's writes.
        serving: String,
        /// Its format.
        format: String,
        /// Bytes of the disk when that was recorded.
        size: u64,
        /// How often that was recorded.
        generation: u64,
    },
    /// No image was ever recorded: the truth is what the command line names.
    BlankRecord,
    /// A job that goes on at the next start.
    Job {
        /// Of this export.
        export: String,
        /// From here.
        source: String,
        /// To there.
        target: String,
        /// Only the top layer.
        shallow: bool,
        /// A whole chain, whose layers below the top are being copied.
        chain: bool,
        /// The number of the planes that count; none where source and target will be compared.
        planes: Option<u64>,
    },
    /// What a job's target may lack.
    Planes {
        /// Ties it to its job.
        job: u64,
        /// `seeding`, `comparing` or `copying`.
        phase: &'static str,
        /// Written in this run of the system.
        same_boot: bool,
        /// Left in order, and not used since.
        in_order: bool,
        /// Bytes of the disk.
        size: u64,
        /// Bytes of a chunk.
        chunk_size: u64,
        /// How far the mapping was looked at.
        seen_bytes: u64,
        /// In marked chunks.
        marked_bytes: u64,
        /// In claimed chunks.
        claimed_bytes: u64,
        /// In chunks that a kill would lose of the target.
        unsettled_bytes: u64,
        /// In guest writes under way.
        in_flight_bytes: u64,
        /// What a start would copy again now: in none of these twice.
        again_bytes: u64,
        /// What tells the source's file from others.
        source: (u64, u64),
        /// The target's.
        target: (u64, u64),
    },
    /// Mappings of an image that were only in memory.
    Journal {
        /// Written in this run of the system: in another one they are of no use.
        same_boot: bool,
        /// How many are to be brought into the image at the next start.
        mappings: usize,
        /// What tells the image's file from others.
        image: (u64, u64),
    },
    /// It cannot be understood.
    Damaged {
        /// Why not.
        error: String,
    },
}

/// What is in `folder`, by the files' names.
pub fn show(folder: &Path) -> Result<Vec<Entry>> {
    let boot = boot_id()?;
    let named = || format!("state folder {}", folder.display());
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).context(named)? {
        let path = entry.context(named)?.path();
        let what = match path.extension().and_then(|extension| extension.to_str()) {
            Some("record") => record(&path),
            Some("job") => job(&path),
            Some("planes") => planes(&path, boot),
            Some("journal") => journal(&path, boot),
            _ => continue,
        };
        let what = what.unwrap_or_else(|error| What::Damaged { error: error.one_line() });
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        entries.push(Entry { file, what });
    }
    entries.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(entries)
}

fn record(path: &Path) -> Result<What> {
    let bytes = fs::read(path).context(|| "read")?;
    Ok(match Record::newest(&bytes)? {
        None => What::BlankRecord,
        Some((record, _)) => What::Record {
            export: record.export,
            origin: record.origin,
            serving: record.truth,
            format: record.format,
            size: record.size,
            generation: record.generation,
        },
    })
}

fn job(path: &Path) -> Result<What> {
    let text = fs::read(path).context(|| "read")?;
    let kept: KeptJob =
        serde_json::from_slice(&text).map_err(std::io::Error::from).context(|| "not a job's request")?;
    Ok(What::Job {
        export: kept.request.export,
        source: kept.source,
        target: kept.request.target,
        shallow: kept.request.shallow,
        chain: kept.request.chain,
        planes: kept.planes,
    })
}

fn planes(path: &Path, boot: BootId) -> Result<What> {
    let words = read_words(path)?.ok_or_else(|| Error::invalid("it was removed meanwhile"))?;
    let left = Left::parse(&words)?;
    let (header, counts) = (left.header, left.counts());
    Ok(What::Planes {
        job: header.job,
        phase: match (left.seen() < header.size, left.compares()) {
            (true, _) => "seeding",
            (false, true) => "comparing",
            (false, false) => "copying",
        },
        same_boot: header.boot == boot,
        in_order: left.is_in_order() && !left.is_unfollowed(),
        size: header.size,
        chunk_size: 1 << header.chunk_bits,
        seen_bytes: left.seen(),
        marked_bytes: counts.marks,
        claimed_bytes: counts.claims,
        unsettled_bytes: counts.unsettled,
        in_flight_bytes: counts.flights,
        again_bytes: header.bytes(&left.dirty()?),
        source: header.source,
        target: header.target,
    })
}

fn journal(path: &Path, boot: BootId) -> Result<What> {
    let found = read_words(path)?.unwrap_or_default();
    if found.len() < WORDS {
        return Err(Error::malformed(format!("a journal has {WORDS} words, this has {}", found.len())));
    }
    let words = Words::in_memory(WORDS);
    words.iter().zip(&found).for_each(|(word, found)| word.store(*found, Ordering::Relaxed));
    let mappings = WordJournal::left_behind(&words, boot).len();
    Ok(What::Journal { same_boot: WordJournal::boot(&words) == boot, mappings, image: WordJournal::owner(&words) })
}
