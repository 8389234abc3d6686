//! See `esker_server::fuzzing::data_key`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::data_key(bytes);
});
