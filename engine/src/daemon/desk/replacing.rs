//! An export that gets another disk: a new overlay on top of its chain.
use super::{Desk, News, refuse, token};
use crate::control::{Code, Refusal, Reply, SnapshotRequest};
use crate::daemon::exports::Export;
use crate::disk::{Disk, Tools};
use crate::io::{Completion, Io, Token};
use crate::pivot::{Replace, Step};
use crate::target::{Plan, plan_overlay};
use formats::error::{Error, Result};
use formats::image::Place;
use formats::journal::Journal;
use formats::record::Record;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long requests that are under way may take when the gate has closed.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// One on its way.
pub(super) struct Replacing {
    replace: Option<Replace>,
    client: u64,
    old: Arc<Disk>,
    /// What was made for it.
    plan: Plan,
    begun: Instant,
}

impl Replacing {
    pub fn holds_gate(&self) -> bool {
        self.replace.as_ref().is_some_and(Replace::holds_gate)
    }
}

impl Desk {
    /// Begins a snapshot; the client is answered when it is over.
    pub(super) fn snapshot(&mut self, client: u64, request: &SnapshotRequest) -> std::result::Result<(), Refusal> {
        let number = self.find(&request.export)?;
        self.refuse_changing(number)?;
        self.refuse_in_use(number, &request.file, request.format)?;
        let export = &self.exports[&number];
        let Some(record) = export.record.clone() else {
            let message = format!("export {} is read-only: a snapshot of it would never differ from it", export.name);
            return Err(refuse(Code::OperationInvalid, message));
        };
        let old = export.gate.route().disk;
        let plan = plan_overlay(request, &old)?;
        let target = plan.open(&old, &self.reach, &|path| Ok(self.state.journal(path)?.start() as Arc<dyn Journal>))?;
        let new = Arc::new(target.disk);
        let named = refuse_contents(&new, &plan).and_then(|()| record_of(export, &new));
        let to_record = named.inspect_err(|_| plan.unmake())?;
        let make = { Box::new(move || Ok((new, to_record))) };
        let gate = Arc::clone(&export.gate);
        // The queue's clock is not at hand here: the time begins when it is stepped.
        let replace = Replace::new(gate, record, make, PAUSE_MAX);
        let begun = Instant::now();
        self.replacing.insert(number, Replacing { replace: Some(replace), client, old, plan, begun });
        self.waker.wake();
        Ok(())
    }

    /// Nothing else of an export changes while a job is under way, or another change.
    pub(super) fn refuse_changing(&self, number: usize) -> std::result::Result<(), Refusal> {
        let name = &self.exports[&number].name;
        let busy = self.replacing.contains_key(&number) || self.removing.contains_key(&number);
        let begins = self.reaching.contains_key(&number);
        match () {
            () if self.jobs.contains_key(&number) => {
                let message = format!("export {name} has a copy job: cancel it first, or wait for its end");
                Err(refuse(Code::BlockCopyActive, message))
            }
            () if begins => {
                let message = format!("export {name} is about to have a copy job, whose target is being reached");
                Err(refuse(Code::BlockCopyActive, format!("{message}: wait for that")))
            }
            () if busy => Err(refuse(Code::OperationInvalid, format!("export {name} is being changed: wait for that"))),
            () => Ok(()),
        }
    }

    pub(super) fn step_replacing<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) {
        for number in self.replacing.keys().copied().collect::<Vec<_>>() {
            let replace = self.replacing.get_mut(&number).and_then(|replacing| replacing.replace.as_mut());
            if let Some(Step::Done(outcome)) = replace.map(|replace| replace.step(tools, token(base, number))) {
                self.replaced(number, outcome);
            }
        }
    }

    pub(super) fn complete_replacing<I: Io>(
        &mut self,
        number: usize,
        tools: &mut Tools<I>,
        base: Token,
        done: Completion,
    ) {
        let replace = self.replacing.get_mut(&number).and_then(|replacing| replacing.replace.as_mut());
        if let Some(Step::Done(outcome)) = replace.map(|replace| replace.complete(tools, base, done)) {
            self.replaced(number, outcome);
        }
    }

    fn replaced(&mut self, number: usize, outcome: Result<()>) {
        let Some(mut replacing) = self.replacing.remove(&number) else { return };
        let export = self.export_mut(number);
        export.record = replacing.replace.take().map(Replace::into_record);
        let answer = match outcome {
            Ok(()) => {
                tracing::info!(export = export.name, took = ?replacing.begun.elapsed(), "now on {}", export.serving());
                // Nobody writes to it any more.
                if let Err(error) = replacing.old.chain().top().close() {
                    tracing::warn!("closing an image that is written no more: {}", error.one_line());
                }
                Ok(Reply::Done {})
            }
            Err(error) => {
                replacing.plan.unmake();
                let message = format!("export {}: the snapshot was undone: {}", export.name, error.one_line());
                Err(refuse(Code::OperationFailed, message))
            }
        };
        self.news.push(News::Answer(replacing.client, answer));
    }
}

/// What an overlay has already would hide what is below it.
fn refuse_contents(overlay: &Disk, plan: &Plan) -> Result<()> {
    let mut at = 0;
    while at < overlay.size() {
        let extent = overlay.chain().top().image.map(at, overlay.size() - at)?;
        if extent.place != Place::Absent {
            return Err(Error::invalid(format!(
                "{}: the overlay has contents at {at} already, which would hide the disk's: make an empty one",
                plan.path.display()
            )));
        }
        at = extent.guest.end;
    }
    Ok(())
}

/// `disk` as the truth of `export`.
fn record_of(export: &Export, disk: &Disk) -> Result<Record> {
    let text = |path: &std::path::Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| Error::unsupported(format!("{}: a record's names have to be UTF-8", path.display())))
    };
    let top = disk.chain().top();
    Ok(Record {
        generation: 0,
        export: export.name.clone(),
        origin: text(&export.origin)?,
        truth: text(&top.path)?,
        format: top.format.to_owned(),
        size: disk.size(),
    })
}
