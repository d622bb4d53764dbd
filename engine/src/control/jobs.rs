//! Jobs by QEMU's names: where one stands, what it can be told there, and what there is to say of it.
use crate::control::Status;
use serde::{Deserialize, Serialize};

/// Where a job stands.
///
/// ```text
///                   paused       standby
///                     ▲▼            ▲▼
/// null ─► created ─► running ◄──► ready ──► waiting ─► pending ─► concluded ─► null
///                     └──────┬──────┴──────────┴──────────┘           ▲
///                            └────────────► aborting ─────────────────┘
/// ```
///
/// QEMU has no way back from `ready` to `running` (ours is ready as long as it has caught up), nor from `waiting` or
/// `pending` to `ready` (where an end was undone).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// It is there, and has done nothing.
    Created,
    /// It copies.
    Running,
    /// It copies nothing, on an operator's wish or after an error.
    Paused,
    /// It has caught up with the guest.
    Ready,
    /// It had caught up, and copies nothing.
    Standby,
    /// It is being ended, with a whole target.
    Waiting,
    /// Its end waits for `job-finalize`, or is being carried out.
    Pending,
    /// It is being given up.
    Aborting,
    /// It has ended, and waits for `job-dismiss`.
    Concluded,
    /// It is not there: not yet, or no more.
    Null,
}

/// What a job can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobVerb {
    /// End, the guest staying on the source.
    Cancel,
    /// Stop copying.
    Pause,
    /// Go on copying.
    Resume,
    /// Have another speed limit.
    SetSpeed,
    /// Handle guest writes otherwise.
    Change,
    /// End, with the target as the disk.
    Complete,
    /// Carry out the end that was asked for.
    Finalize,
    /// Be forgotten.
    Dismiss,
}

impl JobStatus {
    /// True where a job that stands here can be told `verb`. Whether it is ready to be completed is said by the job
    /// itself, with how much is left.
    pub fn takes(self, verb: JobVerb) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let copies = matches!(self, Created | Running | Paused | Ready | Standby);
        match verb {
            JobVerb::Complete => copies,
            // In QEMU a pending job has nothing left to copy.
            JobVerb::Pause | JobVerb::Resume => copies || self == Pending,
            JobVerb::Cancel | JobVerb::SetSpeed | JobVerb::Change => copies || matches!(self, Waiting | Pending),
            JobVerb::Finalize => self == Pending,
            JobVerb::Dismiss => self == Concluded,
        }
    }
}

/// What a job's last error did to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoStatus {
    /// Nothing.
    #[default]
    Ok,
    /// It rests, until it is resumed or by itself.
    Failed,
    /// It rests likewise, for there is no space.
    Nospace,
}

/// What is done about an I/O error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorAction {
    /// The job ends.
    Report,
    /// It rests.
    Stop,
    /// It is tried again.
    Ignore,
}

/// One job: under way, or concluded and not dismissed yet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// Where it stands.
    pub stands: JobStatus,
    /// The target is to become the disk.
    pub completing: bool,
    /// It has ended, and its target is a whole copy.
    pub complete: bool,
    /// What its last error did to it.
    pub io_status: IoStatus,
    /// Its end, once asked for, does not wait for `job-finalize`.
    pub auto_finalize: bool,
    /// It is forgotten when it has ended.
    pub auto_dismiss: bool,
    /// How its export stands, or stood when it ended.
    pub at: Box<Status>,
}

/// True where `text` can be a job's name in QEMU.
pub fn is_id(text: &str) -> bool {
    let rest = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '.' | '_');
    text.starts_with(|letter: char| letter.is_ascii_alphabetic()) && text.chars().all(rest)
}

#[cfg(test)]
mod tests {
    use super::{JobStatus, JobVerb, is_id};

    #[test]
    fn ids_are_as_in_qemu() {
        assert!(["a", "vda", "job-1.b_c"].into_iter().all(is_id));
        assert!(!["", "1a", "-a", "a b", "a/b", "\u{e4}"].into_iter().any(is_id));
    }

    #[test]
    fn verbs_are_taken_where_qemu_takes_them() {
        use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting};
        let all = [Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];
        // The columns of QEMU's own table, and where ours has more.
        for (verb, qemus, more) in [
            (JobVerb::Cancel, &[Created, Running, Paused, Ready, Standby, Waiting, Pending][..], &[][..]),
            (JobVerb::Pause, &[Created, Running, Paused, Ready, Standby], &[Pending]),
            (JobVerb::Resume, &[Created, Running, Paused, Ready, Standby], &[Pending]),
            (JobVerb::SetSpeed, &[Created, Running, Paused, Ready, Standby], &[Waiting, Pending]),
            (JobVerb::Change, &[Created, Running, Paused, Ready, Standby], &[Waiting, Pending]),
            (JobVerb::Complete, &[Ready, Standby], &[Created, Running, Paused]),
            (JobVerb::Finalize, &[Pending], &[]),
            (JobVerb::Dismiss, &[Concluded], &[]),
        ] {
            for status in all {
                assert_eq!(
                    status.takes(verb),
                    qemus.contains(&status) || more.contains(&status),
                    "{status:?} {verb:?}"
                );
            }
        }
    }
}
