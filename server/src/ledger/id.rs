//! Names of facts: the same fact has the same id on every node, at every attempt, after every restart.

use prost::Message;

/// Longest of the names that go into an id and into a record, in bytes.
pub(crate) const USAGE_ID_CHARS: usize = 32;
const ALPHABET: [u8; 32] = *b"abcdefghijklmnopqrstuvwxyz234567";

/// `base32(BLAKE3(cluster || tenant || request_id || op))[0..32]`, RFC 4648 in lower case; each part behind its length as u32
/// LE, so that no two lists of parts read alike. 160 bits.
pub(crate) fn usage_id(cluster: &str, tenant: &str, request_id: &str, op: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [cluster, tenant, request_id, op] {
        hasher.update(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes()).update(part.as_bytes());
    }
    base32(&hasher.finalize().as_bytes()[..USAGE_ID_CHARS * 5 / 8])
}

/// Whether a request id begins as those that the node itself gives: an hour of storage, a grant that nobody settled. A caller
/// who used one would have its record taken for the node's.
pub(crate) fn is_reserved(request_id: &str) -> bool {
    ["storage/", "grant/", "grants/"].iter().any(|own| request_id.starts_with(own))
}

/// Tells a replay of a request from another request under its name.
pub(crate) fn content_of(request: &impl Message) -> [u8; 16] {
    content(&request.encode_to_vec())
}

/// See [`content_of`].
pub(crate) fn content(bytes: &[u8]) -> [u8; 16] {
    let mut content = [0; 16];
    content.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    content
}

fn base32(bytes: &[u8]) -> String {
    let mut text = String::new();
    for five in bytes.chunks_exact(5) {
        let bits = five.iter().fold(0_u64, |bits, &byte| bits << 8 | u64::from(byte));
        text.extend((0..8).rev().map(|at| char::from(ALPHABET[(bits >> (at * 5) & 31) as usize])));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_node_calls_its_own_facts_is_nobody_elses() {
        assert!(
            ["storage/1795003200/private/00/r1", "grant/ab", "grants/ab"].iter().all(|id| is_reserved(id))
        );
        assert!(!["", "lmcache/1", "my/storage/1", "granted", "storage"].iter().any(|id| is_reserved(id)));
    }

    #[test]
    fn ids_are_fixed_and_apart() {
        assert_eq!(base32(b"fooba"), "mzxw6ytb", "RFC 4648, section 10");
        let id = usage_id("fleet", "acme", "req-1", "fetch");
        assert_eq!(id, "4ipuerzn74vin3yi3bdc7nvknfjfmskt");
        assert_eq!(id.len(), USAGE_ID_CHARS);
        for other in [
            usage_id("fleet", "acme", "req-1", "generate"),
            usage_id("fleet", "acm", "ereq-1", "fetch"),
            usage_id("flee", "tacme", "req-1", "fetch"),
            usage_id("fleet", "acme", "req-", "1fetch"),
        ] {
            assert_ne!(id, other);
        }
    }
}
