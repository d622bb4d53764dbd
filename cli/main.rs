//! The program: words in, requests out.
//!
//! ```text
//! args     what can be said on the command line, each word once
//! client   asks a running daemon, by QMP over its control socket
//! verbs    one file for what each verb does
//! manifest writes manifests, and holds disks against them
//! text     what a status looks like to a person
//! plot     one quantity over time, in a terminal
//! output   results on stdout, everything else on stderr
//! ```
mod args;
mod bar;
mod client;
mod creation;
mod date;
mod demo;
mod export;
mod failure;
mod image;
mod listener;
mod manifest;
mod output;
mod place;
mod plot;
mod size;
mod text;
mod verbs;

use args::{Args, Verb};
use clap::Parser;
use failure::Failure;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    output::log_to_stderr(args.verbose);
    let is_json = args.verb.is_json();
    let Err(failure) = run(args.verb) else { return ExitCode::SUCCESS };
    if failure.is_untold() {
        output::remark(if is_json { failure.to_json().to_string() } else { format!("blkmirror: {failure}") });
    }
    ExitCode::from(failure.exit_status())
}

fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Mirror(mirror) => verbs::mirror::run(mirror),
        Verb::Status(status) => verbs::status::run(&status),
        Verb::Pivot(pivot) => verbs::job::pivot(&pivot),
        Verb::Snapshot(snapshot) => verbs::export::snapshot(&snapshot),
        Verb::Resize(resize) => verbs::export::resize(&resize),
        Verb::Export(export) => verbs::export::run(&export),
        Verb::Commit(job) => verbs::job::commit(&job),
        Verb::Cancel(cancel) => verbs::job::cancel(&cancel),
        Verb::Pause(job) => verbs::job::pause(&job),
        Verb::Resume(job) => verbs::job::resume(&job),
        Verb::Set(set) => verbs::job::set(&set),
        Verb::Watch(watch) => verbs::watch::run(watch),
        Verb::Events(events) => verbs::events::run(&events),
        Verb::Demo(demo) => demo::run(&demo),
        Verb::Serve(serve) => verbs::serve::run(serve),
        Verb::Verify(verify) => verbs::verify::run(&verify),
        Verb::Convert(convert) => verbs::convert::run(convert),
        Verb::Compare(compare) => verbs::compare::run(&compare),
        Verb::Info(info) => verbs::info::run(&info),
        Verb::Check(check) => verbs::check::run(&check),
        Verb::Map(map) => verbs::map::run(&map),
        Verb::Journal(journal) => verbs::journal::run(&journal),
        Verb::Quit(quit) => verbs::job::quit(&quit),
        Verb::Completions(completions) => verbs::manual::completions(&completions),
        Verb::Man(man) => verbs::manual::man(&man),
    }
}
