//! See `esker_server::fuzzing::sink_answer`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::sink_answer(bytes);
});
