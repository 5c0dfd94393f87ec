//! Between cores: a ring each way between every two of them, and the wake-up of whoever sleeps.
//!
//! `spsc` is the ring and the only unsafe code of the project; `mesh` connects the cores.

pub mod mesh;
pub mod spsc;

/// The primitives both are built on: those of std, or loom's, which try every interleaving.
/// (loom is known only to tests, so a build with `--cfg loom` that is not a test uses std.)
#[cfg(not(all(loom, test)))]
pub(crate) mod sync {
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

    pub(crate) use atomic_waker::AtomicWaker;

    /// loom's interface to a cell, over std's: the pointer is only lent for one access.
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> UnsafeCell<T> {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        pub(crate) fn with_mut<R>(&self, access: impl FnOnce(*mut T) -> R) -> R {
            access(self.0.get())
        }
    }
}

#[cfg(all(loom, test))]
pub(crate) mod sync {
    pub(crate) use loom::cell::UnsafeCell;
    pub(crate) use loom::sync::Arc;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

    /// What `atomic_waker` promises, said with a lock: and no more than that. Whoever does not know of a `register` (by an order
    /// that somebody else makes) may not find its waker.
    pub(crate) struct AtomicWaker {
        waker: loom::sync::Mutex<Option<std::task::Waker>>,
        registered: AtomicBool,
    }

    impl AtomicWaker {
        pub(crate) fn new() -> AtomicWaker {
            AtomicWaker { waker: loom::sync::Mutex::new(None), registered: AtomicBool::new(false) }
        }

        pub(crate) fn register(&self, waker: &std::task::Waker) {
            let mut registered = self.waker.lock().unwrap();
            *registered = Some(waker.clone());
            self.registered.store(true, Ordering::Relaxed);
        }

        pub(crate) fn wake(&self) {
            if let Some(waker) = self.take() {
                waker.wake();
            }
        }

        pub(crate) fn take(&self) -> Option<std::task::Waker> {
            if !self.registered.load(Ordering::Relaxed) {
                return None;
            }
            let mut registered = self.waker.lock().unwrap();
            self.registered.store(false, Ordering::Relaxed);
            registered.take()
        }
    }
}
