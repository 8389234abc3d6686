//! See `esker_server::fuzzing::policy`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::policy(bytes);
});
