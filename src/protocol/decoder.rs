//! However the byte stream is split, the same requests come out.
//!
//! Owns: bytes that arrived and were not given out yet. Never: allocates what a length field merely claims.
//! A frame that lies whole in one pushed chunk is given out as slices of it; only a frame that chunks cut is copied.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use crate::limits::{FRAME_LEN_MAX, FRAME_LEN_MAX_BEFORE_AUTH, FRAME_LEN_MIN};
use crate::protocol::frame::{self, FrameError, HEADER_LEN, LENGTH_LEN};
use crate::protocol::request::{Request, Version};
use crate::protocol::{v1, v2};

/// One connection's requests.
#[derive(Debug, Default)]
pub struct Decoder {
    frames: FrameBuffer,
}

impl Decoder {
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes what was read from the socket. Call `next` until it returns `Ok(None)` before reading again, so that not more
    /// than one frame is kept.
    pub fn push(&mut self, bytes: Bytes) {
        self.frames.push(bytes);
    }

    /// The next request that is there as a whole.
    ///
    /// - `version`: `None` before HELLO. A HELLO must therefore be obeyed before `next` is called again.
    /// - `authenticated`: likewise; before it, only short frames are let in.
    /// - `Err`: the connection is lost; all requests before the bad frame have come out. Nothing is taken: called again with
    ///   the same arguments it says the same.
    pub fn next(&mut self, version: Option<Version>, authenticated: bool) -> Result<Option<Request>, FrameError> {
        let len_max = if authenticated { FRAME_LEN_MAX } else { FRAME_LEN_MAX_BEFORE_AUTH };
        let frame = self.frames.next(len_max, |frame_type| frame::is_request(version, frame_type))?;
        Ok(frame.map(|Frame { frame_type, cid, payload }| {
            let kind = match version {
                None | Some(Version::V1) => v1::request(frame_type, cid, payload),
                Some(Version::V2) => v2::request(frame_type, payload),
            };
            Request { cid, kind }
        }))
    }

    /// Bytes that were pushed and not given out.
    pub fn buffered(&self) -> usize {
        self.frames.buffered()
    }
}

/// One frame, its header taken apart.
#[derive(Debug)]
pub(crate) struct Frame {
    pub frame_type: u8,
    pub cid: u64,
    pub payload: Bytes,
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub(crate) struct FrameBuffer {
    /// A frame that ran over the end of its chunk; goes before `chunks`.
    partial: Vec<u8>,
    /// None of them empty.
    chunks: VecDeque<Bytes>,
}

impl FrameBuffer {
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.chunks.push_back(bytes);
        }
    }

    pub fn buffered(&self) -> usize {
        self.partial.len() + self.chunks.iter().map(Bytes::len).sum::<usize>()
    }

    /// - `len_max`: largest value of the length field.
    /// - `known`: asked about the type of a frame that is there as a whole.
    pub fn next(&mut self, len_max: u32, known: impl Fn(u8) -> bool) -> Result<Option<Frame>, FrameError> {
        while self.partial.is_empty() {
            let Some(chunk) = self.chunks.front_mut() else { return Ok(None) };
            match frame_end(chunk, len_max)? {
                Some(end) if end <= chunk.len() => {
                    check_type(chunk, known)?;
                    let frame = take_apart(chunk.split_to(end));
                    if chunk.is_empty() {
                        self.chunks.pop_front();
                    }
                    return Ok(Some(frame));
                }
                // Copied, so that a few bytes of an idle connection do not keep a large chunk alive.
                _ => self.fill_partial(usize::MAX),
            }
        }
        loop {
            let end = frame_end(&self.partial, len_max)?;
            if end == Some(self.partial.len()) {
                check_type(&self.partial, known)?;
                return Ok(Some(take_apart(Bytes::from(std::mem::take(&mut self.partial)))));
            }
            if self.chunks.is_empty() {
                return Ok(None);
            }
            self.fill_partial(end.unwrap_or(LENGTH_LEN));
        }
    }

    /// Moves bytes of the first chunk into `partial`, until that is `end` long or the chunk is used up.
    fn fill_partial(&mut self, end: usize) {
        let chunk = self.chunks.front_mut().expect("the caller looked");
        let add = chunk.len().min(end - self.partial.len());
        if self.partial.capacity() - self.partial.len() < add {
            // Doubling, but not beyond the frame. Never more than twice what really arrived.
            let wanted = (self.partial.capacity() * 2).min(end).max(self.partial.len() + add);
            self.partial.reserve_exact(wanted - self.partial.len());
        }
        self.partial.extend_from_slice(&chunk[..add]);
        chunk.advance(add);
        if chunk.is_empty() {
            self.chunks.pop_front();
        }
    }
}

/// Where the frame at the start of `bytes` ends. `None`: its length is not there yet.
fn frame_end(bytes: &[u8], len_max: u32) -> Result<Option<usize>, FrameError> {
    let Some(len) = bytes.first_chunk::<LENGTH_LEN>() else { return Ok(None) };
    let len = u32::from_be_bytes(*len);
    if !(FRAME_LEN_MIN..=len_max).contains(&len) {
        return Err(FrameError::Length { len, max: len_max });
    }
    Ok(Some(LENGTH_LEN + len as usize))
}

fn check_type(frame: &[u8], known: impl Fn(u8) -> bool) -> Result<(), FrameError> {
    let frame_type = frame[LENGTH_LEN];
    if known(frame_type) { Ok(()) } else { Err(FrameError::UnknownType { frame_type }) }
}

/// - `frame`: whole, so that it has a header.
fn take_apart(mut frame: Bytes) -> Frame {
    let header: &[u8; HEADER_LEN] = frame.first_chunk().expect("a frame is no shorter than FRAME_LEN_MIN");
    let [_, _, _, _, frame_type, cid @ ..] = *header;
    frame.advance(HEADER_LEN);
    Frame { frame_type, cid: u64::from_be_bytes(cid), payload: frame }
}

/// Takes `u16 length | UTF-8` and returns the text.
pub(crate) fn string(payload: &mut Bytes) -> Option<Bytes> {
    let len = usize::from(payload.try_get_u16().ok()?);
    if len > payload.len() {
        return None;
    }
    let text = payload.split_to(len);
    std::str::from_utf8(&text).ok()?;
    Some(text)
}
