//! One connection on its core: the task that reads it, and what is to be written.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::{Shutdown, TcpStream};
use std::rc::Rc;
use std::task::{Poll, Waker};

use glommio::io::PollableFd;

use crate::deliver::outbox::Outbox;
use crate::deliver::writer;
use crate::driver::Core;
use crate::metrics::Closed;
use crate::net::reader::{Got, Reader};
use crate::protocol::request::RequestKind;
use crate::shard::event::Event;
use crate::types::ConnId;

pub struct Conn {
    pub id: ConnId,
    pub socket: PollableFd<TcpStream>,
    pub outbox: RefCell<Outbox>,
    /// A task waits for the socket to take more.
    writing: Cell<bool>,
    /// Deliveries were put into the outbox since the shard was last told that it drained.
    pub delivered: Cell<bool>,
    /// Has replies of this turn.
    pub touched: Cell<bool>,
    paused: Cell<bool>,
    authenticated: Cell<bool>,
    auth_pending: Cell<bool>,
    closing: Cell<Option<Closed>>,
    reader: Cell<Option<Waker>>,
}

impl Conn {
    pub fn new(id: ConnId, socket: PollableFd<TcpStream>) -> Conn {
        Conn {
            id,
            socket,
            outbox: RefCell::default(),
            writing: Cell::new(false),
            delivered: Cell::new(false),
            touched: Cell::new(false),
            paused: Cell::new(false),
            authenticated: Cell::new(false),
            auth_pending: Cell::new(false),
            closing: Cell::new(None),
            reader: Cell::new(None),
        }
    }

    pub fn pause(&self) {
        self.paused.set(true);
    }

    pub fn resume(&self) {
        self.paused.set(false);
        self.wake_reader();
    }

    pub fn auth_decided(&self, authenticated: bool) {
        self.authenticated.set(authenticated);
        self.auth_pending.set(false);
        self.wake_reader();
    }

    fn wake_reader(&self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    /// Closes when the outbox is empty, or at once if the peer does not take it.
    pub fn close(&self, reason: Closed) {
        if self.closing.get().is_none() {
            self.closing.set(Some(reason));
        }
        let at_once = matches!(reason, Closed::TooSlow | Closed::Silent | Closed::SlowFrame | Closed::Refused);
        if at_once || self.outbox.borrow().is_empty() {
            self.shut_down();
        }
    }

    /// The reader finds the end of the stream, and does the rest.
    fn shut_down(&self) {
        _ = self.socket.get_ref().shutdown(Shutdown::Both); // it may be gone already
        self.wake_reader();
    }

    /// Sends what the kernel takes; a task sends the rest. Returns the bytes sent.
    pub fn flush(self: &Rc<Conn>, core: &Rc<Core>) -> usize {
        if self.writing.get() {
            return 0;
        }
        let sent = self.send();
        if !self.outbox.borrow().is_empty() && self.closing.get() != Some(Closed::Socket) {
            self.writing.set(true);
            let (conn, core) = (self.clone(), core.clone());
            glommio::spawn_local(async move { conn.write_on(&core).await }).detach();
        }
        sent
    }

    fn send(&self) -> usize {
        match writer::flush(self.socket.get_ref(), &mut self.outbox.borrow_mut()) {
            Ok(sent) => {
                if self.closing.get().is_some() && self.outbox.borrow().is_empty() {
                    self.shut_down();
                }
                sent
            }
            Err(_) => {
                self.closing.set(Some(self.closing.get().unwrap_or(Closed::Socket)));
                self.shut_down();
                0
            }
        }
    }

    async fn write_on(self: Rc<Conn>, core: &Rc<Core>) {
        while !self.outbox.borrow().is_empty() {
            if self.socket.writable().await.is_err() || core.conn(self.id).is_none() {
                break;
            }
            let sent = self.send();
            core.count_sent(sent);
            core.push(Event::Sent { conn: self.id, left: self.outbox.borrow().len() });
            if sent == 0 && self.closing.get().is_some() {
                break;
            }
        }
        self.writing.set(false);
        core.push(Event::Sent { conn: self.id, left: self.outbox.borrow().len() });
    }

    /// Reads until the connection ends. Returns why it did.
    pub async fn read_all(self: Rc<Conn>, core: Rc<Core>) -> Closed {
        let mut reader = Reader::default();
        loop {
            self.may_read(&core).await;
            if let Some(reason) = self.closing.get() {
                if !self.outbox.borrow().is_empty() && reason == Closed::Protocol {
                    // What was said before the end is still to be sent; the socket ends the wait.
                    self.read_to_nothing().await;
                }
                return reason;
            }
            match core.read(self.socket.get_ref()) {
                Ok(Got::Bytes { bytes, more }) => {
                    reader.push(bytes);
                    if !self.decode(&mut reader, &core).await {
                        continue; // the shard closes the connection; `closing` will say so
                    }
                    if !more && self.socket.readable().await.is_err() {
                        return Closed::Socket;
                    }
                }
                Ok(Got::Nothing) => {
                    if self.socket.readable().await.is_err() {
                        return Closed::Socket;
                    }
                }
                Ok(Got::End) => return self.closing.get().unwrap_or(Closed::Client),
                Err(_) => return self.closing.get().unwrap_or(Closed::Socket),
            }
            glommio::executor().yield_if_needed().await;
        }
    }

    /// Hands all whole requests to the shard. `false`: the bytes are no frames, nothing more will be read.
    async fn decode(&self, reader: &mut Reader, core: &Rc<Core>) -> bool {
        loop {
            match reader.next(self.authenticated.get()) {
                Ok(Some(request)) => {
                    // Whether a long frame may follow an AUTH depends on its answer.
                    let auth = matches!(&request.kind, RequestKind::Auth { .. }) && !self.authenticated.get();
                    self.auth_pending.set(auth);
                    core.push(Event::Request { conn: self.id, request });
                    if auth {
                        self.may_read(core).await;
                    }
                }
                Ok(None) => {
                    // Before the login its deadline is enough.
                    if reader.held() > 0 && self.authenticated.get() {
                        core.push(Event::Partial { conn: self.id, held: reader.held() });
                    }
                    return true;
                }
                Err(error) => {
                    self.paused.set(true);
                    core.push(Event::BadFrame { conn: self.id, error });
                    return false;
                }
            }
        }
    }

    /// Waits while the shard has enough of this connection's requests, or of all.
    async fn may_read(&self, core: &Rc<Core>) {
        poll_fn(|cx| {
            let free = !self.paused.get() && !self.auth_pending.get() && core.has_room();
            if free || self.closing.get().is_some() {
                return Poll::Ready(());
            }
            self.reader.set(Some(cx.waker().clone()));
            core.wait_for_room(cx.waker());
            Poll::Pending
        })
        .await;
    }

    async fn read_to_nothing(&self) {
        let mut sink = [0u8; 4096];
        while !self.outbox.borrow().is_empty() {
            if self.socket.readable().await.is_err() {
                return;
            }
            match std::io::Read::read(&mut self.socket.get_ref(), &mut sink) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}
