//! The daemon as a child process, and the verbs of its command line.
use super::tools::{output, told};
use super::{PATIENCE, eventually};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The program under test; `BLKMIRROR` names another build of it.
pub fn program() -> PathBuf {
    std::env::var_os("BLKMIRROR").map_or_else(|| env!("CARGO_BIN_EXE_blkmirror").into(), PathBuf::from)
}

/// A daemon that serves. Killed and reaped when it is dropped.
pub struct Daemon {
    /// The program and its words, or those of one that runs it.
    args: Vec<String>,
    folder: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    /// Serves `exports` (`NAME=FILE[,format=F]` each) with its sockets and state in `folder`.
    #[track_caller]
    pub fn serve<S: AsRef<str>>(folder: &Path, exports: &[S]) -> Self {
        Self::serve_with(folder, exports, &[])
    }

    /// The same, with more options of `serve`.
    #[track_caller]
    pub fn serve_with<S: AsRef<str>>(folder: &Path, exports: &[S], options: &[&str]) -> Self {
        Self::serve_through(&[], folder, exports, options)
    }

    /// The same, run by the program of these words, whose process it takes over.
    #[track_caller]
    pub fn serve_through<S: AsRef<str>>(through: &[&str], folder: &Path, exports: &[S], options: &[&str]) -> Self {
        let mut args: Vec<String> = through.iter().map(|word| (*word).to_owned()).collect();
        args.extend([program().display().to_string(), "serve".to_owned()]);
        for export in exports {
            args.extend(["--export".to_owned(), export.as_ref().to_owned()]);
        }
        for (option, name) in [("--socket", "nbd"), ("--control", "control"), ("--state", "state")] {
            args.extend([option.to_owned(), folder.join(name).display().to_string()]);
        }
        args.extend(options.iter().map(|option| (*option).to_owned()));
        let mut daemon = Self { args, folder: folder.to_owned(), child: None };
        daemon.start();
        daemon
    }

    /// Starts it again with the same command line, and waits until it serves.
    #[track_caller]
    pub fn start(&mut self) {
        self.begin();
        eventually("the daemon serves", || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("waiting for our child"));
            assert!(ended.is_none(), "the daemon ended ({ended:?}) instead of serving:\n{}", self.log());
            (greets(&self.socket()) && greets(&self.control_socket())).then_some(())
        });
    }

    /// Starts it again, and waits for nothing.
    #[track_caller]
    pub fn begin(&mut self) {
        assert!(self.child.is_none(), "the daemon runs already");
        let log = File::options().create(true).append(true).open(self.log_file()).expect("the daemon's log");
        let child = Command::new(&self.args[0])
            .args(&self.args[1..])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("one more descriptor"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.args[0]));
        self.child = Some(child);
    }

    /// Starts a successor with the same words, which takes over, and waits until it serves alone.
    #[track_caller]
    pub fn hand_over(&mut self) {
        let mut before = self.child.take().expect("a daemon that runs");
        let (count, control) = (self.args.len(), self.control_socket().display().to_string());
        self.args.extend(["--handover".to_owned(), control]);
        self.begin();
        self.args.truncate(count);
        let status = eventually("the daemon leaves", || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("waiting for our child"));
            assert!(ended.is_none(), "the successor ended ({ended:?}):\n{}", self.log());
            before.try_wait().expect("waiting for our child")
        });
        assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
    }

    /// The command line of `serve`.
    pub fn serving(&self) -> Command {
        let mut command = Command::new(&self.args[0]);
        command.args(&self.args[1..]);
        command
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("a daemon that runs");
        child.kill().expect("killing our child");
        child.wait().expect("reaping our child");
    }

    /// SIGTERM, and the end with 0 that it asks for.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("a daemon that runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal to our child");
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().expect("waiting for our child") {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                self.child = Some(child);
                panic!("the daemon does not end on SIGTERM:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "the daemon ended with {status} on SIGTERM:\n{}", self.log());
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a daemon that runs").id()
    }

    /// Where it speaks NBD.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("nbd")
    }

    /// Where it takes orders.
    pub fn control_socket(&self) -> PathBuf {
        self.folder.join("control")
    }

    /// The export's address for NBD clients.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// What it said since its first start.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// The command `blkmirror VERB --control PATH ARGS…`.
    pub fn command(&self, verb: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg(verb).arg("--control").arg(self.control_socket()).args(args);
        command
    }

    /// Runs a verb that has to work; returns its stdout.
    #[track_caller]
    pub fn ok(&self, verb: &str, args: &[&str]) -> String {
        let mut command = self.command(verb, args);
        let output = output(&mut command);
        assert!(output.status.success(), "{}\n--- the daemon\n{}", told(&command, &output), self.log());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a verb that has to be refused (exit 1, nothing on stdout); returns its stderr.
    #[track_caller]
    pub fn refused(&self, verb: &str, args: &[&str]) -> String {
        let mut command = self.command(verb, args);
        let output: Output = output(&mut command);
        assert_eq!(output.status.code(), Some(1), "{}\n--- the daemon\n{}", told(&command, &output), self.log());
        assert!(output.stdout.is_empty(), "{}", told(&command, &output));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// `pivot`, asked for again where the last pass took longer than a guest's pause may: on a busy machine that
    /// is the right answer, and the job goes on.
    #[track_caller]
    pub fn pivot(&self, export: &str) {
        eventually(&format!("{export} pivots"), || {
            let mut command = self.command("pivot", &[export]);
            let output = output(&mut command);
            let undone = String::from_utf8_lossy(&output.stderr).contains("the pause allows");
            assert!(output.status.success() || undone, "{}\n--- the daemon\n{}", told(&command, &output), self.log());
            output.status.success().then_some(())
        });
    }

    /// `status --json EXPORT`.
    #[track_caller]
    pub fn status(&self, export: &str) -> Value {
        let said = self.ok("status", &[export, "--json"]);
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("status is no JSON ({error}): {said}"))
    }

    /// Waits until the export's job is in `phase`; fails where it ended otherwise. Returns the status.
    #[track_caller]
    pub fn wait_for(&self, export: &str, phase: &str) -> Value {
        eventually(&format!("{export} is {phase}"), || {
            let status = self.status(export);
            let now = status["phase"].as_str().unwrap_or_default();
            let ended = matches!(now, "none" | "pivoted" | "cancelled" | "failed");
            assert!(now == phase || !ended, "waiting for {phase}: {status}\n--- the daemon\n{}", self.log());
            (now == phase).then_some(status)
        })
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("log")
    }
}

/// True where a server says its first byte. That a connection is let in says nothing: the kernel keeps a killed
/// daemon's socket for a moment.
fn greets(socket: &Path) -> bool {
    let greeting = UnixStream::connect(socket).and_then(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.read(&mut [0])
    });
    greeting.is_ok_and(|count| count > 0)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the daemon ({})\n{}", self.args.join(" "), self.log());
        }
    }
}
