//! What a ring has to have of its kernel: looked at once, before anything is asked of it.
//!
//! An operation that a kernel does not know fails when it is used, in the middle of a job, with an error that says nothing.
//! So the kernel is asked for all of them at the start. There is no other way to do them: each is older than what
//! waiting for a socket and taking everything back at the end of a thread need anyway, and that is Linux 6.0.
use io_uring::types::CancelBuilder;
use io_uring::{IoUring, Probe, opcode};
use rustix::io::Errno;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// One operation that `Ring` asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needed {
    pub code: u8,
    /// As `io_uring_enter(2)` calls it.
    pub name: &'static str,
    /// The first Linux that has it.
    since: &'static str,
}

macro_rules! needed {
    ($($code:ident, $name:literal, $since:literal;)*) => {
        [$(Needed { code: opcode::$code::CODE, name: $name, since: $since }),*]
    };
}

/// All of them.
pub(super) const NEEDED: [Needed; 12] = needed! {
    Read, "IORING_OP_READ", "5.6";
    Write, "IORING_OP_WRITE", "5.6";
    ReadFixed, "IORING_OP_READ_FIXED", "5.1";
    WriteFixed, "IORING_OP_WRITE_FIXED", "5.1";
    Fsync, "IORING_OP_FSYNC", "5.1";
    Fallocate, "IORING_OP_FALLOCATE", "5.6";
    Fadvise, "IORING_OP_FADVISE", "5.6";
    Recv, "IORING_OP_RECV", "5.6";
    SendMsg, "IORING_OP_SENDMSG", "5.3";
    Accept, "IORING_OP_ACCEPT", "5.5";
    Connect, "IORING_OP_CONNECT", "5.5";
    Timeout, "IORING_OP_TIMEOUT", "5.4";
};

/// Refuses a kernel on which `ring` would fail later. Looks once in a process.
pub(super) fn refuse_lacking(ring: &IoUring) -> io::Result<()> {
    static LOOKED: AtomicBool = AtomicBool::new(false);
    if LOOKED.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|error| no_register(&error, "IORING_REGISTER_PROBE", "5.6"))?;
    refuse_without(|needed| probe.is_supported(needed.code))?;
    // There is nothing to cancel, which is an error of its own.
    match ring.submitter().register_sync_cancel(None, CancelBuilder::any()) {
        Err(error) if Errno::from_io_error(&error) != Some(Errno::NOENT) => {
            return Err(no_register(&error, "IORING_REGISTER_SYNC_CANCEL", "6.0"));
        }
        _ => {}
    }
    LOOKED.store(true, Ordering::Relaxed);
    Ok(())
}

/// Refuses a kernel that has not all operations, by the name of the first that it lacks.
fn refuse_without(has: impl Fn(&Needed) -> bool) -> io::Result<()> {
    match NEEDED.iter().find(|needed| !has(needed)) {
        None => Ok(()),
        Some(Needed { name, since, .. }) => Err(lacking(&format!("operation {name}"), since)),
    }
}

fn lacking(what: &str, since: &str) -> io::Error {
    let words = format!(
        "this kernel's io_uring lacks the {what}, which Linux has since {since}: blkmirror takes Linux 6.0 or newer"
    );
    io::Error::new(io::ErrorKind::Unsupported, words)
}

/// What `io_uring_register(2)` said to a wish that newer kernels know.
fn no_register(error: &io::Error, name: &str, since: &str) -> io::Error {
    match Errno::from_io_error(error) {
        Some(Errno::INVAL) => lacking(&format!("request {name}"), since),
        _ => {
            let words = format!(
                "io_uring_register({name}): {error}: have the seccomp filter of the container, if there is one, allow \
                 io_uring_register"
            );
            io::Error::new(error.kind(), words)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{NEEDED, no_register, refuse_lacking, refuse_without};
    use rustix::io::Errno;
    use std::collections::BTreeSet;

    #[test]
    fn each_operation_that_is_missing_is_named_with_the_kernel_that_has_it() {
        assert!(refuse_without(|_| true).is_ok());
        for missing in NEEDED {
            let error = refuse_without(|needed| needed.code != missing.code).expect_err("one is missing").to_string();
            for words in [missing.name, missing.since, "Linux 6.0 or newer"] {
                assert!(error.contains(words), "{words}: {error}");
            }
        }
        let codes: BTreeSet<u8> = NEEDED.iter().map(|needed| needed.code).collect();
        assert_eq!(codes.len(), NEEDED.len(), "each once");
    }

    #[test]
    fn what_cannot_be_asked_is_told_apart_from_what_is_not_there() {
        let said = |errno: Errno| no_register(&errno.into(), "IORING_REGISTER_PROBE", "5.6").to_string();
        assert!(said(Errno::INVAL).contains("IORING_REGISTER_PROBE, which Linux has since 5.6"));
        assert!(said(Errno::PERM).contains("allow io_uring_register"));
    }

    #[test]
    fn this_kernel_has_them() {
        let ring = io_uring::IoUring::new(2).expect("a ring");
        refuse_lacking(&ring).expect("the tests take such a kernel");
    }
}
