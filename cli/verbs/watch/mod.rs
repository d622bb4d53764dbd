//! `watch`: how the exports stand, for as long as somebody looks.
//!
//! ```text
//! lines   a line for each change, or an object: where there is no terminal
//! screen  the live view in a terminal: keys in, pictures out
//! poll    asks the daemon meanwhile
//! model   what is known, and which export is looked at closely
//! view    what that looks like
//! ```
mod lines;
mod model;
mod poll;
mod screen;
mod view;

use crate::args::Watch;
use crate::client::Client;
use crate::failure::Failure;
use engine::control::Status;
use std::io::{IsTerminal, stdin, stdout};

/// Follows the exports until the daemon ends or nobody looks any more.
pub fn run(args: Watch) -> Result<(), Failure> {
    let client = Client::connect(&args.daemon.control)?;
    if is_live(&args) { screen::follow(client, args) } else { lines::follow(client, &args) }
}

/// The live view needs a terminal that knows more than lines, and its keys.
fn is_live(args: &Watch) -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|name| name.is_empty() || name == "dumb");
    !args.form.json && !is_dumb && stdout().is_terminal() && stdin().is_terminal()
}

/// How the export stands that was named, or all of them.
fn look(client: &mut Client, export: Option<&str>) -> Result<Vec<Status>, Failure> {
    match export {
        Some(export) => client.status(export).map(|status| vec![status]),
        None => client.all(),
    }
}
