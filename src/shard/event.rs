//! Everything that can happen to a shard.

use std::net::IpAddr;

use bytes::Bytes;

use crate::protocol::frame::FrameError;
use crate::protocol::request::Request;
use crate::shard::message::CoreBatch;
use crate::types::{ConnId, CoreId, Lsn, Slot};
use crate::wal::batch::Grant;

#[derive(Debug)]
pub enum Event {
    Opened {
        conn: ConnId,
        peer: IpAddr,
    },
    Request {
        conn: ConnId,
        request: Request,
    },
    /// The peer has begun a frame of which `held` bytes are there. Its end comes as a `Request`.
    Partial {
        conn: ConnId,
        held: usize,
    },
    /// The peer sent bytes that are no frame. Requests before it came as their own events.
    BadFrame {
        conn: ConnId,
        error: FrameError,
    },
    /// The socket is gone.
    Closed {
        conn: ConnId,
    },
    /// `left` bytes of this connection's replies have not reached the kernel yet.
    Sent {
        conn: ConnId,
        left: usize,
    },
    Remote {
        from: CoreId,
        batch: CoreBatch,
    },
    /// The log is written up to `end` by a batch of `records`; with O_DSYNC it is also synced.
    LogWritten {
        end: Lsn,
        records: u32,
        synced: bool,
    },
    LogSynced {
        upto: Lsn,
    },
    /// `bytes` of `slot`, from `offset` on.
    BacklogRead {
        slot: Slot,
        offset: u32,
        bytes: Bytes,
    },
    Keeper(FromKeeper),
    /// Time has passed; `wake_at` may be due.
    Tick,
    /// Refuse new publishes, tell v2 clients to go.
    Drain,
}

#[derive(Debug)]
pub enum FromKeeper {
    Grant(Grant),
    /// `force`: also if nothing was logged since the last one.
    TakeSnapshot {
        force: bool,
    },
    Relocate {
        slot: Slot,
    },
    /// Publishes are refused with this reason until `SpaceBack`.
    NoSpace {
        reason: String,
    },
    SpaceBack,
}
