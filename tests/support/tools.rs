//! The other programs that the tests run, with what they said when they fail.
use super::PATIENCE;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};

/// Runs `program`; fails with all that it said where it does not end with 0. Returns its stdout.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    ran(Command::new(program).args(args))
}

/// Runs `command` to its end; fails with all that it said where it does not end with 0. Returns its stdout.
#[track_caller]
pub fn ran(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{}", told(command, &output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `command` ends with 1, and its words have all of `reasons`.
#[track_caller]
pub fn refused(mut command: Command, reasons: &[&str]) {
    let output = output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let all = reasons.iter().all(|reason| said.contains(reason));
    assert!(output.status.code() == Some(1) && all, "{reasons:?}: {}", told(&command, &output));
}

/// Runs `command` to its end, however that is; one that hangs is killed when patience ends.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error} (tests/run installs what the tests need)"));
    let pid = Pid::from_child(&child);
    let (ended, end) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            // Already gone: nothing to do.
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let output = child.wait_with_output().expect("waiting for our child");
    drop(ended);
    watchdog.join().expect("the watchdog");
    output
}

/// A command line and all that came of it, for a failure's message.
pub fn told(command: &Command, output: &Output) -> String {
    let mut told = format!("{command:?}: {}", output.status);
    for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        if !bytes.is_empty() {
            let _ = write!(told, "\n--- {name}\n{}", String::from_utf8_lossy(bytes));
        }
    }
    told
}

/// `qemu-img check` finds nothing wrong: neither an error nor a leak. Raw has nothing to check.
#[track_caller]
pub fn check(image: &Path, format: &str) {
    if format != "raw" {
        run("qemu-img", &["check".as_ref(), "-f".as_ref(), format.as_ref(), image.as_os_str()]);
    }
}

/// `qemu-img check` finds no error; clusters that leaked are fine.
#[track_caller]
pub fn check_leaks_allowed(image: &Path, format: &str) {
    if format != "raw" {
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", format]).arg(image);
        let output = output(&mut command);
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", told(&command, &output));
    }
}

/// The whole disk as QEMU reads it through the chain of `image`, also while that is served.
#[track_caller]
pub fn content(image: &Path, format: &str) -> Vec<u8> {
    // Not beside the image, which may be a device.
    let folder = super::folder();
    let flat = folder.path().join("flat");
    let args: [&OsStr; 8] = [
        "convert".as_ref(),
        "-U".as_ref(),
        "-f".as_ref(),
        format.as_ref(),
        "-O".as_ref(),
        "raw".as_ref(),
        image.as_os_str(),
        flat.as_os_str(),
    ];
    run("qemu-img", &args);
    std::fs::read(&flat).expect("what qemu-img wrote")
}

/// `qemu-img info` of one file, without its backing.
#[track_caller]
pub fn info(image: &Path) -> serde_json::Value {
    let said = run("qemu-img", &["info".as_ref(), "-U".as_ref(), "--output=json".as_ref(), image.as_os_str()]);
    serde_json::from_str(&said).expect("JSON of qemu-img")
}

/// Bytes that a file takes on its file system.
#[track_caller]
pub fn allocated(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().unwrap_or_else(|error| panic!("{}: {error}", file.display())).blocks() * 512
}
