//! Asks the daemon on a thread of its own: one that is slow to answer keeps no key waiting.
use super::look;
use crate::client::Client;
use crate::failure::Failure;
use engine::control::{MirrorMap, Status};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How often the daemon is asked; when something happens, at once.
const EVERY: Duration = Duration::from_millis(250);

/// How things stand.
#[derive(Debug, Default)]
pub struct Look {
    /// Each export.
    pub statuses: Vec<Status>,
    /// The disk of the one that is looked at closely, where it has a job.
    pub map: Option<MirrorMap>,
}

/// What of which export is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The export that is looked at closely.
    pub export: Option<String>,
    /// Into how many parts its map divides the disk; 0 for no map.
    pub cells: u64,
}

/// Who asks.
pub struct Poll {
    looks: Receiver<Result<Look, Failure>>,
    wanted: Arc<Mutex<Wanted>>,
}

impl Poll {
    /// Asks from now on for the export that was named, or for all of them. The thread ends with the program.
    pub fn start(client: Client, export: Option<String>) -> Result<Self, Failure> {
        let (looked, looks) = channel();
        let wanted = Arc::<Mutex<Wanted>>::default();
        let also = Arc::clone(&wanted);
        let ask = move || ask(client, export.as_deref(), &also, &looked);
        let started = thread::Builder::new().name("poll".into()).spawn(ask);
        started.map_err(|error| Failure::new(format!("starting a thread: {error}")))?;
        Ok(Self { looks, wanted })
    }

    /// Says what is wanted from now on.
    pub fn want(&self, wanted: Wanted) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
    }

    /// What was found since the last time.
    pub fn looks(&self) -> impl Iterator<Item = Result<Look, Failure>> {
        self.looks.try_iter()
    }
}

fn ask(mut client: Client, export: Option<&str>, wanted: &Mutex<Wanted>, looked: &Sender<Result<Look, Failure>>) {
    loop {
        let now = wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let found = ask_once(&mut client, export, now);
        let has_failed = found.is_err();
        if looked.send(found).is_err() || has_failed {
            return;
        }
        if let Err(failure) = client.wait_for_event(EVERY) {
            let _ = looked.send(Err(failure));
            return;
        }
    }
}

fn ask_once(client: &mut Client, export: Option<&str>, wanted: Wanted) -> Result<Look, Failure> {
    let statuses = look(client, export)?;
    let has_job = |name: &String| statuses.iter().any(|status| status.export == *name && status.is_active());
    let map = match wanted.export.filter(|name| wanted.cells > 0 && has_job(name)) {
        None => None,
        Some(export) => match client.map(&export, wanted.cells) {
            Ok(map) => Some(map),
            // The job has ended meanwhile, or the daemon is one that knows no maps.
            Err(Failure::Refused { .. }) => None,
            Err(failure) => return Err(failure),
        },
    };
    Ok(Look { statuses, map })
}
