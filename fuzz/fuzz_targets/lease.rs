//! See `esker_store::fuzzing::lease`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_store::fuzzing::lease(bytes);
});
