//! A store's directory: whose it is, that it is ours alone, and that its disk can keep a promise.
//!
//! Owns: `store.json`, the process lock, the checks before the first write. Never: reads or writes a segment.
//! Neighbours: `disk` opens the slots in `wal/`; `keeper` writes them and the checkpoints in `ckpt/`.
//!
//! ```text
//! blipmq.wal/
//!   store.json          written once, when the store is created
//!   lock                flock'ed while a broker runs; holds its pid
//!   wal/slot-NNNN.seg   the log; a name carries no meaning, the header does
//!   ckpt/ckpt-A, ckpt-B alternating checkpoints
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::statfs::{FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::disk::{self, AlignedBuf};
use super::format::{self, SEGMENT_SIZE_MAX, StoreId};
use super::import_v1;
use crate::limits::BLOCK;

/// What this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// Segment size of a new store unless the configuration names one.
pub const SEGMENT_SIZE_DEFAULT: u32 = 64 * 1024 * 1024;
/// Below it, a segment's header and the padding of its last batch are a noticeable share. The format would do with less.
pub const SEGMENT_SIZE_MIN: u32 = 1024 * 1024;
const _: () = assert!(SEGMENT_SIZE_MIN >= format::SEGMENT_SIZE_MIN && SEGMENT_SIZE_DEFAULT <= SEGMENT_SIZE_MAX);
/// The only node there is.
const NODE: u32 = 0;
/// Virtual shards a store may have (DURABILITY 4).
pub const VIRTUAL_SHARDS_MAX: u16 = 1_024;
/// linux/magic.h; nix does not name it.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The names inside a store's directory.
const IDENTITY: &str = "store.json";
const IDENTITY_TMP: &str = "store.json.tmp";
const LOCK: &str = "lock";
const WAL_DIR: &str = "wal";
const CKPT_DIR: &str = "ckpt";

/// What the configuration says about the store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// `wal_path`; may be relative.
    pub path: PathBuf,
    pub virtual_shards: u16,
    pub dead_letter_suffix: String,
    /// `None`: the store's own, or `SEGMENT_SIZE_DEFAULT` for a new one.
    pub segment_size: Option<u32>,
    /// Development only: accept a file system without honest O_DIRECT.
    pub allow_buffered_io: bool,
}

/// `store.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// 32 lower-case hex digits.
    pub uuid: String,
    pub format_version: u32,
    pub virtual_shards: u16,
    pub dead_letter_suffix: String,
    pub segment_size: u32,
    pub created_ms: u64,
}

/// An open store. The process lock is held until it is dropped.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    identity: Identity,
    uuid: [u8; 16],
    direct_io: bool,
    /// `None`: opened for reading while a broker may run.
    lock: Option<File>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "{path} is a log file of BlipMQ v1; choose another wal_path, then import its messages with \
         `blipmq import-v1 {path} --out NEW_WAL_PATH`"
    )]
    V1File { path: PathBuf },
    #[error("wal_path {path} is {found}; it must name a directory (it is made if missing)")]
    NotADirectory { path: PathBuf, found: &'static str },
    #[error("{0}")]
    Config(String),
    #[error("the store {path} is in use by {}: stop it first", holder(*.pid))]
    Locked { path: PathBuf, pid: Option<u32> },
    #[error(
        "segment {path} is still being written by the kernel for a broker that has died; waited {waited_s} s. Wait for its \
         disk to finish, or reboot"
    )]
    SegmentLocked { path: PathBuf, waited_s: u64 },
    #[error(
        "{path} is on {fs}, where a completed write is not on a disk. Move wal_path to a local disk (ext4, XFS), or set \
         allow_buffered_io for development"
    )]
    NoDirectIo { path: PathBuf, fs: String },
    #[error("{what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}: {why}")]
    Damaged { path: PathBuf, why: String },
}

fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

impl StoreError {
    /// What the process exits with: 65 damaged data, 74 I/O, 75 in use, 78 configuration (sysexits.h).
    pub fn exit_code(&self) -> u8 {
        match self {
            StoreError::Damaged { .. } => 65,
            StoreError::Io { .. } => 74,
            StoreError::Locked { .. } | StoreError::SegmentLocked { .. } => 75,
            StoreError::V1File { .. }
            | StoreError::NotADirectory { .. }
            | StoreError::Config(_)
            | StoreError::NoDirectIo { .. } => 78,
        }
    }
}

/// The wall clock, for the times of creation that nothing depends on.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Names the file a failed call was about.
pub(crate) fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

impl Store {
    /// Opens the store, creating it if the path is missing or an empty directory, and locks it for this process.
    pub fn open(options: &StoreOptions) -> Result<Store, StoreError> {
        check_options(options)?;
        let dir = make_directory(&options.path)?;
        let lock = lock_process(&dir)?;
        let identity_path = dir.join(IDENTITY);
        let identity = match read_identity(&identity_path)? {
            Some(identity) => identity,
            None => create(&dir, options)?,
        };
        check_identity(&identity, options)?;
        let direct_io = check_disk(&dir, options.allow_buffered_io)?;
        Ok(Store { uuid: parse_uuid(&identity_path, &identity.uuid)?, dir, identity, direct_io, lock: Some(lock) })
    }

    /// Opens an existing store as it is, for the tools: no configuration to agree with, nothing created. A store in use is
    /// refused unless `force`, which then reads beside its broker without a lock.
    pub fn open_existing(path: &Path, force: bool) -> Result<Store, StoreError> {
        let dir = absolute(path)?;
        let identity_path = dir.join(IDENTITY);
        refuse_files(&dir)?;
        let Some(identity) = read_identity(&identity_path)? else {
            return Err(StoreError::Config(format!("{} is not a store: it has no {IDENTITY}", dir.display())));
        };
        let lock = match lock_process(&dir) {
            Ok(lock) => Some(lock),
            Err(StoreError::Locked { .. }) if force => None,
            Err(error) => return Err(error),
        };
        let direct_io = has_direct_io(&dir)?.is_ok();
        Ok(Store { uuid: parse_uuid(&identity_path, &identity.uuid)?, dir, identity, direct_io, lock })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.dir.join(WAL_DIR)
    }

    pub fn ckpt_dir(&self) -> PathBuf {
        self.dir.join(CKPT_DIR)
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn id(&self) -> StoreId {
        StoreId { uuid: self.uuid, node: NODE }
    }

    pub fn segment_size(&self) -> u32 {
        self.identity.segment_size
    }

    /// False only with `allow_buffered_io` on a file system without O_DIRECT.
    pub fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// False: opened by force beside a running broker.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// Bytes an unprivileged process may still write on the store's file system.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        let stat = statfs(&self.dir).map_err(|errno| io_at("statfs", &self.dir)(errno.into()))?;
        Ok(stat.blocks_available().saturating_mul(u64::try_from(stat.block_size()).unwrap_or(0)))
    }
}

fn check_options(options: &StoreOptions) -> Result<(), StoreError> {
    if options.virtual_shards == 0 || options.virtual_shards > VIRTUAL_SHARDS_MAX {
        let got = options.virtual_shards;
        return Err(StoreError::Config(format!("virtual_shards is {got}; it must be 1..={VIRTUAL_SHARDS_MAX}")));
    }
    match options.segment_size {
        Some(size) => check_segment_size(size).map_err(StoreError::Config),
        None => Ok(()),
    }
}

fn check_segment_size(size: u32) -> Result<(), String> {
    if !(SEGMENT_SIZE_MIN..=SEGMENT_SIZE_MAX).contains(&size) || !size.is_multiple_of(BLOCK as u32) {
        return Err(format!(
            "segment_size is {size}; it must be a multiple of {BLOCK} from {SEGMENT_SIZE_MIN} to {SEGMENT_SIZE_MAX}"
        ));
    }
    Ok(())
}

/// Resolves now: glommio opens relative paths with EBADF, and a later chdir must not move the store.
fn absolute(path: &Path) -> Result<PathBuf, StoreError> {
    std::path::absolute(path).map_err(io_at("resolve", path))
}

/// The path exists as a file: say which mistake that is.
fn refuse_files(dir: &Path) -> Result<(), StoreError> {
    let found = match fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => return Ok(()),
        Ok(meta) if meta.is_file() => {
            let mut magic = [0; import_v1::MAGIC.len()];
            let mut file = File::open(dir).map_err(io_at("open", dir))?;
            if file.read_exact(&mut magic).is_ok() && magic == import_v1::MAGIC {
                return Err(StoreError::V1File { path: dir.to_owned() });
            }
            "a file"
        }
        Ok(_) => "not a directory",
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_at("look at", dir)(error)),
    };
    Err(StoreError::NotADirectory { path: dir.to_owned(), found })
}

fn make_directory(path: &Path) -> Result<PathBuf, StoreError> {
    let dir = absolute(path)?;
    refuse_files(&dir)?;
    if !dir.exists() {
        fs::create_dir_all(&dir).map_err(io_at("create", &dir))?;
    }
    // Through symbolic links, so that the store is one place whatever it was called.
    dir.canonicalize().map_err(io_at("resolve", &dir))
}

fn lock_process(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(&path)
        .map_err(io_at("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            // Informative only: the holder may be about to write it.
            let mut text = String::new();
            let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
            return Err(StoreError::Locked { path: dir.to_owned(), pid });
        }
        Err(TryLockError::Error(error)) => return Err(io_at("lock", &path)(error)),
    }
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| writeln!(file, "{}", std::process::id()))
        .map_err(io_at("write", &path))?;
    Ok(file)
}

fn read_identity(path: &Path) -> Result<Option<Identity>, StoreError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_at("read", path)(error)),
    };
    let damaged = |why: String| StoreError::Damaged { path: path.to_owned(), why };
    // The version first: a later format may have other fields.
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    match value.get("format_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(FORMAT_VERSION) => {}
        Some(version) => {
            return Err(StoreError::Config(format!(
                "{}: the store has format version {version}, this program reads {FORMAT_VERSION}",
                path.display()
            )));
        }
        None => return Err(damaged("no format_version".to_owned())),
    }
    let identity: Identity = serde_json::from_value(value).map_err(|error| damaged(error.to_string()))?;
    check_segment_size(identity.segment_size).map_err(damaged)?;
    if identity.virtual_shards == 0 || identity.virtual_shards > VIRTUAL_SHARDS_MAX {
        return Err(damaged(format!("virtual_shards is {}", identity.virtual_shards)));
    }
    Ok(Some(identity))
}

fn parse_uuid(path: &Path, text: &str) -> Result<[u8; 16], StoreError> {
    let number = (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok()).flatten();
    let why = || StoreError::Damaged { path: path.to_owned(), why: format!("uuid {text:?} is not 32 hex digits") };
    number.map(u128::to_be_bytes).ok_or_else(why)
}

/// Writes `store.json` so that it exists whole or not at all, whenever the power goes.
fn create(dir: &Path, options: &StoreOptions) -> Result<Identity, StoreError> {
    let wal = dir.join(WAL_DIR);
    // A log without its identity is not an empty store.
    if !disk::list_slots(&wal)?.is_empty() {
        let why = format!("the log in {WAL_DIR}/ has lost its {IDENTITY}; restore it from a backup of this directory");
        return Err(StoreError::Damaged { path: dir.to_owned(), why });
    }
    for sub in [&wal, &dir.join(CKPT_DIR)] {
        fs::create_dir_all(sub).map_err(io_at("create", sub))?;
        disk::sync_dir(sub)?;
    }
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid).map_err(|error| io_at("draw a uuid for", dir)(io::Error::other(error)))?;
    let identity = Identity {
        uuid: format!("{:032x}", u128::from_be_bytes(uuid)),
        format_version: FORMAT_VERSION,
        virtual_shards: options.virtual_shards,
        dead_letter_suffix: options.dead_letter_suffix.clone(),
        segment_size: options.segment_size.unwrap_or(SEGMENT_SIZE_DEFAULT),
        created_ms: now_ms(),
    };
    let (tmp, path) = (dir.join(IDENTITY_TMP), dir.join(IDENTITY));
    let mut text = serde_json::to_vec_pretty(&identity)
        .map_err(|error| StoreError::Damaged { path: path.clone(), why: error.to_string() })?;
    text.push(b'\n');
    let mut file = File::create(&tmp).map_err(io_at("create", &tmp))?;
    file.write_all(&text).and_then(|()| file.sync_data()).map_err(io_at("write", &tmp))?;
    fs::rename(&tmp, &path).map_err(io_at("rename", &tmp))?;
    disk::sync_dir(dir)?;
    if let Some(parent) = dir.parent() {
        disk::sync_dir(parent)?;
    }
    Ok(identity)
}

fn check_identity(identity: &Identity, options: &StoreOptions) -> Result<(), StoreError> {
    let differs = |key: &str, store: &dyn std::fmt::Debug, config: &dyn std::fmt::Debug| {
        Err(StoreError::Config(format!(
            "{key} is {config:?} in the configuration, but this store was created with {store:?}, which cannot change: set \
             {key} = {store:?}, or choose another wal_path"
        )))
    };
    if identity.virtual_shards != options.virtual_shards {
        return differs("virtual_shards", &identity.virtual_shards, &options.virtual_shards);
    }
    if identity.dead_letter_suffix != options.dead_letter_suffix {
        return differs("dead_letter_suffix", &identity.dead_letter_suffix, &options.dead_letter_suffix);
    }
    match options.segment_size {
        Some(size) if size != identity.segment_size => differs("segment_size", &identity.segment_size, &size),
        _ => Ok(()),
    }
}

/// Whether slots are to be opened with O_DIRECT; refuses a disk that cannot do it.
fn check_disk(dir: &Path, allow_buffered_io: bool) -> Result<bool, StoreError> {
    match has_direct_io(dir)? {
        Ok(()) => try_direct_write(&dir.join(WAL_DIR)).or_else(|error| match error {
            StoreError::NoDirectIo { .. } if allow_buffered_io => Ok(false),
            error => Err(error),
        }),
        Err(_) if allow_buffered_io => Ok(false),
        Err(fs) => Err(StoreError::NoDirectIo { path: dir.to_owned(), fs: fs.to_owned() }),
    }
}

/// By the file system's kind: these accept O_DIRECT without a disk behind it.
fn has_direct_io(dir: &Path) -> Result<Result<(), &'static str>, StoreError> {
    let kind = statfs(dir).map_err(|errno| io_at("statfs", dir)(errno.into()))?.filesystem_type();
    Ok(match kind {
        TMPFS_MAGIC => Err("tmpfs (memory)"),
        OVERLAYFS_SUPER_MAGIC => Err("overlayfs (a container's own layer)"),
        RAMFS_MAGIC => Err("ramfs (memory)"),
        _ => Ok(()),
    })
}

/// The only answer that counts: one aligned block, written past the page cache at an odd block number.
fn try_direct_write(wal: &Path) -> Result<bool, StoreError> {
    let path = wal.join(".direct-io-probe");
    let no_direct = |error: io::Error| StoreError::NoDirectIo {
        path: wal.to_owned(),
        fs: format!("a disk without O_DIRECT ({error})"),
    };
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(disk::O_DIRECT).open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(no_direct(error)),
        Err(error) => return Err(io_at("create", &path)(error)),
    };
    let written = file.write_all_at(AlignedBuf::zeroed(BLOCK).as_slice(), BLOCK as u64);
    let removed = fs::remove_file(&path);
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(no_direct(error)),
        // A full disk must not keep the broker from starting: there is a backlog to consume.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
        Err(error) => return Err(io_at("write", &path)(error)),
    }
    removed.map_err(io_at("remove", &path))?;
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::wal::disk::tests::scratch;

    pub fn options(path: PathBuf) -> StoreOptions {
        StoreOptions {
            path,
            virtual_shards: 8,
            dead_letter_suffix: ".dlq".to_owned(),
            segment_size: Some(SEGMENT_SIZE_MIN),
            // The checks stay; a build directory on an overlay must not fail the tests.
            allow_buffered_io: true,
        }
    }

    #[test]
    fn a_store_is_created_once_and_stays_itself() {
        let dir = scratch("store-create");
        let first = Store::open(&options(dir.join("a/b.wal"))).unwrap();
        let identity = first.identity().clone();
        assert_eq!(identity.segment_size, SEGMENT_SIZE_MIN);
        assert!(first.dir().is_absolute());
        assert!(first.wal_dir().is_dir() && first.ckpt_dir().is_dir());
        drop(first);
        let again = Store::open(&StoreOptions { segment_size: None, ..options(dir.join("a/b.wal")) }).unwrap();
        assert_eq!(*again.identity(), identity);
        assert_eq!(format!("{:032x}", u128::from_be_bytes(again.id().uuid)), identity.uuid);
        assert!(!again.wal_dir().join(".direct-io-probe").exists());
    }

    #[test]
    fn a_second_open_is_refused_and_names_the_first() {
        let dir = scratch("store-lock");
        let first = Store::open(&options(dir.clone())).unwrap();
        let error = Store::open(&options(dir.clone())).unwrap_err();
        assert_eq!(error.exit_code(), 75);
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        assert!(matches!(Store::open_existing(&dir, false), Err(StoreError::Locked { .. })));
        drop(Store::open_existing(&dir, true).unwrap());
        drop(first);
        Store::open(&options(dir)).unwrap();
    }

    #[test]
    fn what_cannot_change_is_refused_with_both_values() {
        let dir = scratch("store-mismatch");
        drop(Store::open(&options(dir.clone())).unwrap());
        let cases = [
            ("virtual_shards", StoreOptions { virtual_shards: 16, ..options(dir.clone()) }, "16"),
            (
                "dead_letter_suffix",
                StoreOptions { dead_letter_suffix: "-dead".to_owned(), ..options(dir.clone()) },
                "-dead",
            ),
            ("segment_size", StoreOptions { segment_size: Some(8 << 20), ..options(dir.clone()) }, "8388608"),
        ];
        for (key, options, value) in cases {
            let error = Store::open(&options).unwrap_err();
            assert_eq!(error.exit_code(), 78);
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(value), "{text}");
        }
        let odd = Store::open(&StoreOptions { segment_size: Some((8 << 20) + 512), ..options(dir) }).unwrap_err();
        assert!(odd.to_string().contains("multiple of 4096"), "{odd}");
    }

    #[test]
    fn files_in_the_way_are_named_for_what_they_are() {
        let dir = scratch("store-files");
        let v1 = dir.join("blipmq.wal");
        fs::write(&v1, import_v1::tests::header()).unwrap();
        let error = Store::open(&options(v1)).unwrap_err();
        assert!(matches!(error, StoreError::V1File { .. }));
        assert!(error.to_string().contains("blipmq import-v1"), "{error}");
        let other = dir.join("notes.txt");
        fs::write(&other, "hello").unwrap();
        assert!(matches!(Store::open(&options(other)), Err(StoreError::NotADirectory { .. })));
    }

    #[test]
    fn a_log_without_identity_and_a_damaged_identity_are_refused() {
        let dir = scratch("store-damaged");
        drop(Store::open(&options(dir.clone())).unwrap());
        let path = dir.join(IDENTITY);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert_eq!(Store::open(&options(dir.clone())).unwrap_err().exit_code(), 65);
        fs::write(&path, text.replace("\"format_version\": 1", "\"format_version\": 9")).unwrap();
        let error = Store::open(&options(dir.clone())).unwrap_err();
        assert!(error.to_string().contains("format version 9"), "{error}");
        fs::remove_file(&path).unwrap();
        fs::write(dir.join("wal/slot-0000.seg"), [1; 10]).unwrap();
        assert_eq!(Store::open(&options(dir)).unwrap_err().exit_code(), 65);
    }

    #[test]
    fn memory_is_no_disk() {
        let shm = Path::new("/dev/shm");
        if !shm.is_dir() || has_direct_io(shm).unwrap().is_ok() {
            return; // no tmpfs here to be refused
        }
        let dir = shm.join(format!("blipmq-test-{}", std::process::id()));
        let refused = Store::open(&StoreOptions { allow_buffered_io: false, ..options(dir.clone()) }).unwrap_err();
        let allowed = Store::open(&options(dir.clone())).unwrap().direct_io();
        fs::remove_dir_all(dir).unwrap();
        assert_eq!((refused.exit_code(), allowed), (78, false));
        assert!(refused.to_string().contains("tmpfs"), "{refused}");
    }
}
