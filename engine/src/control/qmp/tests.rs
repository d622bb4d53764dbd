//! A client's session seen from both of its ends.
use super::{Call, Client, MESSAGE_LEN_MAX, OUTPUT_LEN_MAX};
use crate::control::creation::{Compat, CreateOptions, Preallocation};
use crate::control::{
    Code, Event, MirrorMap, MirrorRequest, Mode, OnError, Refusal, Reply, Request, Started, Status, TargetFormat,
};
use proptest::prelude::{any, proptest};
use serde_json::{Value, json};
use std::time::Duration;

const NOW: Duration = Duration::from_micros(1_700_000_000_000_042);

/// A client that has greeted and negotiated.
fn client() -> Client {
    let mut client = Client::new();
    said(&mut client);
    client.receive(b"{\"execute\": \"qmp_capabilities\"}\n");
    assert_eq!(client.next_call(), None);
    assert_eq!(said(&mut client), [json!({ "return": {} })]);
    client
}

/// Everything that waits to be sent, line by line.
fn said(client: &mut Client) -> Vec<Value> {
    let output = client.output().to_vec();
    client.sent(output.len());
    let text = String::from_utf8(output).expect("QMP is text");
    text.lines().map(|line| serde_json::from_str(line).expect("a line is one value")).collect()
}

/// What one command comes to: a call, or an answer without one.
fn send(client: &mut Client, message: &Value) -> Option<Call> {
    client.receive(message.to_string().as_bytes());
    client.next_call()
}

/// The error of a command that the daemon is not asked about.
fn error(message: &Value) -> Value {
    let mut client = client();
    assert_eq!(send(&mut client, message), None);
    let mut said = said(&mut client);
    assert_eq!(said.len(), 1, "one message, one answer");
    said[0]["error"].take()
}

fn call(request: Request, wait: bool) -> Option<Call> {
    Some(Call { request, wait })
}

fn status(phase: &str) -> Status {
    Status {
        export: "vda".into(),
        phase: phase.into(),
        job: Some("move".into()),
        mode: Some(Mode::WriteBlocking),
        total_bytes: 100,
        copied_bytes: 60,
        remaining_bytes: 40,
        speed_bytes_per_s: 7,
        ..Status::default()
    }
}

fn phase(phase: &str, complete: bool) -> Event {
    let status = Box::new(status(phase));
    Event::Phase { export: "vda".into(), job: "move".into(), phase: phase.into(), complete, status }
}

/// The events that a client hears, as name and job status.
fn names(said: &[Value]) -> Vec<String> {
    let name = |event: &Value| match event["data"]["status"].as_str() {
        Some(status) => format!("{} {status}", event["event"].as_str().unwrap_or("")),
        None => event["event"].as_str().unwrap_or("").to_string(),
    };
    said.iter().map(name).filter(|name| name != "BLKMIRROR_PHASE").collect()
}

#[test]
fn the_greeting_comes_first_and_commands_wait_for_the_capabilities() {
    let mut client = Client::new();
    client.event(&phase("ready", false), NOW);
    client
        .receive(br#"{"execute":"query-version","id":1}{"execute":"qmp_capabilities"}{"execute":"qmp_capabilities"}"#);
    assert_eq!(client.next_call(), None);
    let said = said(&mut client);
    assert_eq!(said.len(), 4, "no events before the capabilities");
    assert!(said[0]["QMP"]["version"]["qemu"]["major"].is_u64());
    assert_eq!(said[0]["QMP"]["capabilities"], json!([]));
    assert_eq!((said[1]["error"]["class"].as_str(), said[1]["id"].as_u64()), (Some("CommandNotFound"), Some(1)));
    assert_eq!(said[2], json!({ "return": {} }));
    assert_eq!(said[3]["error"]["class"], "CommandNotFound");
}

#[test]
fn capabilities_that_are_not_offered_are_refused() {
    let mut client = Client::new();
    said(&mut client);
    send(&mut client, &json!({ "execute": "qmp_capabilities", "arguments": { "enable": ["oob"] } }));
    assert_eq!(said(&mut client)[0]["error"]["class"], "GenericError");
    send(&mut client, &json!({ "execute": "qmp_capabilities", "arguments": { "enable": [] } }));
    assert_eq!(said(&mut client), [json!({ "return": {} })]);
}

#[test]
fn any_id_comes_back_with_answers_and_with_errors() {
    for id in [json!(7), json!("a"), json!(null), json!({ "x": [1, 2.5] })] {
        let mut client = client();
        send(&mut client, &json!({ "execute": "query-version", "id": id }));
        send(&mut client, &json!({ "execute": "nonsense", "id": id }));
        send(&mut client, &json!({ "execute": 5, "id": id }));
        let said = said(&mut client);
        assert_eq!(said.len(), 3);
        assert!(said.iter().all(|reply| reply.get("id") == Some(&id)), "{said:?}");
    }
}

#[test]
fn every_command_that_is_listed_is_known() {
    let mut client = client();
    send(&mut client, &json!({ "execute": "query-commands" }));
    let listed = said(&mut client)[0]["return"].take();
    let listed: Vec<&str> = listed.as_array().expect("a list").iter().filter_map(|it| it["name"].as_str()).collect();
    for name in
        ["drive-mirror", "query-block-jobs", "block-job-complete", "blkmirror-mirror", "quit", "qmp_capabilities"]
    {
        assert!(listed.contains(&name), "{name}");
    }
    for name in listed.into_iter().filter(|name| *name != "qmp_capabilities") {
        let reply = error(&json!({ "execute": name, "arguments": { "no such": 1 } }));
        assert_eq!(reply["class"], "GenericError", "{name}: {reply}");
        assert!(
            reply["desc"].as_str().is_some_and(|desc| desc.starts_with(name) && desc.contains("no such")),
            "{reply}"
        );
    }
}

#[test]
fn drive_mirror_means_the_same_as_in_qemu() {
    let mut client = client();
    let least = json!({ "device": "vda", "target": "/t", "sync": "full" });
    let request = MirrorRequest { export: "vda".into(), target: "/t".into(), ..MirrorRequest::default() };
    let asked = send(&mut client, &json!({ "execute": "drive-mirror", "arguments": least }));
    assert_eq!(asked, call(Request::Mirror(request), false));
    client.answer(Ok(Reply::Started(Started { job: "vda".into(), notes: vec![] })));
    assert_eq!(said(&mut client), [json!({ "return": {} })]);

    let all = json!({
        "device": "vda", "target": "/t", "format": "raw", "sync": "top", "mode": "existing", "speed": 5,
        "granularity": 65536, "buf-size": 1, "on-source-error": "report", "on-target-error": "enospc",
        "copy-mode": "write-blocking", "unmap": true, "job-id": "j", "auto-finalize": true, "auto-dismiss": true,
        "options": { "cluster-size": 4096, "compat": "0.10" },
    });
    let request = MirrorRequest {
        export: "vda".into(),
        target: "/t".into(),
        shallow: true,
        reuse_external: true,
        format: Some(TargetFormat::Raw),
        mode: Mode::WriteBlocking,
        speed: 5,
        granularity: 65536,
        on_target_error: OnError::Enospc,
        dry_run: false,
        job_id: Some("j".into()),
        options: CreateOptions { cluster_size: Some(4096), compat: Some(Compat::V2), ..CreateOptions::default() },
    };
    let asked = send(&mut client, &json!({ "execute": "drive-mirror", "arguments": all }));
    assert_eq!(asked, call(Request::Mirror(request), false));
}

#[test]
fn what_drive_mirror_cannot_do_is_refused_by_name() {
    let cases = [
        ("sync", json!("none")),
        ("on-source-error", json!("stop")),
        ("unmap", json!(false)),
        ("auto-dismiss", json!(false)),
        ("auto-finalize", json!(false)),
    ];
    for (name, value) in cases {
        let mut arguments = json!({ "device": "vda", "target": "/t", "sync": "full" });
        arguments[name] = value;
        let error = error(&json!({ "execute": "drive-mirror", "arguments": arguments }));
        assert_eq!(error["code"], "OPERATION_UNSUPPORTED");
        assert!(error["desc"].as_str().is_some_and(|desc| desc.contains(name)), "{error}");
    }
}

#[test]
fn our_own_mirror_takes_every_member_of_the_request() {
    let request = MirrorRequest {
        export: "vda".into(),
        target: "/t".into(),
        shallow: true,
        reuse_external: true,
        format: Some(TargetFormat::Qcow2),
        mode: Mode::Background,
        speed: 1 << 40,
        granularity: 512,
        on_target_error: OnError::Ignore,
        dry_run: true,
        job_id: Some("j".into()),
        options: CreateOptions { preallocation: Some(Preallocation::Falloc), ..CreateOptions::default() },
    };
    let mut client = client();
    let asked = send(&mut client, &json!({ "execute": "blkmirror-mirror", "arguments": request }));
    assert_eq!(asked, call(Request::Mirror(request), true));
    client.answer(Ok(Reply::Started(Started { job: "j".into(), notes: vec!["n".into()] })));
    assert_eq!(said(&mut client), [json!({ "return": { "job": "j", "notes": ["n"] } })]);
    let error = error(&json!({ "execute": "blkmirror-mirror", "arguments": { "export": "vda" } }));
    assert!(error["desc"].as_str().is_some_and(|desc| desc.contains("target")), "{error}");
}

#[test]
fn qmp_verbs_begin_and_our_verbs_end() {
    let vda = || String::from("vda");
    let of_job = [
        ("block-job-complete", json!({ "device": "move" }), Request::Pivot(vda())),
        ("job-complete", json!({ "id": "move" }), Request::Pivot(vda())),
        ("block-job-cancel", json!({ "device": "move" }), Request::Cancel { export: vda(), force: false }),
        (
            "block-job-cancel",
            json!({ "device": "move", "force": true }),
            Request::Cancel { export: vda(), force: true },
        ),
        ("job-cancel", json!({ "id": "move" }), Request::Cancel { export: vda(), force: true }),
        ("block-job-pause", json!({ "device": "move" }), Request::Pause(vda())),
        ("block-job-resume", json!({ "device": "move" }), Request::Resume(vda())),
        (
            "block-job-set-speed",
            json!({ "device": "move", "speed": 9 }),
            Request::Set { export: vda(), speed: Some(9), mode: None },
        ),
        (
            "block-job-change",
            json!({ "id": "move", "type": "mirror", "copy-mode": "write-blocking" }),
            Request::Set { export: vda(), speed: None, mode: Some(Mode::WriteBlocking) },
        ),
    ];
    for (name, arguments, request) in of_job {
        let mut client = client();
        let asked = send(&mut client, &json!({ "execute": name, "arguments": arguments }));
        assert_eq!(asked, call(Request::Status(None), false), "the job's export is looked for");
        client.answer(Ok(Reply::All(vec![Status::default(), status("ready")])));
        assert_eq!(client.next_call(), call(request, false), "{name}");
        client.answer(Ok(Reply::Done {}));
        assert_eq!(said(&mut client), [json!({ "return": {} })]);
    }
    let ours = [
        ("blkmirror-pivot", json!({ "export": "vda" }), Request::Pivot(vda())),
        ("blkmirror-cancel", json!({ "export": "vda" }), Request::Cancel { export: vda(), force: false }),
        ("blkmirror-finish", json!({ "export": "vda" }), Request::Finish(vda())),
        ("blkmirror-pause", json!({ "export": "vda" }), Request::Pause(vda())),
        ("blkmirror-resume", json!({ "export": "vda" }), Request::Resume(vda())),
        ("blkmirror-abort", json!({ "export": "vda", "flags": 2 }), Request::Pivot(vda())),
        (
            "blkmirror-set",
            json!({ "export": "vda", "speed": 0 }),
            Request::Set { export: vda(), speed: Some(0), mode: None },
        ),
    ];
    for (name, arguments, request) in ours {
        let asked = send(&mut client(), &json!({ "execute": name, "arguments": arguments }));
        assert_eq!(asked, call(request, true), "{name}");
    }
}

#[test]
fn a_job_that_is_not_under_way_is_not_active() {
    for phase in ["none", "pivoted", "cancelled", "failed"] {
        let mut client = client();
        send(&mut client, &json!({ "execute": "block-job-pause", "arguments": { "device": "move" } }));
        client.answer(Ok(Reply::All(vec![status(phase)])));
        assert_eq!(client.next_call(), None);
        assert_eq!(said(&mut client)[0]["error"]["class"], "DeviceNotActive");
    }
}

#[test]
fn a_refusal_keeps_libvirts_name() {
    let mut client = client();
    send(&mut client, &json!({ "execute": "blkmirror-pivot", "arguments": { "export": "vda" }, "id": 3 }));
    client.answer(Err(Refusal::new(Code::BlockCopyActive, "12 MiB still to copy")));
    let error = json!({ "class": "GenericError", "code": "BLOCK_COPY_ACTIVE", "desc": "12 MiB still to copy" });
    assert_eq!(said(&mut client), [json!({ "error": error, "id": 3 })]);
}

#[test]
fn answers_come_in_the_order_of_the_commands() {
    let mut client = client();
    client.receive(
        br#"{"execute":"blkmirror-pivot","arguments":{"export":"vda"},"id":1}{"execute":"query-version","id":2}"#,
    );
    assert!(client.next_call().is_some());
    assert_eq!(client.next_call(), None, "one at a time");
    assert!(client.is_answering() && said(&mut client).is_empty());
    client.answer(Ok(Reply::Done {}));
    assert_eq!(client.next_call(), None);
    let ids: Vec<_> = said(&mut client).iter().map(|reply| reply["id"].as_u64()).collect();
    assert_eq!(ids, [Some(1), Some(2)]);
}

#[test]
fn block_jobs_have_qemus_fields() {
    let mut client = client();
    assert_eq!(send(&mut client, &json!({ "execute": "query-block-jobs" })), call(Request::Status(None), false));
    let mut failed = status("failed");
    failed.error = Some("gone".into());
    client.answer(Ok(Reply::All(vec![status("converging"), failed, Status::default()])));
    let job = json!({
        "type": "mirror", "device": "move", "len": 100, "offset": 60, "speed": 7, "busy": true, "paused": false,
        "io-status": "ok", "ready": false, "status": "running", "auto-finalize": true, "auto-dismiss": true,
        "actively-synced": false,
    });
    assert_eq!(said(&mut client), [json!({ "return": [job] })]);

    send(&mut client, &json!({ "execute": "query-jobs" }));
    let mut paused = status("ready");
    (paused.paused, paused.error) = (true, Some("no space".into()));
    client.answer(Ok(Reply::All(vec![paused])));
    let job = json!({
        "id": "move", "type": "mirror", "status": "standby", "current-progress": 60, "total-progress": 100,
        "error": "no space",
    });
    assert_eq!(said(&mut client), [json!({ "return": [job] })]);
}

#[test]
fn a_status_is_an_object_for_one_and_an_array_for_all() {
    let mut client = client();
    let asked = send(&mut client, &json!({ "execute": "blkmirror-status", "arguments": { "export": "vda" } }));
    assert_eq!(asked, call(Request::Status(Some("vda".into())), true));
    client.answer(Ok(Reply::One(Box::new(status("ready")))));
    assert_eq!(said(&mut client)[0]["return"]["remaining_bytes"], 40);
    send(&mut client, &json!({ "execute": "blkmirror-status" }));
    client.answer(Ok(Reply::All(vec![status("ready")])));
    assert_eq!(said(&mut client)[0]["return"][0]["phase"], "ready");
}

#[test]
fn a_pivot_is_told_in_qemus_events() {
    let mut client = client();
    for (name, complete) in
        [("seeding", false), ("converging", false), ("ready", false), ("pivoting", false), ("pivoted", true)]
    {
        client.event(&phase(name, complete), NOW);
    }
    let said = said(&mut client);
    assert_eq!(
        names(&said),
        [
            "JOB_STATUS_CHANGE created",
            "JOB_STATUS_CHANGE running",
            "JOB_STATUS_CHANGE ready",
            "BLOCK_JOB_READY",
            "JOB_STATUS_CHANGE waiting",
            "JOB_STATUS_CHANGE pending",
            "JOB_STATUS_CHANGE concluded",
            "JOB_STATUS_CHANGE null",
            "BLOCK_JOB_COMPLETED",
        ]
    );
    let ready = said.iter().find(|event| event["event"] == "BLOCK_JOB_READY").expect("it was named above");
    assert_eq!(ready["data"], json!({ "type": "mirror", "device": "move", "len": 100, "offset": 60, "speed": 7 }));
    assert_eq!(ready["timestamp"], json!({ "seconds": 1_700_000_000, "microseconds": 42 }));
}

#[test]
fn completed_cancelled_and_failed_are_distinct() {
    let mut ends = Vec::new();
    for (name, complete) in [("cancelled", true), ("cancelled", false), ("failed", false)] {
        let mut client = client();
        client.event(&phase(name, complete), NOW);
        let said = said(&mut client);
        let end = said.iter().find(|event| event["event"].as_str().is_some_and(|it| it.starts_with("BLOCK_JOB")));
        let end = end.expect("a job's end is told");
        ends.push((end["event"].as_str().unwrap_or("").to_string(), end["data"]["error"].is_string()));
    }
    let expected = [("BLOCK_JOB_COMPLETED", false), ("BLOCK_JOB_CANCELLED", false), ("BLOCK_JOB_COMPLETED", true)];
    assert_eq!(ends, expected.map(|(name, error)| (name.to_string(), error)));
}

#[test]
fn a_pause_of_a_ready_job_is_told_and_does_not_make_it_ready_again() {
    let mut client = client();
    let mut paused = status("ready");
    paused.paused = true;
    let pause = Event::Phase {
        export: "vda".into(),
        job: "move".into(),
        phase: "ready".into(),
        complete: false,
        status: paused.into(),
    };
    for event in [phase("ready", false), pause, phase("ready", false)] {
        client.event(&event, NOW);
    }
    let expected =
        ["JOB_STATUS_CHANGE ready", "BLOCK_JOB_READY", "JOB_STATUS_CHANGE standby", "JOB_STATUS_CHANGE ready"];
    assert_eq!(names(&said(&mut client)), expected);
}

#[test]
fn an_io_error_says_which_side_and_what_is_done() {
    let mut client = client();
    client.event(
        &Event::IoError {
            export: "vda".into(),
            job: "move".into(),
            target: true,
            action: "stop".into(),
            message: "no space".into(),
        },
        NOW,
    );
    let data = json!({
        "device": "move", "operation": "write", "action": "stop", "export": "vda", "message": "no space",
    });
    assert_eq!(said(&mut client)[0]["data"], data);
}

#[test]
fn hostile_messages_get_an_error_each() {
    let nested = format!("{{\"execute\":{}", "[".repeat(60_000));
    let nested_id = format!("{{\"execute\":\"quit\",\"id\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
    let cases: &[&[u8]] = &[
        b"nonsense",
        b"[]",
        b"{}",
        b"}",
        b"\"text\"",
        b"{\"execute\":\"quit\"",
        b"{\"execute\":\"query-version\",\"id\":1e999}",
        b"{\"execute\":\"qu\0it\"}",
        b"{\"execute\":\"\xff\xfe\"}",
        b"\0",
        b"{\"execute\":\"query-version\",\"control\":{}}",
        b"{\"execute\":\"query-version\",\"arguments\":[]}",
        b"{\"execute\":\"block-job-pause\",\"arguments\":{\"device\":\"a\\u0000b\"}}",
        b"{\"execute\":\"block-job-set-speed\",\"arguments\":{\"device\":\"a\",\"speed\":99999999999999999999999}}",
        b"{\"execute\":\"block-job-set-speed\",\"arguments\":{\"device\":\"a\",\"speed\":-1}}",
        b"{\"execute\":\"block-job-set-speed\",\"arguments\":{\"device\":\"a\",\"speed\":1.5}}",
        b"{\"exec-oob\":\"quit\"}",
        nested.as_bytes(),
        nested_id.as_bytes(),
    ];
    for bytes in cases {
        let mut client = client();
        client.receive(bytes);
        client.receive(b"\n");
        assert_eq!(client.next_call(), None, "{}", String::from_utf8_lossy(&bytes[..bytes.len().min(80)]));
        let said = said(&mut client);
        assert_eq!(said.len(), 1, "{}", String::from_utf8_lossy(&bytes[..bytes.len().min(80)]));
        assert!(said[0]["error"]["desc"].is_string());
        send(&mut client, &json!({ "execute": "query-version" }));
        assert!(self::said(&mut client)[0]["return"].is_object(), "the session goes on");
    }
}

#[test]
fn an_unknown_name_is_not_echoed_at_length() {
    let error = error(&json!({ "execute": "x".repeat(60_000) }));
    assert!(error["desc"].as_str().is_some_and(|desc| desc.len() < 200));
}

#[test]
fn a_client_that_does_not_read_is_asked_for_no_more_and_then_lost() {
    let mut client = client();
    let mut rounds = 0;
    while client.wants_input() {
        send(&mut client, &json!({ "execute": "query-commands" }));
        rounds += 1;
        assert!(rounds < 10_000, "input goes on for ever");
    }
    assert!(!client.is_lost(), "its own commands alone do not lose a client");
    let unread = client.output().len();
    send(&mut client, &json!({ "execute": "query-commands" }));
    assert_eq!(client.output().len(), unread, "nothing is answered while answers wait");
    while !client.is_lost() {
        client.event(&phase("ready", false), NOW);
        assert!(client.output().len() <= OUTPUT_LEN_MAX);
    }
    assert_eq!(client.next_call(), None);
}

#[test]
fn commands_that_waited_for_the_client_to_read_are_answered_then() {
    let mut client = client();
    while client.wants_input() {
        send(&mut client, &json!({ "execute": "query-commands" }));
    }
    assert_eq!(send(&mut client, &json!({ "execute": "quit" })), None);
    client.sent(client.output().len());
    assert_eq!(client.next_call(), call(Request::Quit, false));
}

#[test]
fn a_long_message_is_an_error() {
    let mut client = client();
    client.receive(&vec![b'x'; MESSAGE_LEN_MAX * 2]);
    client.receive(b"\n");
    assert_eq!(client.next_call(), None);
    assert_eq!(said(&mut client).len(), 1);
}

proptest! {
    /// Whatever comes, each answer is one valid line and the session stays usable.
    #[test]
    fn no_bytes_break_the_session(bytes in proptest::collection::vec(any::<u8>(), 0..600), cut in 0usize..600) {
        let mut client = client();
        let (head, tail) = bytes.split_at(cut.min(bytes.len()));
        for part in [head, tail, b"\n"] {
            client.receive(part);
            while client.next_call().is_some() {
                client.answer(Ok(Reply::Done {}));
            }
        }
        for reply in said(&mut client) {
            assert!(reply.get("error").is_some() || reply.get("return").is_some());
        }
        send(&mut client, &json!({ "execute": "query-version" }));
        assert!(said(&mut client)[0]["return"].is_object());
    }
}

#[test]
fn a_map_has_as_many_parts_as_were_asked_for() {
    let map = |arguments: Value| json!({ "execute": "blkmirror-map", "arguments": arguments });
    for (arguments, cells) in [
        (json!({ "export": "vda" }), 256),
        (json!({ "export": "vda", "cells": 1 }), 1),
        (json!({ "export": "vda", "cells": 4096 }), 4096),
    ] {
        let wanted = Request::Map { export: "vda".into(), cells };
        assert_eq!(send(&mut client(), &map(arguments)), call(wanted, true));
    }
    for cells in [0, 4097] {
        let expected = format!("blkmirror-map: argument 'cells': {cells} is not from 1 to 4096");
        assert_eq!(error(&map(json!({ "export": "vda", "cells": cells })))["desc"], expected);
    }
    let mut client = client();
    send(&mut client, &map(json!({ "export": "vda" })));
    let (export, job) = ("vda".to_owned(), "move".to_owned());
    let lists = |number| vec![number; 4096];
    client.answer(Ok(Reply::Map(MirrorMap {
        export,
        job,
        size_bytes: 1 << 40,
        chunk_bytes: 65536,
        chunks: lists(4096),
        copied: lists(4000),
        dirty: lists(90),
        copying: lists(6),
    })));
    assert!(!client.is_lost(), "the longest answer has room");
    let answer = said(&mut client)[0]["return"].take();
    let lens = ["chunks", "copied", "dirty", "copying"].map(|list| answer[list].as_array().map(Vec::len));
    assert_eq!((lens, answer["size_bytes"].as_u64()), ([Some(4096); 4], Some(1 << 40)));
}
