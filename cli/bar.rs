//! How far a job is, on stderr where that is a terminal; nowhere else.
use crate::output;
use crate::text;
use engine::control::Status;
use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{prefix} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {msg}";

/// A bar that is gone when it is dropped.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar with a name in front.
    pub fn new(name: &str) -> Self {
        let bar = ProgressBar::new(0).with_prefix(name.to_string());
        Self(match ProgressStyle::with_template(TEMPLATE) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        })
    }

    /// Shows how a job stands.
    pub fn show(&self, status: &Status) {
        self.set(status.copied_bytes, status.total_bytes);
        self.0.set_message(format!("{}, {} left", text::phase(status), text::remaining(status)));
    }

    /// Shows that `done` of `total` bytes are done.
    pub fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Writes a line above the bar.
    pub fn remark(&self, line: &str) {
        self.0.suspend(|| output::remark(line));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
