//! See `esker_server::fuzzing::prices`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::prices(bytes);
});
