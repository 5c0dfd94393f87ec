//! Recover the store, then make what each core begins with.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;

use crate::access::KeyRing;
use crate::config::{Config, Overflow as ConfigOverflow, Qos0Overflow};
use crate::shard::catalog::Catalog;
use crate::shard::settings::{BacklogOverflow, Overflow, Settings};
use crate::shard::snapshot;
use crate::shard::{Parts, index};
use crate::time::Duration;
use crate::types::{ClientSubIds, CoreId, Lsn, Slot, StreamId, VShard};
use crate::wal::batch::{Grant, Log, LogConfig};
use crate::wal::checkpoint::{Checkpoint, VShardState};
use crate::wal::commit::Commit;
use crate::wal::keeper::RecoveredState;
use crate::wal::recovery::Entry;
use crate::wal::segments::Live;
use crate::wal::start::{RecoveredStore, StartError, recover};
use crate::wal::store::{Store, StoreOptions};

/// What recovery has read: the state of every virtual shard.
pub struct Recovery {
    pub store: RecoveredStore,
    pub took: std::time::Duration,
    catalogs: Vec<Catalog>,
}

pub fn store_options(config: &Config) -> StoreOptions {
    let default = Config::default().storage.segment_size;
    let size = config.storage.segment_size;
    StoreOptions {
        path: config.wal_path.clone().into(),
        virtual_shards: config.shards.virtual_shards,
        dead_letter_suffix: config.delivery.dead_letter_suffix.clone(),
        segment_size: (size != default).then_some(u32::try_from(size.0).unwrap_or(u32::MAX)),
        allow_buffered_io: config.storage.allow_buffered_io,
    }
}

/// Reads the whole store, and brings every virtual shard to where the log ends.
pub fn read_store(store: &Store, config: &Config) -> Result<Recovery, StartError> {
    let began = Instant::now();
    let vshards = store.identity().virtual_shards;
    let window = Duration::from_millis(config.delivery.dedup_window_ms);
    // Both closures of `recover` work on the same state, one after the other.
    let replay = std::cell::RefCell::new(Replay::new(vshards, window));
    let recovered = recover(store, &mut |checkpoint| replay.borrow_mut().load(checkpoint), &mut |entry| {
        replay.borrow_mut().visit(&entry)
    })?;
    let catalogs = replay.into_inner().finish();
    log_recovery(&recovered, &catalogs, began, config);
    Ok(Recovery { store: recovered, took: began.elapsed(), catalogs })
}

/// The state of every virtual shard, as the checkpoint and then the log bring it about. Pure.
pub struct Replay {
    catalogs: Vec<Catalog>,
    /// By virtual shard: the last index in the checkpoint.
    covered: Vec<u64>,
    window: Duration,
}

impl Replay {
    /// - `window`: how long an identity is remembered.
    pub fn new(vshards: u16, window: Duration) -> Replay {
        let catalogs = (0..vshards).map(|_| Catalog::default()).collect();
        Replay { catalogs, covered: vec![0; usize::from(vshards)], window }
    }

    pub fn load(&mut self, checkpoint: &Checkpoint) -> Result<(), String> {
        for (number, vshard) in checkpoint.vshards.iter().enumerate() {
            let id = VShard(number as u16);
            snapshot::decode(&mut self.catalogs[number], id, &vshard.state, self.window).map_err(|e| e.to_string())?;
            self.covered[number] = vshard.last_index;
        }
        Ok(())
    }

    pub fn visit(&mut self, entry: &Entry<'_>) {
        let number = usize::from(entry.vshard.0);
        let in_checkpoint = entry.index.is_some_and(|index| index <= self.covered[number]);
        self.catalogs[number].replay(entry.vshard, &entry.record, entry.at, in_checkpoint, self.window);
    }

    /// By virtual shard.
    pub fn finish(mut self) -> Vec<Catalog> {
        self.catalogs.iter_mut().for_each(Catalog::replayed);
        self.catalogs
    }
}

/// Puts the virtual shards of each core together.
pub fn by_core(catalogs: Vec<Catalog>, cores: u16) -> Vec<Catalog> {
    let mut by_core: Vec<Catalog> = (0..cores).map(|_| Catalog::default()).collect();
    for (number, catalog) in catalogs.into_iter().enumerate() {
        by_core[usize::from(VShard(number as u16).core(cores).0)].absorb(catalog);
    }
    by_core
}

fn log_recovery(store: &RecoveredStore, catalogs: &[Catalog], began: Instant, config: &Config) {
    let recovered = &store.recovered;
    let topics: usize = catalogs.iter().map(|c| c.topics.len()).sum();
    let subscriptions: usize = catalogs.iter().map(|c| c.subs.len()).sum();
    let messages: u64 = catalogs.iter().flat_map(|c| c.topics.values()).map(|t| t.index.live()).sum();
    let took_ms = began.elapsed().as_millis() as u64;
    tracing::info!(
        topics,
        subscriptions,
        messages,
        records = recovered.records,
        frames = recovered.frames,
        clean = recovered.clean,
        took_ms,
        incarnation = store.incarnation,
        "recovered the store"
    );
    if store.fallbacks > 0 {
        tracing::warn!(fallbacks = store.fallbacks, "a checkpoint file was damaged; the older one was used");
    }
    let cut = recovered.truncated;
    if cut.frames > 0 || cut.bytes > 0 {
        tracing::warn!(
            truncated_bytes = cut.bytes,
            truncated_frames = cut.frames,
            truncated_records = cut.records,
            "the log ended in a torn tail, which was cut off: {}",
            match config.fsync_policy {
                crate::wal::commit::FsyncPolicy::Always => "nothing confirmed was in it".to_owned(),
                policy => format!(
                    "up to {} confirmed records are lost, as fsync_policy {policy} allows after a power loss",
                    cut.records
                ),
            }
        );
    }
}

impl Recovery {
    /// The same as a checkpoint would say it.
    pub fn state(&self) -> RecoveredState {
        let last_index = &self.store.recovered.last_index;
        let vshards = self.catalogs.iter().zip(0..).map(|(catalog, number)| VShardState {
            last_index: last_index.get(usize::from(number)).copied().unwrap_or(0),
            state: snapshot::encode(catalog, VShard(number)),
        });
        let live = self.catalogs.iter().flat_map(|catalog| catalog.usage().by_slot());
        let mut by_slot = BTreeMap::<Slot, Live>::new();
        for (slot, records, bytes) in live {
            let sum = by_slot.entry(slot).or_default();
            *sum = Live { records: sum.records + records, bytes: sum.bytes + bytes };
        }
        RecoveredState { vshards: vshards.collect(), live: by_slot.into_iter().collect() }
    }

    /// What each core's shard is made of. `grants`: by core, the first is the one it begins with.
    pub fn into_parts(
        self,
        store: &Store,
        config: &Config,
        cores: u16,
        grants: &mut [Vec<Grant>],
        keys: &KeyRing,
        port: u16,
    ) -> Vec<Parts> {
        let sub_ids = ClientSubIds::default();
        let recovered = &self.store.recovered;
        let mut last_index = recovered.last_index.clone();
        last_index.resize(usize::from(store.identity().virtual_shards), 0);
        by_core(self.catalogs, cores)
            .into_iter()
            .enumerate()
            .map(|(number, catalog)| {
                let grants = &mut grants[number];
                let log_config = LogConfig {
                    store: store.id(),
                    stream: StreamId { incarnation: self.store.incarnation, core: number as u16 },
                    segment_size: store.segment_size(),
                    last_index: last_index.clone(),
                    opening: Some(recovered.note()),
                };
                let mut log = Log::new(log_config, grants[0]);
                for grant in &grants[1..] {
                    log.grant(*grant);
                }
                let start = Lsn(crate::limits::BLOCK as u64);
                Parts {
                    settings: settings(config, store, CoreId(number as u16), cores, port),
                    keys: keys.clone(),
                    sub_ids: sub_ids.clone(),
                    catalog,
                    log,
                    commit: Commit::new(config.fsync_policy, start),
                }
            })
            .collect()
    }
}

fn settings(config: &Config, store: &Store, core: CoreId, cores: u16, port: u16) -> Settings {
    let ms = Duration::from_millis;
    let delivery = &config.delivery;
    let budget = usize::try_from(config.storage.memory_budget.0).unwrap_or(usize::MAX) / usize::from(cores);
    Settings {
        core,
        cores,
        vshards: store.identity().virtual_shards,
        dead_letter_suffix: Bytes::from(store.identity().dead_letter_suffix.clone()),
        dead_letter: delivery.dead_letter,
        dead_letter_ttl: ms(delivery.dead_letter_ttl_ms),
        v1_ttl: ms(delivery.v1_ttl_ms),
        ttl: ms(delivery.ttl_ms),
        max_retries: u16::try_from(config.max_retries).unwrap_or(u16::MAX),
        retry_backoff: ms(config.retry_backoff_ms),
        ack_timeout: ms(delivery.ack_timeout_ms),
        orphan_ttl: ms(delivery.orphan_queue_ttl_ms),
        durable_idle_ttl: ms(delivery.durable_idle_ttl_ms),
        poll_park: ms(delivery.poll_park_ms),
        dedup_window: ms(delivery.dedup_window_ms),
        qos0_messages: usize::try_from(delivery.qos0_queue_messages).unwrap_or(usize::MAX),
        qos0_bytes: usize::try_from(delivery.qos0_queue_bytes.0).unwrap_or(usize::MAX),
        qos0_overflow: match delivery.qos0_overflow {
            Qos0Overflow::DropOldest => Overflow::DropOldest,
            Qos0Overflow::DropNew => Overflow::DropNew,
        },
        backlog_messages: delivery.backlog_messages,
        backlog_bytes: delivery.backlog_bytes.0,
        backlog_overflow: match delivery.overflow {
            ConfigOverflow::Reject => BacklogOverflow::Reject,
            ConfigOverflow::DropOldest => BacklogOverflow::DropOldest,
        },
        auth_deadline: ms(config.net.auth_deadline_ms),
        keepalive: ms(config.net.keepalive_ms),
        // The rest is for what is under way: batches being written, reads, outboxes.
        cache_bytes: budget / 8 * 3,
        entries_max: (budget / 2 / index::ENTRY_BYTES).max(1024),
        unauthenticated_max: usize::try_from(config.net.unauthenticated_max).unwrap_or(usize::MAX),
        unauthenticated_per_address_max: usize::try_from(config.net.unauthenticated_per_address_max)
            .unwrap_or(usize::MAX),
        frame_timeout: ms(config.net.frame_timeout_ms),
        connection_bytes: usize::try_from(config.net.connection_bytes.0).unwrap_or(usize::MAX),
        idle_marker: config.storage.idle_marker,
        ports: if config.shards.shard_ports { (0..cores).map(|c| port + 1 + c).collect() } else { Vec::new() },
    }
}
