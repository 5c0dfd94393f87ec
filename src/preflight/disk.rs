//! The data directory: usable, direct, with room; and how long its disk takes to keep a promise.

use super::{Note, PreflightError};
use crate::config::{ByteSize, Config, WalSync};
use crate::limits::BLOCK;
use crate::wal::commit::FsyncPolicy;
use nix::fcntl::OFlag;
use nix::sys::statfs::{
    self, FUSE_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, SMB_SUPER_MAGIC, TMPFS_MAGIC,
};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Writes of one measurement.
const PROBE_WRITES: usize = 32;
/// What a store needs beside its segments: checkpoints.
const ROOM_RESERVE: u64 = 64 << 20;
/// How the file of a v1 broker begins (V1.md 2.8).
const V1_MAGIC: &[u8] = b"BLIPWAL\0";

/// The store's absolute path, and whether O_DIRECT works there.
pub(super) fn check_store(
    config: &Config,
    cores: u64,
    notes: &mut Vec<Note>,
) -> Result<(PathBuf, bool), PreflightError> {
    let path = Path::new(&config.wal_path);
    if path.is_file() {
        return Err(not_a_directory(path));
    }
    let fresh = !path.join("wal").exists();
    let refuse = |what: &str, error: io::Error| {
        let user = "make it a directory the broker's user may write to, or change `wal_path`";
        PreflightError::machine(format!("cannot {what} the store's directory {}: {error}", path.display()), user)
    };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| refuse("make", error))?;
    let store = path.canonicalize().map_err(|error| refuse("find", error))?;
    // A plain file first, so that a directory that cannot be written to is not called a lack of O_DIRECT.
    drop(Scratch::create(&store, 0).map_err(|error| refuse("write to", error))?);
    let about = statfs::statfs(&store).map_err(|error| refuse("look at", error.into()))?;
    let file_system = about.filesystem_type();
    let direct = file_system != TMPFS_MAGIC && has_direct_io(&store);
    if !direct {
        let name = if file_system == TMPFS_MAGIC { "is memory (tmpfs)" } else { "has no O_DIRECT" };
        let problem =
            format!("the file system of {} {name}: no promise of fsync_policy could be kept", store.display());
        if !config.storage.allow_buffered_io {
            let remedy =
                "put `wal_path` on ext4, XFS or btrfs of a real disk; for development only, `--allow-buffered-io`";
            return Err(PreflightError::setting(problem, remedy));
        }
        notes.push(Note::Warning(format!("{problem}; going on, since storage.allow_buffered_io is set")));
    }
    notes.extend(odd_file_system(file_system).map(Note::Warning));
    let free = about.blocks_available().saturating_mul(u64::try_from(about.block_size()).unwrap_or(0));
    notes.extend(room(free, fresh, cores, config)?);
    Ok((store, direct))
}

fn not_a_directory(path: &Path) -> PreflightError {
    let mut begin = [0; V1_MAGIC.len()];
    let v1 = File::open(path).and_then(|mut file| file.read_exact(&mut begin)).is_ok() && begin == V1_MAGIC;
    let shown = path.display();
    if v1 {
        let remedy = format!(
            "move it away, start the broker, and import its messages: `blipmq import-v1 <moved file>`; or set \
            `wal_path` to another place than {shown}"
        );
        return PreflightError::setting(
            format!("`wal_path` = {shown} is the log file of a v1 broker, not a directory"),
            remedy,
        );
    }
    PreflightError::setting(
        format!("`wal_path` = {shown} is a file, not a directory"),
        "name a directory, or a place for one",
    )
}

fn odd_file_system(kind: FsType) -> Option<String> {
    let name = match kind {
        OVERLAYFS_SUPER_MAGIC => "a container's own layer (overlayfs): it is gone with the container; mount a volume",
        NFS_SUPER_MAGIC | SMB_SUPER_MAGIC => "a network file system: what a sync promises there is the server's word",
        FUSE_SUPER_MAGIC => "a FUSE file system: what a sync promises there depends on its program",
        _ => return None,
    };
    Some(format!("the store is on {name}"))
}

/// - `free`: bytes this user may still take. A store that exists has its segments already.
fn room(free: u64, fresh: bool, cores: u64, config: &Config) -> Result<Option<Note>, PreflightError> {
    let per_core = u64::from(config.storage.spare_segments) + 1;
    let need = (cores * per_core).saturating_mul(config.storage.segment_size.0).saturating_add(ROOM_RESERVE);
    if free >= need {
        return Ok(None);
    }
    let (free, need) = (ByteSize(free >> 20 << 20), ByteSize(need));
    let problem = format!("{free} are free for the store; {cores} cores want {need} for their first segments");
    let remedy = "free some space, or lower `storage.segment_size`, `storage.spare_segments` or `shards.count`";
    match fresh {
        true => Err(PreflightError::machine(problem, remedy)),
        false => Ok(Some(Note::Warning(format!("{problem}. What to do: {remedy}")))),
    }
}

fn has_direct_io(store: &Path) -> bool {
    let written = Scratch::create(store, OFlag::O_DIRECT.bits()).and_then(|scratch| {
        let mut buffer = Vec::new();
        scratch.file.write_all_at(aligned(&mut buffer), 0)
    });
    written.is_ok()
}

/// One zeroed block at an address O_DIRECT accepts, inside `buffer`.
fn aligned(buffer: &mut Vec<u8>) -> &[u8] {
    buffer.resize(2 * BLOCK, 0);
    let skip = buffer.as_ptr().align_offset(BLOCK);
    &buffer[skip..skip + BLOCK]
}

/// A file that is gone when it is dropped.
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    fn create(store: &Path, flags: i32) -> io::Result<Scratch> {
        let path = store.join(format!("preflight-{}.tmp", std::process::id()));
        let file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).custom_flags(flags).open(&path)?;
        Ok(Scratch { file, path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Not worth ending a start for; the name says what it is.
        let _kept = std::fs::remove_file(&self.path);
    }
}

/// How long a synced 4 KiB write takes on an otherwise idle broker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskLatency {
    pub p50: Duration,
    pub max: Duration,
}

impl DiskLatency {
    /// What it means for confirms, in a sentence for the log.
    pub fn meaning(&self, policy: FsyncPolicy) -> String {
        let (p50, max) = (self.p50.as_micros(), self.max.as_micros());
        let measured = format!("a synced 4 KiB write takes {p50} us here (median of {PROBE_WRITES}, at most {max} us)");
        let means = match policy {
            FsyncPolicy::Always => format!("a lone publish is confirmed after about {p50} us, many share one sync"),
            FsyncPolicy::None => "confirms do not wait for it (fsync_policy is \"none\")".to_owned(),
            _ => format!("confirms wait for it only when the bound of fsync_policy = \"{policy}\" is reached"),
        };
        let slow = self.p50 > Duration::from_millis(5);
        let hint = if slow { "; a disk with power-loss protection takes less than 100 us" } else { "" };
        format!("{measured}: {means}{hint}")
    }
}

/// Measures the store's disk with a few dozen writes to a file that is removed again.
///
/// - `direct_io`: as `Ready::direct_io`.
pub fn probe_disk(store: &Path, wal_sync: WalSync, direct_io: bool) -> io::Result<DiskLatency> {
    let direct = if direct_io { OFlag::O_DIRECT } else { OFlag::empty() };
    let sync = if wal_sync == WalSync::Dsync { OFlag::O_DSYNC } else { OFlag::empty() };
    let scratch = Scratch::create(store, (direct | sync).bits())?;
    let mut buffer = Vec::new();
    let block = aligned(&mut buffer);
    let at = |n: usize| (n * BLOCK) as u64;
    // As in a segment, the blocks exist before they are written: the file's size and extents do not change any more.
    for n in 0..PROBE_WRITES {
        scratch.file.write_all_at(block, at(n))?;
    }
    scratch.file.sync_all()?;
    let mut took = Vec::with_capacity(PROBE_WRITES);
    for n in 0..PROBE_WRITES {
        let begin = Instant::now();
        scratch.file.write_all_at(block, at(n))?;
        if wal_sync == WalSync::Fdatasync {
            scratch.file.sync_data()?;
        }
        took.push(begin.elapsed());
    }
    took.sort();
    Ok(DiskLatency { p50: took[PROBE_WRITES / 2], max: took[PROBE_WRITES - 1] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Dir(PathBuf);

    impl Dir {
        /// Under target/, which is on a real disk where /tmp may be memory.
        fn new() -> Dir {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("preflight-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(name);
            std::fs::create_dir_all(&path).unwrap();
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _gone_or_not = std::fs::remove_dir_all(&self.0);
        }
    }

    fn config(path: &Path) -> Config {
        Config { wal_path: path.to_str().unwrap().into(), ..Config::default() }
    }

    #[test]
    fn a_new_store_directory_is_made_private_and_left_empty() {
        let dir = Dir::new();
        let mut config = config(&dir.0.join("a/../b/store"));
        // Whatever the tests run on.
        config.storage.allow_buffered_io = true;
        std::fs::create_dir_all(dir.0.join("a")).unwrap();
        let (store, direct) = check_store(&config, 1, &mut Vec::new()).unwrap();
        assert_eq!(store, dir.0.canonicalize().unwrap().join("b/store"));
        assert_eq!(std::fs::metadata(&store).unwrap().permissions().mode() & 0o777, 0o700);
        for sync in [WalSync::Dsync, WalSync::Fdatasync] {
            let latency = probe_disk(&store, sync, direct).unwrap();
            assert!(latency.p50 > Duration::ZERO && latency.p50 <= latency.max);
        }
        assert_eq!(std::fs::read_dir(&store).unwrap().count(), 0);
    }

    #[test]
    fn a_file_in_the_place_of_the_store_is_refused_and_v1_is_recognised() {
        let dir = Dir::new();
        let file = dir.0.join("blipmq.wal");
        std::fs::write(&file, b"BLIPWAL\0\x01\0\0\0").unwrap();
        let error = check_store(&config(&file), 1, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("import-v1") && error.exit_code() == 78, "{error}");
        std::fs::write(&file, b"x").unwrap();
        let error = check_store(&config(&file), 1, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("is a file") && !error.contains("import-v1"), "{error}");
        let error = check_store(&config(&file.join("below")), 1, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("cannot make") && error.exit_code() == 71, "{error}");
    }

    #[test]
    fn memory_is_no_disk() {
        let shm = Path::new("/dev/shm");
        if statfs::statfs(shm).is_ok_and(|about| about.filesystem_type() == TMPFS_MAGIC) {
            let dir = Dir(shm.join(format!("blipmq-preflight-{}", std::process::id())));
            let mut config = config(&dir.0);
            config.storage.segment_size = ByteSize(0);
            let error = check_store(&config, 1, &mut Vec::new()).unwrap_err().to_string();
            assert!(error.contains("tmpfs") && error.contains("--allow-buffered-io"), "{error}");
            config.storage.allow_buffered_io = true;
            let mut notes = Vec::new();
            // A tmpfs may be small, so room for a whole segment is not asked for here.
            if let Ok((_, direct)) = check_store(&config, 0, &mut notes) {
                assert!(!direct && matches!(&notes[0], Note::Warning(text) if text.contains("tmpfs")), "{notes:?}");
            }
        }
    }

    #[test]
    fn a_full_disk_refuses_a_new_store_and_warns_about_an_old_one() {
        let config = Config::default(); // two segments of 64 MiB per core
        assert_eq!(room((4 * 64 + 64) << 20, true, 2, &config).unwrap(), None);
        let error = room(100 << 20, true, 2, &config).unwrap_err().to_string();
        assert!(error.contains("100MiB are free") && error.contains("320MiB"), "{error}");
        assert!(matches!(room(100 << 20, false, 2, &config).unwrap(), Some(Note::Warning(_))));
    }

    #[test]
    fn the_measurement_is_explained_for_each_policy() {
        let latency = DiskLatency { p50: Duration::from_micros(210), max: Duration::from_millis(9) };
        assert!(latency.meaning(FsyncPolicy::Always).contains("confirmed after about 210 us"));
        assert!(latency.meaning(FsyncPolicy::EveryN(64)).contains("every_n:64"));
        assert!(latency.meaning(FsyncPolicy::None).contains("do not wait"));
        let slow = DiskLatency { p50: Duration::from_millis(9), max: Duration::from_millis(9) };
        assert!(slow.meaning(FsyncPolicy::Always).contains("power-loss protection"));
    }
}
