//! What each verb does.
pub mod job;
pub mod mirror;
pub mod status;
pub mod watch;
