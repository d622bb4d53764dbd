//! The same program as a child, serving the demo's disk.
use crate::client::Client;
use crate::failure::Failure;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long the daemon may take to serve.
const START_MAX: Duration = Duration::from_secs(20);

/// A daemon that serves. Killed when it is dropped.
pub struct Daemon {
    child: Child,
    folder: PathBuf,
}

impl Daemon {
    /// Serves the qcow2 image `disk` as `export`, its sockets and state in `folder`.
    ///
    /// # Errors
    /// That it cannot be started, with its own words.
    pub fn start(folder: &Path, export: &str, disk: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::new(format!("starting the daemon: {error}"));
        let log = File::create(folder.join("log")).map_err(failed)?;
        let file = disk.display().to_string().replace(',', ",,");
        let child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg("serve")
            .arg("--export")
            .arg(format!("{export}={file},format=qcow2"))
            .arg("--socket")
            .arg(folder.join("nbd"))
            .arg("--control")
            .arg(folder.join("control"))
            .arg("--state")
            .arg(folder.join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        let mut daemon = Self { child, folder: folder.into() };
        daemon.wait_until_it_serves()?;
        Ok(daemon)
    }

    /// Where it speaks NBD.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("nbd")
    }

    /// A connection to its control socket.
    ///
    /// # Errors
    /// As for `Client::connect`.
    pub fn client(&self) -> Result<Client, Failure> {
        Client::connect(&self.folder.join("control"))
    }

    /// Waits until it has ended after it was asked to.
    ///
    /// # Errors
    /// That it ended otherwise than well.
    pub fn wait(mut self) -> Result<(), Failure> {
        let status = self.child.wait().map_err(|error| Failure::new(format!("waiting for the daemon: {error}")))?;
        if status.success() { Ok(()) } else { Err(self.ended(&status.to_string())) }
    }

    fn wait_until_it_serves(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        while self.client().is_err() {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.ended(&status.to_string()));
            }
            if begun.elapsed() > START_MAX {
                return Err(self.ended("no answer"));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn ended(&self, how: &str) -> Failure {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        Failure::new(format!("the daemon ended ({how}): {}", log.trim()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After `wait` it has been reaped, and both of these say so.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
