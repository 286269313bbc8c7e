#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // A field of no bytes takes four in a message and sixteen in a list, which doubles as it grows.
    let peak = regatta_comm_fuzz::peak(|| regatta_comm::fuzzing::wire(bytes));
    assert!(peak <= 4096 + 32 * bytes.len(), "{peak} bytes for {}", bytes.len());
});
