//! Answers `/healthz`, `/readyz`, `/topics` and `/subs`.

use std::time::Duration;

use serde_json::{Value, json};

use super::http::Response;
use crate::driver::inspect::{Answer, Inspect, Question, SubInfo, SubInfoKind, TopicInfo};
use crate::driver::readiness::{Readiness, Status};
use crate::limits;
use crate::types::CoreId;

/// Alive: every core answers.
pub(super) fn health(inspect: &dyn Inspect) -> Response {
    match ask(inspect, Question::Metrics) {
        Ok(_) => Response::text(200, "ok"),
        Err(silent) => silent,
    }
}

/// Clients are welcome.
pub(super) fn ready(readiness: &Readiness) -> Response {
    match readiness.status() {
        Status::Ready => Response::text(200, "ready"),
        Status::Starting => Response::text(503, "starting"),
        Status::Draining => Response::text(503, "draining"),
        Status::Degraded(reason) => Response::text(503, format!("degraded: {reason}")),
    }
}

/// A JSON array of topics or subscriptions, those of core 0 first. If a core had more than it may name, a header
/// says so.
pub(super) fn list(inspect: &dyn Inspect, what: Question) -> Response {
    let answers = match ask(inspect, what) {
        Ok(answers) => answers,
        Err(silent) => return silent,
    };
    let mut rows = Vec::new();
    let mut truncated = false;
    for (core, answer) in answers {
        let before = rows.len();
        match answer {
            Answer::Topics(topics) => rows.extend(topics.iter().map(topic)),
            Answer::Subs(subs) => rows.extend(subs.iter().map(|info| sub(core, info))),
            Answer::Metrics(_) => {}
        }
        truncated |= rows.len() - before >= limits::INSPECT_ROWS_MAX;
    }
    let response = Response::new(200, Value::Array(rows).to_string()).with("Content-Type", "application/json");
    if truncated { response.with("Blipmq-Truncated", "true") } else { response }
}

/// Every core's answer, or what to say if one is silent: half a list would look like a whole one.
fn ask(inspect: &dyn Inspect, what: Question) -> Result<Vec<(CoreId, Answer)>, Response> {
    let answers = inspect.ask(what, Duration::from_millis(limits::INQUIRY_DEADLINE_MS));
    let silent: Vec<String> =
        answers.iter().filter(|(_, answer)| answer.is_none()).map(|(core, _)| core.0.to_string()).collect();
    match silent.as_slice() {
        [] => Ok(answers.into_iter().filter_map(|(core, answer)| Some((core, answer?))).collect()),
        [core] => Err(Response::text(503, format!("core {core} did not answer"))),
        cores => Err(Response::text(503, format!("cores {} did not answer", cores.join(", ")))),
    }
}

fn topic(info: &TopicInfo) -> Value {
    json!({
        "topic": String::from_utf8_lossy(&info.topic),
        "core": info.core.0,
        "vshard": info.vshard.0,
        "messages": info.messages,
        "bytes": info.bytes,
        "subscriptions": info.subscriptions,
        "published": info.published,
        "next_seq": info.next_seq.0,
    })
}

fn sub(core: CoreId, info: &SubInfo) -> Value {
    json!({
        "id": format!("{}.{}", info.id.vshard.0, info.id.index),
        "core": core.0,
        "topic": String::from_utf8_lossy(&info.topic),
        "name": info.name.as_ref().map(|name| String::from_utf8_lossy(name)),
        "kind": match info.kind {
            SubInfoKind::Ephemeral => "ephemeral",
            SubInfoKind::Durable => "durable",
            SubInfoKind::Orphan => "orphan",
            SubInfoKind::DeadLetters => "dead_letters",
        },
        "qos": info.qos as u8,
        "consumers": info.consumers,
        "backlog": info.backlog,
        "in_flight": info.in_flight,
        "delivered": info.delivered,
        "acked": info.acked,
        "failed": info.failed,
    })
}
