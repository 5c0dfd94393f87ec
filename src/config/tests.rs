//! From the outside: files, variables and flags in, a `Config` or one clear sentence out.

use super::*;
use crate::access::Patterns;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of its own, gone at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("blipmq-config-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone_or_not = std::fs::remove_dir_all(&self.0);
    }
}

type Env<'a> = &'a [(&'a str, &'a str)];

fn load_with(config: Option<&Path>, env: Env) -> Result<Loaded, ConfigError> {
    let flags = Flags { config: config.map(Path::to_owned), ..Flags::default() };
    load(&flags, env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
}

fn load_text(name: &str, text: &str) -> Result<Loaded, ConfigError> {
    load_with(Some(&Scratch::new().file(name, text)), &[])
}

/// The message for a bad file must hold all of `wanted`, and its name and place in front.
#[track_caller]
fn refused(name: &str, text: &str, place: &str, wanted: &[&str]) {
    let message = load_text(name, text).expect_err("a bad configuration was accepted").to_string();
    assert!(message.contains(&format!("{name}{place}")), "{message}");
    for part in wanted {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert!(!message.contains('\n'), "{message}");
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn without_any_source_there_are_defaults() {
    let loaded = load_with(None, &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    assert_eq!(loaded.listen.to_string(), "127.0.0.1:5555");
    assert_eq!(loaded.metrics_listen.to_string(), "127.0.0.1:9100");
    assert!(loaded.notes.is_empty() && loaded.file.is_none());
}

#[test]
fn the_documented_file_equals_the_defaults_and_mentions_every_setting() {
    let path = repository("config/blipmq.toml");
    let loaded = load_with(Some(&path), &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    for key in keys::KEYS {
        assert!(loaded.origins.contains_key(key.path), "{} is not in config/blipmq.toml", key.path);
    }
    let text = std::fs::read_to_string(path).unwrap();
    // The commented example of [[keys]] must work too, once its hash is one.
    let at = text.find("# [[keys]]").unwrap();
    let hash = format!("sha256:{}", "ab".repeat(32));
    let example: String = text[at..].lines().map(|line| format!("{}\n", line.trim_start_matches("# "))).collect();
    let keys = load_text("example.toml", &example.replace("sha256:...", &hash)).unwrap().config.keys;
    assert_eq!((keys.len(), keys[0].name.as_str(), keys[0].admin), (1, "orders-service", false));
}

#[test]
fn the_shipped_files_work_as_they_are() {
    for name in ["dev.toml", "blipmq-dev.toml", "prod.toml", "blipmq.yaml"] {
        let loaded = load_with(Some(&repository("config").join(name)), &[]);
        assert!(loaded.is_ok(), "{name}: {}", loaded.unwrap_err());
    }
}

const SAME_TOML: &str = r#"
bind_addr = "localhost"
port = 6000
fsync_policy = "EVERY_N:10 "
max_retries = 5
allowed_api_keys = ["a", "b"]
[storage]
segment_size = "128MiB"
disk_quota = 10737418240
idle_marker = false
[delivery]
overflow = "drop_oldest"
dead_letter_suffix = ".dead"
[shards]
cpus = [0, 1]
[[keys]]
key = "c"
publish = ["x.*"]
[[keys]]
key = "d"
name = "boss"
admin = true
"#;
const SAME_YAML: &str = r#"
# the same
bind_addr: localhost
port: 6000
fsync_policy: "EVERY_N:10 "
max_retries: 5
allowed_api_keys: [a, "b"]
storage: {segment_size: 128MiB, disk_quota: 10737418240, idle_marker: false}
delivery:
  overflow: drop_oldest
  dead_letter_suffix: .dead
net:
shards:
  cpus:
    - 0
    - 1
keys:
  - key: c
    publish: [x.*]
  - {key: d, name: boss, admin: true}
"#;

#[test]
fn toml_and_yaml_say_the_same() {
    let toml = load_text("same.toml", SAME_TOML).unwrap();
    let yaml = load_text("same.YML", SAME_YAML).unwrap();
    assert_eq!(toml.config, yaml.config);
    let config = toml.config;
    assert_eq!(config.fsync_policy, FsyncPolicy::EveryN(10));
    assert_eq!((config.storage.segment_size, config.storage.disk_quota), (ByteSize::mib(128), ByteSize(10 << 30)));
    assert_eq!((config.delivery.overflow, config.storage.idle_marker), (Overflow::DropOldest, false));
    assert_eq!((config.shards.cpus, config.allowed_api_keys.len()), (vec![0, 1], 2));
    let first = &config.keys[0];
    assert_eq!((first.name.as_str(), &first.subscribe), ("key-1", &Patterns::default()));
    assert_eq!(first.publish.sources(), ["x.*"]);
    assert_eq!((config.keys[1].name.as_str(), config.keys[1].admin), ("boss", true));
    assert!(toml.listen.ip().is_loopback());
}

#[test]
fn no_extension_is_toml_and_an_empty_file_is_valid() {
    assert_eq!(load_text("blipmq.conf", "port = 1").unwrap().config.port, 1);
    for name in ["empty.toml", "empty.yaml"] {
        assert_eq!(load_text(name, "# nothing\n\n").unwrap().config, Config::default());
    }
}

#[test]
fn later_sources_win() {
    let scratch = Scratch::new();
    let path = scratch.file("f.toml", "port = 1\nmetrics_port = 2\nmax_retries = 7");
    let env: Env = &[
        ("BLIPMQ_CONFIG", path.to_str().unwrap()),
        ("BLIPMQ_PORT", "6000"),
        ("HOME", "/"),
        ("BLIPMQ_METRICS_PORT", "3"),
    ];
    let flags = Flags { metrics_port: Some("4".into()), ..Flags::default() };
    let vars = || env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let loaded = load(&flags, vars()).unwrap();
    let config = &loaded.config;
    assert_eq!((config.max_retries, config.port, config.metrics_port), (7, 6000, 4));
    assert_eq!(loaded.file.as_deref(), Some(path.as_path()));
    assert_eq!(loaded.origins["port"], Origin::Env("BLIPMQ_PORT".into()));
    // The flag names the file, whatever the environment says.
    let other = Flags { config: Some(scratch.file("g.toml", "")), ..Flags::default() };
    assert_eq!(load(&other, vars()).unwrap().config.max_retries, 3);
}

#[test]
fn every_setting_can_come_from_the_environment() {
    let values = [
        ("BLIPMQ_BIND_ADDR", "::1"),
        ("BLIPMQ_METRICS_ADDR", "0.0.0.0"),
        ("BLIPMQ_WAL_PATH", "/var/lib/x"),
        ("BLIPMQ_FSYNC_POLICY", " Interval_MS:5 "),
        ("BLIPMQ_MAX_RETRIES", "9"),
        ("BLIPMQ_RETRY_BACKOFF_MS", "250"),
        ("BLIPMQ_ALLOWED_API_KEYS", " k1, k2 ,,"),
        ("BLIPMQ_ENABLE_TOKIO_CONSOLE", "YES"),
        ("BLIPMQ_STORAGE_MEMORY_BUDGET", "1GiB"),
        ("BLIPMQ_DELIVERY_DEAD_LETTER", "off"),
        ("BLIPMQ_NET_MAX_CONNECTIONS", "77"),
        ("BLIPMQ_SHARDS_CPUS", "3, 1"),
    ];
    let loaded = load_with(None, &values).unwrap();
    let config = &loaded.config;
    assert_eq!(loaded.listen.to_string(), "[::1]:5555");
    assert_eq!((config.metrics_addr.as_str(), config.wal_path.as_str()), ("0.0.0.0", "/var/lib/x"));
    assert_eq!((config.fsync_policy, config.max_retries), (FsyncPolicy::IntervalMs(5), 9));
    assert_eq!((config.retry_backoff_ms, config.storage.memory_budget), (250, ByteSize::mib(1024)));
    assert_eq!((config.delivery.dead_letter, config.net.max_connections), (false, 77));
    assert_eq!(config.shards.cpus, [3, 1]);
    assert_eq!(config.allowed_api_keys, [KeyDigest::of(b"k1"), KeyDigest::of(b"k2")]);
    assert!(loaded.notes.iter().any(|note| note.contains("enable_tokio_console")), "{:?}", loaded.notes);
    // v1: for this one variable, whatever is not a yes is a no.
    assert!(!load_with(None, &[("BLIPMQ_ENABLE_TOKIO_CONSOLE", "maybe")]).unwrap().config.enable_tokio_console);
    for key in keys::KEYS.iter().filter(|key| !key.secret) {
        let shown = (key.show)(&Config::default()).replace(['"', '[', ']'], "");
        let loaded = load_with(None, &[(&key.variable(), &shown)]);
        assert_eq!(loaded.unwrap().config, Config::default(), "{}", key.path);
    }
}

#[test]
fn bad_values_name_file_line_key_and_both_sides() {
    refused("a.toml", "\nport = \"5555\"\n", ":2:8", &["`port`", "found \"5555\"", "0 to 65535", "without quotes"]);
    refused("a.toml", "port = 65536", ":1:8", &["`port`", "65536", "0 to 65535"]);
    refused("a.toml", "port = -1", ":1:8", &["`port`", "-1"]);
    refused("a.toml", "port = 1.5", ":1:8", &["`port`", "1.5"]);
    refused("a.toml", "max_retries = 0", ":1:15", &["`max_retries`", "1 to 65535"]);
    refused("a.toml", "bind_addr = 1979-05-27", ":1:13", &["`bind_addr`", "the date 1979-05-27"]);
    refused(
        "a.toml",
        "fsync_policy = \"sometimes\"",
        ":1:16",
        &["`fsync_policy`", "\"sometimes\"", "\"always\"", "every_n"],
    );
    refused("a.toml", "fsync_policy = \"every_n:0\"", ":1:16", &["`fsync_policy`"]);
    let storage = "[storage]\n# größer\nsegment_size = \"64 potatoes\"";
    refused("a.toml", storage, ":3:16", &["`storage.segment_size`", "64 potatoes", "\"1MiB\""]);
    refused("a.toml", "[storage]\nsegment_size = \"512KiB\"", ":2:16", &["512KiB", "\"1MiB\""]);
    refused("a.toml", "[storage]\nsegment_size = 33554433", ":2:1", &["`storage.segment_size`", "multiple of 4096"]);
    refused("a.toml", "[storage]\ndisk_quota = \"100MiB\"", ":2:1", &["`storage.disk_quota`", "four segments"]);
    refused("a.toml", "storage = 5", ":1:11", &["`storage`", "found 5", "a table"]);
    refused(
        "a.toml",
        "[delivery]\noverflow = \"explode\"",
        ":2:12",
        &["`delivery.overflow`", "explode", "drop_oldest"],
    );
    refused("a.toml", "[delivery]\ndead_letter = \"true\"", ":2:15", &["true or false", "without quotes"]);
    refused("a.toml", "[shards]\ncpus = [0, true]", ":2:12", &["`shards.cpus`", "true in the list"]);
    refused("a.toml", "[shards]\ncpus = [1, 1]", ":2:1", &["`shards.cpus`", "twice"]);
    refused("a.toml", "[shards]\ncount = 65", ":2:1", &["`shards.count`", "64 virtual shards"]);
    refused("a.yaml", "port: 5555\nmax_retries: many\n", ":2:14", &["`max_retries`", "\"many\"", "1 to 65535"]);
    refused("a.yaml", "delivery:\n  ttl_ms: [1]\n", ":2:11", &["`delivery.ttl_ms`", "a list", "milliseconds"]);
    refused("a.yaml", "port:\n", ":1", &["`port`", "found nothing"]);
    refused("a.yml", "storage: 5\n", ":1:10", &["`storage`", "a table"]);
}

#[test]
fn unknown_settings_are_refused_and_the_right_one_is_offered() {
    refused("a.toml", "prot = 1", ":1:1", &["unknown setting `prot`", "did you mean `port`?"]);
    refused("a.toml", "\n[storage]\nsegmentsize = 1", ":3:1", &["`storage.segmentsize`", "`storage.segment_size`"]);
    refused("a.toml", "memory_budget = 1", ":1:1", &["did you mean `storage.memory_budget`?"]);
    refused("a.toml", "[sharts]\ncount = 1", ":1:2", &["`sharts`", "`shards`"]);
    refused("a.toml", "banana = 1", ":1:1", &["unknown setting `banana`", "config/blipmq.toml"]);
    refused("a.yaml", "port: 1\ndelivery:\n  ttl: 5\n  overflw: reject\n", ":3:3", &["`delivery.ttl`"]);
    refused("a.yaml", "fsync-policy: always\n", ":1:1", &["did you mean `fsync_policy`?"]);
    // The first trouble of the file comes first, whatever the names are.
    refused("a.toml", "zebra = 1\nant = 2", ":1:1", &["`zebra`"]);
}

#[test]
fn what_is_not_toml_or_yaml_says_where() {
    refused("a.toml", "port = 1\nport = 2", ":2:1", &["not valid TOML", "duplicate key"]);
    refused("a.toml", "port = 1\nbind_addr = \"x", ":2:", &["not valid TOML"]);
    refused("a.toml", "port: 5555", ":1:", &["not valid TOML"]);
    refused("a.yaml", "port: 1\nport: 2\n", ":2:1", &["not valid YAML: duplicate mapping key: port"]);
    let message = load_text("a.yaml", "port: 1\nport: 2\n").unwrap_err().to_string();
    assert!(message.ends_with("port"), "no words of the parser's own: {message}");
    refused("a.yaml", "port: 1\n  max: [\n", ":2:", &["not valid YAML"]);
    refused("a.yaml", "- port\n", ":1:1", &["not valid YAML", "key: value"]);
    refused("a.yaml", "just words\n", ":1:1", &["not valid YAML"]);
}

#[test]
fn a_file_that_cannot_be_read_is_refused() {
    let gone = Path::new("/nonexistent/blipmq.toml");
    let message = load_with(Some(gone), &[]).unwrap_err().to_string();
    assert!(message.contains("/nonexistent/blipmq.toml") && message.contains("--config"), "{message}");
    let message = load_with(None, &[("BLIPMQ_CONFIG", "/nonexistent/b.yaml")]).unwrap_err().to_string();
    assert!(message.contains("/nonexistent/b.yaml") && message.contains("BLIPMQ_CONFIG"), "{message}");
    let scratch = Scratch::new();
    let message = load_with(Some(&scratch.0), &[]).unwrap_err().to_string();
    assert!(message.contains("cannot be read"), "{message}");
    let binary = scratch.0.join("binary.toml");
    std::fs::write(&binary, b"port = \xff").unwrap();
    let message = load_with(Some(&binary), &[]).unwrap_err().to_string();
    assert!(message.contains("binary.toml") && message.contains("UTF-8"), "{message}");
}

#[test]
fn bad_variables_and_flags_are_named() {
    let cases: [(Env, &[&str]); 7] = [
        (&[("BLIPMQ_PORT", "abc")], &["environment variable BLIPMQ_PORT", "\"abc\"", "0 to 65535"]),
        (&[("BLIPMQ_PORT", "tcp://10.0.0.1:5555")], &["BLIPMQ_PORT", "enableServiceLinks"]),
        (&[("BLIPMQ_FSYNC_POLICY", "sync")], &["BLIPMQ_FSYNC_POLICY", "\"sync\"", "interval_ms"]),
        (&[("BLIPMQ_NET_DRAIN_MS", "")], &["BLIPMQ_NET_DRAIN_MS", "\"\""]),
        (&[("BLIPMQ_FSYNC_POLCY", "none")], &["unknown setting", "did you mean `BLIPMQ_FSYNC_POLICY`?"]),
        (&[("BLIPMQ_STORAGE_BANANA", "1")], &["unknown setting `BLIPMQ_STORAGE_BANANA`"]),
        (&[("BLIPMQ_ALLOWED_API_KEYS", "fine,sha256:secret")], &["BLIPMQ_ALLOWED_API_KEYS", "not shown", "64 hex"]),
    ];
    for (env, wanted) in cases {
        let message = load_with(None, env).unwrap_err().to_string();
        for part in wanted {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
        assert!(!message.contains("secret"), "{message}");
    }
    let flags = Flags { shards: Some("two".into()), ..Flags::default() };
    let message = load(&flags, []).unwrap_err().to_string();
    assert!(message.contains("flag --shards") && message.contains("\"two\""), "{message}");
}

#[test]
fn variables_of_others_are_only_mentioned() {
    let env: Env = &[("BLIPMQ_SERVICE_HOST", "10.0.0.1"), ("BLIPMQ_API_KEY", "k"), ("BLIPMQ_PORT_5555_TCP", "x")];
    let loaded = load_with(None, env).unwrap();
    assert_eq!(loaded.config, Config::default());
    assert_eq!(loaded.notes.len(), 3, "{:?}", loaded.notes);
}

#[test]
fn addresses_are_resolved_or_refused() {
    assert_eq!(load_with(None, &[("BLIPMQ_BIND_ADDR", "[::1]")]).unwrap().listen.to_string(), "[::1]:5555");
    refused("a.toml", "port = 1\nbind_addr = \"no such host\"", ":2:1", &["`bind_addr`", "no such host", "resolved"]);
    refused("a.toml", "bind_addr = \"127.0.0.1:5555\"", ":1:1", &["without port"]);
    refused("a.toml", "metrics_port = 5555", ":1:1", &["`metrics_port`", "share 127.0.0.1:5555"]);
}

#[test]
fn without_a_key_only_loopback_is_served() {
    refused("a.toml", "bind_addr = \"0.0.0.0\"", ":1:1", &["no API key", "0.0.0.0:5555", "[[keys]]"]);
    refused("a.toml", "allowed_api_keys = []\nbind_addr = \"::\"", ":2:1", &["[::]:5555", "no API key"]);
    assert!(load_text("a.toml", "bind_addr = \"0.0.0.0\"\nallowed_api_keys = [\"k\"]").is_ok());
    assert!(load_text("a.toml", "bind_addr = \"0.0.0.0\"\n[[keys]]\nkey = \"k\"\nadmin = true").is_ok());
}

#[test]
fn bad_api_keys_are_refused_and_never_shown() {
    let refused = |text: &str, place: &str, wanted: &[&str]| {
        refused("k.toml", text, place, wanted);
        let message = load_text("k.toml", text).unwrap_err().to_string();
        assert!(!message.contains("hush") && !message.contains("4711"), "{message}");
    };
    refused("allowed_api_keys = [\"ok\", \"\"]", ":1:27", &["`allowed_api_keys`", "in the list"]);
    refused("allowed_api_keys = [4711]", ":1:21", &["`allowed_api_keys`", "not shown", "a text of"]);
    refused("allowed_api_keys = \"hush\"", ":1:20", &["`allowed_api_keys`", "a list"]);
    refused("allowed_api_keys = [\"hush\", \"hush\"]", ":1:1", &["twice"]);
    refused("[[keys]]\nkey = 4711\nadmin = true", ":2:7", &["`keys[0].key`"]);
    refused("[[keys]]\nkey = \"sha256:hush\"\nadmin = true", ":2:7", &["`keys[0].key`", "64 hex"]);
    refused("[[keys]]\nname = \"x\"\nadmin = true", ":1:1", &["`keys[0]`", "`key` is missing"]);
    refused("[[keys]]\nkey = \"hush\"", ":1:1", &["may do nothing"]);
    refused("[[keys]]\nkey = \"hush\"\npublsh = [\"a\"]", ":3:1", &["`keys[0].publsh`", "`keys[0].publish`"]);
    refused("[[keys]]\nkey = \"hush\"\npublish = \"a\"", ":3:11", &["`keys[0].publish`", "a list"]);
    refused("[[keys]]\nkey = \"hush\"\npublish = [\"\"]", ":3:11", &["`keys[0].publish`"]);
    refused("keys = 5", ":1:8", &["`keys`", "[[keys]]"]);
    let twice = "allowed_api_keys = [\"hush\"]\n[[keys]]\nkey = \"hush\"\nadmin = true";
    refused(twice, ":2:3", &["same API key", "keys[0]"]);
    let named = "[[keys]]\nname = \"n\"\nkey = \"a\"\nadmin = true\n[[keys]]\nname = \"n\"\nkey = \"b\"\nadmin = true";
    refused(named, "", &["two keys have the name \"n\""]);
}

#[test]
fn check_config_prints_what_reads_back_and_hides_keys() {
    let text = "port = 6000\nallowed_api_keys = [\"hush\"]\n[storage]\nsegment_size = \"128MiB\"\n\
                [[keys]]\nkey = \"psst\"\nname = \"n\"\npublish = [\"a.*\"]";
    let scratch = Scratch::new();
    let path = scratch.file("c.toml", text);
    let loaded = load_with(Some(&path), &[("BLIPMQ_MAX_RETRIES", "4")]).unwrap();
    let shown = loaded.to_toml();
    assert!(!shown.contains("hush") && !shown.contains("psst"), "{shown}");
    assert!(!format!("{loaded:?}").contains("hush"));
    assert!(shown.contains(&format!("port = 6000  # {}:1:1\n", path.display())), "{shown}");
    assert!(shown.contains("max_retries = 4  # environment variable BLIPMQ_MAX_RETRIES\n"), "{shown}");
    assert!(
        shown.contains("\nretry_backoff_ms = 100\n") && shown.contains("[storage]\nsegment_size = \"128MiB\""),
        "{shown}"
    );
    assert_eq!(shown.matches("(hidden)").count(), 2, "{shown}");
    // With the keys put back it is a configuration, and the same one.
    let back = shown.replacen("(hidden)", "hush", 1).replacen("(hidden)", "psst", 1);
    assert_eq!(load_text("back.toml", &back).unwrap().config, loaded.config);
}

#[test]
fn the_dev_key_is_made_once_and_only_its_owner_reads_it() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let store = scratch.0.join("deep/store");
    let env = [("BLIPMQ_WAL_PATH", store.to_str().unwrap()), ("BLIPMQ_ALLOWED_API_KEYS", "")];
    let loaded = load_with(None, &env).unwrap();
    assert!(!store.exists(), "loading writes nothing");
    let first = loaded.keys().unwrap();
    let path = store.join(devkey::DEV_KEY_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let key = text.trim();
    assert!(key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit()), "{key}");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(&store).unwrap().count(), 1, "nothing else is left behind");
    assert!(first.note.contains("--key-file") && first.note.contains(path.to_str().unwrap()), "{}", first.note);
    assert!(!first.note.contains(key));
    let second = loaded.keys().unwrap();
    assert_eq!(second.ring.authenticate(key.as_bytes()).unwrap().name(), "dev");
    assert!(first.ring.authenticate(key.as_bytes()).unwrap().is_admin());
    std::fs::write(&path, "\n").unwrap();
    let message = loaded.keys().unwrap_err().to_string();
    assert!(message.contains("dev.key") && message.contains("empty"), "{message}");
}

#[test]
fn configured_keys_leave_no_dev_key() {
    let scratch = Scratch::new();
    let store = scratch.0.join("store");
    let env = [("BLIPMQ_WAL_PATH", store.to_str().unwrap()), ("BLIPMQ_ALLOWED_API_KEYS", "one,two")];
    let keys = load_with(None, &env).unwrap().keys().unwrap();
    assert!(!store.exists());
    assert_eq!((keys.ring.len(), keys.ring.authenticate(b"two").is_some()), (2, true));
}
