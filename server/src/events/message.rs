//! An event as a message of vLLM's publisher: msgpack of `[ts, [event], rank]`, where an event is a map with its type's name.
//!
//! The fields are those of `vllm/distributed/kv_events.py`, which its decoders need in full where they have no default. What vLLM
//! has no field for (`namespace`, `engine_hashes`, and the `reason` of a removal) comes beside them; decoders pass over names
//! that they do not know.

use esker_proto::v1;
use serde::{Serialize, Serializer};

use super::Logged;

/// Of the node; it is one engine to those who follow it.
const RANK: u32 = 0;

#[derive(Serialize)]
struct Batch<'a>(f64, [Event<'a>; 1], u32);

#[derive(Serialize)]
#[serde(tag = "type")]
enum Event<'a> {
    BlockStored {
        block_hashes: Vec<Hash<'a>>,
        parent_block_hash: Option<Hash<'a>>,
        token_ids: &'a [u32],
        block_size: u32,
        lora_id: Option<u32>,
        medium: &'a str,
        lora_name: Option<&'a str>,
        locality: &'a str,
        namespace: Hash<'a>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        engine_hashes: Vec<Hash<'a>>,
    },
    BlockRemoved {
        block_hashes: Vec<Hash<'a>>,
        medium: &'a str,
        locality: &'a str,
        namespace: Hash<'a>,
        reason: &'a str,
    },
    AllBlocksCleared {},
}

/// Bytes, which are not an array of numbers.
struct Hash<'a>(&'a [u8]);

impl Serialize for Hash<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

/// The payload of one event.
pub(super) fn payload(logged: &Logged) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    rmp_serde::to_vec_named(&Batch(logged.at.as_secs_f64(), [event(&logged.event)], RANK))
}

fn event(event: &v1::kv_event::Event) -> Event<'_> {
    match event {
        v1::kv_event::Event::BlockStored(stored) => Event::BlockStored {
            block_hashes: hashes(&stored.block_hashes),
            parent_block_hash: Some(&stored.parent_block_hash)
                .filter(|parent| !parent.is_empty())
                .map(|parent| Hash(parent)),
            token_ids: &stored.token_ids,
            block_size: stored.block_size,
            lora_id: None,
            medium: &stored.medium,
            lora_name: None,
            locality: &stored.locality,
            namespace: Hash(&stored.namespace),
            engine_hashes: hashes(&stored.engine_hashes),
        },
        v1::kv_event::Event::BlockRemoved(removed) => Event::BlockRemoved {
            block_hashes: hashes(&removed.block_hashes),
            medium: &removed.medium,
            locality: &removed.locality,
            namespace: Hash(&removed.namespace),
            reason: &removed.reason,
        },
        v1::kv_event::Event::AllBlocksCleared(_) => Event::AllBlocksCleared {},
    }
}

fn hashes(hashes: &[bytes::Bytes]) -> Vec<Hash<'_>> {
    hashes.iter().map(|hash| Hash(hash)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::time::Duration;

    #[test]
    fn messages_are_maps_in_an_array() {
        let at = Duration::from_millis(1500);
        let cleared = v1::kv_event::Event::AllBlocksCleared(v1::AllBlocksCleared {});
        let mut golden = vec![0x93, 0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0, 0x91, 0x81, 0xa4];
        golden.extend_from_slice(b"type\xb0AllBlocksCleared");
        golden.push(0);
        assert_eq!(payload(&Logged { at, event: cleared }).unwrap(), golden);

        let removed = v1::kv_event::Event::BlockRemoved(v1::BlockRemoved {
            block_hashes: vec![Bytes::from_static(&[9; 4])],
            medium: "STORAGE".into(),
            locality: "LOCAL".into(),
            reason: "evicted".into(),
            namespace: Bytes::from_static(&[1]),
        });
        let text = payload(&Logged { at, event: removed }).unwrap();
        // A map of six, whose first entry is the type; a hash is a binary string.
        assert_eq!(&text[10..12], [0x91, 0x86]);
        assert!(
            text[12..].starts_with(b"\xa4type\xacBlockRemoved\xacblock_hashes\x91\xc4\x04\x09\x09\x09\x09")
        );
        assert!(text.ends_with(b"\xa6reason\xa7evicted\x00"));

        let stored = v1::kv_event::Event::BlockStored(v1::BlockStored {
            block_hashes: vec![Bytes::from_static(&[9; 4])],
            token_ids: vec![1, 300],
            block_size: 2,
            ..Default::default()
        });
        let text = payload(&Logged { at, event: stored }).unwrap();
        let of = |part: &[u8]| text.windows(part.len()).any(|window| window == part);
        assert!(of(b"\xb1parent_block_hash\xc0") && of(b"\xa9token_ids\x92\x01\xcd\x01\x2c"));
        assert!(of(b"\xa7lora_id\xc0") && of(b"\xa9lora_name\xc0") && !of(b"engine_hashes"));
    }
}
