//! `chaos sim`: a world grown from one seed, in virtual time, around the pure code of the broker.
//!
//! Owns: one life from a seed, and what is said about it. Only here the harness runs code of the broker; what clients saw of it
//! is judged by the oracle all the same.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use blipmq::metrics::CoreMetrics;
use blipmq::time::{Duration, Instant};

use crate::oracle::Event;
use crate::sim::disk::FaultCounts;
use crate::sim::plan::What;
pub use crate::sim::sum::Sum;
use crate::sim::world::World;

/// What the world keeps in mind about messages and subscriptions.
mod books;
/// A client: what it asks, what it holds.
mod client;
/// Slot and checkpoint files as they are, and as they are if the power goes now.
pub mod disk;
/// What the broker says, and what is checked then.
mod hearing;
/// The broker as a process on a computer that fails.
pub mod machine;
/// One simulated TCP connection.
pub mod net;
/// What a seed plans.
pub mod plan;
/// From a failing life to a smaller one.
pub mod shrink;
/// Many lives in one summary.
mod sum;
/// The event loop, crashes and restarts, chaos and healing.
mod world;

/// What is asked of a life besides its seed.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Most cores; by default 4.
    pub cores: Option<u16>,
    /// Only these kinds of faults and calamities may happen; by default all.
    pub faults: Option<BTreeSet<String>>,
    /// What is left out of the plan.
    pub without: Without,
    /// The chaos ends by then.
    pub until: Option<Duration>,
    /// A mistake in what is simulated of the broker, to see that it is noticed.
    pub mistake: Option<machine::HostMistake>,
    /// Keep the history, and a story to read.
    pub record: bool,
}

/// Parts of a seed's plan that do not happen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Without {
    pub clients: BTreeSet<usize>,
    pub calamities: BTreeSet<usize>,
    pub faults: BTreeSet<String>,
}

impl Options {
    /// Whether a kind of fault may happen.
    pub fn allows(&self, name: &str) -> bool {
        let chosen = self.faults.as_ref().is_none_or(|faults| faults.contains(name));
        chosen && !self.without.faults.contains(name)
    }
}

/// Every kind of fault and calamity there is.
pub fn fault_names() -> Vec<&'static str> {
    let disk = plan::named(&FaultCounts::default());
    What::ALL.iter().map(|what| what.name()).chain(disk.into_iter().map(|(name, _)| name)).collect()
}

/// What went wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// `I1` to `I13` of DURABILITY 3.1, `stuck`, `assertion`, …
    pub invariant: String,
    pub text: String,
    pub at: Instant,
    pub events: u64,
}

/// One life, as it was.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Life {
    pub seed: u64,
    pub failure: Option<Failure>,
    /// Equal if and only if the same happened.
    pub trace: u64,
    pub events: u64,
    pub virtual_ns: u64,
    pub features: Vec<&'static str>,
    /// Nothing is delivered before it is durable.
    pub strict: bool,
    /// At the end.
    pub cores: u16,
    pub crashes: u64,
    pub starts: u64,
    /// Starts that were refused.
    pub refused: u64,
    /// Everything that befell this life, by kind; crashes are among it.
    pub faults: BTreeMap<&'static str, u64>,
    pub confirmed: u64,
    pub duplicates: u64,
    pub rejected: u64,
    pub acked: u64,
    pub delivered: u64,
    pub redelivered: u64,
    /// Found among the dead letters.
    pub buried: u64,
    pub expired: u64,
    pub read_back: u64,
    pub relocated: u64,
    /// Frames of torn tails that recovery cut off.
    pub truncated: u64,
    /// Checkpoint files that were not whole.
    pub fallbacks: u64,
}

impl Life {
    fn count(&mut self, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
    }

    /// What a run of the broker counted.
    fn count_metrics(&mut self, metrics: &CoreMetrics) {
        self.expired += metrics.lost.get(blipmq::metrics::Loss::Expired);
        self.read_back += metrics.backlog_reads;
        self.relocated += metrics.relocated_bytes;
    }

    /// How often anything befell it.
    pub fn faults_in_all(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// A life with its history.
pub struct Recorded {
    pub life: Life,
    pub history: Vec<Event>,
    /// One event a line.
    pub story: Vec<String>,
}

/// Lives the life of this seed.
pub fn run(seed: u64, options: &Options) -> Life {
    run_recorded(seed, &Options { record: false, ..options.clone() }).life
}

/// The same, keeping what happened if the options say so.
pub fn run_recorded(seed: u64, options: &Options) -> Recorded {
    listen_to_panics();
    IN_LIFE.with(|panic| *panic.borrow_mut() = Some(String::new()));
    let mut world = None;
    let lived = panic::catch_unwind(AssertUnwindSafe(|| world.insert(World::new(seed, options)).live()));
    let said = IN_LIFE.with(|panic| panic.borrow_mut().take()).unwrap_or_default();
    let Some(world) = world else {
        let failure = Failure { invariant: "assertion".into(), text: said, at: Instant(0), events: 0 };
        return Recorded {
            life: Life { seed, failure: Some(failure), ..Life::default() },
            history: Vec::new(),
            story: Vec::new(),
        };
    };
    let at = world.now;
    let (mut life, history, mut story) = world.into_records();
    if lived.is_err() {
        story.push(format!("PANIC {said}"));
        life.failure = Some(Failure { invariant: "assertion".into(), text: said, at, events: life.events });
    }
    Recorded { life, history, story }
}

thread_local! {
    /// While a life is lived on this thread: what the last panic said.
    static IN_LIFE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The broker's assertions are part of what is checked: a panic inside of a life is a finding, and is not printed.
fn listen_to_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let inside = IN_LIFE.with(|panic| match &mut *panic.borrow_mut() {
                Some(text) => {
                    let what = info.payload().downcast_ref::<&str>().map(|s| s.to_string());
                    let what = what.or_else(|| info.payload().downcast_ref::<String>().cloned()).unwrap_or_default();
                    let at = info.location().map_or(String::new(), |at| format!(" ({}:{})", at.file(), at.line()));
                    // As RUST_BACKTRACE says.
                    let trace = std::backtrace::Backtrace::capture();
                    let traced = trace.status() == std::backtrace::BacktraceStatus::Captured;
                    *text = if traced { format!("{what}{at}\n{trace}") } else { format!("{what}{at}") };
                    true
                }
                None => false,
            });
            if !inside {
                before(info);
            }
        }));
    });
}
