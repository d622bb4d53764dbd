//! Clients and servers of QEMU's: its own library drives qemu-storage-daemon and this program with one script, and
//! its shell talks to this program.
use crate::support::daemon::Daemon;
use crate::support::images::holding;
use crate::support::server::Server;
use crate::support::tools::{output, ran, told};
use crate::support::{folder, images};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// As many as the script has scenes.
const DEVICES: [&str; 10] = ["d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8", "d9"];

/// A program of QEMU's library, where `tests/support/install` puts it.
fn client(program: &str) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/qmp/bin").join(program);
    assert!(path.exists(), "{}: not there (tests/run installs what the tests need)", path.display());
    Command::new(path)
}

/// The disks that are to be copied, 8 MiB of data in each.
fn disks(folder: &Path) -> Vec<PathBuf> {
    let file = |device: &&str| {
        let file = folder.join(format!("{device}.qcow2"));
        holding(&file, "qcow2", &[vec![1; 8 << 20], vec![0; 8 << 20]].concat(), &[]);
        file
    };
    DEVICES.iter().map(file).collect()
}

/// What came of the script's scenes at the server of this socket.
#[track_caller]
fn driven(socket: &Path, folder: &Path) -> Map<String, Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qmp/drive.py");
    let mut command = client("python3");
    command.arg(script).arg(socket).arg(folder).args(DEVICES);
    let said = ran(&mut command);
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn theirs() -> Map<String, Value> {
    let folder = folder();
    let pid_file = folder.path().join("pid");
    let mut command = Command::new("qemu-storage-daemon");
    command.args([
        "--chardev".to_owned(),
        format!("socket,path={}/served,server=on,wait=off,id=qmp", folder.path().display()),
    ]);
    command.args(["--monitor", "chardev=qmp", "--pidfile"]).arg(&pid_file).stdout(Stdio::null());
    for (device, disk) in DEVICES.iter().zip(disks(folder.path())) {
        let file = json!({ "driver": "file", "filename": disk });
        command.args([
            "--blockdev".to_owned(),
            json!({ "driver": "qcow2", "node-name": device, "file": file }).to_string(),
        ]);
    }
    let server = Server::start(command, folder.path(), &pid_file);
    driven(server.socket(), folder.path())
}

fn ours() -> Map<String, Value> {
    let folder = folder();
    let exports = DEVICES.iter().zip(disks(folder.path())).map(|(name, disk)| format!("{name}={}", disk.display()));
    let daemon = Daemon::serve(folder.path(), &exports.collect::<Vec<_>>());
    driven(&daemon.control_socket(), folder.path())
}

/// Where this program's words are others on purpose, with their beginning; `docs/qmp.md` says why.
const OTHER_WORDS: [[&str; 3]; 6] = [
    ["cancel-before-ready", "Job 'cancel-before-ready' in state 'running' cannot accept", "cannot pivot: "],
    ["names", "Need a root block node", "export d7 has a copy job already"],
    ["names", "Cannot find device='none' nor node-name='none'", "there is no export none; there are: d0"],
    ["names", "Parameter 'device' is missing", "block-job-pause: missing field `device`"],
    [
        "names",
        "Invalid parameter type for 'device', expected: string",
        "block-job-pause: argument 'device': invalid type",
    ],
    ["names", "Parameter 'more' is unexpected", "block-job-pause: argument 'more': unknown field"],
];

/// Scenes that go another way on purpose, from the step on that is the first to differ.
fn other_ways(scene: &str) -> Option<(usize, Value)> {
    match scene {
        // To be ended outweighs to rest.
        "complete-while-paused" => Some((
            5,
            json!([
                ["rests", false],
                ["heard", ["ready", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]]
            ]),
        )),
        "cancel-while-paused" => Some((
            4,
            json!([["block-job-cancel", "ok"], ["heard", ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]]]),
        )),
        _ => None,
    }
}

/// The same answer, or one with more words at its end, or with the words that it has on purpose.
fn agree(scene: &str, ours: &Value, theirs: &Value) -> bool {
    let (Some(said), Some(expected)) = (ours[2].as_str(), theirs[2].as_str()) else { return ours == theirs };
    let on_purpose =
        |[where_, theirs, ours]: &[&str; 3]| scene == *where_ && expected.starts_with(theirs) && said.starts_with(ours);
    let words = said.starts_with(expected) || OTHER_WORDS.iter().any(on_purpose);
    ours[0] == theirs[0] && ours[1] == theirs[1] && words
}

#[test]
fn the_same_script_has_the_same_answers_from_qemu() {
    let (ours, theirs) = (ours(), theirs());
    assert_eq!(ours["greeting"]["QMP"]["version"]["qemu"]["major"], 10);
    let mut scenes = 0;
    for (scene, theirs) in theirs.iter().filter(|(_, came)| came[0][0] == "drive-mirror") {
        scenes += 1;
        let steps = |of: &Value| of.as_array().expect("steps").clone();
        let (mut theirs, ours) = (steps(theirs), steps(&ours[scene]));
        if let Some((from, steps)) = other_ways(scene) {
            assert!(
                theirs.len() > from && theirs[from..] != steps.as_array().expect("steps")[..],
                "{scene}: QEMU has learnt it"
            );
            theirs.truncate(from);
            theirs.extend(steps.as_array().expect("steps").clone());
        }
        assert_eq!(ours.len(), theirs.len(), "{scene}: {ours:#?}\n--- QEMU\n{theirs:#?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!(agree(scene, ours, theirs), "{scene}: {ours}, QEMU: {theirs}");
        }
    }
    assert_eq!(scenes, DEVICES.len());
    same_names(&Schema(&ours["schema"]), &Schema(&theirs["schema"]));
}

/// What `query-qmp-schema` answered.
struct Schema<'a>(&'a Value);

impl Schema<'_> {
    fn entries(&self) -> &[Value] {
        self.0.as_array().expect("a list")
    }

    #[track_caller]
    fn entry(&self, meta: &[&str], name: &Value) -> &Value {
        let is = |entry: &&Value| entry["name"] == *name && meta.iter().any(|meta| entry["meta-type"] == *meta);
        self.entries().iter().find(is).unwrap_or_else(|| panic!("{name} is not described"))
    }

    fn type_of(&self, name: &Value) -> &Value {
        self.entry(&["builtin", "object", "alternate", "enum", "array"], name)
    }

    /// Names of the commands, or of the events.
    fn names(&self, meta: &str) -> BTreeSet<&str> {
        self.entries().iter().filter(|it| it["meta-type"] == meta).filter_map(|it| it["name"].as_str()).collect()
    }

    /// The members of an object, those of its variants among them: name, kind of value, whether it may be left out.
    fn members(&self, object: &Value) -> Vec<(&str, &str, bool)> {
        let object = self.type_of(object);
        let mut members: Vec<_> =
            object["members"].as_array().into_iter().flatten().map(|it| self.member(it)).collect();
        for variant in object["variants"].as_array().into_iter().flatten() {
            members.extend(self.members(&variant["type"]));
        }
        members
    }

    fn member<'a>(&'a self, member: &'a Value) -> (&'a str, &'a str, bool) {
        let of = self.type_of(&member["type"]);
        let kind = match of["meta-type"].as_str() {
            Some("builtin") => of["json-type"].as_str(),
            Some("enum") => Some("string"),
            other => other,
        };
        let name = member["name"].as_str().expect("a name");
        (name, kind.expect("a kind"), member.get("default").is_some())
    }
}

/// What has QEMU's name is what QEMU has by it: each member is of the same kind and as optional, and there are none
/// but QEMU's and a few of our own.
#[track_caller]
fn same_names(ours: &Schema, theirs: &Schema) {
    // These are ours alone, by names that QEMU does not have.
    let own = ["block-job-abort", "block-rebase"];
    let mut compared = 0;
    for meta in ["command", "event"] {
        for name in ours.names(meta).intersection(&theirs.names(meta)) {
            let name = json!(name);
            let (a, b) = (ours.entry(&[meta], &name), theirs.entry(&[meta], &name));
            same_members(&name, ours.members(&a["arg-type"]), &theirs.members(&b["arg-type"]));
            if meta == "command" {
                let (a, b) = (ours.type_of(&a["ret-type"]), theirs.type_of(&b["ret-type"]));
                assert_eq!(a["meta-type"], b["meta-type"], "{name}");
                let inside = |of: &Value| of.get("element-type").unwrap_or(&of["name"]).clone();
                if name != "query-qmp-schema" {
                    same_members(&name, ours.members(&inside(a)), &theirs.members(&inside(b)));
                }
            }
            compared += 1;
        }
        for name in ours.names(meta).difference(&theirs.names(meta)) {
            let marked = name.to_lowercase().starts_with("blkmirror") || own.contains(name);
            assert!(marked, "{name}: QEMU has no {meta} of this name");
        }
    }
    assert!(compared > 25, "{compared} names are shared");
}

#[track_caller]
fn same_members(of: &Value, ours: Vec<(&str, &str, bool)>, theirs: &[(&str, &str, bool)]) {
    let more: &[&str] = match of.as_str() {
        Some("drive-mirror") => &["options", "verify", "dry-run"],
        Some("BLOCK_JOB_ERROR") => &["export", "message"],
        _ => &[],
    };
    for member in ours.into_iter().filter(|(name, ..)| !more.contains(name)) {
        assert!(theirs.contains(&member), "{of}: {member:?} is not among QEMU's {theirs:?}");
    }
}

#[test]
fn qmp_shell_talks_to_us_and_completes_our_commands() {
    let folder = folder();
    let disk = folder.path().join("disk.qcow2");
    images::create(&disk, "qcow2", 8 << 20, &[]);
    let daemon = Daemon::serve(folder.path(), &[format!("vda={}", disk.display())]);
    let target = folder.path().join("target");
    let mut shell = client("qmp-shell");
    // Where it keeps its history.
    shell.env("HOME", folder.path()).arg(daemon.control_socket());
    shell.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = shell.spawn().expect("a shell");
    let mut words = child.stdin.take().expect("its input");
    let order = format!("drive-mirror device=vda target={} sync=full job-id=j auto-dismiss=false", target.display());
    let (look, nonsense) = ("query-jobs", "block-job-pause device=none");
    write!(words, "query-version\n{order}\n{look}\n{nonsense}\n").expect("a shell that reads");
    drop(words);
    let output = child.wait_with_output().expect("waiting for our child");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", told(&shell, &output));
    for answer in ["Connected to QEMU 10.0.0", "\"return\": {}", "\"id\": \"j\"", "\"class\": \"DeviceNotActive\""] {
        assert!(said.contains(answer), "{answer}: {said}");
    }
    assert_eq!(
        completed(&daemon, folder.path()),
        ["job-cancel", "job-complete", "job-dismiss", "job-finalize", "job-pause", "job-resume"]
    );
}

/// How the shell completes `job-`.
#[track_caller]
fn completed(daemon: &Daemon, home: &Path) -> Vec<String> {
    let script = "import sys; from qemu.qmp.qmp_shell import QMPShell\n\
                  with QMPShell(sys.argv[1]) as shell:\n\
                  \x20   shell.connect()\n\
                  \x20   for n in range(100):\n\
                  \x20       print(shell._completer.complete('job-', n) or '')\n";
    let mut python = client("python3");
    python.env("HOME", home).args(["-c", script]).arg(daemon.control_socket());
    let output = output(&mut python);
    assert!(output.status.success(), "{}", told(&python, &output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}
