//! `serve`: the daemon, in the foreground.
use crate::args::{Serve, TlsArgs};
use crate::failure::Failure;
use crate::output::{remark, say};
use engine::control::options::{Access, Listener, Reach, ServeOptions, TlsOptions};
use formats::nbd::Tls;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Serves until it is told to end.
pub fn run(args: Serve) -> Result<(), Failure> {
    let named = !args.sockets.is_empty() || !args.addresses.is_empty() || args.handover.is_some();
    if !named && std::env::var_os("LISTEN_FDS").is_none() {
        let message = "nowhere to listen: name --socket or --listen, or start it by a systemd socket; see serve --help";
        return Err(Failure::FailedWith { status: 2, message: message.to_owned() });
    }
    engine::daemon::serve(&options(args), ready).map_err(|error| Failure::new(error.one_line()))
}

fn options(args: Serve) -> ServeOptions {
    let owner = args.socket_owner.unwrap_or_default();
    let access = Access { mode: args.socket_mode, user: owner.user, group: owner.group };
    let unix = args.sockets.into_iter().map(|path| Listener::Unix(path, access));
    ServeOptions {
        exports: args.exports,
        listeners: unix.chain(args.addresses).collect(),
        control: args.control,
        state: args.state,
        reach: Reach { cache: args.cache, certificates: args.servers.client_certificates, ..Reach::default() },
        tls: tls(args.tls),
        handover: args.handover,
    }
}

fn tls(args: TlsArgs) -> Option<TlsOptions> {
    let certificates = args.certificates.filter(|_| args.mode != Tls::Off)?;
    let required = args.mode == Tls::Required;
    Some(TlsOptions { required, certificates, verify_peer: args.verify_peer, allow: args.allow })
}

/// Says that it serves, to whoever looks and to systemd.
fn ready(sentence: &str) {
    // A daemon whose starter has stopped listening serves all the same.
    let _ = say(sentence);
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = tell_systemd(&socket, sentence)
    {
        remark(format!("telling systemd at {}: {error}", socket.display()));
    }
}

fn tell_systemd(socket: &OsStr, sentence: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let message = format!("READY=1\nSTATUS={sentence}");
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(|_| ())
}
