//! See `esker_server::fuzzing::bearer_token`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::bearer_token(bytes);
});
