//! Other people's NBD clients against the server, and other people's readers against the images that it wrote.
//!
//! Held here: images of every kind read as QEMU reads them; what clients write is what QEMU finds in the image
//! afterwards, and `qemu-img check` finds nothing wrong; what the export says of itself is true.

use crate::support::daemon::Daemon;
use crate::support::images::{self, Chain, random_chain, three_layers};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::random::Random;
use crate::support::tools::{check, content, ran, run};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, folder};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const DISK_LEN: u64 = 32 << 20;
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn connect(daemon: &Daemon, export: &str, replies: Replies) -> Client {
    Client::connect(&daemon.socket(), export, replies).expect("an NBD connection")
}

/// `count` chains, each in a folder of its own.
fn random_chains(folder: &Path, seeds: std::ops::Range<u64>) -> Vec<Chain> {
    let make = |seed: u64| {
        let home = folder.join(format!("chain{seed}"));
        std::fs::create_dir(&home).expect("a folder of ours");
        random_chain(&home, &mut Random::new(seed))
    };
    seeds.map(make).collect()
}

fn serve_all(folder: &Path, chains: &[Chain]) -> Daemon {
    let exports: Vec<String> = chains.iter().enumerate().map(|(index, chain)| chain.export(&name(index))).collect();
    Daemon::serve(folder, &exports)
}

fn name(index: usize) -> String {
    format!("disk{index}")
}

/// QEMU counts in sectors: a raw file that ends inside one reads as zeroes up to its end.
fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn every_kind_of_chain_reads_as_qemu_reads_it() {
    let folder = folder();
    let chains = random_chains(folder.path(), 0..24);
    let truths: Vec<Vec<u8>> = chains.iter().map(Chain::content).collect();
    let daemon = serve_all(folder.path(), &chains);
    for (index, (chain, truth)) in chains.iter().zip(&truths).enumerate() {
        let (uri, out) = (daemon.uri(&name(index)), folder.path().join("out"));
        let reads: [(&str, &dyn Fn() -> Vec<u8>); 4] = [
            ("nbdcopy", &|| {
                run("nbdcopy", &[&uri, &out.display().to_string()]);
                std::fs::read(&out).expect("what nbdcopy wrote")
            }),
            ("qemu-img convert", &|| {
                run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &out.display().to_string()]);
                std::fs::read(&out).expect("what qemu-img wrote")
            }),
            ("simple replies", &|| connect(&daemon, &name(index), Replies::Simple).content()),
            ("structured replies", &|| connect(&daemon, &name(index), Replies::Structured).content()),
        ];
        for (reader, read) in reads {
            assert_same(&format!("chain {index} by {reader}\n{}", chain.told), &padded(read()), truth);
            let _ = std::fs::remove_file(&out);
        }
    }
}

#[test]
fn what_is_said_to_be_zero_is_zero() {
    let folder = folder();
    let chains = random_chains(folder.path(), 100..112);
    let truths: Vec<Vec<u8>> = chains.iter().map(Chain::content).collect();
    let daemon = serve_all(folder.path(), &chains);
    let mut zero_len = 0;
    for (index, (chain, truth)) in chains.iter().zip(&truths).enumerate() {
        let map = run("nbdinfo", &["--map", "--json", &daemon.uri(&name(index))]);
        let map: Vec<Value> = serde_json::from_str(&map).expect("JSON of nbdinfo");
        let number = |extent: &Value, field: &str| extent[field].as_u64().expect("a number of nbdinfo") as usize;
        let mut covered = 0;
        for extent in &map {
            let (at, len) = (number(extent, "offset"), number(extent, "length"));
            assert_eq!(at, covered, "the extents follow each other: {map:?}");
            covered = at + len;
            let end = covered.min(truth.len());
            if extent["type"].as_u64().expect("a number of nbdinfo") & 2 != 0 {
                zero_len += len;
                let zero = truth[at..end].iter().all(|byte| *byte == 0);
                assert!(zero, "chain {index}: {extent} is said to be zero\n{}", chain.told);
            }
        }
        assert_eq!(covered.next_multiple_of(512), truth.len(), "the map covers the disk");
    }
    assert!(zero_len > 1 << 20, "much of these disks is zero, and it has to be said: {zero_len} bytes");
}

#[test]
fn what_qemu_io_wrote_is_in_the_image() {
    let folder = folder();
    let chains = random_chains(folder.path(), 200..212);
    let twins: Vec<_> = (0..chains.len()).map(|index| folder.path().join(format!("twin{index}"))).collect();
    for (chain, twin) in chains.iter().zip(&twins) {
        std::fs::write(twin, chain.content()).expect("a file of ours");
    }
    let mut daemon = serve_all(folder.path(), &chains);
    for (index, twin) in twins.iter().enumerate() {
        let mut random = Random::new(index as u64);
        let size = connect(&daemon, &name(index), Replies::Simple).size() / 512 * 512;
        let mut orders = Vec::new();
        for _ in 0..40 {
            let at = random.below(size / 512) * 512;
            let len = (random.within(1..600) * 512).min(size - at);
            let pattern = random.within(1..256);
            let order = match random.below(8) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -z -u {at} {len}"),
                2 => format!("write -P 0 {at} {len}"),
                3 => format!("write -f -P {pattern} {at} {len}"),
                4 => "flush".to_owned(),
                _ => format!("write -P {pattern} {at} {len}"),
            };
            orders.extend(["-c".to_owned(), order]);
        }
        for target in [daemon.uri(&name(index)), twin.display().to_string()] {
            let args = ["-f".to_owned(), "raw".to_owned()].into_iter().chain(orders.iter().cloned()).chain([target]);
            run("qemu-io", &args.collect::<Vec<String>>());
        }
    }
    daemon.stop();
    for (chain, twin) in chains.iter().zip(&twins) {
        check(&chain.top, chain.format);
        assert_same(&chain.told, &chain.content(), &std::fs::read(twin).expect("a file of ours"));
    }
}

#[test]
fn a_guest_that_writes_zeroes_and_discards_finds_its_own_truth_in_every_kind_of_chain() {
    let folder = folder();
    let chains = random_chains(folder.path(), 300..316);
    let truths: Vec<Vec<u8>> = chains.iter().map(Chain::content).collect();
    let mut daemon = serve_all(folder.path(), &chains);
    let mut after = Vec::new();
    for (index, (chain, truth)) in chains.iter().zip(truths).enumerate() {
        if !std::fs::metadata(&chain.top).is_ok_and(|file| chain.format == "qcow2" || file.len() % 512 == 0) {
            after.push(truth);
            continue;
        }
        let habits =
            Habits { seed: index as u64, depth: 16, flush_one_in: 50, pause: Duration::ZERO, ..Habits::default() };
        let writer = Writer::start(&daemon.socket(), &name(index), truth, habits);
        writer.wait(300);
        after.push(writer.stop());
    }
    daemon.stop();
    for (chain, truth) in chains.iter().zip(&after) {
        assert_same(&chain.told, &chain.content(), truth);
        check(&chain.top, chain.format);
    }
}

#[test]
fn fio_reads_back_what_it_wrote_on_four_connections() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 1);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let uri = format!("--uri={}", daemon.uri("vda"));
    let verify = [
        "--name=verify",
        "--thread",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--bs_unaligned=0",
        "--iodepth=16",
        "--numjobs=4",
        "--size=8m",
        "--offset_increment=8m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--randseed=7",
        "--end_fsync=1",
        "--output-format=terse",
    ];
    run("fio", &verify);
    daemon.stop();
    check(&chain.top, chain.format);
}

/// Four jobs, each with a deep queue, verify what they wrote as they go; meanwhile their disk is moved, and moved on.
#[test]
fn fio_finds_what_it_wrote_while_its_disk_is_moved() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 4);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let uri = format!("--uri={}", daemon.uri("vda"));
    let jobs = [
        &["--name=moved", "--thread", "--ioengine=nbd", &uri, "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16"][..],
        &["--numjobs=4", "--size=8m", "--offset_increment=8m", "--randseed=7", "--fsync=200", "--loops=6"],
        &["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=64", "--do_verify=1"],
        &["--output-format=terse"],
    ];
    let mut fio = Command::new("fio");
    fio.args(jobs.concat());
    let verified = std::thread::spawn(move || ran(&mut fio));
    let mut places = Vec::new();
    while !verified.is_finished() {
        let format = ["raw", "qcow2"][places.len() % 2];
        let target = folder.path().join(format!("place{}.{format}", places.len()));
        daemon.ok("mirror", &["vda", &target.display().to_string(), "--format", format, "--wait"]);
        daemon.pivot("vda");
        if let Some((left, _)) = places.last() {
            std::fs::remove_file(left).expect("nobody uses it");
        }
        places.push((target, format));
    }
    verified.join().expect("fio found what it wrote");
    daemon.stop();
    let (last, format) = &places[places.len() - 1];
    assert!(places.len() > 1, "it was moved once only");
    check(last, format);
}

#[test]
fn the_export_says_what_it_is() {
    let folder = folder();
    let (disk, read_only) = (folder.path().join("disk.qcow2"), folder.path().join("ro.qcow2"));
    images::create(&disk, "qcow2", DISK_LEN + 512, &[]);
    images::create(&read_only, "qcow2", DISK_LEN, &[]);
    let exports =
        [format!("vda={},format=qcow2", disk.display()), format!("ro={},format=qcow2,readonly", read_only.display())];
    let daemon = Daemon::serve(folder.path(), &exports);
    let listed: Value =
        serde_json::from_str(&run("nbdinfo", &["--json", &daemon.uri("vda")])).expect("JSON of nbdinfo");
    let export = &listed["exports"][0];
    assert_eq!(listed["structured"], true, "{listed}");
    assert_eq!(export["export-size"], DISK_LEN + 512);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "qemu:allocation-depth"]));
    for (field, truth) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_fast_zero", true),
        ("can_cache", true),
        ("can_df", true),
        ("can_multi_conn", true),
    ] {
        assert_eq!(export[field], truth, "{field}: {export}");
    }
    let min = export["block_minimum"].as_u64().or(export["block_size_minimum"].as_u64()).expect("a minimum");
    assert!(min.is_power_of_two() && min <= 512, "QEMU's guests write sectors: {export}");
    let read_only: Value =
        serde_json::from_str(&run("nbdinfo", &["--json", &daemon.uri("ro")])).expect("JSON of nbdinfo");
    assert_eq!(read_only["exports"][0]["is_read_only"], true, "{read_only}");
    let all = run("nbdinfo", &["--list", "--json", &daemon.uri("")]);
    let all: Value = serde_json::from_str(&all).expect("JSON of nbdinfo");
    let names: Vec<&str> =
        all["exports"].as_array().expect("a list").iter().filter_map(|e| e["export-name"].as_str()).collect();
    assert!(names.contains(&"vda") && names.contains(&"ro"), "{names:?}");
}

#[test]
fn the_depth_of_each_extent_is_that_of_the_layer_that_has_it() {
    let folder = folder();
    let [base, middle, top] = ["base.raw", "middle.qcow2", "top.qcow2"].map(|name| folder.path().join(name));
    images::create(&base, "raw", DISK_LEN / 2, &[]);
    for (path, below, format) in [(&middle, &base, "raw"), (&top, &middle, "qcow2")] {
        let below = format!("backing_file={},backing_fmt={format}", below.display());
        images::create(path, "qcow2", DISK_LEN, &["-o", &below]);
    }
    let write = |path: &Path, orders: &[&str]| {
        let path = path.display().to_string();
        let orders: Vec<&str> = orders.iter().flat_map(|order| ["-c", order]).collect();
        run("qemu-io", &[&["-f", "qcow2"][..], &orders, &[&path]].concat());
    };
    write(&middle, &["write 0 64k", "write -z 1M 64k"]);
    write(&top, &["write 64k 64k"]);
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", top.display())]);
    let map = run("nbdinfo", &["--json", "--map=qemu:allocation-depth", &daemon.uri("vda")]);
    let map: Value = serde_json::from_str(&map).expect("JSON of nbdinfo");
    let found: Vec<[u64; 3]> = map.as_array().expect("a list").iter().map(extent).collect();
    let (k, m) = (64 << 10, 1 << 20);
    let half = DISK_LEN / 2;
    let want = [[0, k, 2], [k, k, 1], [2 * k, m - 2 * k, 3], [m, k, 2], [m + k, DISK_LEN - m - k, 3]];
    assert!(half > m + k, "past its end too the base is the layer that decides");
    assert_eq!(found, want);
}

fn extent(entry: &Value) -> [u64; 3] {
    ["offset", "length", "type"].map(|field| entry[field].as_u64().expect("a number"))
}

/// QEMU's client asks for 64-bit headers, and zeroes and discards with one request what is longer than
/// 32 bits can say.
#[test]
fn requests_of_more_than_4_gib_are_done() {
    const LEN: u64 = 6 << 30;
    let folder = folder();
    let disk = folder.path().join("disk.qcow2");
    images::create(&disk, "qcow2", LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", disk.display())]);
    let uri = daemon.uri("vda");
    let orders =
        ["write -P 7 0 64k", "write -P 7 5G 64k", "write -z -u -n 0 6G", "read -P 0 0 64k", "read -P 0 5G 64k"];
    let orders: Vec<&str> = orders.iter().flat_map(|order| ["-c", order]).collect();
    let said = run("qemu-io", &[&["-f", "raw", "-d", "unmap"][..], &orders, &[&uri]].concat());
    assert!(!said.contains("failed"), "{said}");
    let map = run("qemu-img", &["map", "--output=json", &uri]);
    let map: Value = serde_json::from_str(&map).expect("JSON of qemu-img");
    assert_eq!(map.as_array().map(Vec::len), Some(1), "{map}");
    assert_eq!(map[0]["length"], LEN);
    daemon.stop();
    check(&disk, "qcow2");
}

/// The error number that a request is answered with.
#[track_caller]
fn refused(client: &mut Client, request: &Request) -> u32 {
    client.send(request);
    let answer = client.receive().expect("an answer");
    answer.result.expect_err("this has to be refused")
}

#[test]
fn what_cannot_be_is_refused_and_the_connection_goes_on() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    images::create(&disk, "raw", DISK_LEN, &[]);
    for replies in [Replies::Simple, Replies::Structured] {
        let read_only = folder.path().join("ro.raw");
        images::create(&read_only, "raw", DISK_LEN, &[]);
        let exports =
            [format!("vda={},format=raw", disk.display()), format!("ro={},format=raw,readonly", read_only.display())];
        let daemon = Daemon::serve(folder.path(), &exports);
        let mut client = connect(&daemon, "vda", replies);
        let past = DISK_LEN - 512;
        assert_eq!(refused(&mut client, &Request::Write { at: past, bytes: vec![1; 1024] }), ENOSPC);
        assert_eq!(refused(&mut client, &Request::Zero { at: past, len: 1024, keep: false }), ENOSPC);
        assert_eq!(refused(&mut client, &Request::Read { at: past, len: 1024 }), EINVAL);
        assert_eq!(refused(&mut client, &Request::Read { at: u64::MAX - 511, len: 512 }), EINVAL);
        client.ask(&Request::Write { at: past, bytes: vec![9; 512] });
        assert_eq!(client.ask(&Request::Read { at: past, len: 512 }), [9; 512]);

        let mut client = connect(&daemon, "ro", replies);
        assert_eq!(refused(&mut client, &Request::Write { at: 0, bytes: vec![1; 512] }), EPERM);
        assert_eq!(refused(&mut client, &Request::Trim { at: 0, len: 512 }), EPERM);
        assert_eq!(client.ask(&Request::Read { at: 0, len: 512 }), [0; 512]);
        assert!(Client::connect(&daemon.socket(), "no such export", replies).is_err());
    }
}

#[test]
fn what_one_connection_wrote_another_one_reads() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 2);
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let mut clients: Vec<Client> = (0..8).map(|_| connect(&daemon, "vda", Replies::Structured)).collect();
    let mut random = Random::new(3);
    for round in 0..100 {
        let at = random.below(DISK_LEN / 512 - 64) * 512;
        let sectors = random.within(1..64) as usize;
        let bytes = random.bytes(sectors * 512);
        clients[round % 8].ask(&Request::Write { at, bytes: bytes.clone() });
        let len = bytes.len() as u32;
        assert_same(&format!("round {round}"), &clients[(round + 1) % 8].ask(&Request::Read { at, len }), &bytes);
    }
}

#[test]
fn a_client_that_hangs_up_in_the_middle_of_its_requests_disturbs_nobody() {
    let folder = folder();
    let disk = folder.path().join("disk.qcow2");
    images::create(&disk, "qcow2", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", disk.display())]);
    let habits = Habits { seed: 4, pause: Duration::ZERO, ..Habits::default() };
    // The guest's half of the disk; the rude clients have the other.
    let half = DISK_LEN / 2;
    let mut polite = connect(&daemon, "vda", Replies::Structured);
    let mut random = Random::new(habits.seed);
    let mut truth = vec![0; half as usize];
    for _ in 0..20 {
        let mut rude = connect(&daemon, "vda", Replies::Structured);
        for index in 0..32 {
            rude.send(&Request::Write { at: half + index * 300_032, bytes: vec![0xee; 256 << 10] });
        }
        drop(rude);
        let at = random.below(half / 512 - 128) * 512;
        let bytes = random.bytes(128 * 512);
        polite.ask(&Request::Write { at, bytes: bytes.clone() });
        truth[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    assert_same("the polite half", &polite.content()[..half as usize], &truth);
    daemon.stop();
    check(&disk, "qcow2");
    assert_same("the polite half of the image", &content(&disk, "qcow2")[..half as usize], &truth);
}

#[test]
fn a_tcp_client_sees_the_same_disk() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 77);
    let truth = chain.content();
    let daemon = Daemon::serve_with(folder.path(), &[chain.export("vda")], &["--listen", "127.0.0.1:0"]);
    let log = daemon.log();
    // The daemon's first line says which port the system chose.
    let address = log.split([' ', '\n', ',']).find(|word| word.starts_with("127.0.0.1:")).expect("the address");
    let copy = folder.path().join("copy");
    run("nbdcopy", &[&format!("nbd://{address}/vda"), &copy.display().to_string()]);
    assert_same("what came by TCP", &content(&copy, "raw"), &truth);
}
