//! What goes on around a broker: programs that end by themselves, a process as the kernel sees it, files to damage.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::eventually;

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// `None`: by a signal.
    pub code: Option<i32>,
    /// Both output streams.
    pub said: String,
}

impl Ended {
    /// The exit code, and all of these words.
    pub fn expect(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.said);
        for word in words {
            assert!(self.said.contains(word), "{word:?} in: {}", self.said);
        }
    }
}

/// One of our programs, beside the test's own.
pub fn program(name: &str) -> PathBuf {
    profile_dir().join(name)
}

/// For files of tests: inside the target directory, so on a disk.
pub fn scratch() -> PathBuf {
    let target = profile_dir();
    target.parent().expect("a target directory").join("tmp")
}

fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("this program");
    test.ancestors().nth(2).expect("the profile's directory").to_owned()
}

/// Runs a program that must end by itself.
pub fn run(command: &mut Command) -> Ended {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    fs::create_dir_all(scratch()).expect("a directory");
    let path = scratch().join(format!("run-{}-{serial}", std::process::id()));
    // A file: a pipe that nobody empties would stop a talkative program.
    let out = File::create(&path).expect("a file");
    let child = command.stdin(Stdio::null()).stdout(out.try_clone().expect("a file")).stderr(out).spawn();
    let mut child = Killed(child.expect("the program starts"));
    let status = eventually("the program to end", || child.0.try_wait().expect("a process of ours"));
    let said = String::from_utf8_lossy(&fs::read(&path).expect("its output")).into_owned();
    fs::remove_file(&path).expect("a file of ours");
    Ended { code: status.code(), said }
}

/// The tool, with arguments.
pub fn blipmq<S: AsRef<OsStr>>(arguments: &[S]) -> Ended {
    run(Command::new(program("blipmq")).env_clear().args(arguments))
}

/// A program that must not outlive the test that started it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It has normally ended by itself, and then these do nothing.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Resident memory.
pub fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process of ours");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

pub fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("a process of ours").count()
}

/// What the segments take on the disk.
pub fn disk_bytes(store: &Path) -> u64 {
    let slots = fs::read_dir(store.join("wal")).expect("the log's directory");
    // A slot may be deleted while we look.
    slots.filter_map(|slot| slot.ok()?.metadata().ok()).map(|slot| slot.blocks() * 512).sum()
}

pub fn slot_path(store: &Path, slot: u64) -> PathBuf {
    store.join("wal").join(format!("slot-{slot:04}.seg"))
}

/// Turns one bit.
pub fn flip_byte(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("a byte");
    file.sync_all().expect("a file");
}

/// Every file of a store but the lock, with its contents: to see that nothing has changed.
pub fn store_bytes(store: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut dirs = vec![store.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().is_some_and(|name| name != "lock") {
                files.push((path.clone(), fs::read(&path).expect("a file")));
            }
        }
    }
    files.sort();
    files
}
