//! Some lives in every test run; `chaos sim --seeds 2000` lives more of them, and wants every kind of fault to have happened.

use chaos::sim::{Options, Sum, fault_names, run, run_recorded};

const SEEDS: u64 = 40;

#[test]
fn lives_of_a_broker() {
    let mut sum = Sum::default();
    for seed in 0..SEEDS {
        let life = run(seed, &Options::default());
        assert_eq!(life.failure, None, "chaos sim --seed {seed}");
        sum.add(&life);
    }
    assert!(sum.crashes > SEEDS && sum.faults_in_all() > 10 * SEEDS, "{}", sum.table());
    let never = sum.vacuous();
    let delivered = ["confirmed", "delivered", "redelivered", "acked", "rejected", "read back", "expired"];
    assert!(delivered.iter().all(|what| !never.contains(what)), "{never:?}");
}

#[test]
fn the_same_seed_lives_the_same_life() {
    let options = Options { record: true, ..Options::default() };
    for seed in [3, 11] {
        let (one, two) = (run_recorded(seed, &options), run_recorded(seed, &options));
        assert_eq!(one.life, two.life);
        assert_eq!(one.story, two.story);
        assert_eq!(
            one.life.trace,
            run(seed, &Options::default()).trace,
            "whether it is written down makes no difference"
        );
    }
}

#[test]
fn what_is_left_out_does_not_happen() {
    let nothing = Options { faults: Some(Default::default()), ..Options::default() };
    for seed in 0..5 {
        let life = run(seed, &nothing);
        assert_eq!((life.failure, life.crashes, life.refused), (None, 0, 0));
        let faults = life.faults.iter().filter(|(_, count)| **count > 0);
        assert_eq!(faults.count(), 0, "{:?}", life.faults);
    }
}

#[test]
fn a_summary_names_what_never_happened() {
    let mut sum = Sum::default();
    assert!(fault_names().iter().all(|name| sum.vacuous().contains(name)));
    sum.faults.insert("kill", 1);
    assert!(!sum.vacuous().contains(&"kill"));
}
