//! Errors: a small kind to match on, a context to read, the system's error as its source.
use std::io;

/// What a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The bytes break their own format's rules.
    Malformed,
    /// The bytes are right, and ask for something that is not supported; the context names it.
    Unsupported,
    /// The caller asked for what cannot be: outside the disk, read-only, a wrong option.
    Invalid,
    /// The system refused or failed; the source says how.
    Io,
}

/// What went wrong, where, and what was being done.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: Kind,
    context: String,
    #[source]
    source: Option<io::Error>,
}

/// A result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of the bytes or of the request, in words.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The bytes break their format's rules.
    pub fn malformed(context: impl Into<String>) -> Self {
        Self::new(Kind::Malformed, context)
    }

    /// Something that is not supported; name it.
    pub fn unsupported(context: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, context)
    }

    /// A request that cannot be.
    pub fn invalid(context: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, context)
    }

    /// The system's error, with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        Self { kind: Kind::Io, context: context.into(), source: Some(source) }
    }

    /// The same error with `place` (a path, most often) in front of its context.
    #[must_use]
    pub fn at(mut self, place: impl std::fmt::Display) -> Self {
        self.context = format!("{place}: {}", self.context);
        self
    }

    /// What a caller may match on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The system's error number, where the system failed.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }

    /// Context and source in one line.
    pub fn one_line(&self) -> String {
        match &self.source {
            Some(source) => format!("{}: {source}", self.context),
            None => self.context.clone(),
        }
    }
}

/// Adds what was being done to a result of the system.
pub trait Context<T> {
    /// Names what was being done when the system failed.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::io(what(), source))
    }
}
