//! See `esker_client::fuzzing::local_arena`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_client::fuzzing::local_arena(bytes);
});
