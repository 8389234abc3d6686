//! See `esker_server::fuzzing::http_body`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::http_body(bytes);
});
