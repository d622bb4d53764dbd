//! Names as tables, and names that nobody would write.
use super::{BackingName, Location, NAME_LEN_MAX};
use crate::nbd::Address;
use proptest::prelude::{any, prop_oneof, proptest};
use proptest::strategy::Strategy;
use std::path::Path;

fn seen(name: &str) -> Option<(String, Option<&'static str>)> {
    let BackingName { location, format } = BackingName::parse(name).ok()?;
    let parent = Location::File("/images/top.qcow2".into());
    Some((location.seen_from(&parent).ok()?.to_string(), format))
}

#[track_caller]
fn refused(name: &str, reason: &str) {
    let error = BackingName::parse(name).expect_err(name).one_line();
    assert!(error.contains(reason), "{name}: {error}");
}

#[test]
fn names_count_from_the_image_that_records_them() {
    for (name, wanted) in [
        ("base.qcow2", "/images/base.qcow2"),
        ("/other/base", "/other/base"),
        ("file:base", "/images/base"),
        ("file:/other/a:b", "/other/a:b"),
        ("./a:b", "/images/./a:b"),
        ("a b%20", "/images/a b%20"),
        ("nbd://host/x", "nbd://host:10809/x"),
        ("nbd:unix:/s:exportname=x", "nbd+unix:///x?socket=/s"),
        ("nbds://host/x?tls-certificates=/c", "nbds://host:10809/x?tls-certificates=/c"),
    ] {
        assert_eq!(seen(name), Some((wanted.to_owned(), None)), "{name}");
    }
}

#[test]
fn an_image_without_a_folder_has_only_full_paths() {
    let export = Location::Nbd(Address::parse("nbd://host/x").expect("an address"));
    let from = |name: &str| BackingName::parse(name).expect("a name").location.seen_from(&export);
    assert_eq!(from("/base").ok(), Some(Location::File("/base".into())));
    assert_eq!(from("nbd://host/x").ok(), Some(export.clone()));
    assert!(from("base").is_err_and(|error| error.one_line().contains("full path")));
    let bare = Location::File("top".into());
    let base = BackingName::parse("base").expect("a name").location;
    assert_eq!(base.seen_from(&bare).ok(), Some(Location::File("base".into())));
}

#[test]
fn json_names_are_read_nested_and_dotted() {
    for (name, wanted, format) in [
        (r#"json:{"driver":"file","filename":"base"}"#, "/images/base", Some("raw")),
        (r#"json:{"filename":"/a"}"#, "/a", None),
        (r#"json:{"driver":"host_device","filename":"/dev/vda"}"#, "/dev/vda", Some("raw")),
        (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}"#, "/a", Some("qcow2")),
        (r#"json: {"driver": "raw", "file.driver": "file", "file.filename": "/a"} "#, "/a", Some("raw")),
        (r#"json:{"file":{"driver":"file","filename":"/a","locking":"off"},"read-only":true}"#, "/a", None),
        (r#"json:{"file.filename":"/a","driver":"raw","cache":{"direct":true}}"#, "/a", Some("raw")),
        (
            r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":"x"}}"#,
            "nbd+unix:///x?socket=/s",
            Some("raw"),
        ),
        (
            r#"json:{"driver":"nbd","server.type":"inet","server.host":"::1","server.port":"1"}"#,
            "nbd://[::1]:1/",
            Some("raw"),
        ),
        (r#"json:{"file.driver":"nbd","file.host":"h","file.port":7,"file.export":"x"}"#, "nbd://h:7/x", None),
        (r#"json:{"driver":"nbd","path":"/s"}"#, "nbd+unix:///?socket=/s", Some("raw")),
    ] {
        assert_eq!(seen(name), Some((wanted.to_owned(), format)), "{name}");
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    refused("", "is empty");
    refused("a\0b", "NUL");
    refused(&"x".repeat(NAME_LEN_MAX + 1), "4097 bytes");
    refused("file:", "file: is neither");
    refused("rbd:pool/x", "rbd: is neither");
    refused("https://host/x", "https: is neither");
    refused("nbd+vsock://1/x", "nbd+vsock: is neither");
    refused("nbd+unix:///x", "?socket=PATH");
    for (json, reason) in [
        ("", "no JSON"),
        ("[]", "no JSON"),
        (r#""x""#, "an object is expected"),
        ("{}", "\"file\" is missing"),
        ("{} {}", "trailing"),
        (r#"{"driver":"file"}"#, "\"filename\" is missing"),
        (r#"{"driver":"file","filename":""}"#, "is empty"),
        (r#"{"driver":"file","filename":"a\u0000"}"#, "NUL"),
        (r#"{"driver":"file","filename":null}"#, "no JSON"),
        (r#"{"driver":"file","filename":["a"]}"#, "no JSON"),
        (r#"{"driver":"file","filename":"a","filename":"b"}"#, "\"filename\" is there twice"),
        (r#"{"file.filename":"a","file":{"filename":"b"}}"#, "\"file.filename\" is there twice"),
        (r#"{"filename":"nbd://host/x"}"#, "without a \"driver\""),
        (r#"{"driver":"rbd","pool":"x"}"#, "\"rbd\" is not supported"),
        (r#"{"driver":"luks","file.filename":"a"}"#, "\"luks\" is not supported"),
        (r#"{"driver":"qcow2","file":"node"}"#, "names a node"),
        (r#"{"driver":"qcow2","file":{"driver":"qcow2","file.filename":"a"}}"#, "\"qcow2\" is not supported"),
        (r#"{"driver":"raw","offset":512,"file.filename":"a"}"#, "\"offset\""),
        (r#"{"driver":"qcow2","backing":{"filename":"b"},"file.filename":"a"}"#, "\"backing.filename\""),
        (r#"{"driver":"nbd","export":"x"}"#, "\"host\" is missing"),
        (r#"{"driver":"nbd","server":{"type":"unix"},"export":"x"}"#, "\"path\" is missing"),
        (r#"{"driver":"nbd","server":{"type":"vsock","cid":"1","port":"1"}}"#, "\"vsock\""),
        (r#"{"driver":"nbd","path":"/s","host":"h"}"#, "\"host\" of the driver \"nbd\""),
        (r#"{"driver":"nbd","path":"/s","tls-creds":"tls0"}"#, "\"tls-creds\" names an object of one QEMU alone"),
        (r#"{"driver":"nbd","path":"/s","tls-hostname":"h"}"#, "\"tls-hostname\" of the driver \"nbd\""),
        (r#"{"driver":"nbd","host":"h","port":"x"}"#, "no port"),
        (r#"{"a":{"b":{"c":{"d":{"e":1}}}}}"#, "inside each other"),
    ] {
        refused(&format!("json:{json}"), reason);
    }
    let many = (0..65).map(|number| format!("\"k{number}\":1")).collect::<Vec<_>>().join(",");
    refused(&format!("json:{{{many}}}"), "more than 64 keys");
    refused(&format!("json:{}", "[".repeat(4000)), "no JSON");
    refused(&format!("json:{}", "{\"a\":".repeat(800)), "inside each other");
}

#[test]
fn an_argument_with_a_colon_is_a_file() {
    let of = |argument: &str| Location::of_argument(Path::new(argument)).map(|location| location.to_string()).ok();
    assert_eq!(of("rbd:x").as_deref(), Some("rbd:x"));
    assert_eq!(of("nbd://h/x").as_deref(), Some("nbd://h:10809/x"));
    assert_eq!(of("nbd+unix:///x"), None);
}

fn texts() -> impl Strategy<Value = String> {
    let word = "(json:|file:|nbd:|\\{|\\}|\\[|\"driver\"|\"file\"|\"filename\"|\"file\\.filename\"|:|,|\"nbd\"|\"qcow2\"|\"a\"|7|null|\"\\\\u0000\"|.)";
    prop_oneof![
        word.prop_map(|text| text),
        any::<String>(),
        proptest::collection::vec(word, 0..24).prop_map(|words| words.concat())
    ]
}

proptest! {
    /// Whatever is read has a location that can be looked for.
    #[test]
    fn any_text_is_a_name_or_an_error(text in texts()) {
        for name in [text.clone(), format!("json:{text}")] {
            let Ok(BackingName { location, format }) = BackingName::parse(&name) else { continue };
            assert!(matches!(format, None | Some("raw" | "qcow2")));
            match location {
                Location::File(path) => assert!(!path.as_os_str().is_empty() && !path.display().to_string().contains('\0')),
                Location::Nbd(address) => assert_eq!(Address::parse(&address.to_string()).ok(), Some(address)),
            }
        }
    }

    #[test]
    fn json_says_what_was_put_into_it(path in "[^\0]{1,40}", format in prop_oneof!["raw", "qcow2"], dotted in any::<bool>()) {
        let path_in_json = serde_json::Value::from(path.clone());
        let name = match dotted {
            true => format!(r#"json:{{"file.driver":"file","driver":"{format}","file.filename":{path_in_json}}}"#),
            false => format!(r#"json:{{"file":{{"filename":{path_in_json},"driver":"file"}},"driver":"{format}"}}"#),
        };
        let read = BackingName::parse(&name).expect("a name");
        assert_eq!(read.location, Location::File(path.into()));
        assert_eq!(read.format, Some(format.as_str()));
    }
}
