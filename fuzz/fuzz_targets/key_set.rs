//! See `esker_server::fuzzing::key_set`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::key_set(bytes);
});
