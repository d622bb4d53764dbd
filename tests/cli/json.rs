//! What programs read: results and failures as JSON, and events.
use crate::fake::Fake;
use crate::{ask, blkmirror, one, started, status};
use engine::control::jobs::{ErrorAction, IoStatus, JobInfo, JobStatus};
use engine::control::{Code, Event, Refusal, Reply, Request};
use serde_json::{Value, json};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Everything on stdout as one value.
#[track_caller]
fn object(run: &crate::Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"))
}

#[test]
fn every_verb_that_asks_a_daemon_answers_in_json() {
    let fake = Fake::start(|request| match request {
        Request::Mirror(_) => started(),
        Request::Status(_) => one("ready"),
        _ => Ok(Reply::Done {}),
    });
    let serving = "/images/old.qcow2";
    let mirror = |result: &str| {
        let notes = ["the source has no backing: a full copy"];
        json!({ "export": "vda", "job": "vda", "target": "/t", "result": result, "notes": notes })
    };
    let cases: [(&[&str], Value); 13] = [
        (&["mirror", "vda", "/t"], mirror("started")),
        (&["mirror", "vda", "/t", "--dry-run"], mirror("possible")),
        (&["mirror", "vda", "/t", "--wait"], mirror("ready")),
        (&["mirror", "vda", "/t", "--pivot"], mirror("pivoted")),
        (&["mirror", "vda", "/t", "--finish"], mirror("finished")),
        (&["pivot", "vda"], json!({ "export": "vda", "result": "pivoted", "serving": serving })),
        (&["verify", "vda"], json!({ "export": "vda", "result": "verifying", "verified_bytes": 0, "mismatches": 0 })),
        (&["commit", "vda"], json!({ "export": "vda", "result": "committed", "serving": serving })),
        (&["cancel", "vda"], json!({ "export": "vda", "result": "cancelled", "serving": serving })),
        (&["pause", "vda"], json!({ "export": "vda", "result": "paused" })),
        (&["resume", "vda"], json!({ "export": "vda", "result": "resumed" })),
        (&["set", "vda", "--speed", "1M"], json!({ "export": "vda", "result": "changed" })),
        (&["quit"], json!({ "control": fake.path(), "result": "ended" })),
    ];
    for (words, expected) in cases {
        let run = ask(&fake, &[words, &["--json"]].concat());
        assert_eq!((run.code, object(&run), run.stderr.as_str()), (Some(0), expected, ""), "{words:?}");
    }
}

#[test]
fn a_failure_is_an_object_on_stderr_and_nothing_on_stdout() {
    let fake = Fake::start(|_| Err(Refusal::new(Code::BlockCopyActive, "vda: a copy is under way")));
    let verbs: &[&[&str]] = &[
        &["mirror", "vda", "/t"],
        &["status"],
        &["pivot", "vda"],
        &["cancel", "vda"],
        &["pause", "vda"],
        &["set", "vda", "--speed", "0"],
        &["watch"],
        &["quit"],
    ];
    for words in verbs {
        let run = ask(&fake, &[words, &["--json"][..]].concat());
        let expected = r#"{"code":"BLOCK_COPY_ACTIVE","error":"vda: a copy is under way","exit":1}"#;
        assert_eq!((run.code, run.stdout, run.stderr), (Some(1), String::new(), format!("{expected}\n")), "{words:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let none = folder.path().join("none").to_str().unwrap().to_owned();
    for (words, exit) in [
        (&["info", &none][..], 1),
        (&["map", &none], 1),
        (&["check", &none], 1),
        (&["compare", &none, &none], 2),
        (&["convert", &none, "/none/t"], 1),
        (&["events", "--control", &none], 1),
    ] {
        let run = blkmirror(&[words, &["--json"]].concat());
        let told: Value = serde_json::from_str(&run.stderr).unwrap_or_else(|error| panic!("{error}: {run:?}"));
        assert!(run.stdout.is_empty() && told["error"].as_str().is_some_and(|error| error.contains(&none)), "{run:?}");
        assert_eq!((run.code, told["exit"].as_i64(), &told["code"]), (Some(exit), Some(exit.into()), &Value::Null));
    }
}

#[test]
fn what_needs_no_daemon_answers_in_json_too() {
    let folder = tempfile::tempdir().unwrap();
    let name = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let [a, b, longer] = ["a.raw", "b.qcow2", "longer.raw"].map(name);
    let mut bytes = vec![0; 1 << 20];
    bytes[300_000..500_000].fill(7);
    fs::write(&a, &bytes).unwrap();
    let run = blkmirror(&["convert", &a, &b, "--source-format", "raw", "--format", "qcow2", "--json"]);
    let told = object(&run);
    assert_eq!((run.code, run.stderr.as_str(), &told["target"]), (Some(0), "", &json!(b)));
    assert!(told["copied_bytes"].as_u64() > Some(0) && told["bytes_per_s"].is_u64(), "{told}");
    assert!(told["seconds"].is_f64() && told["notes"].is_array(), "{told}");

    let compare = |words: &[&str]| {
        let run = blkmirror(&[&["compare", "--json"], words].concat());
        assert_eq!(run.stderr, "");
        (run.code, object(&run))
    };
    assert_eq!(compare(&[&a, &b]), (Some(0), json!({ "result": "same" })));
    assert_eq!(compare(&[&a, &b, "--strict"]), (Some(1), json!({ "result": "mapping-differs", "offset": 0 })));
    fs::write(&longer, [&bytes[..], &[0; 4096]].concat()).unwrap();
    let sizes = json!({ "result": "sizes-differ", "sizes": [1_048_576, 1_052_672] });
    assert_eq!(compare(&[&a, &longer, "--strict"]), (Some(1), sizes));
    bytes[400_000] = 8;
    fs::write(&a, bytes).unwrap();
    assert_eq!(compare(&[&a, &b]), (Some(1), json!({ "result": "content-differs", "offset": 400_000 })));
}

#[test]
fn watch_is_a_line_of_json_for_each_change() {
    let looks = AtomicUsize::new(0);
    let fake = Fake::start(move |_| match looks.fetch_add(1, Ordering::SeqCst) {
        0 | 1 => one("converging"),
        2 => one("ready"),
        _ => Err(Refusal::new(Code::OperationFailed, "enough")),
    });
    let run = ask(&fake, &["watch", "vda", "--json"]);
    let phases: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(phases, ["converging", "ready"].map(|phase| serde_json::to_value(status(phase)).unwrap()));
    let expected = "{\"code\":\"OPERATION_FAILED\",\"error\":\"enough\",\"exit\":1}\n";
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), expected));
}

/// A job that becomes ready, and a target that fails it.
fn events() -> Vec<Event> {
    let phase = |phase: &str| {
        let job = JobInfo {
            id: "j".into(),
            stands: JobStatus::Ready,
            completing: false,
            complete: false,
            io_status: IoStatus::Ok,
            auto_finalize: true,
            auto_dismiss: true,
            at: Box::new(status(phase)),
        };
        Event::Job { job: Box::new(job), path: vec![JobStatus::Running, JobStatus::Ready] }
    };
    let error = Event::IoError {
        export: "vda".into(),
        job: "j".into(),
        target: true,
        action: ErrorAction::Report,
        message: "no space left".into(),
    };
    vec![phase("ready"), error]
}

#[test]
fn events_are_told_until_the_daemon_ends() {
    let fake = Fake::to_which_happen(events());
    let run = ask(&fake, &["events"]);
    let expected = "\
1970-01-01 01:00:00.000042 UTC JOB_STATUS_CHANGE id=j status=ready
1970-01-01 01:00:00.000042 UTC BLOCK_JOB_READY device=j len=4194304 offset=3145728 speed=0 type=mirror
1970-01-01 01:00:00.000042 UTC BLKMIRROR_PHASE export=vda job=j paused=false phase=ready
1970-01-01 02:00:00.000042 UTC BLOCK_JOB_ERROR action=report device=j export=vda message=\"no space left\" operation=write
";
    assert_eq!((run.code, run.stdout.as_str(), run.stderr.as_str()), (Some(0), expected, ""));

    let fake = Fake::to_which_happen(events());
    let run = ask(&fake, &["events", "--json"]);
    let told: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((run.code, told.len()), (Some(0), 4), "{run:?}");
    let phase = json!({ "export": "vda", "job": "j", "phase": "ready", "paused": false });
    let timestamp = json!({ "seconds": 3600, "microseconds": 42 });
    assert_eq!(told[2], json!({ "event": "BLKMIRROR_PHASE", "data": phase, "timestamp": timestamp }));
}
