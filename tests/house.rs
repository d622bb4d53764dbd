//! The house's edges (`docs/ARCHITECTURE.md`): who may use whom, and the four rules of which each has one place.
//!
//! Held here: `cli → engine → formats`, never back; inside `engine`, downwards only; `unsafe` only in `engine/src/io`;
//! threads and waits only in `engine/src/daemon`; the record is written only in `engine/src/pivot`. What a test
//! module does is its own affair.
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The engine's modules, top to bottom: each may use those on lower floors, not its neighbours, not upwards.
const FLOORS: [&[&str]; 12] = [
    &["daemon"],
    &["job", "target"],
    &["state"],
    &["pivot"],
    &["export", "copier", "seed", "open"],
    &["mirror"],
    &["planes"],
    &["dirty"],
    &["disk"],
    &["chain"],
    &["journal", "data_file"],
    &["io"],
];

/// Anyone may use these; they use each other and `io`, which is below everything.
///
/// `control` is words alone (requests, replies, QMP): it uses nothing, so everybody may speak them.
const LEAVES: [&str; 11] =
    ["bell", "control", "courtesy", "error", "fault", "range", "rate", "stats", "sync", "tls", "zero"];

/// Words that start a thread or wait.
const WAITING: [&str; 11] = [
    "thread::spawn",
    "thread::Builder",
    "thread::scope",
    "thread::sleep",
    "thread::park",
    "Condvar",
    "Barrier",
    "Wait::One",
    ".recv()",
    ".recv_timeout(",
    "wait_timeout",
];

/// One source file, as far as it runs in the program: without comments, text and test modules.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: production(text) }
    }

    /// The engine's module that the file belongs to, and how many folders below it the file's own module is.
    fn module(&self) -> Option<(&str, usize)> {
        let inside = self.path.strip_prefix("engine/src/")?.strip_suffix(".rs")?;
        let inside = inside.strip_suffix("/mod").unwrap_or(inside);
        Some((inside.split('/').next()?, inside.matches('/').count()))
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

/// The text without comments, string literals and what is compiled for tests alone; lines stay where they were.
fn production(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            kept.push('\n');
            let Some(item) = lines.next() else { break };
            kept.push('\n');
            // An item of one line, or everything up to the brace that closes it where it began.
            let indent = &item[..item.len() - item.trim_start().len()];
            let one_line = item.trim_end().ends_with(';') || item.matches('{').count() == item.matches('}').count();
            if !one_line {
                let closing = format!("{indent}}}");
                let inside = lines.by_ref().take_while(|line| line.trim_end() != closing).count();
                kept.push_str(&"\n".repeat(inside + 1));
            }
            continue;
        }
        kept.push_str(&without_text(line));
        kept.push('\n');
    }
    kept
}

/// A line without its comment and what stands between quotes.
fn without_text(line: &str) -> String {
    let mut kept = String::new();
    let mut letters = line.chars().peekable();
    let mut quoted = false;
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if quoted => drop(letters.next()),
            '"' => quoted = !quoted,
            '/' if !quoted && letters.peek() == Some(&'/') => break,
            _ if quoted => (),
            letter => kept.push(letter),
        }
    }
    kept
}

/// The modules of the engine that a file names: by `crate::`, alone or in braces, or by `super::` from its top.
fn used(source: &Source) -> Vec<(usize, String)> {
    let depth = source.module().map_or(0, |(_, depth)| depth);
    let roots = ["crate::".to_owned(), "super::".repeat(depth + 1)];
    let mut used = Vec::new();
    for root in &roots {
        for (at, _) in source.text.match_indices(root.as_str()) {
            let before = source.text[..at].chars().next_back();
            if before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_' || letter == ':') {
                continue;
            }
            let line = source.text[..at].matches('\n').count() + 1;
            used.extend(names(&source.text[at + root.len()..]).into_iter().map(|name| (line, name)));
        }
    }
    used
}

/// The first names of a path's rest: one, or each of the outermost braces.
fn names(rest: &str) -> Vec<String> {
    let word =
        |text: &str| text.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect::<String>();
    let Some(list) = rest.strip_prefix('{') else { return vec![word(rest)] };
    let (mut names, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                names.push(word(list[start..at].trim()));
                start = at + 1;
                if letter == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => (),
        }
    }
    names
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// Uses inside the engine that do not go downwards.
fn wrong_edges(source: &Source) -> Vec<String> {
    let Some((module, _)) = source.module().filter(|(module, _)| *module != "lib") else { return Vec::new() };
    let leaf = LEAVES.contains(&module);
    let Some(own) = floor(module).or(leaf.then_some(FLOORS.len() - 2)) else {
        return vec![format!(
            "{}: the module `{module}` has no floor: give it one in FLOORS (tests/house.rs)",
            source.path
        )];
    };
    let wrong = |name: &str| match floor(name) {
        Some(other) => name != module && other <= own,
        None => false,
    };
    let told = |(line, name): (usize, String)| {
        format!(
            "{}:{line}: `{module}` uses `{name}`, which is not below it: turn the edge round, or move what is shared down",
            source.path
        )
    };
    used(source).into_iter().filter(|(_, name)| wrong(name)).map(told).collect()
}

/// A word of a file outside of the one place where it may stand.
fn misplaced(source: &Source, words: &[&str], places: &[&str], rule: &str) -> Vec<String> {
    if places.iter().any(|place| source.path.starts_with(place)) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in source.lines() {
        for word in words.iter().filter(|word| has_word(line, word)) {
            found.push(format!("{}:{number}: `{word}`: {rule}", source.path));
        }
    }
    found
}

/// True where `word` stands in `line` and is no part of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_name = |letter: Option<char>| letter.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    line.match_indices(word).any(|(at, _)| {
        let before = part_of_name(line[..at].chars().next_back()) && part_of_name(word.chars().next());
        let behind = part_of_name(line[at + word.len()..].chars().next()) && part_of_name(word.chars().next_back());
        !before && !behind
    })
}

/// Everything that is wrong with one file.
fn faults(source: &Source) -> Vec<String> {
    let mut faults = wrong_edges(source);
    if source.path.starts_with("formats/") {
        faults.extend(misplaced(
            source,
            &["engine::", "blkmirror::"],
            &[],
            "formats is at the bottom and uses neither engine nor cli",
        ));
    }
    if source.path.starts_with("engine/") {
        faults.extend(misplaced(source, &["blkmirror::"], &[], "engine does not use cli"));
    }
    faults.extend(misplaced(source, &["unsafe"], &["engine/src/io/"], "only engine/src/io has unsafe code"));
    // What the command line does in its own process (`demo`'s guest, a progress bar) is no part of the data path.
    let may_wait = ["engine/src/daemon/", "engine/src/daemon.rs", "engine/src/io/", "cli/"];
    faults.extend(misplaced(
        source,
        &WAITING,
        &may_wait,
        "only engine/src/daemon starts threads or waits; all else is stepped",
    ));
    let may_record = ["engine/src/pivot/record_file.rs", "formats/src/record/"];
    faults.extend(misplaced(source, &[".encode()"], &may_record, "only engine/src/pivot writes the record"));
    faults
}

/// The program's source files below `folder`, without those that are only tests.
fn sources(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("an entry of a folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).expect("below the root").display().to_string();
                let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
                found.push((name, text));
            }
        }
    }
    let tests = test_modules(&found);
    let is_test = |path: &str| tests.iter().any(|test| path.starts_with(test.as_str()));
    found.iter().filter(|(path, _)| !is_test(path)).map(|(path, text)| Source::new(path, text)).collect()
}

/// The paths that `#[cfg(test)] mod NAME;` means, without their `.rs` or `/`.
fn test_modules(files: &[(String, String)]) -> Vec<String> {
    let mut modules = Vec::new();
    for (path, text) in files {
        let own = path.trim_end_matches(".rs");
        let home = own.strip_suffix("/mod").or(own.strip_suffix("/lib")).or(own.strip_suffix("/main")).unwrap_or(own);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for pair in lines.windows(2).filter(|pair| pair[0].starts_with("#[cfg(") && pair[0].contains("test")) {
            let name = pair[1].trim_start_matches("pub ").strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
            modules.extend(name.into_iter().flat_map(|name| [format!("{home}/{name}.rs"), format!("{home}/{name}/")]));
        }
    }
    modules
}

#[test]
fn the_house_stands_as_it_was_drawn() {
    let mut told = String::new();
    let mut count = 0;
    for folder in ["formats/src", "engine/src", "cli"] {
        for source in sources(folder) {
            count += 1;
            for fault in faults(&source) {
                let _ = writeln!(told, "{fault}");
            }
        }
    }
    assert!(told.is_empty(), "\n{told}");
    assert!(count > 20, "the sources were not found: {count} files");
}

#[test]
fn the_manifests_have_no_edge_upwards() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (manifest, forbidden) in
        [("formats/Cargo.toml", &["engine", "blkmirror"][..]), ("engine/Cargo.toml", &["blkmirror"])]
    {
        let text = std::fs::read_to_string(root.join(manifest)).unwrap_or_else(|error| panic!("{manifest}: {error}"));
        for line in text.lines() {
            let key = line.split(['.', '=', ' ']).next().unwrap_or_default();
            assert!(!forbidden.contains(&key), "{manifest}: `{line}` is an edge upwards");
        }
    }
}

// The test must be able to fail: each rule sees a planted fault, and is quiet about what only looks like one.

#[track_caller]
fn caught(path: &str, text: &str) {
    assert!(!faults(&Source::new(path, text)).is_empty(), "not caught in {path}: {text}");
}

#[track_caller]
fn fine(path: &str, text: &str) {
    let faults = faults(&Source::new(path, text));
    assert!(faults.is_empty(), "{faults:?}");
}

#[test]
fn planted_faults_are_caught() {
    caught("engine/src/disk/read.rs", "use crate::mirror::Mirror;");
    caught("engine/src/disk.rs", "use crate::{\n    io::Op,\n    export::{gate::Gate, request},\n};");
    caught("engine/src/chain.rs", "fn f() -> crate::disk::Disk { todo }");
    caught("engine/src/chain.rs", "use super::job::Job;");
    caught("engine/src/export/gate.rs", "use super::super::daemon::Daemon;");
    caught("engine/src/copier.rs", "use crate::export::gate::Gate;");
    caught("engine/src/zero.rs", "use crate::disk::Disk;");
    caught("engine/src/io/ring.rs", "use crate::chain::Chain;");
    caught("engine/src/newcomer.rs", "use crate::io::Op;");
    caught("formats/src/raw.rs", "use engine::io::Op;");
    caught("engine/src/job.rs", "use blkmirror::args::Args;");
    caught("engine/src/mirror.rs", "let x = unsafe { y };");
    caught("engine/src/mirror.rs", "std::thread::spawn(|| ());");
    caught("engine/src/job.rs", "io.reap(Wait::One, &mut done)?;");
    caught("formats/src/raw.rs", "use std::sync::Condvar;");
    caught("engine/src/state.rs", "let bytes = record.encode()?;");
    caught("engine/src/state.rs", "#[cfg(test)]\nuse x;\nuse crate::job::Job;");
    caught("engine/src/state.rs", "#[cfg(test)]\nmod tests {\n    use y;\n}\nuse crate::job::Job;");
}

#[test]
fn what_only_looks_like_a_fault_is_none() {
    fine("engine/src/disk/read.rs", "use crate::chain::Chain;\nuse super::task::Task;\n// crate::mirror does it\n");
    fine("engine/src/disk/read.rs", "use crate::disk::Task;\nlet said = \"crate::mirror, unsafe\";");
    fine("engine/src/mirror.rs", "#![deny(unsafe_code)]\nuse crate::{dirty::Claim, disk::{Disk, Tools}, zero};");
    fine("engine/src/chain.rs", "#[cfg(test)]\nmod tests {\n    use crate::daemon::Daemon;\n}\n");
    fine("engine/src/io/ring.rs", "unsafe { ring.push() };");
    fine("engine/src/daemon/threads.rs", "std::thread::spawn(|| ());");
    fine("engine/src/pivot/record_file.rs", "let bytes = record.encode()?;");
}

#[test]
fn files_that_are_only_tests_are_found_by_their_declaration() {
    let declared = |path: &str, text: &str| (path.to_owned(), text.to_owned());
    let files = [
        declared("engine/src/lib.rs", "pub mod io;\n#[cfg(test)]\nmod simulator;\n"),
        declared("engine/src/dirty.rs", "#[cfg(all(test, feature = \"loom\"))]\nmod model;\n"),
    ];
    let tests = test_modules(&files);
    for path in ["engine/src/simulator.rs", "engine/src/simulator/", "engine/src/dirty/model.rs"] {
        assert!(tests.iter().any(|test| test == path), "{path} of {tests:?}");
    }
}
