#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let peak = regatta_comm_fuzz::peak(|| regatta::fuzzing::images(bytes));
    assert!(peak <= (32 << 20) + 64 * bytes.len(), "{peak} bytes for {}", bytes.len());
});
