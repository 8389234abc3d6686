//! See `esker_store::fuzzing::record_header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_store::fuzzing::record_header(bytes);
});
