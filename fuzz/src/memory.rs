//! A limit on what a decoder may allocate: what it was given, not what a length field claims.

use std::alloc::System;
use std::sync::Once;

use cap::Cap;

#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, usize::MAX);

/// What other threads of the process (a test's harness) may take meanwhile.
const OTHERS: usize = 64 * 1024;

/// Runs `work`; the process aborts if it holds more than `bytes` at any moment beyond what is allocated now.
pub fn within<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        // A panic has a report to write, which takes what it takes.
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let _lifted = HEAP.set_limit(usize::MAX);
            report(panic);
        }));
    });
    // Somebody else may allocate between the look and the limit: then look again.
    let set = || HEAP.set_limit(HEAP.allocated().saturating_add(bytes + OTHERS)).is_ok();
    assert!((0..1_000).any(|_| set()), "others allocate all the time");
    let done = work();
    HEAP.set_limit(usize::MAX).expect("no limit");
    done
}
