//! What the world keeps in mind about messages and subscriptions beyond what the oracle is told: how safe they are, who
//! consumes what, and what a power cut may unwrite.
//!
//! Owns: bookkeeping. Never: judges what a client saw; the oracle does.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use blipmq::shard::routing::vshard_of;
use blipmq::time::Instant;
use blipmq::types::{ConnId, Lsn};

use crate::message::MessageId;
use crate::oracle::{SubKind, Traits};
use crate::sim::machine::Held;
use crate::sim::plan::{SUFFIX, TOPICS};

/// A subscription that goes by a name, or a v1 client's queue.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Name {
    pub topic: u16,
    /// `None`: everybody's.
    pub owner: Option<usize>,
    pub count: u32,
}

const LINEAGE: u32 = u32::MAX;

impl Name {
    /// The queue of a v1 client, which has no name.
    pub fn lineage(topic: u16, client: usize) -> Name {
        Name { topic, owner: Some(client), count: LINEAGE }
    }

    pub fn is_lineage(&self) -> bool {
        self.count == LINEAGE
    }

    pub fn text(&self) -> String {
        match self.owner {
            Some(owner) => format!("c{owner}-{}", self.count),
            None => format!("all-{}", self.count),
        }
    }
}

/// One SUBSCRIBE's subscription.
#[derive(Clone, Debug)]
pub struct SubRef {
    /// The oracle's.
    pub number: u16,
    pub topic: u16,
    pub name: Option<Name>,
    pub kind: SubKind,
    /// The correlation id by which it was asked for.
    pub asked: u64,
}

#[derive(Debug)]
struct Durable {
    number: u16,
    kind: SubKind,
    /// The broker has said that it exists.
    known: bool,
    shared: bool,
    /// Several asked before it was known to exist: whose request made it is not known.
    contested: bool,
    consumers: Vec<Consumer>,
}

#[derive(Debug, Clone, Copy)]
struct Consumer {
    link: u32,
    asked: u64,
    /// Its connection has ended, and the broker may not have heard of it yet.
    leaving: Option<ConnId>,
}

/// Confirmed, and not known to be synced.
#[derive(Clone, Copy, Debug)]
pub struct Unsafe {
    pub core: u16,
    pub id: MessageId,
    pub since: Instant,
}

/// A consumer's acknowledgement that was confirmed in this run.
#[derive(Clone, Copy, Debug)]
pub struct AckNote {
    pub core: u16,
    /// The log was written up to here.
    pub mark: Lsn,
    pub sub: u16,
    pub id: MessageId,
}

/// A subscription was made or deleted in this run.
#[derive(Clone, Copy, Debug)]
pub struct SubNote {
    pub core: u16,
    pub mark: Lsn,
    pub sub: u16,
}

#[derive(Default)]
pub struct Books {
    vshards: u16,
    publishers: u16,
    /// Their topics.
    subs: Vec<u16>,
    named: BTreeMap<Name, Durable>,
    /// Some consumer is.
    leaving: bool,
    /// The count that everybody's name of a topic has reached.
    pool: BTreeMap<u16, u32>,
    traits: HashMap<MessageKey, Traits>,
    levels: HashMap<MessageId, Held>,
    /// Broker time at which a message was known to be stored.
    stored_by: HashMap<MessageKey, u64>,
    doomed: BTreeSet<(u16, MessageId)>,
    /// Failed deliveries may kill any message.
    pub deadly: bool,
    pub window: Vec<Unsafe>,
    pub acks: Vec<AckNote>,
    pub made: Vec<SubNote>,
}

type MessageKey = (u16, u64);

impl Books {
    pub fn new(vshards: u16, deadly: bool) -> Books {
        Books { vshards, deadly, ..Books::default() }
    }

    /// The core that has the topic, of so many.
    pub fn core_of(&self, topic: u16, cores: u16) -> u16 {
        vshard_of(TOPICS[usize::from(topic)].as_bytes(), SUFFIX.as_bytes(), self.vshards).core(cores).0
    }

    pub fn next_publisher(&mut self) -> u16 {
        self.publishers += 1;
        self.publishers - 1
    }

    pub fn new_sub(&mut self, topic: u16) -> u16 {
        self.subs.push(topic);
        self.subs.len() as u16 - 1
    }

    pub fn topic_of(&self, sub: u16) -> u16 {
        self.subs[usize::from(sub)]
    }

    // ---- messages -----------------------------------------------------------------------------------------------

    pub fn traits(&mut self, publisher: u16, seq: u64, traits: Traits) {
        self.traits.insert((publisher, seq), traits);
    }

    pub fn traits_of(&self, publisher: u16, seq: u64) -> Option<Traits> {
        self.traits.get(&(publisher, seq)).copied()
    }

    /// It was stored at that time, or before.
    pub fn stored_by(&mut self, publisher: u16, seq: u64, ms: u64) {
        self.stored_by.entry((publisher, seq)).or_insert(ms);
    }

    /// It may be stored anew.
    pub fn sent_again(&mut self, publisher: u16, seq: u64) {
        self.stored_by.remove(&(publisher, seq));
    }

    pub fn was_stored_by(&self, publisher: u16, seq: u64) -> Option<u64> {
        self.stored_by.get(&(publisher, seq)).copied()
    }

    /// The best that was ever known of it: what has been freed since was safe before.
    pub fn level(&mut self, id: MessageId, now: Held) -> Held {
        let level = self.levels.entry(id).or_insert(Held::No);
        *level = now.max(*level);
        *level
    }

    /// The power is about to go: of what is not synced nothing is known any more.
    pub fn forget_unsynced(&mut self, held: impl Fn(MessageId) -> Held) {
        self.levels.retain(|id, level| *level == Held::Synced || held(*id) == Held::Synced);
    }

    /// A consumer has sent it to the dead letters.
    pub fn doom(&mut self, sub: u16, id: MessageId) {
        self.doomed.insert((sub, id));
    }

    pub fn is_doomed(&self, id: MessageId) -> bool {
        self.doomed.iter().any(|(_, doomed)| *doomed == id)
    }

    /// This subscription may give it up without an acknowledgement.
    pub fn may_die(&self, sub: u16, id: MessageId) -> bool {
        self.deadly || self.doomed.contains(&(sub, id))
    }

    // ---- names --------------------------------------------------------------------------------------------------

    pub fn named(&self, name: Name) -> Option<SubRef> {
        let durable = self.named.get(&name)?;
        let Durable { number, kind, .. } = *durable;
        Some(SubRef { number, topic: name.topic, name: Some(name), kind, asked: 0 })
    }

    pub fn name(&mut self, name: Name, kind: SubKind) -> SubRef {
        let number = self.new_sub(name.topic);
        self.named.insert(
            name,
            Durable { number, kind, known: false, shared: false, contested: false, consumers: Vec::new() },
        );
        SubRef { number, topic: name.topic, name: Some(name), kind, asked: 0 }
    }

    /// What everybody's subscription of a topic is called at present.
    pub fn pool(&self, topic: u16) -> Name {
        Name { topic, owner: None, count: self.pool.get(&topic).copied().unwrap_or(0) }
    }

    pub fn own_names(&self, client: usize) -> Vec<Name> {
        self.named.keys().filter(|name| name.owner == Some(client) && !name.is_lineage()).copied().collect()
    }

    /// The topics of a v1 client's queues.
    pub fn lineages(&self, client: usize) -> Vec<u16> {
        self.named.keys().filter(|name| **name == Name::lineage(name.topic, client)).map(|name| name.topic).collect()
    }

    /// Every name that v2 clients use.
    pub fn names(&self) -> Vec<Name> {
        self.named.keys().filter(|name| !name.is_lineage()).copied().collect()
    }

    /// `link` asks for it. True: somebody else may consume it at the same time.
    pub fn consume(&mut self, name: Name, link: u32, asked: u64) -> bool {
        let Some(durable) = self.named.get_mut(&name) else { return false };
        let others = !durable.consumers.is_empty();
        durable.shared |= others;
        durable.contested |= others && !durable.known;
        durable.consumers.push(Consumer { link, asked, leaving: None });
        others
    }

    pub fn is_consumed(&self, name: Name) -> bool {
        self.named.get(&name).is_some_and(|durable| !durable.consumers.is_empty())
    }

    /// Whether it is new cannot be told from one answer: several have asked, or somebody has deleted it since.
    pub fn is_contested(&self, name: Name, number: u16) -> bool {
        self.named.get(&name).is_none_or(|durable| durable.number != number || durable.contested)
    }

    pub fn is_shared(&self, name: Name) -> bool {
        self.named.get(&name).is_some_and(|durable| durable.shared)
    }

    /// This consumer is certainly gone.
    pub fn consumer_left(&mut self, name: Name, link: u32, asked: u64) {
        if let Some(durable) = self.named.get_mut(&name) {
            durable.consumers.retain(|c| (c.link, c.asked) != (link, asked));
        }
    }

    /// The broker has said that it exists.
    pub fn exists(&mut self, name: Name) {
        if let Some(durable) = self.named.get_mut(&name) {
            durable.known = true;
        }
    }

    /// An unanswered SUBSCRIBE: whether it exists now is not known, unless it did before. The oracle's number in that case.
    pub fn unanswered(&mut self, name: Name, number: u16) -> Option<u16> {
        self.named.get(&name).filter(|durable| durable.number == number && !durable.known).map(|durable| durable.number)
    }

    /// Somebody deletes it: the name is not used again before that is certain.
    pub fn deleting(&mut self, name: Name) {
        self.named.remove(&name);
        if name.owner.is_none() {
            *self.pool.entry(name.topic).or_default() += 1;
        }
    }

    /// A queue that nobody can find any more.
    pub fn forget(&mut self, name: Name) -> Option<u16> {
        self.named.remove(&name).map(|durable| durable.number)
    }

    /// A connection is gone; the broker will notice.
    pub fn link_closed(&mut self, link: u32, conn: ConnId) {
        for consumer in self.named.values_mut().flat_map(|durable| &mut durable.consumers) {
            if consumer.link == link {
                consumer.leaving.get_or_insert(conn);
                self.leaving = true;
            }
        }
    }

    /// A connection that the broker does not know any more has ended.
    pub fn link_forgotten(&mut self, link: u32) {
        for durable in self.named.values_mut() {
            durable.consumers.retain(|consumer| consumer.link != link || consumer.leaving.is_some());
        }
    }

    pub fn is_anybody_leaving(&self) -> bool {
        self.leaving
    }

    /// All cores have heard of every connection that is gone.
    pub fn settled(&mut self, is_gone: impl Fn(ConnId) -> bool) {
        self.leaving = false;
        for durable in self.named.values_mut() {
            durable.consumers.retain(|consumer| consumer.leaving.is_none_or(|conn| !is_gone(conn)));
            self.leaving |= durable.consumers.iter().any(|consumer| consumer.leaving.is_some());
        }
    }

    /// The process is gone, and with it all consumers.
    pub fn nobody_consumes(&mut self) {
        for durable in self.named.values_mut() {
            durable.consumers.clear();
            durable.contested = false;
        }
    }

    /// Subscriptions of this run that a cut may have unwritten, whose names are still in use: they are not known any more.
    pub fn unsure(&mut self, sub: u16) {
        for durable in self.named.values_mut().filter(|durable| durable.number == sub) {
            durable.known = false;
        }
    }
}
