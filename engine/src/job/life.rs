//! A job's life as QEMU tells it: each of its statuses in turn, also where ours went by faster than it was looked at.
use super::{Job, Phase, Stage};
use crate::control::jobs::JobStatus;

impl Job {
    /// Where it stands, by QEMU's names.
    pub fn stands(&self) -> JobStatus {
        match (self.phase, &self.stage) {
            (phase, _) if phase.is_over() => JobStatus::Concluded,
            (_, Stage::Detaching(_) | Stage::Resting) => JobStatus::Aborting,
            _ if self.pending => JobStatus::Pending,
            (Phase::Pivoting, _) => JobStatus::Waiting,
            (Phase::Ready, _) if self.paused => JobStatus::Standby,
            (Phase::Ready, _) => JobStatus::Ready,
            _ if self.paused => JobStatus::Paused,
            _ => JobStatus::Running,
        }
    }
}

/// The statuses from `from` to `to`, both included. `complete`: the target is a whole copy.
pub fn path(from: JobStatus, to: JobStatus, complete: bool) -> Vec<JobStatus> {
    let next = |stands: &JobStatus| (*stands != to).then(|| step(*stands, to, complete));
    std::iter::successors(Some(from), next).collect()
}

/// The status after `from` on the way to another.
fn step(from: JobStatus, to: JobStatus, complete: bool) -> JobStatus {
    use JobStatus::{Aborting, Concluded, Created, Null, Pending, Ready, Running, Standby, Waiting};
    let ends = matches!(to, Waiting | Pending) || (to == Concluded && complete);
    match from {
        Null => Created,
        Created => Running,
        // An end outweighs a pause.
        Standby if ends => Ready,
        Ready if ends => Waiting,
        Waiting if ends => Pending,
        Aborting => to,
        _ if to == Concluded && !complete => Aborting,
        _ => to,
    }
}

#[cfg(test)]
mod tests {
    use super::path;
    use crate::control::jobs::JobStatus::{
        self, Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
    };

    #[test]
    fn a_job_that_pivots_goes_qemus_way() {
        assert_eq!(path(Null, Running, false), [Null, Created, Running]);
        assert_eq!(path(Running, Ready, false), [Running, Ready]);
        assert_eq!(path(Ready, Waiting, false), [Ready, Waiting]);
        assert_eq!(path(Waiting, Concluded, true), [Waiting, Pending, Concluded]);
    }

    #[test]
    fn what_went_by_unseen_is_told() {
        assert_eq!(path(Ready, Concluded, true), [Ready, Waiting, Pending, Concluded]);
        assert_eq!(path(Standby, Pending, false), [Standby, Ready, Waiting, Pending]);
        assert_eq!(path(Null, Paused, false), [Null, Created, Running, Paused]);
    }

    #[test]
    fn a_job_that_comes_to_nothing_is_aborted_once() {
        for from in [Running, Paused, Ready, Standby, Waiting, Pending] {
            assert_eq!(path(from, Concluded, false), [from, Aborting, Concluded]);
            assert_eq!(path(from, Aborting, false), [from, Aborting]);
        }
        assert_eq!(path(Aborting, Concluded, false), [Aborting, Concluded]);
    }

    #[test]
    fn an_end_that_is_undone_is_ready_again() {
        assert_eq!(path(Waiting, Ready, false), [Waiting, Ready]);
        assert_eq!(path(Pending, Ready, false), [Pending, Ready]);
    }

    #[test]
    fn every_way_has_an_end() {
        let all = [Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];
        for from in all {
            for to in all.into_iter().filter(|to| *to != Created && *to != Null) {
                for complete in [false, true] {
                    assert!(path(from, to, complete).len() < all.len(), "{from:?} {to:?}");
                }
            }
        }
        assert_eq!(path(Ready, Ready, false), [Ready] as [JobStatus; 1]);
    }
}
