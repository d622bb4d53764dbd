//! What each verb does.
pub mod check;
pub mod compare;
pub mod convert;
pub mod events;
pub mod export;
pub mod info;
pub mod job;
pub mod journal;
pub mod manual;
pub mod map;
pub mod mirror;
pub mod serve;
pub mod status;
pub mod verify;
pub mod watch;
