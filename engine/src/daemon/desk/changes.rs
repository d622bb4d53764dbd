//! Exports that come and go while the daemon runs.
//!
//! An export that was added is kept in the state folder, so that a restart with the same command line serves it
//! too: its guest comes again after a kill. One that is removed is closed when the last of its connections has ended, and
//! nobody can come in meanwhile.
use super::{Answer, Desk, News, refuse, token};
use crate::control::options::ExportOptions;
use crate::control::{Code, Refusal, Reply};
use crate::daemon::exports::{Export, refuse_shared};
use crate::disk::{Disk, Status, Task, Tools};
use crate::export::gate::Gate;
use crate::io::{Completion, Io, Token};
use crate::open::files_of;
use formats::error::Result;
use std::sync::Arc;

/// An export that is on its way out.
pub(super) struct Removing {
    client: u64,
    gate: Arc<Gate>,
    /// What was written is made durable, when nobody is connected any more.
    flush: Option<Task>,
}

impl Removing {
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        if let Some(flush) = &mut self.flush {
            flush.complete(tools, base, done);
        }
    }

    /// What became of the flush, when it is over.
    fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Option<Result<()>> {
        if self.flush.is_none() && self.gate.roll.is_empty(tools.waker) {
            let disk = self.gate.route().disk;
            if disk.read_only() {
                return Some(Ok(()));
            }
            self.flush = Some(Task::flush(disk));
        }
        let status = self.flush.as_mut()?.step(tools, base);
        (status == Status::Done).then(|| self.flush.take().map_or(Ok(()), |flush| flush.end().0))
    }
}

impl Desk {
    pub(super) fn add_export(&mut self, options: &ExportOptions) -> Answer {
        if options.name.is_empty() {
            return Err(refuse(Code::InvalidArg, "an export's name is not empty".to_owned()));
        }
        if self.exports.values().any(|export| export.name == options.name) {
            let message = format!("there is an export {} already: name another, or remove it first", options.name);
            return Err(refuse(Code::InvalidArg, message));
        }
        let number = self.exports.keys().next_back().map_or(0, |last| last + 1);
        if !options.readonly {
            for file in files_of(&options.file, options.format) {
                self.refuse_in_use(number, &file.display().to_string(), None)?;
            }
        }
        let export = Export::open(options, &self.reach, &self.state)?;
        refuse_shared(self.exports.values().chain([&export]))?;
        let mut kept = self.state.kept_exports()?;
        kept.retain(|other| other.name != options.name);
        kept.push(ExportOptions { file: export.origin.clone(), ..options.clone() });
        self.state.keep_exports(&kept)?;
        tracing::info!(export = export.name, "added, {}", export.serving());
        self.table.put(&export);
        self.exports.insert(number, export);
        Ok(Reply::Done {})
    }

    /// Begins it; the client is answered when the export is closed.
    pub(super) fn remove_export(&mut self, client: u64, name: &str, force: bool) -> std::result::Result<(), Refusal> {
        let number = self.find(name)?;
        self.refuse_changing(number)?;
        let gate = Arc::clone(&self.exports[&number].gate);
        let connected = gate.roll.count();
        if connected > 0 && !force {
            let message = format!("export {name} has {connected} connections: end them first, or use --force");
            return Err(refuse(Code::OperationInvalid, message));
        }
        let mut kept = self.state.kept_exports()?;
        let before = kept.len();
        kept.retain(|other| other.name != name);
        if kept.len() < before {
            self.state.keep_exports(&kept)?;
        }
        self.table.take_away(name);
        gate.roll.expel();
        self.removing.insert(number, Removing { client, gate, flush: None });
        self.waker.wake();
        Ok(())
    }

    pub(super) fn step_removing<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) {
        for number in self.removing.keys().copied().collect::<Vec<_>>() {
            let removing = self.removing.get_mut(&number);
            if let Some(outcome) = removing.and_then(|removing| removing.step(tools, token(base, number))) {
                self.removed(number, outcome);
            }
        }
    }

    fn removed(&mut self, number: usize, outcome: Result<()>) {
        let (Some(removing), Some(export)) = (self.removing.remove(&number), self.exports.remove(&number)) else {
            return;
        };
        let disk: Arc<Disk> = export.gate.route().disk;
        let closed = outcome.and_then(|()| if disk.read_only() { Ok(()) } else { disk.chain().top().close() });
        tracing::info!(export = export.name, "removed");
        let answer = closed.map(|()| Reply::Done {}).map_err(|error| {
            let message =
                format!("export {} is removed, but not all of it is durable: {}", export.name, error.one_line());
            refuse(Code::OperationFailed, message)
        });
        self.news.push(News::Answer(removing.client, answer));
    }
}
