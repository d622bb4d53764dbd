//! File systems of a test's own.
use super::tools::{output, ran, told};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory of its own, gone when it is dropped.
pub struct Mount(pub PathBuf);

impl Mount {
    /// `None` where this process may not mount.
    pub fn new(place: PathBuf, options: &str) -> Option<Self> {
        std::fs::create_dir_all(&place).expect("a folder of ours");
        let mut mount = Command::new("mount");
        let mounted = output(mount.args(["-t", "tmpfs", "-o", options, "blkmirror-test"]).arg(&place));
        if !mounted.status.success() {
            eprintln!("not done, for it takes root: {}", told(&mount, &mounted));
            return None;
        }
        Some(Self(place))
    }

    /// An ext4 of a device, in the file `image`.
    pub fn of_device(place: PathBuf, image: &Path) -> Option<Self> {
        Self::of_file(place, image, 64 << 20, Command::new("mkfs.ext4").arg("-q"))
    }

    /// A btrfs, which counts what a user has whatever the kernel was built with.
    pub fn with_quota(place: PathBuf, image: &Path) -> Option<Self> {
        let mount = Self::of_file(place, image, 128 << 20, Command::new("mkfs.btrfs").arg("-q"))?;
        ran(Command::new("btrfs").args(["quota", "enable"]).arg(&mount.0));
        Some(mount)
    }

    /// An XFS, whose files can share blocks.
    pub fn that_shares(place: PathBuf, image: &Path) -> Option<Self> {
        Self::of_file(place, image, 512 << 20, Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]))
    }

    fn of_file(place: PathBuf, image: &Path, len: u64, make: &mut Command) -> Option<Self> {
        std::fs::create_dir_all(&place).expect("a folder of ours");
        File::create(image).and_then(|file| file.set_len(len)).expect("a file of ours");
        ran(make.arg(image));
        let mut mount = Command::new("mount");
        let mounted = output(mount.args(["-o", "loop"]).arg(image).arg(&place));
        if !mounted.status.success() {
            eprintln!("not done, for it takes root and loop devices: {}", told(&mount, &mounted));
            return None;
        }
        Some(Self(place))
    }

    /// Makes it read-only at once, as an error of its device does, whoever has files of it open.
    pub fn abort(&self) {
        ran(Command::new("mount").args(["-o", "remount,abort"]).arg(&self.0));
    }

    /// Takes it away from its name, whoever has files of it open.
    pub fn leave(&self) {
        ran(Command::new("umount").arg("-l").arg(&self.0));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}
