//! Effects -> I/O, lane by lane. Decides nothing.

use std::rc::Rc;

use bytes::Bytes;

use crate::driver::conn::Conn;
use crate::driver::{Core, add};
use crate::limits;
use crate::metrics::{Closed, Direction, Refused};
use crate::planted::planted;
use crate::protocol::reply::Reply;
use crate::shard::Shard;
use crate::shard::effects::{CloseReason, Effects, ForKeeper, Snapshot};
use crate::shard::event::Event;
use crate::time::Now;
use crate::types::CoreId;
use crate::wal::keeper::{CoreSnapshot, ToKeeper};
use crate::wal::segments::{CoreReport, Live};
use crate::wal::{reader, writer::WriteFailed};

/// The process's end after a failed write or sync (sysexits.h EX_IOERR).
const EXIT_IO: i32 = 74;
/// The same for log bytes that are not what was written (EX_DATAERR).
const EXIT_CORRUPT: i32 = 65;
/// Before a read of a freed slot is reported as done.
const RETRY_READ: std::time::Duration = std::time::Duration::from_millis(100);

impl Core {
    pub(super) fn perform(self: &Rc<Core>, effects: &mut Effects) {
        if let Some(what) = effects.corrupt.take() {
            tracing::error!(
                "the log is damaged: {what}; stopping before anything is built on it. `blipmq wal verify` shows the extent"
            );
            std::process::exit(EXIT_CORRUPT);
        }
        self.send_replies(effects);
        for (id, authenticated) in effects.auth_decided.drain(..) {
            if let Some(conn) = self.conn(id) {
                conn.auth_decided(authenticated);
            }
        }
        for id in effects.pause_reading.drain(..) {
            if let Some(conn) = self.conn(id) {
                conn.pause();
            }
        }
        for id in effects.resume_reading.drain(..) {
            if let Some(conn) = self.conn(id) {
                conn.resume();
            }
        }
        for (id, reason) in effects.close.drain(..) {
            if reason == CloseReason::TooManyUnauthenticated {
                self.counts.refused.borrow_mut().add(Refused::Unauthenticated, 1);
            }
            if let Some(conn) = self.conn(id) {
                conn.close(closed(reason));
            }
        }
        self.send_to_cores(effects);
        for read in effects.reads.drain(..) {
            let core = self.clone();
            glommio::spawn_local(async move {
                match reader::read(&core.wal_dir, read.slot, read.offset, read.len).await {
                    Ok(bytes) => core.push(Event::BacklogRead { slot: read.slot, offset: read.offset, bytes }),
                    Err(error) if error.gone || planted!(ReadErrorIgnored) => {
                        // Whoever asked finds that the message is finished; if it is not, this line tells an operator.
                        tracing::warn!("{error}; it was freed while a read was on its way");
                        glommio::timer::sleep(RETRY_READ).await;
                        core.push(Event::BacklogRead { slot: read.slot, offset: read.offset, bytes: Bytes::new() });
                    }
                    Err(error) => {
                        tracing::error!("{error}; stopping: a confirmed message cannot be read back");
                        std::process::exit(EXIT_IO);
                    }
                }
            })
            .detach();
        }
        for message in effects.to_keeper.drain(..) {
            self.tell_keeper(message);
        }
    }

    fn send_replies(self: &Rc<Core>, effects: &mut Effects) {
        let mut touched: Vec<Rc<Conn>> = Vec::new();
        let mut current: Option<Rc<Conn>> = None;
        for (id, version, reply) in effects.replies.drain(..) {
            if current.as_ref().is_none_or(|conn| conn.id != id) {
                current = self.conn(id);
                touched.extend(current.iter().filter(|conn| !conn.touched.replace(true)).cloned());
            }
            let Some(conn) = &current else { continue };
            if matches!(reply, Reply::Deliver(_)) {
                conn.delivered.set(true);
            }
            conn.outbox.borrow_mut().push(&reply, version);
        }
        for conn in touched {
            conn.touched.set(false);
            add(&self.counts.bytes_out, conn.flush(self) as u64);
            let left = conn.outbox.borrow().len();
            if conn.delivered.take() || left > limits::OUTBOX_MAX {
                self.push(Event::Sent { conn: conn.id, left });
            }
        }
    }

    fn send_to_cores(&self, effects: &mut Effects) {
        let mut port = self.port.borrow_mut();
        for (core, slot) in effects.to_core.iter_mut().enumerate() {
            if slot.is_empty() {
                continue;
            }
            let messages = (slot.asks.len() + slot.tells.len()) as u64;
            if port.offer(CoreId(core as u16), slot) {
                self.counts.ring_batches.borrow_mut().add(Direction::Sent, 1);
                self.counts.ring_messages.borrow_mut().add(Direction::Sent, messages);
            } else {
                // It grows until there is room; what may be in it is bounded by what was accepted.
                add(&self.counts.ring_full, 1);
            }
        }
        port.flush_wakes();
    }

    fn tell_keeper(&self, message: ForKeeper) {
        let message = match message {
            ForKeeper::WantGrant { count } => ToKeeper::WantGrant { core: self.id, count },
            ForKeeper::Unchanged => ToKeeper::Unchanged { core: self.id },
            ForKeeper::Relocated { slot } => ToKeeper::Relocated { core: self.id, slot },
            ForKeeper::Snapshot(Snapshot { covered, durable, vshards, live }) => {
                let live = live.into_iter().map(|(slot, records, bytes)| (slot, Live { records, bytes })).collect();
                let report = CoreReport { core: self.id, covered, live, begun: self.begun.take() };
                let wall = self.clock.now().wall;
                ToKeeper::Snapshot(Box::new(CoreSnapshot { report, durable, vshards, wall }))
            }
        };
        if self.keeper.try_send(message).is_err() && !self.finished.get() {
            tracing::error!("the keeper of the store does not answer; stopping");
            std::process::exit(EXIT_IO);
        }
    }

    /// Starts what the log wants: one write and one sync at a time, whatever arrives meanwhile is the next batch.
    pub(super) fn drive_log(self: &Rc<Core>, shard: &mut Shard, now: Now) {
        if !self.write_busy.get()
            && let Some(write) = shard.next_write(now)
        {
            self.write_busy.set(true);
            if write.new_segment {
                self.begun.borrow_mut().push(write.segment);
                add(&self.counts.segments_begun, 1);
            }
            let core = self.clone();
            glommio::spawn_local(async move {
                #[cfg(feature = "planted-bugs")]
                slow_down().await;
                let began = core.now_mono();
                if let Err(error) = core.writer.write(&write).await
                    && !planted!(IgnoreIoError)
                {
                    fail_stop(&error);
                }
                let synced = core.writer.is_dsync();
                if synced {
                    core.counts.sync_time.borrow_mut().record((core.now_mono() - began).0);
                }
                core.write_busy.set(false);
                core.push(Event::LogWritten { end: write.end, records: write.records, synced });
            })
            .detach();
        }
        if !self.writer.is_dsync()
            && !self.sync_busy.get()
            && let Some(upto) = shard.begin_sync(now.mono)
        {
            self.sync_busy.set(true);
            let core = self.clone();
            glommio::spawn_local(async move {
                let began = core.now_mono();
                if let Err(error) = core.writer.sync().await
                    && !planted!(IgnoreIoError)
                {
                    fail_stop(&error);
                }
                core.counts.sync_time.borrow_mut().record((core.now_mono() - began).0);
                core.sync_busy.set(false);
                core.push(Event::LogSynced { upto });
            })
            .detach();
        }
    }
}

/// A disk as slow as `BLIPMQ_PLANTED_SLOW_WRITE_MS` says: what is confirmed too early stays unwritten long enough to be lost.
#[cfg(feature = "planted-bugs")]
async fn slow_down() {
    let ms = std::env::var("BLIPMQ_PLANTED_SLOW_WRITE_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(0);
    glommio::timer::sleep(std::time::Duration::from_millis(ms)).await;
}

/// Nobody knows what is on the disk now: nothing may be promised any more, and nothing tried again.
pub(super) fn fail_stop(error: &WriteFailed) -> ! {
    tracing::error!(
        "{error}; stopping: what was confirmed is safe, what was not is unknown. Check the disk, then start again"
    );
    std::process::exit(EXIT_IO);
}

fn closed(reason: CloseReason) -> Closed {
    match reason {
        CloseReason::BadFrame => Closed::Protocol,
        CloseReason::AuthDeadline => Closed::AuthDeadline,
        CloseReason::TooManyUnauthenticated => Closed::Refused,
        CloseReason::SlowFrame => Closed::SlowFrame,
        CloseReason::SlowConsumer => Closed::TooSlow,
        CloseReason::Silent => Closed::Silent,
    }
}
