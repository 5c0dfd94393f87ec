//! Aligned reads, for subscribers far behind.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use glommio::GlommioError;
use glommio::io::DmaFile;

use crate::types::Slot;
use crate::wal::disk;

#[derive(Debug, thiserror::Error)]
#[error("reading {len} bytes at {offset} of {path} failed: {reason}")]
pub struct ReadFailed {
    pub path: String,
    pub offset: u32,
    pub len: u32,
    pub reason: String,
    /// The slot's file is gone: it was freed, because nobody wants what is in it any more.
    pub gone: bool,
}

pub(super) const OPEN_ATTEMPTS: u32 = 600;
pub(super) const OPEN_RETRY: Duration = Duration::from_millis(50);

/// Opens a segment, waiting while there is no file descriptor for it: nothing is lost by that, and connections end.
pub(super) async fn open_patiently(
    path: &Path,
    open: impl AsyncFn() -> Result<DmaFile, GlommioError<()>>,
) -> Result<DmaFile, GlommioError<()>> {
    for attempt in 1.. {
        match open().await {
            Err(error) if attempt < OPEN_ATTEMPTS && is_out_of_descriptors(error.raw_os_error()) => {
                if attempt == 1 {
                    tracing::warn!("no file descriptor for {}: waiting for one; raise RLIMIT_NOFILE", path.display());
                }
                glommio::timer::sleep(OPEN_RETRY).await;
            }
            result => return result,
        }
    }
    unreachable!("the last attempt returns")
}

/// - `code`: of the operating system.
pub fn is_out_of_descriptors(code: Option<i32>) -> bool {
    matches!(code, Some(nix::libc::EMFILE | nix::libc::ENFILE))
}

/// Reads `len` bytes at `offset`, both aligned to `BLOCK`.
///
/// Opens the slot each time: a handle kept would go on reading a slot that was deleted and made anew.
pub async fn read(wal_dir: &Path, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadFailed> {
    let path = disk::slot_path(wal_dir, slot);
    let failed = |reason: String| ReadFailed { path: path.display().to_string(), offset, len, reason, gone: false };
    if !path.exists() {
        return Err(ReadFailed { gone: true, ..failed("the file does not exist".to_owned()) });
    }
    let file = open_patiently(&path, async || DmaFile::open(&path).await).await.map_err(|e| failed(e.to_string()))?;
    let read = file.read_at_aligned(u64::from(offset), len as usize).await.map_err(|e| failed(e.to_string()))?;
    let bytes = Bytes::copy_from_slice(&read);
    drop(read);
    file.close().await.map_err(|e| failed(e.to_string()))?;
    if bytes.len() != len as usize {
        return Err(failed(format!("only {} bytes are there", bytes.len())));
    }
    Ok(bytes)
}
