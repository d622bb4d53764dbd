//! Jobs that have ended and wait to be dismissed, with what became of them.
use crate::control::jobs::JobInfo;
use std::collections::VecDeque;

/// How many are kept: of more, those that ended first are forgotten, for nobody may ever dismiss them.
const KEPT_MAX: usize = 64;

/// The first to end is the first.
#[derive(Default)]
pub(super) struct Concluded(VecDeque<JobInfo>);

impl Concluded {
    /// Keeps a job. Returns one that is forgotten for it.
    pub fn keep(&mut self, job: JobInfo) -> Option<JobInfo> {
        let forgotten = if self.0.len() == KEPT_MAX { self.0.pop_front() } else { None };
        self.0.push_back(job);
        forgotten
    }

    /// Forgets the job of this name. `None` where there is none.
    pub fn dismiss(&mut self, id: &str) -> Option<JobInfo> {
        let at = self.0.iter().position(|job| job.id == id)?;
        self.0.remove(at)
    }

    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|job| job.id.as_str())
    }

    pub fn iter(&self) -> impl Iterator<Item = &JobInfo> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::{Concluded, KEPT_MAX};
    use crate::control::Status;
    use crate::control::jobs::{IoStatus, JobInfo, JobStatus};

    fn job(id: String) -> JobInfo {
        JobInfo {
            id,
            stands: JobStatus::Concluded,
            completing: false,
            complete: true,
            io_status: IoStatus::Ok,
            auto_finalize: true,
            auto_dismiss: false,
            at: Box::new(Status::default()),
        }
    }

    #[test]
    fn jobs_are_kept_until_they_are_dismissed_or_too_many() {
        let mut concluded = Concluded::default();
        for number in 0..KEPT_MAX {
            assert!(concluded.keep(job(format!("job{number}"))).is_none());
        }
        assert!(concluded.dismiss("job7").is_some() && concluded.dismiss("job7").is_none());
        assert!(concluded.keep(job("new".to_owned())).is_none());
        assert_eq!(concluded.keep(job("one more".to_owned())).map(|job| job.id), Some("job0".to_owned()));
        assert_eq!(concluded.iter().count(), KEPT_MAX);
    }
}
