//! The exports that were added to a running daemon: its next start serves them too.
use super::StateFolder;
use crate::control::options::ExportOptions;
use formats::error::{Context, Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

impl StateFolder {
    /// The exports that were added, and not removed since.
    pub fn kept_exports(&self) -> Result<Vec<ExportOptions>> {
        let path = self.exports_path();
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            text => text.context(|| format!("{}: reading the exports that were added", path.display()))?,
        };
        serde_json::from_slice(&text).map_err(|error| {
            Error::malformed(format!(
                "{}: no list of exports ({error}): remove the file to go on without",
                path.display()
            ))
        })
    }

    /// Keeps these, and no others.
    pub fn keep_exports(&self, exports: &[ExportOptions]) -> Result<()> {
        self.keep(&self.exports_path(), exports, "keeping the exports that were added")
    }

    fn exports_path(&self) -> PathBuf {
        self.folder.join("exports.json")
    }
}
