//! Chain hashes: the identity of a prefix.
//!
//! ```text
//! h(-1) = keyed_hash(scope_key, "genesis" || namespace || extra keys)
//! h(i)  = keyed_hash(scope_key, "block" || h(i-1) || token count u32 LE || tokens, each u32 LE)
//! extra keys: each as length u32 LE || bytes
//! ```
//!
//! 32 bytes, never truncated. The hash says *which tokens*, never *which bytes*: integrity is the content
//! digest's business.

use std::fmt;

use crate::{NamespaceId, ScopeKey, TokenId};

/// Defines a 32-byte digest newtype with hexadecimal text.
macro_rules! digest_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The 32 bytes.
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// All 64 hexadecimal digits.
            pub fn to_hex(&self) -> String {
                blake3::Hash::from_bytes(self.0).to_hex().to_string()
            }

            /// Reads 64 hexadecimal digits.
            pub fn from_hex(text: &str) -> crate::Result<Self> {
                let hash = blake3::Hash::from_hex(text).map_err(|_| crate::PrefixError::BadHex(text.to_owned()))?;
                Ok(Self(*hash.as_bytes()))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        /// The first 8 digits: enough for a log line.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.to_hex()[..8])
            }
        }
    };
}
pub(crate) use digest_type;

digest_type! {
    /// Identity of a prefix: one link of the chain, at a block boundary, or behind one where a state lies.
    BlockHash
}

/// A chain under construction: the hash of everything said so far.
#[derive(Clone, Debug)]
pub struct Chain {
    key: ScopeKey,
    tip: BlockHash,
}

impl Chain {
    /// The empty prefix of `namespace` in the scope of `key`. `extra_keys` bind what else decides the bytes,
    /// such as the digests of images.
    pub fn genesis(key: &ScopeKey, namespace: NamespaceId, extra_keys: &[&[u8]]) -> Self {
        let mut hasher = key.hasher();
        hasher.update(b"genesis").update(namespace.as_bytes());
        for extra in extra_keys {
            hasher.update(&len_u32(extra.len())).update(extra);
        }
        Self { key: key.clone(), tip: BlockHash(*hasher.finalize().as_bytes()) }
    }

    /// The prefix whose hash is `tip`, which somebody has made in the same scope.
    pub fn resume(key: &ScopeKey, tip: BlockHash) -> Self {
        Self { key: key.clone(), tip }
    }

    /// The hash of the prefix so far.
    pub fn tip(&self) -> BlockHash {
        self.tip
    }

    /// Appends one block of tokens, or the part of one that a prefix ends with, and returns its hash.
    pub fn push(&mut self, tokens: &[TokenId]) -> BlockHash {
        // One update call for a block: the hasher's per-call cost is larger than that of four bytes.
        let mut bytes = [0_u8; 4 * 1024];
        let mut hasher = self.key.hasher();
        hasher.update(b"block").update(self.tip.as_bytes()).update(&len_u32(tokens.len()));
        for run in tokens.chunks(bytes.len() / 4) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(run) {
                slot.copy_from_slice(&token.0.to_le_bytes());
            }
            hasher.update(&bytes[..run.len() * 4]);
        }
        self.tip = BlockHash(*hasher.finalize().as_bytes());
        self.tip
    }

    /// Hashes of every whole block of `tokens`, from the empty prefix on; a shorter rest is left out.
    pub fn hashes(
        key: &ScopeKey,
        namespace: NamespaceId,
        block_tokens: u32,
        tokens: &[TokenId],
    ) -> (BlockHash, Vec<BlockHash>) {
        let mut chain = Self::genesis(key, namespace, &[]);
        let genesis = chain.tip();
        (genesis, tokens.chunks_exact(block_tokens as usize).map(|block| chain.push(block)).collect())
    }
}

/// The name, in the scope of `key`, of a block that an engine names by a hash of its own:
/// `keyed_hash(scope_key, "rekey" || namespace || group u32 LE || length u16 LE || engine hash)`. An engine may send any hash:
/// without the scope key it can neither name nor collide with a block of another scope.
pub fn rekey(key: &ScopeKey, namespace: NamespaceId, group: u32, engine_hash: &[u8]) -> BlockHash {
    let length = u16::try_from(engine_hash.len()).expect("engine hashes are bounded where they come in");
    let mut hasher = key.hasher();
    hasher.update(b"rekey").update(namespace.as_bytes()).update(&group.to_le_bytes());
    hasher.update(&length.to_le_bytes()).update(engine_hash);
    BlockHash(*hasher.finalize().as_bytes())
}

/// Length prefix of a variable field. Fields here are names and blocks; none comes near 4 GiB.
pub(crate) fn len_u32(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("hashed fields are far below 4 GiB").to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Namespace, RootSecret, ScopeKind};
    use proptest::prelude::*;

    fn key(id: &str) -> ScopeKey {
        ScopeKey::derive(&RootSecret::new([7; 32]), ScopeKind::Private, id, 0)
    }

    fn namespace() -> NamespaceId {
        let layout = crate::LayoutId([3; 32]);
        Namespace { weights: [1; 32], tokenizer: [2; 32], layout, adapter: String::new() }.id()
    }

    fn tokens(count: u32) -> Vec<TokenId> {
        (0..count).map(TokenId).collect()
    }

    /// Golden digests, made by an independent BLAKE3 (Python package `blake3`) from the formulas above.
    #[test]
    fn hashes_do_not_change_by_accident() {
        let (genesis, hashes) = Chain::hashes(&key("tenant-a"), namespace(), 128, &tokens(300));
        assert_eq!(namespace().to_hex(), "01643ad5678e300e6dc92f97a00c28a0c4ab6d25047b93a5d04305c98d2ebc64");
        assert_eq!(
            key("tenant-a").tag().0,
            [0x7f, 0x14, 0x34, 0x07, 0xaf, 0x8e, 0xa6, 0xbe, 0x2c, 0x73, 0x35, 0x5e, 0x6c, 0xb4, 0x1f, 0x3b]
        );
        assert_eq!(genesis.to_hex(), "0f6c235028d3ccd1819dec8f0c6bcad12044b9d36c1068d25c7fd2f7ac0512c1");
        assert_eq!(hashes.len(), 2);
        assert_eq!(hashes[0].to_hex(), "ca4c81862978779467e947a3fbe95843b61ff43d9fc744449b6627903f17a03d");
        assert_eq!(hashes[1].to_hex(), "fd9a1d0960f013097ec7cb3083e8ef98e4b931c2af0aeca3e80cabc1e78c7dde");
    }

    /// Golden digests, as above.
    #[test]
    fn an_engines_hash_names_another_block_in_every_scope_and_namespace() {
        let name = |tenant, group, hash: &[u8]| rekey(&key(tenant), namespace(), group, hash).to_hex();
        assert_eq!(
            name("tenant-a", 0, b"engine"),
            "a9ff18f51f9c1b8f96f0d535757a4050aa1b7224fe4c334b04f6df601db6cecd"
        );
        assert_ne!(name("tenant-a", 0, b"engine"), name("tenant-b", 0, b"engine"));
        assert_ne!(name("tenant-a", 0, b"engine"), name("tenant-a", 1, b"engine"));
        assert_ne!(name("tenant-a", 0, b"engine"), name("tenant-a", 0, b"engine\0"));
    }

    #[test]
    fn everything_that_decides_the_bytes_decides_the_hash() {
        let base = Chain::genesis(&key("a"), namespace(), &[]).push(&tokens(128));
        let mut other_namespace = namespace();
        other_namespace.0[0] ^= 1;
        let mut changed = tokens(128);
        changed[127].0 += 1;
        let others = [
            Chain::genesis(&key("b"), namespace(), &[]).push(&tokens(128)),
            Chain::genesis(&key("a"), other_namespace, &[]).push(&tokens(128)),
            Chain::genesis(&key("a"), namespace(), &[b"image"]).push(&tokens(128)),
            Chain::genesis(&key("a"), namespace(), &[]).push(&tokens(127)),
            Chain::genesis(&key("a"), namespace(), &[]).push(&changed),
        ];
        for other in others {
            assert_ne!(base, other);
        }
    }

    proptest! {
        #[test]
        fn a_longer_prompt_shares_the_hashes_of_its_prefix(tokens in prop::collection::vec(any::<u32>(), 0..600), cut in 0..600_usize) {
            let tokens: Vec<TokenId> = tokens.into_iter().map(TokenId).collect();
            let (_, all) = Chain::hashes(&key("a"), namespace(), 64, &tokens);
            let (_, part) = Chain::hashes(&key("a"), namespace(), 64, &tokens[..cut.min(tokens.len())]);
            prop_assert_eq!(&all[..part.len()], &part[..]);
        }
    }

    #[test]
    fn hex_round_trips_and_bad_hex_is_named() {
        let hash = BlockHash([0xab; 32]);
        assert_eq!(BlockHash::from_hex(&hash.to_hex()), Ok(hash));
        assert!(BlockHash::from_hex("zz").unwrap_err().to_string().contains("zz"));
    }
}
