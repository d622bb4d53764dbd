//! Why a verb came to nothing.
use engine::control::Code;
use serde_json::{Value, json};
use std::fmt;

/// Why a verb came to nothing. Printed once, by `main`.
#[derive(Debug)]
pub enum Failure {
    /// The daemon said no.
    Refused {
        /// libvirt's name for it, where the daemon gave one.
        code: Option<Code>,
        /// The daemon's words.
        message: String,
    },
    /// Tried, and failed.
    Failed(String),
    /// Tried, and failed, in a verb whose exit status says more than that.
    FailedWith {
        /// The exit status.
        status: u8,
        /// Why.
        message: String,
    },
    /// The result itself says it, and was told.
    Told,
    /// Likewise, in a verb whose exit status says more than that.
    ToldWith(u8),
    /// Nobody reads our results any more.
    Unheard,
}

impl Failure {
    /// A failure in words.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }

    /// How the program ends after it.
    pub fn exit_status(&self) -> u8 {
        match self {
            // Whoever read our results has heard enough.
            Self::Unheard => 0,
            Self::FailedWith { status, .. } | Self::ToldWith(status) => *status,
            Self::Refused { .. } | Self::Failed(_) | Self::Told => 1,
        }
    }

    /// True where nobody has been told yet.
    pub fn is_untold(&self) -> bool {
        !matches!(self, Self::Unheard | Self::Told | Self::ToldWith(_))
    }

    /// As an object: the words, libvirt's name for it where the daemon gave one, and how the program ends.
    pub fn to_json(&self) -> Value {
        let (error, code) = match self {
            Self::Refused { code, message } => (message.clone(), *code),
            other => (other.to_string(), None),
        };
        json!({ "error": error, "code": code, "exit": self.exit_status() })
    }

    /// True where the daemon refused with `code`.
    pub fn is(&self, code: Code) -> bool {
        matches!(self, Self::Refused { code: Some(refused), .. } if *refused == code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { code: Some(code), message } => write!(f, "{message} ({})", name(*code)),
            Self::Refused { code: None, message } | Self::Failed(message) | Self::FailedWith { message, .. } => {
                f.write_str(message)
            }
            Self::Told | Self::ToldWith(_) => f.write_str("no"),
            Self::Unheard => f.write_str("nobody reads the results"),
        }
    }
}

fn name(code: Code) -> String {
    match serde_json::to_value(code) {
        Ok(Value::String(name)) => name,
        _ => format!("{code:?}"),
    }
}
