//! A real Linux guest in real QEMU, its disk on an NBD export. `tests/support/guest-init` is what runs in it.
use super::PATIENCE;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// A guest. Killed and reaped when it is dropped.
pub struct Vm {
    qemu: Child,
    console: Receiver<String>,
    seen: Vec<String>,
}

impl Vm {
    /// Boots a guest whose disk is `export` on `socket`; it survives the server's absence for 60 s.
    #[track_caller]
    pub fn boot(socket: &Path, export: &str) -> Self {
        let (kernel, initramfs) = (made("vmlinuz"), made("initramfs.gz"));
        // Not KVM: where it is there, it may still not run a kernel.
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg,thread=multi", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none"]);
        command.args(["-serial", "stdio", "-append", "console=ttyS0 quiet"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        let disk = format!(
            "driver=nbd,node-name=d0,server.type=unix,server.path={},export={export},reconnect-delay=60,discard=unmap",
            socket.display()
        );
        command.args(["-blockdev", &disk, "-device", "virtio-blk-pci,drive=d0,werror=report,rerror=report"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut qemu = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error} (tests/run installs what the tests need)"));
        let (lines, console) = channel();
        forward(qemu.stdout.take().expect("a pipe"), lines.clone());
        forward(qemu.stderr.take().expect("a pipe"), lines);
        let mut vm = Self { qemu, console, seen: Vec::new() };
        vm.answer("up");
        vm
    }

    /// Gives an order and waits for its end; returns what the guest said with it.
    #[track_caller]
    pub fn order(&mut self, order: &str) -> String {
        self.give(order);
        self.answer(order)
    }

    /// Gives an order, to be answered later (`answer`).
    #[track_caller]
    pub fn give(&mut self, order: &str) {
        let stdin = self.qemu.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "{order}").expect("QEMU takes an order");
    }

    /// Waits for the answer to `order`.
    #[track_caller]
    pub fn answer(&mut self, order: &str) -> String {
        let begun = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            let Ok(line) = self.console.recv_timeout(left) else {
                panic!("the guest does not answer `{order}`; its console:\n{}", self.seen.join("\n"));
            };
            let answer = line.trim().strip_prefix('@').and_then(|line| line.split_once(' '));
            let said = answer.and_then(|(verdict, rest)| Some((verdict, rest.strip_prefix(order)?.trim().to_owned())));
            self.seen.push(line.clone());
            match said {
                Some(("ok", said)) => return said,
                Some(_) => panic!("the guest failed at `{order}`; its console:\n{}", self.seen.join("\n")),
                None => (),
            }
        }
    }

    /// Waits until the guest has written `count` more files.
    #[track_caller]
    pub fn wait_files(&mut self, count: u64) {
        let files = |vm: &mut Self| vm.order("count").parse::<u64>().expect("a count");
        let goal = files(self) + count;
        let begun = Instant::now();
        while files(self) < goal {
            assert!(begun.elapsed() < PATIENCE, "the guest's writer stands; its console:\n{}", self.seen.join("\n"));
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    /// Switches it off.
    #[track_caller]
    pub fn off(mut self) {
        self.order("off");
        let status = self.qemu.wait().expect("waiting for our child");
        assert!(status.success(), "QEMU ended with {status}; the console:\n{}", self.seen.join("\n"));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// What `tests/run install` made for the guest.
fn made(name: &str) -> PathBuf {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(name);
    assert!(file.exists(), "{} is not there: `tests/run install` makes it", file.display());
    file
}

fn forward(pipe: impl std::io::Read + Send + 'static, lines: std::sync::mpsc::Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
}
