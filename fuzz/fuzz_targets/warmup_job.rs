//! See `esker_server::fuzzing::warmup_job`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::warmup_job(bytes);
});
