//! Reads the sources and checks STYLE.md's arrows: which stage may name which, and what pure files may never name.
//!
//! The house as it stands differs from the page in four places, on purpose: `wal` and `net` name `protocol` (a stored message
//! is what a consumer gets, byte for byte), `shard` names `wal` (it packs its own log; the pure half only), `access` and
//! `config` are named by those they configure, and `gateway` asks `driver` alone. Whatever stands behind `#[cfg(test)]` is free.

use std::path::{Path, PathBuf};

/// Module: whom it may name besides itself and what everybody may name.
const ARROWS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("limits", &[]),
    ("time", &[]),
    ("metrics", &[]),
    ("planted", &[]),
    ("access", &["wal"]),
    ("config", &["access", "wal"]),
    ("net", &["protocol"]),
    ("protocol", &[]),
    ("shard", &["access", "protocol", "wal"]),
    ("wal", &["protocol"]),
    ("deliver", &["protocol"]),
    ("ring", &[]),
    ("driver", &["access", "config", "deliver", "net", "preflight", "protocol", "ring", "shard", "wal"]),
    ("gateway", &["access", "driver", "protocol"]),
    ("preflight", &["config", "wal"]),
    ("logging", &[]),
    ("client", &["protocol"]),
];
const EVERYBODY_MAY_NAME: &[&str] = &["types", "limits", "time", "metrics", "planted"];

/// Decide without a clock, a file, a socket or a runtime. A folder stands for all that is in it.
const PURE: &[&str] = &[
    "types.rs",
    "limits.rs",
    "time.rs",
    "metrics.rs",
    "access.rs",
    "gateway/request.rs",
    "protocol",
    "shard",
    "deliver/outbox.rs",
    "wal/batch.rs",
    "wal/checkpoint.rs",
    "wal/commit.rs",
    "wal/format.rs",
    "wal/record.rs",
    "wal/recovery.rs",
    "wal/segments.rs",
];
const IMPURE: &[&str] = &[
    "glommio",
    "tokio",
    "flume",
    "getrandom",
    "rand::",
    "std::fs",
    "std::io",
    "std::thread",
    "std::time",
    "std::env",
    "std::process",
    "RandomState",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "SystemTime",
    ".await",
    "async fn",
    "RefCell",
    "HashMap<",
    "HashSet<",
];
/// Maps whose walk is the same in every run.
const SEEDLESS: &[&str] = &["FxHashMap<", "FxHashSet<"];

/// Who may name the runtime.
const GLOMMIO: &[&str] = &["driver", "net", "ring", "gateway", "deliver/writer.rs", "wal/writer.rs", "wal/reader.rs"];
const TOKIO: &[&str] = &["client", "bin/blipmq"];

#[test]
fn stages_name_only_whom_they_may() {
    let mut wrong = Vec::new();
    for (file, code) in sources() {
        let Some((_, allowed)) = ARROWS.iter().find(|(module, _)| belongs(&file, module)) else {
            let outside = ["lib.rs", "main.rs"].contains(&file.as_str()) || file.starts_with("bin/");
            assert!(outside, "{file} is in no line of the table");
            continue;
        };
        let own = file.split(['/', '.']).next().unwrap_or_default();
        for named in code.split("crate::").skip(1) {
            let named: String = named.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if named != own && !allowed.contains(&named.as_str()) && !EVERYBODY_MAY_NAME.contains(&named.as_str()) {
                wrong.push(format!("src/{file} names `{named}`"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn pure_files_are_pure() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (file, code) in sources().into_iter().filter(|(file, _)| PURE.iter().any(|pure| belongs(file, pure))) {
        seen += 1;
        let code = SEEDLESS.iter().fold(code, |code, seedless| code.replace(seedless, ""));
        wrong.extend(IMPURE.iter().filter(|word| code.contains(**word)).map(|word| format!("src/{file}: {word}")));
    }
    assert!(seen > 30, "only {seen} pure files were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `shard` runs in tests and simulators: of the log it may name what is pure, too.
#[test]
fn the_shard_names_the_pure_half_of_the_log() {
    for (file, code) in sources().into_iter().filter(|(file, _)| belongs(file, "shard")) {
        for named in code.split("crate::wal::").skip(1) {
            let named: String = named.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            assert!(PURE.contains(&format!("wal/{named}.rs").as_str()), "src/{file} names wal::{named}");
        }
    }
}

#[test]
fn runtimes_stay_where_they_belong() {
    for (file, code) in sources() {
        for (runtime, homes) in [("glommio", GLOMMIO), ("tokio::", TOKIO)] {
            let home = homes.iter().any(|home| belongs(&file, home));
            assert!(home || !code.contains(runtime), "src/{file} names {runtime}");
        }
    }
}

#[test]
fn unsafe_code_is_in_the_ring_only() {
    for (file, code) in sources() {
        let found = code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe fn");
        assert!(!found || file == "ring/spsc.rs", "src/{file} has unsafe code");
    }
}

/// Whether `file` is `place`, or in the folder or module of that name.
fn belongs(file: &str, place: &str) -> bool {
    file.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest == ".rs" || rest.starts_with('/'))
}

/// Every source file but tests: its path below `src`, and its code without comments, strings' contents and tests.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).expect("src is readable");
        let paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        folders.extend(paths.iter().filter(|path| path.is_dir()).cloned());
        files.extend(paths.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs")));
    }
    files.sort();
    let below = |path: &PathBuf| path.strip_prefix(&root).expect("below src").to_string_lossy().into_owned();
    let named = files.iter().map(|path| (below(path), std::fs::read_to_string(path).expect("text")));
    // Whole files of tests are declared behind `#[cfg(test)]`.
    let tests = ["tests.rs", "model.rs", "strategies.rs", "golden.rs"];
    named
        .filter(|(file, _)| !tests.iter().any(|test| file.ends_with(test)))
        .map(|(file, text)| (file, code(&text)))
        .collect()
}

fn code(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = before_tests.lines().map(|line| line.split("//").next().unwrap_or_default());
    let bare = lines.map(|line| line.split('"').step_by(2).collect::<Vec<_>>().join("\"\""));
    bare.collect::<Vec<_>>().join("\n")
}
