//! The daemon: the only place that starts threads or waits.
//!
//! ```text
//! control thread   sockets, QMP clients, jobs, pivots: `control_thread`
//! nbd threads      one a connection: a `Session`
//! copy threads     one or two a job: a `Copier`
//! ```
//!
//! The threads meet at four places: the gate (sessions, pivot), the bitmap (sessions, copiers), the
//! lock of an image's metadata (sessions, copiers), and the bells that wake who waits.
mod clients;
mod compare;
mod control_thread;
mod convert;
mod exports;
mod jobs;
mod listen;
mod threads;

pub use compare::{Comparison, compare};
pub use convert::{ConvertOptions, Copied, convert};

use crate::control::options::ServeOptions;
use crate::state::StateFolder;
use control_thread::ControlThread;
use exports::{Export, Table};
use formats::error::{Context, Error, Result};
use listen::Listening;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

/// Serves until it is told to end, by a signal or by `quit`. `ready` is called once, when the
/// sockets are there, with a sentence that says so.
pub fn serve(options: &ServeOptions, ready: impl FnOnce(&str)) -> Result<()> {
    let mut names = HashSet::new();
    if let Some(twice) = options.exports.iter().find(|export| !names.insert(&export.name)) {
        return Err(Error::invalid(format!("two exports are named {}: give each a name of its own", twice.name)));
    }
    let state = StateFolder::open(&state_folder(options))?;
    if state.is_volatile() {
        tracing::warn!(
            "the state folder {} is gone after a reboot, and with it the word which image is the truth: name \
             another with --state",
            state.path().display()
        );
    }
    let open = |export| Export::open(export, options.cache, &state);
    let exports = options.exports.iter().map(open).collect::<Result<Vec<_>>>()?;
    let table = Arc::new(Table::new(&exports));
    let mut thread = ControlThread::new(exports, table, options.cache, state).context(|| "starting")?;
    // Only now: who finds the sockets is served.
    let listeners = options.listeners.iter().map(Listening::at).collect::<Result<Vec<_>>>()?;
    let control = Listening::unix(&options.control)?;
    let places: Vec<&str> = listeners.iter().map(|listening| listening.name.as_str()).collect();
    ready(&format!("serving {} at {}", thread.names(), places.join(", ")));
    let served = thread.run(&listeners, &control).context(|| "the control thread");
    drop((listeners, control));
    thread.close()?;
    served
}

/// The named one, or one beside the control socket: the same command line finds it again.
fn state_folder(options: &ServeOptions) -> PathBuf {
    options.state.clone().unwrap_or_else(|| {
        let mut path = options.control.clone().into_os_string();
        path.push(".state");
        path.into()
    })
}
