#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    grokpipe_fuzz::safetensors::run(data);
});
