//! Jobs as a client sees them: verbs, queries, events.
use super::{NOW, call, client, said, send};
use crate::control::jobs::{ErrorAction, IoStatus, JobInfo, JobStatus};
use crate::control::{Changes, Event, Mode, PivotRequest, Reply, Request, Status};
use serde_json::{Value, json};

/// The job `move` of the export `vda`.
fn job(stands: JobStatus, phase: &str) -> JobInfo {
    let at = Status {
        export: "vda".into(),
        phase: phase.into(),
        paused: matches!(stands, JobStatus::Paused | JobStatus::Standby),
        ..super::status(phase)
    };
    JobInfo {
        id: "move".into(),
        stands,
        completing: false,
        complete: false,
        io_status: IoStatus::Ok,
        auto_finalize: true,
        auto_dismiss: true,
        at: Box::new(at),
    }
}

fn moved(job: JobInfo, path: &[JobStatus]) -> Event {
    Event::Job { job: Box::new(job), path: path.to_vec() }
}

/// The job is ready.
pub fn ready() -> Event {
    moved(job(JobStatus::Ready, "ready"), &[JobStatus::Running, JobStatus::Ready])
}

/// The events that a client hears, as name and job status.
fn names(said: &[Value]) -> Vec<String> {
    let name = |event: &Value| match event["data"]["status"].as_str() {
        Some(status) => format!("{} {status}", event["event"].as_str().unwrap_or("")),
        None => event["event"].as_str().unwrap_or("").to_string(),
    };
    said.iter().map(name).collect()
}

/// What a client that has negotiated hears of these.
fn heard(events: &[Event]) -> Vec<Value> {
    let mut client = client();
    events.iter().for_each(|event| client.event(event, NOW));
    said(&mut client)
}

/// What a verb comes to for a job: a request, or an answer.
fn tell(name: &str, arguments: &Value, job: JobInfo) -> Result<Request, Value> {
    let mut client = client();
    let asked = send(&mut client, &json!({ "execute": name, "arguments": arguments }));
    assert_eq!(asked, call(Request::Jobs, false), "the job is looked for");
    client.answer(Ok(Reply::Jobs(vec![JobInfo { id: "other".into(), ..job.clone() }, job])));
    match client.next_call() {
        Some(call) => {
            assert!(!call.wait, "QEMU's verbs answer when they have begun");
            client.answer(Ok(Reply::Done {}));
            assert_eq!(said(&mut client), [json!({ "return": {} })]);
            Ok(call.request)
        }
        None => Err(said(&mut client).remove(0)),
    }
}

#[test]
fn qmp_verbs_begin_and_our_verbs_end() {
    let vda = || String::from("vda");
    let (device, id) = (json!({ "device": "move" }), json!({ "id": "move" }));
    let cancel = |force| Request::Cancel { export: vda(), force };
    for (name, arguments, stands, request) in [
        ("block-job-complete", &device, JobStatus::Ready, Request::Pivot(PivotRequest::of(vda()))),
        ("job-complete", &id, JobStatus::Ready, Request::Pivot(PivotRequest::of(vda()))),
        // Refused by the daemon, which says how much is left.
        ("job-complete", &id, JobStatus::Running, Request::Pivot(PivotRequest::of(vda()))),
        ("block-job-cancel", &device, JobStatus::Ready, cancel(false)),
        ("block-job-cancel", &json!({ "device": "move", "force": true }), JobStatus::Ready, cancel(true)),
        ("job-cancel", &id, JobStatus::Ready, cancel(true)),
        ("block-job-pause", &device, JobStatus::Running, Request::Pause(vda())),
        ("job-pause", &id, JobStatus::Ready, Request::Pause(vda())),
        ("block-job-resume", &device, JobStatus::Paused, Request::Resume(vda())),
        ("job-resume", &id, JobStatus::Standby, Request::Resume(vda())),
        (
            "block-job-set-speed",
            &json!({ "device": "move", "speed": 9 }),
            JobStatus::Running,
            Request::Set { export: vda(), changes: Changes { speed: Some(9), ..Changes::default() } },
        ),
        (
            "block-job-change",
            &json!({ "id": "move", "type": "mirror", "copy-mode": "write-blocking" }),
            JobStatus::Pending,
            Request::Set { export: vda(), changes: Changes { mode: Some(Mode::WriteBlocking), ..Changes::default() } },
        ),
        ("block-job-finalize", &id, JobStatus::Pending, Request::Finalize(vda())),
        ("job-finalize", &id, JobStatus::Pending, Request::Finalize(vda())),
        ("block-job-dismiss", &id, JobStatus::Concluded, Request::Dismiss("move".into())),
        ("job-dismiss", &id, JobStatus::Concluded, Request::Dismiss("move".into())),
    ] {
        assert_eq!(tell(name, arguments, job(stands, "ready")), Ok(request), "{name}");
    }
    let ours = [
        ("blkmirror-pivot", json!({ "export": "vda" }), Request::Pivot(PivotRequest::of(vda()))),
        (
            "blkmirror-pivot",
            json!({ "export": "vda", "verified": true, "keep-source": true, "back": true }),
            Request::Pivot(PivotRequest { export: vda(), verified: true, keep_source: true, back: true }),
        ),
        (
            "blkmirror-pivot-together",
            json!({ "exports": ["vda"], "verified": true }),
            Request::PivotTogether { exports: vec![vda()], verified: true },
        ),
        ("blkmirror-verify", json!({ "export": "vda", "wait": true }), Request::Verify(vda())),
        ("blkmirror-commit", json!({ "export": "vda" }), Request::Commit(vda())),
        ("blkmirror-cancel", json!({ "export": "vda" }), cancel(false)),
        ("blkmirror-finish", json!({ "export": "vda" }), Request::Finish(vda())),
        ("blkmirror-pause", json!({ "export": "vda" }), Request::Pause(vda())),
        ("blkmirror-resume", json!({ "export": "vda" }), Request::Resume(vda())),
        (
            "blkmirror-set",
            json!({ "export": "vda", "speed": 0 }),
            Request::Set { export: vda(), changes: Changes { speed: Some(0), ..Changes::default() } },
        ),
    ];
    for (name, arguments, request) in ours {
        let asked = send(&mut client(), &json!({ "execute": name, "arguments": arguments }));
        assert_eq!(asked, call(request, true), "{name}");
    }
}

#[test]
fn a_verb_at_the_wrong_time_is_refused_in_qemus_words() {
    let (device, id) = (json!({ "device": "move" }), json!({ "id": "move" }));
    for (name, arguments, stands, words) in [
        ("job-finalize", &id, JobStatus::Ready, "Job 'move' in state 'ready' cannot accept command verb 'finalize'"),
        ("job-dismiss", &id, JobStatus::Running, "Job 'move' in state 'running' cannot accept command verb 'dismiss'"),
        (
            "block-job-cancel",
            &device,
            JobStatus::Concluded,
            "Job 'move' in state 'concluded' cannot accept command verb 'cancel'",
        ),
        (
            "block-job-set-speed",
            &json!({ "device": "move", "speed": 1 }),
            JobStatus::Concluded,
            "Job 'move' in state 'concluded' cannot accept command verb 'set-speed'",
        ),
        (
            "block-job-complete",
            &device,
            JobStatus::Waiting,
            "Job 'move' in state 'waiting' cannot accept command verb 'complete'",
        ),
        ("job-pause", &id, JobStatus::Standby, "Job is already paused"),
        ("job-resume", &id, JobStatus::Ready, "Can't resume a job that was not paused"),
    ] {
        let error = json!({ "class": "GenericError", "code": "OPERATION_INVALID", "desc": words });
        assert_eq!(tell(name, arguments, job(stands, "ready")), Err(json!({ "error": error })), "{name}");
    }
}

#[test]
fn what_is_being_completed_can_be_completed_again() {
    let completing = JobInfo { completing: true, ..job(JobStatus::Ready, "ready") };
    let told = tell("block-job-complete", &json!({ "device": "move" }), completing);
    assert_eq!(told, Err(json!({ "return": {} })), "nothing is asked of the daemon");
}

#[test]
fn a_job_that_is_not_there_has_two_errors_as_in_qemu() {
    for (name, arguments, class, words) in [
        ("block-job-pause", json!({ "device": "none" }), "DeviceNotActive", "Block job 'none' not found"),
        ("block-job-dismiss", json!({ "id": "none" }), "DeviceNotActive", "Block job 'none' not found"),
        ("job-pause", json!({ "id": "none" }), "GenericError", "Job not found"),
    ] {
        let error = json!({ "class": class, "code": "INVALID_ARG", "desc": words });
        assert_eq!(tell(name, &arguments, job(JobStatus::Ready, "ready")), Err(json!({ "error": error })));
    }
}

#[test]
fn jobs_have_qemus_fields() {
    let mut client = client();
    assert_eq!(send(&mut client, &json!({ "execute": "query-block-jobs" })), call(Request::Jobs, false));
    let mut failed = JobInfo { auto_dismiss: false, ..job(JobStatus::Concluded, "failed") };
    failed.at.error = Some("gone".into());
    client.answer(Ok(Reply::Jobs(vec![job(JobStatus::Running, "converging"), failed.clone()])));
    let running = json!({
        "type": "mirror", "device": "move", "len": 100, "offset": 60, "speed": 7, "busy": true, "paused": false,
        "io-status": "ok", "ready": false, "status": "running", "auto-finalize": true, "auto-dismiss": true,
        "actively-synced": false,
    });
    let mut concluded = running.clone();
    concluded["busy"] = json!(false);
    concluded["status"] = json!("concluded");
    concluded["auto-dismiss"] = json!(false);
    concluded["error"] = json!("gone");
    assert_eq!(said(&mut client), [json!({ "return": [running, concluded] })]);

    send(&mut client, &json!({ "execute": "query-jobs" }));
    let mut paused = job(JobStatus::Standby, "ready");
    (paused.io_status, paused.at.error) = (IoStatus::Nospace, Some("no space".into()));
    let cancelled = job(JobStatus::Concluded, "cancelled");
    let copied = JobInfo { complete: true, ..cancelled.clone() };
    client.answer(Ok(Reply::Jobs(vec![paused, cancelled, copied])));
    let paused = json!({
        "id": "move", "type": "mirror", "status": "standby", "current-progress": 60, "total-progress": 100,
        "error": "no space",
    });
    let mut cancelled = paused.clone();
    cancelled["status"] = json!("concluded");
    cancelled["error"] = json!("Operation canceled");
    let mut copied = cancelled.clone();
    copied.as_object_mut().expect("an object").remove("error");
    assert_eq!(said(&mut client), [json!({ "return": [paused, cancelled, copied] })]);
}

#[test]
fn a_pivot_is_told_in_qemus_events() {
    use JobStatus::{Concluded, Created, Null, Pending, Ready, Running, Waiting};
    let said = heard(&[
        moved(job(Running, "seeding"), &[Null, Created, Running]),
        moved(job(Running, "converging"), &[Running]),
        moved(job(Ready, "ready"), &[Running, Ready]),
        moved(job(Waiting, "pivoting"), &[Ready, Waiting]),
        moved(JobInfo { complete: true, ..job(Concluded, "pivoted") }, &[Waiting, Pending, Concluded, Null]),
    ]);
    assert_eq!(
        names(&said),
        [
            "JOB_STATUS_CHANGE created",
            "JOB_STATUS_CHANGE running",
            "BLKMIRROR_PHASE",
            "BLKMIRROR_PHASE",
            "JOB_STATUS_CHANGE ready",
            "BLOCK_JOB_READY",
            "BLKMIRROR_PHASE",
            "JOB_STATUS_CHANGE waiting",
            "BLKMIRROR_PHASE",
            "JOB_STATUS_CHANGE pending",
            "BLOCK_JOB_COMPLETED",
            "JOB_STATUS_CHANGE concluded",
            "JOB_STATUS_CHANGE null",
            "BLKMIRROR_PHASE",
        ]
    );
    let ready = said.iter().find(|event| event["event"] == "BLOCK_JOB_READY").expect("it was named above");
    assert_eq!(ready["data"], json!({ "type": "mirror", "device": "move", "len": 100, "offset": 60, "speed": 7 }));
    assert_eq!(ready["timestamp"], json!({ "seconds": 1_700_000_000, "microseconds": 42 }));
}

#[test]
fn an_end_that_waits_is_told_and_a_job_that_is_dismissed_is_gone() {
    use JobStatus::{Concluded, Null, Pending, Ready, Waiting};
    let job = |stands, phase| JobInfo { auto_finalize: false, auto_dismiss: false, ..job(stands, phase) };
    let concluded = JobInfo { complete: true, ..job(Concluded, "pivoted") };
    let said = heard(&[
        moved(job(Pending, "ready"), &[Ready, Waiting, Pending]),
        moved(job(Pending, "pivoting"), &[Pending]),
        moved(concluded.clone(), &[Pending, Concluded]),
        moved(JobInfo { stands: Null, ..concluded }, &[Concluded, Null]),
    ]);
    assert_eq!(
        names(&said),
        [
            "JOB_STATUS_CHANGE waiting",
            "JOB_STATUS_CHANGE pending",
            "BLOCK_JOB_PENDING",
            "BLKMIRROR_PHASE",
            "BLKMIRROR_PHASE",
            "BLOCK_JOB_COMPLETED",
            "JOB_STATUS_CHANGE concluded",
            "BLKMIRROR_PHASE",
            "JOB_STATUS_CHANGE null",
        ]
    );
    assert_eq!(said[2]["data"], json!({ "type": "mirror", "id": "move" }));
}

#[test]
fn completed_cancelled_and_failed_are_distinct() {
    use JobStatus::{Aborting, Concluded, Ready};
    let mut failed = job(Concluded, "failed");
    failed.at.error = Some("target: no space".into());
    let mut ends = Vec::new();
    for job in [
        JobInfo { complete: true, ..job(Concluded, "cancelled") },
        job(Concluded, "cancelled"),
        failed,
        job(Concluded, "failed"),
    ] {
        let path = if job.complete { vec![Ready, Concluded] } else { vec![Ready, Aborting, Concluded] };
        let said = heard(&[moved(job, &path)]);
        let end = said.iter().find(|event| event["event"].as_str().is_some_and(|it| it.starts_with("BLOCK_JOB")));
        let end = end.expect("a job's end is told");
        ends.push((end["event"].as_str().unwrap_or("").to_string(), end["data"]["error"].clone()));
    }
    let expected = [
        ("BLOCK_JOB_COMPLETED", Value::Null),
        ("BLOCK_JOB_CANCELLED", Value::Null),
        ("BLOCK_JOB_COMPLETED", json!("target: no space")),
        ("BLOCK_JOB_COMPLETED", json!("the job failed")),
    ];
    assert_eq!(ends, expected.map(|(name, error)| (name.to_string(), error)));
}

#[test]
fn a_pause_of_a_ready_job_is_told_and_does_not_make_it_ready_again() {
    use JobStatus::{Ready, Standby, Waiting};
    let said = heard(&[
        ready(),
        moved(job(Standby, "ready"), &[Ready, Standby]),
        moved(job(Ready, "ready"), &[Standby, Ready]),
        // A pivot that was undone is another matter.
        moved(job(Ready, "ready"), &[Waiting, Ready]),
    ]);
    let names = names(&said);
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| *name != "BLKMIRROR_PHASE").collect();
    let expected = [
        "JOB_STATUS_CHANGE ready",
        "BLOCK_JOB_READY",
        "JOB_STATUS_CHANGE standby",
        "JOB_STATUS_CHANGE ready",
        "JOB_STATUS_CHANGE ready",
        "BLOCK_JOB_READY",
    ];
    assert_eq!(names, expected);
    let paused = said.iter().find(|event| event["data"]["paused"] == true).expect("the pause");
    assert_eq!(paused["data"], json!({ "export": "vda", "job": "move", "phase": "ready", "paused": true }));
}

#[test]
fn an_io_error_says_which_side_and_what_is_done() {
    let said = heard(&[Event::IoError {
        export: "vda".into(),
        job: "move".into(),
        target: true,
        action: ErrorAction::Stop,
        message: "no space".into(),
    }]);
    let data = json!({
        "device": "move", "operation": "write", "action": "stop", "export": "vda", "message": "no space",
    });
    assert_eq!(said[0]["data"], data);
}
