//! `status`: how one export stands, or all of them.
use crate::args::Status;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::say;
use crate::text;
use serde::Serialize;

/// Says how things stand.
pub fn run(args: &Status) -> Result<(), Failure> {
    let mut client = Client::connect(&args.daemon.control)?;
    match &args.export {
        Some(export) => {
            let status = client.status(export)?;
            if args.json { say_json(&status) } else { say_lines(&text::lines(&status)) }
        }
        None => {
            let all = client.all()?;
            if args.json { say_json(&all) } else { say_lines(&text::table(&all)) }
        }
    }
}

fn say_lines(lines: &[String]) -> Result<(), Failure> {
    lines.iter().try_for_each(say)
}

fn say_json(value: &impl Serialize) -> Result<(), Failure> {
    say(serde_json::to_string_pretty(value).map_err(|error| Failure::new(error.to_string()))?)
}
