//! One ring each way between every two cores, and the wake-up of a core that sleeps.
//!
//! Owns: which ring leads where, and the promise that a core does not sleep while something waits for it.
//! Never: blocks, looks into what it carries.
//!
//! A core that is about to sleep says so (`parked`) and then looks once more into its rings; a core that has pushed
//! looks at `parked` afterwards. Each side first writes, then reads what the other wrote, with a `SeqCst` fence in
//! between, so at least one of them sees the other (Dekker's handshake). The same holds in the other direction for
//! a core that was refused by a full ring.

use std::task::{Context, Poll};

use super::spsc::{Consumer, Producer, ring};
use super::sync::{Arc, AtomicBool, AtomicWaker, Ordering, fence};
use crate::planted::planted;
use crate::types::CoreId;

/// Where one core sleeps. Written by its own core when it parks, by a peer when it wakes it.
#[repr(align(128))]
struct Parking {
    waker: AtomicWaker,
    parked: AtomicBool,
    /// Some ring was full: wake me also when one of mine was emptied.
    wants_room: AtomicBool,
}

impl Parking {
    fn new() -> Parking {
        Parking { waker: AtomicWaker::new(), parked: AtomicBool::new(false), wants_room: AtomicBool::new(false) }
    }

    /// Wakes the core if it sleeps; of several peers that come at once, one does.
    fn wake(&self) {
        // The load first: the core is awake most of the time, and an exchange would take its cache line away from it.
        // Not a swap, which writes also when another peer was faster: loom takes such a write for one that may come late, and
        // then finds lost wake-ups that no machine can show.
        let (success, failure) = (Ordering::SeqCst, Ordering::Relaxed);
        let parked = &self.parked;
        if parked.load(Ordering::Relaxed) && parked.compare_exchange(true, false, success, failure).is_ok() {
            self.waker.wake();
        }
    }
}

/// What one core has with one other core.
struct Link<T> {
    to: Producer<T>,
    from: Consumer<T>,
    peer: Arc<Parking>,
    /// Since the last `flush_wakes`.
    pushed: bool,
    popped: bool,
    /// The last push found no room, and its owner has not been told since that there is some.
    refused: bool,
}

/// One core's end of the mesh: rings to and from every other core. `Send`, so that it can move into its executor.
pub struct Port<T> {
    core: CoreId,
    parking: Arc<Parking>,
    /// By core; `None` for ourselves.
    links: Vec<Option<Link<T>>>,
}

/// Connects `cores` cores, each with each, by rings of `slots` items (a power of two). The port of core `n` is the
/// `n`th.
pub fn mesh<T: Send>(cores: u16, slots: usize) -> Vec<Port<T>> {
    let count = usize::from(cores);
    let parking: Vec<Arc<Parking>> = (0..count).map(|_| Arc::new(Parking::new())).collect();
    let mut ports: Vec<Port<T>> = (0..cores)
        .zip(&parking)
        .map(|(core, parking)| Port {
            core: CoreId(core),
            parking: Arc::clone(parking),
            links: (0..count).map(|_| None).collect(),
        })
        .collect();
    for a in 0..count {
        for b in a + 1..count {
            let (a_to_b, b_from_a) = ring(slots);
            let (b_to_a, a_from_b) = ring(slots);
            ports[a].links[b] = Some(Link::new(a_to_b, a_from_b, &parking[b]));
            ports[b].links[a] = Some(Link::new(b_to_a, b_from_a, &parking[a]));
        }
    }
    ports
}

impl<T> Link<T> {
    fn new(to: Producer<T>, from: Consumer<T>, peer: &Arc<Parking>) -> Link<T> {
        Link { to, from, peer: Arc::clone(peer), pushed: false, popped: false, refused: false }
    }

    fn needs_attention(&mut self) -> bool {
        !self.from.is_empty() || (self.refused && self.to.has_room())
    }
}

impl<T> Port<T> {
    pub fn core(&self) -> CoreId {
        self.core
    }

    /// Hands `item` to another core; gives it back if that ring is full. Then keep it, and try again when
    /// `poll_ready` says so. The other core is not woken before `flush_wakes`.
    pub fn push(&mut self, to: CoreId, item: T) -> Result<(), T> {
        let link = self.link(to);
        let pushed = link.to.push(item);
        link.refused = pushed.is_err();
        link.pushed |= pushed.is_ok();
        pushed
    }

    /// Pushes what is in `slot`; leaves it there if that ring is full, and says `false`.
    pub fn offer(&mut self, to: CoreId, slot: &mut T) -> bool
    where
        T: Default,
    {
        let Err(item) = self.push(to, std::mem::take(slot)) else { return true };
        if !planted!(DropOnFullRing) {
            *slot = item;
        }
        false
    }

    /// After the last push and the last pop of a turn: wakes the cores that sleep and have something to do now.
    pub fn flush_wakes(&mut self) {
        if !self.links.iter().flatten().any(|link| link.pushed || link.popped) {
            return;
        }
        // Our pushes and pops come before our look at `parked`: see `poll_ready` for the other half.
        fence(Ordering::SeqCst);
        for link in self.links.iter_mut().flatten() {
            if link.pushed || (link.popped && link.peer.wants_room.load(Ordering::Relaxed)) {
                link.peer.wake();
            }
            (link.pushed, link.popped) = (false, false);
        }
    }

    /// The oldest item that `from` has sent.
    pub fn pop(&mut self, from: CoreId) -> Option<T> {
        let link = self.link(from);
        let item = link.from.pop();
        link.popped |= item.is_some();
        item
    }

    /// Takes what the other cores have sent; from each at most what one ring holds, so that a busy peer cannot keep
    /// us here.
    pub fn drain(&mut self, mut take: impl FnMut(CoreId, T)) {
        for (core, link) in (0..).zip(&mut self.links) {
            let Some(link) = link else { continue };
            for _ in 0..link.from.capacity() {
                let Some(item) = link.from.pop() else { break };
                link.popped = true;
                take(CoreId(core), item);
            }
        }
    }

    /// Ready when something can be popped, or when a ring that refused a push has room again (said once per refusal).
    /// Otherwise the task of `cx` is woken when that changes. Whoever was woken must ask again before it sleeps again.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.look() {
            return Poll::Ready(());
        }
        self.parking.waker.register(cx.waker());
        if self.links.iter().flatten().any(|link| link.refused) {
            self.parking.wants_room.store(true, Ordering::Relaxed);
        }
        // SeqCst, hence also Release: who finds us parked finds our waker.
        self.parking.parked.store(true, Ordering::SeqCst);
        // We have said that we sleep before we look for the last time: see `flush_wakes` for the other half.
        fence(Ordering::SeqCst);
        if self.look() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// That core's port was dropped: nothing more will come from it than can be popped now, and nothing sent to it
    /// is read.
    pub fn is_gone(&self, core: CoreId) -> bool {
        self.links[usize::from(core.0)].as_ref().is_some_and(|link| link.from.is_closed())
    }

    /// Whether there is anything to do; if so we are awake, and peers need not wake us.
    fn look(&mut self) -> bool {
        let mut found = false;
        for link in self.links.iter_mut().flatten() {
            if link.needs_attention() {
                link.refused &= !link.to.has_room();
                found = true;
            }
        }
        if found {
            // A peer may have begun to wake us in the meantime: a wake too many, which is harmless.
            if self.parking.parked.load(Ordering::Relaxed) {
                self.parking.parked.store(false, Ordering::Relaxed);
            }
            if self.parking.wants_room.load(Ordering::Relaxed) {
                self.parking.wants_room.store(false, Ordering::Relaxed);
            }
        }
        found
    }

    fn link(&mut self, core: CoreId) -> &mut Link<T> {
        assert!(core != self.core, "core {} has no ring to itself", core.0);
        let link = self.links.get_mut(usize::from(core.0)).and_then(Option::as_mut);
        link.unwrap_or_else(|| panic!("there is no core {}", core.0))
    }
}

impl<T> Drop for Port<T> {
    fn drop(&mut self) {
        // The waker belongs to our executor: it should not be a peer, perhaps long after, that drops it.
        self.parking.parked.store(false, Ordering::Relaxed);
        drop(self.parking.waker.take());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};
    use std::thread;

    use super::*;

    const A: CoreId = CoreId(0);
    const B: CoreId = CoreId(1);
    const C: CoreId = CoreId(2);

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn counter() -> (std::sync::Arc<Count>, Waker) {
        let count = std::sync::Arc::new(Count::default());
        let waker = Waker::from(std::sync::Arc::clone(&count));
        (count, waker)
    }

    fn is_ready<T>(port: &mut Port<T>, waker: &Waker) -> bool {
        port.poll_ready(&mut Context::from_waker(waker)).is_ready()
    }

    #[test]
    fn what_does_not_fit_stays_where_it_was() {
        let [mut a, mut b, _] = three();
        for item in [1, 2] {
            let mut slot = item;
            assert!(a.offer(B, &mut slot));
            assert_eq!(slot, 0, "it has gone");
        }
        let mut slot = 3;
        assert!(!a.offer(B, &mut slot));
        assert_eq!(slot, 3, "kept until there is room");
        assert_eq!(b.pop(A), Some(1));
        assert!(a.offer(B, &mut slot));
        assert_eq!((b.pop(A), b.pop(A), b.pop(A)), (Some(2), Some(3), None));
    }

    fn three() -> [Port<u32>; 3] {
        mesh(3, 2).try_into().unwrap_or_else(|_| panic!("one port per core"))
    }

    #[test]
    fn every_core_reaches_every_other() {
        let mut ports = mesh::<(CoreId, CoreId)>(4, 2);
        for (core, port) in (0..).zip(&mut ports) {
            assert_eq!(port.core(), CoreId(core));
            for to in (0..4).map(CoreId).filter(|to| to.0 != core) {
                port.push(to, (CoreId(core), to)).unwrap();
            }
        }
        for port in &mut ports {
            let mut got = Vec::new();
            let core = port.core();
            port.drain(|from, item| {
                assert_eq!(item, (from, core));
                got.push(from.0);
            });
            let others: Vec<u16> = (0..4).filter(|other| *other != core.0).collect();
            assert_eq!(got, others);
        }
    }

    #[test]
    fn a_turn_wakes_a_sleeping_peer_once() {
        let [mut a, mut b, mut c] = three();
        let (woken, waker) = counter();
        assert!(!is_ready(&mut b, &waker));
        a.push(B, 1).unwrap();
        a.push(B, 2).unwrap();
        assert_eq!(woken.get(), 0, "not before the turn ends");
        a.flush_wakes();
        assert_eq!(woken.get(), 1);
        a.flush_wakes();
        c.push(B, 3).unwrap();
        c.flush_wakes();
        assert_eq!(woken.get(), 1, "already awake");
        assert!(is_ready(&mut b, &waker));
        assert_eq!((b.pop(A), b.pop(A), b.pop(A), b.pop(C)), (Some(1), Some(2), None, Some(3)));
        assert!(!is_ready(&mut b, &waker), "and may sleep again");
        c.push(B, 4).unwrap();
        c.flush_wakes();
        assert_eq!(woken.get(), 2);
    }

    #[test]
    fn nobody_is_woken_for_nothing() {
        let [mut a, mut b, mut c] = three();
        let (woken, waker) = counter();
        a.push(B, 1).unwrap();
        assert!(is_ready(&mut b, &waker), "ready without sleeping");
        a.flush_wakes();
        assert!(!is_ready(&mut c, &waker));
        assert!(!is_ready(&mut a, &waker));
        assert_eq!(b.pop(A), Some(1));
        b.flush_wakes();
        assert_eq!(woken.get(), 0, "a pop concerns nobody unless a ring was full");
    }

    #[test]
    fn a_full_ring_refuses_and_says_when_it_has_room() {
        let [mut a, mut b, _c] = three();
        let (woken, waker) = counter();
        a.push(B, 1).unwrap();
        a.push(B, 2).unwrap();
        assert_eq!(a.push(B, 3), Err(3));
        a.push(C, 3).expect("the other rings are not concerned");
        a.flush_wakes();
        assert!(!is_ready(&mut a, &waker));
        b.drain(|_, _| {});
        assert_eq!(woken.get(), 0);
        b.flush_wakes();
        assert_eq!(woken.get(), 1);
        assert!(is_ready(&mut a, &waker));
        assert!(!is_ready(&mut a, &waker), "said once");
        a.push(B, 3).unwrap();
        assert_eq!(b.pop(A), Some(3));
    }

    #[test]
    fn two_full_rings_do_not_wait_for_each_other() {
        let [mut a, mut b, _c] = three();
        for n in 0..2 {
            a.push(B, n).unwrap();
            b.push(A, n).unwrap();
        }
        assert!(a.push(B, 2).is_err() && b.push(A, 2).is_err());
        a.drain(|_, _| {});
        b.drain(|_, _| {});
        assert!(a.push(B, 2).is_ok() && b.push(A, 2).is_ok());
    }

    #[test]
    fn drain_takes_one_ring_at_most() {
        let [mut a, mut b, _c] = three();
        a.push(B, 0).unwrap();
        a.push(B, 1).unwrap();
        let mut taken = 0;
        b.drain(|_, n| {
            taken += 1;
            a.push(B, n + 2).unwrap();
        });
        assert_eq!(taken, 2);
        assert_eq!(b.pop(A), Some(2), "the rest waits for the next turn");
    }

    #[test]
    fn a_dropped_port_is_noticed_and_leaves_no_waker_behind() {
        let [mut a, mut b, _c] = three();
        let (woken, waker) = counter();
        assert!(!is_ready(&mut b, &waker));
        drop(waker);
        assert_eq!(std::sync::Arc::strong_count(&woken), 2);
        b.push(A, 7).unwrap();
        assert!(!a.is_gone(B) && !a.is_gone(A));
        drop(b);
        assert_eq!(std::sync::Arc::strong_count(&woken), 1);
        assert!(a.is_gone(B) && !a.is_gone(C));
        assert_eq!(a.pop(B), Some(7));
        a.push(B, 1).unwrap();
        a.flush_wakes();
    }

    #[test]
    fn a_lone_core_has_nobody_to_wait_for() {
        let mut ports = mesh::<u32>(1, 2);
        let (woken, waker) = counter();
        assert!(!is_ready(&mut ports[0], &waker));
        ports[0].drain(|_, _| unreachable!());
        ports[0].flush_wakes();
        assert_eq!(woken.get(), 0);
    }

    #[test]
    #[should_panic(expected = "no ring to itself")]
    fn a_core_does_not_send_to_itself() {
        let _ = mesh::<u32>(2, 2)[1].push(B, 1);
    }

    struct Unpark(thread::Thread);

    impl Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }

    /// Every core sends to every other and sleeps whenever it has nothing to do. A lost wake-up would be a hang.
    #[test]
    fn cores_that_sleep_between_messages_lose_none() {
        const CORES: u16 = 3;
        let each: u32 = if cfg!(miri) { 20 } else { 20_000 };
        let threads: Vec<_> = mesh::<u32>(CORES, 4)
            .into_iter()
            .map(|mut port| {
                thread::spawn(move || {
                    let waker = Waker::from(std::sync::Arc::new(Unpark(thread::current())));
                    let me = port.core();
                    let mut sent = [0; CORES as usize];
                    let mut got = [0; CORES as usize];
                    let done = |counts: &[u32]| (0..).zip(counts).all(|(core, n)| CoreId(core) == me || *n == each);
                    loop {
                        for to in (0..CORES).filter(|to| *to != me.0) {
                            let sent = &mut sent[usize::from(to)];
                            while *sent < each && port.push(CoreId(to), *sent).is_ok() {
                                *sent += 1;
                            }
                        }
                        port.drain(|from, n| {
                            assert_eq!(n, got[usize::from(from.0)]);
                            got[usize::from(from.0)] += 1;
                        });
                        port.flush_wakes();
                        if done(&sent) && done(&got) {
                            return port;
                        }
                        while !is_ready(&mut port, &waker) {
                            thread::park();
                        }
                    }
                })
            })
            .collect();
        let ports: Vec<_> = threads.into_iter().map(|core| core.join().unwrap()).collect();
        assert_eq!(ports.len(), usize::from(CORES));
    }
}

/// loom reports a deadlock when a core sleeps for ever: a lost wake-up.
#[cfg(all(test, loom))]
mod loom_tests {
    use std::task::{Wake, Waker};

    use loom::sync::{Condvar, Mutex};
    use loom::thread;

    use super::*;

    const A: CoreId = CoreId(0);
    const B: CoreId = CoreId(1);

    fn two(slots: usize) -> (Port<u32>, Port<u32>) {
        let mut ports = mesh(2, slots);
        let b = ports.pop().unwrap();
        (ports.pop().unwrap(), b)
    }

    /// Where a thread sleeps. Not loom's `park`: that forgets an `unpark` that comes while the thread waits for a lock.
    #[derive(Default)]
    struct Bed {
        called: Mutex<bool>,
        bell: Condvar,
    }

    impl Bed {
        fn sleep(&self) {
            let mut called = self.called.lock().unwrap();
            while !*called {
                called = self.bell.wait(called).unwrap();
            }
            *called = false;
        }
    }

    impl Wake for Bed {
        fn wake(self: std::sync::Arc<Self>) {
            *self.called.lock().unwrap() = true;
            self.bell.notify_one();
        }
    }

    fn wait(port: &mut Port<u32>) {
        let bed = std::sync::Arc::new(Bed::default());
        let waker = Waker::from(std::sync::Arc::clone(&bed));
        while port.poll_ready(&mut Context::from_waker(&waker)).is_pending() {
            bed.sleep();
        }
    }

    fn bounded(test: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(test);
    }

    #[test]
    fn a_push_wakes_the_sleeper() {
        bounded(|| {
            let (mut a, mut b) = two(2);
            let sender = thread::spawn(move || {
                a.push(B, 1).unwrap();
                a.flush_wakes();
                a.push(B, 2).unwrap();
                a.flush_wakes();
                a
            });
            let mut next = 1;
            while next <= 2 {
                wait(&mut b);
                while let Some(item) = b.pop(A) {
                    assert_eq!(item, next);
                    next += 1;
                }
            }
            drop(sender.join().unwrap());
        });
    }

    /// `take`: how the receiver makes room.
    fn room_wakes(take: fn(&mut Port<u32>) -> Option<u32>) {
        bounded(move || {
            let (mut a, mut b) = two(1);
            a.push(B, 1).unwrap();
            assert_eq!(a.push(B, 2), Err(2));
            let receiver = thread::spawn(move || {
                assert_eq!(take(&mut b), Some(1));
                b.flush_wakes();
                b
            });
            wait(&mut a);
            a.push(B, 2).unwrap();
            assert_eq!(receiver.join().unwrap().pop(A), Some(2));
        });
    }

    #[test]
    fn room_wakes_the_refused() {
        room_wakes(|port| port.pop(A));
    }

    #[test]
    fn room_after_a_drain_wakes_the_refused() {
        room_wakes(|port| {
            let mut got = None;
            port.drain(|_, item| got = Some(item));
            got
        });
    }

    /// Sends and receives `each` items, and sleeps whenever there is nothing to do: as a core does.
    fn exchange(port: &mut Port<u32>, peer: CoreId, each: u32) {
        let (mut sent, mut got) = (0, 0);
        loop {
            while sent < each && port.push(peer, sent).is_ok() {
                sent += 1;
            }
            port.drain(|from, item| {
                assert_eq!((from, item), (peer, got));
                got += 1;
            });
            port.flush_wakes();
            if sent == each && got == each {
                return;
            }
            wait(port);
        }
    }

    /// Both rings are full at times, so both cores wait for room and for items, in turns.
    #[test]
    fn batches_cross_both_ways() {
        bounded(|| {
            let (mut a, mut b) = two(1);
            let other = thread::spawn(move || {
                exchange(&mut b, A, 2);
                b
            });
            exchange(&mut a, B, 2);
            drop(other.join().unwrap());
        });
    }

    #[test]
    fn two_senders_wake_one_sleeper() {
        bounded(|| {
            let mut ports = mesh::<u32>(3, 2);
            let mut b = ports.remove(1);
            let senders: Vec<_> = ports
                .into_iter()
                .map(|mut port| {
                    thread::spawn(move || {
                        port.push(B, u32::from(port.core().0)).unwrap();
                        port.flush_wakes();
                        port
                    })
                })
                .collect();
            let mut got = Vec::new();
            while got.len() < 2 {
                wait(&mut b);
                b.drain(|from, item| {
                    assert_eq!(item, u32::from(from.0));
                    got.push(item);
                });
            }
            senders.into_iter().for_each(|sender| drop(sender.join().unwrap()));
        });
    }

    /// What was sent to it is dropped once, its waker is gone, and the peer that was waking it finds out.
    #[test]
    fn a_port_may_go_while_it_is_woken() {
        bounded(|| {
            let mut ports = mesh::<loom::sync::Arc<()>>(2, 2);
            let (mut b, mut a) = (ports.pop().unwrap(), ports.pop().unwrap());
            let item = loom::sync::Arc::new(());
            let theirs = item.clone();
            let sender = thread::spawn(move || {
                a.push(B, theirs).unwrap();
                a.flush_wakes();
                a
            });
            let woken = std::sync::Arc::new(Bed::default());
            let waker = Waker::from(std::sync::Arc::clone(&woken));
            let _either = b.poll_ready(&mut Context::from_waker(&waker));
            drop(waker);
            drop(b);
            let a = sender.join().unwrap();
            assert!(a.is_gone(B));
            drop(a);
            assert_eq!(loom::sync::Arc::strong_count(&item), 1);
            assert_eq!(std::sync::Arc::strong_count(&woken), 1, "a waker outlived its port");
        });
    }

    #[test]
    fn question_and_answer() {
        bounded(|| {
            let (mut a, mut b) = two(1);
            let other = thread::spawn(move || {
                wait(&mut b);
                let asked = b.pop(A).unwrap();
                b.push(A, asked + 1).unwrap();
                b.flush_wakes();
                b
            });
            a.push(B, 1).unwrap();
            a.flush_wakes();
            wait(&mut a);
            assert_eq!(a.pop(B), Some(2));
            drop(other.join().unwrap());
        });
    }
}
