//! The broker's HTTP side: one GET, and the lists of topics and subscriptions.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Global;
use crate::failure::{Failure, print};
use crate::values::{short, table};

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq topics                              all topics with what they hold
  blipmq topics --contains order             those with `order` in their name
  blipmq topics --admin 10.0.0.5:9100 --json for a program, from another host")]
pub struct TopicsArgs {
    /// Only topics with this in their name.
    #[arg(long, value_name = "TEXT")]
    contains: Option<String>,
}

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq subs                    all subscriptions: who is behind, who fails
  blipmq subs --topic orders     those of one topic
  blipmq subs --json             for a program")]
pub struct SubsArgs {
    /// Only subscriptions of this topic.
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
}

/// Longest an answer may take, and be.
const PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: u64 = 256 * 1024 * 1024;
const HEADERS_MAX: usize = 64;

pub async fn topics(global: &Global, args: TopicsArgs) -> Result<(), Failure> {
    let mut rows = list(&global.admin, "/topics").await?;
    if let Some(part) = &args.contains {
        rows.retain(|row| text(row, "topic").contains(part.as_str()));
    }
    sort(&mut rows);
    if global.json {
        return print(&format!("{}\n", Value::from(rows)));
    }
    let titles = ["topic", "core", "vshard", "messages", "bytes", "subs", "published", "next seq"];
    let keys = ["topic", "core", "vshard", "messages", "bytes", "subscriptions", "published", "next_seq"];
    print(&table(&titles, 1, &cells(&rows, &keys)))
}

pub async fn subs(global: &Global, args: SubsArgs) -> Result<(), Failure> {
    let mut rows = list(&global.admin, "/subs").await?;
    if let Some(topic) = &args.topic {
        rows.retain(|row| text(row, "topic") == *topic);
    }
    sort(&mut rows);
    if global.json {
        return print(&format!("{}\n", Value::from(rows)));
    }
    let titles =
        ["topic", "name", "kind", "id", "qos", "consumers", "backlog", "in flight", "delivered", "acked", "failed"];
    let keys =
        ["topic", "name", "kind", "id", "qos", "consumers", "backlog", "in_flight", "delivered", "acked", "failed"];
    print(&table(&titles, 4, &cells(&rows, &keys)))
}

fn sort(rows: &mut [Value]) {
    rows.sort_by_cached_key(|row| (text(row, "topic"), text(row, "name"), text(row, "id")));
}

fn cells(rows: &[Value], keys: &[&str]) -> Vec<Vec<String>> {
    rows.iter().map(|row| keys.iter().map(|key| text(row, key)).collect()).collect()
}

/// A field as people read it.
pub fn text(row: &Value, key: &str) -> String {
    match &row[key] {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if key == "bytes" => short(number.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    }
}

/// A JSON array. Says so on standard error if the broker has cut it.
pub async fn list(admin: &str, path: &str) -> Result<Vec<Value>, Failure> {
    let answer = get(admin, path).await?;
    if answer.truncated {
        eprintln!("blipmq: the broker has more than it lists");
    }
    match serde_json::from_slice(&answer.body) {
        Ok(Value::Array(rows)) => Ok(rows),
        _ => Err(Failure::new(format!("http://{admin}{path} is not the list a BlipMQ broker would send"))),
    }
}

pub struct Answer {
    pub body: Vec<u8>,
    /// The broker's `Blipmq-Truncated`.
    truncated: bool,
}

/// GETs one path of the broker's HTTP side.
pub async fn get(admin: &str, path: &str) -> Result<Answer, Failure> {
    let failed = |what: String| {
        Failure::new(format!(
            "cannot get http://{admin}{path}: {what}; check that the broker runs and that --admin names its \
             metrics_addr and metrics_port"
        ))
    };
    let exchange = async {
        let mut stream = TcpStream::connect(admin).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
        Ok::<Vec<u8>, std::io::Error>(answer)
    };
    let answer = match tokio::time::timeout(PATIENCE, exchange).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("no answer within {PATIENCE:?}"))),
    };
    parse(answer).map_err(failed)
}

fn parse(answer: Vec<u8>) -> Result<Answer, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let not_http = || "the answer is not HTTP".to_owned();
    let Ok(httparse::Status::Complete(head)) = response.parse(&answer) else { return Err(not_http()) };
    let mut truncated = false;
    let mut length = answer.len() - head;
    for header in response.headers.iter() {
        let value = std::str::from_utf8(header.value).map_err(|_| not_http())?;
        if header.name.eq_ignore_ascii_case("content-length") {
            let promised: usize = value.trim().parse().map_err(|_| not_http())?;
            if promised > length {
                return Err("the answer was cut short".into());
            }
            length = promised;
        }
        truncated |= header.name.eq_ignore_ascii_case("blipmq-truncated");
    }
    let body = answer[head..head + length].to_vec();
    match response.code {
        Some(200) => Ok(Answer { body, truncated }),
        code => Err(format!("it answered {}: {}", code.unwrap_or(0), String::from_utf8_lossy(&body).trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checked() {
        let good = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nBlipmq-Truncated: true\r\n\r\n[]rest".to_vec());
        assert!(good.is_ok_and(|answer| answer.truncated && answer.body == b"[]"));
        let bare = parse(b"HTTP/1.1 200 OK\r\n\r\n[1]".to_vec());
        assert!(bare.is_ok_and(|answer| !answer.truncated && answer.body == b"[1]"));
        for (bytes, why) in [
            (&b"HTTP/1.1 503 No\r\n\r\ncore 1 did not answer\n"[..], "it answered 503: core 1 did not answer"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]", "the answer was cut short"),
            (b"SSH-2.0\r\n", "the answer is not HTTP"),
            (b"", "the answer is not HTTP"),
        ] {
            assert_eq!(parse(bytes.to_vec()).err().as_deref(), Some(why));
        }
    }

    #[tokio::test]
    async fn lists_come_over_http() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /topics HTTP/1.1\r\n"));
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n[{\"topic\": \"t\"}]").await.unwrap();
        };
        let (rows, ()) = tokio::join!(list(&address, "/topics"), serve);
        assert_eq!(rows.unwrap(), [serde_json::json!({ "topic": "t" })]);
    }
}
