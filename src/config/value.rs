//! What a setting's value looks like, whoever wrote it: a file in TOML or YAML, or the text of a variable or flag.
//!
//! Owns: the tree a file is parsed into, and the reading of each type. Never: knows which settings exist.

use crate::access::{KeyDigest, Patterns};
use crate::wal::commit::FsyncPolicy;
use std::fmt;

/// Where something stands in a file, both from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(super) struct Place {
    pub line: u32,
    pub column: u32,
}

/// One value of a file and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub at: Place,
    pub value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// YAML's `key:` with nothing behind it.
    Nothing,
    Bool(bool),
    Int(i128),
    Text(String),
    List(Vec<Node>),
    Table(Vec<Entry>),
    /// A kind no setting takes (a fraction, a date); holds what to call it.
    Other(String),
}

/// `key: value` of a table.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key: String,
    pub at: Place,
    pub node: Node,
}

impl Value {
    /// Names the value in an error. `secret`: the text is not repeated.
    pub fn describe(&self, secret: bool) -> String {
        match self {
            Value::Nothing => "nothing".into(),
            Value::Table(_) => "a table".into(),
            Value::List(_) => "a list".into(),
            _ if secret => "a value that is not shown".into(),
            Value::Bool(value) => value.to_string(),
            Value::Int(value) => value.to_string(),
            Value::Text(value) => quote(value),
            Value::Other(value) => value.clone(),
        }
    }
}

/// A TOML string literal, in `'...'` where that spares the reader a lot of backslashes.
pub(super) fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A number of bytes: in a file an integer, or text such as `"64MiB"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ByteSize(pub u64);

impl ByteSize {
    const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
    const DECIMAL: [(&str, u64); 4] =
        [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1_000)];

    pub const fn mib(n: u64) -> ByteSize {
        ByteSize(n << 20)
    }

    /// `"64MiB"`, `"1.5 GiB"`, `"500MB"`, `"4096"`. Upper and lower case alike.
    pub fn parse(text: &str) -> Option<ByteSize> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
        let (number, unit) = (text[..digits].replace('_', ""), text[digits..].trim());
        let factor = if unit.is_empty() {
            1
        } else {
            let mut known = Self::UNITS.iter().chain(&Self::DECIMAL);
            known.find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
        let mut bytes = whole.parse::<u64>().ok()?.checked_mul(factor)?;
        if number.contains('.') {
            // Exact or not at all: "1.5MiB" is a whole number of bytes, "0.3B" is not.
            let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            let part = u128::from(fraction.parse::<u64>().ok()?).checked_mul(u128::from(factor))?;
            if part % scale != 0 {
                return None;
            }
            bytes = bytes.checked_add(u64::try_from(part / scale).ok()?)?;
        }
        Some(ByteSize(bytes))
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit that divides it evenly; `parse` reads it back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut units = Self::UNITS.iter();
        match units.find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor)) {
            Some((name, factor)) if *factor > 1 => write!(f, "{}{name}", self.0 / factor),
            _ => write!(f, "{}", self.0),
        }
    }
}

/// A type settings can have.
pub(super) trait Setting: Sized {
    fn read(value: &Value) -> Option<Self>;
    /// From a variable or a flag.
    fn read_text(text: &str) -> Option<Self>;
    /// What a setting's allowed range is about: the number itself, a text's length, a list's.
    fn measure(&self) -> u64;
    /// As a TOML value.
    fn show(&self) -> String;
}

macro_rules! number_setting {
    ($($number:ty),+) => {$(
        impl Setting for $number {
            fn read(value: &Value) -> Option<Self> {
                match value {
                    Value::Int(number) => <$number>::try_from(*number).ok(),
                    _ => None,
                }
            }
            fn read_text(text: &str) -> Option<Self> {
                text.trim().parse().ok()
            }
            fn measure(&self) -> u64 {
                u64::from(*self)
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+};
}
number_setting!(u16, u32, u64);

impl Setting for bool {
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }
    fn read_text(text: &str) -> Option<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Some(true),
            "0" | "false" | "no" | "off" => Some(false),
            _ => None,
        }
    }
    fn measure(&self) -> u64 {
        u64::from(*self)
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for ByteSize {
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Int(number) => u64::try_from(*number).ok().map(ByteSize),
            Value::Text(text) => ByteSize::parse(text),
            _ => None,
        }
    }
    fn read_text(text: &str) -> Option<Self> {
        ByteSize::parse(text)
    }
    fn measure(&self) -> u64 {
        self.0
    }
    fn show(&self) -> String {
        quote(&self.to_string())
    }
}

/// Types that are a word: any text that `$parse` accepts.
macro_rules! word_setting {
    ($($word:ty => $parse:expr, $show:expr);+ $(;)?) => {$(
        impl Setting for $word {
            fn read(value: &Value) -> Option<Self> {
                match value {
                    Value::Text(text) => Self::read_text(text),
                    _ => None,
                }
            }
            fn read_text(text: &str) -> Option<Self> {
                let parse: fn(&str) -> Option<$word> = $parse;
                parse(text)
            }
            fn measure(&self) -> u64 {
                self.show().len() as u64 - 2
            }
            fn show(&self) -> String {
                let show: fn(&$word) -> String = $show;
                quote(&show(self))
            }
        }
    )+};
}
word_setting! {
    String => |text| Some(text.to_owned()), |text| text.clone();
    FsyncPolicy => FsyncPolicy::parse, |policy| policy.to_string();
    WalSync => WalSync::parse, |word| word.as_str().to_owned();
    Overflow => Overflow::parse, |word| word.as_str().to_owned();
    Qos0Overflow => Qos0Overflow::parse, |word| word.as_str().to_owned();
    // Neither the key nor its hash (a weak key could be guessed from it) is ever shown.
    KeyDigest => |text| KeyDigest::from_setting(text).ok(), |_| "(hidden)".to_owned();
}

/// One of a few words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            fn parse(text: &str) -> Option<$name> {
                match text.trim().to_ascii_lowercase().as_str() {
                    $($word => Some($name::$variant),)+
                    _ => None,
                }
            }

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }
        }
    };
}
words! {
    /// How a log write is made durable.
    WalSync {
        /// The segment is open with `O_DSYNC`: each write completes when it is on the disk.
        Dsync = "dsync",
        /// A separate `fdatasync` after the write.
        Fdatasync = "fdatasync",
    }
}
words! {
    /// What happens to a QoS1 publish when a subscription's backlog is full.
    Overflow {
        /// The publish gets a NACK.
        Reject = "reject",
        /// The oldest message of the backlog goes; it is counted.
        DropOldest = "drop_oldest",
    }
}
words! {
    /// What happens when a subscription's QoS0 queue is full.
    Qos0Overflow { DropOldest = "drop_oldest", DropNew = "drop_new" }
}

impl Setting for Patterns {
    fn read(value: &Value) -> Option<Self> {
        Patterns::new(Vec::<String>::read(value)?).ok()
    }
    fn read_text(text: &str) -> Option<Self> {
        Patterns::new(Vec::<String>::read_text(text)?).ok()
    }
    fn measure(&self) -> u64 {
        self.sources().len() as u64
    }
    fn show(&self) -> String {
        self.sources().to_vec().show()
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::List(nodes) => nodes.iter().map(|node| T::read(&node.value)).collect(),
            _ => None,
        }
    }
    /// Comma list, trimmed, empties dropped (V1 B29).
    fn read_text(text: &str) -> Option<Self> {
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(T::read_text).collect()
    }
    fn measure(&self) -> u64 {
        self.len() as u64
    }
    fn show(&self) -> String {
        format!("[{}]", self.iter().map(T::show).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_sizes_are_read_exactly_or_refused() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            (" 64 mib ", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("500MB", 500_000_000),
            ("1_000", 1000),
            ("7B", 7),
        ];
        for (text, bytes) in good {
            assert_eq!(ByteSize::parse(text), Some(ByteSize(bytes)), "{text}");
        }
        for text in ["", "MiB", "-1", "64 potatoes", "0.3B", "1.", ".5MiB", "1.2.3MiB", "99999999999TiB", "1e6", "½MiB"]
        {
            assert_eq!(ByteSize::parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_a_byte_size_shows_reads_back() {
        for bytes in [0, 1, 1023, 1024, 1025, 64 << 20, (64 << 20) + 1, 3 << 30, u64::MAX] {
            assert_eq!(ByteSize::parse(&ByteSize(bytes).to_string()), Some(ByteSize(bytes)));
        }
        assert_eq!(ByteSize::mib(64).to_string(), "64MiB");
    }

    #[test]
    fn a_list_from_a_variable_is_trimmed_and_without_empties() {
        assert_eq!(Vec::<String>::read_text(" a, b ,,c "), Some(vec!["a".into(), "b".into(), "c".into()]));
        assert_eq!(Vec::<String>::read_text(" "), Some(vec![]));
        assert_eq!(Vec::<u16>::read_text("1,x"), None);
    }
}
