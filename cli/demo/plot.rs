//! A small plot in the terminal: one quantity over time.
use crate::size;
use std::time::Duration;

/// Columns of a plot.
const WIDTH: usize = 60;
/// Rows of a plot, each of them eight eighths high.
const HEIGHT: usize = 5;
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
    }

    /// Gives an instant a letter below the plot.
    pub fn mark(&mut self, at: Duration, letter: char) {
        self.marks.push((at, letter));
    }

    /// The plot, line by line.
    pub fn lines(&self) -> Vec<String> {
        let columns = self.columns();
        let top = columns.iter().copied().max().unwrap_or(0).max(1);
        let heights: Vec<usize> = columns.iter().map(|bytes| eighths(*bytes, top)).collect();
        let mut lines: Vec<String> = (0..HEIGHT)
            .rev()
            .map(|row| {
                let label = if row == HEIGHT - 1 { size::format(top) } else { String::new() };
                let cells = heights.iter().map(|height| EIGHTHS[height.saturating_sub(row * 8).min(8)]);
                format!("{label:>9} │{}", cells.collect::<String>().trim_end())
            })
            .collect();
        lines.push(format!("{:>9} └{}", "0 B", self.axis()));
        let end = format!("{:.1} s", self.end().as_secs_f64());
        lines.push(format!("{:>9}  0 s{end:>width$}", "", width = WIDTH - 3));
        lines
    }

    fn end(&self) -> Duration {
        self.samples.last().map_or(Duration::ZERO, |(at, _)| *at)
    }

    fn column(&self, at: Duration) -> usize {
        let end = self.end().as_nanos().max(1);
        ((at.as_nanos() * WIDTH as u128 / end) as usize).min(WIDTH - 1)
    }

    /// The most that there was in each column's time; where nobody looked, what was seen before.
    fn columns(&self) -> Vec<u64> {
        let mut columns = vec![None; WIDTH];
        for (at, bytes) in &self.samples {
            let most = &mut columns[self.column(*at)];
            *most = (*most).max(Some(*bytes));
        }
        let seen = |last: &mut u64, most: Option<u64>| {
            *last = most.unwrap_or(*last);
            Some(*last)
        };
        columns.into_iter().scan(0, seen).collect()
    }

    fn axis(&self) -> String {
        let mut axis = vec!['─'; WIDTH];
        for (at, letter) in &self.marks {
            let column = self.column(*at);
            // Two instants in one column: the later one moves on.
            let free = (column..WIDTH).find(|column| axis[*column] == '─').unwrap_or(column);
            axis[free] = *letter;
        }
        axis.into_iter().collect()
    }
}

/// How many eighths of a row are filled: something is never nothing.
fn eighths(bytes: u64, top: u64) -> usize {
    (u128::from(bytes) * (HEIGHT * 8) as u128).div_ceil(u128::from(top)) as usize
}

#[cfg(test)]
mod tests {
    use super::{HEIGHT, Plot, WIDTH};
    use std::time::Duration;

    #[test]
    fn a_backlog_that_falls_is_a_slope() {
        let mut plot = Plot::default();
        for step in 0..=60 {
            plot.sample(Duration::from_millis(step * 50), (60 - step) << 20);
        }
        plot.mark(Duration::from_millis(3000), 'P');
        let lines = plot.lines();
        assert_eq!(lines.len(), HEIGHT + 2);
        assert!(lines[0].starts_with(" 60.0 MiB │██▇") && lines[0].chars().count() < WIDTH, "{lines:?}");
        assert!(lines[HEIGHT - 1].ends_with('▁'), "{lines:?}");
        assert!(lines[HEIGHT].ends_with("─P") && lines[HEIGHT + 1].ends_with("3.0 s"), "{lines:?}");
        assert_eq!(lines[HEIGHT].chars().count(), 11 + WIDTH);
    }

    #[test]
    fn the_smallest_backlog_is_seen_and_none_is_not() {
        let mut plot = Plot::default();
        plot.sample(Duration::ZERO, 1 << 40);
        plot.sample(Duration::from_secs(1), 1);
        plot.sample(Duration::from_secs(2), 0);
        let lines = plot.lines();
        assert_eq!(lines[HEIGHT - 1].chars().filter(|cell| *cell == '▁').count(), WIDTH / 2 - 1, "{lines:?}");
    }

    #[test]
    fn nothing_at_all_is_still_a_plot() {
        let mut plot = Plot::default();
        plot.mark(Duration::from_secs(9), 'R');
        plot.mark(Duration::from_secs(9), 'P');
        assert_eq!(plot.lines().len(), HEIGHT + 2);
    }
}
