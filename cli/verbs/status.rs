//! `status`: how one export stands, or all of them.
use crate::args::Status;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{say, say_json};
use crate::text;

/// Says how things stand.
pub fn run(args: &Status) -> Result<(), Failure> {
    let mut client = Client::connect(&args.daemon.control)?;
    match &args.export {
        Some(export) => {
            let status = client.status(export)?;
            if args.form.json { say_json(&status) } else { say_lines(&text::lines(&status)) }
        }
        None => {
            let all = client.all()?;
            if args.form.json { say_json(&all) } else { say_lines(&text::table(&all)) }
        }
    }
}

fn say_lines(lines: &[String]) -> Result<(), Failure> {
    lines.iter().try_for_each(say)
}
