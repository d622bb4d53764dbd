//! The job that goes back to the source of a pivot, before it is one.
//!
//! Its planes and its request are kept before the pivot is recorded, with the number that the record is to have. Whoever
//! starts next believes them if that record stands, and otherwise throws them away:
//!
//! ```text
//! keep (planes, then request) ─► the record ─► the gate opens, followed ─► adopt: they become the export's job
//!        a kill: forgotten ◄──────┘└──────────► a kill: adopted by the next daemon
//! ```
//!
//! So a kill never leaves a way back that has missed a write: what is believed was followed from the switch on.
use super::{KeptJob, StateFolder, file_name};
use crate::io::Words;
use crate::planes::TakenUp;
use formats::error::{Context, Error, Result};
use formats::planes::Header;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A job that counts if a pivot was recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct KeptRollback {
    /// The number of that pivot's record.
    pub generation: u64,
    /// From its target back to its source.
    pub job: KeptJob,
}

impl StateFolder {
    /// Keeps a job that is to begin with the pivot, and lays out its planes.
    pub fn keep_rollback(&self, kept: &KeptRollback, header: &Header, taken: &TakenUp) -> Result<Arc<Words>> {
        let export = &kept.job.request.export;
        self.forget_rollback(export)?;
        let words = self.lay_out_planes(&self.rollback_planes_path(export), header, taken)?;
        self.keep(&self.rollback_path(export), kept, "keeping the way back")?;
        Ok(words)
    }

    /// What was kept, if anything is.
    pub fn kept_rollback(&self, export: &str) -> Result<Option<KeptRollback>> {
        let path = self.rollback_path(export);
        let named = || format!("{}: reading the way back", path.display());
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            text => {
                serde_json::from_slice(&text.context(named)?).map_err(std::io::Error::from).context(named).map(Some)
            }
        }
    }

    /// The pivot was recorded: what was kept becomes the export's job, in place of the one that pivoted. Begun once more
    /// after a kill, it comes to the same.
    pub fn adopt_rollback(&self, kept: &KeptRollback) -> Result<()> {
        let export = &kept.job.request.export;
        let named = |path: &Path| format!("{}: adopting the way back", path.display());
        let job = self.job_path(export);
        remove(&job).context(|| named(&job))?;
        self.sync()?;
        let planes = self.rollback_planes_path(export);
        match fs::rename(&planes, self.planes_path(export)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(named(&planes), error)),
            _ => self.sync()?,
        }
        self.keep_job(&kept.job)?;
        self.forget_rollback(export)
    }

    /// No pivot was recorded, or what was kept has been adopted.
    pub fn forget_rollback(&self, export: &str) -> Result<()> {
        // The request first: without it nobody looks at the planes.
        for path in [self.rollback_path(export), self.rollback_planes_path(export)] {
            if remove(&path).context(|| format!("{}: forgetting a way back", path.display()))? {
                self.sync()?;
            }
        }
        Ok(())
    }

    fn rollback_path(&self, export: &str) -> PathBuf {
        self.folder.join(format!("{}.rollback", file_name(export)))
    }

    fn rollback_planes_path(&self, export: &str) -> PathBuf {
        self.folder.join(format!("{}.rollback-planes", file_name(export)))
    }
}

/// True where there was something to remove.
fn remove(path: &Path) -> std::io::Result<bool> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::KeptRollback;
    use crate::control::MirrorRequest;
    use crate::open::identity;
    use crate::planes::TakenUp;
    use crate::state::{KeptJob, StateFolder};
    use formats::planes::Header;

    fn header(job: u64) -> Header {
        let (size, chunk_bits, flights) = (1 << 20, 16, 1);
        Header { boot: [1, 2], job, size, chunk_bits, flights, source: (3, 4), target: (5, 6), target_is_zero: false }
    }

    #[test]
    fn a_kill_in_the_middle_of_an_adoption_changes_nothing() {
        for steps in 0..4 {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let state = StateFolder::open(folder.path()).expect("a state folder");
            let job = |rollback, number| KeptJob {
                source: "/s".to_owned(),
                target_identity: identity(folder.path()).expect("it is there"),
                planes: Some(number),
                paused: false,
                rollback,
                named: false,
                top: false,
                request: MirrorRequest { export: "vda".to_owned(), ..MirrorRequest::default() },
            };
            state.new_planes("vda", &header(1), &TakenUp::nothing(&header(1))).expect("planes");
            state.keep_job(&job(false, 1)).expect("the job that pivots");
            let kept = KeptRollback { generation: 7, job: job(true, 2) };
            state.keep_rollback(&kept, &header(2), &TakenUp::nothing(&header(2))).expect("kept");
            // As far as a kill let it come.
            let rename = || std::fs::rename(state.rollback_planes_path("vda"), state.planes_path("vda"));
            let did: [&dyn Fn(); 3] = [
                &|| std::fs::remove_file(state.job_path("vda")).expect("it is there"),
                &|| rename().expect("it is there"),
                &|| state.keep_job(&kept.job).expect("room"),
            ];
            did.iter().take(steps).for_each(|step| step());
            let found = state.kept_rollback("vda").expect("our own").expect("still kept");
            assert_eq!(found, kept);
            state.adopt_rollback(&found).expect("room");
            assert_eq!(state.kept_job("vda").expect("our own"), Some(kept.job.clone()));
            let planes = state.planes_left("vda").expect("our own").expect("planes");
            assert_eq!(Header::parse(&planes).expect("our own").job, 2, "{steps}");
            assert!(state.kept_rollback("vda").expect("nothing is wrong").is_none());
        }
    }
}
