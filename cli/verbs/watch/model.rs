//! What the live view knows: how each export stands and stood, and which of them is looked at closely.
use super::poll::Look;
use crate::plot::Plot;
use engine::control::{MirrorMap, Status};
use std::time::Duration;

/// Everything that is shown.
#[derive(Debug, Default)]
pub struct Model {
    exports: Vec<Shown>,
    /// Name of the export that is looked at closely.
    chosen: String,
    map: Option<MirrorMap>,
}

/// One export.
#[derive(Debug, Default)]
pub struct Shown {
    /// How it stands.
    pub status: Status,
    /// What was left to copy since its job, or the view, began.
    pub backlog: Plot,
    begun: Duration,
}

impl Model {
    /// Takes in how things stand `now`, the time since the view began.
    pub fn take(&mut self, look: Look, now: Duration) {
        let mut before = std::mem::take(&mut self.exports);
        for status in look.statuses {
            let known = before.iter().position(|shown| shown.status.export == status.export);
            let mut shown = known.map_or_else(Shown::default, |index| before.swap_remove(index));
            shown.take(status, now);
            self.exports.push(shown);
        }
        if self.chosen().is_none() {
            self.chosen = self.exports.first().map(|shown| shown.status.export.clone()).unwrap_or_default();
        }
        self.map = look.map;
    }

    /// Looks closely at the export that is `by` further down; the list has no end.
    pub fn choose(&mut self, by: isize) {
        let count = self.exports.len();
        if let Some(next) = self.chosen_index().checked_add_signed(by).or(count.checked_sub(1)) {
            self.chosen = self.exports.get(next % count.max(1)).map(|it| it.status.export.clone()).unwrap_or_default();
        }
    }

    /// Each export, in the daemon's order.
    pub fn exports(&self) -> &[Shown] {
        &self.exports
    }

    /// The number of the export that is looked at closely.
    pub fn chosen_index(&self) -> usize {
        self.exports.iter().position(|shown| shown.status.export == self.chosen).unwrap_or(0)
    }

    /// The export that is looked at closely.
    pub fn chosen(&self) -> Option<&Shown> {
        self.exports.iter().find(|shown| shown.status.export == self.chosen)
    }

    /// Its disk, where that is known.
    pub fn map(&self) -> Option<&MirrorMap> {
        self.map.as_ref().filter(|map| map.export == self.chosen)
    }
}

impl Shown {
    fn take(&mut self, status: Status, now: Duration) {
        if status.is_active() && !self.status.is_active() {
            (self.backlog, self.begun) = (Plot::default(), now);
        }
        let at = now.saturating_sub(self.begun);
        if status.is_active() || self.status.is_active() {
            self.backlog.sample(at, status.remaining_bytes);
        }
        let is_news = !self.status.phase.is_empty() && self.status.phase != status.phase;
        if let Some((_, letter)) = MARKS.iter().find(|(phase, _)| is_news && *phase == status.phase) {
            self.backlog.mark(at, *letter);
        }
        self.status = status;
    }
}

/// Phases whose beginning is marked below the plot.
pub const MARKS: [(&str, char); 4] = [("ready", 'R'), ("pivoted", 'P'), ("cancelled", 'C'), ("failed", 'F')];

#[cfg(test)]
mod tests {
    use super::{Look, Model};
    use engine::control::{MirrorMap, Status};
    use std::time::Duration;

    fn look(names: &[&str], phase: &str) -> Look {
        let status = |name: &&str| Status {
            export: (*name).into(),
            phase: phase.into(),
            remaining_bytes: 1 << 20,
            ..Status::default()
        };
        Look { statuses: names.iter().map(status).collect(), map: None }
    }

    #[test]
    fn the_choice_goes_round_and_stays_with_its_export() {
        let mut model = Model::default();
        model.choose(1);
        assert!(model.chosen().is_none());
        model.take(look(&["a", "b", "c"], "none"), Duration::ZERO);
        let mut chosen = Vec::new();
        for by in [0, 1, 1, 1, -1] {
            model.choose(by);
            chosen.push(model.chosen().expect("one of three").status.export.clone());
        }
        assert_eq!(chosen, ["a", "b", "c", "a", "c"]);
        model.take(look(&["c", "a"], "none"), Duration::ZERO);
        assert_eq!(model.chosen_index(), 0);
        model.take(look(&["a", "b"], "none"), Duration::ZERO);
        assert_eq!(model.chosen().map(|shown| shown.status.export.as_str()), Some("a"), "it has gone");
        model.take(look(&[], "none"), Duration::ZERO);
        assert!(model.chosen().is_none());
    }

    #[test]
    fn a_map_of_another_export_is_not_shown() {
        let mut model = Model::default();
        let map = Some(MirrorMap { export: "a".into(), ..MirrorMap::default() });
        model.take(Look { map, ..look(&["a", "b"], "ready") }, Duration::ZERO);
        assert!(model.map().is_some());
        model.choose(1);
        assert!(model.map().is_none());
    }

    #[test]
    fn a_new_job_begins_a_new_plot() {
        let mut model = Model::default();
        for (second, phase) in ["converging", "ready", "pivoted", "seeding"].into_iter().enumerate() {
            model.take(look(&["a"], phase), Duration::from_secs(second as u64));
            let axis = model.exports()[0].backlog.lines(20, 1)[1].clone();
            let marks: String = axis.chars().filter(char::is_ascii_uppercase).collect();
            assert_eq!(marks, ["B", "BR", "BRP", "B"][second], "{phase}: {axis}");
        }
    }
}
