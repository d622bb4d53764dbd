//! `events`: what happens to jobs, as the daemon tells it.
use crate::args::Events;
use crate::client::Client;
use crate::date::date;
use crate::failure::Failure;
use crate::output::{say, say_json_line};
use serde_json::Value;

/// Tells each event until the daemon ends or nobody reads.
pub fn run(args: &Events) -> Result<(), Failure> {
    let mut client = Client::connect(&args.daemon.control)?;
    while let Some(event) = client.next_event()? {
        if args.form.json { say_json_line(&event)? } else { say(line(&event))? }
    }
    Ok(())
}

/// When, what, and everything that is known of it.
fn line(event: &Value) -> String {
    let when = &event["timestamp"];
    let micros = when["microseconds"].as_u64().unwrap_or(0);
    let when = date(when["seconds"].as_u64().unwrap_or(0)).replace(" UTC", &format!(".{micros:06} UTC"));
    let data = event["data"].as_object().into_iter().flatten();
    let facts = data.map(|(name, value)| format!(" {name}={}", word(value)));
    format!("{when} {}{}", event["event"].as_str().unwrap_or("?"), facts.collect::<String>())
}

/// A value as one word, in quotes where it would be several.
fn word(value: &Value) -> String {
    match value {
        Value::String(text)
            if !text.is_empty() && !text.contains(|letter: char| letter.is_whitespace() || letter == '"') =>
        {
            text.clone()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::line;
    use serde_json::json;

    #[test]
    fn an_event_is_a_line_of_words() {
        let event = json!({
            "event": "BLOCK_JOB_ERROR",
            "data": { "device": "j", "message": "no \"space\"", "count": 7, "action": "" },
            "timestamp": { "seconds": 951_782_400, "microseconds": 42 },
        });
        let expected = "2000-02-29 00:00:00.000042 UTC BLOCK_JOB_ERROR action=\"\" count=7 device=j \
                        message=\"no \\\"space\\\"\"";
        assert_eq!(line(&event), expected);
        assert_eq!(line(&json!({})), "1970-01-01 00:00:00.000000 UTC ?");
    }
}
