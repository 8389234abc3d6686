//! What the objects of a put are called: by their place in the one prefix that it is about.

use std::sync::Arc;

use bytes::Bytes;
use esker_prefix::{BlockHash, Chain, KvLayout, NamespaceId, ObjectKind, ScopeKey, TokenId, rekey};
use esker_proto::PrefixNames;
use tonic::Status;

/// A prefix, as its put names it.
pub(super) struct Prefix {
    layout: Arc<KvLayout>,
    /// Whether each block continues the one before it; if so, what comes before the first.
    genesis: Option<BlockHash>,
    /// Of its whole blocks.
    pub(super) hashes: Vec<BlockHash>,
    /// What the caller named it by: one of the two.
    pub(super) tokens: Vec<TokenId>,
    pub(super) engine_hashes: Vec<Bytes>,
}

/// What an object is called, and how long the prefix is that it completes, as it is stored.
#[derive(Clone, Copy)]
pub(super) struct Name {
    pub(super) parent: BlockHash,
    pub(super) hash: BlockHash,
    pub(super) tokens: u64,
}

impl Prefix {
    pub(super) fn new(
        key: &ScopeKey,
        namespace: NamespaceId,
        layout: Arc<KvLayout>,
        names: PrefixNames,
    ) -> Result<Self, Status> {
        match names {
            PrefixNames::Tokens(tokens) => {
                let (genesis, hashes) = Chain::hashes(key, namespace, layout.block_tokens(), &tokens);
                Ok(Self { layout, genesis: Some(genesis), hashes, tokens, engine_hashes: Vec::new() })
            }
            PrefixNames::Engine { hashes: engine_hashes, chained } => {
                let genesis = chained.then(|| Chain::genesis(key, namespace, &[]).tip());
                let hashes = engine_hashes.iter().map(|hash| rekey(key, namespace, 0, hash)).collect();
                Ok(Self { layout, genesis, hashes, tokens: Vec::new(), engine_hashes })
            }
            PrefixNames::Hashes(..) => {
                Err(Status::invalid_argument("a put names its prefix by tokens or engine_hashes"))
            }
        }
    }

    /// What the object of this kind that completes a prefix of so many tokens is called, in the scope of this key.
    pub(super) fn name(&self, key: &ScopeKey, kind: ObjectKind, tokens: u64) -> Result<Name, Status> {
        let block_tokens = u64::from(self.layout.block_tokens());
        let blocks = usize::try_from(tokens / block_tokens).unwrap_or(usize::MAX);
        let before = |blocks: usize| match (self.genesis, blocks.checked_sub(1)) {
            (Some(genesis), None) => Some(genesis),
            (_, Some(last)) => self.hashes.get(last).copied(),
            (None, None) => None,
        };
        let name = if tokens.is_multiple_of(block_tokens) {
            let hash = before(blocks).filter(|_| blocks > 0);
            // A block that stands for itself is the same in whatever company it is put: as long as one block.
            hash.and_then(|hash| match self.genesis {
                None => Some(Name { parent: hash, hash, tokens: block_tokens }),
                Some(_) => Some(Name { parent: before(blocks - 1)?, hash, tokens }),
            })
        } else {
            // Behind whole blocks only tokens name something.
            let of_tokens = |parent| {
                let (begin, end) =
                    (blocks * usize::try_from(block_tokens).ok()?, usize::try_from(tokens).ok()?);
                let tail = self.tokens.get(begin..end)?;
                let hash = Chain::resume(key, parent).push(tail);
                Some(Name { parent, hash, tokens })
            };
            let may_end = kind == ObjectKind::State && self.layout.has_boundary(tokens);
            before(blocks).filter(|_| may_end).and_then(of_tokens)
        };
        name.ok_or_else(|| {
            let kind = if kind == ObjectKind::State { "state" } else { "block" };
            let whole = self.hashes.len();
            Status::invalid_argument(match self.tokens.len() {
                0 => format!(
                    "a {kind} at {tokens} tokens does not fit: the prefix of this put has {whole} whole blocks of \
                     {block_tokens} tokens"
                ),
                all => format!(
                    "a {kind} at {tokens} tokens does not fit: the prefix of this put has {all} tokens, {whole} whole \
                     blocks of {block_tokens}; blocks end with one of them, states anywhere but inside what a coarse \
                     group has together"
                ),
            })
        })
    }
}

/// For fuzzing: the first message of a put, behind the length of the prefix that an object of it completes (u32, little-endian).
/// Whether such an object has a name in it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(layout: &Arc<KvLayout>, bytes: &[u8]) -> bool {
    use esker_prefix::{RootSecret, ScopeKind};
    use esker_proto::{check_namespace_id, check_prefix, v1};
    use prost::Message;
    let Some((tokens, bytes)) = bytes.split_first_chunk() else { return false };
    let tokens = u64::from(u32::from_le_bytes(*tokens));
    let Ok(v1::PutRequest { step: Some(v1::put_request::Step::Prefix(prefix)) }) =
        v1::PutRequest::decode(bytes)
    else {
        return false;
    };
    let _ = super::ttl_class(prefix.ttl());
    let key = ScopeKey::derive(&RootSecret::new([7; 32]), ScopeKind::Private, "acme", 0);
    let Ok(namespace) = check_namespace_id(&prefix.namespace) else { return false };
    let v1::PutPrefix { tokens: ids, engine_hashes, unchained, .. } = prefix;
    let Ok(names) = check_prefix(ids, &[], Vec::new(), engine_hashes, unchained) else { return false };
    let Ok(prefix) = Prefix::new(&key, namespace, Arc::clone(layout), names) else { return false };
    let names = [ObjectKind::Block, ObjectKind::State].map(|kind| prefix.name(&key, kind, tokens));
    for name in names.iter().flatten() {
        let block_tokens = u64::from(layout.block_tokens());
        assert!(tokens > 0 && tokens / block_tokens <= prefix.hashes.len() as u64);
        assert!(name.tokens == tokens || prefix.genesis.is_none() && name.tokens == block_tokens);
        assert!(name.parent != name.hash || prefix.genesis.is_none());
    }
    names.iter().any(Result::is_ok)
}
