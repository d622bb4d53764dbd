//! Results on stdout, everything else on stderr.
use crate::args::Form;
use crate::failure::Failure;
use serde::Serialize;
use std::fmt;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, StdoutLock, Write};
use tracing::Level;

/// How much of a long result is written at a time, in bytes.
const RESULTS_LEN: usize = 64 << 10;

/// Writes one line of a result.
///
/// # Errors
/// `Unheard` where the reader has gone, the system's words otherwise.
pub fn say(line: impl AsRef<str>) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", line.as_ref()).and_then(|()| stdout.flush()).map_err(unheard)
}

/// Writes a result: as JSON where a program reads it, else in words.
///
/// # Errors
/// As `say`.
pub fn tell(form: Form, result: &impl Serialize, words: impl FnOnce() -> String) -> Result<(), Failure> {
    if form.json { say_json(result) } else { say(words()) }
}

/// Writes a result for a program.
///
/// # Errors
/// As `say`.
pub fn say_json(result: &impl Serialize) -> Result<(), Failure> {
    say(serde_json::to_string_pretty(result).map_err(|error| Failure::new(error.to_string()))?)
}

/// Writes one of many results for a program, in one line.
///
/// # Errors
/// As `say`.
pub fn say_json_line(result: &impl Serialize) -> Result<(), Failure> {
    say(serde_json::to_string(result).map_err(|error| Failure::new(error.to_string()))?)
}

/// A long result, written piece by piece: what was written is there at the latest when it ends.
pub struct Results(BufWriter<StdoutLock<'static>>);

impl Results {
    /// The beginning of one.
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(RESULTS_LEN, io::stdout().lock()))
    }

    /// Writes a piece.
    ///
    /// # Errors
    /// As `say`.
    pub fn write(&mut self, piece: fmt::Arguments<'_>) -> Result<(), Failure> {
        self.0.write_fmt(piece).map_err(unheard)
    }

    /// Ends it.
    ///
    /// # Errors
    /// As `say`.
    pub fn end(mut self) -> Result<(), Failure> {
        self.0.flush().map_err(unheard)
    }
}

fn unheard(error: io::Error) -> Failure {
    match error.kind() {
        ErrorKind::BrokenPipe => Failure::Unheard,
        _ => Failure::new(format!("writing to stdout: {error}")),
    }
}

/// Writes a remark that is no result.
pub fn remark(line: impl AsRef<str>) {
    // Nobody is left to be told where stderr is closed.
    let _ = writeln!(io::stderr().lock(), "{}", line.as_ref());
}

/// False where the environment asks for none: <https://no-color.org>.
pub fn colours_are_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Sends what the engine tells of itself to stderr: `verbose` 0 warnings, 1 its doings, 2 everything.
pub fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => Level::WARN,
        1 => Level::DEBUG,
        _ => Level::TRACE,
    };
    let is_terminal = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(level)
        .with_target(verbose > 1)
        .with_ansi(is_terminal && colours_are_wanted());
    // The journal has its own clock.
    if std::env::var_os("JOURNAL_STREAM").is_some() && !is_terminal {
        log.without_time().init();
    } else {
        log.init();
    }
}
