//! Arbitrary requests and replies for the property tests: those that come back equal from a round trip.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::limits::CREDIT_MAX;
use crate::protocol::options::{self, OptionsBuilder};
use crate::protocol::reply::{Body, Deliver, Outcome, Reply, Welcome};
use crate::protocol::request::{
    Identity, Publish, RejectAction, Request, RequestKind, Start, Subscribe, TagRanges, TopicRef, UnsubscribeMode,
    Version,
};
use crate::time::Duration;
use crate::types::{ClientSub, CoreId, DeliveryTag, Durability, Lsn, Qos};

fn text(chars: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Bytes> {
    vec(any::<char>(), chars).prop_map(|chars| Bytes::from(String::from_iter(chars)))
}

fn blob(len: std::ops::Range<usize>) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), len).prop_map(Bytes::from)
}

fn qos() -> impl Strategy<Value = Qos> {
    prop_oneof![Just(Qos::AtMostOnce), Just(Qos::AtLeastOnce)]
}

fn millis() -> impl Strategy<Value = Duration> {
    any::<u32>().prop_map(|ms| Duration::from_millis(ms.into()))
}

fn sub() -> impl Strategy<Value = ClientSub> {
    (1..=u64::MAX).prop_map(ClientSub)
}

fn ranges() -> impl Strategy<Value = TagRanges> {
    let range = (1..=u64::MAX, 1..=u64::MAX).prop_map(|(a, b)| (DeliveryTag(a.min(b)), DeliveryTag(a.max(b))));
    vec(range, 1..5).prop_map(TagRanges)
}

fn identity() -> impl Strategy<Value = Identity> {
    prop_oneof![
        blob(1..65).prop_map(Identity::MessageId),
        any::<(u64, u64)>().prop_map(|(id, sequence)| Identity::Publisher { id, sequence }),
    ]
}

/// What the consumer gets to see, in the order of a shuffled deck.
fn end_to_end(identity: Option<Identity>, priority: u8) -> impl Strategy<Value = Bytes> {
    let headers = vec((text(0..=4), blob(0..6)), 0..3);
    let reply_to = option::of(text(0..=5));
    (headers, reply_to).prop_flat_map(move |(headers, reply_to)| {
        let mut entries: Vec<Bytes> = Vec::new();
        let entry = |builder: OptionsBuilder| builder.finish().expect("short");
        if let Some(Identity::MessageId(id)) = &identity {
            entries.push(entry(OptionsBuilder::new().bytes(options::MESSAGE_ID, id)));
        }
        if priority != 0 {
            entries.push(entry(OptionsBuilder::new().u8(options::PRIORITY, priority)));
        }
        for (key, value) in &headers {
            let key = std::str::from_utf8(key).expect("text");
            entries.push(entry(OptionsBuilder::new().header(key, value)));
        }
        if let Some(topic) = &reply_to {
            entries.push(entry(OptionsBuilder::new().bytes(options::REPLY_TO, topic)));
        }
        Just(entries).prop_shuffle().prop_map(|entries| Bytes::from(entries.concat()))
    })
}

fn publish_v2() -> impl Strategy<Value = Publish> {
    let topic = prop_oneof![text(1..=8).prop_map(TopicRef::Name), any::<u32>().prop_map(TopicRef::Alias)];
    (option::of(identity()), 0..=9u8).prop_flat_map(move |(identity, priority)| {
        let options = end_to_end(identity.clone(), priority);
        (topic.clone(), qos(), any::<bool>(), option::of(millis()), millis(), options, blob(0..300)).prop_map(
            move |(topic, qos, confirm, ttl, delay, options, payload)| Publish {
                topic,
                qos,
                confirm,
                ttl,
                delay,
                priority,
                identity: identity.clone(),
                options,
                payload,
            },
        )
    })
}

fn request_v1() -> impl Strategy<Value = Request> {
    let publish = (qos(), text(1..=8), blob(0..300)).prop_map(|(qos, topic, payload)| {
        RequestKind::Publish(Publish {
            topic: TopicRef::Name(topic),
            qos,
            confirm: false,
            ttl: None,
            delay: Duration::ZERO,
            priority: 0,
            identity: None,
            options: Bytes::new(),
            payload,
        })
    });
    let subscribe = (qos(), text(1..=8)).prop_map(|(qos, topic)| {
        RequestKind::Subscribe(Subscribe {
            topic,
            qos,
            durable: None,
            credit: 0,
            priority: 0,
            start: Start::New,
            ack_timeout: None,
        })
    });
    let kind = prop_oneof![
        any::<u16>().prop_map(|version| RequestKind::Hello { version }),
        text(0..=9).prop_map(|key| RequestKind::Auth { key }),
        publish,
        subscribe,
        sub().prop_map(|sub| RequestKind::Poll { sub }),
        Just(RequestKind::Ping),
        Just(RequestKind::Ignored),
    ];
    let ack = (any::<u64>(), sub()).prop_map(|(cid, sub)| Request {
        cid,
        kind: RequestKind::Ack { sub, tags: TagRanges::one(DeliveryTag(cid)), confirm: false },
    });
    prop_oneof![7 => (any::<u64>(), kind).prop_map(|(cid, kind)| Request { cid, kind }), 1 => ack]
}

fn request_v2() -> impl Strategy<Value = Request> {
    let subscribe = (
        (qos(), 1..=CREDIT_MAX, text(1..=8), option::of(text(1..=8))),
        (any::<u8>(), prop_oneof![Just(Start::New), Just(Start::Earliest)], option::of(1..=u32::MAX)),
    )
        .prop_map(|((qos, credit, topic, durable), (priority, start, ack_timeout_ms))| {
            let ack_timeout = ack_timeout_ms.map(|ms| Duration::from_millis(ms.into()));
            RequestKind::Subscribe(Subscribe { topic, qos, durable, credit, priority, start, ack_timeout })
        });
    let action = prop_oneof![
        Just(RejectAction::Requeue),
        millis().prop_map(RejectAction::RequeueAfter),
        Just(RejectAction::DeadLetter)
    ];
    let mode = prop_oneof![Just(UnsubscribeMode::Detach), Just(UnsubscribeMode::Delete)];
    let kind = prop_oneof![
        any::<u16>().prop_map(|version| RequestKind::Hello { version }),
        text(0..=9).prop_map(|key| RequestKind::Auth { key }),
        publish_v2().prop_map(RequestKind::Publish),
        subscribe,
        (any::<u32>(), text(1..=8)).prop_map(|(alias, topic)| RequestKind::Alias { alias, topic }),
        (sub(), ranges(), any::<bool>()).prop_map(|(sub, tags, confirm)| RequestKind::Ack { sub, tags, confirm }),
        (sub(), ranges(), action).prop_map(|(sub, tags, action)| RequestKind::Reject { sub, tags, action }),
        (sub(), 0..=CREDIT_MAX).prop_map(|(sub, credit)| RequestKind::Credit { sub, credit }),
        (sub(), mode).prop_map(|(sub, mode)| RequestKind::Unsubscribe { sub, mode }),
        Just(RequestKind::Ping),
        Just(RequestKind::Ignored),
    ];
    (any::<u64>(), kind).prop_map(|(cid, kind)| Request { cid, kind })
}

pub fn request(version: Version) -> BoxedStrategy<Request> {
    match version {
        Version::V1 => request_v1().boxed(),
        Version::V2 => request_v2().boxed(),
    }
}

fn body(entries: &[u8], message: &[u8]) -> Body {
    Body([&(entries.len() as u16).to_be_bytes(), entries, message].concat().into())
}

fn error() -> impl Strategy<Value = Reply> {
    (any::<u64>(), any::<u16>(), text(0..=30)).prop_map(|(cid, code, text)| Reply::Error { cid, code, text })
}

fn reply_v1() -> impl Strategy<Value = Reply> {
    let deliver = (any::<u64>(), qos(), text(1..=8), blob(0..300)).prop_map(|(cid, qos, topic, message)| {
        Reply::Deliver(Deliver {
            sub: ClientSub(0),
            tag: DeliveryTag(if qos == Qos::AtLeastOnce { cid } else { 0 }),
            cid,
            qos,
            attempt: 0,
            redelivered: false,
            published_ms: 0,
            topic,
            body: body(&[], &message),
        })
    });
    prop_oneof![
        any::<(u64, u64)>().prop_map(|(cid, id)| Reply::AckV1 { cid, id }),
        error(),
        deliver,
        any::<u64>().prop_map(|cid| Reply::Pong { cid }),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    let level = || prop_oneof![Just(Durability::Memory), Just(Durability::Written), Just(Durability::Synced)];
    let position = || any::<u64>().prop_map(Lsn);
    prop_oneof![
        (level(), position()).prop_map(|(level, position)| Outcome::Stored { level, position }),
        (level(), position()).prop_map(|(level, position)| Outcome::Duplicate { level, position }),
        (any::<u16>(), text(0..=30)).prop_map(|(code, text)| Outcome::Rejected { code, text }),
    ]
}

fn reply_v2() -> impl Strategy<Value = Reply> {
    let deliver = (
        (sub(), any::<u64>(), qos(), any::<u16>(), any::<bool>()),
        (any::<u64>(), option::of(identity()), 0..=9u8, blob(0..300)),
    )
        .prop_flat_map(|((sub, tag, qos, attempt, redelivered), (published_ms, identity, priority, message))| {
            end_to_end(identity, priority).prop_map(move |entries| {
                Reply::Deliver(Deliver {
                    sub,
                    tag: DeliveryTag(tag),
                    cid: 0,
                    qos,
                    attempt,
                    redelivered,
                    published_ms,
                    topic: Bytes::new(),
                    body: body(&entries, &message),
                })
            })
        });
    let welcome = (any::<u64>(), any::<(u16, u16, u32, u32, u32)>(), vec(any::<u16>(), 0..4)).prop_map(
        |(cid, (cores, core, frame_len_max, credit_max, keepalive_ms), ports)| {
            let core = CoreId(core);
            Reply::Welcome { cid, welcome: Welcome { cores, core, ports, frame_len_max, credit_max, keepalive_ms } }
        },
    );
    let subscribed =
        (any::<u64>(), sub(), any::<(u16, bool, u64)>()).prop_map(|(cid, sub, (core, resumed, backlog))| {
            Reply::Subscribed { cid, sub, core: CoreId(core), resumed, backlog }
        });
    prop_oneof![
        1 => error(),
        1 => any::<u64>().prop_map(|cid| Reply::Ok { cid }),
        1 => welcome,
        4 => (any::<u64>(), outcome()).prop_map(|(cid, outcome)| Reply::Confirm { cid, outcome }),
        1 => subscribed,
        1 => any::<(u64, u32, u16)>().prop_map(|(cid, alias, core)| Reply::Aliased { cid, alias, core: CoreId(core) }),
        1 => deliver,
        1 => any::<u64>().prop_map(|cid| Reply::Pong { cid }),
        1 => any::<u64>().prop_map(|cid| Reply::Ping { cid }),
        1 => (any::<u16>(), text(0..=30)).prop_map(|(code, text)| Reply::GoAway { code, text }),
    ]
}

pub fn reply(version: Version) -> BoxedStrategy<Reply> {
    match version {
        Version::V1 => reply_v1().boxed(),
        Version::V2 => reply_v2().boxed(),
    }
}
