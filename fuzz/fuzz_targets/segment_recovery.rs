#![no_main]

libfuzzer_sys::fuzz_target!(init: blipmq_fuzz::begin(), |input: &[u8]| blipmq_fuzz::segment_recovery::run(input));
