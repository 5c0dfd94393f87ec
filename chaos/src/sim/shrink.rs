//! From a failing life to a smaller one that fails in the same way, to be read.
//!
//! Owns: what is left out, and in which order. A part of the plan is left out and the life is lived again; if it still fails,
//! it stays out. The time for that is bounded.

use std::collections::BTreeSet;
use std::time::{Duration as StdDuration, Instant as StdInstant};

use blipmq::time::Duration;

use crate::sim::plan::Script;
use crate::sim::{Failure, Options, Recorded, run, run_recorded};

pub struct Shrunk {
    pub options: Options,
    pub recorded: Recorded,
    /// Lives that were lived for it.
    pub tries: u32,
}

/// - `failure`: how the seed fails with `options`.
pub fn shrink(seed: u64, options: &Options, failure: &Failure, patience: StdDuration) -> Shrunk {
    let script = Script::draw(seed, options);
    let mut shrinker = Shrinker {
        seed,
        best: options.clone(),
        failure: failure.clone(),
        until: StdInstant::now() + patience,
        tries: 0,
        progress: true,
    };
    while std::mem::take(&mut shrinker.progress) {
        shrinker.earlier(script.span);
        let calamities: Vec<usize> = (0..script.calamities.len()).collect();
        shrinker.fewer(&calamities, |without| &mut without.calamities);
        let clients: Vec<usize> = (0..script.roles.len()).collect();
        shrinker.fewer(&clients, |without| &mut without.clients);
        let names: BTreeSet<String> = crate::sim::fault_names().iter().map(|name| name.to_string()).collect();
        let names: Vec<String> = names.into_iter().filter(|name| options.allows(name)).collect();
        shrinker.fewer(&names, |without| &mut without.faults);
    }
    let recorded = run_recorded(seed, &Options { record: true, ..shrinker.best.clone() });
    Shrunk { options: shrinker.best, recorded, tries: shrinker.tries }
}

struct Shrinker {
    seed: u64,
    best: Options,
    failure: Failure,
    until: StdInstant,
    tries: u32,
    progress: bool,
}

impl Shrinker {
    /// Keeps `options` if the life still fails in the same way.
    fn keeps(&mut self, options: Options) -> bool {
        if options.without == self.best.without && options.until == self.best.until {
            return false;
        }
        if StdInstant::now() > self.until {
            return false;
        }
        self.tries += 1;
        let failure = run(self.seed, &options).failure.filter(|failure| failure.invariant == self.failure.invariant);
        let Some(failure) = failure else { return false };
        self.failure = failure;
        self.best = options;
        self.progress = true;
        true
    }

    /// The chaos ends sooner.
    fn earlier(&mut self, span: Duration) {
        let mut to = self.best.until.unwrap_or(span).0;
        let mut step = to / 2;
        while step > span.0 / 200 {
            let options = Options { until: Some(Duration(to - step)), ..self.best.clone() };
            if self.keeps(options) {
                to -= step;
            }
            step = step.min(to) / 2;
        }
    }

    /// Leaves out as many of `all` as it can: first many at once, then one by one.
    fn fewer<T: Clone + Ord>(&mut self, all: &[T], part: impl Fn(&mut super::Without) -> &mut BTreeSet<T>) {
        let mut size = all.len();
        while size > 0 {
            for some in all.chunks(size) {
                let mut options = self.best.clone();
                part(&mut options.without).extend(some.iter().cloned());
                self.keeps(options);
            }
            size /= 2;
        }
    }
}
