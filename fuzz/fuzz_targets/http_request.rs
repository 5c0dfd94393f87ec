#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| blipmq_fuzz::http_request::run(input));
