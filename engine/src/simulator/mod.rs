//! The real stepped code in a world where everything happens in an order that one seed decides:
//! guests, copiers, the job, errors, kills and power cuts.
//!
//! What is checked: a guest never reads what a later write replaced; at a pivot both sides read
//! alike; after a kill the side that the record names has every write that was answered, after a
//! power cut every one that was also flushed. For each order that must not change a fault is
//! planted, to show that it would be seen.
//!
//! More worlds: `SEEDS=100000 cargo test -p engine --release simulator::worlds -- --nocapture`;
//! one: `SEED=31 cargo test -p engine simulator::one_world`.
mod files;
mod guest;
mod history;
mod world;

use crate::control::Mode;
use crate::fault::{Fault, plant};
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::{Fate, Plan, World};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn worlds_keep_every_promise() {
    let seeds = number("SEEDS").unwrap_or(2500);
    let mut pivots = 0;
    for seed in 1..=seeds {
        let outcome = catch_unwind(AssertUnwindSafe(|| World::new(Plan::of(seed)).run()));
        let repeat = "repeat it with SEED=… cargo test -p engine simulator::one_world";
        pivots += outcome.unwrap_or_else(|_| panic!("seed {seed}: {repeat}"));
    }
    assert!(u64::from(pivots) > seeds / 8, "{pivots} pivots in {seeds} worlds: hardly any promise was put to the test");
}

#[test]
fn one_world() {
    if let Some(seed) = number("SEED") {
        println!("{:?}", Plan::of(seed));
        World::new(Plan::of(seed)).run();
    }
}
