//! Answers `/metrics`: asks every core for its counters and shows them (`crate::metrics` says how).

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::http::Response;
use crate::driver::inspect::{Answer, Inspect, Question};
use crate::limits;
use crate::metrics::{CoreMetrics, Reading, render};

/// What each core answered last. A core that is silent keeps its numbers, so that sums over cores do not fall,
/// which every monitoring system would take for a restart.
#[derive(Default)]
pub(super) struct Scrapes {
    last: Mutex<Vec<Option<Box<CoreMetrics>>>>,
}

impl Scrapes {
    /// `accept`: the request's header. v1 sent no Content-Type, and clients get it so (V1 B35); but Prometheus,
    /// since its version 3, refuses an answer without one. It says that it takes text/plain, so whoever says so is
    /// told.
    pub(super) fn answer(&self, inspect: &dyn Inspect, accept: &str) -> Response {
        let answers = inspect.ask(Question::Metrics, Duration::from_millis(limits::INQUIRY_DEADLINE_MS));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.resize(answers.len(), None);
        let mut readings = Vec::with_capacity(answers.len());
        for ((core, answer), last) in answers.into_iter().zip(last.iter_mut()) {
            let up = if let Some(Answer::Metrics(metrics)) = answer {
                *last = Some(metrics);
                true
            } else {
                false
            };
            readings.push(Reading { core, metrics: last.as_deref(), up });
        }
        let response = Response::new(200, render(&readings));
        if accept.contains("text/plain") {
            return response.with("Content-Type", "text/plain; version=0.0.4; charset=utf-8");
        }
        response
    }
}
