//! Bytes from anybody: whatever the split, the same requests come out, and no byte makes the decoder panic.
//!
//! The first byte chooses dialect and state, the second the size of the pieces; the rest is the stream.

#![no_main]

use blipmq::protocol::client_side::{ReplyDecoder, encode_request};
use blipmq::protocol::decoder::Decoder;
use blipmq::protocol::frame::FrameError;
use blipmq::protocol::request::{Request, RequestKind, Version};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [state, piece, stream @ ..] = input else { return };
    let version = [None, Some(Version::V1), Some(Version::V2), Some(Version::V2)][usize::from(state & 3)];
    let authenticated = state & 4 != 0;

    let whole = decode(version, authenticated, [stream]);
    let pieces = decode(version, authenticated, stream.chunks(usize::from(*piece).max(1)));
    assert_eq!(whole, pieces);

    // What was understood can be said again, and means the same.
    for request in whole.0 {
        let version = version.unwrap_or(Version::V1);
        let mut again = Vec::new();
        if !matches!(request.kind, RequestKind::Malformed(_)) && encode_request(&request, version, &mut again).is_ok() {
            assert_eq!(decode(Some(version), true, [&again[..]]).0, [request]);
        }
    }

    let mut replies = ReplyDecoder::new(version.unwrap_or(Version::V1));
    replies.push(Bytes::copy_from_slice(stream));
    while let Ok(Some(_)) = replies.next_reply() {}
});

fn decode<'a>(
    version: Option<Version>,
    authenticated: bool,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Request>, Result<(), FrameError>) {
    let mut decoder = Decoder::new();
    let mut requests = Vec::new();
    for piece in pieces {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next(version, authenticated) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(error) => return (requests, Err(error)),
            }
        }
    }
    (requests, Ok(()))
}
