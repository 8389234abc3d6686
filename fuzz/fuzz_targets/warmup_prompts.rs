//! See `esker_server::fuzzing::warmup_prompts`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::warmup_prompts(bytes);
});
