//! Values as people write and read them: durations, headers, sizes, rates; bytes in JSON.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use blipmq::client::Qos;
use serde_json::{Map, Value};

/// `250ms`, `30s`, `5m`, `2h`, `7d`; `0` needs no unit.
pub fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let expected = || format!("expected a number with ms, s, m, h or d, as in 250ms or 30s, not `{text}`");
    let number: u64 = number.parse().map_err(|_| expected())?;
    let ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "" if number == 0 => 0,
        _ => return Err(expected()),
    };
    number.checked_mul(ms).map(Duration::from_millis).ok_or_else(expected)
}

/// `key=value`.
pub fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("expected key=value, not `{text}`")),
    }
}

/// `0` or `1`.
pub fn qos(text: &str) -> Result<Qos, String> {
    let level: Option<u8> = text.parse().ok();
    level
        .and_then(Qos::from_byte)
        .ok_or_else(|| format!("expected 0 (at most once) or 1 (at least once), not `{text}`"))
}

/// `512`, `64k`, `1m`: bytes.
pub fn size(text: &str) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let (number, factor) = match lower.strip_suffix('k') {
        Some(number) => (number, 1024),
        None => match lower.strip_suffix('m') {
            Some(number) => (number, 1024 * 1024),
            None => (lower.as_str(), 1),
        },
    };
    let number: Option<usize> = number.parse().ok();
    number
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| format!("expected bytes, as in 512, 64k or 1m, not `{text}`"))
}

/// A number in few characters: `999`, `12.3k`, `4.56M`.
pub fn short(number: f64) -> String {
    let (scaled, unit) = match number {
        n if n < 999.5 => (n, ""),
        n if n < 999_500.0 => (n / 1e3, "k"),
        n if n < 999.5e6 => (n / 1e6, "M"),
        n if n < 999.5e9 => (n / 1e9, "G"),
        n => (n / 1e12, "T"),
    };
    match scaled {
        s if unit.is_empty() && (s.fract() == 0.0 || s >= 99.5) => format!("{s:.0}"),
        s if s >= 99.5 => format!("{s:.0}{unit}"),
        s if s >= 9.95 => format!("{s:.1}{unit}"),
        s => format!("{s:.2}{unit}"),
    }
}

/// Seconds in few characters: `850ns`, `12.3µs`, `4.56ms`, `1.20s`.
pub fn short_seconds(seconds: f64) -> String {
    let (scaled, unit) = match seconds {
        s if s < 999.5e-9 => (s * 1e9, "ns"),
        s if s < 999.5e-6 => (s * 1e6, "µs"),
        s if s < 0.9995 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    match scaled {
        s if s >= 99.5 => format!("{s:.0}{unit}"),
        s if s >= 9.95 => format!("{s:.1}{unit}"),
        s => format!("{s:.2}{unit}"),
    }
}

/// Puts bytes into an object: as text if they are, else in base64 under `<name>_base64`.
pub fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), text.into()),
        Err(_) => object.insert(format!("{name}_base64"), STANDARD.encode(bytes).into()),
    };
}

/// Columns under their titles: the first `text_columns` to the left, numbers to the right.
pub fn table(titles: &[&str], text_columns: usize, rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = titles.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, (cell, width)) in cells.zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            let (before, after) = if column < text_columns { ("", pad.as_str()) } else { (pad.as_str(), "") };
            text.push_str(&format!("{before}{cell}{after}  "));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut titles.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7_200)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for wrong in ["", "5", "s", "-1s", "1.5s", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn headers_keep_what_follows_the_first_sign() {
        assert_eq!(header("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(header("=b").is_err() && header("a").is_err());
    }

    #[test]
    fn sizes_take_suffixes() {
        assert_eq!((size("512"), size("64k"), size("1M")), (Ok(512), Ok(65_536), Ok(1_048_576)));
        assert!(size("k").is_err() && size("1g").is_err());
    }

    #[test]
    fn numbers_stay_short() {
        let shown: Vec<String> = [0.0, 7.0, 0.5, 999.0, 1_000.0, 12_345.0, 999_600.0, 5e9].map(short).into();
        assert_eq!(shown, ["0", "7", "0.50", "999", "1.00k", "12.3k", "1.00M", "5.00G"]);
        assert_eq!([8.5e-7, 1.234e-5, 0.25, 1.2].map(short_seconds), ["850ns", "12.3µs", "250ms", "1.20s"]);
    }

    #[test]
    fn bytes_are_text_where_they_can_be() {
        let mut object = Map::new();
        put_bytes(&mut object, "a", b"text");
        put_bytes(&mut object, "b", &[0xff]);
        assert_eq!(Value::from(object), serde_json::json!({ "a": "text", "b_base64": "/w==" }));
    }

    #[test]
    fn tables_line_up() {
        let rows = [vec!["orders".to_owned(), "5".to_owned()], vec!["é".to_owned(), "1234".to_owned()]];
        assert_eq!(table(&["topic", "n"], 1, &rows), "topic      n\norders     5\né       1234\n");
    }
}
