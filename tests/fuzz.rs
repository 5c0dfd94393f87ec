//! Replays what fuzzing found and what it starts from: every file under `fuzz/regressions/` and `fuzz/corpus/`, through the very
//! oracles of the fuzz targets.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// One test, not one per target: the limit on memory counts what the whole process holds.
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
            // Shown if it fails.
            println!("{}", file.display());
            run(&input);
        }
    }
    assert!(bytes < 200 * 1024, "{bytes} bytes of seeds: keep them few and small");
}

#[test]
fn every_folder_belongs_to_a_target_and_every_target_to_a_program() {
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
