//! See `esker_store::fuzzing::index_entry`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_store::fuzzing::index_entry(bytes);
});
