//! Optional fields of v2 frames: entries of `u8 tag | u16 length | value`. Unknown tags are skipped, so that fields can
//! be added.
//!
//! Owns: the layout of entries, the tags. Never: knows which value fits which tag (`v2` does).
//! On the wire a block of entries follows its `u16` length; in memory it goes without.

use bytes::Bytes;

use crate::limits::OPTIONS_LEN_MAX;

/// HELLO: who the client says it is, UTF-8.
pub const HELLO_CLIENT_NAME: u8 = 1;

/// WELCOME: UTF-8.
pub const WELCOME_SERVER_NAME: u8 = 1;
/// WELCOME: UTF-8.
pub const WELCOME_SERVER_VERSION: u8 = 2;
/// WELCOME: u32.
pub const WELCOME_FRAME_MAX: u8 = 3;
/// WELCOME: u32.
pub const WELCOME_CREDIT_MAX: u8 = 4;
/// WELCOME: u64, `frame::FEATURE_*`.
pub const WELCOME_FEATURES: u8 = 5;
/// WELCOME: a u16 per core.
pub const WELCOME_CORE_PORTS: u8 = 6;
/// WELCOME: u32 milliseconds.
pub const WELCOME_KEEPALIVE: u8 = 7;

/// PUBLISH: u64 milliseconds; ends at the broker.
pub const TTL: u8 = 1;
/// PUBLISH, DELIVER: 1..=MESSAGE_ID_MAX bytes.
pub const MESSAGE_ID: u8 = 2;
/// PUBLISH: u64 publisher, u64 sequence; ends at the broker.
pub const PUBLISHER: u8 = 3;
/// PUBLISH, DELIVER: u8, 0..=PRIORITY_MAX.
pub const PRIORITY: u8 = 4;
/// PUBLISH: u64 milliseconds; ends at the broker.
pub const DELAY: u8 = 5;
/// PUBLISH, DELIVER: string key, then the value; may be repeated.
pub const HEADER: u8 = 6;
/// PUBLISH, DELIVER: UTF-8.
pub const REPLY_TO: u8 = 7;

/// SUBSCRIBE: 1..=DURABLE_NAME_MAX bytes of UTF-8.
pub const SUBSCRIBE_DURABLE: u8 = 1;
/// SUBSCRIBE: u8, higher first.
pub const SUBSCRIBE_PRIORITY: u8 = 2;
/// SUBSCRIBE: u8, 0 new, 1 earliest.
pub const SUBSCRIBE_START: u8 = 3;
/// SUBSCRIBE: u32 milliseconds, 0 for the broker's default.
pub const SUBSCRIBE_ACK_TIMEOUT: u8 = 4;

/// Bytes of an entry before its value.
pub const ENTRY_HEADER_LEN: usize = 3;

/// Walks entries: `(tag, value)`. Ends early at bytes that are no entry.
#[derive(Clone, Debug)]
pub struct OptionsReader<'a> {
    rest: &'a [u8],
}

impl<'a> OptionsReader<'a> {
    /// - `entries`: without their length field.
    pub fn new(entries: &'a [u8]) -> OptionsReader<'a> {
        OptionsReader { rest: entries }
    }

    /// Do the entries fill the block exactly?
    pub fn is_well_formed(&self) -> bool {
        let mut walk = self.clone();
        walk.by_ref().for_each(drop);
        walk.rest.is_empty()
    }

    /// Bytes not walked yet.
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }
}

impl<'a> Iterator for OptionsReader<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let ([tag, high, low], after) = self.rest.split_first_chunk()?;
        let (value, rest) = after.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        self.rest = rest;
        Some((*tag, value))
    }
}

/// Splits the value of a `HEADER` into key and value. `None`: not a header, or its key is not UTF-8.
pub fn split_header(value: &[u8]) -> Option<(&str, &[u8])> {
    let (len, after) = value.split_first_chunk()?;
    let (key, value) = after.split_at_checked(usize::from(u16::from_be_bytes(*len)))?;
    Some((std::str::from_utf8(key).ok()?, value))
}

/// The entries would be longer than `OPTIONS_LEN_MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("options are longer than {OPTIONS_LEN_MAX} bytes")]
pub struct OptionsTooLong;

/// Writes entries, one after the other.
#[derive(Clone, Debug, Default)]
pub struct OptionsBuilder {
    entries: Vec<u8>,
    too_long: bool,
}

impl OptionsBuilder {
    pub fn new() -> OptionsBuilder {
        OptionsBuilder::default()
    }

    /// Adds entries that are already encoded, without their length field.
    pub fn entries(mut self, entries: &[u8]) -> OptionsBuilder {
        if self.has_room(entries.len()) {
            self.entries.extend_from_slice(entries);
        }
        self
    }

    pub fn bytes(self, tag: u8, value: &[u8]) -> OptionsBuilder {
        self.parts(tag, [value, &[], &[]])
    }

    pub fn u8(self, tag: u8, value: u8) -> OptionsBuilder {
        self.bytes(tag, &[value])
    }

    pub fn u32(self, tag: u8, value: u32) -> OptionsBuilder {
        self.bytes(tag, &value.to_be_bytes())
    }

    pub fn u64(self, tag: u8, value: u64) -> OptionsBuilder {
        self.bytes(tag, &value.to_be_bytes())
    }

    pub fn header(self, key: &str, value: &[u8]) -> OptionsBuilder {
        // A key too long for the cast is too long for the block, too.
        self.parts(HEADER, [&(key.len() as u16).to_be_bytes(), key.as_bytes(), value])
    }

    /// The entries, without their length field.
    pub fn finish(self) -> Result<Bytes, OptionsTooLong> {
        if self.too_long { Err(OptionsTooLong) } else { Ok(Bytes::from(self.entries)) }
    }

    fn parts(mut self, tag: u8, parts: [&[u8]; 3]) -> OptionsBuilder {
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        if self.has_room(ENTRY_HEADER_LEN + len) {
            self.entries.push(tag);
            self.entries.extend_from_slice(&(len as u16).to_be_bytes());
            parts.iter().for_each(|part| self.entries.extend_from_slice(part));
        }
        self
    }

    fn has_room(&mut self, add: usize) -> bool {
        self.too_long |= self.entries.len() + add > OPTIONS_LEN_MAX;
        !self.too_long
    }
}

// A block's length fits its field, and so does any value inside.
const _: () = assert!(OPTIONS_LEN_MAX <= u16::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read() {
        let entries = OptionsBuilder::new()
            .u8(PRIORITY, 9)
            .u64(TTL, 5)
            .header("k", b"v")
            .bytes(200, b"")
            .finish()
            .expect("short");
        let read: Vec<_> = OptionsReader::new(&entries).collect();
        assert_eq!(read, [(PRIORITY, &[9][..]), (TTL, &[0, 0, 0, 0, 0, 0, 0, 5]), (HEADER, b"\0\x01kv"), (200, b"")]);
        assert_eq!(split_header(read[2].1), Some(("k", &b"v"[..])));
    }

    #[test]
    fn a_cut_entry_is_not_well_formed() {
        let entries = OptionsBuilder::new().u8(PRIORITY, 9).u8(PRIORITY, 1).finish().expect("short");
        for cut in 0..=entries.len() {
            assert_eq!(OptionsReader::new(&entries[..cut]).is_well_formed(), cut % 4 == 0, "cut at {cut}");
        }
    }

    #[test]
    fn the_limit_is_exact() {
        let most = OPTIONS_LEN_MAX - ENTRY_HEADER_LEN;
        assert_eq!(OptionsBuilder::new().bytes(9, &vec![0; most]).finish().expect("fits").len(), OPTIONS_LEN_MAX);
        assert_eq!(OptionsBuilder::new().bytes(9, &vec![0; most + 1]).finish(), Err(OptionsTooLong));
        assert_eq!(OptionsBuilder::new().bytes(9, &vec![0; most]).u8(1, 1).finish(), Err(OptionsTooLong));
        assert_eq!(OptionsBuilder::new().header(&"k".repeat(70_000), b"").u8(1, 1).finish(), Err(OptionsTooLong));
    }

    #[test]
    fn bad_headers_are_noticed() {
        assert_eq!(split_header(b""), None);
        assert_eq!(split_header(b"\0\x02k"), None);
        assert_eq!(split_header(b"\0\x01\xff"), None);
        assert_eq!(split_header(b"\0\0"), Some(("", &b""[..])));
    }
}
