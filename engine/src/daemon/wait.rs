//! Waits for what a killed daemon left under way.
//!
//! The kernel ends a dead process's operations after the process: a write of it could land on what
//! the next daemon wrote already. Each such operation keeps its open file, and that its lock.
use formats::error::{Context, Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a dead daemon's operations may take.
const MAX: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);

/// Until nobody has the file at `path` locked; a file that is not there is nobody's.
pub(super) fn until_free(path: &Path) -> Result<()> {
    let named = |what: &str| format!("{}: {what}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.context(|| named("open"))?,
    };
    let begin = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if begin.elapsed() < MAX => std::thread::sleep(PAUSE),
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::invalid(named("another blkmirror uses it: end that one first")));
            }
            Err(error) => return Err(Error::io(named("lock"), error.into())),
        }
    }
}
