//! See `esker_server::fuzzing::replay_file`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::replay_file(bytes);
});
