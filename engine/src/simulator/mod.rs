//! The real stepped code in a world where everything happens in an order that one seed decides:
//! guests, copiers, the job, errors, kills and power cuts.
//!
//! A job that was under way goes on in the next life from its planes, which a kill may find in the middle of a step.
//! What is checked: a guest never reads what a later write replaced; at a pivot both sides read
//! alike; after a kill the side that the record names has every write that was answered, after a
//! power cut every one that was also flushed. For each order that must not change a fault is
//! planted, to show that it would be seen.
//!
//! More worlds: `SEEDS=100000 cargo test -p engine --release simulator::worlds`, and for hours `tests/soak`;
//! one: `SEED=31 cargo test -p engine simulator::one_world -- --nocapture`.
mod bounds;
mod corners;
mod files;
mod group;
mod guest;
mod history;
mod kept;
mod life;
mod modes;
mod pages;
mod plan;
mod resize;
mod snapshot;
mod syncs;
mod world;

use crate::control::Mode;
use crate::fault::{Fault, plant};
use modes::Switches;
use plan::{Fate, Plan};
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::World;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn worlds_keep_every_promise() {
    let (first, seeds) = (number("FIRST").unwrap_or(1), number("SEEDS").unwrap_or(5000));
    let mut pivots = 0;
    for seed in first..first + seeds {
        let outcome = catch_unwind(AssertUnwindSafe(|| World::new(Plan::of(seed)).run()));
        let repeat = format!("repeat it with SEED={seed} cargo test -p engine simulator::one_world -- --nocapture");
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

/// A world without crashes or errors, with a job, for faults that need neither.
fn calm(seed: u64) -> Plan {
    Plan { fate: Fate::Lives, fail_one_in: 0, keeps: false, ..Plan::of(seed) }
}

/// The first world of `plan` that shows `fault`.
fn caught(fault: Fault, seeds: u64, plan: impl Fn(u64) -> Plan) -> Option<u64> {
    let shown = |seed: &u64| {
        plant(Some(fault));
        let outcome = catch_unwind(AssertUnwindSafe(|| World::new(plan(*seed)).run()));
        plant(None);
        outcome.is_err()
    };
    (1..=seeds).find(shown)
}

fn assert_caught(fault: Fault, plan: impl Fn(u64) -> Plan) {
    let seed = caught(fault, 3000, &plan);
    let seed = seed.unwrap_or_else(|| panic!("{fault:?} is not seen: the simulator is too tame to be trusted"));
    // The same world without the fault keeps its promises: it was the fault that was seen.
    World::new(plan(seed)).run();
}

/// Promise 1.
#[test]
fn looking_before_old_writes_end_is_caught() {
    assert_caught(Fault::LookBeforeOldWritesEnd, calm);
}

/// Promise 1. Found by a world (seed 1239 of its day): a chunk was copied for a new write while an old one
/// was under way, which then made it zeroes; the seeder took them for nothing to bring.
#[test]
fn copying_before_old_writes_end_is_caught() {
    assert_caught(Fault::CopyBeforeOldWritesEnd, |seed| Plan { eager: true, mode: Mode::Background, ..calm(seed) });
}

/// Promise 2.
#[test]
fn marking_before_the_write_is_caught() {
    assert_caught(Fault::MarkBeforeWrite, |seed| Plan { mode: Mode::Background, ..calm(seed) });
}

/// Promise 2.
#[test]
fn a_failed_write_that_marks_nothing_is_caught() {
    assert_caught(Fault::NoMarkOnFailure, |seed| Plan { fate: Fate::Lives, fail_one_in: 40, ..Plan::of(seed) });
}

/// Promise 3.
#[test]
fn clearing_a_mark_after_the_copy_is_caught() {
    assert_caught(Fault::ClearAfterCopy, |seed| Plan { mode: Mode::Background, ..calm(seed) });
}

/// Promise 3.
#[test]
fn a_failed_copy_that_does_not_mark_again_is_caught() {
    assert_caught(Fault::NoMarkAgain, |seed| Plan { fate: Fate::Lives, fail_one_in: 40, ..Plan::of(seed) });
}

/// Promises 2 and 3, where the target has no space for some time and the job backs off.
#[test]
fn worlds_with_a_full_target_keep_every_promise() {
    let pivots: u32 = (1..=600).map(|seed| World::new(with_a_full_target(seed)).run()).sum();
    assert!(pivots > 100, "{pivots} pivots");
}

/// Promise 2.
#[test]
fn a_write_to_both_sides_that_the_target_refused_and_nobody_marked_is_caught() {
    assert_caught(Fault::NoMarkOnTargetFailure, |seed| Plan {
        mode: Mode::WriteBlocking,
        fate: Fate::Lives,
        ..with_a_full_target(seed)
    });
}

/// Promise 3.
#[test]
fn a_copy_refused_by_a_full_target_that_does_not_mark_again_is_caught() {
    assert_caught(Fault::NoMarkAgain, |seed| Plan { fate: Fate::Lives, ..with_a_full_target(seed) });
}

/// Promise 3.
#[test]
fn ready_without_what_failed_is_caught() {
    assert_caught(Fault::ReadyWithoutWhatFailed, |seed| Plan { fate: Fate::Lives, ..with_a_full_target(seed) });
}

fn with_a_full_target(seed: u64) -> Plan {
    let from = seed % 700;
    Plan { full: Some((from, from + 200 + seed * 7 % 3000)), fail_one_in: 0, ..Plan::of(seed) }
}

/// Promises 2 and 4, where the target answers nothing for some time, and no guest waits for it.
#[test]
fn worlds_with_a_hung_target_keep_every_promise() {
    let pivots: u32 = (1..=800).map(|seed| World::new(with_a_hung_target(seed)).run()).sum();
    assert!(pivots > 100, "{pivots} pivots");
}

/// Promise 2. Where the late write lands, the target has it; where it fails, the mark alone knows.
#[test]
fn an_answer_without_the_target_that_marks_nothing_is_caught() {
    // Where so much fails long runs would never be copied in one go.
    assert_caught(Fault::NoMarkWhenLate, |seed| Plan {
        fate: Fate::Lives,
        fail_one_in: 10,
        chunk_bits: 12,
        shares: false,
        ..with_a_hung_target(seed)
    });
}

/// Promise 4.
#[test]
fn a_claim_released_before_a_late_write_lands_is_caught() {
    assert_caught(Fault::ReleaseWhileLate, |seed| Plan { fate: Fate::Lives, ..with_a_hung_target(seed) });
}

/// Promise 4. A guest that writes to both sides waits for the target's answers, and no longer than it has patience; its
/// thread never does.
#[test]
fn a_guest_that_looks_into_the_targets_tables_is_caught() {
    assert_caught(Fault::TablesInGuest, |seed| Plan {
        fate: Fate::Lives,
        raw_target: false,
        ..with_a_hung_target(seed)
    });
}

/// Half of them hang until every guest has all its answers: who waits for the target then, waits for ever.
fn with_a_hung_target(seed: u64) -> Plan {
    let from = seed % 900;
    let until = seed.is_multiple_of(2).then_some(from + 100 + seed * 7 % 2000);
    Plan { hung: Some((from, until)), mode: Mode::WriteBlocking, fail_one_in: 0, ..Plan::of(seed) }
}

/// Promise 4.
#[test]
fn claiming_around_the_targets_write_alone_is_caught() {
    assert_caught(Fault::ClaimTargetOnly, |seed| Plan { mode: Mode::WriteBlocking, ..calm(seed) });
}

/// Promise 4. Each request sees one mode, whatever is switched meanwhile, in either direction.
#[test]
fn worlds_whose_mode_is_switched_keep_every_promise() {
    let switched = |seed: u64| Plan { switches: Switches::OneIn(5 + seed % 50), ..Plan::of(seed) };
    let pivots: u32 = (1..=600).map(|seed| World::new(switched(seed)).run()).sum();
    assert!(pivots > 100, "{pivots} pivots");
}

/// Promise 4. At every step of a job under guests that write, one after the other: to both sides and, some steps later, back,
/// and the other way round.
#[test]
fn a_switch_of_the_mode_at_every_step_loses_nothing() {
    let mut switches = 0;
    for (seed, mode) in [(1, Mode::Background), (2, Mode::WriteBlocking)] {
        let plan = Plan { mode, switches: Switches::Never, courtesy: 0, ..calm(seed) };
        let steps = World::new(plan).steps();
        for step in 1..steps {
            World::new(Plan { switches: Switches::At(step, step + 3 + step % 90), ..plan }).run();
        }
        switches += 2 * steps;
    }
    assert!(switches > 1000, "{switches} switches");
}

/// Promise 4. Where the mode is not switched, both looks see the same.
#[test]
fn a_request_that_looks_at_the_mode_twice_is_caught() {
    let plan = |seed: u64| Plan { mode: Mode::Background, switches: Switches::Never, ..calm(seed) };
    assert_eq!(caught(Fault::LookAtTheModeTwice, 300, plan), None);
    assert_caught(Fault::LookAtTheModeTwice, |seed| Plan { switches: Switches::OneIn(60), ..plan(seed) });
}

/// Promise 4. While guests write to both sides, from the start on or since a switch, none leaves anything to copy that was not left
/// when it began.
#[test]
fn what_is_left_to_copy_only_shrinks_while_both_sides_are_written() {
    let pivots: u32 = (1..=600).map(|seed| World::new(watched(seed)).run()).sum();
    assert!(pivots > 300, "{pivots} pivots");
}

/// Promise 4. Both sides are equal with it: the job would only never come to an end.
#[test]
fn marking_what_both_sides_have_is_caught() {
    assert_caught(Fault::MarkWhatBothHave, watched);
}

fn watched(seed: u64) -> Plan {
    let switches = if seed.is_multiple_of(2) { Switches::OneIn(200) } else { Switches::Never };
    Plan { mode: Mode::WriteBlocking, switches, discards: false, ..calm(seed) }
}

/// Promise 5.
#[test]
fn taking_zeroes_for_nothing_is_caught() {
    assert_caught(Fault::SkipZeroes, calm);
}

/// Promise 6.
#[test]
fn a_pivot_that_does_not_wait_for_requests_is_caught() {
    assert_caught(Fault::PivotWithoutDrain, calm);
}

/// Promise 6.
#[test]
fn a_pivot_without_a_last_pass_is_caught() {
    assert_caught(Fault::PivotWithoutLastPass, |seed| Plan { mode: Mode::Background, ..calm(seed) });
}

/// Promise 6. With every pivot held, and every guest served meanwhile.
#[test]
fn worlds_in_which_pivots_wait_keep_every_promise() {
    let pivots: u32 = (1..=400).map(|seed| World::new(Plan { held: true, ..Plan::of(seed) }).run()).sum();
    assert!(pivots > 100, "{pivots} pivots");
}

/// Promise 6.
#[test]
fn a_pending_end_that_holds_guests_is_caught() {
    assert_caught(Fault::PendingHoldsGate, |seed| Plan { held: true, ..calm(seed) });
}

/// Promise 8.
#[test]
fn a_record_before_the_flush_is_caught() {
    assert_caught(Fault::RecordBeforeFlush, crashing_after_the_record);
}

/// Promises 8 and 10, where payload and tables are in two files.
#[test]
fn worlds_with_data_files_keep_every_promise() {
    let pivots: u32 = (1..=600).map(|seed| World::new(with_data_files(seed)).run()).sum();
    assert!(pivots > 100, "{pivots} pivots");
}

/// Promise 8.
#[test]
fn mappings_before_what_they_show_are_caught() {
    let cut = |seed: u64| Fate::PowerCut(100 + seed % 1400);
    assert_caught(Fault::MapBeforePayload, |seed| Plan { fate: cut(seed), fail_one_in: 0, ..with_data_files(seed) });
}

fn with_data_files(seed: u64) -> Plan {
    Plan { data_files: true, raw_source: false, raw_target: false, ..Plan::of(seed) }
}

/// Promise 8.
#[test]
fn a_mapping_that_a_kill_forgets_is_caught() {
    let killed = |seed: u64| Plan { fate: Fate::Killed(100 + seed % 1000), fail_one_in: 0, ..Plan::of(seed) };
    assert_caught(Fault::ForgetInKill, |seed| Plan { raw_source: false, ..killed(seed) });
}

/// Promise 7. A crash at every step of a pivot, one after the other, from the closing of the gate to a
/// while after its opening: each time one side is named, and it has everything.
#[test]
fn a_crash_at_every_step_of_a_pivot_leaves_one_truth() {
    let crashes: u64 = (1..=24).map(|seed| crash_at_every_step(calm(seed))).sum();
    assert!(crashes > 500, "{crashes} crashes");
}

/// Promise 7.
#[test]
fn a_slot_that_rots_after_a_pivot_changes_nothing() {
    let pivots = (1..=60).filter(|seed| World::new(calm(*seed)).rotting((seed % 2) as usize)).count();
    assert!(pivots > 20, "{pivots} pivots");
}

/// Promise 7.
#[test]
fn overwriting_the_slot_that_counts_is_caught() {
    plant(Some(Fault::OverwriteTheNewestSlot));
    let outcome = catch_unwind(|| (1..=24).map(|seed| crash_at_every_step(calm(seed))).sum::<u64>());
    plant(None);
    assert!(outcome.is_err(), "the simulator is too tame to be trusted");
}

/// How many crashes that were.
fn crash_at_every_step(plan: Plan) -> u64 {
    let Some((first, last)) = World::new(plan).pivoting() else { return 0 };
    for step in first..last + 20 {
        for fate in [Fate::Killed(step), Fate::PowerCut(step)] {
            World::new(Plan { fate, ..plan }).run();
        }
    }
    2 * (last + 20 - first)
}

/// Promise 9.
#[test]
fn a_source_that_is_served_after_the_record_is_caught() {
    assert_caught(Fault::SourceAfterRecord, crashing_after_the_record);
}

/// Promise 10. The planes of a job at any instant of a kill cover what its target may lack.
#[test]
fn a_write_that_is_not_noted_in_flight_is_caught() {
    assert_caught(Fault::NoFlight, |seed| Plan { mode: Mode::Background, ..killed_in_its_job(seed) });
}

/// Promise 10.
#[test]
fn a_flight_that_lands_before_its_mark_is_caught() {
    // Late enough that what the guest writes to was copied once, and is not marked.
    let fate = |seed: u64| Fate::KilledAtStore(100 + seed * 3 % 1000);
    assert_caught(Fault::LandBeforeMark, |seed| Plan {
        fate: fate(seed),
        mode: Mode::Background,
        ..killed_at_a_store(seed)
    });
}

/// Promise 10.
#[test]
fn marks_that_are_found_without_their_parts_are_caught() {
    assert_caught(Fault::MarksWithoutParts, |seed| Plan { mode: Mode::Background, ..killed_in_its_job(seed) });
}

/// Promise 10.
#[test]
fn a_claim_released_before_its_chunks_are_unsettled_is_caught() {
    assert_caught(Fault::ReleaseBeforeUnsettled, killed_at_a_store);
}

/// Promise 10.
#[test]
fn forgetting_before_the_settle_is_over_is_caught() {
    assert_caught(Fault::ForgetBeforeSettled, killed_in_its_job);
}

/// Promise 10.
#[test]
fn forgetting_the_wrong_generation_is_caught() {
    assert_caught(Fault::ForgetTheWrongGeneration, killed_in_its_job);
}

/// Promise 10.
#[test]
fn progress_ahead_of_its_marks_is_caught() {
    assert_caught(Fault::SeenBeforeMarks, killed_at_a_store);
}

/// Promise 10. Found by a world (seed 4590 of its day): a job that an error of the source ended was killed before its
/// end, and went on with planes that knew nothing of what the guest had written past it meanwhile.
#[test]
fn a_guest_that_writes_past_planes_that_still_count_is_caught() {
    // The plainest copy: it fails soonest.
    let plain = |seed: u64| Plan { chunk_bits: 12, courtesy: 0, shares: false, ..killed_in_its_job(seed) };
    let failing = |seed: u64| Plan { fail_one_in: 15, mends: true, ..plain(seed) };
    assert_caught(Fault::PassBeforeUnfollowed, |seed| Plan { raw_target: seed.is_multiple_of(2), ..failing(seed) });
}

/// Killed while its job is under way, most likely; the target is one of whose mappings a kill loses some.
fn killed_in_its_job(seed: u64) -> Plan {
    let fate = Fate::Killed(200 + seed % 600);
    Plan { fate, fail_one_in: 0, raw_target: false, ..Plan::of(seed) }
}

fn killed_at_a_store(seed: u64) -> Plan {
    Plan { fate: Fate::KilledAtStore(1 + seed % 300), ..killed_in_its_job(seed) }
}

/// Promise 15. Pivots that keep their source, and the ways back, through kills, power cuts and errors.
#[test]
fn worlds_that_go_back_keep_every_promise() {
    let pivots: u32 = (1..=900).map(|seed| World::new(Plan { keeps: true, ..Plan::of(seed) }).run()).sum();
    assert!(pivots > 500, "{pivots} pivots");
}

/// Promise 15. A crash at every step from the first pivot to the end of the second: whichever side is named then has
/// everything, and where the way back is still there, it brings all of it.
#[test]
fn a_crash_at_every_step_of_the_way_back_leaves_one_truth() {
    let crashes: u64 = (1..=3).map(|seed| crash_at_every_step(Plan { keeps: true, ..calm(seed) })).sum();
    assert!(crashes > 500, "{crashes} crashes");
}

/// Promise 15.
#[test]
fn a_way_back_that_follows_too_late_is_caught() {
    assert_caught(Fault::BackAfterOpen, |seed| Plan { keeps: true, ..calm(seed) });
}

/// Promise 15.
#[test]
fn a_way_back_without_the_old_journal_is_caught() {
    let killed = |seed: u64| Plan { fate: Fate::Killed(300 + seed % 1500), fail_one_in: 0, ..Plan::of(seed) };
    assert_caught(Fault::ForgetOldJournal, |seed| Plan { keeps: true, raw_source: false, ..killed(seed) });
}

/// Promise 14. With every pivot verified, under load, errors and crashes: nothing is called a mismatch that is none.
#[test]
fn worlds_in_which_pivots_are_verified_keep_every_promise() {
    let pivots: u32 = (1..=600).map(|seed| World::new(Plan { verify: true, ..Plan::of(seed) }).run()).sum();
    assert!(pivots > 100, "{pivots} pivots");
}

/// Promise 14. What has rotted on the target is mended, whatever guests write meanwhile, and found, unless one of them
/// writes there just then.
#[test]
fn a_target_that_rots_is_found_and_mended() {
    let found = (1..=300).filter(|seed| World::new(rotting(*seed)).mismatches() > 0).count();
    assert!(found > 100, "{found} were found");
}

/// Promise 14. The same through kills, power cuts and errors: whatever life of the daemon it is that pivots, it has looked.
#[test]
fn a_target_that_rots_in_a_daemon_that_dies_is_mended() {
    let rots = |seed: u64| Plan {
        keeps: false,
        fate: Plan::of(seed).fate,
        fail_one_in: Plan::of(seed).fail_one_in,
        ..rotting(seed)
    };
    let pivots: u32 = (1..=600).map(|seed| World::new(rots(seed)).run()).sum();
    assert!(pivots > 200, "{pivots} pivots");
}

/// Promise 14. Nobody else would have seen it before the guest did.
#[test]
fn a_target_that_rots_and_is_not_verified_is_seen() {
    let lost = |seed: &u64| {
        let plan = Plan { verify: false, ..rotting(*seed) };
        catch_unwind(AssertUnwindSafe(|| World::new(plan).run())).is_err()
    };
    assert!((1..=60).any(|seed| lost(&seed)), "the simulator is too tame to be trusted");
}

/// Promise 14.
#[test]
fn looking_at_marks_before_flights_is_caught() {
    assert_caught(Fault::MarksBeforeFlights, |seed| Plan { mode: Mode::Background, verify: true, ..calm(seed) });
}

fn rotting(seed: u64) -> Plan {
    Plan { verify: true, rots: true, raw_target: true, shallow: false, ..calm(seed) }
}

/// The daemon is killed, or the power goes, some time after the pivot.
fn crashing_after_the_record(seed: u64) -> Plan {
    let fate = if seed.is_multiple_of(2) { Fate::PowerCut(seed % 1500) } else { Fate::Killed(seed % 1500) };
    Plan { fate, fail_one_in: 0, ..Plan::of(seed) }
}
