//! See `esker_store::fuzzing::plane_columns`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_store::fuzzing::plane_columns(bytes);
});
