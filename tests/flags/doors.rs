//! The doors by which a copy is asked for and ended: the command line, QMP's `drive-mirror`, and libvirt's numbers, as
//! commands and as functions of the engine.
use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::qmp::Qmp;
use crate::support::tools::{output, told};
use engine::control::libvirt::{self, ABORT_PIVOT};
use engine::control::libvirt::{REBASE_COPY, REBASE_COPY_DEV, REBASE_COPY_RAW, REBASE_REUSE_EXT, REBASE_SHALLOW};
use engine::control::{MirrorRequest, Request};
use serde_json::{Value, json};

/// What is asked for.
#[derive(Clone, Default)]
pub struct Ask {
    pub export: String,
    pub target: String,
    /// `shallow`, `reuse`, `raw`, `qcow2` (a format that is named), `device`.
    pub flags: &'static str,
    /// 0 where it is not given.
    pub granularity: u64,
    pub job_id: Option<&'static str>,
    /// How the target is made: a name and a value, as QMP has them.
    pub option: Option<(&'static str, &'static str)>,
}

/// A refusal: libvirt's name for it, and words.
#[derive(Debug)]
pub struct Refused {
    pub code: String,
    pub words: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Door {
    CommandLine,
    DriveMirror,
    /// `block-rebase` and `block-job-abort`.
    Numbers,
    /// The same as functions of the engine, whose request goes to the daemon as `blkmirror-mirror`.
    Functions,
}

impl Ask {
    pub fn has(&self, flag: &str) -> bool {
        self.flags.split(' ').any(|word| word == flag)
    }

    /// libvirt's number for it. `None` where it has none.
    fn number(&self) -> Option<u32> {
        let has_more = self.granularity != 0 || self.job_id.is_some() || self.option.is_some() || self.has("qcow2");
        let bit = |flag: &str, bit: u32| if self.has(flag) { bit } else { 0 };
        let flags = bit("shallow", REBASE_SHALLOW) | bit("reuse", REBASE_REUSE_EXT) | bit("raw", REBASE_COPY_RAW);
        (!has_more).then_some(REBASE_COPY | flags | bit("device", REBASE_COPY_DEV))
    }

    fn words(&self) -> Vec<String> {
        let mut words = vec![self.export.clone(), self.target.clone()];
        let options = [
            ("shallow", "--shallow"),
            ("reuse", "--reuse-external"),
            ("raw", "--raw"),
            ("qcow2", "--format=qcow2"),
            ("device", "--blockdev"),
        ];
        words.extend(options.iter().filter(|(flag, _)| self.has(flag)).map(|(_, option)| (*option).to_owned()));
        if self.granularity != 0 {
            words.push(format!("--granularity={}", self.granularity));
        }
        words.extend(self.job_id.iter().map(|id| format!("--job-id={id}")));
        words.extend(self.option.iter().map(|(name, value)| format!("-o{}={value}", name.replace('-', "_"))));
        words
    }

    fn arguments(&self) -> Value {
        let mut arguments = json!({ "device": self.export, "target": self.target });
        arguments["sync"] = json!(if self.has("shallow") { "top" } else { "full" });
        if self.has("reuse") {
            arguments["mode"] = json!("existing");
        }
        for format in ["raw", "qcow2"].iter().filter(|format| self.has(format)) {
            arguments["format"] = json!(format);
        }
        if self.granularity != 0 {
            arguments["granularity"] = json!(self.granularity);
        }
        if let Some(id) = self.job_id {
            arguments["job-id"] = json!(id);
        }
        if let Some((name, value)) = self.option {
            arguments["options"][name] = json!(value);
        }
        arguments
    }
}

impl Door {
    pub const ALL: [Self; 4] = [Self::CommandLine, Self::DriveMirror, Self::Numbers, Self::Functions];

    /// Asks for a copy. `None` where this door has no word for what is asked.
    #[track_caller]
    pub fn copy(self, daemon: &Daemon, ask: &Ask, dry_run: bool) -> Option<Result<(), Refused>> {
        Some(match self {
            Self::CommandLine => {
                let mut words = ask.words();
                words.extend(dry_run.then(|| "--dry-run".to_owned()));
                run(daemon, "mirror", &words)
            }
            Self::DriveMirror => {
                // No word of QEMU's says that it has to be a device.
                let mut arguments = (!ask.has("device")).then(|| ask.arguments())?;
                arguments["dry-run"] = json!(dry_run);
                command(daemon, "drive-mirror", arguments)
            }
            Self::Numbers => {
                let arguments = json!({
                    "export": ask.export, "base": ask.target, "flags": ask.number()?, "dry-run": dry_run,
                });
                command(daemon, "block-rebase", arguments)
            }
            Self::Functions => {
                let request = libvirt::rebase(ask.export.clone(), Some(ask.target.clone()), 0, ask.number()?);
                let request = request.expect("flags that it knows");
                command(daemon, "blkmirror-mirror", json!(MirrorRequest { dry_run, ..request }))
            }
        })
    }

    /// Asks for the pivot, and waits for its end. One that the daemon undoes, for the machine is busy, is asked for
    /// again.
    #[track_caller]
    pub fn pivot(self, daemon: &Daemon, export: &str) -> Result<(), Refused> {
        eventually(&format!("{export} pivots"), || {
            let answer = self.end(daemon, export, ABORT_PIVOT);
            let undone = answer.as_ref().is_err_and(|refused| refused.words.contains("the pause allows"));
            (!undone).then_some(answer)
        })
    }

    /// Asks for the end on the source, and waits for it.
    #[track_caller]
    pub fn cancel(self, daemon: &Daemon, export: &str) -> Result<(), Refused> {
        self.end(daemon, export, 0)
    }

    fn end(self, daemon: &Daemon, export: &str, flags: u32) -> Result<(), Refused> {
        let pivots = flags & ABORT_PIVOT != 0;
        match self {
            Self::CommandLine => run(daemon, if pivots { "pivot" } else { "cancel" }, &[export.to_owned()]),
            Self::DriveMirror => {
                // It answers when it has begun; the rest is heard.
                let verb = if pivots { "block-job-complete" } else { "block-job-cancel" };
                let mut qmp = Qmp::connect(&daemon.control_socket());
                qmp.ask(verb, json!({ "device": export })).map_err(|error| refused(&error))?;
                let over = qmp.hear("the job's end", |event| {
                    ["ready", "null"].iter().any(|status| event["data"]["status"] == **status)
                });
                match over["data"]["status"] == "null" {
                    true => Ok(()),
                    false => {
                        Err(Refused { code: "OPERATION_FAILED".to_owned(), words: "the pause allows less".to_owned() })
                    }
                }
            }
            Self::Numbers => command(daemon, "block-job-abort", json!({ "export": export, "flags": flags })),
            Self::Functions => match libvirt::abort(export.to_owned(), flags) {
                Ok((Request::Pivot(request), true)) => command(daemon, "blkmirror-pivot", json!(request)),
                Ok((Request::Cancel { export, force: false }, true)) => {
                    command(daemon, "blkmirror-cancel", json!({ "export": export }))
                }
                other => panic!("{other:?}"),
            },
        }
    }
}

/// A verb of the command line: exit 0, or 1 and libvirt's name at the message's end.
#[track_caller]
fn run(daemon: &Daemon, verb: &str, words: &[String]) -> Result<(), Refused> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut command = daemon.command(verb, &words);
    let output = output(&mut command);
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "{}", told(&command, &output));
    let (words, code) = said.trim_end().rsplit_once(" (").unwrap_or_else(|| panic!("no name of libvirt's: {said}"));
    Err(Refused { code: code.trim_end_matches(')').to_owned(), words: words.to_owned() })
}

#[track_caller]
fn command(daemon: &Daemon, name: &str, arguments: Value) -> Result<(), Refused> {
    Qmp::connect(&daemon.control_socket()).ask(name, arguments).map(drop).map_err(|error| refused(&error))
}

fn refused(error: &Value) -> Refused {
    let text = |name: &str| error[name].as_str().expect("text").to_owned();
    Refused { code: text("code"), words: text("desc") }
}
