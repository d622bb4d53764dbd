//! The command line's words: usage, results, messages, exit codes. The daemon is a scripted one that
//! speaks through the real session.
#![expect(clippy::unwrap_used, reason = "where the test itself cannot go on, it ends")]
mod alone;
mod check;
mod compress;
mod creation;
mod fake;
mod json;
mod manual;
mod terminal;
mod watch;

use assert_cmd::Command;
use engine::control::creation::{Compat, CreateOptions};
use engine::control::qmp::Call;
use engine::control::{
    Changes, Code, MirrorRequest, Mode, OnError, PivotRequest, Refusal, Reply, Request, Started, Status, TargetFormat,
};
use fake::Fake;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What one run of the program said, and how it ended.
#[derive(Debug)]
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn blkmirror(words: &[&str]) -> Run {
    let output = Command::cargo_bin("blkmirror").unwrap().args(words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// `blkmirror VERB --control SOCKET REST…`.
fn ask(fake: &Fake, words: &[&str]) -> Run {
    let (verb, rest) = words.split_first().unwrap();
    let mut all = vec![*verb, "--control", fake.path()];
    all.extend(rest);
    blkmirror(&all)
}

fn status(phase: &str) -> Status {
    Status {
        export: "vda".into(),
        serving: "/images/old.qcow2".into(),
        phase: phase.into(),
        job: Some("vda".into()),
        mode: Some(Mode::Background),
        total_bytes: 4 << 20,
        copied_bytes: 3 << 20,
        remaining_bytes: 1 << 20,
        eta_s: Some(2),
        source: "/images/old.qcow2".into(),
        target: Some("/images/new.raw".into()),
        ..Status::default()
    }
}

fn one(phase: &str) -> Result<Reply, Refusal> {
    Ok(Reply::One(Box::new(status(phase))))
}

fn started() -> Result<Reply, Refusal> {
    Ok(Reply::Started(Started { job: "vda".into(), notes: vec!["the source has no backing: a full copy".into()] }))
}

#[test]
fn misuse_is_2_and_help_is_0() {
    let misused: &[&[&str]] = &[
        &[],
        &["nonsense"],
        &["status"],
        &["mirror", "--control", "/s", "vda"],
        &["mirror", "--control", "/s", "vda", "/t", "--raw", "--format", "qcow2"],
        &["mirror", "--control", "/s", "vda", "/t", "--pivot", "--finish"],
        &["mirror", "--control", "/s", "vda", "/t", "--dry-run", "--wait"],
        &["mirror", "--control", "/s", "vda", "/t", "--mode", "fast"],
        &["mirror", "--control", "/s", "vda", "/t", "--speed", "fast"],
        &["mirror", "--control", "/s", "vda", "/t", "--format", "vmdk"],
        &["set", "--control", "/s", "vda"],
        &["serve", "--control", "/s", "--socket", "/n"],
        &["serve", "--control", "/s", "--export", "vda=/a"],
        &["serve", "--socket", "/n", "--export", "vda=/a"],
        &["serve", "--control", "/s", "--socket", "/n", "--export", "vda"],
        &["serve", "--control", "/s", "--socket", "/n", "--export", "vda=/a,format=vmdk"],
        &["convert", "/a"],
        &["compare", "/a"],
        &["info"],
        &["check"],
        &["check", "/a", "--repair", "some"],
        &["demo", "--size", "1M"],
        &["events"],
        &["completions"],
        &["completions", "tcsh"],
        &["man", "/a", "/b"],
        &["serve", "--control", "/s", "--socket", "/n", "--export", "vda=/a", "--json"],
        &["pivot", "--control", "/s", "vda", "--force"],
        &["status", "--control", "/s", "--shallow"],
    ];
    for words in misused {
        let run = blkmirror(words);
        assert_eq!(run.code, Some(2), "{words:?}: {run:?}");
        assert!(run.stdout.is_empty() && run.stderr.contains("--help"), "{words:?}: {run:?}");
    }
    for words in [&["--help"][..], &["--version"], &["mirror", "--help"]] {
        let run = blkmirror(words);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{words:?}");
    }
}

#[test]
fn the_help_names_every_verb_once() {
    let help = blkmirror(&["--help"]).stdout;
    for verb in [
        "serve",
        "convert",
        "compare",
        "info",
        "check",
        "demo",
        "mirror",
        "status",
        "pivot",
        "cancel",
        "pause",
        "resume",
        "set",
        "watch",
        "events",
        "quit",
        "map",
        "completions",
        "man",
    ] {
        let rows = help.lines().filter(|line| line.trim_start().starts_with(&format!("{verb} "))).count();
        assert_eq!(rows, 1, "{verb} in {help}");
    }
}

#[test]
fn where_no_daemon_listens_the_remedy_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let path = path.to_str().unwrap();
    for words in
        [&["status"][..], &["mirror", "vda", "/t"], &["quit"], &["watch"], &["events"], &["set", "vda", "--speed", "0"]]
    {
        let mut all = vec![words[0], "--control", path];
        all.extend(&words[1..]);
        let run = blkmirror(&all);
        let expected =
            format!("blkmirror: no daemon listens at {path}: start one with `blkmirror serve --control {path} …`\n");
        assert_eq!((run.code, run.stdout.as_str(), run.stderr), (Some(1), "", expected), "{words:?}");
    }
}

#[test]
fn a_socket_that_is_no_daemons_is_told_apart() {
    let fake = Fake::silent();
    let run = ask(&fake, &["status"]);
    assert_eq!(run.code, Some(1));
    let told = "not the control socket of a daemon: name the one that `blkmirror serve --control` was given";
    assert_eq!(run.stderr, format!("blkmirror: {}: {told}\n", fake.path()));
}

#[test]
fn a_mirror_has_every_word_of_its_request() {
    let fake = Fake::start(|_| started());
    let run = ask(
        &fake,
        &[
            "mirror",
            "vda",
            "/images/new",
            "--shallow",
            "--reuse-external",
            "--format",
            "qcow2",
            "--mode",
            "write-blocking",
            "--speed",
            "10M",
            "--granularity",
            "64K",
            "--on-target-error",
            "enospc",
            "--on-source-error",
            "ignore",
            "--max-pause",
            "250",
            "--buf-size",
            "1M",
            "--no-unmap",
            "--no-reflink",
            "--latency-factor",
            "0",
            "--max-slowdown",
            "3",
            "--max-lag",
            "1G",
            "--job-id",
            "j",
            "-o",
            "cluster_size=4k,compat=0.10",
            "--option",
            "cluster_size=8k",
        ],
    );
    assert_eq!(run.code, Some(0), "{run:?}");
    assert_eq!(run.stdout, "vda: mirror to /images/new started, job vda\n");
    assert_eq!(run.stderr, "vda: the source has no backing: a full copy\n");
    let request = MirrorRequest {
        export: "vda".into(),
        target: "/images/new".into(),
        shallow: true,
        reuse_external: true,
        format: Some(TargetFormat::Qcow2),
        mode: Mode::WriteBlocking,
        speed: 10 << 20,
        granularity: 64 << 10,
        on_target_error: OnError::Enospc,
        on_source_error: OnError::Ignore,
        pause_budget: 250,
        buf_size: 1 << 20,
        unmap: false,
        reflink: false,
        latency_factor: 0,
        max_slowdown: 3,
        max_lag: 1 << 30,
        dry_run: false,
        job_id: Some("j".into()),
        options: CreateOptions { cluster_size: Some(8192), compat: Some(Compat::V2), ..CreateOptions::default() },
        ..MirrorRequest::default()
    };
    assert_eq!(fake.calls(), [Call { request: Request::Mirror(request), wait: true }]);
}

#[test]
fn raw_is_a_format_and_a_relative_target_is_the_callers() {
    let fake = Fake::start(|_| started());
    let run = ask(&fake, &["mirror", "vda", "new.raw", "--raw", "--dry-run"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    let target = std::env::current_dir().unwrap().join("new.raw").to_str().unwrap().to_string();
    assert_eq!(run.stdout, format!("vda: could be mirrored to {target}\n"));
    let format = Some(TargetFormat::Raw);
    let request = MirrorRequest { export: "vda".into(), target, format, dry_run: true, ..MirrorRequest::default() };
    assert_eq!(fake.requests(), [Request::Mirror(request)]);
}

#[test]
fn a_uri_stays_as_it_is() {
    let fake = Fake::start(|_| started());
    ask(&fake, &["mirror", "vda", "nbd://host/new"]);
    let [Request::Mirror(request)] = &fake.requests()[..] else { panic!("one request") };
    assert_eq!(request.target, "nbd://host/new");
}

#[test]
fn a_refusal_is_1_with_libvirts_name() {
    let fake = Fake::start(|_| Err(Refusal::new(Code::BlockCopyActive, "vda: a copy is under way")));
    let verbs: &[&[&str]] = &[
        &["mirror", "vda", "/t"],
        &["mirror", "vda", "/t", "--wait"],
        &["status", "vda"],
        &["pivot", "vda"],
        &["cancel", "vda"],
        &["pause", "vda"],
        &["resume", "vda"],
        &["set", "vda", "--speed", "0"],
        &["quit"],
        &["watch"],
    ];
    for words in verbs {
        let run = ask(&fake, words);
        assert_eq!(run.code, Some(1), "{words:?}");
        let expected = "blkmirror: vda: a copy is under way (BLOCK_COPY_ACTIVE)\n";
        assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", expected), "{words:?}");
    }
}

#[test]
fn waiting_ends_when_the_job_is_ready() {
    let looks = AtomicUsize::new(0);
    let fake = Fake::start(move |request| match request {
        Request::Mirror(_) => started(),
        _ => one(["seeding", "converging", "ready"][looks.fetch_add(1, Ordering::SeqCst).min(2)]),
    });
    let run = ask(&fake, &["mirror", "vda", "/images/new.raw", "--wait"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "vda: ready, target /images/new.raw\n"), "{run:?}");
    assert_eq!(fake.requests().len(), 4, "no look after it was ready");
}

#[test]
fn pivot_waits_for_ready_and_tries_again_when_the_guest_was_faster() {
    let tries = AtomicUsize::new(0);
    let fake = Fake::start(move |request| match request {
        Request::Mirror(_) => started(),
        Request::Pivot(_) if tries.fetch_add(1, Ordering::SeqCst) == 0 => {
            Err(Refusal::new(Code::BlockCopyActive, "12 MiB still to copy"))
        }
        Request::Pivot(_) => Ok(Reply::Done {}),
        _ => one("ready"),
    });
    let run = ask(&fake, &["mirror", "vda", "/t", "--pivot"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "vda: pivoted, serving /images/old.qcow2\n"), "{run:?}");
    let pivots = fake
        .calls()
        .into_iter()
        .filter(|call| call.request == Request::Pivot(PivotRequest::of("vda")))
        .collect::<Vec<_>>();
    assert!(pivots.len() == 2 && pivots.iter().all(|call| call.wait), "{pivots:?}");
}

#[test]
fn finish_never_gives_up_a_job_that_fell_behind() {
    let tries = AtomicUsize::new(0);
    let fake = Fake::start(move |request| match request {
        Request::Mirror(_) => started(),
        Request::Finish(_) if tries.fetch_add(1, Ordering::SeqCst) == 0 => {
            Err(Refusal::new(Code::BlockCopyActive, "12 MiB still to copy"))
        }
        Request::Finish(_) => Ok(Reply::Done {}),
        _ => one("ready"),
    });
    let run = ask(&fake, &["mirror", "vda", "/t", "--finish"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "vda: finished, /t is a copy of this instant\n"), "{run:?}");
    assert!(!fake.requests().iter().any(|request| matches!(request, Request::Cancel { .. })));
}

#[test]
fn a_job_that_ends_otherwise_is_a_failure() {
    for (phase, words) in
        [("failed", "the mirror failed: target is full"), ("cancelled", "somebody else ended the mirror")]
    {
        let fake = Fake::start(move |request| match request {
            Request::Mirror(_) => started(),
            _ => Ok(Reply::One(Box::new(Status { error: Some("target is full".into()), ..status(phase) }))),
        });
        let run = ask(&fake, &["mirror", "vda", "/t", "--wait"]);
        assert!(run.code == Some(1) && run.stdout.is_empty() && run.stderr.contains(words), "{run:?}");
    }
}

#[test]
fn status_in_json_is_an_object_for_one_and_an_array_for_all() {
    let fake = Fake::start(|request| match request {
        Request::Status(Some(_)) => one("converging"),
        _ => Ok(Reply::All(vec![status("none"), status("ready")])),
    });
    let run = ask(&fake, &["status", "vda", "--json"]);
    let one: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    let fields = [
        "export",
        "serving",
        "phase",
        "paused",
        "job",
        "mode",
        "total_bytes",
        "copied_bytes",
        "remaining_bytes",
        "dirty_bytes",
        "speed_bytes_per_s",
        "eta_s",
        "source",
        "target",
        "error",
        "data_bytes",
        "redundancy",
        "copy_rate_bytes_per_s",
        "dirty_rate_bytes_per_s",
        "guest_rate_bytes_per_s",
        "guest_delay_us",
        "eta_low_s",
        "eta_high_s",
        "lag_bytes",
        "lag_s",
    ];
    for field in fields {
        assert!(one.get(field).is_some(), "{field} in {}", run.stdout);
    }
    assert_eq!((one["mode"].as_str(), one["error"].is_null()), (Some("background"), true));
    let all: serde_json::Value = serde_json::from_str(&ask(&fake, &["status", "--json"]).stdout).unwrap();
    assert_eq!((all[0]["phase"].as_str(), all[1]["phase"].as_str()), (Some("none"), Some("ready")));
}

#[test]
fn status_for_people_is_a_few_lines() {
    let fake = Fake::start(|request| match request {
        Request::Status(Some(_)) => one("converging"),
        _ => Ok(Reply::All(vec![status("converging")])),
    });
    let run = ask(&fake, &["status", "vda"]);
    let expected = "\
export    vda
phase     converging
serving   /images/old.qcow2
job       vda
source    /images/old.qcow2
target    /images/new.raw
copied    3.00 MiB of 4.00 MiB (75.0 %)
remaining 1.00 MiB, 2 s
rate      0 B/s copied; guest writes 0 B/s, dirties 0 B/s
speed     no limit, mode background
";
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), expected));
    let run = ask(&fake, &["status"]);
    let expected = "\
EXPORT  PHASE       COPIED      LEFT  SERVING
vda     converging  75.0 %  1.00 MiB  /images/old.qcow2
";
    assert_eq!(run.stdout, expected);
}

#[test]
fn the_short_verbs_say_what_was_done() {
    let fake = Fake::start(|request| match request {
        Request::Status(_) => one("pivoted"),
        _ => Ok(Reply::Done {}),
    });
    let vda = || String::from("vda");
    let cases: [(&[&str], &str, Request); 11] = [
        (
            &["pivot", "vda", "--verified", "--keep-source", "--back"],
            "vda: pivoted, serving /images/old.qcow2\n",
            Request::Pivot(PivotRequest { export: vda(), verified: true, keep_source: true, back: true }),
        ),
        (&["commit", "vda"], "vda: committed, serving /images/old.qcow2\n", Request::Commit(vda())),
        (&["verify", "vda"], "vda: the target is being read back\n", Request::Verify(vda())),
        (&["pivot", "vda"], "vda: pivoted, serving /images/old.qcow2\n", Request::Pivot(PivotRequest::of(vda()))),
        (
            &["cancel", "vda"],
            "vda: cancelled, serving /images/old.qcow2\n",
            Request::Cancel { export: vda(), force: false },
        ),
        (
            &["cancel", "vda", "--force"],
            "vda: cancelled, serving /images/old.qcow2\n",
            Request::Cancel { export: vda(), force: true },
        ),
        (&["pause", "vda"], "vda: paused\n", Request::Pause(vda())),
        (&["resume", "vda"], "vda: goes on\n", Request::Resume(vda())),
        (
            &["set", "vda", "--speed", "2G"],
            "vda: changed\n",
            Request::Set { export: vda(), changes: Changes { speed: Some(2 << 30), ..Changes::default() } },
        ),
        (
            &["set", "vda", "--mode", "background"],
            "vda: changed\n",
            Request::Set { export: vda(), changes: Changes { mode: Some(Mode::Background), ..Changes::default() } },
        ),
        (
            &[
                "set",
                "vda",
                "--on-target-error",
                "back-off",
                "--on-source-error",
                "stop",
                "--max-pause",
                "9",
                "--buf-size",
                "4M",
            ],
            "vda: changed\n",
            Request::Set {
                export: vda(),
                changes: Changes {
                    on_target_error: Some(OnError::BackOff),
                    on_source_error: Some(OnError::Stop),
                    pause_budget: Some(9),
                    buf_size: Some(4 << 20),
                    ..Changes::default()
                },
            },
        ),
    ];
    for (words, expected, request) in cases {
        let run = ask(&fake, words);
        assert_eq!((run.code, run.stdout.as_str(), run.stderr.as_str()), (Some(0), expected, ""), "{words:?}");
        assert!(fake.requests().contains(&request), "{words:?}");
    }
}

#[test]
fn quit_returns_when_the_daemon_has_gone() {
    let fake = Fake::start(|_| Ok(Reply::Done {}));
    let run = ask(&fake, &["quit"]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{}: the daemon has ended\n", fake.path())));
    assert_eq!(fake.requests(), [Request::Quit]);
}

#[test]
fn watch_tells_each_change_once_and_that_the_daemon_went() {
    let looks = AtomicUsize::new(0);
    let fake = Fake::start(move |_| match looks.fetch_add(1, Ordering::SeqCst) {
        0 | 1 => one("converging"),
        2 => one("ready"),
        _ => Err(Refusal::new(Code::OperationFailed, "enough")),
    });
    let run = ask(&fake, &["watch", "vda"]);
    assert_eq!(run.stdout, "vda  converging  75.0 %  1.00 MiB, 2 s left\nvda  ready  75.0 %  1.00 MiB left\n");
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), "blkmirror: enough (OPERATION_FAILED)\n"));
}

#[test]
fn a_daemon_that_hangs_up_is_told() {
    let fake = Fake::that_hangs_up();
    let run = ask(&fake, &["pivot", "vda"]);
    let expected = format!("blkmirror: {}: the daemon hung up: its log says why\n", fake.path());
    assert_eq!((run.code, run.stderr), (Some(1), expected));
}

#[test]
fn sizes_are_understood_wherever_one_is_asked_for() {
    let fake =
        Fake::start(|request| if matches!(request, Request::Mirror(_)) { started() } else { Ok(Reply::Done {}) });
    for (text, bytes) in [("65536", 65536), ("64K", 64 << 10), ("64k", 64 << 10), ("16M", 16 << 20), ("1G", 1 << 30)] {
        let options = format!("cluster_size={text}");
        let words = ["mirror", "vda", "/t", "--speed", text, "--granularity", text, "-o", &options];
        assert_eq!(ask(&fake, &words).code, Some(0), "{text}");
        assert_eq!(ask(&fake, &["set", "vda", "--speed", text]).code, Some(0), "{text}");
        let [.., Request::Mirror(mirror), Request::Set { changes: Changes { speed, .. }, .. }] = &fake.requests()[..]
        else {
            panic!("{text}")
        };
        let found = (mirror.speed, mirror.granularity, mirror.options.cluster_size, *speed);
        assert_eq!(found, (bytes, bytes, Some(bytes), Some(bytes)), "{text}");
    }
    for (text, reason) in [
        ("1.5G", "expected bytes as a whole number, K, M, G or T behind it"),
        ("10MB", "expected bytes as a whole number, K, M, G or T behind it"),
        ("99999999T", "more than 64 bits of bytes"),
    ] {
        for words in [&["set", "vda", "--speed", text][..], &["mirror", "vda", "/t", "--granularity", text]] {
            let run = ask(&fake, words);
            let told = format!("error: invalid value '{text}' for '{} <", words[words.len() - 2]);
            assert!(run.code == Some(2) && run.stderr.starts_with(&told) && run.stderr.contains(reason), "{run:?}");
        }
        let run = blkmirror(&["demo", "--size", text]);
        assert!(run.code == Some(2) && run.stderr.contains(reason), "{run:?}");
    }
}
