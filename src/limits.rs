//! Every bound in the system, named. Where two must fit together, a const assertion says so.

/// Largest v1 or v2 frame: type, correlation id and payload, without the length field (V1 B3).
pub const FRAME_LEN_MAX: u32 = 16 * 1024 * 1024;
/// Smallest frame: type and correlation id.
pub const FRAME_LEN_MIN: u32 = 9;
/// Largest frame before AUTH succeeded.
pub const FRAME_LEN_MAX_BEFORE_AUTH: u32 = 4 * 1024;
/// File descriptors that no connection may take: the log opens its segments with them.
pub const FILES_KEPT_BACK: u64 = 64;
/// A connection must be logged in by then, by default.
pub const AUTH_DEADLINE_MS: u64 = 5_000;
/// Connections that have not logged in yet, over one core, by default.
pub const UNAUTHENTICATED_PER_CORE_MAX: usize = 1_024;
/// The same from one address, by default.
pub const UNAUTHENTICATED_PER_ADDRESS_MAX: usize = 256;
/// What a frame that has begun must at least bring within each `net.frame_timeout_ms`.
pub const FRAME_PROGRESS_MIN: usize = 32 * 1024;
/// Bytes of requests a connection may have read but not yet processed, by default; beyond it its socket is not read.
pub const STALLED_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Failed AUTHs one address may make at once; refilled at one per second.
pub const AUTH_FAILURES_BURST: u32 = 64;
/// Addresses whose failed AUTHs one core remembers.
pub const AUTH_ADDRESSES_MAX: usize = 4_096;
/// An AUTH from an address beyond its burst is answered this much later.
pub const AUTH_PENALTY_MS: u64 = 1_000;
/// Keys that may log in; every AUTH is compared with all of them.
pub const API_KEYS_MAX: usize = 1_024;
/// Longest API key: its AUTH must fit the frame allowed before AUTH.
pub const API_KEY_LEN_MAX: usize = FRAME_LEN_MAX_BEFORE_AUTH as usize - FRAME_LEN_MIN as usize - 2;
/// Topic patterns one key may publish to, and as many to subscribe to.
pub const PATTERNS_PER_KEY_MAX: usize = 256;
/// Longest topic pattern of a key.
pub const PATTERN_LEN_MAX: usize = 1_024;

/// HTTP connections at once, those that wait for a thread included.
pub const HTTP_CONNECTIONS_MAX: usize = 64;
/// Threads that answer them.
pub const HTTP_THREADS: usize = 2;
/// Request line and headers.
pub const HTTP_HEAD_MAX: usize = 8 * 1024;
/// An HTTP request must be complete by then, and its answer taken within as long again.
pub const HTTP_DEADLINE_MS: u64 = 5_000;
/// Questions from outside that wait for one core.
pub const INQUIRIES_MAX: usize = 16;
/// A core that has not answered one by then is reported as not answering.
pub const INQUIRY_DEADLINE_MS: u64 = 1_000;
/// Topics or subscriptions one core names in one answer.
pub const INSPECT_ROWS_MAX: usize = 10_000;

/// Longest topic name on the wire (V1 B20).
pub const TOPIC_NAME_MAX: usize = 65_535;
/// Longest durable subscription name.
pub const DURABLE_NAME_MAX: usize = 255;
/// Longest message id for deduplication.
pub const MESSAGE_ID_MAX: usize = 64;
/// Bytes of all options (headers and the like) of one v2 frame.
pub const OPTIONS_LEN_MAX: usize = 32 * 1024;
/// Message priorities: 0 (default) to 9 (first).
pub const PRIORITY_MAX: u8 = 9;
/// Topic aliases per connection.
pub const ALIASES_PER_CONN_MAX: usize = 1_024;
/// Subscriptions per connection.
pub const SUBS_PER_CONN_MAX: usize = 4_096;
/// Most unacknowledged deliveries a v2 consumer may ask for.
pub const CREDIT_MAX: u32 = 65_535;
/// Topics on one core.
pub const TOPICS_PER_CORE_MAX: usize = 1_000_000;
/// Subscriptions of one topic.
pub const SUBS_PER_TOPIC_MAX: usize = 65_536;

/// Events one turn of the driver takes from the inbox.
pub const EVENTS_PER_TURN_MAX: usize = 1_024;
/// Bytes one read takes from a socket; shared by all connections of a core.
pub const READ_CHUNK: usize = 256 * 1024;
/// Requests one core may have unanswered at another core.
pub const FORWARDS_MAX: usize = 8_192;
/// Batches in one ring between two cores. A full ring makes the sender's batch grow, it never blocks it.
pub const RING_SLOTS: usize = 64;
/// Bytes under way to one consumer: handed to its connection, not yet in the kernel's socket buffer.
/// One message is always allowed.
pub const CONSUMER_WINDOW_BYTES: usize = 256 * 1024;
/// Deliveries under way to one consumer, likewise.
pub const CONSUMER_WINDOW_MESSAGES: usize = 1_024;
/// Bytes the kernel takes for a peer that does not take them. More would be memory that no budget knows of, and a backlog that
/// is not on the disk.
pub const SOCKET_UNSENT_MAX: u32 = 256 * 1024;
/// An outbox below this counts as drained.
pub const OUTBOX_LOW: usize = 256 * 1024;
/// A connection whose outbox grows beyond this is closed as too slow.
pub const OUTBOX_MAX: usize = 64 * 1024 * 1024;

/// Alignment of everything on disk.
pub const BLOCK: usize = 4096;
/// Largest batch body: one maximal message and its framing must fit.
pub const BATCH_BYTES_MAX: usize = 20 * 1024 * 1024;
/// A batch that has grown this large is sealed and the next one begun.
pub const BATCH_BYTES_TARGET: usize = 1024 * 1024;
/// Bytes appended and not yet written, and bytes on the way to one other core: beyond it publishers wait.
pub const IN_FLIGHT_BYTES_MAX: usize = 32 * 1024 * 1024;
/// The same however small the memory budget is.
pub const IN_FLIGHT_BYTES_MIN: usize = 4 * 1024 * 1024;
/// Bytes one backlog read fetches from the log.
pub const BACKLOG_READ_BYTES: usize = 1024 * 1024;
/// Backlog reads under way on one core.
pub const BACKLOG_READS_MAX: usize = 8;

/// Identities one topic's deduplication window remembers.
pub const DEDUP_IDS_MAX: usize = 65_536;
/// Publishers whose last sequence one topic remembers.
pub const DEDUP_PUBLISHERS_MAX: usize = 4_096;
/// Gaps in one publisher's stored sequences that are remembered.
pub const DEDUP_RANGES_MAX: usize = 1_024;
/// Ranges of acknowledged messages above the floor one subscription may have before its oldest gap blocks new deliveries.
pub const ACK_RANGES_MAX: usize = 65_536;
/// Longest doubling of the retry backoff: beyond it the delay stays.
pub const RETRY_DOUBLINGS_MAX: u32 = 16;

const _: () = assert!(FRAME_LEN_MAX as usize + 64 * 1024 < BATCH_BYTES_MAX);
const _: () = assert!(BATCH_BYTES_TARGET <= BATCH_BYTES_MAX);
const _: () = assert!(BATCH_BYTES_MAX.is_multiple_of(BLOCK));
const _: () = assert!(CONSUMER_WINDOW_BYTES <= OUTBOX_LOW);
const _: () = assert!(OUTBOX_LOW < OUTBOX_MAX && FRAME_LEN_MAX as usize * 2 < OUTBOX_MAX);
