//! What a QMP error reply says.
use crate::control::{Code, Refusal};
use serde_json::{Value, json};

/// A command that came to nothing: QMP's class, libvirt's code name, and words.
#[derive(Debug, PartialEq)]
pub(super) struct Problem {
    class: &'static str,
    code: Code,
    message: String,
}

impl Problem {
    /// An argument, or the message as a whole, is wrong in itself.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self { class: "GenericError", code: Code::InvalidArg, message: message.into() }
    }

    /// The arguments are right, and ask for what this program does not do.
    pub(super) fn unsupported(message: impl Into<String>) -> Self {
        Self { class: "GenericError", code: Code::OperationUnsupported, message: message.into() }
    }

    /// No such command, or not now.
    pub(super) fn no_command(message: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", code: Code::OperationUnsupported, message: message.into() }
    }

    /// No job has this name; QEMU has two ways to say it.
    pub(super) fn no_job(id: &str, block: bool) -> Self {
        let (class, message) = match block {
            true => ("DeviceNotActive", format!("Block job '{id}' not found")),
            false => ("GenericError", "Job not found".to_owned()),
        };
        Self { class, code: Code::InvalidArg, message }
    }

    /// A job cannot be told this where it stands.
    pub(super) fn not_now(message: impl Into<String>) -> Self {
        Self { class: "GenericError", code: Code::OperationInvalid, message: message.into() }
    }

    /// The `error` member of a reply.
    pub(super) fn to_json(&self) -> Value {
        json!({ "class": self.class, "code": self.code, "desc": self.message })
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        Self { class: "GenericError", code: refusal.code, message: refusal.message }
    }
}
