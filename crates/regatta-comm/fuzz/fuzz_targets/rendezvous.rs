#![no_main]

use regatta_comm::fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // The entries and a plain map of them, and a list of them all while it is asked for.
    let peak = regatta_comm_fuzz::peak(|| fuzzing::rendezvous(bytes));
    assert!(peak <= 32 * (fuzzing::STORED + bytes.len()), "{peak} bytes for {}", bytes.len());
});
