//! Replays `scenarios/*.txt`: what happens to a broker, and what its clients must hear of it.
//!
//! A file holds stories, each under a `#` title. A line is a step (`a publishes orders "m1" qos1 confirm`) or what a client
//! must have heard next (`  a gets orders "m1" tag=1`, indented). An expectation names the words that matter; more may have
//! been said. When the next step begins, everything said must have been expected. Time stands still but for `after 5s`,
//! and the log is written and synced by itself unless it `holds`. After each step the metrics' ledger must balance.

mod house;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;

use blipmq::metrics::Ledger;
use blipmq::protocol::options::{HEADER, OptionsBuilder, OptionsReader, split_header};
use blipmq::protocol::reply::{Outcome, Reply};
use blipmq::protocol::request::{
    Identity, Publish, RejectAction, Request, RequestKind, Start, Subscribe, TagRanges, TopicRef, UnsubscribeMode,
};
use blipmq::shard::event::{Event, FromKeeper};
use blipmq::shard::settings::{BacklogOverflow, Overflow};
use blipmq::time::Duration;
use blipmq::types::{ClientSub, ConnId, DeliveryTag, Qos};
use blipmq::wal::commit::FsyncPolicy;
use bytes::Bytes;
use house::{Crash, House, KEY, Plan, Said};

#[test]
fn every_scenario_holds() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(dir).expect("scenarios").map(|f| f.expect("a file").path()).collect();
    files.sort();
    let mut failures = String::new();
    let mut told = 0;
    for file in files {
        let text = std::fs::read_to_string(&file).expect("text");
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        for (title, lines) in stories(&text) {
            told += 1;
            if let Err(what) = tell(&lines) {
                let _ = writeln!(failures, "{name}: {title}\n  {what}");
            }
        }
    }
    assert!(told >= 40, "only {told} stories were found");
    assert!(failures.is_empty(), "\n{failures}");
}

/// What one turn sees finished is finished in the log before a subscription that counts on it, or a replay gives it more.
#[test]
fn a_subscription_gets_no_more_after_a_restart_than_the_turn_that_made_it_left_over() {
    let mut house = House::new(Plan::new());
    let log_in = |house: &mut House| {
        let conn = house.open(0);
        house.request(conn, 1, RequestKind::Hello { version: 2 });
        house.request(conn, 2, RequestKind::Auth { key: Bytes::from_static(KEY) });
        conn
    };
    let subscribe = |name: Option<&'static str>| {
        RequestKind::Subscribe(Subscribe {
            topic: Bytes::from_static(b"orders"),
            qos: Qos::AtLeastOnce,
            durable: name.map(|name| Bytes::from_static(name.as_bytes())),
            credit: 10,
            priority: 0,
            start: Start::Earliest,
            ack_timeout: None,
        })
    };
    let delivered = |house: &mut House| -> Vec<Bytes> {
        let said = std::mem::take(&mut house.said).into_iter();
        said.filter_map(|said| match said {
            Said::Reply(_, Reply::Deliver(deliver)) => Some(Bytes::copy_from_slice(deliver.body.payload())),
            _ => None,
        })
        .collect()
    };
    let conn = log_in(&mut house);
    house.request(conn, 3, subscribe(Some("old")));
    // It keeps the messages where they can be found, but not over a restart.
    house.request(conn, 3, subscribe(None));
    house.quiesce(true);
    for text in ["m1", "m2"] {
        house.request(conn, 4, RequestKind::Publish(publish("orders", &format!("\"{text}\""), &[])));
    }
    house.quiesce(true);
    assert_eq!(delivered(&mut house).len(), 4);
    let sub = ClientSub(1);
    let ask = |cid, kind| Event::Request { conn, request: Request { cid, kind } };
    let acked = RequestKind::Ack { sub, tags: TagRanges::one(DeliveryTag(1)), confirm: true };
    house.turn(0, [ask(5, acked), ask(6, subscribe(Some("new")))]);
    house.quiesce(true);
    assert_eq!(delivered(&mut house).len(), 1, "m1 was finished when it began");
    house.crash(Crash::Killed, 1, &mut |_| 0);
    let conn = log_in(&mut house);
    house.request(conn, 3, subscribe(Some("new")));
    house.quiesce(true);
    assert_eq!(delivered(&mut house).len(), 1, "and is after a restart");
}

/// A PONG vouches for acknowledgements: not for those that the log has no room for.
#[test]
fn a_pong_waits_for_acknowledgements_that_wait_for_a_segment() {
    let mut plan = Plan::new();
    plan.slots_max = Some(3);
    let mut house = House::new(plan);
    let conn = house.open(0);
    house.request(conn, 1, RequestKind::Hello { version: 1 });
    house.request(conn, 2, RequestKind::Auth { key: Bytes::from_static(KEY) });
    let subscribe = Subscribe {
        topic: Bytes::from_static(b"orders"),
        qos: Qos::AtLeastOnce,
        durable: None,
        credit: 0,
        priority: 0,
        start: Start::New,
        ack_timeout: None,
    };
    house.request(conn, 3, RequestKind::Subscribe(subscribe));
    for _ in 0..100 {
        house.request(conn, 4, RequestKind::Publish(publish("orders", "\"m\"", &[])));
    }
    // Everything in one batch; from now on each acknowledgement takes a block, until no segment is left.
    let write = |house: &mut House| {
        house.begin_write(0);
        house.end_write(0);
        house.begin_sync(0);
        house.end_sync(0);
    };
    // The publishes waited for the SUBSCRIBE.
    write(&mut house);
    write(&mut house);
    house.tell_all(|| FromKeeper::NoSpace { reason: "full".to_owned() });
    house.said.clear();
    let pongs = |house: &mut House, cid: u64| {
        let said = std::mem::take(&mut house.said);
        said.iter().filter(|said| matches!(said, Said::Reply(_, Reply::Pong { cid: at }) if *at == cid)).count()
    };
    let sub = ClientSub(1);
    let mut waits = None;
    for tag in 1..=100 {
        house.request(conn, 5, RequestKind::Poll { sub });
        let tags = TagRanges::one(DeliveryTag(tag));
        house.request(conn, tag, RequestKind::Ack { sub, tags, confirm: false });
        house.request(conn, 1000 + tag, RequestKind::Ping);
        write(&mut house);
        if pongs(&mut house, 1000 + tag) == 0 {
            waits = Some(tag);
            break;
        }
    }
    let tag = waits.expect("the log is full some time");
    house.more_slots();
    house.serve();
    write(&mut house);
    assert_eq!(pongs(&mut house, 1000 + tag), 1, "it is logged now");
    // What was vouched for does not come back.
    house.crash(Crash::Killed, 1, &mut |_| 0);
    let waiting: u64 = house.metrics().queue_waiting;
    assert_eq!(waiting, 100 - tag);
}

type Line<'a> = (usize, &'a str);

fn stories(text: &str) -> Vec<(&str, Vec<Line<'_>>)> {
    let mut stories: Vec<(&str, Vec<Line<'_>>)> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(title) = line.strip_prefix("# ") {
            stories.push((title, Vec::new()));
        } else if !line.trim().is_empty() {
            stories.last_mut().expect("a title comes first").1.push((number, line));
        }
    }
    stories
}

/// Plays one story. A panic inside is a failure of the line it comes from.
fn tell(lines: &[Line<'_>]) -> Result<(), String> {
    let mut plan = Plan::new();
    let setup = lines.iter().take_while(|(_, line)| line.starts_with("with ")).count();
    for (_, line) in &lines[..setup] {
        set(&mut plan, line);
    }
    let mut stage = Stage { house: House::new(plan), clients: BTreeMap::new(), names: HashMap::new(), log: true };
    for (number, line) in &lines[setup..] {
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stage.play(line)));
        let played = played.unwrap_or_else(|_| Err("panicked, see above".to_owned()));
        played.map_err(|what| format!("line {number}: {}\n    {what}", line.trim()))?;
    }
    stage.nothing_left()
}

fn set(plan: &mut Plan, line: &str) {
    let mut words = line.split_whitespace().skip(1);
    let (name, value) = (words.next().expect("a setting"), words.next().expect("its value"));
    let s = &mut plan.settings;
    match name {
        "cores" => plan.cores = value.parse().expect("cores"),
        "policy" => plan.policy = FsyncPolicy::parse(value).expect("a policy"),
        "ttl" => s.ttl = span(value),
        "v1_ttl" => s.v1_ttl = span(value),
        "max_retries" => s.max_retries = value.parse().expect("retries"),
        "retry_backoff" => s.retry_backoff = span(value),
        "ack_timeout" => s.ack_timeout = span(value),
        "orphan_ttl" => s.orphan_ttl = span(value),
        "durable_idle_ttl" => s.durable_idle_ttl = span(value),
        "poll_park" => s.poll_park = span(value),
        "keepalive" => s.keepalive = span(value),
        "auth_deadline" => s.auth_deadline = span(value),
        "unauthenticated_max" => s.unauthenticated_max = value.parse().expect("connections"),
        "unauthenticated_per_address_max" => s.unauthenticated_per_address_max = value.parse().expect("connections"),
        "frame_timeout" => s.frame_timeout = span(value),
        "cache_bytes" => s.cache_bytes = value.parse().expect("bytes"),
        "dead_letter" => s.dead_letter = value == "on",
        "qos0_messages" => s.qos0_messages = value.parse().expect("messages"),
        "qos0_overflow" => s.qos0_overflow = if value == "drop_new" { Overflow::DropNew } else { Overflow::DropOldest },
        "backlog_messages" => s.backlog_messages = value.parse().expect("messages"),
        "backlog_overflow" if value == "drop_oldest" => s.backlog_overflow = BacklogOverflow::DropOldest,
        "segments" => plan.slots_max = Some(value.parse().expect("segments")),
        _ => panic!("no such setting: {line}"),
    }
}

fn span(text: &str) -> Duration {
    match text.strip_suffix("ms") {
        Some(ms) => Duration::from_millis(ms.parse().expect("milliseconds")),
        None => Duration::from_secs(text.strip_suffix('s').and_then(|s| s.parse().ok()).expect("seconds")),
    }
}

struct Client {
    conn: ConnId,
    /// Its newest subscription of each topic.
    subs: HashMap<String, ClientSub>,
    topics: HashMap<ClientSub, String>,
    /// What a correlation id was for.
    asked: HashMap<u64, String>,
    next_cid: u64,
    heard: VecDeque<String>,
}

struct Stage {
    house: House,
    clients: BTreeMap<String, Client>,
    names: HashMap<ConnId, String>,
    /// The log is written and synced by itself.
    log: bool,
}

impl Stage {
    fn play(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        if line.starts_with(' ') {
            return self.expect(&words);
        }
        self.nothing_left()?;
        match words[..] {
            ["after", time] => {
                self.house.advance(span(time));
                (0..self.house.cores.len()).for_each(|core| self.house.tick(core));
            }
            ["log", "holds"] => self.log = false,
            ["log", "goes", "on"] => self.log = true,
            ["log", "writes"] => {
                for core in 0..self.house.cores.len() {
                    self.house.begin_write(core);
                    self.house.end_write(core);
                }
            }
            ["log", "syncs"] => {
                for core in 0..self.house.cores.len() {
                    self.house.begin_sync(core);
                    self.house.end_sync(core);
                }
            }
            ["sync", "begins"] => (0..self.house.cores.len()).for_each(|core| _ = self.house.begin_sync(core)),
            ["sync", "ends"] => (0..self.house.cores.len()).for_each(|core| _ = self.house.end_sync(core)),
            ["space", "ends"] => self.house.tell_all(|| FromKeeper::NoSpace { reason: "disk full".to_owned() }),
            ["space", "returns"] => self.house.tell_all(|| FromKeeper::SpaceBack),
            ["checkpoint"] => _ = self.house.begin_checkpoint(),
            ["broker", "drains"] => (0..self.house.cores.len()).for_each(|core| self.house.event(core, Event::Drain)),
            ["broker", "is", "killed", ref rest @ ..] => self.crash(Crash::Killed, rest),
            ["power", "fails", ref rest @ ..] => self.crash(Crash::PowerLoss, rest),
            [client, verb, ref rest @ ..] => self.act(client, verb, rest),
            _ => return Err("not understood".to_owned()),
        }
        self.settle()
    }

    fn crash(&mut self, how: Crash, rest: &[&str]) {
        let cores = option(rest, "cores=").map_or(self.house.plan.cores, |n| n.parse().expect("cores"));
        self.clients.clear();
        self.names.clear();
        self.house.crash(how, cores, &mut |_| 0);
    }

    fn act(&mut self, name: &str, verb: &str, rest: &[&str]) {
        if verb == "connects" {
            return self.connect(name, rest);
        }
        let topic = rest.first().map(|word| (*word).to_owned()).unwrap_or_default();
        let client = self.clients.get_mut(name).unwrap_or_else(|| panic!("{name} is not connected"));
        let conn = client.conn;
        if verb == "closes" {
            self.clients.remove(name);
            self.names.remove(&conn);
            return self.house.event(usize::from(conn.core().0), Event::Closed { conn });
        }
        if verb == "drips" {
            let held = topic.parse().expect("bytes");
            return self.house.event(usize::from(conn.core().0), Event::Partial { conn, held });
        }
        let sub = client.subs.get(&topic).copied().unwrap_or(ClientSub(u64::MAX));
        let kind = match verb {
            "publishes" => {
                let payloads: Vec<&str> = rest.iter().copied().filter(|word| word.starts_with('"')).collect();
                for payload in payloads {
                    let cid = ask(client, payload);
                    self.house.request(conn, cid, RequestKind::Publish(publish(&topic, payload, rest)));
                }
                return;
            }
            "subscribes" => RequestKind::Subscribe(subscribe(&topic, rest)),
            "acks" => {
                let tags = ranges(rest[1]);
                // v1 names the delivery by the correlation id.
                if !rest.contains(&"confirm") {
                    let cid = tags.0[0].0.0;
                    let kind = RequestKind::Ack { sub, tags, confirm: false };
                    return self.house.request(conn, cid, kind);
                }
                RequestKind::Ack { sub, tags, confirm: true }
            }
            "rejects" => {
                let action = match (rest[2], option(rest, "after=")) {
                    (_, Some(delay)) => RejectAction::RequeueAfter(span(delay)),
                    ("dead", _) => RejectAction::DeadLetter,
                    _ => RejectAction::Requeue,
                };
                RequestKind::Reject { sub, tags: ranges(rest[1]), action }
            }
            "credits" => RequestKind::Credit { sub, credit: rest[1].parse().expect("credit") },
            "unsubscribes" => {
                let mode = if rest.contains(&"delete") { UnsubscribeMode::Delete } else { UnsubscribeMode::Detach };
                RequestKind::Unsubscribe { sub, mode }
            }
            "polls" => RequestKind::Poll { sub },
            "guesses" => {
                for _ in 0..topic.parse().expect("a number") {
                    self.house.request(conn, 3, RequestKind::Auth { key: Bytes::from_static(b"wrong") });
                }
                self.house.said.clear();
                return;
            }
            "pings" => RequestKind::Ping,
            _ => panic!("no such step"),
        };
        let what = if verb == "subscribes" { topic } else { verb.to_owned() };
        let cid = ask(client, &what);
        self.house.request(conn, cid, kind);
    }

    fn connect(&mut self, name: &str, rest: &[&str]) {
        let core = option(rest, "core=").map_or(0, |core| core.parse().expect("a core"));
        let conn = match option(rest, "from=") {
            Some(peer) => self.house.open_from(core, peer.parse().expect("an address")),
            None => self.house.open(core),
        };
        let client = Client {
            conn,
            subs: HashMap::new(),
            topics: HashMap::new(),
            asked: HashMap::new(),
            next_cid: 100,
            heard: VecDeque::new(),
        };
        self.clients.insert(name.to_owned(), client);
        self.names.insert(conn, name.to_owned());
        let version = if rest.contains(&"v1") { 1 } else { 2 };
        self.house.request(conn, 1, RequestKind::Hello { version });
        let key = option(rest, "key=").map_or(KEY, str::as_bytes);
        if !rest.contains(&"silently") {
            self.house.request(conn, 2, RequestKind::Auth { key: Bytes::copy_from_slice(key) });
        }
    }

    /// Everything that may happen by itself does; clients take what they are sent.
    fn settle(&mut self) -> Result<(), String> {
        loop {
            self.house.quiesce(self.log);
            let said = std::mem::take(&mut self.house.said);
            if said.is_empty() {
                break;
            }
            for said in said {
                let (conn, text) = match &said {
                    Said::Reply(conn, reply) => {
                        let client = self.names.get(conn).and_then(|name| self.clients.get_mut(name));
                        (conn, client.and_then(|client| words(client, reply)))
                    }
                    Said::Closed(conn, reason) => (conn, Some(format!("is closed {reason:?}"))),
                    Said::Paused(conn) => (conn, Some("is held back".to_owned())),
                    Said::Resumed(conn) => (conn, Some("may go on".to_owned())),
                };
                if let Some(name) = self.names.get(conn).cloned() {
                    self.clients.get_mut(&name).expect("named").heard.extend(text);
                    if matches!(said, Said::Reply(_, Reply::Deliver(_))) {
                        self.house.drained(*conn);
                    }
                }
            }
        }
        let ledger = Ledger::of(&self.house.metrics());
        if ledger.balances() { Ok(()) } else { Err(format!("the ledger does not balance: {ledger:?}")) }
    }

    fn expect(&mut self, words: &[&str]) -> Result<(), String> {
        if words == ["nothing"] {
            return self.nothing_left();
        }
        let (name, wanted) = words.split_first().expect("a client");
        let client = self.clients.get_mut(*name).ok_or_else(|| format!("{name} is not there"))?;
        let heard = client.heard.pop_front().ok_or_else(|| format!("{name} has heard nothing"))?;
        let said: Vec<&str> = heard.split_whitespace().collect();
        if said[0] == wanted[0] && wanted.iter().all(|word| said.contains(word)) {
            return Ok(());
        }
        Err(format!("instead: {name} {heard}"))
    }

    fn nothing_left(&self) -> Result<(), String> {
        for (name, client) in &self.clients {
            if let Some(heard) = client.heard.front() {
                return Err(format!("before this: {name} {heard} (and {} more)", client.heard.len() - 1));
            }
        }
        Ok(())
    }
}

fn ask(client: &mut Client, what: &str) -> u64 {
    client.next_cid += 1;
    client.asked.insert(client.next_cid, what.to_owned());
    client.next_cid
}

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().find_map(|word| word.strip_prefix(name))
}

fn ranges(text: &str) -> TagRanges {
    let tag = |text: &str| DeliveryTag(text.parse().expect("a tag"));
    let range = |part: &str| part.split_once('-').map_or_else(|| (tag(part), tag(part)), |(a, b)| (tag(a), tag(b)));
    TagRanges(text.split(',').map(range).collect())
}

fn qos(words: &[&str]) -> Qos {
    if words.contains(&"qos0") { Qos::AtMostOnce } else { Qos::AtLeastOnce }
}

fn publish(topic: &str, payload: &str, words: &[&str]) -> Publish {
    let identity = option(words, "id=").map(|id| Identity::MessageId(Bytes::copy_from_slice(id.as_bytes())));
    let publisher = option(words, "publisher=").map(|text| {
        let (id, sequence) = text.split_once(':').expect("id:sequence");
        Identity::Publisher { id: id.parse().expect("id"), sequence: sequence.parse().expect("sequence") }
    });
    let header = option(words, "header=").and_then(|h| h.split_once(':'));
    let options = header.map(|(key, value)| OptionsBuilder::new().header(key, value.as_bytes()).finish());
    Publish {
        topic: TopicRef::Name(Bytes::copy_from_slice(topic.as_bytes())),
        qos: qos(words),
        confirm: words.contains(&"confirm"),
        ttl: option(words, "ttl=").map(span),
        delay: option(words, "delay=").map_or(Duration::ZERO, span),
        priority: option(words, "priority=").map_or(0, |p| p.parse().expect("priority")),
        identity: identity.or(publisher),
        options: options.map_or(Bytes::new(), |o| o.expect("short")),
        payload: Bytes::copy_from_slice(payload.trim_matches('"').as_bytes()),
    }
}

fn subscribe(topic: &str, words: &[&str]) -> Subscribe {
    Subscribe {
        topic: Bytes::copy_from_slice(topic.as_bytes()),
        qos: qos(words),
        durable: option(words, "durable=").map(|name| Bytes::copy_from_slice(name.as_bytes())),
        credit: option(words, "credit=").map_or(100, |credit| credit.parse().expect("credit")),
        priority: option(words, "priority=").map_or(0, |p| p.parse().expect("priority")),
        start: if words.contains(&"earliest") { Start::Earliest } else { Start::New },
        ack_timeout: option(words, "ack_timeout=").map(span),
    }
}

/// What a reply says, in words. `None`: a success that goes without saying.
fn words(client: &mut Client, reply: &Reply) -> Option<String> {
    let asked = |client: &Client, cid: &u64| client.asked.get(cid).cloned().unwrap_or_default();
    Some(match reply {
        Reply::Welcome { .. } | Reply::Aliased { .. } | Reply::Ok { cid: 2 } | Reply::AckV1 { id: 0, .. } => {
            return None;
        }
        Reply::AckV1 { cid, id } => return subscribed(client, *cid, ClientSub(*id), false, 0),
        Reply::Subscribed { cid, sub, resumed, backlog, .. } => {
            return subscribed(client, *cid, *sub, *resumed, *backlog);
        }
        Reply::Error { cid, code, text } => {
            format!("gets error {code} {} {}", asked(client, cid), String::from_utf8_lossy(text))
        }
        Reply::Ok { cid } => format!("is told ok {}", asked(client, cid)),
        Reply::Confirm { cid, outcome } => match outcome {
            Outcome::Stored { level, .. } => format!("is confirmed {level:?} {}", asked(client, cid)).to_lowercase(),
            Outcome::Duplicate { level, .. } => {
                format!("is confirmed duplicate {level:?} {}", asked(client, cid)).to_lowercase()
            }
            Outcome::Rejected { code, .. } => format!("is refused {code} {}", asked(client, cid)),
        },
        Reply::Deliver(d) => {
            let topic = client.topics.get(&d.sub).cloned().unwrap_or_default();
            let payload = String::from_utf8_lossy(d.body.payload()).into_owned();
            let mut text =
                format!("gets {topic} \"{payload}\" tag={} attempt={} qos{}", d.tag.0, d.attempt, d.qos as u8);
            let _ = write!(text, " cid={}", if d.cid > 100 { asked(client, &d.cid) } else { d.cid.to_string() });
            text.push_str(if d.redelivered { " redelivered" } else { " first" });
            for (_, value) in OptionsReader::new(d.body.options()).filter(|(tag, _)| *tag == HEADER) {
                let (key, value) = split_header(value).expect("a header");
                let _ = write!(text, " {key}={}", String::from_utf8_lossy(value));
            }
            text
        }
        Reply::Pong { .. } => "is answered pong".to_owned(),
        Reply::Ping { .. } => "is pinged".to_owned(),
        Reply::GoAway { code, .. } => format!("is sent away {code}"),
    })
}

fn subscribed(client: &mut Client, cid: u64, sub: ClientSub, resumed: bool, backlog: u64) -> Option<String> {
    let topic = client.asked.get(&cid).cloned().unwrap_or_default();
    client.subs.insert(topic.clone(), sub);
    client.topics.insert(sub, topic.clone());
    match (resumed, backlog) {
        (false, 0) => None,
        (true, _) => Some(format!("resumes {topic} backlog={backlog}")),
        (false, _) => Some(format!("begins {topic} backlog={backlog}")),
    }
}
