//! Starts, kills and restarts the real `blipmqd`, each with a store of its own on a real file system.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, ExitStatus, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::lab::{Ended, program, run, scratch};
use super::{Client, PATIENCE, eventually};

/// The key that may log in, unless a test sets another.
pub const KEY: &str = "dev-key-1";

/// Another process may take a port between our look and the broker's bind.
const START_ATTEMPTS: u32 = 5;

/// A running (or killed) `blipmqd`. Ended, and its store deleted, when dropped.
pub struct Broker {
    // In the order in which they go.
    process: Process,
    dir: Dir,
    env: Vec<(String, String)>,
    port: u16,
    metrics_port: u16,
}

impl Broker {
    /// A broker that all tests running at this moment share: use a topic of your own. It redelivers only after minutes.
    pub fn shared() -> Arc<Broker> {
        static SHARED: Mutex<Weak<Broker>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let broker = Arc::new(Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "600000")]));
            *shared = Arc::downgrade(&broker);
            broker
        })
    }

    /// - `env`: settings, as environment variables; they win over those all tests use.
    pub fn start(env: &[(&str, &str)]) -> Broker {
        Broker::start_over(env, |_| ())
    }

    /// The same over what `prepare` puts into the directory that will hold the store as `store`.
    pub fn start_over(env: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> Broker {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let dir = scratch().join(format!("broker-{}-{serial}", process::id()));
        let dir = Dir(dir);
        fs::create_dir_all(&dir.0).expect("a directory for the store");
        prepare(&dir.0);
        let env: Vec<_> = env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let (process, port, metrics_port) = spawn_until_ready(&dir.0, &env);
        Broker { process, dir, env, port, metrics_port }
    }

    /// The same with at most so many open files.
    pub fn start_limited(env: &[(&str, &str)], files: u32) -> Broker {
        let files = files.to_string();
        Broker::start(&[env, &[(OPEN_FILES, &files)]].concat())
    }

    /// `blipmqd --check-config` with these settings.
    pub fn check_config(env: &[(&str, &str)]) -> Output {
        let mut command = Command::new(program("blipmqd"));
        command.arg("--check-config").env_clear().envs(env.iter().copied());
        command.output().expect("blipmqd runs")
    }

    /// A connection that has said nothing yet.
    pub fn connect(&self) -> Client {
        Client::connect(self.port)
    }

    /// A connection logged in with v1.
    pub fn v1(&self) -> Client {
        let mut client = self.connect();
        client.login_v1(KEY);
        client
    }

    /// A connection logged in with v2.
    pub fn v2(&self) -> Client {
        let mut client = self.connect();
        client.login_v2(KEY);
        client
    }

    /// Changes a setting for the next `restart`.
    pub fn set(&mut self, name: &str, value: &str) {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// The port for clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn metrics_port(&self) -> u16 {
        self.metrics_port
    }

    /// What the broker has said since its last start.
    pub fn log(&self) -> String {
        log(&self.dir.0)
    }

    /// The directory that holds the store and the log; gone with the broker.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// The store's directory.
    pub fn store(&self) -> PathBuf {
        self.dir.0.join("store")
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts a killed or stopped broker again, over the same store.
    pub fn restart(&mut self) {
        (self.process, self.port, self.metrics_port) = spawn_until_ready(&self.dir.0, &self.env);
    }

    /// Sends `signal` (`TERM`, `INT`) and waits for the end.
    pub fn stop(&mut self, signal: &str) -> ExitStatus {
        self.signal(signal);
        self.wait()
    }

    /// Sends `signal` and does not wait.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args(["-s", signal, &self.pid().to_string()]).status().expect("kill runs");
        assert!(sent.success());
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the broker to stop", || self.process.0.try_wait().expect("a process of ours"))
    }

    /// A start over this broker's store that must not succeed.
    pub fn restart_refused(&self) -> Ended {
        let (port, metrics_port) = free_ports();
        let ended = run(&mut command(&self.dir.0, &self.env, port, metrics_port));
        assert_ne!(ended.code, Some(0), "{}", ended.said);
        ended
    }

    /// The sum over all cores of a number on the metrics page.
    pub fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.http("GET", "/metrics");
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            (series.split('{').next() == Some(name)).then(|| value.parse::<f64>().expect("a number"))
        });
        let values: Vec<f64> = values.collect();
        assert!(!values.is_empty(), "{name} in\n{text}");
        values.iter().sum::<f64>() as u64
    }

    /// One request to the HTTP port: status and body.
    pub fn http(&self, method: &str, path: &str) -> (u16, String) {
        let mut stream = eventually("the HTTP port", || TcpStream::connect(("127.0.0.1", self.metrics_port)).ok());
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, body.to_owned())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.process.kill();
        if std::thread::panicking() {
            eprintln!("the broker said:\n{}", log(&self.dir.0));
        }
    }
}

/// Deleted with its owner.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Dies with its owner, also when a test panics while it starts.
struct Process(Child);

impl Process {
    fn kill(&mut self) {
        // No error: of a process that ended by itself.
        self.0.kill().expect("a process of ours");
        self.0.wait().expect("a process of ours");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn_until_ready(dir: &Path, env: &[(String, String)]) -> (Process, u16, u16) {
    for _ in 0..START_ATTEMPTS {
        let (port, metrics_port) = free_ports();
        let log = File::create(dir.join("log")).expect("a log file");
        let child = command(dir, env, port, metrics_port)
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .expect("blipmqd starts");
        let mut process = Process(child);
        // The HTTP port opens last, when clients are served.
        let ready = eventually("the broker to open its port", || {
            let ended = process.0.try_wait().expect("a process of ours").is_some();
            let open = TcpStream::connect(("127.0.0.1", metrics_port)).is_ok();
            (ended || open).then_some(!ended)
        });
        if ready {
            return (process, port, metrics_port);
        }
    }
    panic!("blipmqd does not start:\n{}", log(dir));
}

/// Not for the broker: for the shell that starts it.
const OPEN_FILES: &str = "TEST_OPEN_FILES";

fn command(dir: &Path, env: &[(String, String)], port: u16, metrics_port: u16) -> Command {
    let mut command = Command::new(program("blipmqd"));
    if let Some((_, files)) = env.iter().find(|(name, _)| name == OPEN_FILES) {
        command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {files} && exec \"$0\"")]).arg(program("blipmqd"));
    }
    command
        .env_clear()
        .env("RUST_BACKTRACE", "1")
        .env("BLIPMQ_PORT", port.to_string())
        .env("BLIPMQ_METRICS_PORT", metrics_port.to_string())
        .env("BLIPMQ_WAL_PATH", dir.join("store"))
        .env("BLIPMQ_ALLOWED_API_KEYS", KEY)
        // Two, so that a topic may live on its client's core or on another.
        .env("BLIPMQ_SHARDS_COUNT", "2")
        .env("BLIPMQ_STORAGE_SEGMENT_SIZE", "32MiB")
        .env("BLIPMQ_DELIVERY_POLL_PARK_MS", "600000")
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(process::Stdio::null());
    command
}

/// Two ports nobody uses at this moment.
pub fn free_ports() -> (u16, u16) {
    let listen = || TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = |listener: &TcpListener| listener.local_addr().expect("bound").port();
    let (first, second) = (listen(), listen());
    (port(&first), port(&second))
}

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join("log")).unwrap_or_default()
}
