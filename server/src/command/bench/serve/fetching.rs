//! Fetches of whole prefixes by one client, against the same fetch in the node's own process.

use bytes::Bytes;
use esker_benches::measure::Rate;
use esker_client::{Client, LocalClient, LocalEvent, v1};
use esker_prefix::{ObjectKind, TokenId};
use serde_json::{Map, Value};
use tonic::transport::Channel;
use v1::fetch_reply::Event;
use v1::prefix_cache_client::PrefixCacheClient;

use super::bed::Bed;
use crate::principal::Principal;
use crate::service::{Delivery, Fetching};

const ROUNDS: usize = 6;
const PAGE: usize = 4096;

/// Fetches what a grant lists, and says how many bytes came.
type Way<'a> = &'a dyn Fn(Bytes) -> anyhow::Result<u64>;

pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let clients = &bed.clients;
    let plain = clients.block_on(bed.connect())?;
    let secure = clients.block_on(bed.connect_tls())?;
    let local = clients.block_on(LocalClient::attach(&bed.local))?;
    let ways: [(&str, Way<'_>); 4] = [
        ("inprocess", &|grant| in_process(bed, grant)),
        ("grpc", &|grant| clients.block_on(over_grpc(&plain, grant))),
        ("local", &|grant| clients.block_on(through_arena(&local, grant))),
        ("mtls", &|grant| clients.block_on(over_grpc(&secure, grant))),
    ];
    let mut rates = [const { Vec::new() }; 4];
    let asking = Client::over(plain.clone());
    for round in 0..=ROUNDS {
        for tokens in &bed.prefixes {
            for ((_, fetch), rates) in ways.iter().zip(&mut rates) {
                let grant = clients.block_on(grant(bed, &asking, tokens))?;
                let mut rate = Rate::default();
                rate.measure(|| fetch(grant))?;
                // The first round fills pools and maps memory.
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
    }
    let mut mb_s = |name: &str, rates: &mut Vec<Rate>| {
        rates.sort_by(|a, b| a.mb_s().total_cmp(&b.mb_s()));
        let median = rates[rates.len() / 2].mb_s();
        let (bytes, cpu_s) = rates.iter().fold((0, 0.0), |(b, c), rate| (b + rate.bytes, c + rate.cpu_s));
        figures.insert(format!("{name}_fetch_mb_s"), median.into());
        figures.insert(
            format!("{name}_fetch_cpu_s_per_gib"),
            (Rate { bytes, wall_s: 1.0, cpu_s }).cpu_s_per_gib().into(),
        );
        median
    };
    let mut medians = ways.iter().zip(&mut rates).map(|((name, _), rates)| mb_s(name, rates));
    let [in_process, grpc, local, mtls] = std::array::from_fn(|_| medians.next().unwrap_or(f64::NAN));
    drop(medians);
    figures.insert("grpc_fetch_vs_inprocess".into(), (grpc / in_process).into());
    figures.insert("local_fetch_vs_inprocess".into(), (local / in_process).into());
    figures.insert("tls_cost".into(), (mtls / grpc).into());
    Ok(())
}

/// What encryption costs: the node's own fetches of an encrypted prefix against those of a plain one, in turn.
pub(super) fn encrypted(bed: &Bed, encrypted: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let mut rates = [const { Vec::new() }; 2];
    for round in 0..=2 * ROUNDS {
        for (bed, rates) in [bed, encrypted].into_iter().zip(&mut rates) {
            let client = Client::over(bed.clients.block_on(bed.connect())?);
            let grant = bed.clients.block_on(grant(bed, &client, &bed.prefixes[0]))?;
            let mut rate = Rate::default();
            rate.measure(|| in_process(bed, grant))?;
            if round > 0 {
                rates.push(rate.mb_s());
            }
        }
    }
    let [plain, encrypted] = rates.map(|mut rates: Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    figures.insert("encrypted_fetch_mb_s".into(), encrypted.into());
    figures.insert("encrypted_fetch_vs_plain".into(), (encrypted / plain).into());
    Ok(())
}

async fn grant(bed: &Bed, client: &Client, tokens: &[TokenId]) -> anyhow::Result<Bytes> {
    let found = client.lookup(bed.namespace, tokens).await?;
    anyhow::ensure!(
        found.best.is_some_and(|best| best.tokens + 1 == tokens.len() as u64),
        "a hole in the prefix"
    );
    Ok(found.grant)
}

/// The node's own fetch, without any client.
fn in_process(bed: &Bed, grant: Bytes) -> anyhow::Result<u64> {
    let request = v1::FetchRequest { grant, ..Default::default() };
    let fetching = Fetching::plan(&bed.node, &Principal::local().tenant, &request, None)?;
    let mut counted = Counted::default();
    fetching.run(&bed.node, &mut counted);
    anyhow::ensure!(!counted.missing, "an object is missing");
    std::hint::black_box(counted.seen);
    Ok(counted.bytes)
}

#[derive(Default)]
struct Counted {
    bytes: u64,
    seen: u64,
    missing: bool,
}

impl Delivery for Counted {
    fn plane(&mut self, _: ObjectKind, _: u64, _: u32, bytes: Bytes) -> bool {
        self.bytes += bytes.len() as u64;
        self.seen ^= look(&bytes);
        true
    }

    fn missing(&mut self, _: v1::Missing) -> bool {
        self.missing = true;
        true
    }

    fn done(&mut self, _: v1::FetchDone) {}
}

/// A word of every page.
fn look(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(PAGE).filter_map(|page| page.first_chunk());
    words.fold(0, |seen, word| seen ^ u64::from_le_bytes(*word))
}

pub(super) async fn over_grpc(channel: &Channel, grant: Bytes) -> anyhow::Result<u64> {
    let mut client =
        PrefixCacheClient::new(channel.clone()).max_decoding_message_size(esker_proto::MAX_MESSAGE_BYTES);
    let request = v1::FetchRequest { grant, ..Default::default() };
    take(client.fetch(request).await?.into_inner()).await
}

/// Takes everything of a fetch, which must be whole.
pub(super) async fn take(mut replies: tonic::Streaming<v1::FetchReply>) -> anyhow::Result<u64> {
    let (mut bytes, mut seen) = (0, 0);
    while let Some(reply) = replies.message().await? {
        match reply.event {
            Some(Event::Chunk(chunk)) => {
                bytes += chunk.data.len() as u64;
                seen ^= look(&chunk.data);
            }
            Some(Event::Done(done)) => anyhow::ensure!(done.bytes == bytes, "{done:?} after {bytes} bytes"),
            event => anyhow::bail!("{event:?}"),
        }
    }
    std::hint::black_box(seen);
    Ok(bytes)
}

async fn through_arena(client: &LocalClient, grant: Bytes) -> anyhow::Result<u64> {
    let mut fetch = client.fetch(v1::FetchRequest { grant, ..Default::default() }).await?;
    let (mut bytes, mut seen) = (0, 0);
    while let Some(event) = fetch.next().await? {
        match event {
            LocalEvent::Filled(filled) => {
                for part in filled.parts() {
                    bytes += u64::from(part.bytes);
                    let mut word = [0; 8];
                    for at in
                        (0..part.bytes as usize).step_by(PAGE).filter(|at| at + 8 <= part.bytes as usize)
                    {
                        filled.copy(part, at, &mut word);
                        seen ^= u64::from_le_bytes(word);
                    }
                }
                anyhow::ensure!(filled.is_current(), "a slot was written again while it was held");
            }
            LocalEvent::Done(done) => anyhow::ensure!(done.bytes == bytes, "{done:?} after {bytes} bytes"),
            LocalEvent::Missing(missing) => anyhow::bail!("{missing:?}"),
        }
    }
    std::hint::black_box(seen);
    Ok(bytes)
}
