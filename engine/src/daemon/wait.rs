//! Waits for what a killed daemon left under way.
//!
//! The kernel ends a dead process's operations after the process: a write of it could land on what
//! the next daemon wrote already. Each such operation keeps its open file, and that its lock.
use crate::control::TargetFormat;
use crate::open::{export_named, files_of};
use formats::error::{Context, Error, Result};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a dead daemon's operations may take.
const MAX: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);

/// Until nobody has a file of the image at `path` locked. Another server's export is its server's affair: what a
/// dead daemon had under way there is in that server's hands, or lost.
pub(super) fn until_image_is_free(path: &Path, format: Option<TargetFormat>) -> Result<()> {
    if export_named(path).is_some() {
        return Ok(());
    }
    files_of(path, format).iter().try_for_each(|file| until_free(file))
}

/// Until nobody has the file at `path` locked; a file that is not there is nobody's.
pub(super) fn until_free(path: &Path) -> Result<()> {
    let named = |what: &str| format!("{}: {what}", path.display());
    // Not blocking, for what is no image yet may be a FIFO.
    let opened = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path);
    let file = match opened {
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
