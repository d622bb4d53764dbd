//! Another server's export as a file, so that a target is slow or hangs in the kernel.
use super::eventually;
use super::server::Server;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// An export as a file.
pub struct Mounted {
    /// Where it is.
    pub place: PathBuf,
    child: Child,
}

impl Mounted {
    /// `None` where this process may not mount.
    pub fn new(place: PathBuf, server: &Server) -> Option<Self> {
        std::fs::write(&place, "").expect("a file of ours");
        let mut command = Command::new("nbdfuse");
        command.arg(&place).arg("--unix").arg(server.socket()).stdin(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let is_there = eventually("the export is mounted, or cannot be", || {
            if child.try_wait().expect("waiting for our child").is_some() {
                return Some(false);
            }
            std::fs::metadata(&place).is_ok_and(|found| found.len() > 0).then_some(true)
        });
        if !is_there {
            eprintln!("not done, for it takes root and /dev/fuse: {command:?}");
            return None;
        }
        Some(Self { place, child })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.place).output();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
