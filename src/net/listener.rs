//! This core's listening sockets. Every core has its own on the same port; the kernel spreads connections over them.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use crate::limits;

/// Connections the kernel holds for us until we accept them.
const BACKLOG: i32 = 4096;

/// A nonblocking listener on `addr`, shared between cores by SO_REUSEPORT.
///
/// Another process of the same user could share it, too; `claim` finds that out first.
pub fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Fails if anybody listens on `addr` already. SO_REUSEPORT alone would let two brokers share a port, and clients would
/// reach one or the other by chance.
pub fn claim(addr: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(1)
}

/// When a peer that says nothing, or takes nothing, is given up by the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// An idle connection is probed after this: the only sign of life v1 has. Zero: the kernel's own.
    pub keepalive: Duration,
    /// Zero: the kernel's own.
    pub user_timeout: Duration,
}

/// What every accepted connection gets.
pub fn set_up(stream: &TcpStream, patience: Patience) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(limits::SOCKET_UNSENT_MAX)?;
    let probes = match patience.keepalive {
        Duration::ZERO => TcpKeepalive::new(),
        // The kernel counts in seconds. Three probes unanswered, as with pings, unless the user timeout comes first.
        idle => {
            let idle = idle.max(Duration::from_secs(1));
            TcpKeepalive::new().with_time(idle).with_interval(idle).with_retries(3)
        }
    };
    socket.set_tcp_keepalive(&probes)?;
    if !patience.user_timeout.is_zero() {
        socket.set_tcp_user_timeout(Some(patience.user_timeout))?;
    }
    Ok(())
}
