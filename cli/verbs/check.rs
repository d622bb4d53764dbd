//! `check`: what is wrong with an image, by the numbers and exit status of `qemu-img check`.
use crate::args;
use crate::failure::Failure;
use crate::image;
use crate::output::{remark, say, say_json};
use engine::control::TargetFormat;
use engine::open::open_tables;
use formats::error::{Context, Error};
use formats::probe::Probed;
use formats::qcow2::{self, Check};
use serde::Serialize;
use std::path::Path;

/// Exit status: something is corrupt, something leaks, there is nothing to check.
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const UNSUPPORTED: u8 = 63;

/// Checks an image, and mends it first where that was asked for.
pub fn run(args: &args::Check) -> Result<(), Failure> {
    let in_words = |error: Error| Failure::new(error.at(args.file.display()).one_line());
    refuse_other_formats(&args.file, args.format)?;
    let storage = open_tables(&args.file, args.repair.is_some(), args.sharing.beside());
    let storage = storage.map_err(|error| Failure::new(error.one_line()))?;
    let found = match args.repair {
        None => qcow2::check(&storage),
        Some(what) => qcow2::repair(&storage, &|| storage.flush().context(|| "flush"), what),
    };
    let found = found.map_err(in_words)?;
    match args.form.json {
        true => tell_as_json(args, &found)?,
        false => tell(&found)?,
    }
    if !found.is_clean() && args.repair.is_none() {
        remark(format!("mend it with `blkmirror check --repair all {}`", args.file.display()));
    }
    match (found.corruptions, found.leaks) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::ToldWith(LEAKS)),
        _ => Err(Failure::ToldWith(CORRUPT)),
    }
}

fn refuse_other_formats(path: &Path, named: Option<TargetFormat>) -> Result<(), Failure> {
    let format = match (named, image::probe(path).map_err(|error| Failure::new(error.one_line()))?) {
        (Some(TargetFormat::Qcow2), _) | (None, Probed::Qcow2) => return Ok(()),
        (Some(TargetFormat::Raw), _) | (None, Probed::Unknown) => "raw",
        (None, Probed::Unsupported(name)) => name,
    };
    let message = format!("{}: the format {format} has nothing that can be checked", path.display());
    Err(Failure::FailedWith { status: UNSUPPORTED, message })
}

fn tell(found: &Check) -> Result<(), Failure> {
    found.problems.iter().try_for_each(say)?;
    let untold = (found.corruptions + found.leaks).saturating_sub(found.problems.len() as u64);
    if untold > 0 {
        say(format!("and {untold} more"))?;
    }
    if found.corruptions_fixed + found.leaks_fixed > 0 {
        say(format!("mended: {}, {}", corruptions(found.corruptions_fixed), leaks(found.leaks_fixed)))?;
    }
    if found.is_clean() {
        say("nothing is wrong")?;
    }
    if found.corruptions > 0 {
        say(format!("{}: data may be lost, or be lost by further writes", corruptions(found.corruptions)))?;
    }
    if found.leaks > 0 {
        say(format!("{}: space is wasted, and no data is harmed", leaks(found.leaks)))?;
    }
    say(format!(
        "{} of {} clusters allocated, {} fragmented, {} compressed; the image ends at {}",
        found.allocated_clusters,
        found.total_clusters,
        found.fragmented_clusters,
        found.compressed_clusters,
        found.image_end_offset
    ))
}

fn corruptions(count: u64) -> String {
    format!("{count} corruption{}", if count == 1 { "" } else { "s" })
}

fn leaks(count: u64) -> String {
    format!("{count} leak{}", if count == 1 { "" } else { "s" })
}

/// The fields of `qemu-img check --output=json`, which leaves most of those out that are 0.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Numbers {
    filename: String,
    format: &'static str,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn tell_as_json(args: &args::Check, found: &Check) -> Result<(), Failure> {
    found.problems.iter().for_each(remark);
    let numbers = Numbers {
        filename: args.file.display().to_string(),
        format: "qcow2",
        // What keeps a check from its end is an error of the program instead.
        check_errors: 0,
        image_end_offset: found.image_end_offset,
        corruptions: found.corruptions,
        leaks: found.leaks,
        corruptions_fixed: found.corruptions_fixed,
        leaks_fixed: found.leaks_fixed,
        total_clusters: found.total_clusters,
        allocated_clusters: found.allocated_clusters,
        fragmented_clusters: found.fragmented_clusters,
        compressed_clusters: found.compressed_clusters,
    };
    say_json(&numbers)
}
