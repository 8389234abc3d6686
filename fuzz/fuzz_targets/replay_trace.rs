//! See `esker_benches::fuzzing::replay_trace`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_benches::fuzzing::replay_trace(bytes);
});
