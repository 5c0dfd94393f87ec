//! Subscribing: deliveries as a stream, and what is said about each.
//!
//! Owns: the builder, the stream, a delivery. Never: batches acknowledgements; the session does, one flush per wake-up.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::oneshot;

use super::link::{Handle, Shared};
use super::publish::to_broker_duration;
use super::session::{Arrived, Generation, SubKey};
use super::{Client, Error, Topic};
use crate::limits;
use crate::protocol::options::{self, OptionsReader};
use crate::protocol::reply::Deliver;
use crate::protocol::request::{RejectAction, Start, Subscribe, UnsubscribeMode};
use crate::types::{DeliveryTag, Qos};

/// A subscription about to be made; made by [`Client::subscribe`]. Nothing happens before [`SubscribeBuilder::open`].
#[must_use = "a subscription is made by `open`"]
pub struct SubscribeBuilder<'a> {
    client: &'a Client,
    topic: Topic,
    qos: Qos,
    durable: Option<String>,
    credit: u32,
    priority: u8,
    start: Start,
    ack_timeout: Option<Duration>,
}

impl<'a> SubscribeBuilder<'a> {
    pub(super) fn new(client: &'a Client, topic: Topic) -> SubscribeBuilder<'a> {
        SubscribeBuilder {
            client,
            topic,
            qos: Qos::AtLeastOnce,
            durable: None,
            credit: 256,
            priority: 0,
            start: Start::New,
            ack_timeout: None,
        }
    }

    /// Default: at least once. A message is delivered with the lower of its own and this.
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }

    /// Attaches to the durable subscription of this name, which is made if need be. It keeps its backlog while nobody is
    /// attached; several consumers attached to it share its messages. Without a name, the subscription and what it holds
    /// end with the connection, also when that is lost.
    pub fn durable(mut self, name: impl Into<String>) -> Self {
        self.durable = Some(name.into());
        self
    }

    /// Most deliveries at QoS1 that may be unacknowledged, 1 to 65535 (default 256). They are read ahead: the memory they
    /// take is this many messages, and the time a delivery may stay unacknowledged includes its wait here.
    pub fn credit(mut self, credit: u32) -> Self {
        self.credit = credit;
        self
    }

    /// Among the consumers of one durable subscription, higher ones are served first.
    pub fn priority(mut self, priority: u8) -> Self {
        self.priority = priority;
        self
    }

    /// Where a subscription that does not exist yet begins (default: with messages published from now on).
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// How long a delivery may stay unacknowledged before it is delivered again (default: what the broker is set to).
    pub fn ack_timeout(mut self, timeout: Duration) -> Self {
        self.ack_timeout = Some(timeout);
        self
    }

    /// Makes the subscription. Waits over reconnects if need be.
    pub async fn open(self) -> Result<Subscription, Error> {
        let invalid = |option, expected| Err(Error::InvalidOption { option, expected });
        self.topic.check()?;
        if !(1..=limits::CREDIT_MAX).contains(&self.credit) {
            return invalid("credit", "1 to 65535");
        }
        if self.durable.as_ref().is_some_and(|name| !(1..=limits::DURABLE_NAME_MAX).contains(&name.len())) {
            return invalid("durable name", "1 to 255 bytes");
        }
        let request = Subscribe {
            topic: self.topic.0.clone(),
            qos: self.qos,
            durable: self.durable.map(Bytes::from),
            credit: self.credit,
            priority: self.priority,
            start: self.start,
            ack_timeout: self.ack_timeout.map(to_broker_duration),
        };
        let handle = Arc::clone(self.client.handle());
        let (key, answer) = handle.shared().subscribe(request)?;
        let mut subscription = Subscription { handle, key, topic: self.topic, resumed: false, backlog: 0, left: false };
        let subscribed = answer.await.unwrap_or(Err(Error::Disconnected))?;
        subscription.resumed = subscribed.resumed;
        subscription.backlog = subscribed.backlog;
        Ok(subscription)
    }
}

/// Deliveries of one subscription, also as a [`Stream`]. Survives reconnects: the client subscribes again by itself. It
/// ends when the client does, or when the broker refuses; [`Subscription::error`] says why. Dropped, it detaches.
#[derive(Debug)]
pub struct Subscription {
    handle: Arc<Handle>,
    key: SubKey,
    topic: Topic,
    resumed: bool,
    backlog: u64,
    left: bool,
}

impl Subscription {
    /// The next delivery; `None` when the subscription has ended. Safe to drop while it waits.
    pub async fn next(&mut self) -> Option<Delivery> {
        std::future::poll_fn(|cx| self.poll_delivery(cx)).await
    }

    /// The next delivery if there is one already.
    pub fn try_next(&mut self) -> Option<Delivery> {
        let arrived = self.handle.shared().next_delivery(self.key, None).ok()?;
        Some(self.delivery(arrived))
    }

    fn poll_delivery(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        match self.handle.shared().next_delivery(self.key, Some(cx.waker())) {
            Ok(arrived) => Poll::Ready(Some(self.delivery(arrived))),
            Err(true) => Poll::Pending,
            Err(false) => Poll::Ready(None),
        }
    }

    fn delivery(&self, Arrived { generation, deliver }: Arrived) -> Delivery {
        let shared = Arc::clone(self.handle.shared());
        Delivery { shared, key: self.key, generation, topic: self.topic.clone(), deliver }
    }

    pub fn topic(&self) -> &str {
        self.topic.as_str()
    }

    /// Whether the durable subscription existed before it was first attached to here.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Messages that waited in it then.
    pub fn backlog(&self) -> u64 {
        self.backlog
    }

    /// Deliveries dropped here because the program was too slow: lost at QoS0, delivered again at QoS1.
    pub fn dropped(&self) -> u64 {
        self.handle.shared().lock().sub_dropped(self.key)
    }

    /// Why it ended, if it did.
    pub fn error(&self) -> Option<Error> {
        self.handle.shared().lock().sub_error(self.key)
    }

    /// Changes the most unacknowledged deliveries, 1 to 65535.
    pub fn set_credit(&self, credit: u32) -> Result<(), Error> {
        if !(1..=limits::CREDIT_MAX).contains(&credit) {
            return Err(Error::InvalidOption { option: "credit", expected: "1 to 65535" });
        }
        self.handle.shared().set_credit(self.key, credit);
        Ok(())
    }

    /// Leaves: a durable subscription stays with the broker and keeps collecting, another one ends. Deliveries not
    /// acknowledged before go back to the front of the queue.
    pub async fn detach(self) -> Result<(), Error> {
        self.leave(UnsubscribeMode::Detach).await
    }

    /// Ends the subscription and everything it holds, for all its consumers.
    pub async fn delete(self) -> Result<(), Error> {
        self.leave(UnsubscribeMode::Delete).await
    }

    async fn leave(mut self, mode: UnsubscribeMode) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.left = true;
        self.handle.shared().unsubscribe(self.key, mode, Some(answer));
        answered.await.unwrap_or(Err(Error::Disconnected))
    }
}

impl Stream for Subscription {
    type Item = Delivery;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        self.poll_delivery(cx)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if !self.left {
            self.handle.shared().unsubscribe(self.key, UnsubscribeMode::Detach, None);
        }
    }
}

/// One delivered message. At QoS1 it wants an answer: acknowledge or reject it; dropped without, it is delivered again
/// when the broker's patience ends. When its connection was lost it is the broker's again: it will be delivered once
/// more if the subscription is durable, and what is said about this copy is dropped silently.
#[derive(Debug)]
#[must_use = "a delivery at QoS1 comes again until it is acknowledged"]
pub struct Delivery {
    shared: Arc<Shared>,
    key: SubKey,
    generation: Generation,
    topic: Topic,
    deliver: Deliver,
}

impl Delivery {
    /// The message, without copying it.
    pub fn payload(&self) -> Bytes {
        self.deliver.body.0.slice_ref(self.deliver.body.payload())
    }

    /// The message.
    pub fn payload_slice(&self) -> &[u8] {
        self.deliver.body.payload()
    }

    pub fn topic(&self) -> &str {
        self.topic.as_str()
    }

    /// The lower of the message's and the subscription's.
    pub fn qos(&self) -> Qos {
        self.deliver.qos
    }

    /// Counts from 1 per subscription; the same when it is delivered again.
    pub fn tag(&self) -> DeliveryTag {
        self.deliver.tag
    }

    /// From 1.
    pub fn attempt(&self) -> u16 {
        self.deliver.attempt
    }

    /// It may have been delivered before, here or elsewhere.
    pub fn redelivered(&self) -> bool {
        self.deliver.redelivered
    }

    /// When the broker took it.
    pub fn published(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.deliver.published_ms)
    }

    /// Likewise, in milliseconds since the Unix epoch.
    pub fn published_ms(&self) -> u64 {
        self.deliver.published_ms
    }

    /// All headers, in the order they were given in.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.options().filter(|(tag, _)| *tag == options::HEADER).filter_map(|(_, value)| options::split_header(value))
    }

    /// The first header of this name.
    pub fn header(&self, key: &str) -> Option<&[u8]> {
        self.headers().find(|(given, _)| *given == key).map(|(_, value)| value)
    }

    /// Where an answer is waited for.
    pub fn reply_to(&self) -> Option<&str> {
        std::str::from_utf8(self.option(options::REPLY_TO)?).ok()
    }

    /// What the publisher, or its client library, named it for deduplication.
    pub fn message_id(&self) -> Option<&[u8]> {
        self.option(options::MESSAGE_ID)
    }

    /// 0 to 9.
    pub fn priority(&self) -> u8 {
        self.option(options::PRIORITY).and_then(|value| value.first().copied()).unwrap_or(0)
    }

    fn option(&self, wanted: u8) -> Option<&[u8]> {
        self.options().find(|(tag, _)| *tag == wanted).map(|(_, value)| value)
    }

    fn options(&self) -> OptionsReader<'_> {
        OptionsReader::new(self.deliver.body.options())
    }

    /// Done with it: not delivered again. Goes out with the connection's next write, joined with its neighbours.
    pub fn ack(self) {
        if self.qos() == Qos::AtLeastOnce {
            self.shared.ack(self.key, self.generation, self.tag().0);
        }
    }

    /// Done with it; waits until the broker has kept that. An error: it may be delivered again.
    pub async fn ack_confirmed(self) -> Result<(), Error> {
        if self.qos() == Qos::AtMostOnce {
            return Ok(());
        }
        let (answer, answered) = oneshot::channel();
        self.shared.ack_confirmed(self.key, self.generation, self.tag().0, answer);
        answered.await.unwrap_or(Err(Error::Disconnected))
    }

    /// Not done with it: deliver it again now or later, or put it aside.
    pub fn reject(self, reject: Reject) {
        if self.qos() == Qos::AtLeastOnce {
            self.shared.reject(self.key, self.generation, self.tag().0, reject.into());
        }
    }
}

/// What is to become of a rejected delivery.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reject {
    /// To the front of the queue, at once.
    Requeue,
    /// To the front of the queue when the time has passed.
    RequeueAfter(Duration),
    /// To the dead-letter topic, `<topic>.dlq`.
    DeadLetter,
}

impl From<Reject> for RejectAction {
    fn from(reject: Reject) -> RejectAction {
        match reject {
            Reject::Requeue => RejectAction::Requeue,
            Reject::RequeueAfter(delay) => RejectAction::RequeueAfter(to_broker_duration(delay)),
            Reject::DeadLetter => RejectAction::DeadLetter,
        }
    }
}
