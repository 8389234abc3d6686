//! Goodput under overload: requests that are answered whole and in time, at three times the rate that saturates the node.
//!
//! A request is a lookup and the fetch of 2,048 tokens, 7 MB, within a second. The peak is the rate of a few clients that each ask
//! again when they have their answer, as many as give most; the overload comes at its own pace, whatever becomes of it, and nobody
//! repeats what was refused. Both are measured in turn, several times and for as long: the best of a few short looks would be as much
//! luck as peak.

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
const ROUNDS: usize = 4;
const CONNECTIONS: usize = 16;

pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    bed.clients.block_on(async {
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(bed.connect().await?);
        }
        let asking = Asking::new(bed, channels);
        let (mut best, mut best_per_s) = (1, 0.0);
        for clients in CONCURRENCIES {
            let per_s = asking.closed(clients).await.good_per_s();
            if per_s > best_per_s {
                (best, best_per_s) = (clients, per_s);
            }
        }
        let (mut peak, mut overload) = (Outcome::default(), Outcome::default());
        for _ in 0..ROUNDS {
            let round = asking.closed(best).await;
            peak += round;
            overload += asking.open(3.0 * round.good_per_s()).await;
        }
        let mut tell = |name: &str, value: f64| figures.insert(name.into(), value.into());
        tell("goodput_peak_clients", f64::from(u32::try_from(best).unwrap_or(u32::MAX)));
        tell("goodput_peak_per_s", peak.good_per_s());
        tell("goodput_offered_per_s", overload.sent / overload.asked_s);
        tell("goodput_per_s", overload.good_per_s());
        tell("goodput_refused_share", overload.refused / overload.sent);
        tell("goodput_late_share", 1.0 - (overload.refused + overload.good) / overload.sent);
        tell("goodput_at_3x", overload.good_per_s() / peak.good_per_s());
        Ok(())
    })
}

/// What became of requests.
#[derive(Clone, Copy, Default)]
struct Outcome {
    sent: f64,
    good: f64,
    refused: f64,
    /// For how long requests came.
    asked_s: f64,
    /// Until the last was answered.
    elapsed_s: f64,
}

impl Outcome {
    fn good_per_s(&self) -> f64 {
        self.good / self.elapsed_s
    }

    fn count(&mut self, outcome: Option<bool>) {
        self.good += f64::from(u8::from(outcome == Some(true)));
        self.refused += f64::from(u8::from(outcome.is_none()));
    }
}

impl std::ops::AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.good += other.good;
        self.refused += other.refused;
        self.asked_s += other.asked_s;
        self.elapsed_s += other.elapsed_s;
    }
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
            // Errors stay what they are: with a backtrace a refusal would cost the client more than the node.
            let replies = client.fetch(request).await?.into_inner();
            Ok::<bool, tonic::Status>(take(replies).await.is_ok())
        };
        match tokio::time::timeout(IN_TIME, answered).await {
            Ok(Ok(good)) => Some(good),
            Ok(Err(error)) if error.code() == tonic::Code::ResourceExhausted => None,
            Ok(Err(_)) | Err(_) => Some(false),
        }
    }

    /// Clients that ask again when they have their answer.
    async fn closed(self: &Arc<Self>, clients: usize) -> Outcome {
        let started = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..clients {
            let this = Arc::clone(self);
            running.spawn(async move {
                let mut own = Outcome::default();
                while started.elapsed() < STEP {
                    own.sent += 1.0;
                    own.count(this.once().await);
                }
                own
            });
        }
        let mut all = Outcome::default();
        running.join_all().await.into_iter().for_each(|own| all += own);
        Outcome { asked_s: STEP.as_secs_f64(), elapsed_s: started.elapsed().as_secs_f64(), ..all }
    }

    /// Requests that come at a rate of their own.
    async fn open(self: &Arc<Self>, per_s: f64) -> Outcome {
        let started = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        let mut all = Outcome::default();
        while started.elapsed() < STEP {
            while all.sent < started.elapsed().as_secs_f64() * per_s {
                let this = Arc::clone(self);
                running.spawn(async move { this.once().await });
                all.sent += 1.0;
            }
            while let Some(Ok(outcome)) = running.try_join_next() {
                all.count(outcome);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Those that come in the end count for the time that they take.
        running.join_all().await.into_iter().for_each(|outcome| all.count(outcome));
        Outcome { asked_s: STEP.as_secs_f64(), elapsed_s: started.elapsed().as_secs_f64(), ..all }
    }
}
