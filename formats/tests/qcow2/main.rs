//! qcow2 images against a model, against QEMU's tools, and when something fails.
#[path = "../support/mod.rs"]
mod support;

mod at_once;
mod bitmaps;
mod check;
mod damage;
mod data_file;
mod grow;
mod hostile;
mod journal;
mod model;
mod no_space;
mod peers;
mod power_cuts;
mod races;
mod rename;
mod snapshots;
mod subclusters;
