//! See `loading::config`.

#![no_main]

#[path = "../../engine/decoder/tests/support/loading.rs"]
mod loading;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    loading::config(bytes);
});
