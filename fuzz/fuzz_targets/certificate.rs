//! See `esker_server::fuzzing::certificate`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::certificate(bytes);
});
