//! Start checks: whether this machine can run the broker as configured; if not, what is wrong and what to do.
//!
//! Owns: limits of the process (raised as far as allowed), CPUs, kernel, the data directory. Never: opens the store or
//! a socket, starts a thread. Whether io_uring really works only the runtime can tell, when the first core starts;
//! `IO_URING_ADVICE` belongs behind its error.
//! Neighbours: `disk` looks at the data directory; `main` logs the notes and ends with `PreflightError::exit_code`.

mod disk;

pub use disk::{DiskLatency, probe_disk};

use crate::config::{Config, ConfigError};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use std::fs;
use std::path::PathBuf;

/// What to do when the runtime says that it may not use io_uring.
pub const IO_URING_ADVICE: &str = "io_uring must be allowed: `sysctl kernel.io_uring_disabled` must be 0 (or 1, with the \
    broker's group in kernel.io_uring_group); in a container the seccomp profile must allow io_uring_setup, \
    io_uring_enter and io_uring_register (deploy/README.md shows how for Docker)";

/// Oldest kernel the runtime is recommended for.
const KERNEL_MIN: (u32, u32) = (5, 8);
/// The runtime starts no executor with less locked memory.
const MEMLOCK_MIN: u64 = 512 << 10;
/// What one executor's registered buffers are charged for: three rings of 1 MiB.
const MEMLOCK_PER_CORE: u64 = 3 << 20;
/// Open files of one core beside its connections: rings, wake-ups, listeners, the log.
const FILES_PER_CORE: u64 = 32;
/// Open files beside cores and connections: segments being read, checkpoints, the HTTP side.
const FILES_RESERVE: u64 = 256;
const _: () = assert!(crate::limits::FILES_KEPT_BACK < FILES_RESERVE);
/// A broker with room for fewer connections is refused.
const CONNECTIONS_MIN: u64 = 64;
/// Bits of `CapEff` in /proc/self/status.
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

/// Why the broker cannot start here, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{problem}. What to do: {remedy}")]
pub struct PreflightError {
    problem: String,
    remedy: String,
    code: i32,
}

impl PreflightError {
    /// The machine is in the way (EX_OSERR of sysexits.h).
    fn machine(problem: String, remedy: impl Into<String>) -> PreflightError {
        PreflightError { problem, remedy: remedy.into(), code: 71 }
    }

    /// A setting does not fit this machine.
    fn setting(problem: String, remedy: impl Into<String>) -> PreflightError {
        PreflightError { problem, remedy: remedy.into(), code: ConfigError::EXIT_CODE }
    }

    pub fn exit_code(&self) -> i32 {
        self.code
    }
}

/// Something the operator should read in the log, though the broker starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Note {
    Info(String),
    Warning(String),
}

/// What the checks found out.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The CPU of each core; as many as there are cores.
    pub cpus: Vec<usize>,
    /// `net.max_connections`, or fewer if there are not enough open files for them.
    pub max_connections: u64,
    /// `wal_path`, made if absent; absolute, as the runtime needs it.
    pub store: PathBuf,
    /// False only with `storage.allow_buffered_io`: the file system has no O_DIRECT.
    pub direct_io: bool,
    pub notes: Vec<Note>,
}

/// Runs all checks. Makes the store's directory, raises this process's limits.
pub fn run(config: &Config) -> Result<Ready, PreflightError> {
    let mut notes = Vec::new();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    notes.extend(kernel(release.trim())?);
    let status = Status::parse(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    io_uring(&read_sysctl("io_uring_disabled"), &read_sysctl("io_uring_group"), &status)?;
    let (cpus, note) = place(&allowed_cpus()?, config)?;
    notes.extend(note);
    let cores = cpus.len() as u64;
    let locked = raise(Resource::RLIMIT_MEMLOCK, u64::MAX)?;
    notes.extend(memlock(locked, cores, status.has(CAP_IPC_LOCK))?);
    let wanted = config.net.max_connections + files_beside_connections(cores);
    let files = raise(Resource::RLIMIT_NOFILE, wanted)?;
    let (max_connections, note) = connections(files, cores, config.net.max_connections)?;
    notes.extend(note);
    let (store, direct_io) = disk::check_store(config, cores, &mut notes)?;
    Ok(Ready { cpus, max_connections, store, direct_io, notes })
}

fn kernel(release: &str) -> Result<Option<Note>, PreflightError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Ok(Some(Note::Warning(format!("cannot tell the kernel's version from {release:?}; going on"))));
    };
    if (major, minor) < KERNEL_MIN {
        let problem = format!("this kernel is {release}, too old for what the broker needs of io_uring");
        return Err(PreflightError::machine(problem, "run Linux 5.8 or newer; 6.1 or newer is better"));
    }
    Ok(None)
}

fn read_sysctl(name: &str) -> String {
    fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default().trim().to_owned()
}

/// - `disabled`, `group`: the sysctls; empty where the kernel does not have them.
fn io_uring(disabled: &str, group: &str, status: &Status) -> Result<(), PreflightError> {
    let allowed = match disabled {
        "" | "0" => true,
        "1" => status.has(CAP_SYS_ADMIN) || group.parse().is_ok_and(|group| status.groups.contains(&group)),
        _ => false,
    };
    if allowed {
        return Ok(());
    }
    let problem = format!("io_uring is switched off for this process (kernel.io_uring_disabled = {disabled})");
    Err(PreflightError::machine(
        problem,
        "run `sysctl kernel.io_uring_disabled=0`, or put the broker's group into \
        kernel.io_uring_group where it is 1",
    ))
}

/// The part of /proc/self/status that matters here.
#[derive(Default, Debug)]
struct Status {
    capabilities: u64,
    groups: Vec<i64>,
}

impl Status {
    fn parse(text: &str) -> Status {
        let mut status = Status::default();
        for line in text.lines() {
            match line.split_once(':') {
                Some(("CapEff", hex)) => status.capabilities = u64::from_str_radix(hex.trim(), 16).unwrap_or(0),
                Some(("Gid" | "Groups", list)) => {
                    status.groups.extend(list.split_whitespace().filter_map(|id| id.parse::<i64>().ok()));
                }
                _ => {}
            }
        }
        status
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities >> capability & 1 == 1
    }
}

/// CPUs this process may run on, also inside a container or under taskset. Ascending.
pub fn allowed_cpus() -> Result<Vec<usize>, PreflightError> {
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(|error| {
        PreflightError::machine(format!("cannot ask which CPUs may be used: {error}"), "allow sched_getaffinity")
    })?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).collect())
}

/// The CPU of each core.
fn place(allowed: &[usize], config: &Config) -> Result<(Vec<usize>, Option<Note>), PreflightError> {
    let shards = &config.shards;
    let wanted: Vec<usize> = match shards.cpus.as_slice() {
        [] => allowed.to_vec(),
        list => list.iter().map(|cpu| usize::from(*cpu)).collect(),
    };
    if let Some(cpu) = wanted.iter().find(|cpu| !allowed.contains(cpu)) {
        let problem = format!("`shards.cpus` names CPU {cpu}, which this process may not use; it may use {allowed:?}");
        return Err(PreflightError::setting(problem, "change `shards.cpus`, or the cpuset that restricts the process"));
    }
    if wanted.is_empty() {
        return Err(PreflightError::machine("there is no CPU to run on".into(), "give the process a cpuset"));
    }
    let most = usize::from(shards.virtual_shards);
    let count = match usize::from(shards.count) {
        0 => wanted.len().min(most),
        count => count,
    };
    let note = if count > wanted.len() {
        Some(Note::Warning(format!(
            "{count} cores share {} CPUs: this works, for tests; `shards.count` = 0 is faster",
            wanted.len()
        )))
    } else if shards.count == 0 && wanted.len() > most {
        Some(Note::Warning(format!("{} CPUs stay unused: the store has {most} virtual shards", wanted.len() - most)))
    } else {
        None
    };
    Ok((wanted.iter().copied().cycle().take(count).collect(), note))
}

/// Raises the soft limit towards `wanted`, as far as the hard one allows; returns what it is now.
fn raise(resource: Resource, wanted: u64) -> Result<u64, PreflightError> {
    let fail = |what: &str, error: nix::Error| {
        PreflightError::machine(
            format!("cannot {what} the limit {resource:?}: {error}"),
            "allow the process its own limits",
        )
    };
    let (soft, hard) = getrlimit(resource).map_err(|error| fail("read", error))?;
    let target = wanted.min(hard);
    if soft >= target {
        return Ok(soft);
    }
    setrlimit(resource, target, hard).map_err(|error| fail("raise", error))?;
    Ok(target)
}

fn memlock(limit: u64, cores: u64, exempt: bool) -> Result<Option<Note>, PreflightError> {
    let wanted = cores * MEMLOCK_PER_CORE;
    let remedy = format!(
        "allow {} KiB or more: `ulimit -l`, LimitMEMLOCK= in a systemd unit, --ulimit memlock= of Docker",
        wanted.max(MEMLOCK_MIN) >> 10
    );
    if limit < MEMLOCK_MIN {
        let problem = format!("RLIMIT_MEMLOCK is {} KiB, too little for io_uring's buffers", limit >> 10);
        return Err(PreflightError::machine(problem, remedy));
    }
    Ok((limit < wanted && !exempt).then(|| {
        Note::Warning(format!(
            "RLIMIT_MEMLOCK is {} KiB; {cores} cores want {} KiB for registered buffers, and some will go without \
             (slower, nothing is lost). What to do: {remedy}",
            limit >> 10,
            wanted >> 10
        ))
    }))
}

fn files_beside_connections(cores: u64) -> u64 {
    FILES_RESERVE + cores * FILES_PER_CORE
}

/// How many connections there are files for.
fn connections(files: u64, cores: u64, wanted: u64) -> Result<(u64, Option<Note>), PreflightError> {
    let reserve = files_beside_connections(cores);
    let room = files.saturating_sub(reserve);
    let remedy = format!(
        "allow {} open files: `ulimit -n`, LimitNOFILE= in a systemd unit, --ulimit nofile= of Docker",
        wanted + reserve
    );
    if room >= wanted {
        return Ok((wanted, None));
    }
    if room < CONNECTIONS_MIN {
        let problem = format!("RLIMIT_NOFILE is {files}; {cores} cores need {reserve} files beside their connections");
        return Err(PreflightError::machine(problem, remedy));
    }
    let note = format!(
        "RLIMIT_NOFILE is {files}: room for {room} connections, not for `net.max_connections` = {wanted}. \
         What to do: {remedy}"
    );
    Ok((room, Some(Note::Warning(note))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text<T: std::fmt::Debug>(result: Result<T, PreflightError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn old_kernels_are_refused_and_odd_names_are_not() {
        for good in ["6.18.44-fc-v669", "5.8.0", "5.10", "10.0.1"] {
            assert_eq!(kernel(good).unwrap(), None, "{good}");
        }
        for old in ["5.7.19", "4.19.0-amd64", "3.10.0-1160.el7.x86_64"] {
            assert!(text(kernel(old)).contains(old));
        }
        assert!(matches!(kernel("gentoo").unwrap(), Some(Note::Warning(_))));
    }

    #[test]
    fn io_uring_is_judged_by_the_sysctl_the_group_and_the_capability() {
        let plain = Status::parse("Name:\tx\nGid:\t100 100 100 100\nGroups:\t7 8 \nCapEff:\t0000000000000000\n");
        let admin = Status::parse("CapEff:\t000001ffffffffff\n");
        for disabled in ["", "0"] {
            assert!(io_uring(disabled, "-1", &plain).is_ok());
        }
        assert!(text(io_uring("1", "-1", &plain)).contains("io_uring_disabled = 1"));
        assert!(io_uring("1", "8", &plain).is_ok() && io_uring("1", "100", &plain).is_ok());
        assert!(io_uring("1", "", &admin).is_ok());
        assert!(text(io_uring("2", "", &admin)).contains("sysctl"));
    }

    #[test]
    fn locked_memory_is_a_warning_unless_nothing_can_start() {
        assert!(text(memlock(64 << 10, 2, true)).contains("LimitMEMLOCK"), "root too");
        assert!(matches!(memlock(1 << 20, 2, false).unwrap(), Some(Note::Warning(_))));
        assert_eq!(memlock(1 << 20, 2, true).unwrap(), None);
        assert_eq!(memlock(8 << 20, 2, false).unwrap(), None);
        assert_eq!(memlock(u64::MAX, 128, false).unwrap(), None);
    }

    #[test]
    fn open_files_bound_the_connections() {
        let need = files_beside_connections(2);
        assert_eq!(connections(need + 10_000, 2, 10_000).unwrap(), (10_000, None));
        let (room, note) = connections(need + 500, 2, 10_000).unwrap();
        assert_eq!(room, 500);
        assert!(format!("{note:?}").contains("room for 500"));
        assert!(text(connections(need + 63, 2, 10_000)).contains("LimitNOFILE"));
    }

    #[test]
    fn cores_are_placed_on_allowed_cpus_only() {
        let mut config = Config::default();
        assert_eq!(place(&[1, 5], &config).unwrap(), (vec![1, 5], None));
        config.shards.count = 3;
        let (cpus, note) = place(&[1, 5], &config).unwrap();
        assert_eq!(cpus, [1, 5, 1]);
        assert!(note.is_some());
        config.shards.cpus = vec![5];
        config.shards.count = 1;
        assert_eq!(place(&[1, 5], &config).unwrap(), (vec![5], None));
        config.shards.cpus = vec![2];
        let error = place(&[1, 5], &config).unwrap_err();
        assert!(error.to_string().contains("CPU 2") && error.to_string().contains("[1, 5]"), "{error}");
        assert_eq!(error.exit_code(), 78);
        config = Config::default();
        let many: Vec<usize> = (0..100).collect();
        let (cpus, note) = place(&many, &config).unwrap();
        assert_eq!(cpus.len(), 64);
        assert!(format!("{note:?}").contains("36 CPUs stay unused"));
    }

    #[test]
    fn this_machine_has_a_cpu() {
        assert!(!allowed_cpus().unwrap().is_empty());
    }

    #[test]
    fn limits_are_raised_and_never_lowered() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(raise(Resource::RLIMIT_NOFILE, 0).unwrap(), soft);
        assert_eq!(raise(Resource::RLIMIT_NOFILE, soft + 1).unwrap(), (soft + 1).min(hard));
    }
}
