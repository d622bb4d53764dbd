//! Servers of our own, in plain and inside TLS by rustls' own stream, and how they treat their clients.
use crate::tls::tests::authority::Authority;
use formats::nbd::wire::Header;
use formats::nbd::{BlockSizes, Errno, ExportInfo, Handshake, Outcome, ReplyTo, Style, Tls};
use formats::range::ByteRange;
use rustls::crypto::ring::default_provider;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use tempfile::TempDir;

pub const SIZE: u64 = 64 << 20;

/// How the server treats its clients, one after the other; the last one is for all that follow.
#[derive(Clone, Copy)]
pub enum Treats {
    Well,
    /// Answers so many requests and hangs up.
    HangsUpAfter(u64),
    /// Agrees and never answers.
    Silent,
    /// Has another disk of that name by now.
    Shrunk,
    /// Has no TLS.
    InPlain,
    /// Has somebody on the way who adds bytes to the ACK of STARTTLS.
    MeddledWith,
    /// Is somebody else, whose authority has the same name.
    Stranger,
}

/// Keys are dear, so all servers inside TLS have one authority.
pub struct Keys {
    pub ours: Arc<ServerConfig>,
    strangers: Arc<ServerConfig>,
    /// A client's folder, with whom it trusts.
    pub folder: TempDir,
}

pub fn keys() -> &'static Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| {
        let (authority, stranger) = (Authority::new("the authority"), Authority::new("the authority"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("ca-cert.pem"), authority.pem()).expect("a file");
        Keys { ours: server_config(&authority), strangers: server_config(&stranger), folder }
    })
}

/// A server for `localhost`.
fn server_config(authority: &Authority) -> Arc<ServerConfig> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    authority.server_folder(folder.path());
    let certificate = CertificateDer::from_pem_file(folder.path().join("server-cert.pem")).expect("PEM");
    let key = PrivateKeyDer::from_pem_file(folder.path().join("server-key.pem")).expect("PEM");
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions().expect("TLS 1.3").with_no_client_auth();
    Arc::new(config.with_single_cert(vec![certificate], key).expect("they fit"))
}

/// A client's connection, in plain or inside TLS.
trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A disk that is written to; none where the server's is as `byte` says.
pub type Written = Option<Arc<Mutex<Vec<u8>>>>;

pub fn byte(at: u64) -> u8 {
    (at / 4096 * 7 + at) as u8 | 1
}

/// True where the server says that there is nothing but zeroes.
pub fn is_hole(at: u64) -> bool {
    at >> 20 & 3 == 2
}

pub fn export(size: u64, read_only: bool, multi_conn: bool) -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: String::new(),
        size,
        read_only,
        multi_conn,
        fast_zero: false,
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 256 << 10 },
        bitmaps: Vec::new(),
    }
}

/// Speaks with one client until it goes.
pub fn speak(socket: UnixStream, treats: Treats, multi_conn: bool, tls: bool, disk: &Written) -> io::Result<()> {
    let size = disk.as_ref().map_or(SIZE, |disk| disk.lock().expect("a disk").len() as u64);
    let size = if matches!(treats, Treats::Shrunk) { size / 2 } else { size };
    let export = export(size, disk.is_none(), multi_conn);
    let mut out = Vec::new();
    let offers_tls = tls && !matches!(treats, Treats::InPlain);
    let mut handshake = Handshake::new(if offers_tls { Tls::Required } else { Tls::Off }, &mut out);
    let mut client: Box<dyn Stream> = Box::new(socket.try_clone()?);
    loop {
        client.write_all(&std::mem::take(&mut out))?;
        let mut bytes = [0; 4096];
        let count = client.read(&mut bytes)?;
        let mut input = &bytes[..count];
        let mut outcome = Outcome::More;
        while !input.is_empty() && outcome == Outcome::More {
            outcome = handshake.step(&mut input, std::slice::from_ref(&export), &mut out);
        }
        match outcome {
            Outcome::Transmission(_) => break,
            Outcome::StartTls => {
                if let Treats::MeddledWith = treats {
                    out.extend_from_slice(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0");
                }
                client.write_all(&std::mem::take(&mut out))?;
                let config = if let Treats::Stranger = treats { &keys().strangers } else { &keys().ours };
                let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                client = Box::new(StreamOwned::new(connection, socket.try_clone()?));
            }
            Outcome::More if count > 0 => {}
            _ => return Ok(()),
        }
    }
    client.write_all(&out)?;
    for number in 0.. {
        let mut header = [0; 28];
        client.read_exact(&mut header)?;
        let Header { flags, command, cookie, offset, len } =
            Header::parse(Style::Structured, &header).expect("a request");
        match treats {
            Treats::Silent => continue,
            Treats::HangsUpAfter(count) if number == count => return Ok(()),
            _ if command != 0 && disk.is_none() => return Ok(()),
            _ => {}
        }
        if let Some(disk) = disk {
            carry_out(&mut client, disk, flags, command, ByteRange { start: offset, end: offset + len })?;
            client.write_all(&ReplyTo { style: Style::Simple, cookie, offset }.done())?;
            continue;
        }
        assert!((offset | len) % 512 == 0 && len <= 256 << 10 && offset + len <= size, "{offset}, {len}");
        client.write_all(&answer(cookie, offset, len))?;
    }
    Ok(())
}

/// What a writable disk does.
pub fn carry_out(
    client: &mut impl Read,
    disk: &Mutex<Vec<u8>>,
    flags: u16,
    command: u16,
    range: ByteRange,
) -> io::Result<()> {
    let aligned = (range.start | range.end).is_multiple_of(512);
    assert!(aligned && (command == 6 || range.len() <= 256 << 10), "{command}: {range}");
    let mut bytes = vec![0; range.len() as usize];
    if command == 1 {
        client.read_exact(&mut bytes)?;
    }
    assert!(matches!(command, 1 | 3 | 6) && flags & !2 == 0 && (flags == 0 || command == 6), "{command}, {flags:#x}");
    disk.lock().expect("a disk")[range.start as usize..range.end as usize].copy_from_slice(&bytes);
    Ok(())
}

/// The last byte's chunk first, holes as holes, and nothing at all of the disk's last block.
fn answer(cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let to = ReplyTo { style: Style::Structured, cookie, offset };
    if offset + len == SIZE {
        return to.error(Errno::Io, "bad sector");
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut at = offset;
    while at < offset + len {
        let end = (at + 1).next_multiple_of(64 << 10).min(offset + len);
        runs.push((at, end));
        at = end;
    }
    let mut out = Vec::new();
    for (number, (start, end)) in runs.iter().copied().enumerate().rev() {
        let (len, done) = ((end - start) as u32, number == 0);
        match is_hole(start) {
            true => out.extend_from_slice(&to.hole(start, len, done)),
            false => {
                out.extend_from_slice(&to.data(start, len, done));
                out.extend((start..end).map(byte));
            }
        }
    }
    out
}
