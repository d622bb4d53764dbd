//! A running daemon's sockets, connections and images go to another process: an upgrade that no guest notices.
//!
//! ```text
//! successor                                  daemon
//! checks its words, connects  ── QMP ──►     the same user, version and words? no change under way?
//!                             ◄── yes ───    ends as for SIGTERM: requests finished, images durable and let go of
//!                             ◄─ frames ──   listeners, connections, each with its descriptor (SCM_RIGHTS)
//! opens the images, its jobs
//! serves                      ── taken ──►   leaves, and leaves the sockets' paths alone
//! ```
//!
//! Until `taken` the daemon keeps all descriptors, and looks at none. Where that word does not come, for the successor has
//! died, or cannot open an image, the daemon opens its images again and goes on. The locks of the images decide: whoever
//! has them serves, so both can never.
use super::listen::Listening;
use crate::control::HandOver;
use crate::control::options::{Listener, ServeOptions};
use crate::export::session::Handed;
use crate::io::File;
use crate::open::export_named;
use formats::error::{Context, Error, Result};
use formats::nbd::{BlockSizes, Context as Meta, ExportInfo, Negotiated, Style};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg, sockopt,
};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Of the words below.
pub(super) const VERSION: u32 = 1;
/// How long a daemon may take to answer, and how long to let go of everything.
const LEAVE_MAX: Duration = Duration::from_secs(120);
/// How long a successor may take to open what the daemon had.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// The longest line of QMP, and the longest frame: a connection's unread bytes in hexadecimal, and its names.
const LINE_MAX: usize = 1 << 20;
const FRAME_MAX: usize = 4 * Handed::UNREAD_MAX;
/// The line that is followed by frames.
const FRAMES: &str = "blkmirror-frames";
/// What a successor says that serves.
const TAKEN: u8 = b'k';

/// What one process leaves to another.
#[derive(Default)]
pub(super) struct Estate {
    /// Where NBD clients come in.
    pub listeners: Vec<Listening>,
    /// The control socket.
    pub control: Option<Listening>,
    /// Clients under way.
    pub clients: Vec<Handed>,
    /// Clients that nobody has greeted.
    pub new: Vec<File>,
}

/// One frame.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Listener { name: String, path: Option<PathBuf> },
    Control { name: String, path: Option<PathBuf> },
    Client(Box<Agreed>),
    New,
    End,
}

/// What was agreed upon with a client, and what came of it.
#[derive(Serialize, Deserialize)]
struct Agreed {
    name: String,
    description: String,
    size: u64,
    read_only: bool,
    multi_conn: bool,
    fast_zero: bool,
    block_sizes: [u32; 3],
    block_sizes_told: bool,
    bitmaps: Vec<String>,
    style: u8,
    contexts: Vec<(u32, String)>,
    unread: String,
}

/// What a daemon was started with, in words that do not depend on its version: the two have to have the same.
pub(super) fn words(options: &ServeOptions) -> Vec<String> {
    let full = |path: &Path| match export_named(path) {
        Some(_) => path.display().to_string(),
        None => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string(),
    };
    let exports = options.exports.iter().map(|export| {
        let format = export.format.map(|format| format!("{format:?}")).unwrap_or_default();
        format!("export {}={} {format} readonly:{}", export.name, full(&export.file), export.readonly)
    });
    let listeners = options.listeners.iter().map(|listener| match listener {
        Listener::Unix(path, access) => {
            format!("socket {} {:?} {:?} {:?}", full(path), access.mode, access.user, access.group)
        }
        Listener::Tcp(address) => format!("listen {address}"),
        Listener::Vsock { cid, port } => format!("listen vsock:{cid:?}:{port}"),
    });
    let state = options.state.as_deref().map_or_else(|| "beside".to_owned(), full);
    let tls = options.tls.as_ref().map(|tls| {
        let certificates = full(&tls.certificates);
        format!("required:{} {certificates} verify:{} {:?}", tls.required, tls.verify_peer, tls.allow)
    });
    let others = [
        format!("control {}", full(&options.control)),
        format!("state {state}"),
        format!("cache {:?}", options.reach.cache),
        format!("tls {}", tls.unwrap_or_default()),
    ];
    exports.chain(listeners).chain(others).collect()
}

/// Why this successor does not get it, if it does not.
pub(super) fn refuse(wanted: &HandOver, ours: &[String], socket: &File) -> Option<String> {
    let peer = socket.as_fd().map(sockopt::socket_peercred);
    if !matches!(peer, Some(Ok(peer)) if peer.uid == geteuid()) {
        return Some("only a process of the same user can take over".to_owned());
    }
    if wanted.version != VERSION {
        let theirs = wanted.version;
        return Some(format!("the successor hands over by version {theirs}, and this daemon by {VERSION}: restart it"));
    }
    let missing = |these: &[String], of: &[String]| {
        let missing: Vec<String> = these.iter().filter(|word| !of.contains(word)).cloned().collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    };
    match (missing(ours, &wanted.options), missing(&wanted.options, ours)) {
        (None, None) => None,
        (ours, theirs) => Some(format!(
            "a successor has to be started with the same words: this daemon has `{}`, the successor `{}`",
            ours.unwrap_or_default(),
            theirs.unwrap_or_default()
        )),
    }
}

/// What a daemon has left to this process, which is to say when it serves.
pub(super) struct Taken {
    pub estate: Estate,
    stream: UnixStream,
}

impl Taken {
    /// From here on it is this process's; the other one goes.
    pub fn confirm(mut self) -> Result<()> {
        self.stream.write_all(&[TAKEN]).context(|| "telling the daemon before that it has been taken over")
    }
}

/// Asks the daemon at `control` for everything that it has.
pub(super) fn ask(control: &Path, options: &ServeOptions) -> Result<Taken> {
    let named = |what: &str| format!("taking over from the daemon at {}: {what}", control.display());
    let stream = UnixStream::connect(control).context(|| named("is it running?"))?;
    let mut taken = Taken { estate: Estate::default(), stream };
    let timed = taken.stream.set_read_timeout(Some(LEAVE_MAX));
    timed.context(|| named("a time limit"))?;
    taken.negotiate(options).map_err(|error| error.at(named("it refuses")))?;
    taken.receive().context(|| named("receiving what it has"))?;
    Ok(taken)
}

impl Taken {
    fn negotiate(&mut self, options: &ServeOptions) -> Result<()> {
        let lost = || "talking to it";
        self.line().context(lost)?;
        let wanted = HandOver { version: VERSION, options: words(options) };
        for (command, arguments) in [("qmp_capabilities", json!({})), ("blkmirror-hand-over", json!(wanted))] {
            let message = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
            self.stream.write_all(message.as_bytes()).context(lost)?;
            loop {
                let answer = self.line().context(lost)?;
                if let Some(error) = answer.get("error") {
                    return Err(Error::invalid(error["desc"].as_str().unwrap_or("without a word").to_owned()));
                }
                if answer.get("return").is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        while self.line()?.get(FRAMES).is_none() {}
        loop {
            let (word, fd) = receive_frame(&mut self.stream)?;
            let fd = || fd.ok_or_else(|| io::Error::other("a frame without its descriptor"));
            let listening = |name, path, fd: OwnedFd| Listening { file: File::new(fd), name, path, is_ours: false };
            match word {
                Word::Listener { name, path } => self.estate.listeners.push(listening(name, path, fd()?)),
                Word::Control { name, path } => self.estate.control = Some(listening(name, path, fd()?)),
                Word::Client(agreed) => self.estate.clients.push(agreed.handed(File::new(fd()?))?),
                Word::New => self.estate.new.push(File::new(fd()?)),
                Word::End => return Ok(()),
            }
        }
    }

    /// A line of QMP, and not a byte more.
    fn line(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            line.extend(byte);
            if line.len() > LINE_MAX {
                return Err(io::Error::other("a line without end"));
            }
        }
        Ok(serde_json::from_slice(&line)?)
    }
}

impl Estate {
    /// Gives everything to the process at the other end of `socket`, which is in nobody's queue. An error says that
    /// it did not take it: then everything is as before.
    pub fn give(&mut self, socket: &File) -> io::Result<()> {
        let fd = socket.as_fd().ok_or(io::ErrorKind::InvalidInput)?;
        let mut stream = UnixStream::from(fd.try_clone_to_owned()?);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(OPEN_MAX))?;
        stream.set_write_timeout(Some(OPEN_MAX))?;
        stream.write_all(format!("{}\n", json!({ FRAMES: VERSION })).as_bytes())?;
        for listening in &self.listeners {
            let word = Word::Listener { name: listening.name.clone(), path: listening.path.clone() };
            send_frame(&stream, &word, listening.file.as_fd())?;
        }
        if let Some(listening) = &self.control {
            let word = Word::Control { name: listening.name.clone(), path: listening.path.clone() };
            send_frame(&stream, &word, listening.file.as_fd())?;
        }
        for client in &self.clients {
            send_frame(&stream, &Word::Client(Box::new(Agreed::of(client))), client.socket.as_fd())?;
        }
        for socket in &self.new {
            send_frame(&stream, &Word::New, socket.as_fd())?;
        }
        send_frame(&stream, &Word::End, None)?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        match answer {
            [TAKEN] => Ok(()),
            _ => Err(io::Error::other("it says what nobody understands")),
        }
    }

    /// Somebody else has them from now on, or this process again.
    pub fn own_paths(&mut self, is_ours: bool) {
        self.listeners.iter_mut().chain(&mut self.control).for_each(|listening| listening.is_ours = is_ours);
    }
}

impl Agreed {
    fn of(handed: &Handed) -> Self {
        let Negotiated { export, style, contexts, block_sizes_told } = handed.negotiated.clone();
        let BlockSizes { minimum, preferred, maximum } = export.block_sizes;
        Self {
            name: export.name,
            description: export.description,
            size: export.size,
            read_only: export.read_only,
            multi_conn: export.multi_conn,
            fast_zero: export.fast_zero,
            block_sizes: [minimum, preferred, maximum],
            block_sizes_told,
            bitmaps: export.bitmaps,
            style: style as u8,
            contexts: contexts.into_iter().map(|(number, context)| (number, context.name())).collect(),
            unread: handed.unread.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    fn handed(self, socket: File) -> io::Result<Handed> {
        let wrong = |what: &str| io::Error::other(format!("a connection's {what} makes no sense"));
        let style =
            [Style::Simple, Style::Structured, Style::Extended].into_iter().find(|style| *style as u8 == self.style);
        let [minimum, preferred, maximum] = self.block_sizes;
        let export = ExportInfo {
            name: self.name,
            description: self.description,
            size: self.size,
            read_only: self.read_only,
            multi_conn: self.multi_conn,
            fast_zero: self.fast_zero,
            block_sizes: BlockSizes { minimum, preferred, maximum },
            bitmaps: self.bitmaps,
        };
        let context = |(number, name): (u32, String)| Meta::named(&name).map(|context| (number, context));
        let contexts = self.contexts.into_iter().map(context).collect::<Option<Vec<_>>>();
        let negotiated = Negotiated {
            export,
            style: style.ok_or_else(|| wrong("style of replies"))?,
            contexts: contexts.ok_or_else(|| wrong("contexts"))?,
            block_sizes_told: self.block_sizes_told,
        };
        let unread = unhex(&self.unread).filter(|unread| unread.len() <= Handed::UNREAD_MAX);
        Ok(Handed { socket, negotiated, unread: unread.ok_or_else(|| wrong("unread bytes"))? })
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok().filter(|_| two.len() == 2)).collect()
}

fn send_frame(stream: &UnixStream, word: &Word, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let body = serde_json::to_vec(word)?;
    let frame = [&(body.len() as u32).to_be_bytes()[..], &body].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::NOSIGNAL)?;
    (&*stream).write_all(&frame[sent..])
}

/// A frame, and the descriptor that came with its first byte.
fn receive_frame(stream: &mut UnixStream) -> io::Result<(Word, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut len = [0; 4];
    let received = recvmsg(&*stream, &mut [IoSliceMut::new(&mut len)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    stream.read_exact(&mut len[received.bytes..])?;
    let len = u32::from_be_bytes(len) as usize;
    if len > FRAME_MAX {
        return Err(io::Error::other(format!("a frame of {len} bytes")));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok((serde_json::from_slice(&body)?, fd))
}
