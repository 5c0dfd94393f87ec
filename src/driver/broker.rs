//! The whole broker: start every part in order, watch over them, stop them in order.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use glommio::ExecutorJoinHandle;

use crate::access::KeyRing;
use crate::config::{Loaded, WalSync};
use crate::driver::StoreNumbers;
use crate::driver::beat::{Beat, Heart};
use crate::driver::boot;
use crate::driver::clock::Clock;
use crate::driver::cores::{self, Control, Plan, Report};
use crate::driver::inspect::Inquirer;
use crate::driver::readiness::{Phase, Readiness};
use crate::limits;
use crate::net::listener;
use crate::preflight::{self, Ready};
use crate::ring::mesh::mesh;
use crate::types::CoreId;
use crate::wal::commit::FsyncPolicy;
use crate::wal::keeper::{Keeper, KeeperConfig, KeeperHandle, ToKeeper};
use crate::wal::start::StartError;
use crate::wal::store::{Store, StoreError};

/// Why the broker does not run.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{source}{}", .source.advice(.path))]
    Start { source: StartError, path: PathBuf },
    #[error("cannot listen on {addr}: {source}{}", in_use_advice(.source))]
    Listen { addr: SocketAddr, source: std::io::Error },
    #[error("core {core} did not start: {reason}. {}", preflight::IO_URING_ADVICE)]
    Core { core: u16, reason: String },
    #[error("not all cores were ready within {} s: {missing:?} are missing", READY_WITHIN.as_secs())]
    NotReady { missing: Vec<u16> },
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

fn in_use_advice(error: &std::io::Error) -> &'static str {
    if error.kind() == std::io::ErrorKind::AddrInUse {
        "; another program has this port: stop it, or choose another `port`"
    } else {
        ""
    }
}

impl BrokerError {
    /// sysexits.h, as far as it goes.
    pub fn exit_code(&self) -> i32 {
        match self {
            BrokerError::Store(error) => i32::from(error.exit_code()),
            BrokerError::Start { source, .. } => i32::from(source.exit_code()),
            BrokerError::Listen { .. } => 69,
            BrokerError::Core { .. } | BrokerError::NotReady { .. } | BrokerError::Thread(_) => 71,
        }
    }
}

const READY_WITHIN: Duration = Duration::from_secs(60);
/// Beyond the configured drain, how long the log may take to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(30);

pub struct Broker {
    pub listen: SocketAddr,
    pub inquirer: Arc<Inquirer>,
    pub readiness: Arc<Readiness>,
    executors: Vec<ExecutorJoinHandle<()>>,
    controls: Vec<flume::Sender<Control>>,
    reports: flume::Receiver<(CoreId, Report)>,
    to_keeper: flume::Sender<ToKeeper>,
    keeper: std::thread::JoinHandle<()>,
    heart: Heart,
    drain: Duration,
    /// The process's lock on the store.
    _store: Arc<Store>,
}

impl Broker {
    /// Recovers the store and starts all cores. When it returns, clients are served.
    pub fn start(loaded: &Loaded, machine: &Ready, keys: &KeyRing) -> Result<Broker, BrokerError> {
        let config = &loaded.config;
        let cores = machine.cpus.len() as u16;
        if loaded.listen.port() != 0 {
            let begun = Instant::now();
            loop {
                match listener::claim(loaded.listen) {
                    Ok(()) => break,
                    Err(source) if begun.elapsed() > Duration::from_secs(10) => {
                        return Err(BrokerError::Listen { addr: loaded.listen, source });
                    }
                    // The sockets of a killed broker live until the kernel has torn down its rings.
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
        let store = Arc::new(Store::open(&boot::store_options(config))?);
        let recovery = boot::read_store(&store, config)
            .map_err(|source| BrokerError::Start { source, path: store.dir().to_owned() })?;
        let clock = Clock::new(recovery.store.recovered.time);
        let keeper_config = KeeperConfig {
            cores,
            spare: config.storage.spare_segments as usize * usize::from(cores),
            disk_quota: config.storage.disk_quota.0,
            checkpoint_interval: Duration::from_millis(config.storage.checkpoint_interval_ms),
        };
        let KeeperHandle { to_keeper, from_keeper, mut grants, gauges, thread: keeper } =
            Keeper::start(Arc::clone(&store), &recovery.store, &|| recovery.state(), keeper_config)?;
        let (listen, listeners) = bind_all(loaded.listen, cores, config.shards.shard_ports)?;

        let readiness = Arc::new(Readiness::default());
        let beats: Vec<Arc<Beat>> = (0..cores).map(|_| Arc::default()).collect();
        let heart = Heart::start(beats.clone(), Arc::clone(&readiness)).map_err(BrokerError::Thread)?;
        let (inquirer, inquiries) = Inquirer::new(cores);
        let (report, reports) = flume::unbounded();
        let open_conns = Arc::new(AtomicUsize::new(0));
        // With O_DSYNC every write waits for the disk: right for `always`, wasted for the other policies.
        let dsync = config.fsync_policy == FsyncPolicy::Always && config.storage.wal_sync == WalSync::Dsync;
        let mut numbers = Some(StoreNumbers {
            truncated: recovery.store.recovered.truncated,
            recovery_ms: recovery.took.as_millis() as u64,
            fallbacks: recovery.store.fallbacks,
            keeper: gauges,
        });
        let parts = recovery.into_parts(&store, config, cores, &mut grants, keys, listen.port());
        let mut controls = Vec::new();
        let mut executors = Vec::new();
        let plans = parts.into_iter().zip(mesh(cores, limits::RING_SLOTS)).zip(listeners).zip(beats);
        let plans = plans.zip(inquiries).zip(from_keeper).zip(grants).zip(&machine.cpus);
        for (number, (((((((parts, port), listeners), beat), inquiries), from_keeper), grants), cpu)) in
            plans.enumerate()
        {
            let (control, controlled) = flume::unbounded();
            controls.push(control);
            let plan = Plan {
                id: CoreId(number as u16),
                cores,
                cpu: *cpu,
                listeners,
                parts,
                grants,
                port,
                beat,
                inquiries,
                to_keeper: to_keeper.clone(),
                from_keeper,
                wal_dir: store.wal_dir(),
                dsync,
                clock,
                open_conns: Arc::clone(&open_conns),
                connections_max: usize::try_from(machine.max_connections).unwrap_or(usize::MAX),
                patience: listener::Patience {
                    keepalive: Duration::from_millis(config.net.keepalive_ms),
                    user_timeout: Duration::from_millis(config.net.tcp_user_timeout_ms),
                },
                drain: Duration::from_millis(config.net.drain_ms),
                store: numbers.take(),
                control: controlled,
                reports: report.clone(),
            };
            let executor = cores::spawn(plan);
            executors.push(executor.map_err(|reason| BrokerError::Core { core: number as u16, reason })?);
        }
        let broker = Broker {
            listen,
            inquirer: Arc::new(inquirer),
            readiness,
            executors,
            controls,
            reports,
            to_keeper,
            keeper,
            heart,
            drain: Duration::from_millis(config.net.drain_ms),
            _store: store,
        };
        broker.wait_ready(cores)
    }

    fn wait_ready(mut self, cores: u16) -> Result<Broker, BrokerError> {
        let deadline = Instant::now() + READY_WITHIN;
        let mut missing: Vec<u16> = (0..cores).collect();
        while !missing.is_empty() {
            match self.reports.recv_deadline(deadline) {
                Ok((core, Report::Ready)) => missing.retain(|c| *c != core.0),
                Ok((core, Report::Drained | Report::Ended)) => {
                    let handle = self.executors.remove(usize::from(core.0));
                    let reason = match handle.join() {
                        Ok(()) => "it ended at once".to_owned(),
                        Err(error) => error.to_string(),
                    };
                    return Err(BrokerError::Core { core: core.0, reason });
                }
                Err(_) => return Err(BrokerError::NotReady { missing }),
            }
        }
        self.readiness.enter(Phase::Ready);
        tracing::info!(cores, "net listening on {}", self.listen);
        Ok(self)
    }

    /// Stops in order: no new connections and publishes, a little time for acknowledgements, a last checkpoint, a last frame.
    /// `false`: something was not finished in time; the log has everything that was confirmed all the same.
    pub fn stop(self) -> bool {
        self.readiness.enter(Phase::Draining);
        let mut clean =
            self.tell_all(Control::Drain, self.drain + Duration::from_secs(5), |r| matches!(r, Report::Drained));
        let (done, written) = flume::bounded(1);
        clean &=
            self.to_keeper.send(ToKeeper::Stop { done }).is_ok() && written.recv_timeout(CLOSE_WITHIN).unwrap_or(false);
        clean &= self.tell_all(Control::Finish, CLOSE_WITHIN, |r| matches!(r, Report::Ended));
        if clean {
            for executor in self.executors {
                clean &= executor.join().is_ok();
            }
            clean &= self.keeper.join().is_ok();
        }
        self.heart.stop();
        clean
    }

    fn tell_all(&self, message: Control, within: Duration, is_answer: impl Fn(&Report) -> bool) -> bool {
        for control in &self.controls {
            _ = control.send(message); // a core that has ended answers nothing; the count below shows it
        }
        let deadline = Instant::now() + within;
        let mut answers = 0;
        while answers < self.controls.len() {
            match self.reports.recv_deadline(deadline) {
                Ok((_, report)) if is_answer(&report) => answers += 1,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

/// One listener per core on the shared port and, if wanted, one on a port of its own.
fn bind_all(addr: SocketAddr, cores: u16, own_ports: bool) -> Result<(SocketAddr, Vec<Vec<TcpListener>>), BrokerError> {
    let bind = |addr: SocketAddr| listener::bind(addr).map_err(|source| BrokerError::Listen { addr, source });
    let mut shared = addr;
    let mut all = Vec::new();
    for core in 0..cores {
        let first = bind(shared)?;
        shared = first.local_addr().map_err(|source| BrokerError::Listen { addr, source })?;
        let mut listeners = vec![first];
        if own_ports {
            let port = shared.port().checked_add(1 + core);
            let Some(port) = port else {
                let source = std::io::Error::other("no port numbers left above it for [shards] shard_ports");
                return Err(BrokerError::Listen { addr: shared, source });
            };
            listeners.push(bind(SocketAddr::new(shared.ip(), port))?);
        }
        all.push(listeners);
    }
    Ok((shared, all))
}
