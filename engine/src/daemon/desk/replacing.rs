//! An export that gets another disk: a new overlay on top of its chain, or the same image, grown.
use super::rollback::has_job;
use super::{Desk, News, refuse, token};
use crate::control::{Code, Refusal, Reply, SnapshotRequest};
use crate::daemon::exports::Export;
use crate::disk::{Disk, Tools};
use crate::io::{Completion, Io, Token};
use crate::open::same_image;
use crate::pivot::{New, Replace, Step};
use crate::target::{Plan, plan_overlay};
use formats::error::{Error, Result};
use formats::image::Place;
use formats::journal::Journal;
use formats::record::Record;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long requests that are under way may take when the gate has closed.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A disk has whole sectors of so many bytes, as QEMU has it.
const SECTOR: u64 = 512;

/// One on its way.
pub(super) struct Replacing {
    replace: Option<Replace>,
    client: u64,
    change: Change,
    begun: Instant,
}

/// What becomes of the disk.
enum Change {
    /// An overlay comes upon the old one, made as planned.
    Snapshot(Arc<Disk>, Box<Plan>),
    /// It gets so many bytes.
    Resize(u64),
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
        let new = New::Overlay(new, to_record);
        let gate = Arc::clone(&export.gate);
        let replace = Replace::new(gate, record, new, PAUSE_MAX);
        self.replace(number, client, replace, Change::Snapshot(old, Box::new(plan)));
        Ok(())
    }

    /// Begins to make an export's disk larger. True where it has begun, and the client is answered when it is over; false
    /// where the disk has that size.
    pub(super) fn resize(&mut self, client: u64, name: &str, size: u64) -> std::result::Result<bool, Refusal> {
        let number = self.find(name)?;
        self.refuse_changing(number)?;
        let export = &self.exports[&number];
        let disk = export.gate.route().disk;
        let Some(record) = export.record.clone() else {
            return Err(refuse(Code::OperationInvalid, format!("export {name} is read-only, so it is not resized")));
        };
        refuse_size(name, &disk, size)?;
        if size == disk.size() {
            return Ok(false);
        }
        let top = disk.chain().top();
        // Of all others the image says how large it is, or the length of its file.
        let recorded = top.format == "raw" && !same_image(&top.path, &export.origin);
        let to_record = recorded.then(|| record_of(export, &disk)).transpose()?;
        let to_record = to_record.map(|record| Record { size, ..record });
        let replace = Replace::new(Arc::clone(&export.gate), record, New::Grown(size, to_record), PAUSE_MAX);
        self.replace(number, client, replace, Change::Resize(size));
        Ok(true)
    }

    fn replace(&mut self, number: usize, client: u64, replace: Replace, change: Change) {
        // The queue's clock is not at hand here: the time begins when it is stepped.
        let begun = Instant::now();
        self.replacing.insert(number, Replacing { replace: Some(replace), client, change, begun });
        self.waker.wake();
    }

    /// Nothing else of an export changes while a job is under way, or another change.
    pub(super) fn refuse_changing(&self, number: usize) -> std::result::Result<(), Refusal> {
        let name = &self.exports[&number].name;
        let busy = self.replacing.contains_key(&number) || self.removing.contains_key(&number);
        let begins = self.reaching.contains_key(&number);
        if let Some(active) = self.jobs.get(&number) {
            return Err(refuse(Code::BlockCopyActive, has_job(name, active)));
        }
        match () {
            () if self.lowering.contains_key(&number) => {
                let message =
                    format!("export {name} is about to have a copy job, and the layers below are being copied");
                Err(refuse(Code::BlockCopyActive, format!("{message}: cancel it first, or wait for its end")))
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
        let export = &self.exports[&number];
        let took = replacing.begun.elapsed();
        let undone = |what: &str, error: &Error| {
            let message = format!("export {}: the {what} was undone: {}", export.name, error.one_line());
            Err(refuse(Code::OperationFailed, message))
        };
        let answer = match (outcome, replacing.change) {
            (Ok(()), Change::Snapshot(old, _)) => {
                tracing::info!(export = export.name, ?took, "now on {}", export.serving());
                // Nobody writes to it any more.
                if let Err(error) = old.chain().top().close() {
                    tracing::warn!("closing an image that is written no more: {}", error.one_line());
                }
                Ok(Reply::Done {})
            }
            (Ok(()), Change::Resize(size)) => {
                tracing::info!(export = export.name, ?took, "{} bytes now", size);
                self.table.put(export);
                Ok(Reply::Done {})
            }
            (Err(error), Change::Snapshot(_, plan)) => {
                plan.unmake();
                undone("snapshot", &error)
            }
            (Err(error), Change::Resize(_)) => undone("resize", &error),
        };
        self.news.push(News::Answer(replacing.client, answer));
    }
}

/// A disk that cannot have `size` bytes, or not by us.
fn refuse_size(name: &str, disk: &Disk, size: u64) -> std::result::Result<(), Refusal> {
    let now = disk.size();
    let (code, message) = match size {
        _ if disk.is_remote() => {
            let what = "is another server's: have it resized there, and serve it anew";
            (Code::OperationUnsupported, format!("export {name} ({}) {what}", disk.name()))
        }
        size if size % SECTOR != 0 || size > i64::MAX as u64 => (
            Code::InvalidArg,
            format!("export {name}: {size} bytes are no size of a disk: multiples of {SECTOR} below 2^63 are"),
        ),
        size if size < now => {
            let remedy = "shrink the image with `qemu-img resize --shrink` while it is not served";
            (Code::OperationUnsupported, format!("export {name} has {now} bytes and is not cut to {size}: {remedy}"))
        }
        _ => return Ok(()),
    };
    Err(refuse(code, message))
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
