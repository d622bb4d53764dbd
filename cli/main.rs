//! The program: words in, requests out.
//!
//! ```text
//! args     what can be said on the command line, each word once
//! client   asks a running daemon, by QMP over its control socket
//! verbs    one file for what each verb does
//! text     what a status looks like to a person
//! output   results on stdout, everything else on stderr
//! ```
mod args;
mod bar;
mod client;
mod creation;
mod demo;
mod export;
mod failure;
mod image;
mod listener;
mod output;
mod place;
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
    let Err(failure) = run(args.verb) else { return ExitCode::SUCCESS };
    if !matches!(failure, Failure::Unheard | Failure::Told | Failure::ToldWith(_)) {
        eprintln!("blkmirror: {failure}");
    }
    ExitCode::from(failure.exit_status())
}

fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Mirror(mirror) => verbs::mirror::run(mirror),
        Verb::Status(status) => verbs::status::run(&status),
        Verb::Pivot(job) => verbs::job::pivot(&job),
        Verb::Cancel(cancel) => verbs::job::cancel(&cancel),
        Verb::Pause(job) => verbs::job::pause(&job),
        Verb::Resume(job) => verbs::job::resume(&job),
        Verb::Set(set) => verbs::job::set(&set),
        Verb::Watch(watch) => verbs::watch::run(&watch),
        Verb::Demo(demo) => demo::run(&demo),
        Verb::Serve(serve) => verbs::serve::run(serve),
        Verb::Convert(convert) => verbs::convert::run(convert),
        Verb::Compare(compare) => verbs::compare::run(&compare),
        Verb::Info(info) => verbs::info::run(&info),
        Verb::Check(check) => verbs::check::run(&check),
        Verb::Map(map) => verbs::map::run(&map),
        Verb::Journal(journal) => verbs::journal::run(&journal),
        Verb::Quit(daemon) => verbs::job::quit(&daemon),
    }
}
