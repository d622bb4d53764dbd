//! Targets on other servers: each is reached on a thread of its own, for that may take long, and other clients and
//! exports must not wait for it.
use super::{Answer, Desk, News, refuse};
use crate::control::{Code, MirrorRequest, Refusal, Reply};
use crate::daemon::threads::Errand;
use crate::io::remote::Remote;
use formats::error::{Context, Error, Result};
use formats::nbd::Address;
use std::sync::Arc;

/// A job that begins when its target is reached.
pub(super) struct Reaching {
    client: u64,
    request: MirrorRequest,
    errand: Errand<Result<Arc<Remote>>>,
}

impl Desk {
    /// Begins it; the client is answered when the job has started.
    pub(super) fn reach(
        &mut self,
        client: u64,
        number: usize,
        request: &MirrorRequest,
        address: Address,
    ) -> std::result::Result<(), Refusal> {
        self.refuse_in_use(number, &request.target, request.format)?;
        let (certificates, shallow) = (self.reach.certificates.clone(), request.shallow);
        let reach = move || {
            let remote = Remote::open(&address, true, certificates.as_deref())?;
            // Its answer is kept.
            if !shallow {
                remote.is_zero().context(|| address.to_string())?;
            }
            Ok(remote)
        };
        let errand = Errand::begin("reach", self.waker.clone(), reach);
        let errand = errand.context(|| "starting the thread that reaches the target").map_err(Refusal::from)?;
        self.reaching.insert(number, Reaching { client, request: request.clone(), errand });
        Ok(())
    }

    /// Starts the jobs whose targets have been reached.
    pub(super) fn step_reaching(&mut self) {
        let is_over = |(number, reaching): (&usize, &Reaching)| reaching.errand.is_over().then_some(*number);
        for number in self.reaching.iter().filter_map(is_over).collect::<Vec<_>>() {
            let Some(Reaching { client, request, errand }) = self.reaching.remove(&number) else { continue };
            let answer = self.reached(number, &request, errand.end());
            self.news.push(News::Answer(client, answer));
            self.tell(number);
        }
    }

    fn reached(&mut self, number: usize, request: &MirrorRequest, found: Option<Result<Arc<Remote>>>) -> Answer {
        let remote = found.unwrap_or_else(|| Err(Error::invalid("the thread that reached it panicked")));
        let remote = remote.map_err(|error| refuse(Code::OperationFailed, error.one_line()))?;
        self.refuse_mirror(number, request)?;
        self.start_job(number, request, Some(remote)).map(Reply::Started)
    }
}
