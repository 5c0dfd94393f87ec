//! A machine with a client or two that speak bytes.

use blipmq::protocol::client_side::{ReplyDecoder, encode_request};
use blipmq::protocol::reply::{Deliver, Outcome};
use blipmq::protocol::request::{
    Identity, Publish, Request, RequestKind, Start, Subscribe, TagRanges, TopicRef, Version,
};
use blipmq::types::{ClientSub, Qos};

use super::*;

const TOPIC: &[u8] = b"orders";

/// One machine and the time on its computer.
struct Desk {
    machine: Machine,
    now: Now,
}

struct Client {
    conn: ConnId,
    decoder: ReplyDecoder,
    cid: u64,
    confirmed: u64,
    rejected: u64,
    sub: Option<ClientSub>,
    delivered: Vec<MessageId>,
    oks: u64,
}

fn id(seq: u64) -> MessageId {
    MessageId { publisher: 1, topic: 1, seq }
}

impl Desk {
    fn new(plan: Plan, seed: u64) -> Desk {
        Desk { machine: Machine::new(plan, seed), now: Now { mono: Instant(1_000), wall: WallMs(1_000_000) } }
    }

    fn start(&mut self, cores: u16) -> Result<(), Refused> {
        self.machine.start(self.now, cores)?;
        for _ in 0..100_000 {
            if self.machine.is_ready() || !self.machine.is_up() {
                break;
            }
            self.step();
        }
        Ok(())
    }

    fn up(plan: Plan, seed: u64, cores: u16) -> Desk {
        let mut desk = Desk::new(plan, seed);
        desk.start(cores).unwrap();
        assert!(desk.machine.is_ready(), "seed {seed}");
        desk
    }

    /// The next happening, at its time.
    fn step(&mut self) -> bool {
        let Some(at) = self.machine.next_due() else { return false };
        self.pass_to(at);
        self.machine.run_one(self.now)
    }

    fn pass_to(&mut self, at: Instant) {
        self.now.mono = self.now.mono.max(at);
        self.now.wall = WallMs(1_000_000 + self.now.mono.0 / 1_000_000);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now.mono + time;
        while self.machine.is_up() && self.machine.next_due().is_some_and(|at| at <= end) {
            self.step();
        }
        self.pass_to(end);
    }

    fn quiet(&mut self) {
        for _ in 0..200_000 {
            if self.machine.is_quiet() || !self.machine.is_up() {
                return;
            }
            self.step();
        }
        panic!("never quiet");
    }

    fn client(&mut self, core: u16) -> Client {
        let conn = self.machine.connect(self.now, core);
        let decoder = ReplyDecoder::new(Version::V2);
        let mut client =
            Client { conn, decoder, cid: 0, confirmed: 0, rejected: 0, sub: None, delivered: Vec::new(), oks: 0 };
        self.ask(&mut client, RequestKind::Hello { version: 2 });
        self.ask(&mut client, RequestKind::Auth { key: Bytes::from_static(b"key-0") });
        self.listen(&mut client);
        client
    }

    fn ask(&mut self, client: &mut Client, kind: RequestKind) {
        client.cid += 1;
        let mut bytes = Vec::new();
        encode_request(&Request { cid: client.cid, kind }, Version::V2, &mut bytes).unwrap();
        // In small pieces, and only when the broker reads.
        for piece in bytes.chunks(100) {
            for _ in 0..10_000 {
                if !self.machine.is_paused(client.conn) || !self.step() {
                    break;
                }
            }
            self.machine.receive(self.now, client.conn, piece);
        }
    }

    fn publish(&mut self, client: &mut Client, seq: u64) {
        let publish = Publish {
            topic: TopicRef::Name(Bytes::from_static(TOPIC)),
            qos: Qos::AtLeastOnce,
            confirm: true,
            ttl: None,
            delay: Duration::ZERO,
            priority: 0,
            identity: Some(Identity::MessageId(Bytes::from(format!("m{seq}")))),
            options: Bytes::new(),
            payload: Bytes::from(id(seq).encode()),
        };
        self.ask(client, RequestKind::Publish(publish));
    }

    fn subscribe(&mut self, client: &mut Client) {
        let subscribe = Subscribe {
            topic: Bytes::from_static(TOPIC),
            qos: Qos::AtLeastOnce,
            durable: Some(Bytes::from_static(b"q")),
            credit: 10_000,
            priority: 0,
            start: Start::Earliest,
            ack_timeout: None,
        };
        self.ask(client, RequestKind::Subscribe(subscribe));
        self.listen(client);
    }

    /// Runs until nothing moves, and reads all replies.
    fn listen(&mut self, client: &mut Client) -> Vec<Deliver> {
        let mut delivered = Vec::new();
        loop {
            self.quiet();
            let bytes = self.machine.send(self.now, client.conn, 777);
            if bytes.is_empty() {
                return delivered;
            }
            client.decoder.push(Bytes::from(bytes));
            while let Some(reply) = client.decoder.next_reply().unwrap() {
                match reply {
                    Reply::Confirm { outcome: Outcome::Rejected { .. }, .. } => client.rejected += 1,
                    Reply::Confirm { .. } => client.confirmed += 1,
                    Reply::Subscribed { sub, .. } => client.sub = Some(sub),
                    Reply::Deliver(deliver) => {
                        client.delivered.push(MessageId::decode(deliver.body.payload()).unwrap());
                        delivered.push(deliver);
                    }
                    Reply::Ok { .. } => client.oks += 1,
                    _ => {}
                }
            }
        }
    }

    fn ack(&mut self, client: &mut Client, some: &[Deliver]) {
        let tags = TagRanges(some.iter().map(|deliver| (deliver.tag, deliver.tag)).collect());
        let sub = client.sub.unwrap();
        self.ask(client, RequestKind::Ack { sub, tags, confirm: true });
        self.listen(client);
    }

    fn crash(&mut self, how: Crash) {
        self.machine.crash(self.now, how);
        assert!(!self.machine.is_up());
    }

    fn check(&mut self) {
        self.machine.check().unwrap();
    }
}

fn policy(policy: FsyncPolicy) -> Plan {
    Plan { policy, ..Plan::new() }
}

/// Publishes 1..=count over two connections, and says how many were confirmed.
fn publish_some(desk: &mut Desk, core: u16, from: u64, count: u64) -> Client {
    let mut client = desk.client(core);
    for seq in from..from + count {
        desk.publish(&mut client, seq);
    }
    desk.listen(&mut client);
    client
}

#[test]
fn a_life_without_faults_passes_messages() {
    for seed in 0..8 {
        let plan = Plan { dsync: seed % 2 == 0, ..Plan::new() };
        let mut desk = Desk::up(plan, seed, 1 + (seed % 3) as u16);
        let mut consumer = desk.client(0);
        desk.subscribe(&mut consumer);
        let last = desk.machine.cores() - 1;
        let publisher = publish_some(&mut desk, last, 1, 150);
        assert_eq!((publisher.confirmed, publisher.rejected), (150, 0));
        let first = desk.listen(&mut consumer);
        desk.ack(&mut consumer, &first);
        desk.listen(&mut consumer);
        assert_eq!(consumer.delivered, (1..=150).map(id).collect::<Vec<_>>());
        desk.check();
        assert!((1..=150).all(|seq| desk.machine.held(id(seq)) == Held::Synced));
        assert_eq!(desk.machine.faults().total(), 0);
    }
}

#[test]
fn everything_confirmed_is_there_after_any_end_and_on_any_number_of_cores() {
    for seed in 0..12 {
        let mut desk = Desk::up(Plan::new(), seed, 1 + (seed % 3) as u16);
        let mut consumer = desk.client(0);
        desk.subscribe(&mut consumer);
        publish_some(&mut desk, 0, 1, 60);
        let some = desk.listen(&mut consumer);
        desk.ack(&mut consumer, &some[..20]);
        let mut half_way = desk.client(0);
        for seq in 61..100 {
            desk.publish(&mut half_way, seq);
            desk.step();
        }
        match seed % 3 {
            0 => desk.crash(Crash::Killed),
            1 => desk.crash(Crash::PowerLoss),
            _ => {
                desk.machine.stop(desk.now);
                desk.run(Duration::from_secs(20));
                assert!(!desk.machine.is_up(), "seed {seed}: the stop does not end");
                assert_eq!(desk.machine.death(), None);
            }
        }
        desk.run(Duration::from_millis(5));
        desk.start(1 + (seed % 2) as u16).unwrap();
        assert_eq!(desk.machine.report().fallbacks, 0);
        let mut consumer = desk.client(0);
        desk.subscribe(&mut consumer);
        desk.listen(&mut consumer);
        let got: BTreeSet<MessageId> = consumer.delivered.iter().copied().collect();
        assert!((21..=60).all(|seq| got.contains(&id(seq))), "seed {seed}");
        assert!((1..=20).all(|seq| !got.contains(&id(seq))), "seed {seed}: acknowledged, and back");
        assert!(got.iter().all(|id| desk.machine.held(*id) == Held::Synced));
        desk.check();
    }
}

#[test]
fn the_same_seed_lives_the_same_life() {
    let life = |seed| {
        let mut desk = Desk::up(policy(FsyncPolicy::EveryN(3)), seed, 2);
        publish_some(&mut desk, 0, 1, 50);
        desk.crash(Crash::PowerLoss);
        desk.start(3).unwrap();
        desk.run(Duration::from_secs(3));
        (desk.now.mono, desk.machine.faults().clone(), desk.machine.report().clone(), desk.machine.levels.clone())
    };
    assert_eq!(life(5), life(5));
    assert_ne!(life(5).0, life(6).0);
}

#[test]
fn without_syncs_a_power_cut_costs_messages_and_a_kill_does_not() {
    let mut lost = 0;
    for seed in 0..20 {
        let mut desk = Desk::up(policy(FsyncPolicy::None), seed, 1);
        let publisher = publish_some(&mut desk, 0, 1, 30);
        assert_eq!(publisher.confirmed, 30);
        assert!(desk.machine.held(id(30)) >= Held::Written);
        let unsynced = desk.machine.unsynced(0);
        desk.crash(if seed % 2 == 0 { Crash::Killed } else { Crash::PowerLoss });
        desk.start(1).unwrap();
        let there = |desk: &Desk, seq| desk.machine.held(id(seq)) == Held::Synced;
        let missing: Vec<u64> = (1..=30).filter(|seq| !there(&desk, *seq)).collect();
        assert!(missing.iter().all(|seq| unsynced.iter().any(|(lost, _)| *lost == id(*seq))));
        assert!(seed % 2 == 1 || missing.is_empty(), "a kill lost {missing:?}");
        lost += missing.len();
    }
    assert!(lost > 0);
}

#[test]
fn slots_go_round_and_checkpoints_cover_them() {
    let mut plan = Plan::new();
    plan.checkpoint_interval = Duration::from_millis(200);
    let mut desk = Desk::up(plan, 4, 2);
    let mut consumer = desk.client(0);
    desk.subscribe(&mut consumer);
    for round in 0..40 {
        publish_some(&mut desk, 0, round * 50 + 1, 50);
        let some = desk.listen(&mut consumer);
        desk.ack(&mut consumer, &some);
        desk.run(Duration::from_millis(300));
    }
    assert_eq!(consumer.delivered.len(), 2_000);
    let slots = desk.machine.disk.slots().count();
    assert!(slots < 24, "{slots} slots for a log whose messages are all consumed");
    assert!(desk.machine.disk.len(FileId::Checkpoint(0)).is_some());
    desk.crash(Crash::PowerLoss);
    desk.start(1).unwrap();
    desk.check();
}

#[test]
fn a_full_quota_refuses_publishes_and_heals() {
    let mut plan = Plan::new();
    plan.slots_max = Some(6);
    plan.checkpoint_interval = Duration::from_millis(200);
    let mut desk = Desk::up(plan, 9, 1);
    let mut consumer = desk.client(0);
    desk.subscribe(&mut consumer);
    let mut publisher = desk.client(0);
    let mut seq = 0;
    while publisher.rejected == 0 {
        seq += 1;
        assert!(seq < 5_000, "never refused");
        desk.publish(&mut publisher, seq);
        desk.listen(&mut publisher);
    }
    loop {
        let some = desk.listen(&mut consumer);
        if some.is_empty() {
            break;
        }
        desk.ack(&mut consumer, &some);
    }
    desk.run(Duration::from_secs(10));
    let before = publisher.confirmed;
    desk.publish(&mut publisher, 9_999);
    desk.listen(&mut publisher);
    assert_eq!(publisher.confirmed, before + 1, "space does not come back");
    desk.check();
}

#[test]
fn a_failed_write_or_sync_ends_the_process_without_a_word() {
    for (seed, faults) in
        [Faults { write_eio: 3_000, ..Faults::default() }, Faults { sync_eio: 3_000, ..Faults::default() }]
            .into_iter()
            .cycle()
            .take(20)
            .enumerate()
    {
        let mut desk = Desk::up(Plan::new(), seed as u64, 1);
        desk.machine.plan.faults = faults;
        let mut client = desk.client(0);
        for seq in 1..=100 {
            if !desk.machine.is_up() {
                break;
            }
            desk.publish(&mut client, seq);
            desk.listen(&mut client);
        }
        assert!(matches!(desk.machine.death(), Some(Death::Io(_))), "seed {seed}");
        desk.machine.heal();
        desk.start(1).unwrap();
        assert!((1..=client.confirmed).all(|seq| desk.machine.held(id(seq)) == Held::Synced), "seed {seed}");
        desk.check();
    }
}

#[test]
fn a_disk_that_cannot_be_read_refuses_this_start_and_not_the_next() {
    let mut refused = 0;
    for seed in 0..20 {
        let mut desk = Desk::up(Plan::new(), seed, 1);
        publish_some(&mut desk, 0, 1, 100);
        desk.crash(Crash::Killed);
        desk.machine.plan.faults.read_eio = 10_000;
        match desk.start(1) {
            Err(Refused::Unreadable(_)) => refused += 1,
            Err(other) => panic!("{other:?}"),
            Ok(()) => desk.crash(Crash::Killed),
        }
        desk.check();
        desk.machine.heal();
        desk.start(1).unwrap();
        desk.check();
    }
    assert!(refused > 5, "{refused}");
}

#[test]
fn late_writes_land_before_the_next_process_reads() {
    let mut late = 0;
    for seed in 0..40 {
        let mut plan = Plan::new();
        plan.faults.late = 10_000;
        let mut desk = Desk::up(plan, seed, 1);
        let mut client = desk.client(0);
        for seq in 1..20 {
            desk.publish(&mut client, seq);
        }
        for _ in 0..seed {
            desk.step();
        }
        desk.crash(Crash::Killed);
        desk.start(1).unwrap();
        assert!(!desk.machine.disk.has_late());
        late += desk.machine.faults().late;
        publish_some(&mut desk, 0, 100, 20);
        desk.crash(Crash::PowerLoss);
        desk.start(2).unwrap();
        desk.check();
    }
    assert!(late > 5, "{late}");
}

#[test]
fn damage_below_a_witness_is_refused_and_repaired() {
    let (mut refused, mut harmless, mut unwitnessed) = (0, 0, 0);
    for seed in 0..60 {
        let mut desk = Desk::up(Plan::new(), seed, 1);
        let faults = &mut desk.machine.plan.faults;
        match seed % 3 {
            0 => faults.lost_write = 1_000,
            1 => faults.misdirect = 1_000,
            _ => faults.rot = 10_000,
        }
        let mut client = publish_some(&mut desk, 0, 1, 1);
        desk.subscribe(&mut client);
        for seq in 2..=40 {
            desk.publish(&mut client, seq);
            desk.listen(&mut client);
            if seed % 3 == 2 {
                desk.run(Duration::from_millis(60));
            }
        }
        desk.machine.heal();
        desk.crash(if seed % 2 == 0 { Crash::Killed } else { Crash::PowerLoss });
        match desk.start(1) {
            Ok(()) if desk.machine.report().lost_unwitnessed > 0 => unwitnessed += 1,
            Ok(()) => harmless += 1,
            Err(Refused::Corrupt(_)) => {
                refused += 1;
                assert!(desk.machine.is_damaged());
                assert!(desk.machine.repair().sectors > 0);
                desk.start(1).unwrap();
                assert!((1..=40).all(|seq| desk.machine.held(id(seq)) == Held::Synced), "seed {seed}");
            }
            Err(other) => panic!("{other:?}"),
        }
        desk.check();
    }
    assert!(refused > 20 && harmless > 0, "refused {refused}, harmless {harmless}, unwitnessed {unwitnessed}");
}

/// Lives with everything at once: no start from a sound disk is refused, nothing panics, and each kind of fault happens.
#[test]
fn lives_with_all_faults() {
    let mut sum = FaultCounts::default();
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let mut plan = policy(*rng.pick(&[
            FsyncPolicy::Always,
            FsyncPolicy::EveryN(5),
            FsyncPolicy::IntervalMs(20),
            FsyncPolicy::None,
        ]));
        plan.dsync = plan.policy == FsyncPolicy::Always && rng.percent(30);
        plan.checkpoint_interval = Duration::from_millis(rng.between(50, 2_000));
        plan.settings.cache_bytes = 8_192;
        plan.faults = Faults {
            write_eio: 5,
            sync_eio: 5,
            read_eio: 20,
            short_write: 5,
            no_space: 500,
            lost_write: 5,
            misdirect: 5,
            rot: 200,
            slow: 20,
            late: 3_000,
        };
        let mut desk = Desk::new(plan, seed);
        let mut seq = 0;
        for _ in 0..6 {
            for attempt in 0.. {
                assert!(attempt < 50, "seed {seed}: no start");
                match desk.start(rng.between(1, 3) as u16) {
                    Ok(()) if desk.machine.is_ready() => break,
                    Ok(()) => assert!(desk.machine.death().is_some()),
                    Err(Refused::Corrupt(why)) => {
                        assert!(desk.machine.is_damaged(), "{why}");
                        desk.machine.repair();
                    }
                    Err(_) => desk.run(Duration::from_secs(1)),
                }
                desk.machine.check().unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            }
            let mut consumer = desk.client(0);
            desk.subscribe(&mut consumer);
            let mut publisher = desk.client(0);
            for _ in 0..rng.between(1, 100) {
                if !desk.machine.is_up() {
                    break;
                }
                seq += 1;
                desk.publish(&mut publisher, seq);
                if rng.percent(20) {
                    let some = desk.listen(&mut consumer);
                    if !some.is_empty() && desk.machine.is_up() && consumer.sub.is_some() {
                        desk.ack(&mut consumer, &some);
                    }
                }
                if rng.percent(20) {
                    desk.run(Duration::from_millis(rng.between(0, 400)));
                }
                desk.machine.check().unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            }
            // In the middle of something.
            let due = rng.between(0, 3) as usize * 20;
            for _ in 0..due {
                desk.step();
            }
            match rng.between(0, 3) {
                0 => desk.crash(Crash::Killed),
                1 => desk.crash(Crash::PowerLoss),
                2 => {
                    desk.crash(Crash::Killed);
                    desk.crash(Crash::PowerLoss);
                }
                _ => {
                    desk.machine.stop(desk.now);
                    desk.run(Duration::from_secs(60));
                    assert!(!desk.machine.is_up(), "seed {seed}: the stop does not end");
                }
            }
            desk.machine.death();
        }
        let f = desk.machine.faults().clone();
        sum.write_eio += f.write_eio;
        sum.sync_eio += f.sync_eio;
        sum.read_eio += f.read_eio;
        sum.short_write += f.short_write;
        sum.no_space += f.no_space;
        sum.lost_write += f.lost_write;
        sum.misdirect += f.misdirect;
        sum.rot += f.rot;
        sum.slow += f.slow;
        sum.late += f.late;
        sum.dropped += f.dropped;
        sum.torn += f.torn;
        sum.metadata += f.metadata;
    }
    let FaultCounts { write_eio, sync_eio, read_eio, short_write, no_space, lost_write, misdirect, .. } = sum;
    let FaultCounts { rot, slow, late, dropped, torn, metadata, .. } = sum;
    for count in [
        write_eio,
        sync_eio,
        read_eio,
        short_write,
        no_space,
        lost_write,
        misdirect,
        rot,
        slow,
        late,
        dropped,
        torn,
        metadata,
    ] {
        assert!(count > 0, "{sum:?}");
    }
}

/// One life under `always` with a planted mistake; what gave it away, if anything did.
fn life_with(mistake: Option<HostMistake>, seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let mut plan = Plan { mistake, ..Plan::new() };
    plan.checkpoint_interval = Duration::from_millis(rng.between(5, 300));
    plan.faults.late = 10_000;
    plan.faults.slow = 100;
    if rng.percent(50) {
        (plan.faults.sync_eio, plan.faults.write_eio) = (50, 50);
    }
    let mut desk = Desk::new(plan, seed);
    let (mut seq, mut owed) = (0, BTreeSet::new());
    let mut cid_of = BTreeMap::new();
    for round in 0..8 {
        while !desk.machine.is_ready() {
            match desk.start(rng.between(1, 2) as u16) {
                Ok(()) | Err(Refused::Unreadable(_) | Refused::NoSpace(_)) => {}
                Err(Refused::Corrupt(why)) => return Err(format!("refused: {why}")),
            }
            desk.machine.death();
            desk.machine.check()?;
        }
        let mut consumer = desk.client(0);
        if !desk.machine.is_up() {
            continue;
        }
        desk.subscribe(&mut consumer);
        desk.listen(&mut consumer);
        let missing = owed.iter().find(|id| !consumer.delivered.contains(id));
        if let Some(id) = missing
            && desk.machine.is_up()
        {
            return Err(format!("round {round}: {id:?} is lost"));
        }
        let mut publisher = if desk.machine.is_up() { desk.client(0) } else { continue };
        for _ in 0..rng.between(1, 60) {
            if !desk.machine.is_up() {
                break;
            }
            seq += 1;
            desk.publish(&mut publisher, seq);
            cid_of.insert((publisher.conn, publisher.cid), id(seq));
            for _ in 0..rng.between(0, 20) {
                desk.step();
                for said in desk.machine.said() {
                    let Reply::Confirm { cid, outcome: Outcome::Stored { .. } } = said.reply else { continue };
                    let id = cid_of[&(said.conn, cid)];
                    let held = desk.machine.held(id);
                    if held != Held::Synced {
                        return Err(format!("{id:?} is confirmed, and {held:?}"));
                    }
                    owed.insert(id);
                }
            }
            desk.machine.check()?;
        }
        cid_of.clear();
        desk.crash(if rng.percent(40) { Crash::Killed } else { Crash::PowerLoss });
        desk.machine.said();
        desk.machine.death();
    }
    Ok(())
}

fn lived(mistake: Option<HostMistake>, seed: u64) -> Result<(), String> {
    let life = std::panic::AssertUnwindSafe(|| life_with(mistake, seed));
    std::panic::catch_unwind(life).unwrap_or_else(|_| Err("an assertion of the broker".to_owned()))
}

#[test]
fn a_machine_without_mistakes_gives_no_alarm() {
    for seed in 0..25 {
        assert_eq!(lived(None, seed), Ok(()), "seed {seed}");
    }
}

#[test]
fn mistakes_in_what_is_simulated_are_noticed() {
    for mistake in HostMistake::ALL {
        assert!((0..20).any(|seed| lived(Some(mistake), seed).is_err()), "{mistake:?} is not noticed");
    }
}

#[cfg(feature = "planted-bugs")]
#[test]
fn a_confirm_that_comes_too_early_is_seen_in_the_moment_it_is_said() {
    blipmq::planted::plant(Some(blipmq::planted::Bug::ConfirmBeforeDurable));
    let noticed = lived(None, 1);
    blipmq::planted::plant(None);
    assert!(noticed.as_ref().is_err_and(|why| why.contains("is confirmed, and No")), "{noticed:?}");
}
