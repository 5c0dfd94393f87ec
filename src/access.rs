//! Who may log in, and what each API key may do.
//!
//! Owns: keys (as hashes, never in the clear), their permissions, the constant-time comparison.
//! Never: reads a file, makes a key up, prints one. The config says which keys exist.

use crate::limits;
use crate::wal::record::KeyId;
use sha2::{Digest, Sha256};
use std::fmt;
use std::sync::Arc;
use subtle::{ConditionallySelectable, ConstantTimeEq};

/// The SHA-256 of an API key: all the broker keeps of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyDigest([u8; 32]);

/// Why a text of the configuration is no API key. Says nothing about the text itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadKey {
    #[error("an API key must not be empty")]
    Empty,
    #[error("an API key has at most {} bytes", limits::API_KEY_LEN_MAX)]
    TooLong,
    #[error("\"sha256:\" must be followed by exactly 64 hex digits")]
    BadHash,
}

impl KeyDigest {
    /// Hashes a key in the clear.
    pub fn of(key: &[u8]) -> KeyDigest {
        KeyDigest(Sha256::digest(key).into())
    }

    /// A key as an operator writes it: in the clear, or `sha256:` and the hash in hex.
    pub fn from_setting(text: &str) -> Result<KeyDigest, BadKey> {
        if let Some(hex) = text.strip_prefix("sha256:") {
            return parse_hex(hex.as_bytes()).map(KeyDigest).ok_or(BadKey::BadHash);
        }
        match text.len() {
            0 => Err(BadKey::Empty),
            n if n > limits::API_KEY_LEN_MAX => Err(BadKey::TooLong),
            _ => Ok(KeyDigest::of(text.as_bytes())),
        }
    }

    /// The name the log knows the key by.
    pub fn id(&self) -> KeyId {
        let mut id = [0; 16];
        id.copy_from_slice(&self.0[..16]);
        KeyId(id)
    }
}

/// The hash of a weak key is enough to guess it.
impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyDigest(hidden)")
    }
}

fn parse_hex(hex: &[u8]) -> Option<[u8; 32]> {
    let digit = |c: u8| char::from(c).to_digit(16);
    let mut bytes = [0; 32];
    if hex.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

/// Which topics a key may use one way: exact names, or patterns in which `*` stands for any bytes, none included.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Patterns {
    sources: Vec<String>,
    /// One of them is `*`: nothing needs to be matched.
    all: bool,
}

/// Why a list of topic patterns is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadPattern {
    #[error("a topic pattern must not be empty; \"*\" is every topic")]
    Empty,
    #[error("a topic pattern has at most {} bytes", limits::PATTERN_LEN_MAX)]
    TooLong,
    #[error("a key has at most {} topic patterns each way", limits::PATTERNS_PER_KEY_MAX)]
    TooMany,
}

impl Patterns {
    pub fn new(sources: Vec<String>) -> Result<Patterns, BadPattern> {
        if sources.len() > limits::PATTERNS_PER_KEY_MAX {
            return Err(BadPattern::TooMany);
        }
        for source in &sources {
            match source.len() {
                0 => return Err(BadPattern::Empty),
                n if n > limits::PATTERN_LEN_MAX => return Err(BadPattern::TooLong),
                _ => {}
            }
        }
        let all = sources.iter().any(|source| source.bytes().all(|b| b == b'*'));
        Ok(Patterns { sources, all })
    }

    /// Every topic.
    pub fn all() -> Patterns {
        Patterns { sources: vec!["*".into()], all: true }
    }

    /// No topic is allowed.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// As the operator wrote them.
    pub fn sources(&self) -> &[String] {
        &self.sources
    }

    pub fn allow(&self, topic: &[u8]) -> bool {
        self.all || self.sources.iter().any(|pattern| glob(pattern.as_bytes(), topic))
    }
}

impl fmt::Debug for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sources.fmt(f)
    }
}

/// Between two stars the leftmost place is always as good as any later one, so nothing is ever tried twice:
/// at worst pattern length times topic length comparisons.
fn glob(pattern: &[u8], topic: &[u8]) -> bool {
    let mut parts = pattern.split(|b| *b == b'*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = topic.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty(); // no star at all
    };
    for part in parts.filter(|part| !part.is_empty()) {
        let Some(at) = rest.windows(part.len()).position(|window| window == part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// One API key and what it may do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyEntry {
    pub digest: KeyDigest,
    /// For logs and statistics; unique in a ring.
    pub name: String,
    pub publish: Patterns,
    pub subscribe: Patterns,
    /// May delete topics, list, drain.
    pub admin: bool,
}

impl KeyEntry {
    /// A key that may do everything: those of `allowed_api_keys`.
    pub fn unrestricted(digest: KeyDigest, name: String) -> KeyEntry {
        KeyEntry { digest, name, publish: Patterns::all(), subscribe: Patterns::all(), admin: true }
    }
}

/// What one logged-in connection may do. Cheap to clone.
#[derive(Clone)]
pub struct Grant(Arc<KeyEntry>);

impl Grant {
    pub fn key(&self) -> KeyId {
        self.0.digest.id()
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn is_admin(&self) -> bool {
        self.0.admin
    }

    /// A flag test for a key without restrictions; otherwise the patterns are matched, so callers on the hot path
    /// keep the answer per topic.
    pub fn may_publish(&self, topic: &[u8]) -> bool {
        self.0.publish.allow(topic)
    }

    /// As `may_publish`.
    pub fn may_subscribe(&self, topic: &[u8]) -> bool {
        self.0.subscribe.allow(topic)
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Grant({})", self.0.name)
    }
}

/// All keys of this run. Fixed for the life of the process; clones share it.
#[derive(Clone, Debug, Default)]
pub struct KeyRing(Arc<[Grant]>);

impl KeyRing {
    /// The config has checked that hashes and names are unique.
    pub fn new(entries: Vec<KeyEntry>) -> KeyRing {
        assert!(entries.len() <= limits::API_KEYS_MAX, "more API keys than the config allows");
        KeyRing(entries.into_iter().map(|entry| Grant(Arc::new(entry))).collect())
    }

    /// The rights of the key a client presented. Takes the same time whichever key it is like, and however much:
    /// both sides are hashes, every entry is compared in full, and the match is selected without a branch.
    pub fn authenticate(&self, presented: &[u8]) -> Option<Grant> {
        let digest = KeyDigest::of(presented);
        let mut found = u32::MAX;
        for (index, grant) in (0u32..).zip(self.0.iter()) {
            found.conditional_assign(&index, grant.0.digest.0.ct_eq(&digest.0));
        }
        self.0.get(found as usize).cloned()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(list: &[&str]) -> Patterns {
        Patterns::new(list.iter().map(|s| s.to_string()).collect()).unwrap()
    }

    #[test]
    fn a_key_is_the_same_in_the_clear_and_as_a_hash() {
        let hash = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
        assert_eq!(KeyDigest::from_setting(hash), Ok(KeyDigest::of(b"foo")));
        assert_eq!(KeyDigest::from_setting(&hash.to_uppercase().replace("SHA", "sha")), Ok(KeyDigest::of(b"foo")));
        assert_eq!(KeyDigest::from_setting("foo"), Ok(KeyDigest::of(b"foo")));
        assert_eq!(KeyDigest::of(b"foo").id().0[..4], [0x2c, 0x26, 0xb4, 0x6b]);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        assert_eq!(KeyDigest::from_setting(""), Err(BadKey::Empty));
        assert_eq!(KeyDigest::from_setting("sha256:12"), Err(BadKey::BadHash));
        assert_eq!(KeyDigest::from_setting(&format!("sha256:{}", "x".repeat(64))), Err(BadKey::BadHash));
        assert_eq!(KeyDigest::from_setting(&format!("sha256:{}", "é".repeat(32))), Err(BadKey::BadHash));
        assert_eq!(KeyDigest::from_setting(&"k".repeat(limits::API_KEY_LEN_MAX + 1)), Err(BadKey::TooLong));
    }

    #[test]
    fn only_a_known_key_logs_in_and_gets_its_own_rights() {
        let hashed = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
        let ring = KeyRing::new(vec![
            KeyEntry::unrestricted(KeyDigest::of(b"root"), "root".into()),
            KeyEntry {
                digest: KeyDigest::from_setting(hashed).unwrap(),
                name: "sensor".into(),
                publish: patterns(&["readings.*"]),
                subscribe: Patterns::default(),
                admin: false,
            },
            KeyEntry::unrestricted(KeyDigest::of(b"last"), "last".into()),
        ]);
        let root = ring.authenticate(b"root").unwrap();
        assert!(root.is_admin() && root.may_publish(b"any") && root.may_subscribe(b"any"));
        let sensor = ring.authenticate(b"foo").unwrap();
        assert_eq!((sensor.name(), sensor.key()), ("sensor", KeyDigest::of(b"foo").id()));
        assert!(sensor.may_publish(b"readings.7") && !sensor.may_publish(b"orders"));
        assert!(!sensor.may_subscribe(b"readings.7") && !sensor.is_admin());
        assert_eq!(ring.authenticate(b"last").unwrap().name(), "last");
        for wrong in [&b""[..], b"roo", b"root ", b"Root", hashed.as_bytes(), b"\xff\x00"] {
            assert!(ring.authenticate(wrong).is_none(), "{wrong:?}");
        }
        assert!(KeyRing::default().authenticate(b"").is_none());
    }

    #[test]
    fn debug_output_holds_no_key() {
        let entry = KeyEntry::unrestricted(KeyDigest::of(b"foo"), "name".into());
        let ring = KeyRing::new(vec![entry.clone()]);
        let text = format!("{entry:?} {ring:?} {:?}", ring.authenticate(b"foo"));
        assert!(!text.contains("foo") && !text.contains("2c26") && !text.contains("44, 38"), "{text}");
    }

    #[test]
    fn a_pattern_matches_the_whole_topic() {
        let cases = [
            ("orders", "orders", true),
            ("orders", "orders2", false),
            ("orders", "order", false),
            ("orders*", "orders", true),
            ("orders.*", "orders.eu.new", true),
            ("orders.*", "orders", false),
            ("*.dlq", "orders.dlq", true),
            ("*.dlq", "orders.dlqs", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "a--b--b--c", true),
            ("a*b*c", "acb", false),
            ("ab*ba", "aba", false),
            ("*ab*ab*", "abab", true),
            ("*ab*ab*", "aab", false),
            ("**", "", true),
            ("a**z", "az", true),
        ];
        for (pattern, topic, want) in cases {
            assert_eq!(patterns(&[pattern]).allow(topic.as_bytes()), want, "{pattern} on {topic}");
        }
        assert!(patterns(&["caf*"]).allow(b"caf\xff"), "topics are bytes");
        assert!(!Patterns::default().allow(b"x"));
        assert!(patterns(&["x", "*"]).allow(b"anything"));
    }

    #[test]
    fn bad_patterns_are_refused() {
        assert_eq!(Patterns::new(vec![String::new()]), Err(BadPattern::Empty));
        assert_eq!(Patterns::new(vec!["x".repeat(limits::PATTERN_LEN_MAX + 1)]), Err(BadPattern::TooLong));
        assert_eq!(Patterns::new(vec!["x".into(); limits::PATTERNS_PER_KEY_MAX + 1]), Err(BadPattern::TooMany));
    }

    proptest::proptest! {
        /// Against the textbook table, which is slow and obviously right.
        #[test]
        fn glob_agrees_with_the_textbook(pattern in "[ab*]{0,8}", topic in "[ab]{0,10}") {
            let (p, t) = (pattern.as_bytes(), topic.as_bytes());
            let mut row: Vec<bool> = (0..=t.len()).map(|n| n == 0).collect();
            for &c in p {
                let mut next = vec![false; t.len() + 1];
                next[0] = c == b'*' && row[0];
                for i in 1..=t.len() {
                    next[i] = if c == b'*' { row[i] || next[i - 1] } else { row[i - 1] && c == t[i - 1] };
                }
                row = next;
            }
            proptest::prop_assert_eq!(glob(p, t), row[t.len()]);
        }
    }
}
