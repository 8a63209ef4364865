#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    grokpipe_fuzz::pickle::run(data);
});
