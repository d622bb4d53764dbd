//! The manual and the completion scripts, as those read them for whom they are made.
use crate::{Run, blkmirror};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Every verb that the help names.
fn verbs() -> BTreeSet<String> {
    let help = blkmirror(&["--help"]).stdout;
    let (_, rest) = help.split_once("Commands:\n").unwrap();
    let rows = rest.lines().take_while(|line| !line.is_empty());
    let names = rows.filter(|row| row.starts_with("  ") && !row.starts_with("   "));
    let verbs: BTreeSet<String> = names.map(|row| row.split_whitespace().next().unwrap().to_owned()).collect();
    assert!(verbs.contains("mirror") && verbs.len() > 15, "{verbs:?}");
    verbs
}

/// Runs a program that is there wherever the tests are (tests/support/install).
fn run(program: &str, words: &[&str]) -> Run {
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn there_is_a_page_for_each_verb_and_nothing_is_wrong_with_any() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let told = blkmirror(&["man", pages.to_str().unwrap()]);
    let names: BTreeSet<String> =
        fs::read_dir(&pages).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!((told.code, told.stdout), (Some(0), format!("{}: {} pages\n", pages.display(), names.len())));
    let mut expected: BTreeSet<String> = verbs().iter().map(|verb| format!("blkmirror-{verb}.1")).collect();
    expected.remove("blkmirror-help.1");
    expected.insert("blkmirror.1".into());
    assert_eq!(names, expected);
    for name in &names {
        let path = pages.join(name);
        // Warnings of every kind there is.
        let shown = run("groff", &["-man", "-Kutf8", "-Tutf8", "-ww", path.to_str().unwrap()]);
        assert_eq!((shown.code, shown.stderr.as_str()), (Some(0), ""), "{name}");
        let linted = run("mandoc", &["-Tlint", "-Werror", path.to_str().unwrap()]);
        assert_eq!((linted.code, linted.stdout.as_str()), (Some(0), ""), "{name}");
    }
    // The first page alone is on stdout.
    let first = blkmirror(&["man"]);
    assert_eq!((first.code, first.stdout), (Some(0), fs::read_to_string(pages.join("blkmirror.1")).unwrap()));
}

#[test]
fn a_page_says_what_the_help_says() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(blkmirror(&["man", folder.path().to_str().unwrap()]).code, Some(0));
    let page = folder.path().join("blkmirror-mirror.1");
    // In long lines, without the strokes that make bold letters.
    let shown = run("groff", &["-man", "-Kutf8", "-Tutf8", "-rLL=300n", "-P-cbou", page.to_str().unwrap()]).stdout;
    for words in [
        "blkmirror-mirror - Copy an export's disk to a new place while its guest writes",
        "--on-target-error <POLICY>",
        "Bytes a second, with K, M, G or T; 0 is no limit",
        "write-blocking",
        concat!("blkmirror ", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let told = blkmirror(&["man", "/dev/null/pages"]);
    assert!(told.code == Some(1) && told.stdout.is_empty(), "{told:?}");
    assert!(told.stderr.starts_with("blkmirror: /dev/null/pages/blkmirror.1: "), "{told:?}");
}

/// What bash offers for the last of `words`, by our script.
fn offered(script: &Path, words: &[&str]) -> BTreeSet<String> {
    let asked = r#"
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        function=$(complete -p blkmirror | sed 's/.*-F \([^ ]*\) .*/\1/')
        "$function" blkmirror "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let asked = [&["--norc", "-c", asked, "bash", script.to_str().unwrap()], words].concat();
    let told = run("bash", &asked);
    assert_eq!((told.code, told.stderr.as_str()), (Some(0), ""), "{words:?}");
    told.stdout.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn bash_completes_verbs_options_values_and_files() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("completion.bash");
    fs::write(&script, blkmirror(&["completions", "bash"]).stdout).unwrap();
    let offer = |words: &[&str]| offered(&script, words);
    let set = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<BTreeSet<String>>();
    assert_eq!(offer(&["blkmirror", "sta"]), set(&["status"]));
    assert!(offer(&["blkmirror", ""]).is_superset(&verbs()));
    assert_eq!(offer(&["blkmirror", "mirror", "--on"]), set(&["--on-source-error", "--on-target-error"]));
    assert_eq!(offer(&["blkmirror", "mirror", "--mode", ""]), set(&["auto", "background", "write-blocking"]));
    assert_eq!(offer(&["blkmirror", "set", "--mode", "w"]), set(&["write-blocking"]));
    let image = folder.path().join("disk.qcow2").to_str().unwrap().to_owned();
    fs::write(&image, "").unwrap();
    let beginning = folder.path().join("dis").to_str().unwrap().to_owned();
    assert_eq!(offer(&["blkmirror", "serve", "--control", &beginning]), set(&[&image]));
}

#[test]
fn each_shell_has_a_script_that_knows_the_verbs() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let run = blkmirror(&["completions", shell]);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{shell}");
        for verb in verbs() {
            assert!(run.stdout.contains(&verb), "{shell}: {verb}");
        }
    }
}
