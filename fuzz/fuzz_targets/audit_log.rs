//! See `esker_server::fuzzing::audit_log`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::audit_log(bytes);
});
