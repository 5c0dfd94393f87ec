//! Many lives in one summary.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::sim::{Life, fault_names};

#[derive(Clone, Debug, Default, Serialize)]
pub struct Sum {
    pub lives: u64,
    pub failed: u64,
    pub events: u64,
    pub virtual_ns: u128,
    pub crashes: u64,
    pub starts: u64,
    pub refused: u64,
    pub faults: BTreeMap<&'static str, u64>,
    pub confirmed: u64,
    pub duplicates: u64,
    pub rejected: u64,
    pub acked: u64,
    pub delivered: u64,
    pub redelivered: u64,
    pub buried: u64,
    pub expired: u64,
    pub read_back: u64,
    pub relocated: u64,
    pub truncated: u64,
    pub fallbacks: u64,
    pub seconds: f64,
}

impl Sum {
    pub fn add(&mut self, life: &Life) {
        self.lives += 1;
        self.failed += u64::from(life.failure.is_some());
        self.events += life.events;
        self.virtual_ns += u128::from(life.virtual_ns);
        self.crashes += life.crashes;
        self.starts += life.starts;
        self.refused += life.refused;
        for (name, count) in &life.faults {
            *self.faults.entry(name).or_default() += count;
        }
        self.confirmed += life.confirmed;
        self.duplicates += life.duplicates;
        self.rejected += life.rejected;
        self.acked += life.acked;
        self.delivered += life.delivered;
        self.redelivered += life.redelivered;
        self.buried += life.buried;
        self.expired += life.expired;
        self.read_back += life.read_back;
        self.relocated += life.relocated;
        self.truncated += life.truncated;
        self.fallbacks += life.fallbacks;
    }

    pub fn virtual_hours(&self) -> f64 {
        self.virtual_ns as f64 / 3.6e12
    }

    pub fn faults_in_all(&self) -> u64 {
        self.faults.values().sum()
    }

    /// What should have happened in so many lives, and did not.
    pub fn vacuous(&self) -> Vec<&'static str> {
        let counts = [
            ("crashes", self.crashes),
            ("starts refused", self.refused),
            ("confirmed", self.confirmed),
            ("confirmed as duplicate", self.duplicates),
            ("rejected", self.rejected),
            ("acked", self.acked),
            ("delivered", self.delivered),
            ("redelivered", self.redelivered),
            ("dead letters", self.buried),
            ("expired", self.expired),
            ("read back", self.read_back),
            ("relocated", self.relocated),
            ("torn tails", self.truncated),
        ];
        let faults = fault_names().into_iter().map(|name| (name, self.faults.get(name).copied().unwrap_or(0)));
        counts.into_iter().chain(faults).filter(|(_, count)| *count == 0).map(|(name, _)| name).collect()
    }

    pub fn table(&self) -> String {
        let per = |count: u64| count as f64 / self.lives.max(1) as f64;
        let mut rows = vec![
            ("seeds", self.lives.to_string()),
            ("violations", self.failed.to_string()),
            ("events", self.events.to_string()),
            ("virtual hours", format!("{:.1}", self.virtual_hours())),
            ("crashes", format!("{} ({:.1} a seed)", self.crashes, per(self.crashes))),
            ("faults in all", format!("{} ({:.1} a seed)", self.faults_in_all(), per(self.faults_in_all()))),
            ("starts", self.starts.to_string()),
            ("starts refused", self.refused.to_string()),
            ("confirmed", self.confirmed.to_string()),
            ("confirmed as duplicate", self.duplicates.to_string()),
            ("publishes rejected", self.rejected.to_string()),
            ("delivered", self.delivered.to_string()),
            ("redelivered", self.redelivered.to_string()),
            ("acks confirmed", self.acked.to_string()),
            ("dead letters", self.buried.to_string()),
            ("expired", self.expired.to_string()),
            ("read back from disk", self.read_back.to_string()),
            ("bytes relocated", self.relocated.to_string()),
            ("torn frames cut off", self.truncated.to_string()),
            ("checkpoint fallbacks", self.fallbacks.to_string()),
            ("time", format!("{:.1} s, {:.1} ms a seed", self.seconds, 1e3 * self.seconds / self.lives.max(1) as f64)),
        ];
        let names = fault_names();
        let count = |name: &str| self.faults.get(name).copied().unwrap_or(0).to_string();
        rows.extend(names.iter().map(|name| (*name, count(name))));
        let others = self.faults.iter().filter(|(name, _)| !names.contains(name));
        rows.extend(others.map(|(name, count)| (*name, count.to_string())));
        rows.iter().map(|(name, value)| format!("  {name:<24} {value:>24}\n")).collect()
    }

    pub fn json(&self) -> serde_json::Result<String> {
        let mut value = serde_json::to_value(self)?;
        value["clean"] = (self.failed == 0).into();
        serde_json::to_string(&value)
    }
}
