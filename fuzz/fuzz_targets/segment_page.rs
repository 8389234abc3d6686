//! See `esker_store::fuzzing::segment_page`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_store::fuzzing::segment_page(bytes);
});
