//! A line for each change.
use super::look;
use crate::args::Watch;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::say;
use crate::text;
use engine::control::Status;
use std::collections::BTreeMap;
use std::time::Duration;

/// How often progress is looked at; a change of phase is told at once.
const EVERY: Duration = Duration::from_secs(1);

/// Tells what has changed until the daemon ends or nobody reads.
pub fn follow(mut client: Client, args: &Watch) -> Result<(), Failure> {
    let mut told = BTreeMap::new();
    loop {
        for status in look(&mut client, args.export.as_deref())? {
            let line = if args.form.json { object(&status)? } else { text::line(&status) };
            if told.get(&status.export) != Some(&line) {
                say(&line)?;
                told.insert(status.export, line);
            }
        }
        client.wait_for_event(EVERY)?;
    }
}

fn object(status: &Status) -> Result<String, Failure> {
    serde_json::to_string(status).map_err(|error| Failure::new(error.to_string()))
}
