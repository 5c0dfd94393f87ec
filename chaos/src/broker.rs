//! The real process, started, watched and killed.
//!
//! Owns: the broker's environment, its output files, its death. A broker dropped is a broker killed.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::rng::Rng;
use crate::wire::Wire;

/// The only key the broker under test knows.
pub const KEY: &str = "chaos-key";

/// Everything but the core count that a start needs; the same for all runs on one store.
#[derive(Clone, Debug)]
pub struct Setup {
    pub program: PathBuf,
    /// Holds the store and the output of every run.
    pub folder: PathBuf,
    pub policy: String,
    pub port: u16,
    pub metrics_port: u16,
    /// Further environment, such as a planted bug.
    pub extra: Vec<(String, String)>,
}

impl Setup {
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn start(&self, run: u32, cores: u16) -> io::Result<Broker> {
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("BLIPMQ_") {
                command.env_remove(name);
            }
        }
        let output = |kind| File::create(self.output(run, kind));
        command
            .current_dir(&self.folder)
            .env("BLIPMQ_BIND_ADDR", "127.0.0.1")
            .env("BLIPMQ_PORT", self.port.to_string())
            .env("BLIPMQ_METRICS_ADDR", "127.0.0.1")
            .env("BLIPMQ_METRICS_PORT", self.metrics_port.to_string())
            .env("BLIPMQ_WAL_PATH", self.folder.join("store"))
            .env("BLIPMQ_ALLOWED_API_KEYS", KEY)
            .env("BLIPMQ_FSYNC_POLICY", &self.policy)
            .env("BLIPMQ_SHARDS_COUNT", cores.to_string())
            // Small, so that rotation and recycling happen within seconds.
            .env("BLIPMQ_STORAGE_SEGMENT_SIZE", "4MiB")
            // Nothing may leave a queue but by acknowledgement.
            .env("BLIPMQ_MAX_RETRIES", "1000")
            .env("BLIPMQ_DELIVERY_TTL_MS", "0")
            .envs(self.extra.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output("out")?)
            .stderr(output("err")?);
        Ok(Broker { child: command.spawn()?, started: Instant::now(), run, cores, stderr: self.output(run, "err") })
    }

    fn output(&self, run: u32, kind: &str) -> PathBuf {
        self.folder.join(format!("run-{run:04}.{kind}"))
    }
}

pub struct Broker {
    child: Child,
    started: Instant,
    pub run: u32,
    pub cores: u16,
    stderr: PathBuf,
}

impl Broker {
    /// Waits until a client can log in; how long that took since the start. `Err`: in words, why it never will.
    pub fn wait_ready(&mut self, at: SocketAddr, patience: Duration) -> Result<Duration, String> {
        loop {
            self.still_runs()?;
            let waited = self.started.elapsed();
            if waited > patience {
                return Err(format!("not ready after {} s{}", patience.as_secs(), self.last_words()));
            }
            match Wire::connect(at).and_then(|mut wire| wire.login(KEY, Duration::from_secs(2))) {
                Ok(()) => return Ok(self.started.elapsed()),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(format!("refused the API key: {error}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// `Err`: it has ended by itself; with what code and last words.
    pub fn still_runs(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("ended by itself: {status}{}", self.last_words())),
            Err(error) => Err(format!("cannot be watched: {error}")),
        }
    }

    /// How it ended, if it has: the exit code, `None` inside for a signal.
    pub fn ended(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().ok().flatten().map(|status| status.code())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has written so far, its log included.
    pub fn said(&self) -> String {
        let read = |path: &Path| std::fs::read(path).unwrap_or_default();
        let text = [read(&self.stderr.with_extension("out")), read(&self.stderr)].concat();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// What each of its threads waits for, as far as the kernel says (stacks for root only).
    pub fn threads(&self) -> String {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid()));
        let entries = std::fs::read_dir(&tasks).into_iter().flatten().flatten();
        let of = |task: &Path| {
            let read = |name| std::fs::read_to_string(task.join(name)).unwrap_or_default();
            let state = read("status").lines().find(|line| line.starts_with("State:")).map(str::to_string);
            let (name, state) = (read("comm"), state.unwrap_or_default());
            format!("{} {state}\nwaits in {}\n{}\n", name.trim(), read("wchan"), read("stack"))
        };
        entries.map(|entry| of(&entry.path())).collect()
    }

    /// SIGKILL, and waits until the process is reaped.
    pub fn kill(mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    /// The end of what it wrote to stderr.
    fn last_words(&self) -> String {
        let text = std::fs::read(&self.stderr).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().rev().take(5).collect();
        lines.iter().rev().map(|line| format!("\n    | {line}")).collect()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Already reaped by `kill`, or nothing better to do with the error.
        self.child.kill().and_then(|()| self.child.wait()).ok();
    }
}

/// Two ports that are free now. Below the range that outgoing connections take theirs from: nobody's connection can
/// sit on the port while the broker is down, nor can a client connect to itself. Not to be replayed: a second harness
/// with the same seed shall find others.
pub fn free_ports(seed: u64) -> Fallible<(u16, u16)> {
    let mut rng = Rng::derive(seed, &[u64::from(std::process::id())]);
    let mut free = Vec::new();
    for _ in 0..1_000 {
        let port = rng.between(15_000, 32_000) as u16;
        if !free.contains(&port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            free.push(port);
        }
        if let [first, second] = free[..] {
            return Ok((first, second));
        }
    }
    Err("no free port between 15000 and 32000".into())
}

/// The broker to test: as told; else next to this program; else freshly built. `planted`: with the planted bugs.
pub fn locate(told: Option<PathBuf>, planted: bool) -> Fallible<PathBuf> {
    if let Some(path) = told {
        let path = std::path::absolute(path)?;
        return if path.is_file() { Ok(path) } else { Err(format!("{}: no such broker", path.display()).into()) };
    }
    let exe = std::env::current_exe()?;
    let workspace = workspace(&exe)?;
    if planted {
        let path = workspace.join("target/planted/release/blipmqd");
        return if path.is_file() {
            Ok(path)
        } else {
            build(&workspace, &["--features", "planted-bugs", "--target-dir", "target/planted"])?;
            Ok(path)
        };
    }
    let near = exe.with_file_name("blipmqd");
    if near.is_file() {
        return Ok(near);
    }
    build(&workspace, &[])?;
    Ok(workspace.join("target/release/blipmqd"))
}

/// The folder of the workspace this program was built in.
pub fn workspace(exe: &Path) -> Fallible<PathBuf> {
    let found = exe.ancestors().find(|folder| folder.join("Cargo.lock").is_file());
    found.map(Path::to_path_buf).ok_or_else(|| "not inside the workspace; name the broker with --broker".into())
}

fn build(workspace: &Path, further: &[&str]) -> Fallible<()> {
    eprintln!("building blipmqd (release)");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--release", "--bin", "blipmqd"]).args(further).current_dir(workspace);
    if command.status()?.success() { Ok(()) } else { Err("building blipmqd failed".into()) }
}
