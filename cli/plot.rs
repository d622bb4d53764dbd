//! A small plot in the terminal: one quantity over time.
use crate::size;
use std::time::Duration;

/// Columns of what stands before a plot's own.
pub const LABELS: usize = 11;
/// Rows of what stands below a plot's own.
pub const AXIS: usize = 2;
/// How many samples are kept: of neighbours the larger one, where there were more.
const SAMPLES_MAX: usize = 4096;
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A quantity in bytes at some instants, and instants that have a name of one letter.
#[derive(Debug, Default)]
pub struct Plot {
    samples: Vec<(Duration, u64)>,
    marks: Vec<(Duration, char)>,
}

impl Plot {
    /// Notes that there were `bytes` at `at`. Instants do not go back.
    pub fn sample(&mut self, at: Duration, bytes: u64) {
        self.samples.push((at, bytes));
        if self.samples.len() > SAMPLES_MAX {
            let larger = |pair: &[(Duration, u64)]| pair.iter().copied().max_by_key(|(_, bytes)| *bytes);
            self.samples = self.samples.chunks(2).filter_map(larger).collect();
        }
    }

    /// Gives an instant a letter below the plot.
    pub fn mark(&mut self, at: Duration, letter: char) {
        self.marks.push((at, letter));
    }

    /// The plot, line by line: `width` columns and `height` rows, each of them eight eighths high, besides the labels
    /// and the axis.
    pub fn lines(&self, width: usize, height: usize) -> Vec<String> {
        let columns = self.columns(width);
        let top = columns.iter().copied().max().unwrap_or(0).max(1);
        let heights: Vec<usize> = columns.iter().map(|bytes| eighths(*bytes, top, height)).collect();
        let mut lines: Vec<String> = (0..height)
            .rev()
            .map(|row| {
                let label = if row == height - 1 { size::format(top) } else { String::new() };
                let cells = heights.iter().map(|height| EIGHTHS[height.saturating_sub(row * 8).min(8)]);
                format!("{label:>9} │{}", cells.collect::<String>().trim_end())
            })
            .collect();
        lines.push(format!("{:>9} └{}", "0 B", self.axis(width)));
        let end = format!("{:.1} s", self.end().as_secs_f64());
        lines.push(format!("{:>9}  0 s{end:>rest$}", "", rest = width.saturating_sub(3)));
        lines
    }

    fn end(&self) -> Duration {
        self.samples.last().map_or(Duration::ZERO, |(at, _)| *at)
    }

    fn column(&self, at: Duration, width: usize) -> usize {
        let end = self.end().as_nanos().max(1);
        ((at.as_nanos() * width as u128 / end) as usize).min(width.saturating_sub(1))
    }

    /// The most that there was in each column's time; where nobody looked, what was seen before.
    fn columns(&self, width: usize) -> Vec<u64> {
        let mut columns = vec![None; width];
        for (at, bytes) in &self.samples {
            if let Some(most) = columns.get_mut(self.column(*at, width)) {
                *most = (*most).max(Some(*bytes));
            }
        }
        let seen = |last: &mut u64, most: Option<u64>| {
            *last = most.unwrap_or(*last);
            Some(*last)
        };
        columns.into_iter().scan(0, seen).collect()
    }

    fn axis(&self, width: usize) -> String {
        let mut axis = vec!['─'; width];
        for (at, letter) in &self.marks {
            let column = self.column(*at, width);
            // Two instants in one column: the later one moves on.
            let free = (column..width).find(|column| axis[*column] == '─').unwrap_or(column);
            if let Some(place) = axis.get_mut(free) {
                *place = *letter;
            }
        }
        axis.into_iter().collect()
    }
}

/// How many eighths of a row are filled: something is never nothing.
fn eighths(bytes: u64, top: u64, height: usize) -> usize {
    (u128::from(bytes) * (height * 8) as u128).div_ceil(u128::from(top)) as usize
}

#[cfg(test)]
mod tests {
    use super::{AXIS, LABELS, Plot, SAMPLES_MAX};
    use std::time::Duration;

    const WIDTH: usize = 60;
    const HEIGHT: usize = 5;

    #[test]
    fn a_backlog_that_falls_is_a_slope() {
        let mut plot = Plot::default();
        for step in 0..=60 {
            plot.sample(Duration::from_millis(step * 50), (60 - step) << 20);
        }
        plot.mark(Duration::from_millis(3000), 'P');
        let lines = plot.lines(WIDTH, HEIGHT);
        assert_eq!(lines.len(), HEIGHT + AXIS);
        assert!(lines[0].starts_with(" 60.0 MiB │██▇") && lines[0].chars().count() < WIDTH, "{lines:?}");
        assert!(lines[HEIGHT - 1].ends_with('▁'), "{lines:?}");
        assert!(lines[HEIGHT].ends_with("─P") && lines[HEIGHT + 1].ends_with("3.0 s"), "{lines:?}");
        assert_eq!(lines[HEIGHT].chars().count(), LABELS + WIDTH);
    }

    #[test]
    fn the_smallest_backlog_is_seen_and_none_is_not() {
        let mut plot = Plot::default();
        plot.sample(Duration::ZERO, 1 << 40);
        plot.sample(Duration::from_secs(1), 1);
        plot.sample(Duration::from_secs(2), 0);
        let lines = plot.lines(WIDTH, HEIGHT);
        assert_eq!(lines[HEIGHT - 1].chars().filter(|cell| *cell == '▁').count(), WIDTH / 2 - 1, "{lines:?}");
    }

    #[test]
    fn nothing_at_all_is_still_a_plot() {
        let mut plot = Plot::default();
        plot.mark(Duration::from_secs(9), 'R');
        plot.mark(Duration::from_secs(9), 'P');
        for (width, height) in [(WIDTH, HEIGHT), (1, 1), (2, 0), (0, 3), (500, 40)] {
            assert_eq!(plot.lines(width, height).len(), height + AXIS, "{width} columns, {height} rows");
        }
    }

    #[test]
    fn a_long_time_takes_no_more_memory_and_keeps_its_peaks() {
        let mut plot = Plot::default();
        for second in 0..100_000 {
            plot.sample(Duration::from_secs(second), if second == 50_000 { 1 << 30 } else { 1 });
        }
        assert!(plot.samples.len() <= SAMPLES_MAX);
        let lines = plot.lines(WIDTH, HEIGHT);
        assert!(lines[0].contains("1.00 GiB │") && lines[0].ends_with('█'), "{lines:?}");
        assert!(lines[HEIGHT + 1].ends_with("99999.0 s"), "{lines:?}");
    }
}
