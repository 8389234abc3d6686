//! Goodput under overload: requests that are answered whole and in time, at three times the rate that saturates the node.
//!
//! A request is a lookup and the fetch of 2,048 tokens, 7 MB, within a second. The peak is the best rate of a few clients that each
//! ask again when they have their answer; the overload comes at its own pace, whatever becomes of it, and nobody repeats what was
//! refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_client::v1;
use serde_json::{Map, Value};
use tonic::Request;
use tonic::transport::Channel;
use v1::prefix_cache_client::PrefixCacheClient;

use super::bed::Bed;
use super::fetching::take;

const BLOCKS: u32 = 16;
const IN_TIME: Duration = Duration::from_secs(1);
const CONCURRENCIES: [usize; 4] = [2, 4, 8, 16];
const STEP: Duration = Duration::from_secs(2);
const OVERLOAD: Duration = Duration::from_secs(6);
const CONNECTIONS: usize = 16;

pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    bed.clients.block_on(async {
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(bed.connect().await?);
        }
        let asking = Asking::new(bed, channels);
        let mut peak_per_s = 0.0;
        for clients in CONCURRENCIES {
            peak_per_s = f64::max(peak_per_s, asking.closed(clients).await);
        }
        let (good_per_s, offered_per_s, refused) = asking.open(3.0 * peak_per_s).await;
        figures.insert("goodput_peak_per_s".into(), peak_per_s.into());
        figures.insert("goodput_offered_per_s".into(), offered_per_s.into());
        figures.insert("goodput_per_s".into(), good_per_s.into());
        figures.insert("goodput_refused_share".into(), refused.into());
        figures.insert("goodput_at_3x".into(), (good_per_s / peak_per_s).into());
        Ok(())
    })
}

struct Asking {
    channels: Vec<Channel>,
    lookups: Vec<v1::LookupRequest>,
    next: AtomicU64,
}

impl Asking {
    fn new(bed: &Bed, channels: Vec<Channel>) -> Arc<Self> {
        let lookups = bed.prefixes.iter().map(|tokens| v1::LookupRequest {
            namespace: Bytes::copy_from_slice(bed.namespace.as_bytes()),
            tokens: tokens.iter().take(BLOCKS as usize * 128 + 1).map(|token| token.0).collect(),
            ..Default::default()
        });
        Arc::new(Self { channels, lookups: lookups.collect(), next: AtomicU64::new(0) })
    }

    /// Whether one request was answered whole and in time; `None` where it was refused.
    async fn once(&self) -> Option<bool> {
        let number = usize::try_from(self.next.fetch_add(1, Ordering::Relaxed)).unwrap_or(0);
        let channel = self.channels[number % self.channels.len()].clone();
        let lookup = self.lookups[number % self.lookups.len()].clone();
        let started = Instant::now();
        let mut client =
            PrefixCacheClient::new(channel).max_decoding_message_size(esker_proto::MAX_MESSAGE_BYTES);
        let answered = async {
            let mut request = Request::new(lookup);
            request.set_timeout(IN_TIME);
            let grant = client.lookup(request).await?.into_inner().grant;
            let blocks = (0..BLOCKS).collect();
            let mut request = Request::new(v1::FetchRequest { grant, blocks, ..Default::default() });
            request.set_timeout(IN_TIME.saturating_sub(started.elapsed()));
            take(client.fetch(request).await?.into_inner()).await
        };
        match tokio::time::timeout(IN_TIME, answered).await {
            Ok(Ok(_)) => Some(true),
            Ok(Err(error)) => {
                let code = error.downcast_ref::<tonic::Status>().map(tonic::Status::code);
                if code == Some(tonic::Code::ResourceExhausted) { None } else { Some(false) }
            }
            Err(_) => Some(false),
        }
    }

    /// Good answers a second of clients that ask again when they have their answer.
    async fn closed(self: &Arc<Self>, clients: usize) -> f64 {
        let started = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..clients {
            let this = Arc::clone(self);
            running.spawn(async move {
                let mut good = 0_u32;
                while started.elapsed() < STEP {
                    good += u32::from(this.once().await == Some(true));
                }
                good
            });
        }
        let good: u32 = running.join_all().await.into_iter().sum();
        f64::from(good) / started.elapsed().as_secs_f64()
    }

    /// Good answers a second, requests a second, and the share that was refused, where requests come at a rate of their own.
    async fn open(self: &Arc<Self>, per_s: f64) -> (f64, f64, f64) {
        let started = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        let (mut sent, mut good, mut refused) = (0_u32, 0_u32, 0_u32);
        let mut count = |outcome: Option<bool>| {
            good += u32::from(outcome == Some(true));
            refused += u32::from(outcome.is_none());
        };
        while started.elapsed() < OVERLOAD {
            while f64::from(sent) < started.elapsed().as_secs_f64() * per_s {
                let this = Arc::clone(self);
                running.spawn(async move { this.once().await });
                sent += 1;
            }
            while let Some(Ok(outcome)) = running.try_join_next() {
                count(outcome);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Those that come in the end count for the time that they take.
        running.join_all().await.into_iter().for_each(&mut count);
        let elapsed_s = started.elapsed().as_secs_f64();
        let (sent, good, refused) = (f64::from(sent), f64::from(good), f64::from(refused));
        (good / elapsed_s, sent / OVERLOAD.as_secs_f64(), refused / sent)
    }
}
