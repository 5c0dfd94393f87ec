//! The durability part of RESULTS.md, from the rows that the harnesses recorded.
//!
//! Owns: which figures there ought to be, and how they are shown. Never: makes one up: what nobody recorded says "not run".

use std::fs;
use std::io;
use std::path::Path;

use crate::record::Row;

const BEGIN: &str = "<!-- chaos:begin -->";
const END: &str = "<!-- chaos:end -->";

/// Every row there ought to be, and what it is about.
pub const EXPECTED: &[(&str, &str)] = &[
    ("sim", "simulation: one seed, one life of a broker, on a disk and a network that fail"),
    ("mutants", "planted mistakes, one at a time"),
    ("crash", "kill -9 under load, v2 and v1 clients"),
    ("crash slow-disk", "kill -9 while writes are still on their way to a slow disk"),
    ("power ext4 always", "power cut, ext4, `fsync_policy = always`"),
    ("power ext4 every_n:64", "power cut, ext4, `every_n:64`"),
    ("power ext4 interval_ms:50", "power cut, ext4, `interval_ms:50`"),
    ("power ext4 none", "power cut, ext4, `none`"),
    ("power xfs", "power cut, XFS"),
    ("power planted", "power cut, a broker that does not sync"),
    ("disk write-eio", "a write fails"),
    ("disk sync-eio", "a sync fails"),
    ("disk read-eio", "a read fails"),
    ("disk enospc", "the disk is full"),
    ("disk slow", "the disk is slow"),
    ("net proxy", "a network that delays, cuts, drips and garbles"),
    ("net slowloris", "connections that never finish their first frame"),
    ("net brute-force", "wrong keys, flat out"),
    ("net storm", "5,000 connections at once"),
    ("net stalled", "500 consumers that do not read"),
    ("net garbage", "bytes that are no frames"),
    ("net half-open", "peers that vanish"),
    ("net descriptors", "no file descriptors left"),
    ("loom", "the ring, all interleavings"),
];

/// The table; of several rows with one name the latest counts.
pub fn table(rows: &[Row]) -> String {
    let latest = |name: &str| rows.iter().rev().find(|row| row.name == name);
    let mut lines = String::from("| what | run | found | command, commit |\n|---|---|---|---|\n");
    for (name, what) in EXPECTED {
        lines.push_str(&match latest(name) {
            Some(row) => line(what, row),
            None => format!("| {what} | not run | | |\n"),
        });
    }
    let mut further: Vec<&Row> = rows.iter().filter(|row| EXPECTED.iter().all(|(name, _)| row.name != *name)).collect();
    further.sort_by(|a, b| a.name.cmp(&b.name));
    further.dedup_by(|later, kept| {
        let same = later.name == kept.name;
        // Sorted stably: of one name the last is the latest.
        if same {
            *kept = later;
        }
        same
    });
    further.iter().for_each(|row| lines.push_str(&line(&row.name, row)));
    let mut machines: Vec<&str> = rows.iter().map(|row| row.machine.as_str()).collect();
    machines.sort_unstable();
    machines.dedup();
    format!("Machine: {}.\n\n{lines}", machines.join("; "))
}

fn line(what: &str, row: &Row) -> String {
    let Row { extent, found, command, commit, seconds, .. } = row;
    let failed = if row.clean { "" } else { "**FAILED** " };
    format!("| {what} | {extent}, {seconds:.0} s | {failed}{found} | `{command}`, {commit} |\n").replace('\u{a0}', " ")
}

/// Puts the table between the marks of `page`.
pub fn write_into(page: &Path, rows: &[Row]) -> io::Result<()> {
    let text = fs::read_to_string(page)?;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("{}: no {BEGIN} … {END}", page.display()));
    let (before, rest) = text.split_once(BEGIN).ok_or_else(bad)?;
    let (_, after) = rest.split_once(END).ok_or_else(bad)?;
    fs::write(page, format!("{before}{BEGIN}\n{}{END}{after}", table(rows)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, found: &str, clean: bool) -> Row {
        Row { found: found.into(), clean, ..Row::new(name, "10 rounds".into(), String::new(), true, 3.2) }
    }

    #[test]
    fn what_was_not_run_says_so_and_the_latest_counts() {
        let table = table(&[row("crash", "old", true), row("crash", "0 lost", true), row("fuzz x", "0 crashes", true)]);
        let of = |what: &str| table.lines().find(|line| line.starts_with(&format!("| {what} |"))).unwrap_or("");
        assert!(of("kill -9 under load, v2 and v1 clients").contains("10 rounds, 3 s | 0 lost"), "{table}");
        assert!(of("a sync fails").contains("not run"), "{table}");
        assert!(of("fuzz x").contains("0 crashes"), "{table}");
        assert!(!table.contains("old"), "{table}");
    }

    #[test]
    fn a_failure_cannot_be_overlooked() {
        assert!(table(&[row("sim", "1 violation", false)]).contains("**FAILED** 1 violation"));
    }

    #[test]
    fn only_what_is_between_the_marks_changes() -> io::Result<()> {
        let page = std::env::temp_dir().join(format!("chaos-page-{}", std::process::id()));
        fs::write(&page, format!("# a\n{BEGIN}\nold\n{END}\n# b\n"))?;
        write_into(&page, &[row("sim", "0 violations", true)])?;
        let text = fs::read_to_string(&page)?;
        assert!(text.starts_with("# a\n") && text.ends_with("# b\n") && !text.contains("\nold\n"), "{text}");
        fs::write(&page, "no marks")?;
        assert!(write_into(&page, &[]).is_err());
        fs::remove_file(&page)
    }
}
