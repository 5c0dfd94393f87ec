//! Bytes from a broker that may be anybody: the client's decoder, both dialects. Slicing makes no difference, nothing panics,
//! and what was understood can be said again.
//!
//! The first byte chooses the dialect, the second the slicing; the rest is the stream.

use blipmq::protocol::client_side::{ReplyDecoder, ReplyError};
use blipmq::protocol::encode::encode;
use blipmq::protocol::reply::Reply;
use blipmq::protocol::request::Version;
use bytes::Bytes;

use super::frame_decode::slices;
use super::memory;

/// A broker names no more ports than it has cores; more would not fit WELCOME's options again.
const PORTS_MAX: usize = 1_024;

pub fn run(input: &[u8]) {
    let [dialect, slicing, stream @ ..] = input else { return };
    let version = if dialect & 1 == 0 { Version::V2 } else { Version::V1 };
    let (whole, ending) = decode(version, [stream]);
    let sliced = decode(version, slices(stream, *slicing));
    assert_eq!((&whole, ending), (&sliced.0, sliced.1), "slicing makes a difference");

    for reply in whole {
        if matches!(&reply, Reply::Welcome { welcome, .. } if welcome.ports.len() > PORTS_MAX) {
            continue;
        }
        if let Reply::Deliver(deliver) = &reply {
            let body = &deliver.body;
            assert_eq!(2 + body.options().len() + body.payload().len(), body.0.len());
        }
        let mut again = Vec::new();
        encode(&reply, version, &mut again);
        assert_eq!(decode(version, [&again[..]]), (vec![reply], Ok(())));
    }

    memory::within(8 * 1024 + 6 * stream.len(), || {
        let mut decoder = ReplyDecoder::new(version);
        for slice in slices(stream, *slicing) {
            decoder.push(Bytes::copy_from_slice(slice));
            while let Ok(Some(_)) = decoder.next_reply() {}
        }
    });
}

fn decode<'a>(version: Version, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Reply>, Result<(), ReplyError>) {
    let mut decoder = ReplyDecoder::new(version);
    let mut replies = Vec::new();
    for piece in pieces {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next_reply() {
                Ok(Some(reply)) => replies.push(reply),
                Ok(None) => break,
                Err(error) => return (replies, Err(error)),
            }
        }
    }
    (replies, Ok(()))
}
