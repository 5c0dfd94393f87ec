//! What was found, as a table and as JSON.

use std::time::Duration;

use serde::Serialize;

use crate::oracle::{Kind, Verdict};

#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub protocol: &'static str,
    pub seed: u64,
    pub policies: Vec<String>,
    pub rounds: u32,
    /// Starts of the broker after a kill.
    pub restarts: u32,
    /// Kills while the broker was still starting.
    pub killed_in_start: u32,
    #[serde(flatten)]
    pub verdict: Verdict,
    pub median_recovery_ms: f64,
    pub worst_recovery_ms: f64,
    pub seconds: f64,
    /// Kept folders of runs with anomalies.
    pub artefacts: Vec<String>,
    #[serde(skip)]
    pub recoveries: Vec<Duration>,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.verdict.is_clean()
    }

    /// Computes what is derived from the recoveries.
    pub fn settle(&mut self) {
        self.recoveries.sort();
        let ms = |at: Option<&Duration>| at.map_or(0.0, |d| (d.as_secs_f64() * 1e4).round() / 10.0);
        self.median_recovery_ms = ms(self.recoveries.get(self.recoveries.len() / 2));
        self.worst_recovery_ms = ms(self.recoveries.last());
    }

    pub fn table(&self) -> String {
        let v = &self.verdict;
        let mut rows = vec![
            ("protocol", self.protocol.to_string()),
            ("policies", self.policies.join(" ")),
            ("seed", self.seed.to_string()),
            ("rounds", self.rounds.to_string()),
            ("restarts", self.restarts.to_string()),
            ("killed during start", self.killed_in_start.to_string()),
            ("published", v.published.to_string()),
            ("confirmed", v.confirmed.to_string()),
            ("confirmed as duplicate", v.confirmed_as_duplicate.to_string()),
            ("rejected", v.rejected.to_string()),
            ("unknown outcome", v.unknown.to_string()),
            ("delivered", v.delivered.to_string()),
            ("redelivered, as allowed", v.redelivered.to_string()),
            ("consumer acks confirmed", v.acked.to_string()),
            ("median recovery", format!("{:.1} ms", self.median_recovery_ms)),
            ("worst recovery", format!("{:.1} ms", self.worst_recovery_ms)),
            ("time", format!("{:.0} s", self.seconds)),
        ];
        rows.extend(Kind::ALL.map(|kind| (kind.name(), v.count(kind).to_string())));
        let lines = rows.iter().map(|(name, value)| format!("  {name:<24} {value:>14}\n"));
        let mut table: String = lines.collect();
        for detail in &v.details {
            table.push_str(&format!("  ! {detail}\n"));
        }
        for folder in &self.artefacts {
            table.push_str(&format!("  kept: {folder}\n"));
        }
        table
    }

    /// One object: the counts, and the anomalies by name.
    pub fn json(&self) -> serde_json::Result<String> {
        let mut value = serde_json::to_value(self)?;
        let named = Kind::ALL.iter().map(|kind| (kind.name().to_string(), self.verdict.count(*kind).into()));
        value["anomalies"] = serde_json::Value::Object(named.collect());
        value["clean"] = self.is_clean().into();
        serde_json::to_string(&value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_every_anomaly() -> serde_json::Result<()> {
        let mut report = Report { protocol: "v2", ..Report::default() };
        report.recoveries = [30, 10, 20].map(Duration::from_millis).into();
        report.settle();
        report.verdict.anomalies[Kind::Lost as usize] = 3;
        let value: serde_json::Value = serde_json::from_str(&report.json()?)?;
        assert_eq!(value["anomalies"]["lost"], 3);
        assert_eq!(value["anomalies"]["lost-consumer-ack"], 0);
        assert_eq!(value["clean"], false);
        assert_eq!(value["median_recovery_ms"], 20.0);
        assert!(report.table().contains("lost-consumer-ack"));
        Ok(())
    }
}
