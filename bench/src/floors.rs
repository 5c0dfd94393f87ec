//! What the machine itself needs: the round trip and the synced write that no durable broker can go below.
//!
//! Measured in the same run, between the same two CPUs, on the store's file system; once back to back and once at the pace
//! of the open loop, since an idle CPU and an idle disk take longer to answer.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::fs::OFlags;

use crate::load::histogram;
use crate::report::Values;
use crate::{Cpus, Result};

const PING_BYTES: usize = 128;
const BLOCK: usize = 4096;
/// Larger than what a run writes back to back, so that no block is written twice.
const FILE_BYTES: usize = 64 * 1024 * 1024;
const BULK_CHUNK: usize = 256 * 1024;
const BULK_BYTES: usize = 1 << 30;
/// The pace of the slow open loop.
const PACE: Duration = Duration::from_millis(1);

/// Runs `work` on a thread of its own that is bound to `cpu`.
pub fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
                return Err(format!("cannot use CPU {cpu}"));
            }
            Ok(work())
        });
        Ok(thread.join().map_err(|_| "a thread of the bench panicked")??)
    })
}

/// All floors; each phase takes `time`.
pub fn measure(cpus: &Cpus, directory: &Path, time: Duration) -> Result<Values> {
    let mut values = Values::new();
    for (name, pace) in [("", Duration::ZERO), ("_at_1k", PACE)] {
        let echo = echo(cpus, time, pace)?;
        values.insert(format!("echo{name}_p50_us"), echo.value_at_quantile(0.5) as f64 / 1e3);
        values.insert(format!("echo{name}_p99_us"), echo.value_at_quantile(0.99) as f64 / 1e3);
        let write = on_cpu(cpus.broker, || synced_writes(directory, time, pace))??;
        values.insert(format!("write{name}_p50_us"), write.value_at_quantile(0.5) as f64 / 1e3);
        values.insert(format!("write{name}_p99_us"), write.value_at_quantile(0.99) as f64 / 1e3);
    }
    values.insert("bulk_mb_per_s".into(), bulk(cpus)?);
    Ok(values)
}

/// Calls `step` for `time`, every `pace` (zero: back to back), and records how long each call took.
fn repeat(time: Duration, pace: Duration, mut step: impl FnMut() -> std::io::Result<()>) -> Result<Histogram<u64>> {
    let mut taken = histogram();
    let started = Instant::now();
    let mut due = Duration::ZERO;
    while started.elapsed() < time {
        if let Some(rest) = due.checked_sub(started.elapsed()) {
            std::thread::sleep(rest);
        }
        due += pace;
        let before = Instant::now();
        step()?;
        taken.saturating_record(before.elapsed().as_nanos() as u64);
    }
    Ok(taken)
}

/// Two connected sockets on loopback, both with TCP_NODELAY.
fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

fn echo(cpus: &Cpus, time: Duration, pace: Duration) -> Result<Histogram<u64>> {
    let (mut near, mut far) = pair()?;
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            on_cpu(cpus.broker, move || {
                let mut ping = [0; PING_BYTES];
                // Ends when the other side closes.
                while far.read_exact(&mut ping).is_ok() && far.write_all(&ping).is_ok() {}
            })
        });
        let taken = on_cpu(cpus.load, move || {
            let mut ping = [7; PING_BYTES];
            repeat(time, pace, || {
                near.write_all(&ping)?;
                near.read_exact(&mut ping)
            })
        })?;
        server.join().map_err(|_| "the echo server panicked")??;
        taken
    })
}

/// 4 KiB, O_DIRECT and O_DSYNC, forward through a file whose blocks were written before: what one lonely confirm needs.
fn synced_writes(directory: &Path, time: Duration, pace: Duration) -> Result<Histogram<u64>> {
    let path = directory.join("floor.dat");
    let mut file = File::create(&path)?;
    let zeros = vec![0u8; 1024 * 1024];
    for _ in 0..FILE_BYTES / zeros.len() {
        file.write_all(&zeros)?;
    }
    file.sync_all()?;
    drop(file);

    let flags = (OFlags::DIRECT | OFlags::DSYNC).bits() as i32;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(&path)?;
    let buffer = vec![0x5Au8; 2 * BLOCK];
    let aligned = buffer.as_ptr().align_offset(BLOCK);
    let block = &buffer[aligned..aligned + BLOCK];
    let mut offset = 0;
    let taken = repeat(time, pace, || {
        file.write_all_at(block, offset)?;
        offset = (offset + BLOCK as u64) % FILE_BYTES as u64;
        Ok(())
    });
    std::fs::remove_file(&path)?;
    taken
}

/// One way, from the load generator's CPU to the broker's.
fn bulk(cpus: &Cpus) -> Result<f64> {
    let (mut near, mut far) = pair()?;
    std::thread::scope(|scope| {
        let sink = scope.spawn(|| {
            on_cpu(cpus.broker, move || -> std::io::Result<usize> {
                let mut buffer = vec![0; BULK_CHUNK];
                let mut received = 0;
                while received < BULK_BYTES {
                    match far.read(&mut buffer)? {
                        0 => break,
                        count => received += count,
                    }
                }
                Ok(received)
            })
        });
        let started = Instant::now();
        on_cpu(cpus.load, move || -> std::io::Result<()> {
            let chunk = vec![7; BULK_CHUNK];
            for _ in 0..BULK_BYTES / BULK_CHUNK {
                near.write_all(&chunk)?;
            }
            Ok(())
        })??;
        let received = sink.join().map_err(|_| "the sink panicked")???;
        Ok(received as f64 / 1e6 / started.elapsed().as_secs_f64())
    })
}
