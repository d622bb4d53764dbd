//! Backing names of every manner, recorded by qemu-img, mean to us what they mean to QEMU; and a chain that cannot
//! be opened is refused with the layer, the one above it and the reason, at once.

use crate::support::daemon::program;
use crate::support::images::{create, holding};
use crate::support::tools::{ran, refused, run};
use crate::support::{assert_same, folder};
use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

const DISK_LEN: usize = 4 << 20;
/// The number of the header extension that records the backing's format.
const BACKING_FORMAT: [u8; 4] = [0xe2, 0x79, 0x2a, 0xca];

/// A disk of which no two blocks are alike.
fn disk() -> Vec<u8> {
    (0..DISK_LEN).map(|at| (at as u64 / 512 * 31 + at as u64) as u8).collect()
}

/// An overlay named `top.qcow2` in `folder`, of what `name` says. Nobody looks whether it is there.
#[track_caller]
fn top(folder: &Path, name: &str, format: Option<&str>) {
    let mut command = Command::new("qemu-img");
    command.current_dir(folder).args(["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format.unwrap_or("raw")]);
    ran(command.arg("top.qcow2").arg(DISK_LEN.to_string()));
    if format.is_none() {
        // qemu-img always records a format now. It did not always: the extension gets a number that nobody knows.
        let mut bytes = std::fs::read(folder.join("top.qcow2")).expect("what qemu-img wrote");
        let at = bytes.windows(4).position(|word| word == BACKING_FORMAT).expect("the extension");
        bytes[at..at + 4].copy_from_slice(b"none");
        std::fs::write(folder.join("top.qcow2"), bytes).expect("a file of ours");
    }
}

fn converting(folder: &Path) -> Command {
    let mut command = Command::new(program());
    command.current_dir("/").arg("convert").arg(folder.join("top.qcow2")).arg(folder.join("out"));
    command.args(["--format", "raw"]);
    command
}

/// What `top.qcow2` reads as.
#[track_caller]
fn converted(folder: &Path) -> Vec<u8> {
    ran(&mut converting(folder));
    let bytes = std::fs::read(folder.join("out")).expect("what was converted");
    std::fs::remove_file(folder.join("out")).expect("removing a file of ours");
    bytes
}

#[test]
fn every_manner_of_name_leads_to_the_same_bytes() {
    let folder = folder();
    let (images, elsewhere) = (folder.path().join("images"), folder.path().join("elsewhere"));
    for folder in [&images, &elsewhere] {
        std::fs::create_dir(folder).expect("a folder of ours");
    }
    let truth = disk();
    let base = images.join("base.qcow2");
    holding(&base, "qcow2", &truth, &[]);
    std::fs::write(images.join("base.raw"), &truth).expect("a file of ours");
    std::fs::copy(&base, images.join("a:b")).expect("a copy");
    symlink(&base, elsewhere.join("link")).expect("a link");
    let full = base.display();
    for (name, format) in [
        ("base.qcow2".to_owned(), Some("qcow2")),
        ("base.qcow2".to_owned(), None),
        ("base.raw".to_owned(), Some("raw")),
        ("./a:b".to_owned(), None),
        ("../elsewhere/link".to_owned(), None),
        (format!("{full}"), Some("qcow2")),
        (format!("file:{full}"), Some("qcow2")),
        ("file:base.raw".to_owned(), Some("raw")),
        (format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{full}"}}}}"#), None),
        (format!(r#"json:{{"driver":"qcow2","file.driver":"file","file.filename":"{full}"}}"#), Some("qcow2")),
        (r#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw","locking":"auto"}}"#.to_owned(), None),
        (r#"json:{"driver":"file","filename":"base.raw"}"#.to_owned(), None),
        (r#"json:{"file.filename":"base.qcow2"}"#.to_owned(), None),
    ] {
        top(&images, &name, format);
        // What counts from the process's folder for QEMU counts from the image's for us: here they are one.
        let mut theirs = Command::new("qemu-img");
        theirs.current_dir(&images).args(["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "theirs"]);
        ran(&mut theirs);
        let theirs = std::fs::read(images.join("theirs")).expect("what qemu-img wrote");
        assert_same(&format!("{name} ({format:?}) by qemu-img"), &theirs, &truth);
        assert_same(&format!("{name} ({format:?})"), &converted(&images), &truth);
    }
}

#[test]
fn a_name_that_cannot_be_followed_is_refused_with_the_layer_above_and_the_reason() {
    let folder = folder();
    let path = folder.path();
    std::fs::write(path.join("raw"), disk()).expect("a file of ours");
    std::fs::create_dir(path.join("folder")).expect("a folder of ours");
    run("mkfifo", &[path.join("fifo")]);
    let _listener = UnixListener::bind(path.join("socket")).expect("a socket");
    symlink("top.qcow2", path.join("link")).expect("a link");
    std::fs::write(path.join("private"), disk()).expect("a file of ours");
    std::fs::set_permissions(path.join("private"), PermissionsExt::from_mode(0o0)).expect("a file of ours");
    let no_image = "neither a regular file nor a block device";
    for (name, format, reason) in [
        ("none", Some("raw"), "No such file or directory"),
        ("folder", Some("raw"), no_image),
        ("folder", None, no_image),
        ("fifo", Some("raw"), no_image),
        ("socket", Some("raw"), no_image),
        ("private", Some("raw"), "Permission denied"),
        ("./top.qcow2", Some("qcow2"), "the chain is a loop"),
        ("link", Some("qcow2"), "the chain is a loop"),
        ("raw", None, "raw is never guessed"),
        ("raw", Some("vmdk"), "qemu-img convert -f vmdk -O qcow2"),
        ("ssh://host/raw", Some("raw"), "qemu-img rebase -u"),
        (r#"json:{"driver":"https","url":"https://host/raw"}"#, Some("raw"), "\"https\" is not supported"),
        (r#"json:{"driver":"raw","offset":512,"file.filename":"raw"}"#, None, "\"offset\""),
        (r#"json:{"driver":"raw","file.filename":"raw"}"#, Some("qcow2"), "record one format"),
    ] {
        top(path, name, format);
        // The superuser may read everything, unless that is taken from it.
        let mut command = Command::new("setpriv");
        let ours = converting(path);
        command.arg("--bounding-set=-dac_override,-dac_read_search").arg(ours.get_program()).args(ours.get_args());
        let layer = if name.starts_with("json:") { "" } else { name };
        refused(command, &["top.qcow2", layer, reason]);
        assert!(!path.join("out").exists(), "{name}: nothing is made");
    }
}

#[test]
fn two_hundred_layers_are_opened_and_one_more_is_refused() {
    let folder = folder();
    let truth = disk();
    holding(&folder.path().join("layer0"), "qcow2", &truth, &[]);
    let name = |number: usize| format!("layer{number}");
    // Made by qemu-img once; the others are copies with another name of the same length in their header.
    top(folder.path(), "layer000", Some("qcow2"));
    let header = std::fs::read(folder.path().join("top.qcow2")).expect("what qemu-img wrote");
    let at = header.windows(8).position(|bytes| bytes == b"layer000").expect("the recorded name");
    let overlay = |file: &str, backing: &str| {
        let mut bytes = header.clone();
        bytes[at..at + 8].copy_from_slice(format!("{backing:/<8}").replace('/', "\0").as_bytes());
        // The length of the name is at 16.
        bytes[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
        std::fs::write(folder.path().join(file), bytes).expect("a file of ours");
    };
    for number in 1..200 {
        overlay(&name(number), &name(number - 1));
    }
    overlay("top.qcow2", &name(198));
    assert_same("200 layers", &converted(folder.path()), &truth);
    overlay("top.qcow2", &name(199));
    refused(converting(folder.path()), &["layer1", "more than 200 layers"]);
}

#[test]
fn other_formats_are_refused_by_their_names() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    for (format, name) in [
        ("qcow", "qcow (version 1)"),
        ("qed", "QED"),
        ("vmdk", "VMDK"),
        ("vdi", "VDI"),
        ("vhdx", "VHDX"),
        ("vpc", "VHD (VPC)"),
        ("parallels", "Parallels"),
    ] {
        create(&path(format), format, DISK_LEN as u64, &[]);
        top(folder.path(), format, None);
        refused(converting(folder.path()), &["top.qcow2", name, "qemu-img convert -O qcow2"]);
        let mut convert = Command::new(program());
        convert.arg("convert").args([path(format), path("out")]);
        refused(convert, &[format, name]);
    }
    for (options, name) in [
        (["-f", "luks", "-o", "key-secret=s,iter-time=10"], "LUKS"),
        (["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"], "LUKS"),
        (["-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s"], "AES"),
    ] {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "--object", "secret,id=s,data=secret"]).args(options);
        ran(command.arg(path("encrypted")).arg(DISK_LEN.to_string()));
        top(folder.path(), "encrypted", None);
        refused(converting(folder.path()), &["encrypted", name, "qemu-img convert"]);
        std::fs::remove_file(path("encrypted")).expect("removing a file of ours");
    }
    let info: Vec<&OsStr> = vec!["info".as_ref(), "vmdk".as_ref()];
    let mut command = Command::new(program());
    command.current_dir(folder.path()).args(info);
    refused(command, &["vmdk", "VMDK"]);
}
