//! Waits for what a killed daemon left under way.
//!
//! The kernel ends a dead process's operations after the process: a write of it could land on what
//! the next daemon wrote already. Each such operation keeps its open file, and that its locks. One that lives is not waited
//! for: it would be in vain.
use crate::control::TargetFormat;
use crate::io::lock::{Denied, is_written, lives};
use crate::open::{export_named, files_of};
use formats::error::{Context, Error, Result};
use rustix::fs::OFlags;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a dead daemon's operations may take.
const MAX: Duration = Duration::from_secs(30);
/// How long a daemon may take to die that was told to just before.
const DYING_MAX: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// Until no blkmirror writes to a file of the image at `path`. Another server's export is its server's affair: what a
/// dead daemon had under way there is in that server's hands, or lost.
pub(super) fn until_image_is_free(path: &Path, format: Option<TargetFormat>) -> Result<()> {
    if export_named(path).is_some() {
        return Ok(());
    }
    files_of(path, format).iter().try_for_each(|file| until_free(file))
}

/// Until no blkmirror writes to the file at `path`; a file that is not there is nobody's. Other programs are not waited
/// for: who opens it next finds their locks.
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
        match is_written(&file) {
            Ok(false) | Err(Denied::ToEverybody) => return Ok(()),
            Ok(true) if begin.elapsed() < if lives(&file) { DYING_MAX } else { MAX } => std::thread::sleep(PAUSE),
            Ok(true) => return Err(Error::invalid(named("another blkmirror uses it: end that one first"))),
            Err(denied) => return Err(Error::invalid(named(&format!("looking for locks: {denied:?}")))),
        }
    }
}
