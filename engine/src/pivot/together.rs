//! Several pivots that happen at one instant, or not at all.
//!
//! ```text
//! assemble   each target is durable, the gates are open still
//! arrive     gate closed, last pass over, target flushed: who comes last writes the record of all
//! ────────── the group's record is whole: the point of no return for all of them
//! verdict    each opens its gate on its target, and brings its member into its own record, both slots
//! ```
//!
//! Whoever is undone before that undoes all. A guest waits at its gate no longer than the slowest of them needs, and
//! no longer than its own pause allows. Members are brought into their own records before another group is recorded:
//! the group's file has one group that counts.
use super::record_file::{GroupFile, bytes_of_group};
use super::recorder::Recorder;
use crate::io::Waker;
use formats::error::{Error, Result};
use formats::record::Record;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the members share.
struct Together {
    file: GroupFile,
    state: Mutex<State>,
    /// Who steps them: something happened to all of them.
    waker: Waker,
}

struct State {
    /// Who has not assembled.
    missing: BTreeSet<String>,
    /// How many have not arrived.
    late: usize,
    /// What each wants to be recorded.
    records: Vec<Record>,
    verdict: Option<Verdict>,
}

/// An error says in words why they were undone.
type Verdict = std::result::Result<(), String>;

/// One pivot's part in a group. Dropped before the verdict, it undoes the others.
pub struct Member {
    together: Arc<Together>,
    export: String,
}

/// What a member does that has come to the record.
pub(super) enum Arrival {
    /// It was the last: it records all.
    Lead(Recorder),
    /// It waits for the verdict.
    Wait,
}

/// The members of a group pivot of these exports, whose record is `file`; `waker` wakes who steps them.
pub fn members<'a>(file: GroupFile, exports: impl Iterator<Item = &'a str>, waker: &Waker) -> Vec<Member> {
    let missing: BTreeSet<String> = exports.map(str::to_owned).collect();
    let names: Vec<String> = missing.iter().cloned().collect();
    let state = Mutex::new(State { missing, late: names.len(), records: Vec::new(), verdict: None });
    let together = Arc::new(Together { file, state, waker: waker.clone() });
    names.into_iter().map(|export| Member { together: Arc::clone(&together), export }).collect()
}

impl Member {
    /// Whose part it is.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// The target is durable, but for what comes meanwhile. True when all are there: then the gates close.
    pub fn assemble(&self) -> bool {
        let mut state = self.together.state();
        if state.missing.remove(&self.export) {
            self.together.waker.wake();
        }
        state.missing.is_empty()
    }

    /// What was decided, if it is.
    pub fn verdict(&self) -> Option<Result<()>> {
        let verdict = self.together.state().verdict.clone();
        verdict.map(|verdict| verdict.map_err(Error::invalid))
    }

    /// Wants `record` to be recorded. An error where the group is undone, or cannot be recorded.
    pub(super) fn arrive(&self, record: Record) -> Result<Arrival> {
        if let Some(verdict) = self.verdict() {
            return verdict.map(|()| Arrival::Wait);
        }
        let mut state = self.together.state();
        state.records.push(record);
        state.late -= 1;
        if state.late > 0 {
            return Ok(Arrival::Wait);
        }
        let file = &self.together.file;
        file.refuse_lost()?;
        let new = bytes_of_group(file, 1, std::mem::take(&mut state.records))?;
        // A group of nobody outdoes nobody: each one's own record counts again.
        let old = bytes_of_group(file, 2, Vec::new())?;
        Ok(Arrival::Lead(Recorder::new(file.slots().clone(), new, old)))
    }

    /// It has waited long enough. False where everybody is there: what is being recorded is waited for.
    pub(super) fn give_up(&self) -> bool {
        let mut state = self.together.state();
        if state.late > 0 {
            let why = format!("export {} waited for the others longer than its pause allows", self.export);
            self.together.end(&mut state, Err(why));
        }
        state.late > 0
    }

    /// The leader's word.
    pub(super) fn decide(&self, outcome: &Result<()>) {
        let told = |error: &Error| format!("export {}: {}", self.export, error.one_line());
        self.together.end(&mut self.together.state(), outcome.as_ref().copied().map_err(told));
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let why = format!("export {} could not be pivoted, so none of them was", self.export);
        self.together.end(&mut self.together.state(), Err(why));
    }
}

impl Together {
    /// The first verdict counts.
    fn end(&self, state: &mut State, verdict: Verdict) {
        if state.verdict.is_none() {
            state.verdict = Some(verdict);
            self.waker.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
