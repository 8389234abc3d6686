//! Promise: a tenant that wants less than its share of a full store loses nothing to one that floods it, and no quota is needed for
//! that. The same flood from within the tenant must cost much, or it would prove nothing.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::v1;
use esker_prefix::{KvLayout, Namespace, NamespaceId};
use esker_tests::identity::{Bearer, Issuer};
use esker_tests::{Node, Prompt, flat_layout, put_steps, scratch};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::prefix_cache_client::PrefixCacheClient;

/// What the store may take, and what a flood puts into it.
const CAPACITY_BYTES: u64 = 64 << 20;
const FLOOD_BYTES: u64 = 10 * CAPACITY_BYTES;

/// Prompts that the quiet tenant asks for in each round, and blocks of each: some 14 MiB, less than half of its share.
const QUIET_PROMPTS: u64 = 8;
const BLOCKS_U32: u32 = 16;
const BLOCKS: u64 = BLOCKS_U32 as u64;
const ROUNDS: u64 = 5;

/// What comes between two rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flood {
    None,
    /// Prompts that nobody asks for again.
    Unique,
    /// Prompts that are asked for again and again before the next ones come.
    Read,
}

/// An engine of a tenant, for one of its users.
struct Engine {
    cache: PrefixCacheClient<InterceptedService<Channel, Bearer>>,
    user: &'static str,
}

impl Engine {
    fn new(node: &Node, issuer: &Issuer, tenant: &str, user: &'static str) -> Result<Self> {
        let bearer = issuer.token(tenant, &["reader", "writer"])?;
        Ok(Self {
            cache: PrefixCacheClient::new(InterceptedService::new(node.channel.clone(), bearer)),
            user,
        })
    }

    async fn register(&mut self, layout: &KvLayout) -> Result<NamespaceId> {
        let about =
            Namespace { weights: [7; 32], tokenizer: [2; 32], layout: layout.id(), adapter: String::new() };
        let request = v1::RegisterNamespaceRequest {
            weights_fingerprint: Bytes::copy_from_slice(&about.weights),
            tokenizer_digest: Bytes::copy_from_slice(&about.tokenizer),
            layout_json: layout.to_json(),
            adapter: String::new(),
        };
        self.cache.register_namespace(request).await?;
        Ok(about.id())
    }

    /// Reads what is stored of a prompt, and puts the rest, as if it had computed it. Returns the tokens that it read.
    async fn ask(&mut self, prompt: &Prompt) -> Result<u64> {
        let found = self.cache.lookup(v1::LookupRequest {
            namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
            tokens: prompt.tokens.iter().map(|token| token.0).collect(),
            user: self.user.into(),
            ..Default::default()
        });
        let found = found.await?.into_inner();
        if !found.grant.is_empty() {
            let fetch = v1::FetchRequest { grant: found.grant.clone(), ..Default::default() };
            let mut planes = self.cache.fetch(fetch).await?.into_inner();
            while planes.message().await?.is_some() {}
            self.cache.release(v1::ReleaseRequest { grant: found.grant }).await?;
        }
        let blocks = found.history_tokens / prompt.boundary(1);
        if blocks < BLOCKS {
            let mut steps = put_steps(prompt, prompt.blocks(blocks + 1..=BLOCKS));
            if let Some(v1::put_request::Step::Prefix(prefix)) = steps.first_mut() {
                prefix.user = self.user.into();
            }
            let messages = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) });
            let messages = tokio_stream::iter(messages.collect::<Vec<_>>());
            let mut replies = self.cache.put(messages).await?.into_inner();
            while replies.message().await?.is_some() {}
        }
        Ok(found.history_tokens)
    }
}

/// The hit rate of the quiet tenant by tokens, in percent, while `flooder` floods.
async fn hit_rate(flood: Flood, flooder: &str) -> Result<f64> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy("[tenants.quiet]\n[tenants.loud]\n")?;
    let policy = policy.to_str().context("a path")?;
    let options = ["--no-model", "--segment-mib", "4", "--capacity", "64MiB", "--policy", policy];
    let node = Node::start(&folder.path().join("data"), &options).await?;
    let mut quiet = Engine::new(&node, &issuer, "quiet", "")?;
    let mut loud = Engine::new(&node, &issuer, flooder, "loud")?;
    let layout = flat_layout();
    let namespace = quiet.register(&layout).await?;
    let prompt = |seed| Prompt::new(namespace, &layout, seed, BLOCKS_U32);
    let prompts: Vec<Prompt> = (0..QUIET_PROMPTS).map(|seed| prompt(1_000 + seed)).collect();
    for prompt in &prompts {
        quiet.ask(prompt).await?;
    }
    let prompt_bytes = BLOCKS * layout.object_bytes(esker_prefix::ObjectKind::Block);
    let floods = if flood == Flood::None { 0 } else { FLOOD_BYTES.div_ceil(prompt_bytes * ROUNDS) };
    let mut read = 0;
    for round in 0..ROUNDS {
        for number in 0..floods {
            let prompt = prompt(1_000_000 + round * floods + number);
            for _ in 0..if flood == Flood::Read { 3 } else { 1 } {
                loud.ask(&prompt).await?;
            }
        }
        for prompt in &prompts {
            read += quiet.ask(prompt).await?;
        }
    }
    node.kill()?;
    let asked = ROUNDS * QUIET_PROMPTS * prompts[0].boundary(BLOCKS);
    let rate = 100.0 * read as f64 / asked as f64;
    println!("{flood:?} by {flooder}: {rate:.2} % of {asked} tokens");
    Ok(rate)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_costs_a_tenant_below_its_share_no_hits() -> Result<()> {
    let alone = hit_rate(Flood::None, "loud").await?;
    ensure!(alone > 99.0, "the quiet tenant's own prompts fit: {alone:.1} %");
    for flood in [Flood::Unique, Flood::Read] {
        let flooded = hit_rate(flood, "loud").await?;
        ensure!(alone - flooded <= 2.0, "{flood:?}: the flood cost {:.1} points", alone - flooded);
    }
    Ok(())
}

/// The control: where the flood is the tenant's own, the store does not tell them apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_flood_within_a_tenant_costs_it_much() -> Result<()> {
    let flooded = hit_rate(Flood::Read, "quiet").await?;
    ensure!(flooded < 80.0, "{flooded:.1} %");
    Ok(())
}
