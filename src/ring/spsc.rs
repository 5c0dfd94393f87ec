//! A bounded queue from one thread to another: nothing is locked, nobody waits.
//!
//! Owns: the slots and the proof that no two threads touch one at the same time; the project's only unsafe code.
//! Never: blocks, wakes anybody (`mesh` does).
//!
//! Two positions only grow (and wrap with the integer): `tail`, how many items were pushed, written by the producer
//! alone; `head`, how many were popped, written by the consumer alone. Item `n` lies in slot `n % capacity`.
//!
//! The invariant behind every `unsafe` below, `head <= tail <= head + capacity`:
//! - Slots of `head..tail` hold an item and belong to the consumer; all others are empty and belong to the producer.
//! - A slot changes hands only by a `Release` store to `tail` (filled) or `head` (emptied), which the other side
//!   reads with `Acquire` before it touches the slot. A position read too early only makes a side believe that it
//!   owns less.
//! - There is one `Producer` and one `Consumer`: neither is `Clone`, and their operations take `&mut self`.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::sync::{Arc, AtomicBool, AtomicUsize, Ordering, UnsafeCell};

/// Keeps what one side writes off the cache lines of the other (128: neighbouring lines are fetched in pairs).
#[repr(align(128))]
struct Padded<T>(T);

struct Ring<T> {
    tail: Padded<AtomicUsize>,
    head: Padded<AtomicUsize>,
    /// One of the two ends is gone. Whoever reads this is the other one.
    closed: AtomicBool,
    /// A power of two of them.
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

// SAFETY: the ends share a `Ring` by `Arc`, so it is used from two threads at once. All fields but the slots are
// atomics or never change. A slot is touched by one side at a time, and handed over with Release/Acquire (the
// invariant above), so an item moves from thread to thread and is never shared: `T: Send` is what that asks for.
unsafe impl<T: Send> Sync for Ring<T> {}

impl<T> Ring<T> {
    fn slot(&self, position: usize) -> &UnsafeCell<MaybeUninit<T>> {
        &self.slots[position & (self.slots.len() - 1)]
    }
}

impl<T> Drop for Ring<T> {
    /// Both ends are gone: drops what nobody will pop.
    fn drop(&mut self) {
        let tail = self.tail.0.load(Ordering::Relaxed);
        let mut head = self.head.0.load(Ordering::Relaxed);
        while head != tail {
            self.slot(head).with_mut(|slot| {
                // SAFETY: `&mut self` after the last `Arc` was dropped: no other thread has access, and all that
                // the ends did happened before. Slots of `head..tail` hold an item, and each is dropped once:
                // `head` moves on.
                unsafe { (*slot).assume_init_drop() }
            });
            head = head.wrapping_add(1);
        }
    }
}

/// The end that pushes.
pub struct Producer<T> {
    ring: Arc<Ring<T>>,
    /// The ring's `tail`, which only we write.
    tail: usize,
    /// `head` as it was when we last looked. Looking costs a cache line of the other core, so only when this says
    /// "full".
    head_seen: usize,
    not_sync: PhantomData<Cell<()>>,
}

/// The end that pops.
pub struct Consumer<T> {
    ring: Arc<Ring<T>>,
    /// The ring's `head`, which only we write.
    head: usize,
    /// `tail` as it was when we last looked; looked at again when this says "empty".
    tail_seen: usize,
    not_sync: PhantomData<Cell<()>>,
}

/// A ring with room for `capacity` items, a power of two.
pub fn ring<T: Send>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!(capacity.is_power_of_two(), "a ring's capacity is a power of two, not {capacity}");
    let ring = Arc::new(Ring {
        tail: Padded(AtomicUsize::new(0)),
        head: Padded(AtomicUsize::new(0)),
        closed: AtomicBool::new(false),
        slots: (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
    });
    (
        Producer { ring: Arc::clone(&ring), tail: 0, head_seen: 0, not_sync: PhantomData },
        Consumer { ring, head: 0, tail_seen: 0, not_sync: PhantomData },
    )
}

impl<T> Producer<T> {
    /// Appends `item`; gives it back if the ring is full. Does not ask whether anybody will pop it: see `is_closed`.
    pub fn push(&mut self, item: T) -> Result<(), T> {
        if self.tail.wrapping_sub(self.head_seen) == self.ring.slots.len() && !self.has_room() {
            return Err(item);
        }
        self.ring.slot(self.tail).with_mut(|slot| {
            // SAFETY: `tail < head_seen + capacity`, and `head` is at least `head_seen`: the slot is outside
            // `head..tail`, hence empty and ours. If it held an item before, the consumer moved that out before the
            // store of `head` that we read with Acquire. Being empty, nothing is overwritten that would need a
            // drop.
            unsafe { (*slot).write(item) };
        });
        self.tail = self.tail.wrapping_add(1);
        // Release: the item is in the slot before the slot becomes the consumer's.
        self.ring.tail.0.store(self.tail, Ordering::Release);
        Ok(())
    }

    /// Looks whether a push would succeed now.
    pub fn has_room(&mut self) -> bool {
        self.head_seen = self.ring.head.0.load(Ordering::Acquire);
        self.tail.wrapping_sub(self.head_seen) < self.ring.slots.len()
    }

    /// The consumer is gone: what is pushed from now on will only be dropped.
    pub fn is_closed(&self) -> bool {
        self.ring.closed.load(Ordering::Acquire)
    }
}

impl<T> Consumer<T> {
    /// Takes the oldest item.
    pub fn pop(&mut self) -> Option<T> {
        if self.head == self.tail_seen && self.is_empty() {
            return None;
        }
        let item = self.ring.slot(self.head).with_mut(|slot| {
            // SAFETY: `head < tail_seen <= tail`: the slot holds an item and is ours. The producer wrote it before
            // the store of `tail` that we read with Acquire. It is read once: `head` moves past it, below, before
            // anything else can happen.
            unsafe { (*slot).assume_init_read() }
        });
        self.head = self.head.wrapping_add(1);
        // Release: the item is out of the slot before the slot becomes the producer's.
        self.ring.head.0.store(self.head, Ordering::Release);
        Some(item)
    }

    /// Looks whether a pop would find nothing now.
    pub fn is_empty(&mut self) -> bool {
        self.tail_seen = self.ring.tail.0.load(Ordering::Acquire);
        self.head == self.tail_seen
    }

    /// The producer is gone: what can be popped after this answer is the last there will be.
    pub fn is_closed(&self) -> bool {
        self.ring.closed.load(Ordering::Acquire)
    }

    pub fn capacity(&self) -> usize {
        self.ring.slots.len()
    }
}

impl<T> Drop for Producer<T> {
    fn drop(&mut self) {
        // Release: who sees this sees every push before it.
        self.ring.closed.store(true, Ordering::Release);
    }
}

impl<T> Drop for Consumer<T> {
    fn drop(&mut self) {
        self.ring.closed.store(true, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn is_bounded_and_in_order() {
        let (mut tx, mut rx) = ring(4);
        // Several times around, at every fill level.
        let (mut pushed, mut popped) = (0u32, 0u32);
        for fill in [1, 4, 2, 3, 4, 4, 1, 0, 4] {
            for _ in 0..fill {
                tx.push(pushed).expect("there is room");
                pushed += 1;
            }
            if fill == 4 {
                assert_eq!(tx.push(99), Err(99));
                assert!(!tx.has_room());
            }
            assert_eq!(rx.is_empty(), fill == 0);
            while let Some(item) = rx.pop() {
                assert_eq!(item, popped);
                popped += 1;
            }
            assert_eq!(popped, pushed);
            assert!(tx.has_room());
        }
    }

    #[test]
    fn positions_may_wrap() {
        let (mut tx, mut rx) = ring(2);
        let start = usize::MAX - 1;
        (tx.tail, tx.head_seen, rx.head, rx.tail_seen) = (start, start, start, start);
        tx.ring.tail.0.store(start, Ordering::Relaxed);
        tx.ring.head.0.store(start, Ordering::Relaxed);
        for round in 0..5 {
            tx.push(Box::new(round)).unwrap();
            tx.push(Box::new(round + 100)).unwrap();
            assert!(tx.push(Box::new(0)).is_err());
            assert_eq!(rx.pop().as_deref(), Some(&round));
            assert_eq!(rx.pop().as_deref(), Some(&(round + 100)));
            assert!(rx.pop().is_none());
        }
        // Left over on both sides of the wrap: dropped once each.
        (tx.tail, tx.head_seen, rx.head, rx.tail_seen) = (usize::MAX, usize::MAX, usize::MAX, usize::MAX);
        tx.ring.tail.0.store(usize::MAX, Ordering::Relaxed);
        tx.ring.head.0.store(usize::MAX, Ordering::Relaxed);
        tx.push(Box::new(1)).unwrap();
        tx.push(Box::new(2)).unwrap();
    }

    #[test]
    fn each_item_is_dropped_once() {
        let item = Arc::new(());
        for left in 0..=4 {
            let (mut tx, mut rx) = ring(4);
            for _ in 0..4 {
                tx.push(Arc::clone(&item)).unwrap();
            }
            for _ in left..4 {
                rx.pop().unwrap();
            }
            assert_eq!(Arc::strong_count(&item), 1 + left);
            if left % 2 == 0 {
                drop(tx);
                drop(rx);
            } else {
                drop(rx);
                assert_eq!(Arc::strong_count(&item), 1 + left, "the producer may still hold the ring");
                drop(tx);
            }
            assert_eq!(Arc::strong_count(&item), 1);
        }
    }

    #[test]
    fn each_end_sees_the_other_go() {
        let (mut tx, mut rx) = ring(2);
        assert!(!tx.is_closed() && !rx.is_closed());
        tx.push(7).unwrap();
        drop(tx);
        assert!(rx.is_closed());
        assert_eq!(rx.pop(), Some(7), "what was pushed before is still there");
        assert_eq!(rx.pop(), None);

        let (mut tx, rx) = ring(2);
        drop(rx);
        assert!(tx.is_closed());
        assert_eq!(tx.push(1), Ok(()));
    }

    #[test]
    fn items_without_size_work() {
        let (mut tx, mut rx) = ring(2);
        tx.push(()).unwrap();
        tx.push(()).unwrap();
        assert_eq!(tx.push(()), Err(()));
        assert_eq!((rx.pop(), rx.pop(), rx.pop()), (Some(()), Some(()), None));
    }

    #[test]
    #[should_panic(expected = "power of two")]
    fn the_capacity_is_a_power_of_two() {
        ring::<u8>(3);
    }

    #[test]
    fn two_threads_agree() {
        let items: u64 = if cfg!(miri) { 200 } else { 200_000 };
        let (mut tx, mut rx) = ring(8);
        let producer = thread::spawn(move || {
            for n in 0..items {
                let mut item = Box::new(n);
                while let Err(back) = tx.push(item) {
                    item = back;
                    thread::yield_now();
                }
            }
        });
        let mut next = 0;
        loop {
            let closed = rx.is_closed();
            match rx.pop() {
                Some(item) => {
                    assert_eq!(*item, next);
                    next += 1;
                }
                None if closed => break,
                None => thread::yield_now(),
            }
        }
        producer.join().unwrap();
        assert_eq!(next, items);
    }

    /// Compiles only while exactly one of the two blanket impls applies, that is while `T` is not `Sync` (or not
    /// `Clone`).
    #[test]
    fn the_ends_are_send_but_not_sync_or_clone() {
        trait NotSync<Marker> {
            fn holds() {}
        }
        impl<T: ?Sized> NotSync<()> for T {}
        impl<T: ?Sized + Sync> NotSync<u8> for T {}
        trait NotClone<Marker> {
            fn holds() {}
        }
        impl<T: ?Sized> NotClone<()> for T {}
        impl<T: Clone> NotClone<u8> for T {}
        fn send<T: Send>() {}

        <Producer<u8> as NotSync<_>>::holds();
        <Consumer<u8> as NotSync<_>>::holds();
        <Producer<u8> as NotClone<_>>::holds();
        <Consumer<u8> as NotClone<_>>::holds();
        send::<Producer<Cell<u8>>>();
        send::<Consumer<Cell<u8>>>();
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --lib --release --no-default-features ring::`
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    #[test]
    fn items_arrive_whole_and_in_order() {
        loom::model(|| {
            let (mut tx, mut rx) = ring(2);
            let producer = thread::spawn(move || {
                let mut pushed = 0;
                for n in 0..3u64 {
                    if tx.push(Box::new(n)).is_err() {
                        break;
                    }
                    pushed += 1;
                }
                pushed
            });
            let mut popped = 0;
            for _ in 0..3 {
                if let Some(item) = rx.pop() {
                    assert_eq!(*item, popped);
                    popped += 1;
                }
            }
            let pushed = producer.join().unwrap();
            assert!(pushed >= 2, "two fit whatever the consumer does");
            while let Some(item) = rx.pop() {
                assert_eq!(*item, popped);
                popped += 1;
            }
            assert_eq!(popped, pushed);
        });
    }

    #[test]
    fn a_slot_is_reused_only_when_it_is_empty() {
        loom::model(|| {
            let (mut tx, mut rx) = ring(1);
            let producer = thread::spawn(move || {
                tx.push(Box::new(1)).unwrap();
                let second = tx.push(Box::new(2)).is_ok();
                (tx, second)
            });
            let first = rx.pop();
            let (_tx, second) = producer.join().unwrap();
            let mut rest = Vec::new();
            while let Some(item) = rx.pop() {
                rest.push(*item);
            }
            let all: Vec<i32> = first.into_iter().map(|item| *item).chain(rest).collect();
            assert_eq!(all, if second { vec![1, 2] } else { vec![1] });
        });
    }

    #[test]
    fn closed_means_nothing_will_follow() {
        loom::model(|| {
            let (mut tx, mut rx) = ring(2);
            let producer = thread::spawn(move || {
                tx.push(1).unwrap();
                tx.push(2).unwrap();
            });
            let mut popped = 0;
            if rx.is_closed() {
                while rx.pop().is_some() {
                    popped += 1;
                }
                assert_eq!(popped, 2);
            }
            producer.join().unwrap();
        });
    }

    #[test]
    fn whoever_leaves_last_drops_what_is_left() {
        loom::model(|| {
            let item = loom::sync::Arc::new(());
            let (mut tx, mut rx) = ring(2);
            let theirs = item.clone();
            let producer = thread::spawn(move || {
                tx.push(theirs.clone()).unwrap();
                tx.push(theirs).unwrap();
            });
            drop(rx.pop());
            drop(rx);
            producer.join().unwrap();
            assert_eq!(loom::sync::Arc::strong_count(&item), 1);
        });
    }
}
