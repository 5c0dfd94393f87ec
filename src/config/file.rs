//! The configuration file: TOML or YAML to one tree of values with their places, and that tree to settings.

use super::error::{ConfigError, Problem, nearest, nearest_key};
use super::keys;
use super::value::{Entry, Node, Place, Setting, Value};
use super::{Draft, Origin};
use crate::access::{KeyDigest, KeyEntry, Patterns};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::io;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A configuration file larger than this is a mistake.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Lays the file over the draft. `text`: what reading it gave. `named_by`: who said it exists.
pub(super) fn apply(
    path: &Path,
    text: io::Result<String>,
    named_by: &str,
    draft: &mut Draft,
) -> Result<(), ConfigError> {
    let text = text.map_err(|error| ConfigError {
        origin: Some(origin(path, Place::default())),
        key: None,
        problem: Problem::Unreadable { named_by: named_by.to_owned(), error },
    })?;
    let extension = path.extension().and_then(|ext| ext.to_str()).unwrap_or_default().to_ascii_lowercase();
    let (language, parsed) = match extension.as_str() {
        "yaml" | "yml" => ("YAML", parse_yaml(&text)),
        _ => ("TOML", parse_toml(&text)),
    };
    let entries = parsed.map_err(|(at, message)| ConfigError {
        origin: Some(origin(path, at)),
        key: None,
        problem: Problem::Syntax { language, message },
    })?;
    Layer { path, draft }.table("", &entries)
}

pub(super) fn read(path: &Path) -> io::Result<String> {
    if std::fs::metadata(path)?.len() > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {FILE_BYTES_MAX} bytes, no configuration is")));
    }
    std::fs::read_to_string(path)
}

fn origin(path: &Path, at: Place) -> Origin {
    Origin::File { path: path.to_owned(), line: at.line, column: at.column }
}

/// One file being laid over the draft.
struct Layer<'a> {
    path: &'a Path,
    draft: &'a mut Draft,
}

impl Layer<'_> {
    fn table(&mut self, prefix: &str, entries: &[Entry]) -> Result<(), ConfigError> {
        for entry in entries {
            let path = format!("{prefix}{}", entry.key);
            if let Some(key) = keys::find(&path) {
                if !(key.read)(&mut self.draft.config, &entry.node.value) {
                    let (node, found) = misfit(&entry.node, key.secret);
                    return Err(self.bad(key.path, node.at, found, key.expects, hint(&node.value)));
                }
                self.draft.origins.insert(key.path, origin(self.path, entry.at));
            } else if let Some(name) = keys::TABLES.iter().find(|name| **name == path) {
                match &entry.node.value {
                    Value::Table(entries) => self.table(&format!("{name}."), entries)?,
                    Value::Nothing => {}
                    other => return Err(self.bad(name, entry.node.at, other.describe(false), "a table", None)),
                }
            } else if path == "keys" {
                self.draft.config.keys = self.api_keys(&entry.node)?;
                self.draft.origins.insert("keys", origin(self.path, entry.at));
            } else {
                return Err(self.unknown(&path, entry.at, nearest_key(&path)));
            }
        }
        Ok(())
    }

    /// The tables of `[[keys]]`.
    fn api_keys(&self, node: &Node) -> Result<Vec<KeyEntry>, ConfigError> {
        match &node.value {
            Value::List(nodes) => nodes.iter().enumerate().map(|(i, node)| self.api_key(i, node)).collect(),
            Value::Nothing => Ok(Vec::new()),
            other => {
                let expects = "a list of tables, in TOML each begun by [[keys]]";
                Err(self.bad("keys", node.at, other.describe(true), expects, None))
            }
        }
    }

    fn api_key(&self, index: usize, node: &Node) -> Result<KeyEntry, ConfigError> {
        let Value::Table(entries) = &node.value else {
            let expects = "a table with key, name, publish, subscribe, admin";
            return Err(self.bad(&format!("keys[{index}]"), node.at, node.value.describe(true), expects, None));
        };
        let (mut digest, mut name) = (None, format!("key-{}", index + 1));
        let (mut publish, mut subscribe, mut admin) = (Patterns::default(), Patterns::default(), false);
        for entry in entries {
            let path = format!("keys[{index}].{}", entry.key);
            let expects = match entry.key.as_str() {
                "key" => "a text of 1 to 4085 bytes, or \"sha256:\" and 64 hex digits",
                "name" => "a text of 1 to 64 bytes",
                "publish" | "subscribe" => {
                    "a list of at most 256 topic names or patterns such as \"orders.*\", each of 1 to 1024 bytes"
                }
                "admin" => "true or false",
                _ => {
                    let near = nearest(&entry.key, ["key", "name", "publish", "subscribe", "admin"]);
                    return Err(self.unknown(&path, entry.at, near.map(|near| format!("keys[{index}].{near}"))));
                }
            };
            let value = &entry.node.value;
            let read = match entry.key.as_str() {
                "key" => KeyDigest::read(value).map(|read| digest = Some(read)),
                "name" => String::read(value).filter(|s| (1..=64).contains(&s.len())).map(|read| name = read),
                "publish" => Patterns::read(value).map(|read| publish = read),
                "subscribe" => Patterns::read(value).map(|read| subscribe = read),
                _ => bool::read(value).map(|read| admin = read),
            };
            if read.is_none() {
                let (node, found) = misfit(&entry.node, entry.key == "key");
                return Err(self.bad(&path, node.at, found, expects, hint(&node.value)));
            }
        }
        let refuse = |why: &str| {
            Err(ConfigError::refused(Some(origin(self.path, node.at)), &format!("keys[{index}]"), why.to_owned()))
        };
        let Some(digest) = digest else {
            return refuse("`key` is missing: the API key itself, or \"sha256:\" and 64 hex digits");
        };
        if publish.is_empty() && subscribe.is_empty() && !admin {
            return refuse("this key may do nothing: give it `publish` or `subscribe` patterns, or `admin = true`");
        }
        Ok(KeyEntry { digest, name, publish, subscribe, admin })
    }

    fn unknown(&self, path: &str, at: Place, near: Option<String>) -> ConfigError {
        ConfigError {
            origin: Some(origin(self.path, at)),
            key: Some(path.to_owned()),
            problem: Problem::Unknown { near },
        }
    }

    fn bad(&self, path: &str, at: Place, found: String, expects: &str, hint: Option<&'static str>) -> ConfigError {
        ConfigError {
            origin: Some(origin(self.path, at)),
            key: Some(path.to_owned()),
            problem: Problem::Value { found, expects: expects.to_owned(), hint },
        }
    }
}

/// The part of a value that does not fit, as far as that can be said without knowing its type: in a list with one
/// element of another kind than text and number, that element.
fn misfit(node: &Node, secret: bool) -> (&Node, String) {
    if let Value::List(nodes) = &node.value {
        let wrong = match secret {
            true => nodes.iter().find(|node| KeyDigest::read(&node.value).is_none()),
            false => nodes.iter().find(|node| !matches!(node.value, Value::Text(_) | Value::Int(_))),
        };
        if let Some(node) = wrong {
            return (node, format!("{} in the list", node.value.describe(secret)));
        }
    }
    (node, node.value.describe(secret))
}

/// Numbers and booleans are often texts that lost their quotes.
fn hint(value: &Value) -> Option<&'static str> {
    matches!(value, Value::Text(text) if text.trim().parse::<i64>().is_ok() || text == "true" || text == "false")
        .then_some("a number, true and false go without quotes")
}

type ParseError = (Place, String);

pub(super) fn parse_toml(text: &str) -> Result<Vec<Entry>, ParseError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = Lines::new(text);
    match DeTable::parse(text) {
        Ok(table) => Ok(toml_table(table.get_ref(), &lines)),
        Err(error) => {
            let at = error.span().map(|span| lines.place(span.start)).unwrap_or_default();
            Err((at, error.message().to_owned()))
        }
    }
}

fn toml_table(table: &DeTable<'_>, lines: &Lines<'_>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            at: lines.place(key.span().start),
            node: toml_node(value, lines),
        })
        .collect();
    // The parser sorts by name; errors should come in the order of the file.
    entries.sort_by_key(|entry| entry.at);
    entries
}

fn toml_node(value: &Spanned<DeValue<'_>>, lines: &Lines<'_>) -> Node {
    let at = lines.place(value.span().start);
    let value = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(value) => Value::Int(value),
            Err(_) => Value::Other(number.as_str().to_owned()),
        },
        DeValue::Float(number) => Value::Other(number.as_str().to_owned()),
        DeValue::Datetime(time) => Value::Other(format!("the date {time}")),
        DeValue::Array(values) => Value::List(values.iter().map(|value| toml_node(value, lines)).collect()),
        DeValue::Table(table) => Value::Table(toml_table(table, lines)),
    };
    Node { at, value }
}

/// Byte offsets to lines and columns.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Lines<'a> {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Lines { text, starts }
    }

    fn place(&self, offset: usize) -> Place {
        let line = self.starts.partition_point(|start| *start <= offset);
        let before = self.text.get(self.starts[line - 1]..offset).unwrap_or_default();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Place { line: number(line), column: number(before.chars().count() + 1) }
    }
}

pub(super) fn parse_yaml(text: &str) -> Result<Vec<Entry>, ParseError> {
    // An empty file, or only comments: valid, and says nothing.
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Vec::new());
    }
    match serde_saphyr::from_str::<serde_saphyr::Spanned<YamlValue>>(text) {
        Ok(node) => match yaml_node(node) {
            Node { value: Value::Table(entries), .. } => Ok(entries),
            Node { at, value } => Err((at, format!("found {}, expected `key: value` lines", value.describe(true)))),
        },
        Err(error) => {
            let at = error.location().map(yaml_place).unwrap_or_default();
            Err((at, in_our_words(&error.without_snippet().to_string())))
        }
    }
}

/// The parser's sentence without the place (ours is in front) and without advice for programmers.
fn in_our_words(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let ends = [" at line ", ", set DuplicateKeyPolicy"].into_iter().filter_map(|end| line.find(end));
    line[..ends.min().unwrap_or(line.len())].to_owned()
}

/// What the YAML parser hands over; turned into a `Node` at once.
enum YamlValue {
    Plain(Value),
    List(Vec<serde_saphyr::Spanned<YamlValue>>),
    Table(Vec<(serde_saphyr::Spanned<String>, serde_saphyr::Spanned<YamlValue>)>),
}

fn yaml_place(location: serde_saphyr::Location) -> Place {
    let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Place { line: number(location.line()), column: number(location.column()) }
}

fn yaml_node(spanned: serde_saphyr::Spanned<YamlValue>) -> Node {
    let value = match spanned.value {
        YamlValue::Plain(value) => value,
        YamlValue::List(values) => Value::List(values.into_iter().map(yaml_node).collect()),
        YamlValue::Table(entries) => Value::Table(
            entries
                .into_iter()
                .map(|(key, value)| Entry { at: yaml_place(key.referenced), key: key.value, node: yaml_node(value) })
                .collect(),
        ),
    };
    Node { at: yaml_place(spanned.referenced), value }
}

impl<'de> Deserialize<'de> for YamlValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<YamlValue, D::Error> {
        deserializer.deserialize_any(YamlVisitor)
    }
}

struct YamlVisitor;

impl<'de> Visitor<'de> for YamlVisitor {
    type Value = YamlValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a setting")
    }

    fn visit_bool<E>(self, value: bool) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Int(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Int(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Int(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Other(value.to_string())))
    }

    fn visit_str<E>(self, value: &str) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Text(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Nothing))
    }

    fn visit_none<E>(self) -> Result<YamlValue, E> {
        Ok(YamlValue::Plain(Value::Nothing))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<YamlValue, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<YamlValue, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = items.next_element()? {
            values.push(value);
        }
        Ok(YamlValue::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<YamlValue, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = items.next_entry()? {
            entries.push(entry);
        }
        Ok(YamlValue::Table(entries))
    }
}
