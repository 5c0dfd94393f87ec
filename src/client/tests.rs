//! The client against a scripted broker: real sockets, the broker's half of the codec, each step awaited.

use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::protocol::code;
use crate::protocol::decoder::Decoder;
use crate::protocol::encode;
use crate::protocol::options::{HEADER, MESSAGE_ID, OptionsBuilder, PRIORITY, REPLY_TO};
use crate::protocol::reply::{Body, Deliver, Outcome, Reply, Welcome};
use crate::protocol::request::{
    Identity, Publish, RejectAction, Request, RequestKind, TagRanges, TopicRef, UnsubscribeMode, Version,
};
use crate::types::{ClientSub, CoreId};

/// Longest a step may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

struct Broker {
    listener: TcpListener,
}

/// One connection as the broker sees it.
struct Peer {
    stream: TcpStream,
    decoder: Decoder,
    version: Option<Version>,
    authenticated: bool,
}

impl Broker {
    async fn start() -> (Broker, ClientOptions) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let fast = ReconnectPolicy { first_delay: Duration::from_millis(1), ..ReconnectPolicy::default() };
        (Broker { listener }, ClientOptions::new(address, "the-key").reconnect(fast))
    }

    async fn accept(&self) -> Peer {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await.expect("a connection in time");
        let (stream, _) = accepted.expect("accept");
        Peer { stream, decoder: Decoder::new(), version: None, authenticated: false }
    }

    /// Accepts and lets in.
    async fn welcome(&self) -> Peer {
        let mut peer = self.accept().await;
        peer.greet(welcome()).await;
        let (cid, key) = peer.auth().await;
        assert_eq!(key, "the-key");
        peer.say(Reply::Ok { cid }).await;
        peer.authenticated = true;
        peer
    }
}

impl Peer {
    async fn greet(&mut self, welcome: Welcome) {
        let hello = self.hear().await;
        assert_eq!(hello.kind, RequestKind::Hello { version: 2 });
        self.version = Some(Version::V2);
        self.say(Reply::Welcome { cid: hello.cid, welcome }).await;
    }

    async fn auth(&mut self) -> (u64, Bytes) {
        match self.hear().await {
            Request { cid, kind: RequestKind::Auth { key } } => (cid, key),
            other => panic!("AUTH expected, got {other:?}"),
        }
    }

    /// The next request; PINGs are answered.
    async fn hear(&mut self) -> Request {
        loop {
            match self.hear_any().await.expect("the client is still there") {
                Request { cid, kind: RequestKind::Ping } => self.say(Reply::Pong { cid }).await,
                request => return request,
            }
        }
    }

    /// The next request, whatever it is; `None`: the client closed.
    async fn hear_any(&mut self) -> Option<Request> {
        tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(request) = self.decoder.next(self.version, self.authenticated).expect("a good frame") {
                    return Some(request);
                }
                let mut read = BytesMut::new();
                if self.stream.read_buf(&mut read).await.expect("read") == 0 {
                    return None;
                }
                self.decoder.push(read.freeze());
            }
        })
        .await
        .expect("a request in time")
    }

    async fn hear_publish(&mut self) -> (u64, Publish) {
        match self.hear().await {
            Request { cid, kind: RequestKind::Publish(publish) } => (cid, publish),
            other => panic!("PUBLISH expected, got {other:?}"),
        }
    }

    /// Answers a SUBSCRIBE with `id`.
    async fn subscribe(&mut self, id: u64) -> crate::protocol::request::Subscribe {
        match self.hear().await {
            Request { cid, kind: RequestKind::Subscribe(subscribe) } => {
                let (sub, core) = (ClientSub(id), CoreId(0));
                self.say(Reply::Subscribed { cid, sub, core, resumed: true, backlog: 7 }).await;
                subscribe
            }
            other => panic!("SUBSCRIBE expected, got {other:?}"),
        }
    }

    async fn say(&mut self, reply: Reply) {
        let mut bytes = Vec::new();
        encode::encode(&reply, self.version.expect("greeted"), &mut bytes);
        self.stream.write_all(&bytes).await.expect("write");
    }

    async fn store(&mut self, cid: u64, position: u64) {
        let outcome = Outcome::Stored { level: Durability::Synced, position: Lsn(position) };
        self.say(Reply::Confirm { cid, outcome }).await;
    }
}

fn welcome() -> Welcome {
    Welcome {
        cores: 4,
        core: CoreId(2),
        ports: Vec::new(),
        frame_len_max: 1024 * 1024,
        credit_max: 65_535,
        keepalive_ms: 0,
    }
}

fn deliver(sub: u64, tag: u64, qos: Qos, options: &[u8], payload: &[u8]) -> Reply {
    let body = [&(options.len() as u16).to_be_bytes(), options, payload].concat();
    Reply::Deliver(Deliver {
        sub: ClientSub(sub),
        tag: DeliveryTag(tag),
        cid: 0,
        qos,
        attempt: 1,
        redelivered: false,
        published_ms: 1_700_000_000_000,
        topic: Bytes::new(),
        body: Body(body.into()),
    })
}

/// A client and its first connection.
async fn connected(options: ClientOptions, broker: &Broker) -> (Client, Peer) {
    let (client, peer) = tokio::join!(Client::connect(options), broker.welcome());
    (client.expect("connects"), peer)
}

/// Polls once.
async fn waits<F: Future>(mut future: Pin<&mut F>) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

#[tokio::test]
async fn logs_in_and_knows_the_broker() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    assert_eq!(client.broker().map(|broker| (broker.cores, broker.core)), Some((4, 2)));
    assert_eq!(*client.state().borrow(), ConnectionState::Up);
    peer.say(Reply::Ping { cid: 77 }).await;
    assert_eq!(peer.hear().await, Request { cid: 77, kind: RequestKind::Ignored }, "PONG");
    drop(client);
    assert_eq!(peer.hear_any().await, None, "the connection ends with its last handle");
}

#[tokio::test]
async fn a_refused_key_is_final() {
    let (broker, options) = Broker::start().await;
    let script = async {
        let mut peer = broker.accept().await;
        peer.greet(welcome()).await;
        let (cid, _) = peer.auth().await;
        peer.say(code::INVALID_KEY.error(cid)).await;
    };
    let (refused, ()) = tokio::join!(Client::connect(options), script);
    match refused {
        Err(Error::Unauthorized { code: 401, text, .. }) => assert_eq!(text, "invalid API key"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_broker_of_version_1_is_named() {
    let (broker, options) = Broker::start().await;
    let script = async {
        let mut peer = broker.accept().await;
        let hello = peer.hear().await;
        peer.version = Some(Version::V1);
        peer.say(code::UNSUPPORTED_VERSION.error(hello.cid)).await;
    };
    let (refused, ()) = tokio::join!(Client::connect(options), script);
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
}

#[tokio::test]
async fn nobody_there_is_said_after_the_time_given() {
    let (broker, options) = Broker::start().await;
    drop(broker);
    let policy = ReconnectPolicy {
        first_delay: Duration::from_millis(1),
        give_up_connect: Duration::from_millis(20),
        ..ReconnectPolicy::default()
    };
    match Client::connect(options.reconnect(policy)).await {
        Err(Error::Unreachable { attempts, .. }) => assert!(attempts > 1, "it tries again: {attempts}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn confirms_may_come_in_any_order() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let mut answers = Vec::new();
    for text in ["a", "b", "c"] {
        let publish = client.publish("t", text).header("k", "v").reply_to("back").priority(3).ttl(Duration::ZERO);
        answers.push(publish.send_nowait().await.expect("room"));
    }
    let mut heard = Vec::new();
    for text in ["a", "b", "c"] {
        let (cid, publish) = peer.hear_publish().await;
        assert_eq!((publish.payload.as_ref(), publish.confirm, publish.qos), (text.as_bytes(), true, Qos::AtLeastOnce));
        assert_eq!((publish.priority, publish.ttl), (3, Some(crate::time::Duration::ZERO)));
        heard.push((cid, publish));
    }
    let publisher = |publish: &Publish| match publish.identity {
        Some(Identity::Publisher { id, sequence }) => (id, sequence),
        _ => panic!("a publisher's sequence expected, got {:?}", publish.identity),
    };
    let (id, _) = publisher(&heard[0].1);
    let identities: Vec<(u64, u64)> = heard.iter().map(|(_, publish)| publisher(publish)).collect();
    assert_eq!(identities, [(id, 1), (id, 2), (id, 3)], "numbered densely");
    let outcome = Outcome::Rejected { code: code::STORAGE_FULL, text: "disk quota used up".into() };
    peer.say(Reply::Confirm { cid: heard[2].0, outcome }).await;
    let outcome = Outcome::Duplicate { level: Durability::Written, position: Lsn(5) };
    peer.say(Reply::Confirm { cid: heard[1].0, outcome }).await;
    peer.store(heard[0].0, 4096).await;

    let [a, b, c] = answers.try_into().expect("three");
    let stored = Confirmed { status: Status::Stored, level: Some(Durability::Synced), position: Some(Lsn(4096)) };
    assert_eq!(a.await, Ok(stored));
    assert_eq!(b.await.map(|confirmed| confirmed.status), Ok(Status::Duplicate));
    assert_eq!(c.await, Err(Error::Refused { code: 507, text: "disk quota used up".into() }));
}

#[tokio::test]
async fn the_window_holds_publishers_back() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options.window(2, 1024 * 1024), &broker).await;
    let first = client.publish("t", "1").send_nowait().await.expect("room");
    let _second = client.publish("t", "2").send_nowait().await.expect("room");
    let third = client.publish("t", "3").send_nowait();
    tokio::pin!(third);
    let (cid, _) = peer.hear_publish().await;
    peer.hear_publish().await;
    assert!(waits(third.as_mut()).await, "two are under way");
    peer.store(cid, 1).await;
    let _third = third.await.expect("room again");
    assert_eq!(first.await.map(|confirmed| confirmed.position), Ok(Some(Lsn(1))));
    assert_eq!(peer.hear_publish().await.1.payload, "3");
}

#[tokio::test]
async fn unconfirmed_publishes_are_sent_again_in_order_with_the_same_identity() {
    for dedup in [Dedup::Sequence, Dedup::MessageId] {
        let (broker, options) = Broker::start().await;
        let (client, mut peer) = connected(options.dedup(dedup), &broker).await;
        let mut answers = Vec::new();
        for text in ["1", "2", "3"] {
            answers.push(client.publish("t", text).send_nowait().await.expect("room"));
        }
        let mut before = Vec::new();
        for _ in 0..3 {
            before.push(peer.hear_publish().await);
        }
        peer.store(before[0].0, 1).await;
        let mut answers = answers.into_iter();
        assert!(answers.next().expect("first").await.is_ok());
        drop(peer);

        let mut peer = broker.welcome().await;
        for (position, (_, publish)) in before[1..].iter().enumerate() {
            let (cid, again) = peer.hear_publish().await;
            assert_eq!(&again, publish, "the same message with the same identity");
            peer.store(cid, position as u64).await;
        }
        for answer in answers {
            assert_eq!(answer.await.map(|confirmed| confirmed.status), Ok(Status::Stored));
        }
    }
}

#[tokio::test]
async fn publishes_made_without_connection_wait_for_the_next() {
    let (broker, options) = Broker::start().await;
    let (client, peer) = connected(options, &broker).await;
    let mut state = client.state();
    drop(peer);
    state.wait_for(|state| *state == ConnectionState::Connecting).await.expect("a task");
    let at_most_once = client.publish("t", "q0").qos(Qos::AtMostOnce).send();
    tokio::pin!(at_most_once);
    assert!(waits(at_most_once.as_mut()).await);
    let answer = client.publish("t", "q1").send_nowait().await.expect("room");
    let mut peer = broker.welcome().await;
    let (cid, publish) = peer.hear_publish().await;
    assert_eq!(publish.payload, "q1");
    peer.store(cid, 1).await;
    assert!(answer.await.is_ok());
    assert_eq!(at_most_once.await.map(|confirmed| confirmed.status), Ok(Status::Sent));
    let (_, publish) = peer.hear_publish().await;
    assert_eq!((publish.payload.as_ref(), publish.confirm, publish.identity), (&b"q0"[..], false, None));
}

#[tokio::test]
async fn a_confirmed_message_at_most_once_is_not_sent_again() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let answer = client.publish("t", "q0").qos(Qos::AtMostOnce).confirm(true).send_nowait().await.expect("room");
    peer.hear_publish().await;
    drop(peer);
    assert_eq!(answer.await, Err(Error::Disconnected));
}

#[tokio::test]
async fn a_broker_that_stops_gets_its_publishes_after_it_is_back() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let answer = client.publish("t", "m").send_nowait().await.expect("room");
    let (cid, first) = peer.hear_publish().await;
    let text = Bytes::from("shutting down");
    let outcome = Outcome::Rejected { code: code::SHUTTING_DOWN, text: text.clone() };
    peer.say(Reply::GoAway { code: code::SHUTTING_DOWN, text }).await;
    peer.say(Reply::Confirm { cid, outcome }).await;
    assert_eq!(peer.hear_any().await, None, "the client leaves by itself");
    let mut peer = broker.welcome().await;
    let (cid, again) = peer.hear_publish().await;
    assert_eq!(again, first);
    peer.store(cid, 1).await;
    assert!(answer.await.is_ok());
}

#[tokio::test]
async fn a_broker_that_stops_gets_the_acknowledgements_of_what_it_delivered() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let (subscription, _) = tokio::join!(client.subscribe("t").durable("d").open(), peer.subscribe(1));
    let mut subscription = subscription.expect("subscribed");
    let mut state = client.state();
    peer.say(deliver(1, 1, Qos::AtLeastOnce, b"", b"m")).await;
    peer.say(Reply::GoAway { code: code::SHUTTING_DOWN, text: "shutting down".into() }).await;
    let delivery = subscription.next().await.expect("a delivery");
    state.wait_for(|state| *state == ConnectionState::Connecting).await.expect("a task");
    delivery.ack();
    let tags = TagRanges::one(DeliveryTag(1));
    assert_eq!(peer.hear().await.kind, RequestKind::Ack { sub: ClientSub(1), tags, confirm: false });
    assert_eq!(peer.hear_any().await, None, "then the client leaves");
}

#[tokio::test]
async fn a_hot_topic_gets_a_number_and_loses_it_with_the_connection() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let mut aliased = false;
    for _ in 0..10 {
        let answer = client.publish("hot", "m").send_nowait().await.expect("room");
        loop {
            match peer.hear().await {
                Request { cid, kind: RequestKind::Alias { alias, topic } } => {
                    assert_eq!(topic, "hot");
                    peer.say(Reply::Aliased { cid, alias, core: CoreId(0) }).await;
                    aliased = true;
                }
                Request { cid, kind: RequestKind::Publish(publish) } => {
                    if matches!(publish.topic, TopicRef::Alias(_)) {
                        assert!(aliased, "only a number the broker was told");
                    }
                    peer.store(cid, 1).await;
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(answer.await.is_ok());
    }
    let answer = client.publish("hot", "last").send_nowait().await.expect("room");
    assert!(matches!(peer.hear_publish().await.1.topic, TopicRef::Alias(_)));
    drop(peer);
    let mut peer = broker.welcome().await;
    let (cid, publish) = peer.hear_publish().await;
    assert_eq!(publish.topic, TopicRef::Name("hot".into()));
    peer.store(cid, 1).await;
    assert!(answer.await.is_ok());
}

#[tokio::test]
async fn deliveries_stream_and_acknowledgements_leave_as_ranges() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let builder = client.subscribe("t").durable("d").credit(100).priority(2).start(Start::Earliest);
    let (subscription, asked) = tokio::join!(builder.open(), peer.subscribe(9));
    assert_eq!((asked.durable.as_deref(), asked.credit, asked.priority), (Some(&b"d"[..]), 100, 2));
    assert_eq!(asked.start, Start::Earliest);
    let mut subscription = subscription.expect("subscribed");
    assert_eq!((subscription.resumed(), subscription.backlog()), (true, 7));

    let entries = OptionsBuilder::new()
        .header("k", b"v")
        .bytes(REPLY_TO, b"back")
        .bytes(MESSAGE_ID, b"id")
        .u8(PRIORITY, 4)
        .finish()
        .expect("short");
    assert_eq!(entries[0], HEADER);
    let mut deliveries = Vec::new();
    for tag in 1..=6 {
        peer.say(deliver(9, tag, Qos::AtLeastOnce, &entries, b"hello")).await;
        deliveries.push(subscription.next().await.expect("a delivery"));
    }
    let first = &deliveries[0];
    assert_eq!((first.payload().as_ref(), first.topic(), first.tag()), (&b"hello"[..], "t", DeliveryTag(1)));
    assert_eq!((first.header("k"), first.header("x")), (Some(&b"v"[..]), None));
    assert_eq!((first.reply_to(), first.message_id(), first.priority()), (Some("back"), Some(&b"id"[..]), 4));

    // Without a pause between them, they leave in one frame, whatever their order.
    let mut deliveries: Vec<Option<Delivery>> = deliveries.into_iter().map(Some).collect();
    for at in [2, 0, 1, 5] {
        deliveries[at].take().expect("once").ack();
    }
    let rejected = deliveries[3].take().expect("once");
    rejected.reject(Reject::RequeueAfter(Duration::from_millis(1_500)));
    let tags = TagRanges(vec![(DeliveryTag(1), DeliveryTag(3)), (DeliveryTag(6), DeliveryTag(6))]);
    let sub = ClientSub(9);
    assert_eq!(peer.hear().await.kind, RequestKind::Ack { sub, tags, confirm: false });
    let action = RejectAction::RequeueAfter(crate::time::Duration::from_millis(1_500));
    let tags = TagRanges::one(DeliveryTag(4));
    assert_eq!(peer.hear().await.kind, RequestKind::Reject { sub, tags, action });

    let last = deliveries[4].take().expect("once");
    let script = async {
        let Request { cid, kind } = peer.hear().await;
        assert_eq!(kind, RequestKind::Ack { sub, tags: TagRanges::one(DeliveryTag(5)), confirm: true });
        peer.say(Reply::Ok { cid }).await;
    };
    let (kept, ()) = tokio::join!(last.ack_confirmed(), script);
    assert_eq!(kept, Ok(()));

    let script = async {
        let Request { cid, kind } = peer.hear().await;
        assert_eq!(kind, RequestKind::Unsubscribe { sub, mode: UnsubscribeMode::Delete });
        peer.say(Reply::Ok { cid }).await;
    };
    let (left, ()) = tokio::join!(subscription.delete(), script);
    assert_eq!(left, Ok(()));
}

#[tokio::test]
async fn subscribes_again_and_drops_what_is_said_about_stale_deliveries() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let (subscription, before) = tokio::join!(client.subscribe("t").durable("d").open(), peer.subscribe(1));
    let mut subscription = subscription.expect("subscribed");
    for tag in 1..=3 {
        peer.say(deliver(1, tag, Qos::AtLeastOnce, b"", b"old")).await;
    }
    let stale = subscription.next().await.expect("a delivery");
    drop(peer);

    let mut peer = broker.welcome().await;
    assert_eq!(peer.subscribe(2).await, before, "the same subscription");
    peer.say(deliver(2, 1, Qos::AtLeastOnce, b"", b"new")).await;
    let fresh = subscription.next().await.expect("a delivery");
    assert_eq!(fresh.payload(), "new", "what was read ahead from the lost connection is the broker's again");
    stale.ack();
    fresh.ack();
    let (sub, tags) = (ClientSub(2), TagRanges::one(DeliveryTag(1)));
    assert_eq!(peer.hear().await.kind, RequestKind::Ack { sub, tags, confirm: false });
    drop(subscription);
    let left = peer.hear().await.kind;
    assert_eq!(left, RequestKind::Unsubscribe { sub, mode: UnsubscribeMode::Detach }, "one ACK, then it detaches");
}

#[tokio::test]
async fn a_refused_subscription_says_why() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let script = async {
        let cid = peer.hear().await.cid;
        peer.say(Reply::Error { cid, code: code::FORBIDDEN, text: "no".into() }).await;
    };
    let (refused, ()) = tokio::join!(client.subscribe("secret").open(), script);
    assert_eq!(refused.err(), Some(Error::Refused { code: 403, text: "no".into() }));

    // Likewise when somebody deletes it.
    let (subscription, _) = tokio::join!(client.subscribe("t").durable("d").open(), peer.subscribe(7));
    let mut subscription = subscription.expect("subscribed");
    peer.say(Reply::Error { cid: 0, code: code::UNKNOWN, text: "subscription 7 was deleted".into() }).await;
    assert!(subscription.next().await.is_none());
    assert!(matches!(subscription.error(), Some(Error::Refused { code: 404, .. })));
    drop(subscription);

    // Likewise when it is refused later, after a reconnect.
    let (subscription, _) = tokio::join!(client.subscribe("t").open(), peer.subscribe(1));
    let mut subscription = subscription.expect("subscribed");
    drop(peer);
    let mut peer = broker.welcome().await;
    let cid = peer.hear().await.cid;
    peer.say(Reply::Error { cid, code: code::FORBIDDEN, text: "no more".into() }).await;
    assert!(subscription.next().await.is_none());
    assert_eq!(subscription.error(), Some(Error::Refused { code: 403, text: "no more".into() }));
}

#[tokio::test]
async fn a_silent_broker_is_given_up() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options.ping_interval(Duration::from_millis(20)), &broker).await;
    assert!(matches!(peer.hear_any().await, Some(Request { kind: RequestKind::Ping, .. })));
    // The next connection comes although this one is still open.
    let _next = broker.welcome().await;
    drop(client);
}

#[tokio::test]
async fn what_was_sent_is_confirmed_before_close_returns() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let answer = client.publish("t", "m").send_nowait().await.expect("room");
    let script = async {
        let (cid, _) = peer.hear_publish().await;
        peer.store(cid, 1).await;
    };
    tokio::join!(client.close(), script);
    assert!(answer.await.is_ok());
    let late = client.publish("t", "m").send().await;
    assert!(matches!(late, Err(Error::Closed { .. })), "{late:?}");
}

#[tokio::test]
async fn giving_up_tells_everybody() {
    let (broker, options) = Broker::start().await;
    let policy = ReconnectPolicy {
        first_delay: Duration::from_millis(1),
        give_up_reconnect: Some(Duration::from_millis(5)),
        ..ReconnectPolicy::default()
    };
    let (client, mut peer) = connected(options.reconnect(policy).window(1, 1024), &broker).await;
    let (subscription, _) = tokio::join!(client.subscribe("t").open(), peer.subscribe(1));
    let mut subscription = subscription.expect("subscribed");
    let answer = client.publish("t", "m").send_nowait().await.expect("room");
    let waiting = client.publish("t", "m").send_nowait();
    tokio::pin!(waiting);
    assert!(waits(waiting.as_mut()).await);
    drop((peer, broker));
    assert!(matches!(answer.await, Err(Error::Closed { .. })));
    assert!(matches!(waiting.await, Err(Error::Closed { .. })));
    assert!(subscription.next().await.is_none());
    assert!(matches!(subscription.error(), Some(Error::Closed { .. })));
}

#[tokio::test]
async fn what_cannot_be_sent_is_refused_at_once() {
    let (broker, options) = Broker::start().await;
    let (client, _peer) = connected(options, &broker).await;
    let large = client.publish("t", vec![0; 1024 * 1024]).send().await;
    assert!(matches!(large, Err(Error::TooLarge { limit: 1_048_576, .. })), "{large:?}");
    assert_eq!(client.publish("", "m").send().await, Err(Error::InvalidTopic { bytes: 0 }));
    let headers = client.publish("t", "m").header("k", vec![0; 40_000]).send().await;
    assert!(matches!(headers, Err(Error::InvalidOption { option: "headers", .. })), "{headers:?}");
    let id = client.publish("t", "m").message_id("x".repeat(65)).send().await;
    assert!(matches!(id, Err(Error::InvalidOption { option: "message id", .. })), "{id:?}");
    let credit = client.subscribe("t").credit(0).open().await;
    assert!(matches!(credit, Err(Error::InvalidOption { option: "credit", .. })), "{credit:?}");
}

#[tokio::test]
async fn what_the_program_does_not_take_stays_with_the_broker_at_qos0() {
    let (broker, options) = Broker::start().await;
    let (client, mut peer) = connected(options, &broker).await;
    let subscribe = client.subscribe("t").qos(Qos::AtMostOnce);
    let (subscription, _) = tokio::join!(subscribe.open(), peer.subscribe(1));
    let mut subscription = subscription.expect("subscribed");
    // More than the client keeps: the rest waits in the socket, and none of it is lost.
    const MESSAGES: u64 = 80_000;
    let sending = tokio::spawn(async move {
        let mut bytes = Vec::new();
        for tag in 1..=MESSAGES {
            encode::encode(&deliver(1, tag, Qos::AtMostOnce, b"", &[7; 100]), Version::V2, &mut bytes);
            if tag % 1_000 == 0 {
                peer.stream.write_all(&std::mem::take(&mut bytes)).await.expect("write");
            }
        }
        peer
    });
    // The client reads ahead as far as it wants to.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !client.shared().lock().pauses_reading() {
        assert!(tokio::time::Instant::now() < deadline, "it never had enough");
        tokio::task::yield_now().await;
    }
    for tag in 1..=MESSAGES {
        let delivery = subscription.next().await.expect("a delivery");
        assert_eq!(delivery.tag(), DeliveryTag(tag));
    }
    assert_eq!(subscription.dropped(), 0);
    drop(sending.await.expect("sent"));
}
