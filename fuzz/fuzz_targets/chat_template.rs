//! See `esker_server::fuzzing::chat_template`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::chat_template(bytes);
});
