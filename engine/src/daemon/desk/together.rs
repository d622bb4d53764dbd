//! Several exports that are pivoted at one instant, or not at all.
use super::ends::Wish;
use super::{Desk, refuse};
use crate::control::{Code, PivotRequest, Refusal};
use crate::pivot::members;
use std::collections::BTreeSet;

impl Desk {
    /// Begins it; the client is answered when all are pivoted, or none is.
    pub(super) fn pivot_together(&mut self, client: u64, names: &[String], verified: bool) -> Result<(), Refusal> {
        let mut once = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| !once.insert(name.as_str())) {
            return Err(refuse(Code::InvalidArg, format!("export {twice} is named twice")));
        }
        if names.is_empty() {
            return Err(refuse(Code::InvalidArg, "no export is named".to_owned()));
        }
        names.iter().try_for_each(|name| self.refuse_direction(&PivotRequest::of(name)))?;
        let numbers = names.iter().map(|name| self.may_pivot(name, verified)).collect::<Result<Vec<_>, _>>()?;
        if let [number] = numbers[..] {
            self.pivot(&PivotRequest::of(&names[0]), true)?;
            self.waiting.push((client, number, Wish::Pivot));
            return Ok(());
        }
        let lagging = self.exports.values().find(|export| export.record.as_ref().is_some_and(|record| record.lags()));
        if let Some(export) = lagging {
            let message = format!(
                "the record of export {} could not be written after the last pivot of several: make room in the state \
                 folder and restart the daemon first",
                export.name
            );
            return Err(refuse(Code::OperationFailed, message));
        }
        let file = self.state.group()?;
        for member in members(file, names.iter().map(String::as_str), &self.waker) {
            let number = self.find(member.export())?;
            let export = &self.exports[&number];
            let (Some(active), Some(record)) = (self.jobs.get_mut(&number), export.record.clone()) else { continue };
            let end = active.switch(export, Some(member));
            active.job.pivot(end, record);
            active.end_asked(true);
        }
        let group = numbers[0];
        self.waiting.extend(numbers.into_iter().map(|number| (client, number, Wish::Together(group))));
        self.waker.wake();
        Ok(())
    }
}
