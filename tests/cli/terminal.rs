//! A terminal: the program on one side, on the other somebody who types and sees the screen.
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take that has to happen: far more than a slow and busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program in a terminal of its own. Killed and reaped when it is dropped.
pub struct Terminal {
    child: Child,
    keyboard: File,
    /// The program's side, kept open: what is set of a terminal lasts as long as somebody has it.
    own: OwnedFd,
    before: Termios,
    screen: Arc<Mutex<Screen>>,
}

/// What somebody sees.
struct Screen {
    parser: vt100::Parser,
    /// Everything that was said.
    bytes: Vec<u8>,
}

impl Terminal {
    /// Runs the program with these words, and `more` in its environment.
    pub fn start(words: &[&str], columns: u16, rows: u16, more: &[(&str, &str)]) -> Self {
        let other = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&other).unwrap();
        unlockpt(&other).unwrap();
        let name = ptsname(&other, Vec::new()).unwrap();
        let own = open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        tcsetwinsize(&own, size(columns, rows)).unwrap();
        let before = tcgetattr(&own).unwrap();
        let stdio = || Stdio::from(own.try_clone().unwrap());
        // A session of its own, whose terminal this is: so the program hears that its size has changed.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(env!("CARGO_BIN_EXE_blkmirror"))
            .args(words)
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .envs(more.iter().copied())
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let keyboard = File::from(other);
        let parser = vt100::Parser::new(some(rows), some(columns), 0);
        let screen = Arc::new(Mutex::new(Screen { parser, bytes: Vec::new() }));
        let (mut said, seen) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error is the last one of the other side closing it.
            while let Ok(len @ 1..) = said.read(&mut bytes) {
                let mut screen = seen.lock().unwrap();
                screen.parser.process(&bytes[..len]);
                screen.bytes.extend_from_slice(&bytes[..len]);
            }
        });
        Self { child, keyboard, own, before, screen }
    }

    /// Types.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Makes the window another size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.screen.lock().unwrap().parser.screen_mut().set_size(some(rows), some(columns));
        tcsetwinsize(&self.keyboard, size(columns, rows)).unwrap();
    }

    /// What is on the screen, row by row.
    pub fn rows(&self) -> Vec<String> {
        let screen = self.screen.lock().unwrap();
        let (_, columns) = screen.parser.screen().size();
        screen.parser.screen().rows(0, columns.get()).map(|row| row.trim_end().to_owned()).collect()
    }

    /// Waits until all of `words` are on the screen.
    #[track_caller]
    pub fn see(&self, words: &[&str]) {
        self.wait_for(&format!("{words:?}"), |rows| words.iter().all(|word| rows.iter().any(|row| row.contains(word))));
    }

    /// Waits until the screen is as `is` wants it.
    #[track_caller]
    pub fn wait_for(&self, what: &str, is: impl Fn(&[String]) -> bool) {
        let begun = Instant::now();
        while !is(&self.rows()) {
            assert!(begun.elapsed() < PATIENCE, "{what}: is not seen:\n{}", self.rows().join("\n"));
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// True where something on the screen has a colour.
    pub fn has_colours(&self) -> bool {
        let screen = self.screen.lock().unwrap();
        let (rows, columns) = screen.parser.screen().size();
        let cells = (0..rows.get()).flat_map(|row| (0..columns.get()).map(move |column| (row, column)));
        let mut cells = cells.filter_map(|(row, column)| screen.parser.screen().cell(row, column));
        cells.any(|cell| cell.fgcolor() != vt100::Color::Default || cell.bgcolor() != vt100::Color::Default)
    }

    /// The program's process.
    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Waits for the program's end; the terminal has to be as it was before.
    #[track_caller]
    pub fn end(mut self) -> (ExitStatus, Vec<String>) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end:\n{}", self.rows().join("\n"));
            thread::sleep(Duration::from_millis(10));
        };
        // The last words may still be on their way to us.
        self.wait_for("the screen of before", |_| {
            let screen = self.screen.lock().unwrap();
            !screen.parser.screen().alternate_screen() && !screen.parser.screen().hide_cursor()
        });
        let after = tcgetattr(&self.own).unwrap();
        assert_eq!(format!("{after:?}"), format!("{:?}", self.before), "the terminal is as it was");
        (status, self.rows())
    }

    /// Everything that the program said.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap().bytes).into_owned()
    }

    /// True while the program has the whole screen.
    pub fn is_full_screen(&self) -> bool {
        self.screen.lock().unwrap().parser.screen().alternate_screen()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // After `end` it has been reaped, and both of these say so.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn some(count: u16) -> NonZero<u16> {
    NonZero::new(count).expect("a terminal has rows and columns")
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
