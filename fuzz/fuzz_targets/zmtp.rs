//! See `esker_server::fuzzing::zmtp`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::zmtp(bytes);
});
