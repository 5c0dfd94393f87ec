//! A disk of our own under a real file system: every write is logged, errors and slowness come on demand.
//!
//! ```text
//! file in memory <- blklogwrites <- (blkdebug | throttle) <- raw <- FUSE export <- loop device <- ext4 or XFS
//! \_____________________ qemu-storage-daemon ___________________________/
//! ```
//!
//! Owns: the tools it needs, what it makes (processes, loop devices, mounts, files), and that all of it is undone: on drop,
//! so on failure and on Ctrl-C too. Needs root.
//!
//! The loop device stays without direct I/O on purpose: then one worker gives the export one write after the other. QEMU 10.0's
//! FUSE export lets a second write overwrite the buffer of the first (seen here as file systems that do not mount); so a
//! recording is checked: the disk must be what its log says.

/// What is made, mounted and undone.
pub mod device;
/// One client at the end: everything comes out.
pub mod drain;
/// Publishers and consumers at work on it.
pub mod load;
/// The daemon's control socket.
pub mod qmp;
/// A broker on it, with its subscriptions made.
pub mod stage;
/// The log of writes, and the disks a power cut leaves.
pub mod writes;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use clap::ValueEnum;

use crate::Fallible;

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }

    /// Bytes of a disk: small, so that many fit; mkfs.xfs makes none below 300 MiB.
    pub fn disk_size(self) -> u64 {
        match self {
            FileSystem::Ext4 => 128 << 20,
            FileSystem::Xfs => 320 << 20,
        }
    }

    fn tool(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "mkfs.ext4",
            FileSystem::Xfs => "mkfs.xfs",
        }
    }
}

/// Where the disks are kept: memory, as long as there is any.
pub fn workplace() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() }
}

/// What the rig needs and the package it is in. `Err`: all that is missing, and how to get it.
pub fn check_tools(fs: FileSystem) -> Fallible<()> {
    let needed = [
        ("qemu-storage-daemon", "qemu-utils"),
        ("losetup", "mount"),
        ("mount", "mount"),
        ("umount", "mount"),
        (fs.tool(), if fs == FileSystem::Xfs { "xfsprogs" } else { "e2fsprogs" }),
        ("filefrag", "e2fsprogs"),
        ("fusermount3", "fuse3"),
    ];
    let missing: Vec<String> = needed
        .iter()
        .filter(|(tool, _)| find(tool).is_none())
        .map(|(tool, package)| format!("{tool} (package {package})"))
        .collect();
    if !missing.is_empty() {
        return Err(format!("missing: {}. scripts/rig.sh installs what the rig needs", missing.join(", ")).into());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            return Err(format!("{device} is missing: the kernel has no FUSE or no loop devices").into());
        }
    }
    if std::fs::metadata("/proc/self")?.uid() != 0 {
        return Err("mounting and loop devices need root".into());
    }
    Ok(())
}

/// The usual folders too: a user's PATH may lack them.
fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    folders.map(|folder| folder.join(tool)).find(|path| path.is_file())
}

/// Runs a tool to its end; what it printed. `Err`: its own words.
pub fn tool(name: &str, args: &[&str]) -> Fallible<String> {
    let path = find(name).ok_or_else(|| format!("{name} is missing"))?;
    let output = Command::new(path).args(args).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_string());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name} {}: {} {}", args.join(" "), output.status, words.trim()).into())
}

/// Set by SIGINT and SIGTERM: whoever waits gives up, and what was made is undone on the way out.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on a signal ends the run in order.
pub fn catch_signals() -> Fallible<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(())
}

/// `Err`: a signal came.
pub fn go_on() -> Fallible<()> {
    match INTERRUPTED.get() {
        Some(flag) if flag.load(Ordering::SeqCst) => Err("interrupted; everything was undone".into()),
        _ => Ok(()),
    }
}
