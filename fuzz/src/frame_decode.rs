//! Bytes from anybody: whatever the slicing, the same requests come out, no byte makes the decoder panic, and no claimed length
//! makes it allocate.
//!
//! The first byte chooses dialect and state, the second the slicing; the rest is the stream.

use blipmq::limits::{FRAME_LEN_MAX, FRAME_LEN_MAX_BEFORE_AUTH};
use blipmq::protocol::client_side::encode_request;
use blipmq::protocol::decoder::Decoder;
use blipmq::protocol::frame::FrameError;
use blipmq::protocol::request::{Request, RequestKind, Version};
use bytes::Bytes;

use super::memory;

pub fn run(input: &[u8]) {
    let [state, slicing, stream @ ..] = input else { return };
    let version = [None, Some(Version::V1), Some(Version::V2), Some(Version::V2)][usize::from(state & 3)];
    let authenticated = state & 4 != 0;
    // The reader hands over what it read and asks until there is no more; the decoder must not count on that.
    let lazy = state & 8 != 0;

    let (whole, ending) = decode(version, authenticated, false, [stream]);
    let sliced = decode(version, authenticated, lazy, slices(stream, *slicing));
    assert_eq!((&whole, ending), (&sliced.0, sliced.1), "slicing makes a difference");

    if let Err(FrameError::Length { len, max }) = ending {
        let most = if authenticated { FRAME_LEN_MAX } else { FRAME_LEN_MAX_BEFORE_AUTH };
        assert!(max == most && !(9..=most).contains(&len));
    }
    // What was understood can be said again, and means the same.
    for request in whole {
        let version = version.unwrap_or(Version::V1);
        let mut again = Vec::new();
        if matches!(request.kind, RequestKind::Malformed(_)) {
            continue;
        }
        match encode_request(&request, version, &mut again) {
            Ok(()) => assert_eq!(decode(Some(version), true, false, [&again[..]]).0, [request]),
            Err(error) => panic!("{request:?} was understood and cannot be said: {error}"),
        }
    }
    bounded(version, authenticated, stream, *slicing);
}

/// Nothing is kept here, so what is allocated is the decoder's: never more than twice what really arrived.
fn bounded(version: Option<Version>, authenticated: bool, stream: &[u8], slicing: u8) {
    memory::within(8 * 1024 + 4 * stream.len(), || {
        let mut decoder = Decoder::new();
        for slice in slices(stream, slicing) {
            decoder.push(Bytes::copy_from_slice(slice));
            loop {
                match decoder.next(version, authenticated) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        assert_eq!(decoder.next(version, authenticated), Err(error), "an error lasts");
                        return;
                    }
                }
            }
            assert!(decoder.buffered() <= stream.len());
        }
    });
}

/// Pieces of changing sizes: up to 16 in a row of the same small size, then a longer one.
pub(super) fn slices(stream: &[u8], slicing: u8) -> impl Iterator<Item = &[u8]> {
    let (small, every, long) = (usize::from(slicing & 7) + 1, usize::from(slicing >> 3 & 7) + 1, 64 << (slicing >> 6));
    let mut rest = stream;
    let mut nth = 0;
    std::iter::from_fn(move || {
        nth += 1;
        let len = if nth % every == 0 { long } else { small };
        let (slice, after) = rest.split_at(len.min(rest.len()));
        rest = after;
        (!slice.is_empty()).then_some(slice)
    })
}

fn decode<'a>(
    version: Option<Version>,
    authenticated: bool,
    lazy: bool,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Request>, Result<(), FrameError>) {
    let mut decoder = Decoder::new();
    let mut requests = Vec::new();
    let mut take = |decoder: &mut Decoder| loop {
        match decoder.next(version, authenticated) {
            Ok(Some(request)) => requests.push(request),
            Ok(None) => return Ok(()),
            Err(error) => return Err(error),
        }
    };
    for (nth, piece) in pieces.into_iter().enumerate() {
        decoder.push(Bytes::copy_from_slice(piece));
        if (!lazy || nth % 3 == 2)
            && let Err(error) = take(&mut decoder)
        {
            return (requests, Err(error));
        }
    }
    let end = take(&mut decoder);
    (requests, end)
}
