//! `journal show`: what a state folder has, read only, also while a daemon uses it.
use crate::args::{Journal, JournalVerb, ShowJournal};
use crate::failure::Failure;
use crate::output::say;
use engine::state::{Entry, What, show};

/// Does what is to be done with a state folder.
pub fn run(args: &Journal) -> Result<(), Failure> {
    match &args.verb {
        JournalVerb::Show(show) => tell(show),
    }
}

fn tell(args: &ShowJournal) -> Result<(), Failure> {
    let entries = show(&args.folder).map_err(|error| Failure::new(error.one_line()))?;
    if args.json {
        return say(serde_json::to_string_pretty(&entries).map_err(|error| Failure::new(error.to_string()))?);
    }
    entries.iter().try_for_each(|entry| say(line(entry)))
}

/// A file in a line, and what is to be said of it below.
fn line(entry: &Entry) -> String {
    let text = match &entry.what {
        What::Record { export, origin, serving, format, generation, .. } => {
            format!("export {export} of {origin}: the truth is {serving} ({format}), record {generation}")
        }
        What::BlankRecord => "nothing was recorded: the truth is what the command line names".to_owned(),
        What::Job { export, source, target, chain, planes, .. } => {
            let from = match planes {
                None if *chain => "the layers below come first, and again when it goes on".to_owned(),
                Some(number) => format!("goes on from planes {number:x}"),
                None => "compares the two when it goes on".to_owned(),
            };
            format!("export {export}: copies {source} to {target}; {from}")
        }
        What::Planes {
            job,
            phase,
            same_boot,
            in_order,
            size,
            chunk_size,
            seen_bytes,
            marked_bytes,
            claimed_bytes,
            unsettled_bytes,
            in_flight_bytes,
            again_bytes,
            ..
        } => {
            let left = match (in_order, same_boot) {
                (true, _) => "left in order",
                (false, true) => "of this run of the system",
                (false, false) => "of another run of the system: source and target will be compared",
            };
            format!(
                "{job:x}, {phase}, {left}\n  disk {size} in chunks of {chunk_size}, looked at up to {seen_bytes}\n  \
                 marked {marked_bytes}, claimed {claimed_bytes}, unsettled {unsettled_bytes}, in flight \
                 {in_flight_bytes}: {again_bytes} to copy again"
            )
        }
        What::Journal { same_boot: true, mappings, .. } => format!("{mappings} mappings to be brought in"),
        What::Journal { same_boot: false, .. } => "of another run of the system: nothing to be brought in".to_owned(),
        What::Damaged { error } => format!("cannot be understood: {error}"),
    };
    format!("{}: {text}", entry.file)
}
