//! What the live view looks like: a picture of what is known, as large as the terminal is.
//!
//! ```text
//! title
//! a row for each export: phase, bar, rate, what is left
//! details of the chosen one
//! its backlog over time
//! its disk, part by part
//! keys
//! ```
//! In a small terminal the lower things give way first.
use super::model::{MARKS, Model, Shown};
use crate::plot::{AXIS, LABELS};
use crate::size;
use crate::text;
use engine::control::{CELLS_MAX, MirrorMap, Status};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// Columns of an export's name, at most.
const NAME_MAX: usize = 24;
/// Columns of a bar; none below.
const BAR_MIN: usize = 5;
const BAR_MAX: usize = 60;
/// Rows of a plot and a map together, below which there is no plot.
const PLOT_MIN: u16 = 8;
/// Rows of a plot with its title and axis, at most.
const PLOT_MAX: u16 = 12;

/// Draws everything; says in how many parts the map can show the disk.
pub fn draw(frame: &mut Frame, model: &Model, place: &str, colours: bool) -> u64 {
    let paint = Paint { colours };
    let details = model.chosen().map(|shown| paint.details(&shown.status)).unwrap_or_default();
    let parts = Parts::of(frame.area(), model.exports().len(), details.len());
    put(frame, parts.title, vec![Line::from(format!("blkmirror at {place}")).style(Modifier::BOLD)]);
    put(frame, parts.exports, paint.exports(model, parts.exports));
    put(frame, parts.details, details);
    if let Some(shown) = model.chosen().filter(|shown| shown.status.phase != "none") {
        put(frame, parts.plot, paint.plot(shown, parts.plot));
    }
    if let Some(map) = model.map() {
        put(frame, parts.map, paint.map(map, parts.map));
    }
    put(frame, parts.keys, vec![Line::from("q quit   ↑ ↓ choose").style(Modifier::DIM)]);
    u64::from(parts.map.width) * u64::from(rows_of_map(parts.map))
}

fn put(frame: &mut Frame, place: Rect, lines: Vec<Line<'_>>) {
    frame.render_widget(Paragraph::new(lines), place);
}

/// Where things are.
#[derive(Debug)]
struct Parts {
    title: Rect,
    exports: Rect,
    details: Rect,
    plot: Rect,
    map: Rect,
    keys: Rect,
}

impl Parts {
    fn of(area: Rect, exports: usize, details: usize) -> Self {
        let mut rest = area;
        let mut take = |height: u16| {
            let height = height.min(rest.height);
            let taken = Rect { height, ..rest };
            rest = Rect { y: rest.y + height, height: rest.height - height, ..rest };
            taken
        };
        let title = take(1);
        let keys = u16::from(area.height > 3);
        let third = (area.height / 3).max(1);
        let exports = take(u16::try_from(exports).unwrap_or(u16::MAX).min(third));
        let left = area.height.saturating_sub(title.height + exports.height + keys);
        // A line between them, where there is room.
        let gap = u16::from(left > 6);
        take(gap);
        let details = take(u16::try_from(details).unwrap_or(u16::MAX).min(left - gap));
        take(gap);
        let left = left.saturating_sub(2 * gap + details.height);
        let plot = take(if left >= PLOT_MIN { (left / 2).min(PLOT_MAX) } else { 0 });
        let map = take(left - plot.height);
        Self { title, exports, details, plot, map, keys: take(keys) }
    }
}

/// Rows of a map below its legend: no more than the daemon tells of.
fn rows_of_map(place: Rect) -> u16 {
    let rows_max = u16::try_from(CELLS_MAX / u64::from(place.width.max(1))).unwrap_or(u16::MAX);
    place.height.saturating_sub(1).min(rows_max)
}

/// Puts things into lines, in colour or not.
struct Paint {
    colours: bool,
}

impl Paint {
    fn style(&self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }

    /// Those exports around the chosen one that there is room for.
    fn exports(&self, model: &Model, place: Rect) -> Vec<Line<'static>> {
        let (chosen, height) = (model.chosen_index(), usize::from(place.height));
        let first = (chosen + 1).saturating_sub(height);
        let width = |of: fn(&Status) -> String| {
            let width = |shown: &Shown| Span::raw(of(&shown.status)).width();
            model.exports().iter().map(width).max().unwrap_or(0)
        };
        let names = width(|status| status.export.clone()).min(NAME_MAX);
        let phases = width(text::phase);
        let rows = model.exports().iter().enumerate().skip(first).take(height);
        rows.map(|(number, shown)| {
            let Shown { status, .. } = shown;
            let marker = if number == chosen { "▸ " } else { "  " };
            let phase = padded(text::phase(status), phases);
            let mut spans = vec![
                Span::raw(marker),
                Span::raw(padded(status.export.clone(), names)),
                Span::raw("  "),
                Span::styled(phase, self.style(colour_of(status))),
                Span::raw("  "),
            ];
            let room = usize::from(place.width).saturating_sub(names + phases + 6);
            spans.extend(self.progress(status, room));
            let line = Line::from(spans);
            if number == chosen { line.style(Modifier::BOLD) } else { line }
        })
        .collect()
    }

    /// How far a job is; of an export without one, what it serves.
    fn progress(&self, status: &Status, room: usize) -> Vec<Span<'static>> {
        if !status.is_active() {
            let error = status.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
            return vec![Span::raw(format!("serving {}{error}", status.serving))];
        }
        let rate = format!("{}/s", size::format(status.copy_rate_bytes_per_s));
        let numbers = format!("{:>8}  {rate:>12}  {} left", text::percent(status), text::remaining(status));
        // What is left changes its width all the time, and the bar must not.
        let width = room.saturating_sub(58).min(BAR_MAX);
        if width < BAR_MIN {
            return vec![Span::raw(numbers)];
        }
        let full = (text::permille(status) as usize * width / 1000).min(width);
        vec![
            Span::styled("█".repeat(full), self.style(Color::Cyan)),
            Span::styled("░".repeat(width - full), self.style(Color::DarkGray)),
            Span::raw(numbers),
        ]
    }

    fn details(&self, status: &Status) -> Vec<Line<'static>> {
        let mut lines = Vec::new();
        if let Some(target) = status.target.as_ref().filter(|_| status.is_active()) {
            lines.push(Line::from(format!("{} → {target}", status.source)));
            let band = text::band(status).unwrap_or_default();
            lines.push(Line::from(format!("left {}{band}", text::remaining(status))));
            let lag = text::lag(status).map(|lag| format!("; behind by {lag}")).unwrap_or_default();
            lines.push(Line::from(format!("{}{lag}", text::rates(status))));
            lines.extend(text::rollback(status).map(|rollback| Line::from(format!("rollback {rollback}"))));
            lines.extend(text::verified(status).map(|verified| Line::from(format!("verified {verified}"))));
        }
        lines.extend(status.notes.iter().map(|note| Line::from(note.clone())));
        lines.extend(status.error.iter().map(|error| Line::styled(error.clone(), self.style(Color::Red))));
        lines
    }

    fn plot(&self, shown: &Shown, place: Rect) -> Vec<Line<'static>> {
        let width = usize::from(place.width).saturating_sub(LABELS);
        let height = usize::from(place.height).saturating_sub(AXIS + 1);
        let marks: Vec<String> = MARKS.iter().map(|(phase, letter)| format!("{letter} {phase}")).collect();
        let title = Span::styled(format!("still to copy of {}  ", shown.status.export), Modifier::BOLD);
        let title = Line::from(vec![title, Span::raw(marks.join(", "))]);
        let lines =
            shown.backlog.lines(width, height).into_iter().map(|line| Line::styled(line, self.style(Color::Cyan)));
        std::iter::once(title).chain(lines).collect()
    }

    fn map(&self, map: &MirrorMap, place: Rect) -> Vec<Line<'static>> {
        let width = usize::from(place.width).max(1);
        let count = map.chunks.len().min(width * usize::from(rows_of_map(place)));
        // The terminal may have another size by now than when the map was asked for.
        let cells: Vec<Cell> = (0..count).map(|cell| Cell::of(map, cell * map.chunks.len() / count)).collect();
        let rows = cells.chunks(width).map(|row| row.iter().map(|cell| self.cell(*cell)).collect());
        std::iter::once(self.legend(map)).chain(rows).collect()
    }

    fn cell(&self, cell: Cell) -> Span<'static> {
        let (letter, _, colour) = cell.look();
        Span::styled(letter, self.style(colour))
    }

    fn legend(&self, map: &MirrorMap) -> Line<'static> {
        let cell = map.size_bytes.div_ceil(map.chunks.len().max(1) as u64);
        let mut spans = vec![Span::styled(format!("disk of {}  ", map.export), Modifier::BOLD)];
        for kind in [Cell::Copied, Cell::Dirty, Cell::Partly, Cell::Copying, Cell::Nothing] {
            spans.extend([self.cell(kind), Span::raw(format!(" {}  ", kind.look().1))]);
        }
        spans.push(Span::raw(format!("each {}", size::format(cell))));
        Line::from(spans)
    }
}

/// How a part of the disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Copied,
    /// At least half of what is not zero has to be copied.
    Dirty,
    /// Some of it.
    Partly,
    Copying,
    Nothing,
}

impl Cell {
    fn of(map: &MirrorMap, index: usize) -> Self {
        let [copied, dirty, copying] =
            [&map.copied, &map.dirty, &map.copying].map(|list| list.get(index).copied().unwrap_or(0));
        match (copying, dirty, copied) {
            (1.., _, _) => Self::Copying,
            (_, 1.., _) if dirty >= copied => Self::Dirty,
            (_, 1.., _) => Self::Partly,
            (_, _, 1..) => Self::Copied,
            _ => Self::Nothing,
        }
    }

    fn look(self) -> (&'static str, &'static str, Color) {
        match self {
            Self::Copied => ("█", "copied", Color::Green),
            Self::Dirty => ("▒", "dirty", Color::Red),
            Self::Partly => ("░", "partly dirty", Color::Yellow),
            Self::Copying => ("▓", "being copied", Color::Cyan),
            Self::Nothing => ("·", "nothing to copy", Color::DarkGray),
        }
    }
}

fn colour_of(status: &Status) -> Color {
    match (status.phase.as_str(), status.paused || status.back_off_ms.is_some()) {
        ("failed", _) => Color::Red,
        (_, true) | ("cancelled", _) => Color::Yellow,
        ("ready" | "pivoted", _) => Color::Green,
        _ => Color::Reset,
    }
}

/// `text` in exactly `width` columns.
fn padded(text: String, width: usize) -> String {
    let mut text = text;
    if Span::raw(text.as_str()).width() > width {
        while Span::raw(text.as_str()).width() + 1 > width && text.pop().is_some() {}
        text.push('…');
    }
    let missing = width.saturating_sub(Span::raw(text.as_str()).width());
    text + &" ".repeat(missing)
}

#[cfg(test)]
mod tests {
    use super::super::poll::Look;
    use super::{Model, draw, padded};
    use engine::control::{CELLS_MAX, MirrorMap, Status};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::style::Color;
    use std::time::Duration;

    fn status(export: &str, phase: &str) -> Status {
        Status {
            export: export.into(),
            serving: "/old".into(),
            phase: phase.into(),
            total_bytes: 4 << 30,
            copied_bytes: 3 << 30,
            remaining_bytes: 1 << 30,
            copy_rate_bytes_per_s: 120 << 20,
            eta_s: Some(9),
            eta_low_s: Some(8),
            eta_high_s: Some(70),
            lag_bytes: Some(4096),
            lag_s: Some(0.5),
            source: "/old".into(),
            target: Some("/new".into()),
            ..Status::default()
        }
    }

    fn model(statuses: Vec<Status>) -> Model {
        let mut model = Model::default();
        let map = MirrorMap {
            export: "vda".into(),
            size_bytes: 4 << 30,
            chunk_bytes: 65536,
            chunks: vec![16; 5],
            copied: vec![16, 0, 10, 10, 0],
            dirty: vec![0, 16, 6, 4, 0],
            copying: vec![0, 0, 0, 2, 0],
            ..MirrorMap::default()
        };
        model.take(Look { statuses, map: Some(map) }, Duration::ZERO);
        model
    }

    fn drawn(model: &Model, width: u16, height: u16, colours: bool) -> (Vec<String>, Terminal<TestBackend>, u64) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("it is in memory");
        let mut cells = 0;
        terminal.draw(|frame| cells = draw(frame, model, "/control", colours)).expect("it is in memory");
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        ((0..height).map(row).collect(), terminal, cells)
    }

    #[test]
    fn everything_has_its_place() {
        let model = model(vec![status("vda", "converging"), status("vdb", "none")]);
        let (rows, _, cells) = drawn(&model, 100, 24, false);
        let all = rows.join("\n");
        assert_eq!(rows[0], "blkmirror at /control");
        assert_eq!(
            rows[1], "▸ vda  converging  █████████████████░░░░░░  75.0 %     120 MiB/s  1.00 GiB, 9 s left",
            "{all}"
        );
        assert_eq!(rows[2], "  vdb  none        serving /old");
        assert_eq!(rows[4], "/old → /new");
        assert_eq!(rows[5], "left 1.00 GiB, 9 s (8 s to 1 min 10 s)");
        assert_eq!(rows[6], "120 MiB/s copied; guest writes 0 B/s, dirties 0 B/s; behind by 4.00 KiB, 0.5 s");
        assert_eq!(rows[8], "still to copy of vda  R ready, P pivoted, C cancelled, F failed");
        assert!(rows[9].starts_with(" 1.00 GiB │"), "{all}");
        let legend = "disk of vda  █ copied  ▒ dirty  ░ partly dirty  ▓ being copied  · nothing to copy  each 819 MiB";
        let at = rows.iter().position(|row| row == legend).expect("a legend");
        assert_eq!(rows[at + 1], "█▒░▓·", "{all}");
        assert_eq!(rows[23], "q quit   ↑ ↓ choose");
        assert_eq!(cells, 100 * (23 - at as u64 - 1));
    }

    #[test]
    fn any_size_will_do() {
        let exports: Vec<String> = (0..30).map(|number| format!("export-number-{number}-with-a-long-name")).collect();
        let statuses = exports.iter().map(|name| status(name, "ready")).collect();
        let mut model = model(statuses);
        model.choose(-1);
        for (width, height) in [(0, 0), (1, 1), (1, 40), (3, 2), (20, 5), (40, 10), (79, 7), (80, 24), (300, 100)] {
            let (rows, _, cells) = drawn(&model, width, height, true);
            assert!(cells <= CELLS_MAX, "{width} columns, {height} rows: {cells} parts");
            if height > 3 && width >= 20 {
                assert!(rows.iter().any(|row| row.starts_with("▸ export-number-29-")), "{width}: {rows:?}");
            }
        }
        let (_, _, cells) = drawn(&model, 80, 24, true);
        assert!(cells > 0);
    }

    #[test]
    fn colours_are_left_out_where_they_are_not_wanted() {
        let model = model(vec![status("vda", "ready"), Status { error: Some("no".into()), ..status("b", "failed") }]);
        for wanted in [true, false] {
            let (_, terminal, _) = drawn(&model, 80, 24, wanted);
            let has_colour = terminal.backend().buffer().content().iter().any(|cell| cell.fg != Color::Reset);
            assert_eq!(has_colour, wanted);
        }
    }

    #[test]
    fn a_text_takes_the_columns_that_it_was_given() {
        assert_eq!(padded("vda".into(), 5), "vda  ");
        assert_eq!(padded("a long name".into(), 5), "a lo…");
        assert_eq!(padded("日本語".into(), 5), "日本…");
        assert_eq!(padded("日本語".into(), 4), "日… ");
    }
}
