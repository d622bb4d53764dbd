//! The daemon: the only place that starts threads or waits.
//!
//! ```text
//! control thread   sockets, QMP clients: `control_thread`; what they ask for, jobs, pivots: `desk`
//! nbd threads      one a processor and disk at most, and one for each client that has not chosen a disk yet: `Session`s
//! copy threads     one or two a job: a `Copier`
//! lower threads    one a chain that is copied as a whole, before its job begins: `lower`
//! pool             one a processor: what inflates and deflates for them
//! ```
//!
//! The threads meet at four places: the gate (sessions, pivot), the bitmap (sessions, copiers), the
//! lock of an image's metadata (sessions, copiers), and the bells that wake who waits.
mod clients;
mod compare;
mod connections;
mod control_thread;
mod convert;
mod desk;
mod exports;
mod handover;
mod jobs;
mod listen;
mod lower;
mod manifest;
mod map;
mod pace;
mod pool;
mod resume;
mod retune;
mod threads;
mod wait;

pub use compare::{Comparison, Incomparable, compare};
pub use convert::{ConvertOptions, Converted, Copied, convert};
pub use manifest::hashes;
pub use map::{Run, Runs};

use crate::control::options::{Access, ExportOptions, ServeOptions};
use crate::io::File;
use crate::open::{export_named, lasting_name};
use crate::state::{StateFolder, is_volatile};
use crate::tls::Credentials;
use control_thread::ControlThread;
use exports::{Export, Table, refuse_shared, refuse_twice};
use formats::error::{Context, Error, Result};
use handover::Estate;
use listen::Listening;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Serves until it is told to end, by a signal or by `quit`. `ready` is called once, when the
/// sockets are there, with a sentence that says so.
pub fn serve(options: &ServeOptions, ready: impl FnOnce(&str)) -> Result<()> {
    let mut names = HashSet::new();
    if let Some(twice) = options.exports.iter().find(|export| !names.insert(&export.name)) {
        return Err(Error::invalid(format!("two exports are named {}: give each a name of its own", twice.name)));
    }
    let inherited = if options.handover.is_some() { Vec::new() } else { Listening::inherited()? };
    if options.listeners.is_empty() && inherited.is_empty() && options.handover.is_none() {
        return Err(Error::invalid(
            "nowhere to listen: no address was named, and none of LISTEN_FDS is for this process",
        ));
    }
    allow_descriptors();
    outlive_size_limit()?;
    let credentials = options.tls.as_ref().map(Credentials::open).transpose()?.map(Arc::new);
    let Some(control) = &options.handover else {
        let estate = Estate { listeners: inherited, ..Estate::default() };
        let ready = |sentence: &str| {
            ready(sentence);
            Ok(())
        };
        return live(options, credentials, estate, ready);
    };
    let mut taken = handover::ask(control, options)?;
    let estate = std::mem::take(&mut taken.estate);
    live(options, credentials, estate, |sentence| taken.confirm().map(|()| ready(sentence)))
}

/// Serves, as often as a successor does not take over what was left to it.
fn live(
    options: &ServeOptions,
    credentials: Option<Arc<Credentials>>,
    mut estate: Estate,
    ready: impl FnOnce(&str) -> Result<()>,
) -> Result<()> {
    let mut ready = Some(ready);
    loop {
        let credentials = credentials.clone();
        let told = |sentence: &str| ready.take().map_or(Ok(()), |ready| ready(sentence));
        let Some(successor) = serve_once(options, credentials, &mut estate, told)? else { return Ok(()) };
        match estate.give(&successor) {
            Ok(()) => {
                tracing::info!("another process has taken over");
                estate.own_paths(false);
                return Ok(());
            }
            Err(error) => tracing::error!(%error, "the successor did not take over: this process goes on"),
        }
    }
}

/// Serves until it is told to end, or to leave everything to a successor at the other end of a socket.
fn serve_once(
    options: &ServeOptions,
    credentials: Option<Arc<Credentials>>,
    estate: &mut Estate,
    ready: impl FnOnce(&str) -> Result<()>,
) -> Result<Option<File>> {
    let state = StateFolder::open(&state_folder(options))?;
    if is_volatile(state.path()) {
        tracing::warn!(
            "the state folder {} is gone after a reboot, and with it the word which image is the truth: name \
             another with --state",
            state.path().display()
        );
    }
    wait::until_free(&state.group_path())?;
    for record in state.settle_group()? {
        tracing::info!(export = record.export, "a pivot of several was under way, and it was done: {}", record.truth);
    }
    let wanted = with_kept(&options.exports, &state)?;
    wanted.iter().try_for_each(|export| refuse_twice(export, &wanted))?;
    // Before any of them is opened, for an image that two exports name would be waited for in vain.
    wanted.iter().try_for_each(|export| Export::wait_until_free(export, &state))?;
    let open = |export| Export::open(export, &options.reach, &state);
    let exports = wanted.iter().map(open).collect::<Result<Vec<_>>>()?;
    refuse_shared(exports.iter())?;
    let table = Arc::<Table>::default();
    let mut thread =
        ControlThread::new(exports, table, options.reach.clone(), credentials, state, handover::words(options))
            .context(|| "starting")?;
    thread.desk().resume_jobs();
    // Only now: who finds the sockets is served.
    let control = match estate.control.take() {
        Some(control) => control,
        None => {
            let named = options.listeners.iter().map(Listening::at).collect::<Result<Vec<_>>>()?;
            estate.listeners.extend(named);
            Listening::unix(&options.control, Access::default())?
        }
    };
    let places: Vec<&str> = estate.listeners.iter().map(|listening| listening.name.as_str()).collect();
    ready(&format!("serving {} at {}", thread.desk().names(), places.join(", ")))?;
    thread.take_up(std::mem::take(&mut estate.clients), std::mem::take(&mut estate.new));
    let served = thread.run(&estate.listeners, &control).context(|| "the control thread");
    estate.control = Some(control);
    estate.own_paths(true);
    let successor = thread.successor();
    if successor.is_none() || served.is_err() {
        // Nobody is to find what is not served any more.
        *estate = Estate::default();
    }
    let (closed, clients, new) = thread.close();
    (estate.clients, estate.new) = (clients, new);
    closed?;
    served?;
    Ok(successor)
}

/// The exports of the command line, and those that were added while a daemon of this state folder ran.
fn with_kept(named: &[ExportOptions], state: &StateFolder) -> Result<Vec<ExportOptions>> {
    let kept = state.kept_exports()?.into_iter();
    let added = kept.filter(|kept| named.iter().all(|export| export.name != kept.name));
    Ok(named.iter().cloned().chain(added).collect())
}

/// As many descriptors as the system lets this process have: each connection takes a few, and what a shell
/// gives its programs is for those that use `select(2)`.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit { current: limit.maximum, ..limit };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, all)
    {
        tracing::warn!(%error, "the limit of open files stays at {}", limit.current.unwrap_or(0));
    }
}

/// A write past the limit of a file's size is an error of that file; the signal that comes with it would end the process.
fn outlive_size_limit() -> Result<()> {
    let seen = Arc::new(AtomicBool::new(false));
    let taken = signal_hook::flag::register(Signal::XFSZ.as_raw(), seen);
    taken.map(drop).context(|| "taking the signal of a file's size limit")
}

/// The named one; or one beside the control socket; or, where a reboot would empty that, one beside
/// the first image, which lasts as long as the image does. The same command line finds it again.
fn state_folder(options: &ServeOptions) -> PathBuf {
    if let Some(named) = &options.state {
        return named.clone();
    }
    let mut name = options.control.file_name().unwrap_or_default().to_owned();
    name.push(".state");
    let folder_of = |path: &Path| lasting_name(path).ok()?.parent().map(Path::to_owned);
    let control = std::path::absolute(&options.control).unwrap_or_else(|_| options.control.clone());
    let beside = control.parent().unwrap_or(&control).to_owned();
    let first = options.exports.first().filter(|export| export_named(&export.file).is_none());
    let image = first.and_then(|export| folder_of(&export.file));
    match image {
        Some(image) if is_volatile(&beside) && !is_volatile(&image) => image.join(name),
        _ => beside.join(name),
    }
}
