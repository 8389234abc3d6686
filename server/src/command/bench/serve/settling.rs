//! Durable settles: 64 clients close the accounts of grants that they were given before, each one as soon as the last is written.

use std::time::Instant;

use bytes::Bytes;
use esker_client::v1;
use serde_json::{Map, Value, json};
use v1::prefix_cache_client::PrefixCacheClient;

use super::bed::Bed;

const CLIENTS: usize = 64;
const SETTLES: usize = 150;
/// Of a prompt of which one block is stored.
const PROMPT_TOKENS: usize = 129;

pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    bed.clients.block_on(async {
        let lookup = v1::LookupRequest {
            namespace: Bytes::copy_from_slice(bed.namespace.as_bytes()),
            tokens: bed.prefixes[0][..PROMPT_TOKENS].iter().map(|token| token.0).collect(),
            ..Default::default()
        };
        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let mut client = PrefixCacheClient::new(bed.connect().await?);
            let mut settles = Vec::new();
            for settle in 0..SETTLES {
                let grant = client.lookup(lookup.clone()).await?.into_inner().grant;
                anyhow::ensure!(!grant.is_empty(), "nothing was granted");
                settles.push(v1::SettleRequest {
                    grant,
                    request_id: format!("bench-{number}-{settle}"),
                    computed_tokens: PROMPT_TOKENS as u64,
                    ..Default::default()
                });
            }
            clients.push((client, settles));
        }
        let started = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for (mut client, settles) in clients {
            running.spawn(async move {
                for settle in settles {
                    client.settle(settle).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = running.join_next().await {
            ended??;
        }
        let per_s = (CLIENTS * SETTLES) as f64 / started.elapsed().as_secs_f64();
        figures.insert("settle_per_s".into(), per_s.into());
        figures.insert("settle_clients".into(), json!(CLIENTS));
        Ok(())
    })
}
