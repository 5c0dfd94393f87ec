//! Socket -> requests.
//!
//! Owns: the bytes between the two. One scratch buffer serves all connections of a core: only a frame that has not
//! arrived in full is kept per connection.

use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;

use bytes::{Bytes, BytesMut};
use socket2::SockRef;

use crate::limits;
use crate::protocol::decoder::Decoder;
use crate::protocol::frame::FrameError;
use crate::protocol::request::{Request, RequestKind, Version};

/// The core's read buffer. What was read is cut off its front and lives on in the requests.
#[derive(Debug, Default)]
pub struct Scratch(BytesMut);

/// What one read brought.
#[derive(Debug)]
pub enum Got {
    /// `more`: the buffer was filled, there may be more.
    Bytes {
        bytes: Bytes,
        more: bool,
    },
    Nothing,
    End,
}

impl Scratch {
    /// - `socket`: nonblocking.
    pub fn read(&mut self, mut socket: &TcpStream) -> io::Result<Got> {
        if self.0.len() < READ_MIN {
            self.0 = BytesMut::zeroed(limits::READ_CHUNK);
        }
        loop {
            match socket.read(&mut self.0) {
                Ok(0) => return Ok(Got::End),
                Ok(count) => {
                    let more = count == self.0.len();
                    if count <= SMALL_READ {
                        // v1 clients with Nagle's algorithm wait for our ACK between two small writes (V1 G23).
                        SockRef::from(socket).set_tcp_quickack(true)?;
                        return Ok(Got::Bytes { bytes: Bytes::copy_from_slice(&self.0[..count]), more });
                    }
                    return Ok(Got::Bytes { bytes: self.0.split_to(count).freeze(), more });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Got::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A buffer with less room than this is replaced.
const READ_MIN: usize = 64 * 1024;
/// What is copied out, so that a few bytes do not hold a whole buffer.
const SMALL_READ: usize = 1024;

/// One connection's requests.
#[derive(Debug, Default)]
pub struct Reader {
    decoder: Decoder,
    version: Option<Version>,
}

impl Reader {
    pub fn push(&mut self, bytes: Bytes) {
        self.decoder.push(bytes);
    }

    /// Bytes of a frame that has not arrived in full.
    pub fn held(&self) -> usize {
        self.decoder.buffered()
    }

    /// The next request. HELLO is obeyed here as the shard will obey it: the first good one decides the version.
    ///
    /// - `authenticated`: as the shard has decided; after an AUTH, wait for its decision.
    pub fn next(&mut self, authenticated: bool) -> Result<Option<Request>, FrameError> {
        let request = self.decoder.next(self.version, authenticated)?;
        if let (None, Some(RequestKind::Hello { version })) = (self.version, request.as_ref().map(|r| &r.kind)) {
            self.version = match version {
                1 => Some(Version::V1),
                2 => Some(Version::V2),
                _ => None,
            };
        }
        Ok(request)
    }
}
