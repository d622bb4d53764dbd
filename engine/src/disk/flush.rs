//! Making durable what was done to a disk: payload and metadata, in the order its image asks for.
use super::Disk;
use super::step::{Status, Tools};
use crate::fault::{Fault, planted};
use crate::io::{Io, Op, Token};
use formats::error::{Error, Result};
use formats::image::{Progress, Settle};
use std::io;

/// One settle of a disk's top image.
#[derive(Default)]
pub(super) struct Flush {
    progress: Progress,
    in_kernel: bool,
    /// What is being flushed is an external data file.
    of_payload: bool,
    outcome: Option<Result<()>>,
}

impl Flush {
    pub fn step<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token) -> Status {
        if self.in_kernel {
            return Status::Busy;
        }
        if self.outcome.is_some() {
            return Status::Done;
        }
        let top = disk.chain().top();
        let next = disk.refuse_poisoned().and_then(|()| {
            let mut settle = || top.image.settle(&mut self.progress);
            let next = match settle() {
                Ok(Settle::FlushPayload) if planted(Fault::MapBeforePayload) => settle(),
                next => next,
            };
            next.map_err(|error| error.at(top.path.display()))
        });
        match next {
            Ok(flush @ (Settle::Flush | Settle::FlushPayload)) => {
                (self.in_kernel, self.of_payload) = (true, flush == Settle::FlushPayload);
                let file = if self.of_payload { top.file.file() } else { top.tables() };
                tools.io.submit(base, Op::Flush { file: file.clone() });
                Status::Busy
            }
            Ok(Settle::Busy) => Status::Blocked,
            Ok(Settle::Done) => {
                disk.settled();
                self.finish(Ok(()))
            }
            Err(error) => {
                // Dropped, so that somebody else can settle.
                self.progress = Progress::default();
                disk.bell.ring();
                self.finish(Err(error))
            }
        }
    }

    fn finish(&mut self, outcome: Result<()>) -> Status {
        self.outcome = Some(outcome);
        Status::Done
    }

    pub fn complete(&mut self, disk: &Disk, result: io::Result<u32>) {
        self.in_kernel = false;
        if let Err(error) = result {
            // The kernel reports a failed write-back once, then forgets: another flush that succeeds
            // would say nothing of those bytes. A server that was not reached has forgotten nothing yet.
            if !(disk.is_remote() && error.kind() == io::ErrorKind::ConnectionAborted) {
                disk.poison();
            }
            self.progress = Progress::default();
            disk.bell.ring();
            let top = disk.chain().top();
            let path = if self.of_payload { top.data_path() } else { &top.path };
            self.outcome = Some(Err(Error::io(format!("flush of {}", path.display()), error)));
        }
    }

    /// True where the kernel has something of it.
    pub fn in_kernel(&self) -> bool {
        self.in_kernel
    }

    pub fn end(self) -> Result<()> {
        self.outcome.unwrap_or(Ok(()))
    }
}

/// A settle that the image asked for before it gives more room, if it has.
#[derive(Default)]
pub(super) struct Settling(Option<Flush>);

impl Settling {
    /// The image has asked.
    pub fn begin(&mut self) {
        self.0 = Some(Flush::default());
    }

    /// Goes on with it. True where the image can be asked for room again.
    pub fn step<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token, blocked: &mut bool) -> Result<bool> {
        let Some(flush) = &mut self.0 else { return Ok(true) };
        match flush.step(disk, tools, base) {
            Status::Busy => Ok(false),
            Status::Blocked => {
                *blocked = true;
                Ok(false)
            }
            Status::Done => self.0.take().map_or(Ok(()), Flush::end).map(|()| true),
        }
    }

    pub fn complete(&mut self, disk: &Disk, result: io::Result<u32>) {
        self.0.as_mut().expect("a settle is under way").complete(disk, result);
    }

    /// True where it is not over.
    pub fn is_under_way(&self) -> bool {
        self.0.is_some()
    }

    /// True where the kernel has something of it.
    pub fn in_kernel(&self) -> bool {
        self.0.as_ref().is_some_and(Flush::in_kernel)
    }
}
