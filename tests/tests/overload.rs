//! Promise: more work than a node can do ends in refusals that say when to come again, never in a node that dies or forgets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::v1;
use esker_prefix::{KvLayout, RowFormat};
use esker_tests::identity::{Bearer, Issuer};
use esker_tests::{Cage, Node, Prompt, flat_layout, put_steps, scratch};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::prefix_cache_client::PrefixCacheClient;

const CAGE_BYTES: u64 = 512 << 20;
const HUGE_PUTS: u64 = 1_000;

/// Blocks of about 8 MiB.
fn huge_layout() -> Result<Arc<KvLayout>> {
    let config = r#"{"model_type":"deepseek_v32","num_hidden_layers":61,"kv_lora_rank":512,"qk_rope_head_dim":64,
        "index_head_dim":128}"#;
    Ok(Arc::new(KvLayout::from_config(config, RowFormat::Bf16, 128)?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_huge_puts_at_once_end_in_refusals() -> Result<()> {
    huge_puts(50).await
}

/// What a connection may send ahead of being read does not add up to more than there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_huge_puts_by_a_connection_each_end_in_refusals() -> Result<()> {
    huge_puts(1).await
}

/// A thousand, so many by each connection.
async fn huge_puts(puts_per_connection: u64) -> Result<()> {
    let folder = scratch();
    let Some(cage) = Cage::new(CAGE_BYTES) else { return Ok(()) };
    let options = ["--no-model", "--segment-mib", "64"];
    let node = Node::start_in(&cage, &folder.path().join("data"), &options).await?;
    let layout = huge_layout()?;
    let namespace = node.register(&layout, 1).await?;
    // One set of bytes for all: it is the node whose memory is tested.
    let model = Prompt::new(namespace, &layout, 1, 2);
    let blocks = model.blocks(1..=2);
    let bytes: usize = blocks.iter().flat_map(|object| &object.planes).map(Bytes::len).sum();
    ensure!(bytes > 8 << 20, "blocks of {bytes} bytes are not huge");

    let connections = HUGE_PUTS / puts_per_connection;
    let mut puts = tokio::task::JoinSet::new();
    for connection in 0..connections {
        let channel = Channel::from_shared(format!("http://{}", node.address))?.connect().await?;
        for at in 0..puts_per_connection {
            let seed = 10 + connection * puts_per_connection + at;
            let mut prompt = Prompt::new(namespace, &layout, seed, 2);
            prompt.seed = model.seed;
            let steps = put_steps(&prompt, blocks.clone());
            let mut cache = PrefixCacheClient::new(channel.clone());
            puts.spawn(async move {
                let messages = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) });
                let mut replies = cache.put(tokio_stream::iter(messages)).await?.into_inner();
                let mut stored = 0;
                while let Some(reply) = replies.message().await? {
                    stored += u64::from(reply.outcome() == v1::Outcome::Stored);
                }
                Ok::<_, tonic::Status>((seed, stored))
            });
        }
    }
    let (mut whole, mut refused) = (Vec::new(), 0);
    while let Some(put) = puts.join_next().await {
        match put? {
            Ok((seed, 2)) => whole.push(seed),
            Ok((_, stored)) => anyhow::bail!("a put ended well with {stored} of 2 blocks"),
            Err(status) => {
                ensure!(status.code() == Code::ResourceExhausted, "a put ended with {status}");
                ensure!(status.metadata().get("grpc-retry-pushback-ms").is_some(), "no pushback: {status}");
                refused += 1;
            }
        }
    }
    let (peak, kills) = cage.account();
    println!(
        "{} whole, {refused} refused; peak {peak:?} bytes in a cage of {CAGE_BYTES}, {kills} kills",
        whole.len()
    );
    ensure!(kills == 0, "the kernel killed");
    ensure!(!whole.is_empty() && refused > 0, "{} whole, {refused} refused", whole.len());
    // It still serves, and has what it acknowledged.
    for seed in whole.into_iter().take(20) {
        let mut prompt = Prompt::new(namespace, &layout, seed, 2);
        prompt.seed = model.seed;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, 2);
    }
    node.kill()
}

/// One tenant with a share of the store, as an engine that puts and looks up sees it.
struct Tenant {
    cache: PrefixCacheClient<InterceptedService<Channel, Bearer>>,
}

impl Tenant {
    async fn put(&mut self, prompt: &Prompt, blocks: u64) -> Result<(), tonic::Status> {
        let steps = put_steps(prompt, prompt.blocks(1..=blocks));
        let messages = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) }).collect::<Vec<_>>();
        let mut replies = self.cache.put(tokio_stream::iter(messages)).await?.into_inner();
        while replies.message().await?.is_some() {}
        Ok(())
    }

    async fn hit_tokens(&mut self, prompt: &Prompt) -> Result<u64> {
        let request = v1::LookupRequest {
            namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
            tokens: prompt.tokens.iter().map(|token| token.0).collect(),
            ..Default::default()
        };
        let found = self.cache.lookup(request).await?.into_inner();
        if !found.grant.is_empty() {
            self.cache.release(v1::ReleaseRequest { grant: found.grant }).await?;
        }
        Ok(found.history_tokens)
    }
}

/// Prompts of the quiet tenant, and blocks of each.
const QUIET_PROMPTS: u64 = 40;
const BLOCKS_U32: u32 = 16;
const BLOCKS: u64 = BLOCKS_U32 as u64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flooding_tenant_costs_another_no_hits() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    // A store of 256 MiB. The quiet tenant uses a quarter of it.
    let policy = issuer.policy(
        "[tenants.quiet]\nstored_bytes = 134_217_728\n[tenants.flood]\nstored_bytes = 134_217_728\n\
         [tenants.long]\nstored_bytes = 4_194_304\n[tenants.slow]\nputs_per_s = 5\n",
    )?;
    let data = folder.path().join("data");
    let policy = policy.to_str().context("a path")?;
    let options = ["--no-model", "--segment-mib", "8", "--capacity", "256MiB", "--policy", policy];
    let node = Node::start(&data, &options).await?;
    let tenant = |name| -> Result<Tenant> {
        let bearer = issuer.token(name, &["reader", "writer"])?;
        let channel = InterceptedService::new(node.channel.clone(), bearer);
        Ok(Tenant { cache: PrefixCacheClient::new(channel) })
    };
    let (mut quiet, mut flood) = (tenant("quiet")?, tenant("flood")?);
    let layout = flat_layout();
    let about = esker_prefix::Namespace {
        weights: [7; 32],
        tokenizer: [2; 32],
        layout: layout.id(),
        adapter: String::new(),
    };
    let request = v1::RegisterNamespaceRequest {
        weights_fingerprint: Bytes::copy_from_slice(&about.weights),
        tokenizer_digest: Bytes::copy_from_slice(&about.tokenizer),
        layout_json: layout.to_json(),
        adapter: String::new(),
    };
    quiet.cache.register_namespace(request).await?;
    let prompts: Vec<Prompt> =
        (0..QUIET_PROMPTS).map(|seed| Prompt::new(about.id(), &layout, 1_000 + seed, BLOCKS_U32)).collect();
    for prompt in &prompts {
        quiet.put(prompt, BLOCKS).await?;
    }
    let hit_rate = async |quiet: &mut Tenant| -> Result<f64> {
        let mut hit = 0;
        for prompt in &prompts {
            hit += quiet.hit_tokens(prompt).await?;
        }
        Ok(100.0 * hit as f64 / (QUIET_PROMPTS * BLOCKS * 64) as f64)
    };
    let before = hit_rate(&mut quiet).await?;
    ensure!(before > 99.0, "the quiet tenant's own prompts fit: {before:.1} %");

    // Ten times the store's capacity: 1,280 prompts of 16 blocks of 128 KiB, and more.
    let block_bytes = layout.object_bytes(esker_prefix::ObjectKind::Block);
    let floods = 10 * (256 << 20) / (BLOCKS * block_bytes);
    let (mut refused, mut seed) = (0, 0);
    while seed < floods {
        let prompt = Prompt::new(about.id(), &layout, 1_000_000 + seed, BLOCKS_U32);
        match flood.put(&prompt, BLOCKS).await {
            Ok(()) => {}
            Err(status) if status.code() == Code::ResourceExhausted => refused += 1,
            Err(status) => return Err(status.into()),
        }
        seed += 1;
    }
    let after = hit_rate(&mut quiet).await?;
    // One put that is longer than its tenant's share is stopped inside.
    let mut long = tenant("long")?;
    let prompt = Prompt::new(about.id(), &layout, 5_000_000, 256);
    let refused_inside = long.put(&prompt, 256).await.unwrap_err();
    ensure!(refused_inside.code() == Code::ResourceExhausted, "{refused_inside}");
    let stored_bytes = long.hit_tokens(&prompt).await? / 64 * block_bytes;
    ensure!((1 << 20..16 << 20).contains(&stored_bytes), "{stored_bytes} bytes of a quota of 4 MiB");
    // One of more objects than its tenant may put in a second gets as far as that, and is told when to go on.
    let mut slow = tenant("slow")?;
    let prompt = Prompt::new(about.id(), &layout, 6_000_000, BLOCKS_U32);
    let later = slow.put(&prompt, BLOCKS).await.unwrap_err();
    ensure!(later.code() == Code::ResourceExhausted, "{later}");
    ensure!(later.metadata().contains_key("grpc-retry-pushback-ms"), "{later:?}");
    ensure!(slow.hit_tokens(&prompt).await? >= 5 * 64, "what was allowed is stored");
    // Sent again as a whole it gets further each time: what is stored costs nothing.
    let mut sent = 1;
    while slow.put(&prompt, BLOCKS).await.is_err() {
        sent += 1;
        ensure!(sent < 20, "{sent} times sent, {} tokens stored", slow.hit_tokens(&prompt).await?);
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }
    ensure!(slow.hit_tokens(&prompt).await? == BLOCKS * 64, "all of it is stored");
    println!(
        "{floods} floods, {refused} refused; the quiet tenant hits {before:.2} % before, {after:.2} % after"
    );
    ensure!(before - after <= 2.0, "the flood cost {:.1} points", before - after);
    node.kill()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_when_the_node_is_told_to_stop_ends_in_good_order() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Arc::new(Node::store_only(&data).await?);
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(AtomicU64::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_u64 {
        let (node, layout) = (node.clone(), layout.clone());
        let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
        writers.spawn(async move {
            let mut done = Vec::new();
            for round in 0.. {
                let prompt = Prompt::new(namespace, &layout, 100 * writer + round, 4);
                let stored = node.store(&prompt, prompt.blocks(1..=4)).await;
                if stop.load(Ordering::Relaxed) || stored.is_err() {
                    break;
                }
                acknowledged.fetch_add(1, Ordering::Relaxed);
                done.push(prompt);
            }
            done
        });
    }
    while acknowledged.load(Ordering::Relaxed) < 20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let started = Instant::now();
    node.signal("TERM")?;
    let mut prompts = Vec::new();
    while let Some(done) = writers.join_next().await {
        stop.store(true, Ordering::Relaxed);
        prompts.extend(done?);
    }
    let node = Arc::try_unwrap(node).map_err(|_| anyhow::anyhow!("a writer still holds the node"))?;
    let status = node.ended().await?;
    ensure!(status.success(), "it ended with {status}");
    ensure!(started.elapsed() < Duration::from_secs(15), "the drain took {:?}", started.elapsed());
    let node = Node::store_only(&data).await?;
    for prompt in prompts {
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, 4);
    }
    node.kill()
}
