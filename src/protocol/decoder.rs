//! However the byte stream is split, the same requests come out.
//!
//! Owns: bytes that arrived and were not given out yet. Never: allocates what a length field merely claims.
//! A frame that lies whole in one pushed chunk is given out as slices of it; only a frame that chunks cut is copied.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use crate::limits::{FRAME_LEN_MAX, FRAME_LEN_MAX_BEFORE_AUTH, FRAME_LEN_MIN};
use crate::planted::planted;
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

    /// Takes what was read from the socket. Call `next` until it returns `Ok(None)` before reading again, so that not
    /// more than one frame is kept.
    pub fn push(&mut self, bytes: Bytes) {
        self.frames.push(bytes);
    }

    /// The next request that is there as a whole.
    ///
    /// - `version`: `None` before HELLO. A HELLO must therefore be obeyed before `next` is called again.
    /// - `authenticated`: likewise; before it, only short frames are let in.
    /// - `Err`: the connection is lost; all requests before the bad frame have come out. Nothing is taken: called again
    ///   with the same arguments it says the same.
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
            self.fill_partial(if planted!(FrameSwallowed) { usize::MAX } else { end.unwrap_or(LENGTH_LEN) });
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
    if !(FRAME_LEN_MIN..=len_max).contains(&len) && !planted!(AnyLength) {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::protocol::client_side::encode_request;
    use crate::protocol::request::{RequestKind, TopicRef};
    use crate::protocol::strategies;

    /// All requests of `chunks`, and how the stream ended.
    fn drain<'a>(
        version: Version,
        chunks: impl IntoIterator<Item = &'a [u8]>,
        eager: bool,
    ) -> (Vec<Request>, Result<usize, FrameError>) {
        let mut decoder = Decoder::new();
        let mut requests = Vec::new();
        let mut take = |decoder: &mut Decoder| loop {
            match decoder.next(Some(version), true) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => return Ok(()),
                Err(error) => {
                    assert_eq!(decoder.next(Some(version), true), Err(error), "an error lasts");
                    return Err(error);
                }
            }
        };
        for chunk in chunks {
            decoder.push(Bytes::copy_from_slice(chunk));
            if eager && let Err(error) = take(&mut decoder) {
                return (requests, Err(error));
            }
        }
        let end = take(&mut decoder);
        let buffered = decoder.buffered();
        (requests, end.map(|()| buffered))
    }

    fn cut<'a>(stream: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        at.extend([0, stream.len()]);
        at.sort_unstable();
        at.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
    }

    fn version() -> impl Strategy<Value = Version> {
        prop_oneof![Just(Version::V1), Just(Version::V2)]
    }

    fn stream() -> impl Strategy<Value = (Version, Vec<Request>)> {
        version()
            .prop_flat_map(|version| (Just(version), proptest::collection::vec(strategies::request(version), 1..8)))
    }

    /// What may follow the last good frame.
    fn ending() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            3 => Just(Vec::new()),
            1 => Just(frame::header(0x7f, 1, 0).to_vec()), // unknown type
            1 => Just(vec![0, 0, 0, 8]),                   // too short
            1 => Just(vec![1, 0, 0, 1]),                   // too long
            1 => Just(vec![0, 0, 0, 9, 7]),                // not finished
        ]
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_requests(
            (version, requests) in stream(),
            ending in ending(),
            cuts in proptest::collection::vec(any::<Index>(), 0..12),
            eager in any::<bool>(),
        ) {
            let mut bytes = Vec::new();
            for request in &requests {
                encode_request(request, version, &mut bytes).expect("encodable");
            }
            bytes.extend_from_slice(&ending);
            let whole = drain(version, [&bytes[..]], true);
            prop_assert_eq!(&whole.0, &requests, "round trip");
            prop_assert_eq!(&drain(version, cut(&bytes, &cuts), eager), &whole);
            prop_assert_eq!(&drain(version, bytes.chunks(1), eager), &whole, "byte at a time");
            match whole.1 {
                Ok(buffered) => prop_assert_eq!(buffered, ending.len()),
                Err(_) => prop_assert!(!ending.is_empty()),
            }
        }

        #[test]
        fn garbage_never_panics(bytes: Vec<u8>, version in version(), cuts: [Index; 3]) {
            drain(version, cut(&bytes, &cuts), true).1.ok();
        }

        #[test]
        fn garbage_in_a_good_frame_gives_one_request(
            frame_type in 0..=0x1fu8,
            cid: u64,
            payload in proptest::collection::vec(prop_oneof![0..4u8, any::<u8>()], 0..60),
            version in version(),
        ) {
            let bytes = [&frame::header(frame_type, cid, payload.len())[..], &payload].concat();
            let (requests, end) = drain(version, [&bytes[..]], true);
            if frame::is_request(Some(version), frame_type) {
                prop_assert_eq!(end, Ok(0));
                prop_assert_eq!(requests.len(), 1);
                prop_assert_eq!(requests[0].cid, cid);
            } else {
                prop_assert_eq!(end, Err(FrameError::UnknownType { frame_type }));
            }
        }
    }

    #[test]
    fn a_length_is_judged_as_soon_as_it_is_there() {
        let next = |len: u32, authenticated| {
            let mut decoder = Decoder::new();
            decoder.push(Bytes::copy_from_slice(&len.to_be_bytes()[..3]));
            assert_eq!(decoder.next(None, authenticated), Ok(None));
            decoder.push(Bytes::copy_from_slice(&len.to_be_bytes()[3..]));
            decoder.next(None, authenticated)
        };
        for len in [0, 8, FRAME_LEN_MAX + 1, u32::MAX] {
            assert_eq!(next(len, true), Err(FrameError::Length { len, max: FRAME_LEN_MAX }));
        }
        let max = FRAME_LEN_MAX_BEFORE_AUTH;
        for len in [0, 8, max + 1, FRAME_LEN_MAX] {
            assert_eq!(next(len, false), Err(FrameError::Length { len, max }));
        }
        for (len, authenticated) in [(9, false), (max, false), (max + 1, true), (FRAME_LEN_MAX, true)] {
            assert_eq!(next(len, authenticated), Ok(None));
        }
    }

    #[test]
    fn an_unknown_type_is_judged_when_the_frame_is_whole() {
        for frame_type in [0x00, 0x0a, 0x13, 0xff] {
            let bytes = frame::header(frame_type, 1, 1);
            let mut decoder = Decoder::new();
            decoder.push(Bytes::copy_from_slice(&frame::header(frame::PING, 5, 0)));
            decoder.push(Bytes::copy_from_slice(&bytes));
            assert_eq!(decoder.next(None, false), Ok(Some(Request { cid: 5, kind: RequestKind::Ping })));
            assert_eq!(decoder.next(None, false), Ok(None));
            decoder.push(Bytes::from_static(b"x"));
            assert_eq!(decoder.next(None, false), Err(FrameError::UnknownType { frame_type }));
        }
    }

    #[test]
    fn the_largest_frame_is_let_in_and_memory_follows_what_arrived() {
        let payload = FRAME_LEN_MAX as usize - FRAME_LEN_MIN as usize;
        let mut decoder = Decoder::new();
        decoder.push(Bytes::copy_from_slice(&frame::header(frame::PING, 3, payload)));
        assert_eq!(decoder.next(None, true), Ok(None));
        let chunk = Bytes::from(vec![0; 100_000]);
        let mut sent = HEADER_LEN;
        while sent < HEADER_LEN + payload {
            assert!(decoder.frames.partial.capacity() <= 2 * sent, "{} kept", decoder.frames.partial.capacity());
            let part = chunk.slice(..chunk.len().min(HEADER_LEN + payload - sent));
            sent += part.len();
            decoder.push(part);
            if sent < HEADER_LEN + payload {
                assert_eq!(decoder.next(None, true), Ok(None));
                assert_eq!(decoder.buffered(), sent);
            }
        }
        decoder.push(Bytes::copy_from_slice(&frame::header(frame::PING, 4, 0)));
        for cid in [3, 4] {
            assert_eq!(decoder.next(None, true), Ok(Some(Request { cid, kind: RequestKind::Ping })));
        }
        assert_eq!(decoder.buffered(), 0);
        assert_eq!(decoder.frames.partial.capacity(), 0, "an idle connection keeps nothing");
    }

    #[test]
    fn whole_frames_are_slices_and_tails_are_copies() {
        let publish = [&frame::header(frame::V1_PUBLISH, 1, 9)[..], b"\x01\0\x04demohi"].concat();
        let chunk = Bytes::from([&publish[..], &publish, &publish[..5]].concat());
        let inside = |bytes: &Bytes| chunk.as_ptr_range().contains(&bytes.as_ptr());
        let mut decoder = Decoder::new();
        decoder.push(chunk.clone());
        for _ in 0..2 {
            let Ok(Some(Request { kind: RequestKind::Publish(publish), .. })) = decoder.next(None, true) else {
                panic!("a publish")
            };
            let TopicRef::Name(topic) = publish.topic else { panic!("by name") };
            assert!(inside(&topic) && inside(&publish.payload));
            assert_eq!((&topic[..], &publish.payload[..]), (&b"demo"[..], &b"hi"[..]));
        }
        assert_eq!(decoder.next(None, true), Ok(None));
        assert_eq!(decoder.buffered(), 5);
        assert!(chunk.is_unique(), "the tail does not keep the chunk alive");

        // Also a frame that ends where its chunk ends.
        let chunk = Bytes::from(publish);
        let inside = |bytes: &Bytes| chunk.as_ptr_range().contains(&bytes.as_ptr());
        let mut decoder = Decoder::new();
        decoder.push(chunk.clone());
        let publish = decoder.next(None, true).expect("a good frame").expect("the whole frame");
        assert!(matches!(publish.kind, RequestKind::Publish(publish) if inside(&publish.payload)));
    }

    #[test]
    fn the_version_is_asked_for_every_frame() {
        let mut bytes = Vec::new();
        for kind in [RequestKind::Hello { version: 2 }, RequestKind::Auth { key: Bytes::from_static(b"k") }] {
            encode_request(&Request { cid: 1, kind }, Version::V2, &mut bytes).expect("encodable");
        }
        bytes.extend_from_slice(&frame::header(frame::UNSUBSCRIBE, 2, 9));
        bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x01\0");
        let mut decoder = Decoder::new();
        decoder.push(bytes.into());
        assert!(matches!(decoder.next(None, false), Ok(Some(Request { kind: RequestKind::Hello { version: 2 }, .. }))));
        assert!(matches!(
            decoder.next(Some(Version::V2), false),
            Ok(Some(Request { kind: RequestKind::Auth { .. }, .. }))
        ));
        let unsubscribe = decoder.next(Some(Version::V2), true);
        assert!(matches!(unsubscribe, Ok(Some(Request { kind: RequestKind::Unsubscribe { .. }, .. }))));
    }
}
