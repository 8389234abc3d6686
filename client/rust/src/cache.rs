//! The prefix cache: register, look up, fetch, put.

use bytes::Bytes;
use esker_prefix::{KvLayout, Namespace, NamespaceId, ObjectKind, TokenId};
use esker_proto::{Assembled, PlaneAssembler, WireError, check_namespace_id, chunks, v1};

use crate::{Client, Result};

/// What a lookup found.
pub type Found = v1::LookupReply;
/// Outcome of one object of a put.
pub type PutResult = v1::PutReply;

/// An object to store: the rows of one block, or of the state at one boundary.
#[derive(Clone, Debug)]
pub struct Object {
    /// Block or state.
    pub kind: ObjectKind,
    /// Prefix length in tokens that it completes.
    pub tokens: u64,
    /// Its planes, in the layout's restore order.
    pub planes: Vec<Bytes>,
}

/// The objects of a fetched prefix.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Whole objects, in the order in which they became whole.
    pub objects: Vec<Assembled>,
    /// Objects that could not be proven; the prefix ends before the first of them.
    pub missing: Vec<v1::Missing>,
    /// The node's closing account.
    pub done: v1::FetchDone,
}

impl Client {
    /// Makes a namespace known and returns its id.
    pub async fn register_namespace(&self, namespace: &Namespace, layout: &KvLayout) -> Result<NamespaceId> {
        let request = v1::RegisterNamespaceRequest {
            weights_fingerprint: Bytes::copy_from_slice(&namespace.weights),
            tokenizer_digest: Bytes::copy_from_slice(&namespace.tokenizer),
            layout_json: layout.to_json(),
            adapter: namespace.adapter.clone(),
        };
        let reply = self.cache.clone().register_namespace(request).await?.into_inner();
        Ok(check_namespace_id(&reply.namespace)?)
    }

    /// Which prefix lengths of a prompt can be resumed.
    pub async fn lookup(&self, namespace: NamespaceId, tokens: &[TokenId]) -> Result<Found> {
        let namespace = Bytes::copy_from_slice(namespace.as_bytes());
        let tokens = tokens.iter().map(|token| token.0).collect();
        Ok(self
            .cache
            .clone()
            .lookup(v1::LookupRequest { namespace, tokens, ..Default::default() })
            .await?
            .into_inner())
    }

    /// Gives a grant up: nothing was used.
    pub async fn release(&self, grant: Bytes) -> Result<()> {
        self.cache.clone().release(v1::ReleaseRequest { grant }).await?;
        Ok(())
    }

    /// Every plane of a granted prefix, object by object. `tokens` is one of the resume points, 0 for the best.
    pub async fn fetch(&self, layout: &KvLayout, grant: Bytes, tokens: u64) -> Result<Fetched> {
        let request = v1::FetchRequest { grant, tokens, ..Default::default() };
        let mut replies = self.cache.clone().fetch(request).await?.into_inner();
        let mut fetched = Fetched::default();
        let mut assembler = PlaneAssembler::new(layout);
        while let Some(reply) = replies.message().await? {
            match reply.event.ok_or(WireError::Missing("event"))? {
                v1::fetch_reply::Event::Chunk(chunk) => fetched.objects.extend(assembler.push(chunk)?),
                v1::fetch_reply::Event::Missing(missing) => {
                    // The rest of that object will not come.
                    assembler = PlaneAssembler::new(layout);
                    fetched.missing.push(missing);
                }
                v1::fetch_reply::Event::Done(done) => fetched.done = done,
            }
        }
        Ok(fetched)
    }

    /// Stores objects of the prefix `tokens`, parents first. One result per object: a refusal is a result too.
    pub async fn put(
        &self,
        namespace: NamespaceId,
        tokens: &[TokenId],
        objects: Vec<Object>,
    ) -> Result<Vec<PutResult>> {
        use v1::put_request::Step;
        let prefix = v1::PutPrefix {
            namespace: Bytes::copy_from_slice(namespace.as_bytes()),
            tokens: tokens.iter().map(|token| token.0).collect(),
            ..Default::default()
        };
        let planes = objects.into_iter().flat_map(|object| {
            object.planes.into_iter().zip(0_u32..).flat_map(move |(plane, index)| {
                chunks(object.kind, object.tokens, index, plane).map(Step::Chunk)
            })
        });
        let steps = std::iter::once(Step::Prefix(prefix)).chain(planes);
        let requests =
            tokio_stream::iter(steps.map(|step| v1::PutRequest { step: Some(step) }).collect::<Vec<_>>());
        let mut replies = self.cache.clone().put(requests).await?.into_inner();
        let mut results = Vec::new();
        while let Some(reply) = replies.message().await? {
            results.push(reply);
        }
        Ok(results)
    }
}
