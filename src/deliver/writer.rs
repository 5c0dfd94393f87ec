//! Outbox -> socket.

use std::io::{self, ErrorKind, Write};
use std::net::TcpStream;

use crate::deliver::outbox::Outbox;

/// Sends what the kernel takes without waiting. Returns the bytes sent; what is left stays in `outbox`.
///
/// - `socket`: nonblocking.
pub fn flush(mut socket: &TcpStream, outbox: &mut Outbox) -> io::Result<usize> {
    let mut total = 0;
    loop {
        let front = outbox.front();
        if front.is_empty() {
            outbox.shrink();
            return Ok(total);
        }
        match socket.write(front) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(sent) => {
                outbox.advance(sent);
                total += sent;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(total),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
