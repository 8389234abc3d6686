//! Lookups of long chains, as a router or an engine asks: a chain of 1,500 blocks that are stored and 12 that are not.
//!
//! Sixty-four clients ask, each ten times a second: at its own moments, and late where the node is late. The same clients without
//! a pause between two questions show where the node is saturated; what they wait for then is mostly each other.

use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_benches::measure::percentile_us;
use esker_client::{Client, v1};
use esker_prefix::{KvLayout, NamespaceId, ObjectKind, RowFormat};
use serde_json::{Map, Value, json};
use v1::prefix_cache_client::PrefixCacheClient;

use super::bed::{Bed, objects, register, tokens};

const KNOWN: u32 = 1500;
const NEW: u32 = 12;
const CLIENTS: usize = 64;
/// Between two questions of one client.
const PAUSE: Duration = Duration::from_millis(100);
const WARM_UP: Duration = Duration::from_millis(500);
const MEASURED: Duration = Duration::from_secs(4);

pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    bed.clients.block_on(async {
        let layout = small_v4()?;
        let namespace = register(bed.address, &layout).await?;
        let hashes = fill(bed, &layout, namespace).await?;
        let named = v1::LookupRequest {
            namespace: Bytes::copy_from_slice(namespace.as_bytes()),
            prompt_tokens: u64::from(KNOWN + NEW) * u64::from(layout.block_tokens()) + 1,
            no_grant: true,
            ..Default::default()
        };
        let by_hashes = v1::LookupRequest { hashes, ..named.clone() };
        for (name, pause) in [("lookup", PAUSE), ("saturated_lookup", Duration::ZERO)] {
            let mut times = ask(bed, &by_hashes, pause).await?;
            figures.insert(format!("{name}_p50_us"), percentile_us(&mut times, 0.5).into());
            figures.insert(format!("{name}_p99_us"), percentile_us(&mut times, 0.99).into());
            figures.insert(format!("{name}s_per_s"), (times.len() as f64 / MEASURED.as_secs_f64()).into());
        }
        let prompt = tokens(&layout, 0, KNOWN + NEW).iter().map(|token| token.0).collect();
        let by_tokens = v1::LookupRequest { tokens: prompt, prompt_tokens: 0, ..named };
        let mut times = ask(bed, &by_tokens, PAUSE).await?;
        figures.insert("lookup_by_tokens_p99_us".into(), percentile_us(&mut times, 0.99).into());
        figures
            .insert("lookups_by_tokens_per_s".into(), (times.len() as f64 / MEASURED.as_secs_f64()).into());
        figures.insert("lookup_clients".into(), json!(CLIENTS));
        Ok(())
    })
}

/// The groups of V4, with rows of a few bytes: a lookup sees names, not bytes.
fn small_v4() -> anyhow::Result<KvLayout> {
    let config = r#"{"model_type":"deepseek_v4","num_hidden_layers":5,"head_dim":32,"qk_rope_head_dim":16,
        "index_head_dim":16,"sliding_window":128,"compress_ratios":[0,4,128,4,128]}"#;
    Ok(KvLayout::from_config(config, RowFormat::Bf16, 128)?)
}

/// Stores the known blocks and gives the hashes of the whole chain.
async fn fill(bed: &Bed, layout: &KvLayout, namespace: NamespaceId) -> anyhow::Result<Vec<Bytes>> {
    let client = Client::over(bed.connect().await?);
    let prompt = tokens(layout, 0, KNOWN + NEW);
    let results = client.put(namespace, &prompt, objects(layout, 0, KNOWN)).await?;
    anyhow::ensure!(results.len() == KNOWN as usize + 1, "{} results", results.len());
    let state = objects(layout, 0, KNOWN).pop().filter(|object| object.kind == ObjectKind::State);
    anyhow::ensure!(state.is_some(), "this layout has states");
    let request = v1::LookupRequest {
        namespace: Bytes::copy_from_slice(namespace.as_bytes()),
        tokens: prompt.iter().map(|token| token.0).collect(),
        no_grant: true,
        want_hashes: true,
        ..Default::default()
    };
    let found = PrefixCacheClient::new(bed.connect().await?).lookup(request).await?.into_inner();
    let mut hashes = found.hashes;
    anyhow::ensure!(hashes.len() == KNOWN as usize, "{} of {KNOWN} blocks are stored", hashes.len());
    hashes.extend(
        (0..NEW).map(|number| Bytes::copy_from_slice(blake3::hash(&number.to_le_bytes()).as_bytes())),
    );
    Ok(hashes)
}

/// The times of lookups by so many clients, each of which asks again after a pause, but not before it has its answer.
async fn ask(bed: &Bed, request: &v1::LookupRequest, pause: Duration) -> anyhow::Result<Vec<Duration>> {
    let mut clients = tokio::task::JoinSet::new();
    let start = Instant::now() + WARM_UP;
    for number in 0..u32::try_from(CLIENTS).unwrap_or(0) {
        let mut client = PrefixCacheClient::new(bed.connect().await?);
        let request = request.clone();
        clients.spawn(async move {
            let mut times = Vec::new();
            // Spread over the pause, as clients are that know nothing of each other.
            let mut due = Instant::now() + pause * number / u32::try_from(CLIENTS).unwrap_or(1);
            loop {
                tokio::time::sleep_until(due.into()).await;
                let asked = Instant::now();
                due = asked + pause;
                if asked > start + MEASURED {
                    return anyhow::Ok(times);
                }
                let reply = client.lookup(request.clone()).await?.into_inner();
                let best = reply.best.map_or(0, |best| best.tokens);
                anyhow::ensure!(best == u64::from(KNOWN) * 128, "{best} tokens can be resumed");
                if asked >= start {
                    times.push(asked.elapsed());
                }
            }
        });
    }
    let mut all = Vec::new();
    while let Some(times) = clients.join_next().await {
        all.extend(times??);
    }
    Ok(all)
}
