//! A broker of a few hundred lines, good and bad on demand (`TOY_BUG`): shows that the harness notices what is bad and
//! leaves alone what is good. One lock, one log file, no sync; understands the same environment as `blipmqd`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chaos::wire::{self, Cursor, put_frame, put_string};

type ConnId = u64;

/// A topic's messages in order; the position is the sequence.
#[derive(Default)]
struct Topic {
    messages: Vec<Vec<u8>>,
    last: HashMap<u64, u64>,
    /// Messages that an earlier process may have delivered.
    recovered: usize,
}

#[derive(Default)]
struct Queue {
    topic: String,
    ready: BTreeSet<usize>,
    in_flight: BTreeMap<usize, ConnId>,
    acked: HashSet<usize>,
    attempts: HashMap<usize, u16>,
    consumers: Vec<Consumer>,
}

struct Consumer {
    conn: ConnId,
    id: u64,
    credit: usize,
    version: u16,
    /// v1: the POLL that waits.
    poll: Option<u64>,
}

struct Broker {
    topics: HashMap<String, Topic>,
    queues: BTreeMap<String, Queue>,
    conns: HashMap<ConnId, TcpStream>,
    log: File,
    /// Confirmed and not yet written, if that bug is planted.
    late: Option<Vec<u8>>,
    bug: String,
    published: u64,
    next_id: u64,
}

fn main() -> io::Result<()> {
    let env = |name: &str| std::env::var(name).unwrap_or_default();
    let store = PathBuf::from(env("BLIPMQ_WAL_PATH"));
    std::fs::create_dir_all(&store)?;
    let path = store.join("toy.log");
    let mut broker = Broker {
        topics: HashMap::new(),
        queues: BTreeMap::new(),
        conns: HashMap::new(),
        log: OpenOptions::new().create(true).append(true).open(&path)?,
        late: (env("BLIPMQ_PLANTED_BUG") == "confirm-before-durable").then(Vec::new),
        bug: env("TOY_BUG"),
        published: 0,
        next_id: 1,
    };
    broker.recover(&std::fs::read(&path)?);
    if broker.bug == "die-at-start" && broker.topics.values().any(|topic| topic.recovered > 0) {
        eprintln!("the toy does not feel like starting");
        std::process::exit(65);
    }
    let broker = Arc::new(Mutex::new(broker));
    let flusher = broker.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let mut broker = lock(&flusher);
            let late = broker.late.as_mut().map(std::mem::take).unwrap_or_default();
            broker.log.write_all(&late).expect("the log can be written");
        }
    });
    let listener = TcpListener::bind(format!("127.0.0.1:{}", env("BLIPMQ_PORT")))?;
    for (stream, conn) in listener.incoming().zip(1..) {
        let (stream, broker) = (stream?, broker.clone());
        std::thread::spawn(move || {
            let served = serve(&stream, conn, &broker);
            lock(&broker).disconnect(conn);
            if let Err(error) = served
                && error.kind() == io::ErrorKind::InvalidData
            {
                eprintln!("connection {conn}: {error}");
            }
        });
    }
    Ok(())
}

fn lock(broker: &Mutex<Broker>) -> std::sync::MutexGuard<'_, Broker> {
    broker.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut stream: &TcpStream, conn: ConnId, broker: &Mutex<Broker>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    lock(broker).conns.insert(conn, stream.try_clone()?);
    let mut version = 0;
    loop {
        let mut head = [0; 13];
        stream.read_exact(&mut head)?;
        let mut cursor = Cursor(&head);
        let (len, kind, cid) = (cursor.u32()?, cursor.u8()?, cursor.u64()?);
        let mut payload = vec![0; len as usize - 9];
        stream.read_exact(&mut payload)?;
        if kind == wire::HELLO {
            version = Cursor(&payload).u16()?;
        }
        let mut broker = lock(broker);
        match version {
            1 => broker.on_v1(conn, kind, cid, Cursor(&payload))?,
            _ => broker.on_v2(conn, kind, cid, Cursor(&payload))?,
        }
    }
}

/// Log records: `u32 length | u8 type | …`, the rest as in `recover`.
impl Broker {
    fn recover(&mut self, mut log: &[u8]) {
        while let Some((len, rest)) = log.split_first_chunk::<4>() {
            let Some((record, rest)) = rest.split_at_checked(u32::from_be_bytes(*len) as usize) else { break };
            self.replay(Cursor(record)).expect("a whole record");
            log = rest;
        }
        for topic in self.topics.values_mut() {
            topic.recovered = topic.messages.len();
        }
    }

    fn replay(&mut self, mut record: Cursor<'_>) -> io::Result<()> {
        match record.u8()? {
            b'S' => {
                let (name, topic) = (record.string()?, record.string()?);
                self.queues.insert(name, Queue { topic, ..Queue::default() });
            }
            b'A' => {
                let (name, at) = (record.string()?, record.u64()? as usize);
                let queue = self.queues.get_mut(&name).expect("subscribed before");
                queue.ready.remove(&at);
                queue.acked.insert(at);
            }
            _ => {
                let (name, publisher, sequence) = (record.string()?, record.u64()?, record.u64()?);
                self.store(&name, publisher, sequence, record.0.to_vec());
            }
        }
        Ok(())
    }

    fn append(&mut self, fill: impl FnOnce(&mut Vec<u8>)) {
        let mut record = vec![0; 4];
        fill(&mut record);
        let len = record.len() as u32 - 4;
        record[..4].copy_from_slice(&len.to_be_bytes());
        match self.late.as_mut() {
            Some(late) => late.extend(record),
            None => self.log.write_all(&record).expect("the log can be written"),
        }
    }

    fn store(&mut self, topic: &str, publisher: u64, sequence: u64, message: Vec<u8>) {
        let stored = self.topics.entry(topic.into()).or_default();
        stored.last.insert(publisher, sequence);
        stored.messages.push(message);
        let at = stored.messages.len() - 1;
        for queue in self.queues.values_mut().filter(|queue| queue.topic == topic) {
            queue.ready.insert(at);
        }
    }

    /// True: stored now. False: had it.
    fn publish(&mut self, topic: &str, identity: Option<(u64, u64)>, message: &[u8]) -> bool {
        if let Some((publisher, sequence)) = identity
            && self.bug != "forget-identity"
            && self.topics.get(topic).and_then(|t| t.last.get(&publisher)).is_some_and(|last| sequence <= *last)
        {
            return false;
        }
        self.published += 1;
        if self.bug == "lose" && self.published.is_multiple_of(101) {
            return true;
        }
        let (publisher, sequence) = identity.unwrap_or_default();
        self.append(|record| {
            record.push(b'P');
            put_string(record, topic);
            record.extend([publisher.to_be_bytes(), sequence.to_be_bytes()].concat());
            record.extend_from_slice(message);
        });
        self.store(topic, publisher, sequence, message.to_vec());
        true
    }

    fn subscribe(&mut self, name: &str, topic: &str, consumer: Consumer) -> bool {
        let resumed = self.queues.contains_key(name);
        if !resumed {
            self.append(|record| {
                record.push(b'S');
                put_string(record, name);
                put_string(record, topic);
            });
            self.queues.insert(name.into(), Queue { topic: topic.into(), ..Queue::default() });
        }
        self.queues.get_mut(name).expect("just made").consumers.push(consumer);
        resumed
    }

    fn ack(&mut self, conn: ConnId, id: u64, first: u64, last: u64) -> bool {
        let mut done = Vec::new();
        for (name, queue) in &mut self.queues {
            if queue.consumers.iter().any(|c| c.conn == conn && c.id == id) {
                for tag in first..=last {
                    let at = tag as usize - 1;
                    if queue.in_flight.remove(&at).is_some() {
                        queue.acked.insert(at);
                        done.push((name.clone(), at));
                    }
                }
            }
        }
        for (name, at) in &done {
            if self.bug != "forget-acks" {
                self.append(|record| {
                    record.push(b'A');
                    put_string(record, name);
                    record.extend((*at as u64).to_be_bytes());
                });
            }
            if self.bug == "ack-requeues" && at % 50 == 7 {
                self.queues.get_mut(name).expect("acked").ready.insert(*at);
            }
        }
        !done.is_empty()
    }

    fn disconnect(&mut self, conn: ConnId) {
        self.conns.remove(&conn);
        for queue in self.queues.values_mut() {
            queue.consumers.retain(|consumer| consumer.conn != conn);
            let back: Vec<usize> = queue.in_flight.iter().filter(|(_, c)| **c == conn).map(|(at, _)| *at).collect();
            for at in back {
                queue.in_flight.remove(&at);
                queue.ready.insert(at);
            }
        }
        self.deliver();
    }

    fn say(&mut self, conn: ConnId, kind: u8, cid: u64, fill: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, kind, cid, fill);
        if let Some(stream) = self.conns.get_mut(&conn) {
            // A client that went away is found by its reader.
            stream.write_all(&bytes).ok();
        }
    }

    /// Hands out what consumers have room for.
    fn deliver(&mut self) {
        let mut out = Vec::new();
        for queue in self.queues.values_mut() {
            let topic = self.topics.entry(queue.topic.clone()).or_default();
            for consumer in &mut queue.consumers {
                let mut room = consumer.credit - queue.in_flight.values().filter(|c| **c == consumer.conn).count();
                while room > 0 && (consumer.version == 2 || consumer.poll.is_some()) {
                    let backwards = self.bug == "reorder" && queue.ready.len() > 10;
                    let next = if backwards { queue.ready.pop_last() } else { queue.ready.pop_first() };
                    let Some(at) = next else { break };
                    queue.in_flight.insert(at, consumer.conn);
                    let attempt = queue.attempts.entry(at).or_insert(0);
                    *attempt += 1;
                    let flagged = self.bug != "no-flag" && (*attempt > 1 || at < topic.recovered);
                    let mut message = topic.messages[at].clone();
                    if self.bug == "corrupt" && at % 50 == 7 {
                        let end = message.len() - 1;
                        message[end] ^= 1;
                    }
                    let mut frame = Vec::new();
                    if consumer.version == 2 {
                        put_frame(&mut frame, wire::DELIVER, 0, |payload| {
                            payload.extend([consumer.id.to_be_bytes(), (at as u64 + 1).to_be_bytes()].concat());
                            payload.extend(attempt.to_be_bytes());
                            payload.push(1 | u8::from(flagged) << 1);
                            payload.extend([0; 10]);
                            payload.extend(message);
                        });
                    } else {
                        consumer.poll = None;
                        put_frame(&mut frame, 0x03, at as u64 + 1, |payload| {
                            payload.push(1);
                            put_string(payload, &queue.topic);
                            payload.extend(message);
                        });
                    }
                    out.push((consumer.conn, frame));
                    room -= 1;
                }
            }
        }
        for (conn, frame) in out {
            if let Some(stream) = self.conns.get_mut(&conn) {
                stream.write_all(&frame).ok();
            }
        }
    }

    fn on_v2(&mut self, conn: ConnId, kind: u8, cid: u64, mut rest: Cursor<'_>) -> io::Result<()> {
        match kind {
            wire::HELLO => self.say(conn, wire::WELCOME, cid, |_| {}),
            wire::AUTH => self.say(conn, wire::OK, cid, |_| {}),
            wire::PING => self.say(conn, wire::PONG, cid, |_| {}),
            wire::PUBLISH => {
                rest.take(2)?;
                let topic = rest.string()?;
                let identity = match options(&mut rest)?.get(&3) {
                    Some(value) => Some((Cursor(value).u64()?, Cursor(&value[8..]).u64()?)),
                    None => None,
                };
                if self.bug == "die" && self.published > 500 {
                    eprintln!("the toy had enough");
                    std::process::exit(70);
                }
                if self.bug == "hang" {
                    return Ok(());
                }
                let stored = self.publish(&topic, identity, rest.0);
                self.say(conn, wire::CONFIRM, 0, |payload| {
                    payload.extend(cid.to_be_bytes());
                    payload.push(u8::from(!stored));
                    payload.extend([1; 9]);
                });
                self.deliver();
            }
            wire::SUBSCRIBE => {
                rest.u8()?;
                let credit = rest.u32()? as usize;
                let topic = rest.string()?;
                let name = String::from_utf8_lossy(options(&mut rest)?[&1]).into_owned();
                self.next_id += 1;
                let id = self.next_id;
                let resumed = self.subscribe(&name, &topic, Consumer { conn, id, credit, version: 2, poll: None });
                self.say(conn, wire::SUBSCRIBED, cid, |payload| {
                    payload.extend(id.to_be_bytes());
                    payload.extend([0, 0, u8::from(resumed), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                });
                self.deliver();
            }
            wire::ACK => {
                let (id, confirm) = (rest.u64()?, rest.u8()? != 0);
                while !rest.0.is_empty() {
                    let (first, last) = (rest.u64()?, rest.u64()?);
                    self.ack(conn, id, first, last);
                }
                if confirm {
                    self.say(conn, wire::OK, cid, |_| {});
                }
                self.deliver();
            }
            _ => {}
        }
        Ok(())
    }

    fn on_v1(&mut self, conn: ConnId, kind: u8, cid: u64, mut rest: Cursor<'_>) -> io::Result<()> {
        let number = |n: u64| move |payload: &mut Vec<u8>| payload.extend(n.to_be_bytes());
        match kind {
            0x01 | 0x02 => self.say(conn, 0x05, cid, number(0)),
            0x03 => {
                rest.u8()?;
                let topic = rest.string()?;
                self.publish(&topic, None, rest.0);
                self.deliver();
            }
            0x04 => {
                let topic = rest.string()?;
                self.next_id += 1;
                let id = self.next_id;
                self.subscribe(
                    &format!("v1 {topic}"),
                    &topic,
                    Consumer { conn, id, credit: 10_000, version: 1, poll: None },
                );
                self.say(conn, 0x05, cid, number(id));
            }
            0x05 => {
                let id = rest.u64()?;
                if !self.ack(conn, id, cid, cid) {
                    self.say(conn, 0x06, cid, |payload| {
                        payload.extend(404u16.to_be_bytes());
                        put_string(payload, "unknown subscription or delivery tag");
                    });
                }
            }
            0x07 => self.say(conn, 0x08, cid, |_| {}),
            0x09 => {
                let id = rest.u64()?;
                let consumers = self.queues.values_mut().flat_map(|queue| &mut queue.consumers);
                consumers.filter(|c| c.conn == conn && c.id == id).for_each(|c| c.poll = Some(cid));
                self.deliver();
            }
            _ => {}
        }
        Ok(())
    }
}

fn options<'a>(rest: &mut Cursor<'a>) -> io::Result<HashMap<u8, &'a [u8]>> {
    let len = rest.u16()?;
    let mut options = Cursor(rest.take(usize::from(len))?);
    let mut found = HashMap::new();
    while !options.0.is_empty() {
        let (tag, len) = (options.u8()?, options.u16()?);
        found.insert(tag, options.take(usize::from(len))?);
    }
    Ok(found)
}
