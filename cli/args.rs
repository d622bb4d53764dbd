//! What can be said on the command line. Help and manual come from here.
use crate::creation::{self, Settings};
use crate::{export, listener, size};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, ArgGroup, Args as Arguments, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use engine::control::options::{Beside, Cache, ExportOptions, Listener};
use engine::control::{LATENCY_FACTOR, MAX_SLOWDOWN, Mode, OnError, PAUSE_BUDGET, PAUSE_BUDGET_MAX, TargetFormat};
use formats::nbd::Tls;
use formats::qcow2::Repair;
use serde::de::DeserializeOwned;
use serde::de::value::{Error as NameError, StrDeserializer};
use std::path::PathBuf;
use std::time::SystemTime;

/// Moves a virtual machine's disk to a new place while the guest goes on writing.
///
/// Exit status: 0 done, 1 refused or failed, 2 misused.
#[derive(Debug, Parser)]
#[command(name = "blkmirror", version, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub verb: Verb,
    /// Say more on stderr; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Serve disks by NBD, and mirror them when told to
    Serve(Serve),
    /// Copy an export's disk to a new place while its guest writes
    Mirror(Mirror),
    /// Say how one export stands, or all of them
    Status(Status),
    /// Make the target of a ready mirror the disk that is served; of several exports at one instant, or of none
    Pivot(Pivot),
    /// End the way back from a pivot that kept its source; the guest stays where it is
    Commit(Job),
    /// Read back what a copy has: a ready mirror's target while its guest writes, or an image by its manifest
    Verify(Verify),
    /// End a mirror; the guest stays on the source
    Cancel(Cancel),
    /// Stop copying; guest writes are still tracked
    Pause(Job),
    /// Go on copying
    Resume(Job),
    /// Change a mirror while it runs
    Set(Set),
    /// Put a new overlay on top of an export's chain, which is written to from then on
    Snapshot(Snapshot),
    /// Make an export's disk larger; clients see it when they connect again
    Resize(Resize),
    /// Serve one more disk, or one less, while the daemon runs
    #[command(subcommand)]
    Export(Export),
    /// Follow one export, or all of them: a live view in a terminal, elsewhere a line for each change
    Watch(Watch),
    /// Tell what happens to jobs, a line for each event, until the daemon ends
    Events(Events),
    /// End the daemon
    Quit(Quit),
    /// Copy an image that nobody writes to, its backing chain included
    Convert(Convert),
    /// Say whether two images read alike
    Compare(Compare),
    /// Say what an image file is
    Info(Info),
    /// Say what is wrong with an image that nobody uses, and mend it when told to
    Check(Check),
    /// Say where a disk's bytes live, run by run
    Map(Map),
    /// Say what a state folder keeps through a kill
    Journal(Journal),
    /// Move a disk under a guest, with nothing but this program, and prove that nothing was lost
    Demo(Demo),
    /// Write a completion script for a shell to stdout
    Completions(Completions),
    /// Write the manual: one page a verb into a folder, or the first page to stdout
    Man(Man),
}

impl Verb {
    /// Whether a program reads what comes of it.
    pub fn is_json(&self) -> bool {
        match self {
            Self::Mirror(Mirror { form, .. })
            | Self::Status(Status { form, .. })
            | Self::Pivot(Pivot { form, .. })
            | Self::Verify(Verify { form, .. })
            | Self::Snapshot(Snapshot { form, .. })
            | Self::Resize(Resize { form, .. })
            | Self::Export(Export::Add(AddExport { form, .. }) | Export::Remove(RemoveExport { form, .. }))
            | Self::Cancel(Cancel { job: Job { form, .. }, .. })
            | Self::Commit(Job { form, .. })
            | Self::Pause(Job { form, .. })
            | Self::Resume(Job { form, .. })
            | Self::Set(Set { job: Job { form, .. }, .. })
            | Self::Watch(Watch { form, .. })
            | Self::Events(Events { form, .. })
            | Self::Quit(Quit { form, .. })
            | Self::Convert(Convert { form, .. })
            | Self::Compare(Compare { form, .. })
            | Self::Info(Info { form, .. })
            | Self::Check(Check { form, .. })
            | Self::Map(Map { form, .. }) => form.json,
            Self::Journal(Journal { verb: JournalVerb::Show(show) }) => show.json,
            Self::Serve(_) | Self::Demo(_) | Self::Completions(_) | Self::Man(_) => false,
        }
    }
}

/// For whom results are written down.
#[derive(Clone, Copy, Debug, Arguments)]
pub struct Form {
    /// Results as JSON on stdout, a failure as an object in the last line on stderr
    #[arg(long)]
    pub json: bool,
}

/// Which daemon.
#[derive(Debug, Arguments)]
pub struct Daemon {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
}

/// Whose job.
#[derive(Debug, Arguments)]
pub struct Job {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name
    pub export: String,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Quit {
    #[command(flatten)]
    pub daemon: Daemon,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Serve {
    /// A disk to serve; may be given several times. A comma in FILE is written twice
    #[arg(long = "export", required = true, value_name = "NAME=FILE[,format=qcow2|raw][,readonly]", value_parser = export::parse)]
    pub exports: Vec<ExportOptions>,
    /// Where NBD clients come in: a Unix socket; may be given several times. Not needed where systemd
    /// hands sockets over
    #[arg(long = "socket", value_name = "PATH")]
    pub sockets: Vec<PathBuf>,
    /// Permissions of the Unix sockets for NBD clients, in octal
    #[arg(long, value_name = "MODE", value_parser = listener::mode)]
    pub socket_mode: Option<u32>,
    /// Owner of the Unix sockets for NBD clients, by names or numbers
    #[arg(long, value_name = "USER[:GROUP]", value_parser = listener::owner)]
    pub socket_owner: Option<listener::Owner>,
    /// Where NBD clients come in: a TCP address, IPv6 in brackets, or `vsock:CID:PORT` (CID `*` for any guest);
    /// may be given several times
    #[arg(long = "listen", value_name = "HOST:PORT", value_parser = listener::parse)]
    pub addresses: Vec<Listener>,
    /// The control socket
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
    /// Where the pivot records are kept; it has to survive a reboot
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Take over from the daemon whose control socket is at PATH: its sockets, its clients and their jobs. It has to have
    /// been started with the same words, and ends
    #[arg(long, value_name = "PATH")]
    pub handover: Option<PathBuf>,
    /// Whether images go through the page cache
    #[arg(long, default_value = "none", value_parser = caches())]
    pub cache: Cache,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub servers: Servers,
}

/// TLS with other NBD servers.
#[derive(Debug, Arguments)]
pub struct Servers {
    /// The folder for NBD addresses inside TLS (nbds://) that name none by tls-certificates: `ca-cert.pem`, and
    /// `client-cert.pem` and `client-key.pem` where the server asks for them
    #[arg(long = "tls-client-certificates", value_name = "DIR")]
    pub client_certificates: Option<PathBuf>,
}

/// Beside whom an image is looked at.
#[derive(Clone, Copy, Debug, Arguments)]
pub struct Sharing {
    /// Read an image that another program writes to, too: what is found may be half written
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

impl Sharing {
    /// In the engine's word.
    pub fn beside(self) -> Beside {
        if self.force_share { Beside::Anybody } else { Beside::RawWriters }
    }
}

/// TLS for NBD clients, on sockets of every kind.
#[derive(Debug, Arguments)]
pub struct TlsArgs {
    /// Whether NBD clients may, or have to, go on inside TLS
    #[arg(long = "tls", value_name = "MODE", default_value = "off", value_parser = tls_modes())]
    pub mode: Tls,
    /// The folder of `server-cert.pem`, `server-key.pem`, `ca-cert.pem` and perhaps `ca-crl.pem`
    #[arg(long = "tls-certificates", value_name = "DIR", requires = "mode")]
    #[arg(required_if_eq_any([("mode", "allowed"), ("mode", "required")]))]
    pub certificates: Option<PathBuf>,
    /// Whether a client has to show a certificate that `ca-cert.pem` signed
    #[arg(long = "tls-verify-peer", value_name = "yes|no", default_value = "yes", requires = "certificates")]
    #[arg(action = ArgAction::Set, value_parser = PossibleValuesParser::new(["yes", "no"]).map(|word| word == "yes"))]
    pub verify_peer: bool,
    /// A client that may come in, by its certificate's common name or a DNS name in it; may be given several
    /// times. Without, every client that can show a certificate
    #[arg(long = "tls-allow", value_name = "NAME", requires = "certificates")]
    pub allow: Vec<String>,
}

/// What is done with a state folder.
#[derive(Debug, Arguments)]
pub struct Journal {
    #[command(subcommand)]
    pub verb: JournalVerb,
}

#[derive(Debug, Subcommand)]
pub enum JournalVerb {
    /// Say which image is the truth of each export, which jobs were under way and what their targets lack
    Show(ShowJournal),
}

#[derive(Debug, Arguments)]
pub struct ShowJournal {
    /// The state folder; a daemon may be using it
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Say it as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Arguments)]
pub struct Convert {
    /// The image, the top layer of its chain
    pub source: PathBuf,
    /// Where the copy goes: a file, a block device, or an NBD address (nbd://HOST/EXPORT)
    pub target: PathBuf,
    /// The source's format; raw has to be named
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub source_format: Option<TargetFormat>,
    /// The target's format; the source's where it is not given
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub format: Option<TargetFormat>,
    /// How the target is made, by the names of `qemu-img create -o`; may be given several times
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE[,…]", value_parser = creation::parse)]
    pub options: Vec<Settings>,
    /// Compress the target's clusters, on all processors; the target is a new qcow2
    #[arg(short = 'c', long)]
    pub compress: bool,
    /// Copy only what the top layer holds; the target gets the source's backing
    #[arg(long)]
    pub shallow: bool,
    /// The target is there already
    #[arg(long)]
    pub reuse_external: bool,
    /// Read back what was copied, and write a manifest of it to this file
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// Move bytes also where a raw target could share blocks with the source (XFS, btrfs)
    #[arg(long)]
    pub no_reflink: bool,
    /// Whether images go through the page cache; auto: a source that is there already is read from there
    #[arg(long, default_value = "auto", value_parser = copy_caches())]
    pub cache: Cache,
    #[command(flatten)]
    pub sharing: Sharing,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Compare {
    /// One image
    pub a: PathBuf,
    /// The other
    pub b: PathBuf,
    /// The first one's format; by its header where it is not given
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub a_format: Option<TargetFormat>,
    /// The other one's
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub b_format: Option<TargetFormat>,
    /// Where they read alike, write a manifest of what they have to this file
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// They also have to be equally long and to have payload, zeroes and nothing at the same places
    #[arg(long)]
    pub strict: bool,
    #[command(flatten)]
    pub sharing: Sharing,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Info {
    /// The image
    pub file: PathBuf,
    /// And what is below it; in JSON as an array, the top first
    #[arg(long)]
    pub backing_chain: bool,
    #[command(flatten)]
    pub sharing: Sharing,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Map {
    /// The image, the top layer of its chain
    pub file: PathBuf,
    /// The image's format; by its header where it is not given
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub format: Option<TargetFormat>,
    #[command(flatten)]
    pub sharing: Sharing,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub form: Form,
}

/// Exit status: 0 nothing is wrong, 1 it could not be checked, 2 corruptions (or misused), 3 leaks only,
/// 63 the format has nothing to check.
#[derive(Debug, Arguments)]
pub struct Check {
    /// The image
    pub file: PathBuf,
    /// Mend it: `leaks` gives back what nobody uses, `all` mends whatever can be
    #[arg(long, value_name = "WHAT", value_parser = repairs())]
    pub repair: Option<Repair>,
    /// The image's format; by its header where it is not given
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub format: Option<TargetFormat>,
    #[command(flatten)]
    pub sharing: Sharing,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Demo {
    /// Bytes of the disk, with K, M, G or T; from 16M to 64G
    #[arg(long, value_name = "BYTES", default_value = "512M", value_parser = demo_size)]
    pub size: u64,
    /// Where the temporary folder is made; the system's place for those where it is not given
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

#[derive(Debug, Arguments)]
pub struct Pivot {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The exports' names
    #[arg(required = true, value_name = "EXPORT")]
    pub exports: Vec<String>,
    /// Only where everything was read back from the target, and held against the source, since the job began
    #[arg(long)]
    pub verified: bool,
    /// Keep the source, and keep it up to date from then on: `pivot --back` returns to it, `commit` ends that
    #[arg(long)]
    pub keep_source: bool,
    /// Back to the source that a pivot with --keep-source has kept
    #[arg(long)]
    pub back: bool,
    #[command(flatten)]
    pub form: Form,
}

/// A mismatch of a mirror's target is copied again, counted, and told by an event. Exit status: 0 an image is as its manifest
/// says, 1 it is not.
#[derive(Debug, Arguments)]
#[command(group = ArgGroup::new("which").required(true).args(["control", "manifest"]))]
pub struct Verify {
    /// The daemon's control socket: its export's target is read back
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// A manifest, as `convert` and `compare` write it: an image that nobody writes to is held against it
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// The export's name, or the image
    #[arg(value_name = "EXPORT|IMAGE")]
    pub what: PathBuf,
    /// Return when everything was read back, not when that has begun
    #[arg(long, requires = "control")]
    pub wait: bool,
    /// The image's format; by its header where it is not given
    #[arg(long, value_name = "FORMAT", requires = "manifest", value_parser = formats())]
    pub format: Option<TargetFormat>,
    #[command(flatten)]
    pub sharing: Sharing,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Snapshot {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name
    pub export: String,
    /// The overlay's file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub file: String,
    /// The overlay is there already, and empty
    #[arg(long)]
    pub reuse_external: bool,
    /// How the overlay is made, by the names of `qemu-img create -o`; may be given several times
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE[,…]", value_parser = creation::parse)]
    pub options: Vec<Settings>,
    /// The overlay names what is below it by the way from its own folder
    #[arg(long)]
    pub relative_backing: bool,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Resize {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name
    pub export: String,
    /// Bytes that the disk has from then on, with K, M, G or T
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub size: u64,
    #[command(flatten)]
    pub form: Form,
}

/// What becomes of an export.
#[derive(Debug, Subcommand)]
pub enum Export {
    /// Serve one more disk, also after a restart
    Add(AddExport),
    /// Serve a disk no more; it is closed, and whole
    Remove(RemoveExport),
}

#[derive(Debug, Arguments)]
pub struct AddExport {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The disk. A comma in FILE is written twice
    #[arg(value_name = "NAME=FILE[,format=qcow2|raw][,readonly]", value_parser = export::parse)]
    pub export: ExportOptions,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct RemoveExport {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name
    pub export: String,
    /// Also where clients are connected: their connections end
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Mirror {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name
    pub export: String,
    /// Where the copy goes: a file, a block device, or an NBD address (nbd://HOST/EXPORT)
    #[arg(value_hint = ValueHint::AnyPath, required_unless_present = "chain")]
    pub target: Option<String>,
    /// Copy every layer of the chain to this folder, with relative backing names: the lower ones as they are, then the top
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    #[arg(conflicts_with_all = ["target", "shallow", "reuse_external", "raw", "format", "relative_backing", "blockdev"])]
    pub chain: Option<String>,
    /// Copy only what the top layer holds; the target has the same backing as the source
    #[arg(long)]
    pub shallow: bool,
    /// The target is there already
    #[arg(long)]
    pub reuse_external: bool,
    /// The target is raw
    #[arg(long, conflicts_with = "format")]
    pub raw: bool,
    /// The target's format; the source's where it is not given
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    pub format: Option<TargetFormat>,
    /// A shallow target that is made names its backing by the way from its own folder
    #[arg(long, requires = "shallow")]
    pub relative_backing: bool,
    /// The target has to be a block device
    #[arg(long)]
    pub blockdev: bool,
    /// How the target is made, by the names of `qemu-img create -o`; may be given several times
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE[,…]", value_parser = creation::parse)]
    pub options: Vec<Settings>,
    /// How guest writes are handled
    #[arg(long, default_value = "auto", value_parser = modes())]
    pub mode: Mode,
    /// Bytes a second, with K, M, G or T; 0 is no limit
    #[arg(long, value_name = "BYTES_PER_S", default_value = "0", value_parser = size::parse)]
    pub speed: u64,
    /// Bytes a chunk, a power of two; chosen where it is not given
    #[arg(long, value_name = "BYTES", default_value = "0", hide_default_value = true, value_parser = size::parse)]
    pub granularity: u64,
    /// What to do when the target fails: end the job, pause it, pause it when there is no space, try again, or rest for
    /// longer each time until it can be written again
    #[arg(long, value_name = "POLICY", default_value = "back-off", value_parser = policies())]
    pub on_target_error: OnError,
    /// What to do when the source fails
    #[arg(long, value_name = "POLICY", default_value = "report", value_parser = policies())]
    pub on_source_error: OnError,
    /// How long a pivot may keep the guest waiting for its last pass, in milliseconds; else it is undone
    #[arg(long = "max-pause", value_name = "MS", default_value_t = PAUSE_BUDGET, value_parser = pauses())]
    pub pause_budget: u64,
    /// Bytes under way at a time, with K, M, G or T; 0 leaves the choice to the daemon
    #[arg(long, value_name = "BYTES", default_value = "0", hide_default_value = true, value_parser = size::parse)]
    pub buf_size: u64,
    /// Copy so that the guest's requests take N times as long as without, at most; 0 copies as fast as it goes
    #[arg(long, value_name = "N", default_value_t = LATENCY_FACTOR)]
    pub latency_factor: u64,
    /// In what time it is to be ready (90s, 30m, 2h 15m); guest writes are slowed where it takes that
    #[arg(long, value_name = "TIME", default_value = "0", hide_default_value = true, value_parser = deadline)]
    pub deadline: u64,
    /// How far the target may be behind once everything was copied, with K, M, G or T; guest writes are slowed where it
    /// takes that
    #[arg(long, value_name = "BYTES", default_value = "0", hide_default_value = true, value_parser = size::parse)]
    pub max_lag: u64,
    /// How many times as slow guest writes may be made for a deadline or a lag
    #[arg(long, value_name = "N", default_value_t = MAX_SLOWDOWN, value_parser = slowdowns())]
    pub max_slowdown: u64,
    /// Where data becomes zeroes, write them and keep the space
    #[arg(long)]
    pub no_unmap: bool,
    /// Move bytes also where a raw target could share blocks with the source (XFS, btrfs)
    #[arg(long)]
    pub no_reflink: bool,
    /// The job's name; the export's where it is not given
    #[arg(long, value_name = "NAME")]
    pub job_id: Option<String>,
    /// When it is ready, read back from the target what it has; what waits for the mirror waits for that too
    #[arg(long)]
    pub verify: bool,
    /// Return when the mirror is ready, not when it has started
    #[arg(long)]
    pub wait: bool,
    /// When it is ready, make the target the disk that is served; waits
    #[arg(long, conflicts_with = "finish")]
    pub pivot: bool,
    /// When it is ready, end it: the target is a copy of that instant; waits
    #[arg(long)]
    pub finish: bool,
    /// Say whether it could be done, and do nothing
    #[arg(long, conflicts_with_all = ["wait", "pivot", "finish"])]
    pub dry_run: bool,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Status {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name; all of them where it is not given
    pub export: Option<String>,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Cancel {
    #[command(flatten)]
    pub job: Job,
    /// Give up at once, also when the mirror is ready
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Arguments)]
#[command(group = ArgGroup::new("what").required(true).multiple(true).args([
    "speed", "mode", "on_target_error", "on_source_error", "pause_budget", "buf_size", "latency_factor", "deadline",
    "max_lag", "max_slowdown"
]))]
pub struct Set {
    #[command(flatten)]
    pub job: Job,
    /// Bytes a second, with K, M, G or T; 0 is no limit
    #[arg(long, value_name = "BYTES_PER_S", value_parser = size::parse)]
    pub speed: Option<u64>,
    /// How guest writes are handled
    #[arg(long, value_parser = modes())]
    pub mode: Option<Mode>,
    /// What to do when the target fails; an error that stands is decided upon anew
    #[arg(long, value_name = "POLICY", value_parser = policies())]
    pub on_target_error: Option<OnError>,
    /// What to do when the source fails
    #[arg(long, value_name = "POLICY", value_parser = policies())]
    pub on_source_error: Option<OnError>,
    /// How long a pivot may keep the guest waiting for its last pass, in milliseconds; else it is undone
    #[arg(long = "max-pause", value_name = "MS", value_parser = pauses())]
    pub pause_budget: Option<u64>,
    /// Bytes under way at a time, with K, M, G or T, up to what the job began with; 0 is all of that
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub buf_size: Option<u64>,
    /// Copy so that the guest's requests take N times as long as without, at most; 0 copies as fast as it goes
    #[arg(long, value_name = "N")]
    pub latency_factor: Option<u64>,
    /// In what time from now on it is to be ready (90s, 30m, 2h 15m); 0 is no such time
    #[arg(long, value_name = "TIME", value_parser = deadline)]
    pub deadline: Option<u64>,
    /// How far the target may be behind once everything was copied, with K, M, G or T; 0 is no bound
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub max_lag: Option<u64>,
    /// How many times as slow guest writes may be made for a deadline or a lag
    #[arg(long, value_name = "N", value_parser = slowdowns())]
    pub max_slowdown: Option<u64>,
}

/// In a terminal: up and down choose the export that is looked at closely, q ends.
#[derive(Debug, Arguments)]
pub struct Watch {
    #[command(flatten)]
    pub daemon: Daemon,
    /// The export's name; all of them where it is not given
    pub export: Option<String>,
    #[command(flatten)]
    pub form: Form,
}

#[derive(Debug, Arguments)]
pub struct Events {
    #[command(flatten)]
    pub daemon: Daemon,
    #[command(flatten)]
    pub form: Form,
}

/// For bash: `source <(blkmirror completions bash)`, or the script into /etc/bash_completion.d/.
#[derive(Debug, Arguments)]
pub struct Completions {
    /// Which shell's
    pub shell: Shell,
}

#[derive(Debug, Arguments)]
pub struct Man {
    /// Where `blkmirror.1` and one page a verb go
    pub folder: Option<PathBuf>,
}

fn formats() -> impl TypedValueParser<Value = TargetFormat> {
    named(&["qcow2", "raw"])
}

fn modes() -> impl TypedValueParser<Value = Mode> {
    named(&["auto", "background", "write-blocking"])
}

fn policies() -> impl TypedValueParser<Value = OnError> {
    named(&["report", "stop", "enospc", "ignore", "back-off"])
}

fn slowdowns() -> impl TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(1..)
}

/// The moment, in seconds since 1970, that is so far from now; 0 is none.
fn deadline(text: &str) -> Result<u64, String> {
    let Ok(time) = humantime::parse_duration(text) else {
        return Err("expected a time as 90s, 30m or 2h 15m".into());
    };
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    Ok(if time.is_zero() { 0 } else { now.saturating_add(time).as_secs().max(now.as_secs() + 1) })
}

fn pauses() -> impl TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(1..=PAUSE_BUDGET_MAX)
}

fn caches() -> impl TypedValueParser<Value = Cache> {
    named(&["none", "writeback"])
}

fn tls_modes() -> impl TypedValueParser<Value = Tls> {
    PossibleValuesParser::new(["off", "allowed", "required"]).map(|name| match name.as_str() {
        "required" => Tls::Required,
        "allowed" => Tls::Allowed,
        _ => Tls::Off,
    })
}

/// A copy can be made again, so it may be left to the system when it is durable.
fn copy_caches() -> impl TypedValueParser<Value = Cache> {
    named(&["auto", "none", "writeback", "unsafe"])
}

fn repairs() -> impl TypedValueParser<Value = Repair> {
    PossibleValuesParser::new(["leaks", "all"]).map(|name| if name == "all" { Repair::All } else { Repair::Leaks })
}

/// A size that the demo can do, in whole MiB.
fn demo_size(text: &str) -> Result<u64, String> {
    match size::parse(text)?.checked_next_multiple_of(1 << 20) {
        Some(size) if (16 << 20..=64 << 30).contains(&size) => Ok(size),
        _ => Err("expected from 16M to 64G".into()),
    }
}

/// One of `names`, as the control API has them.
fn named<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| T::deserialize(StrDeserializer::<NameError>::new(&name)))
}

#[cfg(test)]
mod tests {
    use super::Args;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_whole() {
        Args::command().debug_assert();
    }
}
