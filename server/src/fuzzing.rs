//! What fuzz targets call: decoders of bytes that others wrote, each as a function of bytes that panics where it breaks its word and
//! says whether the bytes were accepted. Where a decoder is private to its file, what is asked of it stands there, as `hear`.
//! Only with the feature `fuzzing`, which nothing but the fuzz crate asks for, and in this crate's own test, which changes the kept
//! corpus by chance and needs no fuzzer.

use std::sync::Arc;

use esker_prefix::{Dtype, Family, Field, Group, KvLayout};
use esker_proto::v1;
use esker_proto::{PlaneAssembler, check_name, check_namespace_id, check_prefix, namespace_of};
use prost::Message;

use crate::ledger;
use crate::ledger::frame::{self, Parsed};
use crate::service::hear;

/// A follower of KV events, of either kind of socket: its greeting, its handshake and what it says then.
pub fn zmtp(said: &[u8]) -> bool {
    crate::events::zmtp::hear(said).is_ok()
}

/// A segment of the billing ledger, from any byte on: records are within it, and what follows damage is found or not.
pub fn ledger_frame(bytes: &[u8]) -> bool {
    if let Parsed::Frame(frame) = frame::parse(bytes) {
        assert!(frame.len() <= bytes.len() && frame.payload.len() <= frame::MAX_PAYLOAD_BYTES);
        // A payload is proven by its checksum before it is decoded; a forger can make both.
        let _ = v1::UsageRecord::decode(frame.payload);
    }
    frame::resync(bytes).is_some_and(|(at, frame)| {
        assert!(at + frame.len() <= bytes.len(), "a record that ends behind the segment");
        true
    })
}

/// The ledger's head: two slots; or the header of a segment of it.
pub fn ledger_head(bytes: &[u8]) -> bool {
    let (head, header) = (ledger::head::hear(bytes), ledger::segment::hear(bytes));
    head || header
}

/// A key or a value of the ledger's index; or the cursor of an export, which a client brings back.
pub fn ledger_index(bytes: &[u8]) -> bool {
    ledger::index::hear(bytes)
}

/// A wrapped data key, by a root key of 32 nines; or a root key.
pub fn data_key(bytes: &[u8]) -> bool {
    crate::keys::hear(bytes)
}

/// An audit log.
pub fn audit_log(bytes: &[u8]) -> bool {
    crate::audit::hear(bytes)
}

/// An operator's policy.
pub fn policy(bytes: &[u8]) -> bool {
    crate::policy::hear(bytes)
}

/// An operator's prices.
pub fn prices(bytes: &[u8]) -> bool {
    crate::price::hear(bytes)
}

/// Public keys of bearer tokens.
pub fn key_set(bytes: &[u8]) -> bool {
    crate::auth::jwt::hear(bytes)
}

/// A client's certificate.
pub fn certificate(bytes: &[u8]) -> bool {
    crate::auth::spiffe::hear(bytes)
}

/// A model's chat template, and the conversation that it is to render.
pub fn chat_template(bytes: &[u8]) -> bool {
    crate::chat_template::hear(bytes)
}

/// The body of a request by HTTP; or what a model wrote, in which calls of tools are looked for.
pub fn http_body(bytes: &[u8]) -> bool {
    let called = std::str::from_utf8(bytes).is_ok_and(crate::chat_template::tool_call::hear);
    let (conversations, accepted) = crate::http::hear(bytes);
    for message in conversations.iter().flat_map(|conversation| &conversation.messages) {
        crate::chat_template::tool_call::hear(&message.content);
    }
    called || accepted
}

/// A file of prompts to warm up.
pub fn warmup_prompts(bytes: &[u8]) -> bool {
    crate::command::warmup::hear(bytes)
}

/// A warm-up job as it was written down.
pub fn warmup_job(bytes: &[u8]) -> bool {
    crate::warmups::job::hear(bytes)
}

/// The file of answers that are remembered.
pub fn replay_file(bytes: &[u8]) -> bool {
    crate::replay::hear(bytes)
}

/// A bearer token, or its claims.
pub fn bearer_token(bytes: &[u8]) -> bool {
    crate::auth::jwt::hear_token(bytes)
}

/// Messages of clients, and every check that they go through before anything is done for them.
pub fn request(bytes: &[u8]) -> bool {
    let Some((&kind, bytes)) = bytes.split_first() else { return false };
    match kind % KINDS {
        0 => {
            let Ok(request) = v1::LookupRequest::decode(bytes) else { return false };
            let _ = check_namespace_id(&request.namespace);
            let _ = check_name("user", &request.user);
            let v1::LookupRequest { tokens, hashes, tail_tokens, engine_hashes, unchained, .. } = request;
            check_prefix(tokens, &hashes, tail_tokens, engine_hashes, unchained).is_ok()
        }
        1 => {
            let Ok(request) = v1::RegisterNamespaceRequest::decode(bytes) else { return false };
            let Ok((namespace, layout)) = namespace_of(&request) else { return false };
            assert!(namespace.layout == layout.id(), "a layout under another name");
            let again = KvLayout::from_json(&layout.to_json());
            assert!(again.is_ok_and(|again| again == layout), "a layout that does not come back");
            true
        }
        2 => planes(bytes),
        3 => hear::settle(bytes),
        4 => hear::put(&layout(), bytes),
        5 => hear::fetch(&layout(), bytes),
        6 => hear::session(bytes),
        7 => hear::warmup(bytes),
        8 => hear::usage(bytes),
        9 => hear::generate(bytes),
        _ => hear::deadline(bytes),
    }
}

/// Of requests, by their first byte.
const KINDS: u8 = 11;

/// A small layout with groups of every kind.
fn layout() -> Arc<KvLayout> {
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
    Arc::new(layout)
}

/// Chunks of planes for that layout, each as a message behind its length, one byte.
fn planes(mut bytes: &[u8]) -> bool {
    let layout = layout();
    let mut assembler = PlaneAssembler::new(&layout);
    let mut whole = false;
    while let Some((&length, rest)) = bytes.split_first() {
        let (message, rest) = rest.split_at(usize::from(length).min(rest.len()));
        bytes = rest;
        let Ok(chunk) = v1::PlaneChunk::decode(message) else { return whole };
        match assembler.push(chunk) {
            Ok(Some(object)) => {
                let specs = layout.planes_at(object.kind, object.tokens);
                assert_eq!(object.planes.len(), specs.len(), "a part of an object");
                let fits = |(plane, len): (&bytes::Bytes, u64)| plane.is_empty() || plane.len() as u64 == len;
                let lengths = specs.iter().map(|spec| spec.len_bytes);
                assert!(object.planes.iter().zip(lengths).all(fits), "a plane of another length");
                whole = true;
            }
            Ok(None) => {}
            Err(_) => return whole,
        }
    }
    whole
}

#[cfg(test)]
mod tests;
