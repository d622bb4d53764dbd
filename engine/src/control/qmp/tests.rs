//! A client's session seen from both of its ends.
mod jobs;

use super::{Call, Client, MESSAGE_LEN_MAX, OUTPUT_LEN_MAX};
use crate::control::creation::{Compat, CreateOptions, Preallocation};
use crate::control::{
    Code, MirrorMap, MirrorRequest, Mode, OnError, PivotRequest, Refusal, Reply, Request, Started, Status, TargetFormat,
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

#[test]
fn the_greeting_comes_first_and_commands_wait_for_the_capabilities() {
    let mut client = Client::new();
    client.event(&jobs::ready(), NOW);
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
    // Where nothing is said of errors, QEMU's word counts and not our own.
    let (export, target) = ("vda".into(), "/t".into());
    let request = MirrorRequest { export, target, on_target_error: OnError::Report, ..MirrorRequest::default() };
    let asked = send(&mut client, &json!({ "execute": "drive-mirror", "arguments": least }));
    assert_eq!(asked, call(Request::Mirror(request), false));
    client.answer(Ok(Reply::Started(Started { job: "vda".into(), notes: vec![] })));
    assert_eq!(said(&mut client), [json!({ "return": {} })]);

    let all = json!({
        "device": "vda", "target": "/t", "format": "raw", "sync": "top", "mode": "existing", "speed": 5,
        "granularity": 65536, "buf-size": 1, "on-source-error": "stop", "on-target-error": "enospc",
        "copy-mode": "write-blocking", "unmap": false, "job-id": "j", "auto-finalize": false, "auto-dismiss": false,
        "dry-run": true, "options": { "cluster-size": 4096, "compat": "0.10" },
    });
    let request = MirrorRequest {
        export: "vda".into(),
        target: "/t".into(),
        shallow: true,
        reuse_external: true,
        format: Some(TargetFormat::Raw),
        block_device: false,
        mode: Mode::WriteBlocking,
        speed: 5,
        granularity: 65536,
        on_source_error: OnError::Stop,
        on_target_error: OnError::Enospc,
        buf_size: 1,
        unmap: false,
        dry_run: true,
        job_id: Some("j".into()),
        auto_finalize: false,
        auto_dismiss: false,
        options: CreateOptions { cluster_size: Some(4096), compat: Some(Compat::V2), ..CreateOptions::default() },
        ..MirrorRequest::default()
    };
    let mut all = all;
    for policy in ["enospc", "auto"] {
        all["on-target-error"] = json!(policy);
        let asked = send(&mut client, &json!({ "execute": "drive-mirror", "arguments": all }));
        assert_eq!(asked, call(Request::Mirror(request.clone()), false), "{policy}");
        client.answer(Ok(Reply::Done {}));
        said(&mut client);
    }
}

#[test]
fn what_drive_mirror_cannot_do_is_refused_by_name() {
    let arguments = json!({ "device": "vda", "target": "/t", "sync": "none" });
    let error = error(&json!({ "execute": "drive-mirror", "arguments": arguments }));
    assert_eq!(error["code"], "OPERATION_UNSUPPORTED");
    assert!(error["desc"].as_str().is_some_and(|desc| desc.contains("sync")), "{error}");
}

#[test]
fn our_own_mirror_takes_every_member_of_the_request() {
    let request = MirrorRequest {
        export: "vda".into(),
        target: "/t".into(),
        shallow: true,
        reuse_external: true,
        format: Some(TargetFormat::Qcow2),
        block_device: true,
        mode: Mode::Background,
        speed: 1 << 40,
        granularity: 512,
        on_source_error: OnError::BackOff,
        on_target_error: OnError::Ignore,
        pause_budget: 250,
        buf_size: 1 << 20,
        latency_factor: 2,
        deadline: 4_000_000_000,
        max_slowdown: 3,
        max_lag: 1 << 30,
        unmap: false,
        reflink: false,
        dry_run: true,
        job_id: Some("j".into()),
        auto_finalize: false,
        auto_dismiss: false,
        options: CreateOptions { preallocation: Some(Preallocation::Falloc), ..CreateOptions::default() },
        relative_backing: true,
        chain: true,
        verify: true,
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
fn a_rebase_by_libvirts_numbers_is_a_mirror_request() {
    let arguments = json!({ "export": "vda", "base": "/t", "bandwidth": 3, "flags": 8 | 1 | 2, "dry-run": true });
    let asked = send(&mut client(), &json!({ "execute": "block-rebase", "arguments": arguments }));
    let request = MirrorRequest {
        export: "vda".into(),
        target: "/t".into(),
        shallow: true,
        reuse_external: true,
        speed: 3 << 20,
        on_target_error: OnError::Report,
        dry_run: true,
        ..MirrorRequest::default()
    };
    assert_eq!(asked, call(Request::Mirror(request), true));
    for (flags, code) in [(1, "INVALID_ARG"), (0, "OPERATION_UNSUPPORTED"), (8 | 16, "ARGUMENT_UNSUPPORTED")] {
        let arguments = json!({ "export": "vda", "base": "/t", "flags": flags });
        let error = error(&json!({ "execute": "block-rebase", "arguments": arguments }));
        assert_eq!(error["code"], code, "{error}");
    }
    let abort = |flags: u32| json!({ "execute": "block-job-abort", "arguments": { "export": "vda", "flags": flags } });
    assert_eq!(send(&mut client(), &abort(2)), call(Request::Pivot(PivotRequest::of("vda")), true));
    assert_eq!(send(&mut client(), &abort(1)), call(Request::Cancel { export: "vda".into(), force: false }, false));
    assert_eq!(error(&abort(4))["code"], "INVALID_ARG");
}

#[test]
fn the_schema_has_every_command_and_event_and_all_their_types() {
    let mut client = client();
    send(&mut client, &json!({ "execute": "query-qmp-schema" }));
    let schema = said(&mut client)[0]["return"].take();
    let entries = schema.as_array().expect("a list");
    let named = |meta: &str, name: &str| {
        entries.iter().find(|entry| entry["meta-type"] == meta && entry["name"] == name).cloned().unwrap_or_default()
    };
    send(&mut client, &json!({ "execute": "query-commands" }));
    for command in said(&mut client)[0]["return"].as_array().expect("a list") {
        let name = command["name"].as_str().expect("a name");
        assert_eq!(named("command", name)["name"], name);
    }
    let types = entries.iter().filter(|entry| entry["meta-type"] != "command" && entry["meta-type"] != "event");
    let names: Vec<&str> = types.map(|entry| entry["name"].as_str().expect("a name")).collect();
    for entry in entries {
        let members = entry["members"].as_array().cloned().unwrap_or_default();
        let of_members = members.iter().map(|member| &member["type"]);
        for name in of_members.chain(["element-type", "arg-type", "ret-type"].map(|kind| &entry[kind])) {
            assert!(name.as_str().is_none_or(|name| names.contains(&name)), "{name} is described");
        }
    }
    let mirror = named("object", named("command", "drive-mirror")["arg-type"].as_str().expect("a type"));
    let member = |name: &str| {
        let members = mirror["members"].as_array().expect("members");
        members.iter().find(|member| member["name"] == name).cloned().unwrap_or_default()
    };
    assert_eq!(member("device"), json!({ "name": "device", "type": "str" }));
    assert_eq!(member("speed"), json!({ "name": "speed", "type": "int", "default": null }));
    assert_eq!(member("auto-dismiss"), json!({ "name": "auto-dismiss", "type": "bool", "default": null }));
    let sync = named("enum", member("sync")["type"].as_str().expect("a type"));
    assert_eq!(sync["values"], json!(["full", "top", "none"]));
    let jobs = named("command", "query-jobs");
    let list = named("array", jobs["ret-type"].as_str().expect("a type"));
    assert_eq!(named("object", list["element-type"].as_str().expect("a type"))["name"], list["element-type"]);
    for event in ["JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_PENDING", "BLOCK_JOB_ERROR", "BLKMIRROR_PHASE"] {
        assert!(named("event", event)["arg-type"].is_string(), "{event}");
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
        client.event(&jobs::ready(), NOW);
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
