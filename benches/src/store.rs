//! `esker bench store`: the store against the drive itself, in one run on the same files.
//!
//! Machines are shared, so the figures that count are ratios; every one is taken beside its floor, alternating with
//! it, so that a busy neighbour meets both.

mod fetching;
mod latency;
mod opening;
mod putting;
mod rivals;
mod wear;

use std::path::Path;

use anyhow::Context;
use bytes::Bytes;
use esker_prefix::{BlockObject, Chain, KvLayout, NamespaceId, ScopeKey, TokenId};
use esker_store::io::{self, Disk};
use esker_store::{Found, PutObject, Store, StoreSettings};
use serde_json::{Map, Value, json};

use crate::measure::times;
use crate::{identity, v4_flash};

/// 100,096 tokens.
const BLOCKS: u32 = 782;

/// What to measure.
pub struct Options<'a> {
    /// A folder on the drive to be measured; a folder of its own is made in it and removed.
    pub dir: &'a Path,
    /// Real activations in bf16, for the codec.
    pub real: RealBlocks,
    /// Small blocks of the store that is opened.
    pub small_blocks: u64,
    /// A trace for `write_amplification`; made-up chats if there is none.
    pub trace: Option<&'a Path>,
    /// Only what these name: `chain`, `codec`, `put`, `fetch`, `latency`, `open`, `rivals`, `wear`. Empty for all.
    pub only: Vec<String>,
}

/// Blocks of a real sequence.
pub struct RealBlocks {
    /// Their layout.
    pub layout: KvLayout,
    /// Planes of each.
    pub blocks: Vec<Vec<Bytes>>,
}

/// Runs the bench and returns its figures by key. `told` hears what is being measured.
pub fn run(options: &Options<'_>, told: &dyn Fn(&str)) -> anyhow::Result<Map<String, Value>> {
    let dir = tempfile::Builder::new()
        .prefix("esker-bench-")
        .tempdir_in(options.dir)
        .with_context(|| format!("cannot make a folder in {}", options.dir.display()))?;
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    let mut figures = Map::new();
    if wanted("chain") {
        told("chain hash");
        figures.insert("chain_hash_us_per_million_tokens".into(), chain_hash()?.into());
    }
    if wanted("codec") {
        told("codec");
        codec(&options.real, &mut figures);
    }
    if wanted("put") || wanted("fetch") || wanted("latency") {
        let bed = Bed::new(&dir.path().join("flash"), None)?;
        figures.insert("io".into(), json!(bed.store.open_report().engine.to_string()));
        told("put, 8 writers");
        let prefixes = putting::run(&bed, &mut figures)?;
        if wanted("fetch") {
            told("cold fetch, raw");
            fetching::raw(&bed, &prefixes, &mut figures)?;
            told("cold fetch, real latents");
            fetching::decoded(&dir.path().join("real"), &options.real, &mut figures)?;
        }
        if wanted("latency") {
            told("latency");
            latency::run(&bed, &prefixes, &mut figures)?;
        }
    }
    if wanted("rivals") {
        told("side by side with RocksDB's blob files and foyer");
        rivals::run(dir.path(), &mut figures)?;
    }
    if wanted("wear") {
        told("replay of a trace, with eviction and expiry");
        wear::run(dir.path(), options.trace, &mut figures)?;
    }
    if wanted("open") {
        told("rebuild");
        opening::rebuild(&dir.path().join("rebuild"), &mut figures)?;
        told("many small blocks");
        opening::open(&dir.path().join("small"), options.small_blocks, &mut figures)?;
    }
    Ok(figures)
}

/// A store and the disk below it.
struct Bed {
    settings: StoreSettings,
    store: Store,
    disk: std::sync::Arc<dyn Disk>,
}

impl Bed {
    fn new(dir: &Path, zstd_level: Option<i32>) -> anyhow::Result<Self> {
        Self::with(dir, StoreSettings { zstd_level, ..StoreSettings::default() })
    }

    fn with(dir: &Path, settings: StoreSettings) -> anyhow::Result<Self> {
        let store = Store::open(dir, settings.clone())?;
        let (disk, _) = io::choose(&dir.join("segments"), &settings.io_engines)?;
        Ok(Self { settings, store, disk })
    }

    /// All objects of a prefix.
    fn found(&self, prefix: &[esker_prefix::ObjectId]) -> anyhow::Result<Vec<Found>> {
        let found = self.store.lookup(prefix);
        anyhow::ensure!(found.len() == prefix.len(), "{} of {} blocks found", found.len(), prefix.len());
        Ok(found)
    }
}

/// Median time to hash 2^20 tokens into block keys, in microseconds.
fn chain_hash() -> anyhow::Result<f64> {
    let (scope, namespace) = identity(&v4_flash());
    let tokens: Vec<TokenId> = (0..1 << 20).map(TokenId).collect();
    let mut times = times(15, || {
        std::hint::black_box(Chain::hashes(&scope, namespace, 128, &tokens));
        anyhow::Ok(())
    })?;
    Ok(crate::measure::percentile_us(&mut times, 0.5))
}

/// Ratio and decoding speed of mode P on real activations, beside zstd-1 on the same bytes.
fn codec(real: &RealBlocks, figures: &mut Map<String, Value>) {
    use esker_prefix::Dtype;
    use esker_store::codec::{self, Column, PlaneShape};
    use std::time::{Duration, Instant};

    let planes: Vec<esker_store::PutPlane> =
        real_prefix(real, 0, u32::try_from(real.blocks.len()).unwrap_or(u32::MAX))
            .into_iter()
            .flat_map(|object| object.planes)
            .collect();
    let bytes = |plane: &esker_store::PutPlane| {
        let columns =
            [Column { dtype: Dtype::U8, count: u32::try_from(plane.bytes.len()).unwrap_or(u32::MAX) }];
        PlaneShape::new(1, 1, &columns)
    };
    let measure = |shape: &dyn Fn(&esker_store::PutPlane) -> PlaneShape| {
        let mut out = vec![0; planes.iter().map(|plane| plane.bytes.len()).max().unwrap_or(0)];
        let (mut raw, mut stored_bytes) = (0, 0);
        let mut stored = Vec::new();
        for plane in &planes {
            let len = codec::encode(&shape(plane), &plane.bytes, &mut out);
            raw += plane.bytes.len();
            stored_bytes += len.unwrap_or(plane.bytes.len());
            stored.extend(len.map(|len| (plane.bytes.len(), out[..len].to_vec())));
        }
        let (started, mut best) = (Instant::now(), Duration::MAX);
        while started.elapsed() < Duration::from_millis(1500) {
            let pass = Instant::now();
            for (len, stored) in &stored {
                let _ = std::hint::black_box(codec::decode(std::hint::black_box(stored), &mut out[..*len]));
            }
            best = best.min(pass.elapsed());
        }
        let decoded: usize = stored.iter().map(|(len, _)| len).sum();
        (raw as f64 / stored_bytes as f64, decoded as f64 / best.as_secs_f64())
    };
    let shaped = |plane: &esker_store::PutPlane| plane.shape.clone().unwrap_or_else(|| bytes(plane));
    let (ratio, decode) = measure(&shaped);
    let (zstd_ratio, zstd_decode) = measure(&bytes);
    figures.insert("codec_p_ratio".into(), ratio.into());
    figures.insert("codec_zstd1_ratio".into(), zstd_ratio.into());
    figures.insert("codec_p_decode_vs_zstd1".into(), (decode / zstd_decode).into());
    figures.insert("codec_p_decode_gb_s".into(), (decode / 1e9).into());
}

/// A prefix of `blocks` blocks whose bytes are those of a real sequence, over and over.
fn real_prefix(real: &RealBlocks, seed: u32, blocks: u32) -> Vec<PutObject> {
    let (scope, namespace) = identity(&real.layout);
    chain(&real.layout, &scope, namespace, seed, blocks)
        .into_iter()
        .zip(real.blocks.iter().cycle())
        .map(|(link, planes)| link.object(&real.layout, planes.clone()))
        .collect()
}

/// One block of a chain without its bytes.
pub(crate) struct Link {
    scope: esker_prefix::ScopeTag,
    namespace: NamespaceId,
    parent: esker_prefix::BlockHash,
    pub(crate) hash: esker_prefix::BlockHash,
    tokens: u64,
}

impl Link {
    /// A block without any bytes: what an index costs, and nothing else.
    pub(crate) fn empty(&self) -> PutObject {
        let kind = esker_prefix::ObjectKind::Block;
        let root = self.tokens == u64::from(crate::BLOCK_TOKENS);
        PutObject {
            id: esker_prefix::ObjectId { kind, hash: self.hash },
            parent: (!root).then_some(esker_prefix::ObjectId { kind, hash: self.parent }),
            namespace: self.namespace,
            scope: self.scope,
            writer: esker_prefix::WriterId::UNNAMED,
            class: esker_store::TtlClass::default(),
            tokens: self.tokens,
            planes: Vec::new(),
        }
    }

    pub(crate) fn object(&self, layout: &KvLayout, planes: Vec<Bytes>) -> PutObject {
        let Self { scope, namespace, parent, hash, tokens } = *self;
        let block = BlockObject::new(layout, namespace, scope, parent, hash, tokens, planes);
        PutObject::block(layout, block.expect("made from the layout's own table"))
    }
}

/// The blocks of a prefix of made-up tokens.
pub(crate) fn chain(
    layout: &KvLayout,
    scope: &ScopeKey,
    namespace: NamespaceId,
    seed: u32,
    blocks: u32,
) -> Vec<Link> {
    let tokens: Vec<TokenId> =
        (0..blocks * layout.block_tokens()).map(|i| TokenId(i ^ (seed << 20))).collect();
    let (genesis, hashes) = Chain::hashes(scope, namespace, layout.block_tokens(), &tokens);
    let mut parent = genesis;
    let link = |(hash, end): (esker_prefix::BlockHash, u64)| {
        let tokens = end * u64::from(layout.block_tokens());
        let link = Link { scope: scope.tag(), namespace, parent, hash, tokens };
        parent = hash;
        link
    };
    hashes.into_iter().zip(1_u64..).map(link).collect()
}
