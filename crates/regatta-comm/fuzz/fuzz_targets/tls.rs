#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| regatta_comm::fuzzing::tls(bytes));
