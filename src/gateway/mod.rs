//! The side door: HTTP for operators, on threads of its own, so that it answers while a core stands still.
//!
//! Owns: which path shows what. Never: runs on a core, names the runtime, touches a core's state: it asks
//! (`driver::inspect`).
//! Neighbours: `http` moves bytes, `request` understands them, `metrics` and `admin` say what is in them.

mod admin;
mod http;
mod metrics;
/// What is asked for.
pub mod request;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::driver::inspect::{Inspect, Question};
use crate::driver::readiness::Readiness;

/// A running side door. Dropped or stopped, it closes its port and ends its threads.
pub struct Gateway {
    server: http::Server,
}

impl Gateway {
    /// Listens on `addr`. An address that cannot be had is an error here, not something to find out later.
    pub fn start(addr: SocketAddr, inspect: Arc<dyn Inspect>, readiness: Arc<Readiness>) -> io::Result<Gateway> {
        let scrapes = metrics::Scrapes::default();
        let handler = move |request: &request::Request| match request.path.as_str() {
            "/metrics" => scrapes.answer(&*inspect, &request.accept),
            "/healthz" => admin::health(&*inspect),
            "/readyz" => admin::ready(&readiness),
            "/topics" => admin::list(&*inspect, Question::Topics),
            "/subs" => admin::list(&*inspect, Question::Subs),
            _ => http::Response::text(404, "not found"),
        };
        let server = http::Server::start(addr, Arc::new(handler))?;
        tracing::info!("metrics server listening on {}", server.local_addr());
        Ok(Gateway { server })
    }

    /// The port too, if it was left to the system.
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Returns when the port is closed and the threads have ended.
    pub fn stop(self) {
        drop(self);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpStream};
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use bytes::Bytes;

    use super::*;
    use crate::driver::inspect::{Answer, SubInfo, SubInfoKind, TopicInfo};
    use crate::driver::readiness::{Phase, Trouble};
    use crate::limits;
    use crate::metrics::CoreMetrics;
    use crate::types::{CoreId, Qos, Seq, SubId, VShard};

    /// Two cores that answer what the test has put here.
    #[derive(Default)]
    struct Fake {
        silent: Mutex<Option<CoreId>>,
        appends: Mutex<[u64; 2]>,
        many: Mutex<bool>,
    }

    impl Inspect for Fake {
        fn ask(&self, what: Question, within: Duration) -> Vec<(CoreId, Option<Answer>)> {
            assert_eq!(within, Duration::from_millis(limits::INQUIRY_DEADLINE_MS));
            let silent = *self.silent.lock().unwrap();
            let answer = |core: CoreId| (Some(core) != silent).then(|| self.answer(core, what));
            [CoreId(0), CoreId(1)].map(|core| (core, answer(core))).to_vec()
        }
    }

    impl Fake {
        fn answer(&self, core: CoreId, what: Question) -> Answer {
            let at = usize::from(core.0);
            match what {
                Question::Metrics => Answer::Metrics(Box::new(CoreMetrics {
                    wal_appends: self.appends.lock().unwrap()[at],
                    ..CoreMetrics::default()
                })),
                Question::Topics => {
                    let topic = TopicInfo {
                        topic: Bytes::from(format!("t\"{at}")),
                        core,
                        vshard: VShard(core.0 + 2),
                        messages: 3,
                        bytes: 400,
                        subscriptions: 2,
                        published: u64::MAX,
                        next_seq: Seq(9),
                    };
                    let rows = if *self.many.lock().unwrap() { limits::INSPECT_ROWS_MAX } else { 1 };
                    Answer::Topics(vec![topic; rows])
                }
                Question::Subs if at == 0 => Answer::Subs(Vec::new()),
                Question::Subs => Answer::Subs(vec![
                    SubInfo {
                        id: SubId { vshard: VShard(3), index: 17 },
                        topic: Bytes::from_static(b"orders"),
                        name: Some(Bytes::from_static(b"billing")),
                        kind: SubInfoKind::Durable,
                        qos: Qos::AtLeastOnce,
                        consumers: 2,
                        backlog: 5,
                        in_flight: 4,
                        delivered: 30,
                        acked: 20,
                        failed: 1,
                    },
                    SubInfo {
                        id: SubId { vshard: VShard(3), index: 18 },
                        topic: Bytes::from_static(b"orders"),
                        name: None,
                        kind: SubInfoKind::Ephemeral,
                        qos: Qos::AtMostOnce,
                        consumers: 1,
                        backlog: 0,
                        in_flight: 0,
                        delivered: 0,
                        acked: 0,
                        failed: 0,
                    },
                ]),
            }
        }
    }

    struct Door {
        gateway: Gateway,
        fake: Arc<Fake>,
        readiness: Arc<Readiness>,
    }

    fn open() -> Door {
        let (fake, readiness) = (Arc::new(Fake::default()), Arc::new(Readiness::default()));
        let inspect: Arc<dyn Inspect> = Arc::clone(&fake) as _;
        let gateway = Gateway::start(([127, 0, 0, 1], 0).into(), inspect, Arc::clone(&readiness)).unwrap();
        Door { gateway, fake, readiness }
    }

    struct Got {
        status: u16,
        headers: BTreeMap<String, String>,
        body: String,
    }

    impl Door {
        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.gateway.local_addr()).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream
        }

        /// Sends bytes, reads to the end.
        fn send(&self, bytes: &[u8]) -> Got {
            let mut stream = self.connect();
            stream.write_all(bytes).unwrap();
            read(stream)
        }

        fn get(&self, path: &str) -> Got {
            self.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n").as_bytes())
        }

        fn json(&self, path: &str) -> serde_json::Value {
            let got = self.get(path);
            assert_eq!((got.status, got.headers["content-type"].as_str()), (200, "application/json"));
            serde_json::from_str(&got.body).unwrap()
        }
    }

    fn read(mut stream: TcpStream) -> Got {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
        let headers: BTreeMap<String, String> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_string()))
            .collect();
        assert_eq!(headers["connection"], "close");
        Got { status, headers, body: body.to_string() }
    }

    #[test]
    fn metrics_read_as_v1_had_them() {
        let door = open();
        *door.fake.appends.lock().unwrap() = [40, 2];
        let got = door.get("/metrics");
        assert_eq!(got.status, 200);
        assert_eq!(got.headers.get("content-type"), None, "V1 B35");
        assert_eq!(got.headers["content-length"], got.body.len().to_string());
        let samples: Vec<&str> = got.body.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(samples[0], "topics 0");
        assert_eq!(samples[7], "wal_appends_total 42");
        assert!(samples.contains(&"blipmq_wal_appends_total{core=\"1\"} 2"));
        for request in ["POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "GET /metrics?a=b HTTP/1.0\r\n\r\n"]
        {
            let again = door.send(request.as_bytes());
            assert_eq!((again.status, again.body.as_str()), (200, got.body.as_str()), "{request}");
        }
    }

    #[test]
    fn prometheus_is_told_the_type_it_insists_on() {
        let door = open();
        let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        let got = door.send(format!("GET /metrics HTTP/1.1\r\naccept: {accept}\r\n\r\n").as_bytes());
        assert_eq!(got.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    }

    #[test]
    fn sums_do_not_fall_when_a_core_is_silent() {
        let door = open();
        *door.fake.appends.lock().unwrap() = [40, 2];
        door.get("/metrics");
        *door.fake.appends.lock().unwrap() = [50, 3];
        *door.fake.silent.lock().unwrap() = Some(CoreId(0));
        let body = door.get("/metrics").body;
        for expected in ["wal_appends_total 43", "blipmq_core_up{core=\"0\"} 0", "blipmq_core_up{core=\"1\"} 1"] {
            assert!(body.lines().any(|line| line == expected), "{expected} in {body}");
        }
    }

    #[test]
    fn other_paths_are_not_found() {
        let door = open();
        for path in ["/", "/metric", "/metrics/", "/METRICS", "*"] {
            let got = door.get(path);
            assert_eq!((got.status, got.body.as_str()), (404, "not found"), "{path}");
        }
    }

    #[test]
    fn head_has_the_length_but_no_body() {
        let got = open().send(b"HEAD /nowhere HTTP/1.1\r\n\r\n");
        assert_eq!((got.status, got.headers["content-length"].as_str(), got.body.as_str()), (404, "9", ""));
    }

    #[test]
    fn health_names_the_silent_core() {
        let door = open();
        let got = door.get("/healthz");
        assert_eq!((got.status, got.body.as_str()), (200, "ok"));
        *door.fake.silent.lock().unwrap() = Some(CoreId(1));
        for path in ["/healthz", "/topics", "/subs"] {
            let got = door.get(path);
            assert_eq!((got.status, got.body.as_str()), (503, "core 1 did not answer"), "{path}");
        }
    }

    #[test]
    fn readiness_follows_the_broker() {
        let door = open();
        let readyz = || {
            let got = door.get("/readyz");
            (got.status, got.body)
        };
        assert_eq!(readyz(), (503, "starting".to_string()));
        door.readiness.enter(Phase::Ready);
        assert_eq!(readyz(), (200, "ready".to_string()));
        door.readiness.degrade(Trouble::Stuck(CoreId(0)), "core 0: no space".to_string());
        assert_eq!(readyz(), (503, "degraded: core 0: no space".to_string()));
        door.readiness.enter(Phase::Draining);
        assert_eq!(readyz(), (503, "draining".to_string()));
    }

    #[test]
    fn topics_and_subs_are_json() {
        let door = open();
        let topics = door.json("/topics");
        let expected = serde_json::json!({
            "topic": "t\"0", "core": 0, "vshard": 2, "messages": 3, "bytes": 400, "subscriptions": 2,
            "published": u64::MAX, "next_seq": 9
        });
        assert_eq!((topics.as_array().unwrap().len(), &topics[0]), (2, &expected));
        assert_eq!(topics[1]["topic"], "t\"1");

        let subs = door.json("/subs");
        let expected = serde_json::json!([
            { "id": "3.17", "core": 1, "topic": "orders", "name": "billing", "kind": "durable", "qos": 1,
              "consumers": 2,
              "backlog": 5, "in_flight": 4, "delivered": 30, "acked": 20, "failed": 1 },
            { "id": "3.18", "core": 1, "topic": "orders", "name": null, "kind": "ephemeral", "qos": 0, "consumers": 1,
              "backlog": 0, "in_flight": 0, "delivered": 0, "acked": 0, "failed": 0 },
        ]);
        assert_eq!(subs, expected);
    }

    #[test]
    fn a_list_that_was_cut_says_so() {
        let door = open();
        assert!(!door.get("/topics").headers.contains_key("blipmq-truncated"));
        *door.fake.many.lock().unwrap() = true;
        let got = door.get("/topics");
        assert_eq!((got.status, got.headers["blipmq-truncated"].as_str()), (200, "true"));
        let rows: Vec<serde_json::Value> = serde_json::from_str(&got.body).unwrap();
        assert_eq!(rows.len(), 2 * limits::INSPECT_ROWS_MAX);
    }

    #[test]
    fn a_request_may_come_in_pieces() {
        let door = open();
        let mut stream = door.connect();
        stream.set_nodelay(true).unwrap();
        for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" {
            stream.write_all(&[*byte]).unwrap();
        }
        assert_eq!(read(stream).status, 200);
    }

    #[test]
    fn bad_requests_are_refused() {
        let door = open();
        assert_eq!(door.send(b"\x00\x01\x02 nonsense\r\n\r\n").status, 400);
        assert_eq!(door.send(b"GET /metrics HTTP/3.7\r\n\r\n").status, 400);
        let mut long = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        long.resize(limits::HTTP_HEAD_MAX + 1000, b'a');
        assert_eq!(door.send(&long).status, 431);
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(500));
        assert_eq!(door.send(many.as_bytes()).status, 431);
        // One that leaves in the middle of its request does no harm.
        let mut half = door.connect();
        half.write_all(b"GET /met").unwrap();
        half.shutdown(Shutdown::Both).unwrap();
        assert_eq!(door.get("/healthz").status, 200);
    }

    #[test]
    fn more_connections_than_allowed_are_turned_away() {
        let door = open();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            // Silent ones: some are being read, the others wait. (On a slow machine their time may be up; then once
            // more.)
            let held: Vec<TcpStream> = (0..limits::HTTP_CONNECTIONS_MAX).map(|_| door.connect()).collect();
            let mut text = String::new();
            let refused = door.connect().read_to_string(&mut text);
            drop(held);
            if refused.is_ok() && text.starts_with("HTTP/1.1 503 ") {
                break;
            }
            assert!(Instant::now() < deadline, "nobody was refused: {text}");
        }
        // Those that hang up make room. Until then we may be refused, and cut off in the middle of our request.
        loop {
            let mut stream = door.connect();
            let mut text = String::new();
            let sent = stream.write_all(b"GET /healthz HTTP/1.1\r\n\r\n");
            if sent.and_then(|()| stream.read_to_string(&mut text)).is_ok() && text.starts_with("HTTP/1.1 200 ") {
                break;
            }
            assert!(Instant::now() < deadline, "no room: {text}");
        }
    }

    #[test]
    fn a_taken_address_is_an_error_and_stop_gives_it_back() {
        let door = open();
        let addr = door.gateway.local_addr();
        let again = || Gateway::start(addr, Arc::new(Fake::default()), Arc::new(Readiness::default()));
        assert_eq!(again().err().unwrap().kind(), io::ErrorKind::AddrInUse);
        let silent = door.connect();
        door.gateway.stop();
        drop(silent);
        again().unwrap().stop();
    }
}
