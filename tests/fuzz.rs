//! Replays what fuzzing found and what it starts from: every file under `fuzz/regressions/` and `fuzz/corpus/`, through the very
//! oracles of the fuzz targets.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};

/// The limit on memory counts what the whole process holds: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// One test, not one per target: the limit on memory counts what the whole process holds.
/// Too much memory ends the process: what it was at stays in a file.
fn replay(name: &str, run: fn(&[u8]), input: &[u8], from: &str) {
    let last = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}-last"));
    fs::write(&last, input).expect("a scratch file");
    println!("{name}: {from}, kept as {}", last.display());
    run(input);
}

#[test]
fn what_was_found_stays_fixed() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    fuzz::begin();
    let mut bytes = 0;
    for (name, run) in fuzz::TARGETS {
        let seeds = files(&here.join("corpus").join(name));
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for file in files(&here.join("regressions").join(name)).into_iter().chain(seeds) {
            let input = fs::read(&file).expect("readable");
            bytes += input.len();
            replay(name, run, &input, &file.display().to_string());
        }
    }
    assert!(bytes < 200 * 1024, "{bytes} bytes of seeds: keep them few and small");
}

/// Without a fuzzer's guidance, but in every test run, and shrunk if it fails: random inputs, and seeds with a few bytes changed,
/// cut out or repeated.
#[test]
fn whatever_the_input_the_oracles_hold() {
    let _alone = alone();
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, run) in fuzz::TARGETS {
        let seeds: Vec<Vec<u8>> =
            files(&here.join(name)).iter().map(|file| fs::read(file).expect("readable")).collect();
        let edits = proptest::collection::vec((any::<Index>(), any::<u8>(), 0..3u8), 0..6);
        let near_a_seed = (select(seeds), edits).prop_map(|(mut input, edits)| {
            for (at, byte, kind) in edits {
                let at = at.index(input.len() + 1);
                match kind {
                    0 => input.insert(at, byte),
                    1 => drop(input.drain(at.min(input.len())..(at + usize::from(byte) % 8).min(input.len()))),
                    _ => input.get_mut(at).into_iter().for_each(|old| *old = byte),
                }
            }
            input
        });
        let any_input = proptest::collection::vec(any::<u8>(), 0..300);
        let config = Config { cases: 500, failure_persistence: None, ..Config::default() };
        let outcome = TestRunner::new(config).run(&prop_oneof![any_input, near_a_seed], |input| {
            replay(name, run, &input, "made here");
            Ok(())
        });
        outcome.unwrap_or_else(|failure| panic!("{name}: {failure}"));
    }
}

#[test]
fn every_folder_belongs_to_a_target_and_every_target_to_a_program() {
    let _alone = alone();
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let known: BTreeSet<String> = fuzz::TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    let stems = |folder: &str| -> BTreeSet<String> {
        let stem = |path: &PathBuf| path.file_stem().map(|name| name.to_string_lossy().into_owned());
        files(&here.join(folder)).iter().filter_map(stem).collect()
    };
    assert_eq!(stems("fuzz_targets"), known);
    for folder in ["corpus", "regressions", "dictionaries"] {
        assert!(stems(folder).is_subset(&known), "{folder}");
    }
}
