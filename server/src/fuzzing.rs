//! What fuzz targets call: decoders of bytes that others wrote, each as a function of bytes that panics where it breaks its word.
//! Only with the feature `fuzzing`, which nothing but the fuzz crate asks for, and in this crate's own test, which changes the kept
//! corpus by chance and needs no fuzzer.

use esker_prefix::{Dtype, Family, Field, Group, KvLayout};
use esker_proto::v1;
use esker_proto::{PlaneAssembler, check_name, check_namespace_id, check_prefix, namespace_of};
use prost::Message;

use crate::ledger::frame::{self, Parsed};

/// A follower of KV events, of either kind of socket: its greeting, its handshake and what it says then.
pub fn zmtp(said: &[u8]) {
    // What is refused is refused with a reason; whether it is belongs to no fuzzer.
    let _ = crate::events::zmtp::hear(said);
}

/// A segment of the billing ledger, from any byte on: records are within it, and what follows damage is found or not.
pub fn ledger_frame(bytes: &[u8]) {
    if let Parsed::Frame(frame) = frame::parse(bytes) {
        assert!(frame.len() <= bytes.len() && frame.payload.len() <= frame::MAX_PAYLOAD_BYTES);
        // A payload is proven by its checksum before it is decoded; a forger can make both.
        let _ = v1::UsageRecord::decode(frame.payload);
    }
    if let Some((at, frame)) = frame::resync(bytes) {
        assert!(at + frame.len() <= bytes.len(), "a record that ends behind the segment");
    }
}

/// Messages of clients, and every check that they go through before anything is done for them.
pub fn request(bytes: &[u8]) {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => {
            let Ok(request) = v1::LookupRequest::decode(bytes) else { return };
            let _ = check_namespace_id(&request.namespace);
            let _ = check_name("user", &request.user);
            let v1::LookupRequest { tokens, hashes, tail_tokens, engine_hashes, unchained, .. } = request;
            let _ = check_prefix(tokens, &hashes, tail_tokens, engine_hashes, unchained);
        }
        1 => {
            let Ok(request) = v1::RegisterNamespaceRequest::decode(bytes) else { return };
            if let Ok((namespace, layout)) = namespace_of(&request) {
                assert!(namespace.layout == layout.id(), "a layout under another name");
                let again = KvLayout::from_json(&layout.to_json());
                assert!(again.is_ok_and(|again| again == layout), "a layout that does not come back");
            }
        }
        _ => planes(bytes),
    }
}

/// Chunks of planes for a small layout, each as a message behind its length, one byte.
fn planes(mut bytes: &[u8]) {
    let group = |name: &str, family, rows| Group {
        name: name.into(),
        family,
        layers: vec![0, 1],
        rows,
        fields: vec![Field { name: "values".into(), dtype: Dtype::U8, count: 2 }],
        restore_order: 0,
        plane_layers: 1,
        optional: rows == 2,
        grain_blocks: if rows == 6 { 2 } else { 1 },
        run_tokens: if rows == 7 { 8 } else { 0 },
    };
    let groups = vec![
        group("latent", Family::History, 4),
        group("coarse", Family::History, 6),
        group("window", Family::State, 3),
        group("optional", Family::State, 2),
        group("open", Family::State, 7),
    ];
    let Ok(layout) = KvLayout::new("fuzzed", 4, groups) else { panic!("this layout is sound") };
    let mut assembler = PlaneAssembler::new(&layout);
    while let Some((&length, rest)) = bytes.split_first() {
        let (message, rest) = rest.split_at(usize::from(length).min(rest.len()));
        bytes = rest;
        let Ok(chunk) = v1::PlaneChunk::decode(message) else { return };
        match assembler.push(chunk) {
            Ok(Some(object)) => {
                let specs = layout.planes_at(object.kind, object.tokens);
                assert_eq!(object.planes.len(), specs.len(), "a part of an object");
                let fits = |(plane, len): (&bytes::Bytes, u64)| plane.is_empty() || plane.len() as u64 == len;
                let lengths = specs.iter().map(|spec| spec.len_bytes);
                assert!(object.planes.iter().zip(lengths).all(fits), "a plane of another length");
            }
            Ok(None) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// The kept corpus of every target, with bytes changed, taken out and repeated.
    #[test]
    fn what_is_kept_of_each_target_can_be_damaged_at_will() {
        let mut state = 0x5eed_u64;
        println!("SEED={state:#x}");
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % bound
        };
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        for name in ["zmtp", "ledger_frame", "request"] {
            let target = match name {
                "zmtp" => super::zmtp,
                "ledger_frame" => super::ledger_frame,
                _ => super::request,
            };
            let files = std::fs::read_dir(corpus.join(name)).unwrap();
            let sound: Vec<Vec<u8>> =
                files.map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect();
            assert!(!sound.is_empty(), "{name} has no corpus");
            sound.iter().for_each(|bytes| target(bytes));
            for _ in 0..20_000 {
                let mut bytes = sound[below(sound.len())].clone();
                for _ in 0..=below(4) {
                    let at = below(bytes.len());
                    match below(4) {
                        0 => bytes[at] ^= 1 << below(8),
                        1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][below(5)],
                        2 => bytes.truncate(at.max(1)),
                        _ => bytes.extend_from_within(at..),
                    }
                }
                target(&bytes);
            }
        }
    }
}
