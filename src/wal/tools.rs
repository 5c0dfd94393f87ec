//! What an operator may ask of a store at rest: is it whole, what is in it, save what can be saved, bring in a v1 log.
//!
//! Owns: the answers, ready to be printed or serialised. Never: changes the store it looks at.
//! Neighbours: `recovery` reads, the same code as at a start; `rewrite` writes the new store.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Serialize;

use super::checkpoint::{Checkpoint, VShardState};
use super::disk::SlotFiles;
use super::format::{HeaderBlock, SegmentHeader};
use super::import_v1::{V1Error, V1Item, V1Log};
use super::record::{Discarded, IdentityRef, Published, Record, SubKind};
use super::recovery::{self, Entry, Mode, ReadError, Recovered, RecoveryError, Segments};
use super::rewrite::{RewriteError, Rewriter};
use super::start::{Checkpoints, StartError, read_checkpoints, shape};
use super::store::{self, Identity, Store, StoreError, StoreOptions, io_at};
use crate::limits::{BLOCK, DURABLE_NAME_MAX};
use crate::time::WallMs;
use crate::types::{Seq, Slot, VShard};

/// Told now and then how many bytes of how many have been read.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    #[error(transparent)]
    V1(#[from] V1Error),
    #[error("writing the output: {0}")]
    Output(#[from] io::Error),
    #[error("{0}")]
    Usage(String),
}

impl ToolError {
    /// sysexits.h: 64 usage, 65 damaged data, 74 I/O, 75 in use, 78 configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            ToolError::Store(error) | ToolError::Rewrite(RewriteError::Store(error)) => error.exit_code(),
            ToolError::Start(error) => error.exit_code(),
            ToolError::Recovery(_) | ToolError::Rewrite(RewriteError::TooLarge(_)) => 65,
            ToolError::V1(V1Error::Io { .. }) | ToolError::Output(_) => 74,
            ToolError::V1(_) => 65,
            ToolError::Rewrite(RewriteError::Exists { .. }) | ToolError::Usage(_) => 64,
        }
    }
}

/// Counts what recovery reads.
struct Counted<'a> {
    files: SlotFiles,
    total: u64,
    done: Cell<u64>,
    progress: RefCell<Progress<'a>>,
}

impl<'a> Counted<'a> {
    fn new(store: &Store, progress: Progress<'a>) -> Result<Counted<'a>, StoreError> {
        let files = SlotFiles::open(store)?;
        let total = files.slots().len() as u64 * u64::from(store.segment_size());
        Ok(Counted { files, total, done: Cell::new(0), progress: RefCell::new(progress) })
    }
}

impl Segments for Counted<'_> {
    fn slots(&self) -> Vec<Slot> {
        self.files.slots()
    }

    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        // Some bytes are read twice; a bar beyond its end helps nobody.
        let done = (self.done.get() + u64::from(len)).min(self.total);
        self.done.set(done);
        (self.progress.borrow_mut())(done, self.total);
        self.files.read(slot, offset, len)
    }
}

/// A store read to its end, damage and all.
struct Scan {
    newest: Option<Checkpoint>,
    fallbacks: u32,
    /// Both checkpoint files are there and neither is whole.
    checkpoint_error: Option<String>,
    recovered: Recovered,
}

/// - `visit` also gets the newest checkpoint, so that it can tell what that includes.
fn scan(
    store: &Store,
    progress: Progress<'_>,
    visit: &mut dyn FnMut(Option<&Checkpoint>, Entry<'_>),
) -> Result<Scan, ToolError> {
    let (newest, fallbacks, checkpoint_error) = match read_checkpoints(store) {
        Ok(Checkpoints { newest, fallbacks, .. }) => (newest, fallbacks, None),
        Err(StartError::Checkpoints(error)) => (None, 2, Some(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    let files = Counted::new(store, progress)?;
    let visit = &mut |entry: Entry<'_>| visit(newest.as_ref(), entry);
    let recovered = recovery::recover(&shape(store), &files, newest.as_ref(), Mode::Salvage, visit)?;
    Ok(Scan { newest, fallbacks, checkpoint_error, recovered })
}

impl Scan {
    fn damage(&self) -> Vec<String> {
        let found = self.recovered.damage.iter().map(ToString::to_string);
        self.checkpoint_error.iter().cloned().chain(found).collect()
    }
}

/// What `wal verify` found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VerifyReport {
    pub store: String,
    /// False: a broker will refuse to start.
    pub ok: bool,
    /// A broker was running; what it was writing may look damaged.
    pub in_use: bool,
    pub clean_stop: bool,
    /// 0: none.
    pub checkpoint: u64,
    pub checkpoint_files_damaged: u32,
    pub frames: u64,
    pub records: u64,
    pub messages: u64,
    /// What the next start will cut off the tails: never known to be synced. 0 in a damaged store, where that cannot be told.
    pub torn_frames: u64,
    pub torn_records: u64,
    pub torn_bytes: u64,
    pub damage: Vec<String>,
}

/// Reads everything a start would read, and says what it would say.
pub fn verify(path: &Path, force: bool, progress: Progress<'_>) -> Result<VerifyReport, ToolError> {
    let store = Store::open_existing(path, force)?;
    let mut messages = 0;
    let scan = scan(&store, progress, &mut |_, entry| messages += u64::from(is_message(&entry.record)))?;
    let damage = scan.damage();
    let torn = if damage.is_empty() { scan.recovered.truncated } else { Discarded::default() };
    Ok(VerifyReport {
        store: store.dir().display().to_string(),
        ok: damage.is_empty(),
        in_use: !store.is_locked(),
        clean_stop: scan.recovered.clean,
        checkpoint: scan.newest.as_ref().map_or(0, |checkpoint| checkpoint.number),
        checkpoint_files_damaged: scan.fallbacks,
        frames: scan.recovered.frames,
        records: scan.recovered.records,
        messages,
        torn_frames: torn.frames,
        torn_records: torn.records,
        torn_bytes: torn.bytes,
        damage,
    })
}

fn is_message(record: &Record<'_>) -> bool {
    matches!(record, Record::Published(_) | Record::Relocated(_))
}

/// How `wal dump` shows records.
#[derive(Clone, Copy, Debug)]
pub struct DumpOptions {
    /// JSON lines instead of text.
    pub json: bool,
    pub force: bool,
    /// Only this virtual shard.
    pub vshard: Option<VShard>,
    /// Bytes of each payload to show.
    pub payload_bytes: usize,
}

/// One record, as printed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DumpLine {
    pub vshard: u16,
    /// Absent: no log entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    pub time_ms: u64,
    pub stream: String,
    pub frame: u64,
    pub slot: u32,
    pub offset: u32,
    pub len: u32,
    #[serde(flatten)]
    pub record: DumpRecord,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DumpRecord {
    TopicCreated { topic: u32, name: String },
    TopicDeleted { topic: u32 },
    SubCreated { sub: u32, topic: u32, kind: String, start: u64, created_ms: u64 },
    SubDeleted { sub: u32 },
    Published(DumpMessage),
    Relocated(DumpMessage),
    Acked { sub: u32, ranges: Vec<(u64, u64)> },
    Failed { sub: u32, seq: u64, failures: u16 },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DumpMessage {
    pub topic: u32,
    pub seq: u64,
    pub published_ms: u64,
    /// 0: never.
    pub expires_ms: u64,
    pub not_before_ms: u64,
    pub priority: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    pub options_len: usize,
    pub payload_len: usize,
    /// The beginning of it, escaped as in a Rust byte string.
    pub payload: String,
}

fn dump_line(entry: &Entry<'_>, payload_bytes: usize) -> DumpLine {
    let message = |published: &Published<'_>| DumpMessage {
        topic: published.topic,
        seq: published.seq.0,
        published_ms: published.published.0,
        expires_ms: published.expires.0,
        not_before_ms: published.not_before.0,
        priority: published.priority,
        identity: published.identity.map(|identity| match identity {
            IdentityRef::MessageId(id) => id.escape_ascii().to_string(),
            IdentityRef::Publisher { id, sequence } => format!("{id}:{sequence}"),
        }),
        options_len: published.options.len(),
        payload_len: published.payload.len(),
        payload: published.payload[..published.payload.len().min(payload_bytes)].escape_ascii().to_string(),
    };
    let record = match &entry.record {
        Record::TopicCreated { topic, name } => {
            DumpRecord::TopicCreated { topic: *topic, name: String::from_utf8_lossy(name).into_owned() }
        }
        Record::TopicDeleted { topic } => DumpRecord::TopicDeleted { topic: *topic },
        Record::SubCreated { sub, topic, kind, start, created } => {
            let kind = match kind {
                SubKind::Durable { name } => format!("durable {}", String::from_utf8_lossy(name)),
                SubKind::Orphan { .. } => "orphan".to_owned(),
                SubKind::DeadLetters => "dead letters".to_owned(),
            };
            DumpRecord::SubCreated { sub: *sub, topic: *topic, kind, start: start.0, created_ms: created.0 }
        }
        Record::SubDeleted { sub } => DumpRecord::SubDeleted { sub: *sub },
        Record::Published(published) => DumpRecord::Published(message(published)),
        Record::Relocated(published) => DumpRecord::Relocated(message(published)),
        Record::Acked { sub, ranges } => {
            DumpRecord::Acked { sub: *sub, ranges: ranges.iter().map(|(from, to)| (from.0, to.0)).collect() }
        }
        Record::Failed { sub, seq, failures } => DumpRecord::Failed { sub: *sub, seq: seq.0, failures: *failures },
    };
    DumpLine {
        vshard: entry.vshard.0,
        index: entry.index,
        time_ms: entry.time.0,
        stream: entry.stream.to_string(),
        frame: entry.frame.0,
        slot: entry.at.slot.0,
        offset: entry.at.offset,
        len: entry.at.len,
        record,
    }
}

impl std::fmt::Display for DumpLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.index {
            Some(index) => write!(f, "{}/{index}", self.vshard)?,
            None => write!(f, "{}/-", self.vshard)?,
        }
        write!(f, " @{} {}:{}+{} {} ", self.stream, self.slot, self.offset, self.len, self.time_ms)?;
        match &self.record {
            DumpRecord::TopicCreated { topic, name } => write!(f, "topic {topic} created: {name:?}"),
            DumpRecord::TopicDeleted { topic } => write!(f, "topic {topic} deleted"),
            DumpRecord::SubCreated { sub, topic, kind, start, .. } => {
                write!(f, "subscription {sub} of topic {topic} created: {kind}, from {start}")
            }
            DumpRecord::SubDeleted { sub } => write!(f, "subscription {sub} deleted"),
            DumpRecord::Published(message) => write!(f, "published {message}"),
            DumpRecord::Relocated(message) => write!(f, "relocated {message}"),
            DumpRecord::Acked { sub, ranges } => write!(f, "subscription {sub} finished {ranges:?}"),
            DumpRecord::Failed { sub, seq, failures } => {
                write!(f, "subscription {sub}: delivery of {seq} failed {failures} times")
            }
        }
    }
}

impl std::fmt::Display for DumpMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "topic {} seq {}, {} bytes", self.topic, self.seq, self.payload_len)?;
        if self.expires_ms > 0 {
            write!(f, ", expires {}", self.expires_ms)?;
        }
        if let Some(identity) = &self.identity {
            write!(f, ", id {identity}")?;
        }
        let cut = if self.payload.is_empty() || self.payload_len <= self.payload.len() { "" } else { "..." };
        write!(f, ": {}{cut}", self.payload)
    }
}

/// Prints the records that a start would see, and those it would not for damage, as one comment each on the error stream's
/// report: the returned list.
pub fn dump(
    path: &Path,
    options: DumpOptions,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<Vec<String>, ToolError> {
    let store = Store::open_existing(path, options.force)?;
    let mut result = Ok(());
    let scan = scan(&store, progress, &mut |_, entry| {
        if result.is_err() || options.vshard.is_some_and(|only| only != entry.vshard) {
            return;
        }
        let line = dump_line(&entry, options.payload_bytes);
        result = match options.json {
            true => serde_json::to_writer(&mut *out, &line).map_err(io::Error::from).and_then(|()| writeln!(out)),
            false => writeln!(out, "{line}"),
        };
    })?;
    result?;
    out.flush()?;
    Ok(scan.damage())
}

/// What `wal stat` found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StatReport {
    pub store: String,
    pub identity: Identity,
    pub in_use: bool,
    pub segments: Vec<StatSegment>,
    pub segment_bytes: u64,
    pub free_segments: usize,
    pub disk_free_bytes: u64,
    pub checkpoint: Option<StatCheckpoint>,
    pub streams: Vec<StatStream>,
    pub records: BTreeMap<&'static str, u64>,
    /// Last log index of each virtual shard that has one.
    pub last_index: BTreeMap<u16, u64>,
    pub damage: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StatSegment {
    pub slot: u32,
    /// `live`, `free`, or `unreadable`.
    pub state: &'static str,
    pub stream: String,
    pub sequence: u64,
    pub created_ms: u64,
    /// Messages and other records read from it.
    pub records: u64,
    pub record_bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StatCheckpoint {
    pub number: u64,
    pub time_ms: u64,
    pub incarnation: u64,
    pub state_bytes: u64,
    pub segments_listed: usize,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StatStream {
    pub stream: String,
    pub end: u64,
}

/// Counts what is in a store.
pub fn stat(path: &Path, force: bool, progress: Progress<'_>) -> Result<StatReport, ToolError> {
    let store = Store::open_existing(path, force)?;
    let mut records: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut by_slot: BTreeMap<Slot, (u64, u64)> = BTreeMap::new();
    let scan = scan(&store, progress, &mut |_, entry| {
        *records.entry(kind_of(&entry.record)).or_default() += 1;
        let slot = by_slot.entry(entry.at.slot).or_default();
        *slot = (slot.0 + 1, slot.1 + u64::from(entry.at.len));
    })?;
    let files = SlotFiles::open(&store)?;
    let mut segments = Vec::new();
    for slot in files.slots() {
        let header = files.read(slot, 0, BLOCK as u32).map(|block| SegmentHeader::decode(&block));
        let live = scan.recovered.live.iter().any(|segment| segment.slot == slot);
        let (count, bytes) = by_slot.get(&slot).copied().unwrap_or_default();
        let mut segment = StatSegment {
            slot: slot.0,
            state: if live { "live" } else { "free" },
            stream: String::new(),
            sequence: 0,
            created_ms: 0,
            records: count,
            record_bytes: bytes,
        };
        match header {
            Ok(HeaderBlock::Whole(header)) => {
                segment.stream = header.stream.to_string();
                segment.sequence = header.sequence;
                segment.created_ms = header.created.0;
            }
            Ok(HeaderBlock::Zero) => {}
            Ok(HeaderBlock::Damaged | HeaderBlock::Unsupported { .. }) | Err(_) => segment.state = "unreadable",
        }
        segments.push(segment);
    }
    let last_index = (0u16..).zip(&scan.recovered.last_index).filter(|(_, last)| **last > 0);
    Ok(StatReport {
        store: store.dir().display().to_string(),
        identity: store.identity().clone(),
        in_use: !store.is_locked(),
        segment_bytes: segments.len() as u64 * u64::from(store.segment_size()),
        free_segments: segments.iter().filter(|segment| segment.state == "free").count(),
        segments,
        disk_free_bytes: store.free_bytes()?,
        checkpoint: scan.newest.as_ref().map(|checkpoint| StatCheckpoint {
            number: checkpoint.number,
            time_ms: checkpoint.time.0,
            incarnation: checkpoint.incarnation,
            state_bytes: checkpoint.vshards.iter().map(|vshard| vshard.state.len() as u64).sum(),
            segments_listed: checkpoint.live.len(),
        }),
        streams: scan
            .recovered
            .sealed
            .iter()
            .map(|sealed| StatStream { stream: sealed.stream.to_string(), end: sealed.end.0 })
            .collect(),
        records,
        last_index: last_index.map(|(vshard, last)| (vshard, *last)).collect(),
        damage: scan.damage(),
    })
}

fn kind_of(record: &Record<'_>) -> &'static str {
    match record {
        Record::TopicCreated { .. } => "topic_created",
        Record::TopicDeleted { .. } => "topic_deleted",
        Record::SubCreated { .. } => "sub_created",
        Record::SubDeleted { .. } => "sub_deleted",
        Record::Published(_) => "published",
        Record::Relocated(_) => "relocated",
        Record::Acked { .. } => "acked",
        Record::Failed { .. } => "failed",
    }
}

/// What `wal salvage` kept and lost; also written into the new store as `salvage-report.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SalvageReport {
    pub from: String,
    pub to: String,
    pub records_kept: u64,
    pub messages_kept: u64,
    /// The checkpoint whose states went along; 0: there was none, or none was whole.
    pub checkpoint: u64,
    /// Checkpoints had been written and none was whole: topics made before the oldest segment are unknown.
    pub states_lost: bool,
    /// Entries of the log that are gone.
    pub lost: Vec<LostRange>,
    pub damage: Vec<String>,
}

/// Log entries of one virtual shard, by index, inclusive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct LostRange {
    pub vshard: u16,
    pub from: u64,
    pub to: u64,
}

/// Copies what is whole into a new store. The old one is not touched.
///
/// - `accept_loss`: must be said by a person.
pub fn salvage(path: &Path, out: &Path, accept_loss: bool, progress: Progress<'_>) -> Result<SalvageReport, ToolError> {
    if !accept_loss {
        return Err(ToolError::Usage(
            "salvage leaves out what is damaged for good: say --accept-loss, after a copy of the whole directory"
                .to_owned(),
        ));
    }
    let store = Store::open_existing(path, false)?;
    let identity = store.identity();
    let options = StoreOptions {
        path: out.to_owned(),
        virtual_shards: identity.virtual_shards,
        dead_letter_suffix: identity.dead_letter_suffix.clone(),
        segment_size: Some(identity.segment_size),
        allow_buffered_io: !store.direct_io(),
    };
    let mut rewriter = Rewriter::create(&options)?;
    let mut kept = Kept::new(identity.virtual_shards);
    let mut result = Ok(());
    let scan = scan(&store, progress, &mut |checkpoint, entry| {
        if result.is_ok() {
            result = kept.take(&mut rewriter, checkpoint, &entry);
        }
    })?;
    result?;
    let states = scan.newest.as_ref().map(|checkpoint| {
        let included = kept.included.iter().zip(&checkpoint.vshards);
        included.map(|(last, vshard)| VShardState { last_index: *last, state: vshard.state.clone() }).collect()
    });
    let report = SalvageReport {
        from: store.dir().display().to_string(),
        to: out.display().to_string(),
        records_kept: kept.records,
        messages_kept: kept.messages,
        checkpoint: scan.newest.as_ref().map_or(0, |checkpoint| checkpoint.number),
        states_lost: scan.checkpoint_error.is_some(),
        damage: scan.damage(),
        lost: kept.lost,
    };
    let dir = rewriter.finish(states)?;
    write_report(&dir.join("salvage-report.json"), &report)?;
    Ok(report)
}

/// What a salvage has written so far.
struct Kept {
    records: u64,
    messages: u64,
    /// By virtual shard: the last old index seen, and the last new one that the checkpoint's state includes.
    seen: Vec<u64>,
    included: Vec<u64>,
    lost: Vec<LostRange>,
}

impl Kept {
    fn new(vshards: u16) -> Kept {
        let zeros = vec![0; usize::from(vshards)];
        Kept { records: 0, messages: 0, seen: zeros.clone(), included: zeros, lost: Vec::new() }
    }

    /// Indexes become dense again. What the checkpoint includes stays below the rest, so its state goes along as it is.
    fn take(
        &mut self,
        rewriter: &mut Rewriter,
        checkpoint: Option<&Checkpoint>,
        entry: &Entry<'_>,
    ) -> Result<(), RewriteError> {
        let nth = usize::from(entry.vshard.0);
        let covered = checkpoint.map_or(0, |checkpoint| checkpoint.vshards[nth].last_index);
        if let Some(index) = entry.index {
            if index <= self.seen[nth] {
                // Only damage shows an entry twice or late; the first one stands.
                return Ok(());
            }
            // Below what is covered, gaps are segments that were freed.
            let from = self.seen[nth].max(covered) + 1;
            if index > from {
                self.lost.push(LostRange { vshard: entry.vshard.0, from, to: index - 1 });
            }
            self.seen[nth] = index;
        }
        rewriter.append(entry.vshard, &entry.record, entry.time)?;
        if entry.index.is_some_and(|index| index <= covered) {
            self.included[nth] = rewriter.last_index(entry.vshard);
        }
        self.records += 1;
        self.messages += u64::from(is_message(&entry.record));
        Ok(())
    }
}

fn write_report(path: &Path, report: &impl Serialize) -> Result<(), ToolError> {
    let mut file = File::create(path).map_err(io_at("create", path))?;
    serde_json::to_writer_pretty(&mut file, report).map_err(io::Error::from)?;
    file.sync_all()?;
    Ok(())
}

/// What `import-v1` is to do.
#[derive(Debug)]
pub struct ImportOptions {
    pub file: PathBuf,
    /// The new store.
    pub store: StoreOptions,
    /// Name of the durable subscription that each topic gets, so that every message waits for somebody.
    pub durable: String,
    /// Leave out damaged records and go on behind them.
    pub accept_loss: bool,
    /// Where a topic lives: name, dead-letter suffix, virtual shards. The broker's own function.
    pub vshard_of: fn(&[u8], &[u8], u16) -> VShard,
}

/// What `import-v1` did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ImportReport {
    pub file: String,
    pub store: String,
    pub durable: String,
    pub topics: usize,
    pub messages: u64,
    pub payload_bytes: u64,
    /// Bytes of an incomplete last record.
    pub torn_bytes: u64,
    /// What was left out, with its offset.
    pub damage: Vec<String>,
}

/// One topic of the import.
#[derive(Clone, Copy, Debug)]
struct Imported {
    vshard: VShard,
    topic: u32,
    last: Seq,
}

/// Makes a new store from a v1 log: every topic with one durable subscription to which all its messages are new.
pub fn import_v1(options: ImportOptions, progress: Progress<'_>) -> Result<ImportReport, ToolError> {
    let ImportOptions { file, store: new, durable, accept_loss, vshard_of } = options;
    if durable.is_empty() || durable.len() > DURABLE_NAME_MAX {
        return Err(ToolError::Usage(format!("the durable name must have 1 to {DURABLE_NAME_MAX} bytes")));
    }
    let mut log = V1Log::open(&file)?;
    let mut rewriter = Rewriter::create(&new)?;
    let now = WallMs(store::now_ms());
    let mut topics: BTreeMap<Vec<u8>, Imported> = BTreeMap::new();
    let mut numbers = vec![0u32; usize::from(new.virtual_shards)];
    let mut report = ImportReport {
        file: file.display().to_string(),
        store: new.path.display().to_string(),
        durable: durable.clone(),
        topics: 0,
        messages: 0,
        payload_bytes: 0,
        torn_bytes: 0,
        damage: Vec::new(),
    };
    loop {
        let record = match log.next_item() {
            Ok(V1Item::Record(record)) => record,
            Ok(V1Item::End { torn }) => {
                report.torn_bytes = torn;
                break;
            }
            Err(error @ V1Error::Damaged { .. }) if accept_loss => {
                let skipped = log.skip_damage()?;
                report.damage.push(format!("{error}; {skipped} bytes left out"));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let imported = match topics.get_mut(&record.topic) {
            Some(imported) => imported,
            None => {
                let vshard = vshard_of(&record.topic, new.dead_letter_suffix.as_bytes(), new.virtual_shards);
                let number = &mut numbers[usize::from(vshard.0)];
                *number += 1;
                // One subscription per topic: both count alike.
                let (topic, sub) = (*number, *number);
                let kind = SubKind::Durable { name: durable.as_bytes() };
                rewriter.append(vshard, &Record::TopicCreated { topic, name: &record.topic }, now)?;
                rewriter.append(vshard, &Record::SubCreated { sub, topic, kind, start: Seq(1), created: now }, now)?;
                topics.entry(record.topic).or_insert(Imported { vshard, topic, last: Seq(0) })
            }
        };
        imported.last = imported.last.next();
        let published = Published {
            topic: imported.topic,
            seq: imported.last,
            published: now,
            expires: WallMs(0),
            not_before: WallMs(0),
            priority: 0,
            identity: None,
            options: &[],
            payload: &record.payload,
        };
        rewriter.append(imported.vshard, &Record::Published(published), now)?;
        report.messages += 1;
        report.payload_bytes += record.payload.len() as u64;
        progress(log.position(), log.file_len());
    }
    report.topics = topics.len();
    rewriter.finish(None)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::wal::disk::{slot_path, tests::scratch};
    use crate::wal::import_v1::tests as v1;
    use crate::wal::start::tests::{MESSAGES, filled};
    use crate::wal::store::tests::options;

    fn quiet() -> impl FnMut(u64, u64) {
        |_, _| {}
    }

    fn import(dir: &Path, bytes: &[u8], accept_loss: bool) -> Result<ImportReport, ToolError> {
        let file = dir.join("v1.wal");
        fs::write(&file, bytes).unwrap();
        let options = ImportOptions {
            file,
            store: options(dir.join("new.wal")),
            durable: "imported".to_owned(),
            accept_loss,
            vshard_of: |name, _, vshards| VShard(u16::from(name[0]) % vshards),
        };
        import_v1(options, &mut quiet())
    }

    fn dumped(path: &Path) -> Vec<serde_json::Value> {
        let mut out = Vec::new();
        let options = DumpOptions { json: true, force: false, vshard: None, payload_bytes: 64 };
        assert_eq!(dump(path, options, &mut out, &mut quiet()).unwrap(), Vec::<String>::new());
        let text = String::from_utf8(out).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_v1_log_becomes_topics_with_a_durable_subscription() {
        let dir = scratch("tools-import");
        let mut bytes = v1::header();
        bytes.extend(v1::record(1, "test", b"hello"));
        bytes.extend(v1::record(2, "other", b""));
        bytes.extend(v1::record(3, "test", b"again"));
        bytes.extend([3; 20]);
        let report = import(&dir, &bytes, false).unwrap();
        assert_eq!((report.topics, report.messages, report.payload_bytes, report.torn_bytes), (2, 3, 10, 20));
        let lines = dumped(&dir.join("new.wal"));
        let of = |kind: &str| lines.iter().filter(|line| line["type"] == kind).cloned().collect::<Vec<_>>();
        assert_eq!(of("topic_created").len(), 2);
        let subs = of("sub_created");
        assert!(subs.len() == 2 && subs.iter().all(|sub| sub["kind"] == "durable imported" && sub["start"] == 1));
        let test = u64::from(b't' % 8);
        let messages: Vec<_> = of("published").into_iter().filter(|line| line["vshard"] == test).collect();
        assert_eq!(messages.len(), 2);
        assert_eq!((&messages[0]["seq"], &messages[0]["payload"]), (&1.into(), &"hello".into()));
        assert_eq!((&messages[1]["seq"], &messages[1]["payload"]), (&2.into(), &"again".into()));
        assert!(verify(&dir.join("new.wal"), false, &mut quiet()).unwrap().ok);
        // The store is there now: a second import must not touch it.
        assert_eq!(import(&dir, &bytes, false).unwrap_err().exit_code(), 64);
    }

    #[test]
    fn a_damaged_v1_log_is_refused_with_the_offset_unless_loss_is_accepted() {
        let dir = scratch("tools-import-damaged");
        let mut bytes = v1::header();
        bytes.extend(v1::record(1, "a", b"one"));
        let at = bytes.len();
        bytes.extend(v1::record(2, "a", b"two"));
        *bytes.last_mut().unwrap() ^= 1;
        bytes.extend(v1::record(3, "a", b"three"));
        let error = import(&dir, &bytes, false).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains(&format!("offset {at}")), "{error}");
        assert!(!dir.join("new.wal").exists() && !dir.join("new.wal.partial").exists());
        let report = import(&dir, &bytes, true).unwrap();
        assert_eq!((report.messages, report.damage.len()), (2, 1));
    }

    #[test]
    fn a_whole_store_verifies_and_counts() {
        let dir = scratch("tools-verify");
        let store = filled(&dir, None);
        let path = store.dir().to_owned();
        assert_eq!(verify(&path, false, &mut quiet()).unwrap_err().exit_code(), 75, "the store is in use");
        let report = verify(&path, true, &mut quiet()).unwrap();
        assert!(report.ok && report.in_use && report.clean_stop);
        assert_eq!(report.messages, MESSAGES);
        drop(store);
        let mut last = (0, 0);
        let report = stat(&path, false, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!(report.records["published"], MESSAGES);
        assert_eq!(report.last_index, BTreeMap::from([(2, MESSAGES + 1)]));
        assert!(!report.in_use && report.checkpoint.is_none() && report.damage.is_empty());
        assert!(report.segments.iter().filter(|segment| segment.state == "live").count() >= 3);
        assert!(last.0 > 0 && last.0 <= last.1);
        serde_json::to_string(&report).unwrap();
    }

    #[test]
    fn salvage_keeps_what_is_whole_and_says_what_is_not() {
        let dir = scratch("tools-salvage");
        let mut states = vec![VShardState::default(); 8];
        states[2] = VShardState { last_index: 11, state: Bytes::from_static(b"blob") };
        let store = filled(&dir, Some(states));
        let path = store.dir().to_owned();
        drop(store);
        let slot = slot_path(&path.join("wal"), Slot(1));
        let file = fs::OpenOptions::new().write(true).open(&slot).unwrap();
        file.write_all_at(&[0xee; 4096], 409_600).unwrap();
        let before = fs::read(&slot).unwrap();
        let report = verify(&path, false, &mut quiet()).unwrap();
        assert!(!report.ok && !report.damage.is_empty(), "{report:?}");

        let out = dir.join("saved.wal");
        assert_eq!(salvage(&path, &out, false, &mut quiet()).unwrap_err().exit_code(), 64);
        let report = salvage(&path, &out, true, &mut quiet()).unwrap();
        assert_eq!(fs::read(&slot).unwrap(), before, "the old store is left as it is");
        assert!(!report.damage.is_empty());
        let [lost] = report.lost[..] else { panic!("{:?}", report.lost) };
        assert_eq!(report.messages_kept + (lost.to - lost.from + 1), MESSAGES);
        assert!(out.join("salvage-report.json").exists());

        // The new store is whole, its indexes are dense, and the checkpoint's state covers what it did before.
        let verified = verify(&out, false, &mut quiet()).unwrap();
        assert!(verified.ok && verified.clean_stop, "{verified:?}");
        assert_eq!((verified.messages, verified.checkpoint), (report.messages_kept, 1));
        let lines = dumped(&out);
        let indexes: Vec<u64> = lines.iter().map(|line| line["index"].as_u64().unwrap()).collect();
        assert_eq!(indexes, (1..=report.messages_kept).collect::<Vec<u64>>());
        let new = Store::open_existing(&out, false).unwrap();
        let checkpoint = read_checkpoints(&new).unwrap().newest.unwrap();
        // Of the 11 entries in the state the first was the topic's creation, which is not written again.
        assert_eq!(checkpoint.vshards[2], VShardState { last_index: 10, state: Bytes::from_static(b"blob") });
    }
}
