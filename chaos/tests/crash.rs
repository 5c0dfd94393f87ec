//! The whole harness against a toy broker: leaves a sound one alone, and names what is wrong with each bad one.

use std::path::PathBuf;
use std::time::Duration;

use chaos::crash::{Identities, Options};
use chaos::oracle::Kind;
use chaos::report::Report;
use chaos::{crash, history, v1};

fn options(name: &str, extra: &[(&str, &str)]) -> Options {
    Options {
        rounds: 4,
        policies: vec!["none".into()],
        cores: vec![1],
        // Tests run side by side: other seeds, other ports.
        seed: name.bytes().fold(7, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte)),
        broker: env!("CARGO_BIN_EXE_toy-broker").into(),
        folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name),
        keep: false,
        min_run_ms: 100,
        max_run_ms: 400,
        identities: Identities::Mixed,
        patience: Duration::from_secs(5),
        extra: extra.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        until: None,
    }
}

/// Whatever else is wrong, `kinds` were found, and others only if they are in `also`.
fn caught(report: &Report, kinds: &[Kind], also: &[Kind]) {
    for kind in Kind::ALL {
        let count = report.verdict.count(kind);
        let details = &report.verdict.details[..report.verdict.details.len().min(5)];
        assert!(count > 0 || !kinds.contains(&kind), "{} was not found: {details:?}", kind.name());
        assert!(count == 0 || kinds.contains(&kind) || also.contains(&kind), "{}: {details:?}", kind.name());
    }
}

fn with_bug(bug: &str) -> Report {
    crash::run(&options(bug, &[("TOY_BUG", bug)])).expect("the harness itself works")
}

#[test]
fn a_sound_broker_is_clean() {
    let options =
        Options { rounds: 6, keep: true, policies: vec!["always".into(), "none".into()], ..options("sound", &[]) };
    let report = crash::run(&options).expect("the harness itself works");
    caught(&report, &[], &[]);
    assert!(report.verdict.confirmed > 100 && report.verdict.acked > 100, "{report:?}");
    assert!(report.verdict.redelivered > 0, "nothing was left unacknowledged: {report:?}");
    assert_eq!(report.restarts, (3 + 1) * 2);
    // The kept histories say the same.
    let kept = report.artefacts.iter().map(|folder| history::judge(&PathBuf::from(folder).join("history.txt"), true));
    let confirmed: u64 = kept.map(|verdict| verdict.expect("a readable history").confirmed).sum();
    assert_eq!(confirmed, report.verdict.confirmed);
    std::fs::remove_dir_all(&options.folder).expect("the kept folder can go");
}

#[test]
fn confirms_before_durability_are_caught_as_lost() {
    let planted = [("BLIPMQ_PLANTED_BUG", "confirm-before-durable")];
    let report = crash::run(&Options { until: Some(Kind::Lost), ..options("planted", &planted) }).expect("works");
    // Subscriptions and acknowledgements that were never written show as well; tags are given away again.
    caught(
        &report,
        &[Kind::Lost],
        &[Kind::LostConsumerAck, Kind::DuplicateNotFlagged, Kind::Misbehaved, Kind::Duplicate],
    );
}

#[test]
fn a_message_lost_without_any_crash_is_caught() {
    caught(&with_bug("lose"), &[Kind::Lost], &[]);
}

#[test]
fn forgotten_acknowledgements_are_caught() {
    caught(&with_bug("forget-acks"), &[Kind::LostConsumerAck], &[]);
}

#[test]
fn a_delivery_after_its_acknowledgement_is_caught() {
    // And when it comes once more after a crash, the acknowledgement counts as lost.
    caught(&with_bug("ack-requeues"), &[Kind::Duplicate], &[Kind::LostConsumerAck]);
}

#[test]
fn missing_redelivery_flags_are_caught() {
    caught(&with_bug("no-flag"), &[Kind::DuplicateNotFlagged], &[]);
}

#[test]
fn a_forgotten_identity_is_caught() {
    caught(
        &with_bug("forget-identity"),
        &[Kind::Duplicate],
        &[Kind::LostConsumerAck, Kind::DuplicateNotFlagged, Kind::OutOfOrder],
    );
}

#[test]
fn wrong_order_is_caught() {
    caught(&with_bug("reorder"), &[Kind::OutOfOrder], &[]);
}

#[test]
fn changed_bytes_are_caught() {
    // The damaged copy is a phantom, and the message itself never comes.
    caught(&with_bug("corrupt"), &[Kind::Phantom, Kind::Lost], &[]);
}

#[test]
fn a_broker_that_dies_is_caught() {
    let report = with_bug("die");
    caught(&report, &[Kind::Misbehaved], &[]);
    assert!(report.verdict.details.iter().any(|detail| detail.contains("the toy had enough")), "{report:?}");
}

#[test]
fn a_broker_that_never_confirms_is_stuck() {
    let options = Options { min_run_ms: 500, max_run_ms: 600, ..options("hang", &[("TOY_BUG", "hang")]) };
    let report = crash::run(&Options { rounds: 1, ..options }).expect("the harness itself works");
    caught(&report, &[Kind::Stuck], &[]);
}

#[test]
fn a_broker_that_does_not_start_again_is_caught() {
    let report = with_bug("die-at-start");
    caught(&report, &[Kind::Misbehaved], &[]);
    assert!(report.verdict.details.iter().any(|detail| detail.contains("does not feel like starting")), "{report:?}");
}

#[test]
fn v1_clients_get_back_what_they_did_not_acknowledge() {
    let options = Options { rounds: 2, ..options("v1-sound", &[]) };
    let report = v1::run(&options).expect("the harness itself works");
    caught(&report, &[], &[]);
    assert_eq!((report.verdict.published, report.verdict.redelivered), (60, 40));
}

#[test]
fn v1_faults_are_caught() {
    for (bug, kind) in [("forget-acks", Kind::LostConsumerAck), ("reorder", Kind::OutOfOrder)] {
        let name = format!("v1-{bug}");
        let report = v1::run(&Options { rounds: 1, ..options(&name, &[("TOY_BUG", bug)]) }).expect("works");
        caught(&report, &[kind], &[]);
    }
}
