#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| blipmq_fuzz::frame_decode::run(input));
