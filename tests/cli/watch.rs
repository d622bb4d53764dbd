//! The live view of `watch`, seen and typed into as by a person.
use crate::fake::Fake;
use crate::status;
use crate::terminal::Terminal;
use engine::control::{Code, MirrorMap, Refusal, Reply, Request, Status};
use rustix::process::{Signal, kill_process};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Two exports with jobs, one that has none, and how far the jobs are.
fn statuses() -> Vec<Status> {
    let of = |export: &str, phase: &str| Status { export: export.into(), ..status(phase) };
    let busy = Status {
        copy_rate_bytes_per_s: 120 << 20,
        guest_rate_bytes_per_s: 5 << 20,
        eta_low_s: Some(1),
        eta_high_s: Some(4),
        ..of("vda", "converging")
    };
    vec![busy, of("vdb", "ready"), of("vdc", "none")]
}

fn map(export: &str, cells: u64) -> MirrorMap {
    let third = |nth: u64| (0..cells).map(|cell| u64::from(cell * 3 / cells == nth)).collect();
    MirrorMap {
        export: export.into(),
        size_bytes: cells << 16,
        chunk_bytes: 1 << 16,
        chunks: vec![1; cells as usize],
        copied: third(0),
        dirty: third(1),
        ..MirrorMap::default()
    }
}

fn answer(request: &Request) -> Result<Reply, Refusal> {
    match request {
        Request::Map { export, cells } => Ok(Reply::Map(map(export, *cells))),
        Request::Status(Some(export)) => {
            let status = statuses().into_iter().find(|status| status.export == *export);
            status.map(|status| Reply::One(Box::new(status))).ok_or(Refusal::new(Code::InvalidArg, "no such export"))
        }
        _ => Ok(Reply::All(statuses())),
    }
}

fn watch(fake: &Fake, more: &[&str], environment: &[(&str, &str)]) -> Terminal {
    Terminal::start(&[&["watch", "--control", fake.path()], more].concat(), 100, 30, environment)
}

const LEGEND: &str = "█ copied  ▒ dirty  ░ partly dirty  ▓ being copied  · nothing to copy";

#[test]
fn the_view_shows_jobs_their_backlog_and_the_disk_and_leaves_no_trace() {
    let fake = Fake::start(answer);
    let mut terminal = watch(&fake, &[], &[]);
    terminal.see(&[
        &format!("blkmirror at {}", fake.path()),
        "▸ vda  converging  ██",
        "75.0 %     120 MiB/s  1.00 MiB, 2 s left",
        "  vdb  ready       ",
        "  vdc  none        serving /images/old.qcow2",
        "/images/old.qcow2 → /images/new.raw",
        "left 1.00 MiB, 2 s (1 s to 4 s)",
        "120 MiB/s copied; guest writes 5.00 MiB/s, dirties 0 B/s",
        "still to copy of vda",
        "1.00 MiB │",
        LEGEND,
        "q quit   ↑ ↓ choose",
    ]);
    // A third each: copied, dirty, and nothing to copy.
    terminal.wait_for("the map", |rows| {
        let whole = |letter: &str| rows.iter().any(|row| *row == letter.repeat(100));
        whole("█") && whole("▒") && whole("·")
    });
    assert!(terminal.is_full_screen() && terminal.has_colours());
    terminal.type_keys(b"q");
    let (status, rows) = terminal.end();
    assert_eq!((status.code(), rows.join("")), (Some(0), String::new()), "the screen of before has nothing on it");
}

#[test]
fn other_exports_are_chosen_by_keys() {
    let fake = Fake::start(answer);
    let mut terminal = watch(&fake, &[], &[]);
    terminal.see(&["▸ vda", "disk of vda"]);
    terminal.type_keys(b"\x1b[B");
    terminal.see(&["▸ vdb", "still to copy of vdb", "disk of vdb"]);
    terminal.type_keys(b"j");
    terminal.see(&["▸ vdc"]);
    terminal.wait_for("no map of a disk without a job", |rows| !rows.iter().any(|row| row.contains("disk of")));
    terminal.type_keys(b"\t");
    terminal.see(&["▸ vda"]);
    terminal.type_keys(b"\x1b[A");
    terminal.see(&["▸ vdc"]);
    terminal.type_keys(b"\x03");
    assert_eq!(terminal.end().0.code(), Some(0));
    let requests = fake.requests();
    for name in ["vda", "vdb"] {
        assert!(requests.iter().any(|it| matches!(it, Request::Map { export, .. } if export == name)), "{name}");
    }
    assert!(!requests.iter().any(|it| matches!(it, Request::Map { export, .. } if export == "vdc")));
}

#[test]
fn the_view_is_as_large_as_the_window() {
    let fake = Fake::start(answer);
    let mut terminal = watch(&fake, &["vda"], &[]);
    let keys_at = |row: usize| move |rows: &[String]| rows.get(row).is_some_and(|row| row.starts_with("q quit"));
    terminal.wait_for("the keys in the last row", keys_at(29));
    terminal.wait_for("a map", |rows| rows.contains(&"█".repeat(100)));
    terminal.resize(60, 16);
    terminal.wait_for("the keys in the last row", keys_at(15));
    terminal.wait_for("a narrower map", |rows| rows.contains(&"█".repeat(60)));
    terminal.resize(12, 3);
    terminal.wait_for("what there is room for", |rows| rows[0] == "blkmirror at" && rows[1].starts_with("▸ vda"));
    terminal.resize(140, 40);
    terminal.wait_for("the keys in the last row", keys_at(39));
    terminal.wait_for("a wider map", |rows| rows.contains(&"█".repeat(140)));
    terminal.type_keys(b"q");
    assert_eq!(terminal.end().0.code(), Some(0));
}

#[test]
fn there_are_no_colours_where_they_are_not_wanted() {
    let fake = Fake::start(answer);
    let mut terminal = watch(&fake, &[], &[("NO_COLOR", "1")]);
    terminal.see(&["▸ vda", LEGEND]);
    assert!(!terminal.has_colours());
    terminal.type_keys(b"q");
    assert_eq!(terminal.end().0.code(), Some(0));
}

#[test]
fn a_signal_leaves_no_trace_either() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let fake = Fake::start(answer);
        let terminal = watch(&fake, &[], &[]);
        terminal.see(&["▸ vda", LEGEND]);
        kill_process(terminal.pid(), signal).unwrap();
        assert_eq!(terminal.end().0.code(), Some(0), "{signal:?}");
    }
}

#[test]
fn the_end_of_the_daemon_is_told_on_the_screen_of_before() {
    let is_over = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&is_over);
    let fake = Fake::start(move |request| match ended.load(Ordering::SeqCst) {
        true => Err(Refusal::new(Code::OperationFailed, "enough")),
        false => answer(request),
    });
    let terminal = watch(&fake, &[], &[]);
    terminal.see(&["▸ vda"]);
    is_over.store(true, Ordering::SeqCst);
    let (status, rows) = terminal.end();
    assert_eq!((status.code(), rows[0].as_str()), (Some(1), "blkmirror: enough (OPERATION_FAILED)"));
}

#[test]
fn programs_and_plain_terminals_get_lines() {
    for (more, environment, said) in [
        (&["vda", "--json"][..], &[][..], "{\"export\":\"vda\""),
        (&["vda"], &[("TERM", "dumb")], "vda  converging  75.0 %  1.00 MiB, 2 s left"),
    ] {
        let fake = Fake::start(answer);
        let mut terminal = watch(&fake, more, environment);
        terminal.see(&[said]);
        assert!(!terminal.said().contains('\x1b'), "{more:?}: {}", terminal.said());
        // Nobody has changed the terminal: this is a signal.
        terminal.type_keys(b"\x03");
        let (status, _) = terminal.end();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(2), "{more:?}");
    }
}
