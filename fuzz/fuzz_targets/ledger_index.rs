//! See `esker_server::fuzzing::ledger_index`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    esker_server::fuzzing::ledger_index(bytes);
});
