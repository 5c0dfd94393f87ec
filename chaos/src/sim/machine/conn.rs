//! One connection as `driver::conn` has it: bytes to requests, replies to bytes, and how both end.

use std::net::{IpAddr, Ipv4Addr};

use blipmq::deliver::outbox::Outbox;
use blipmq::net::reader::Reader;
use blipmq::protocol::request::RequestKind;
use blipmq::shard::effects::CloseReason;
use blipmq::shard::event::Event;
use blipmq::time::Now;
use blipmq::types::ConnId;
use bytes::Bytes;

use super::{Machine, Phase};

/// Events the inbox holds before readers wait, as in the driver.
const INBOX_MAX: usize = 16 * 1024;

#[derive(Default)]
pub(super) struct Conn {
    reader: Reader,
    /// Read by nobody yet: the kernel has them.
    kernel: Vec<u8>,
    pub outbox: Outbox,
    paused: bool,
    authenticated: bool,
    auth_pending: bool,
    closing: Option<CloseReason>,
    /// The client's end is gone.
    ended: bool,
    /// Deliveries were put into the outbox since the shard was last told that it drained.
    pub delivered: bool,
}

impl Machine {
    /// Only when ready.
    pub fn connect(&mut self, now: Now, core: u16) -> ConnId {
        let number = usize::from(core);
        assert!(self.cores[number].phase == Phase::Ready, "core {core} does not accept");
        let conn = {
            let core = &mut self.cores[number];
            core.next_conn += 1;
            ConnId::new(core.id, core.next_conn)
        };
        self.conns.insert(conn, Conn::default());
        self.push(now.mono, number, Event::Opened { conn, peer: IpAddr::V4(Ipv4Addr::LOCALHOST) });
        conn
    }

    /// Bytes from the client, in any slicing.
    pub fn receive(&mut self, now: Now, conn: ConnId, bytes: &[u8]) {
        let Some(state) = self.conns.get_mut(&conn) else { return };
        state.kernel.extend_from_slice(bytes);
        self.read(now, conn);
    }

    /// Reads what the kernel has, unless the connection is held back.
    pub(super) fn read(&mut self, now: Now, conn: ConnId) {
        let number = usize::from(conn.core().0);
        let Some(state) = self.conns.get_mut(&conn) else { return };
        if state.paused || state.auth_pending || self.cores[number].inbox.len() >= INBOX_MAX {
            return;
        }
        if state.closing.is_some() {
            // What else the client says is read to nothing, or not at all.
            state.kernel.clear();
            if state.ended {
                self.forget(now, conn);
            }
            return;
        }
        if !state.kernel.is_empty() {
            let bytes = Bytes::from(std::mem::take(&mut state.kernel));
            state.reader.push(bytes);
        }
        let mut events = Vec::new();
        loop {
            match state.reader.next(state.authenticated) {
                Ok(Some(request)) => {
                    // Whether a long frame may follow an AUTH depends on its answer.
                    let auth = matches!(&request.kind, RequestKind::Auth { .. }) && !state.authenticated;
                    events.push(Event::Request { conn, request });
                    if auth {
                        state.auth_pending = true;
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    state.paused = true;
                    events.push(Event::BadFrame { conn, error });
                    break;
                }
            }
        }
        let ended = state.ended && !state.paused && !state.auth_pending;
        for event in events {
            self.push(now.mono, number, event);
        }
        if ended {
            self.forget(now, conn);
        }
    }

    /// The broker does not read now: whoever has bytes for it keeps them.
    pub fn is_paused(&self, conn: ConnId) -> bool {
        self.conns.get(&conn).is_some_and(|state| {
            state.paused || state.auth_pending || state.closing.is_some() || !state.kernel.is_empty()
        })
    }

    /// Takes up to `max` bytes for the client.
    pub fn send(&mut self, now: Now, conn: ConnId, max: usize) -> Vec<u8> {
        let Some(state) = self.conns.get_mut(&conn).filter(|state| !state.outbox.is_empty()) else { return Vec::new() };
        if max == 0 {
            return Vec::new();
        }
        let front = state.outbox.front();
        let bytes = front[..front.len().min(max)].to_vec();
        state.outbox.advance(bytes.len());
        let left = state.outbox.len();
        if left == 0 {
            state.outbox.shrink();
        }
        let closing = state.closing;
        self.push(now.mono, usize::from(conn.core().0), Event::Sent { conn, left });
        if let Some(reason) = closing.filter(|_| left == 0) {
            self.shut_down(now, conn, reason);
        }
        bytes
    }

    /// Bytes for the client that `send` has not taken.
    pub fn outbox_len(&self, conn: ConnId) -> usize {
        self.conns.get(&conn).map_or(0, |state| state.outbox.len())
    }

    /// The client's end is gone (FIN or reset). A reader that is held back finds out when it reads again, a writer at once.
    pub fn hang_up(&mut self, now: Now, conn: ConnId) {
        let Some(state) = self.conns.get_mut(&conn) else { return };
        state.ended = true;
        if state.outbox.is_empty() {
            self.read(now, conn);
        } else {
            self.forget(now, conn);
        }
    }

    pub(super) fn pause(&mut self, conn: ConnId) {
        if let Some(state) = self.conns.get_mut(&conn) {
            state.paused = true;
        }
    }

    pub(super) fn resume(&mut self, now: Now, conn: ConnId) {
        if let Some(state) = self.conns.get_mut(&conn) {
            state.paused = false;
            self.read(now, conn);
        }
    }

    pub(super) fn auth_decided(&mut self, now: Now, conn: ConnId, authenticated: bool) {
        if let Some(state) = self.conns.get_mut(&conn) {
            state.authenticated = authenticated;
            state.auth_pending = false;
            self.read(now, conn);
        }
    }

    /// Replies have been put into the outbox.
    pub(super) fn replied(&mut self, now: Now, conn: ConnId) {
        let Some(state) = self.conns.get_mut(&conn) else { return };
        if state.ended {
            return self.forget(now, conn);
        }
        let left = state.outbox.len();
        if std::mem::take(&mut state.delivered) || left > blipmq::limits::OUTBOX_MAX {
            self.push(now.mono, usize::from(conn.core().0), Event::Sent { conn, left });
        }
    }

    /// Closes when the outbox is empty, or at once if the peer does not take it.
    pub(super) fn close(&mut self, now: Now, conn: ConnId, reason: CloseReason) {
        let Some(state) = self.conns.get_mut(&conn) else { return };
        let reason = *state.closing.get_or_insert(reason);
        let at_once = matches!(reason, CloseReason::SlowConsumer | CloseReason::Silent) || state.outbox.is_empty();
        if at_once || state.ended {
            self.shut_down(now, conn, reason);
        }
    }

    fn shut_down(&mut self, now: Now, conn: ConnId, reason: CloseReason) {
        self.closed.push((conn, reason));
        self.forget(now, conn);
    }

    /// The connection's task has ended.
    fn forget(&mut self, now: Now, conn: ConnId) {
        if self.conns.remove(&conn).is_some() {
            self.push(now.mono, usize::from(conn.core().0), Event::Closed { conn });
        }
    }

    /// The broker has not noticed an end of it.
    pub fn is_open(&self, conn: ConnId) -> bool {
        self.conns.contains_key(&conn)
    }

    /// Closed by the broker since last asked: there will be no bytes any more.
    pub fn closed(&mut self) -> Vec<(ConnId, CloseReason)> {
        std::mem::take(&mut self.closed)
    }
}
