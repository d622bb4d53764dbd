//! `man` and `completions`: what the definition of the command line says, for readers and for shells.
use crate::args::{self, Args, Completions};
use crate::failure::Failure;
use crate::output::say;
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use std::fs;
use std::path::Path;

/// Writes the completion script of a shell.
pub fn completions(args: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "blkmirror", &mut script);
    say(String::from_utf8_lossy(&script).trim_end())
}

/// Writes the manual.
pub fn man(args: &args::Man) -> Result<(), Failure> {
    // `help VERB` has no page of its own.
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    let Some(folder) = &args.folder else {
        return say(page(&man_of(command))?.trim_end());
    };
    let verbs = command.get_subcommands().cloned().collect::<Vec<_>>();
    let pages = std::iter::once(command).chain(verbs);
    let count = pages.map(|command| write(folder, command)).sum::<Result<usize, _>>()?;
    say(format!("{}: {count} pages", folder.display()))
}

/// Writes one page into the folder, which is made where it is missing.
fn write(folder: &Path, command: Command) -> Result<usize, Failure> {
    let man = man_of(command);
    let path = folder.join(man.get_filename());
    let page = page(&man)?;
    let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, page));
    written.map(|()| 1).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn man_of(command: Command) -> Man {
    let source = concat!("blkmirror ", env!("CARGO_PKG_VERSION"));
    // An empty date is left out, and the source would be taken for it.
    Man::new(command).date(" ").source(source).manual("blkmirror")
}

fn page(man: &Man) -> Result<String, Failure> {
    let mut page = Vec::new();
    man.render(&mut page).map_err(|error| Failure::new(error.to_string()))?;
    // The synopsis may be broken between alternatives, of which there are more than fit a line.
    Ok(String::from_utf8_lossy(&page).replace("\\fR|\\fB", "\\fR | \\fB"))
}
