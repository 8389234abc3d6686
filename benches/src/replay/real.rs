//! Replaying a trace against a real store on a drive: lookups, reads, durable puts, eviction and expiry as a server has
//! them, with the clock of the trace. What the index-only replay cannot tell is how many bytes reach the device for those that
//! are accepted.
//!
//! Every block's tokens are made up from its number, and its name is the hash of the chain of them. Its bytes are cut from
//! one stretch of noise at a place that its number gives, so that making them costs nothing beside storing them; nothing in
//! them can be compressed, so accepted bytes are raw bytes. They are cut into planes of about the length of V4-Flash's.
//!
//! A request looks its prompt up, reads the last block found, which uses the whole prefix, compares it byte for byte, and
//! puts what is missing, a few blocks at a time.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use esker_prefix::{
    BlockHash, Chain, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeKey, TokenId, WriterId,
};
use esker_store::clock::Clock;
use esker_store::io::PAGE;
use esker_store::{
    FetchEvent, FetchOrder, FetchRequest, PlaneSelection, PutObject, PutOutcome, PutPlane, Store, StoreError,
    StoreSettings, StoreStats, TtlClass,
};

use super::trace::{Request, Trace};
use crate::{identity, v4_flash};

/// Longest plane, in bytes.
const PLANE_BYTES: usize = 96 << 10;
/// Bytes of one put.
const PUT_BYTES: usize = 8 << 20;
/// Noise that blocks are cut from, beyond the length of one.
const NOISE_BYTES: usize = 16 << 20;
/// Seconds of the trace between two rounds of housekeeping.
const HOUSE_S: u32 = 60;
/// The class that everything is put in.
const CLASS: TtlClass = TtlClass(0);

/// How to replay.
#[derive(Clone, Debug)]
pub struct RealOptions<'a> {
    /// A folder on the drive; the store's own folder is made in it and removed.
    pub dir: &'a Path,
    /// Bytes that the store's segments may take.
    pub capacity_bytes: u64,
    /// Bytes of a token.
    pub bytes_per_token: u32,
    /// How long blocks are kept after their last use.
    pub ttl: Duration,
}

/// What a replay came to.
#[derive(Clone, Debug)]
pub struct RealRun {
    /// Tokens of the prompts.
    pub input_tokens: u64,
    /// Tokens found.
    pub hit_tokens: u64,
    /// Blocks read and compared with what was put.
    pub read_blocks: u64,
    /// Raw bytes of the blocks that the store accepted as new.
    pub accepted_bytes: u64,
    /// Bytes that the process wrote to the device, the index and its log among them, by the kernel's count.
    pub device_bytes: u64,
    /// Of these, bytes of segments by the store's own count.
    pub segment_bytes: u64,
    /// What the store counted.
    pub stats: StoreStats,
    /// Seconds that it took.
    pub wall_s: f64,
}

impl RealRun {
    /// Tokens found over tokens asked for.
    pub fn hit_ratio(&self) -> f64 {
        self.hit_tokens as f64 / (self.input_tokens as f64).max(1.0)
    }

    /// Bytes written to the device for each accepted one.
    pub fn write_amplification(&self) -> f64 {
        self.device_bytes as f64 / (self.accepted_bytes as f64).max(1.0)
    }
}

/// Replays `trace` against a store below `options.dir`. `progress` is called for every request. A block that is found and
/// has other bytes than were put, or cannot be read, is an error.
pub fn replay_real(
    trace: &Trace,
    options: &RealOptions<'_>,
    mut progress: impl FnMut(),
) -> anyhow::Result<RealRun> {
    let started = Instant::now();
    let settings = settings(options)?;
    let dir = tempfile::Builder::new()
        .prefix("esker-replay-")
        .tempdir_in(options.dir)
        .with_context(|| format!("cannot make a folder in {}", options.dir.display()))?;
    let clock = Arc::new(TraceClock::default());
    let before = device_written_bytes()?;
    let store = Store::open_at(dir.path(), settings, clock.clone())?;
    let mut replay = Replay::new(trace, options.bytes_per_token, &store);
    let mut housed_s = 0;
    let mut input_tokens = 0;
    for request in &trace.requests {
        clock.0.store(u64::from(request.second), Ordering::Relaxed);
        if request.second >= housed_s + HOUSE_S {
            housed_s = request.second;
            store.keep_house();
        }
        replay.serve(request)?;
        input_tokens += u64::from(request.input_tokens);
        progress();
    }
    let Replay { hit_tokens, read_blocks, accepted_bytes, .. } = replay;
    let stats = store.stats();
    // With what is written at a close.
    store.close()?;
    Ok(RealRun {
        input_tokens,
        hit_tokens,
        read_blocks,
        accepted_bytes,
        device_bytes: device_written_bytes()?.saturating_sub(before),
        segment_bytes: stats.written_bytes,
        stats,
        wall_s: started.elapsed().as_secs_f64(),
    })
}

fn settings(options: &RealOptions<'_>) -> anyhow::Result<StoreSettings> {
    let defaults = StoreSettings::default();
    // A sixteenth of the room: what is being filled and what was made ahead should not be most of it.
    let share = options.capacity_bytes / 16 / PAGE as u64 * PAGE as u64;
    let segment_bytes = share.min(defaults.segment_bytes);
    ensure!(segment_bytes >= 4 << 20, "{} bytes are too few: 64 MiB or more", options.capacity_bytes);
    Ok(StoreSettings {
        segment_bytes,
        capacity_bytes: options.capacity_bytes,
        ttl_classes: vec![options.ttl],
        zstd_level: None,
        scrub_bytes_per_s: 0,
        ..defaults
    })
}

/// A replay under way.
struct Replay<'a> {
    trace: &'a Trace,
    store: &'a Store,
    scope: ScopeKey,
    namespace: NamespaceId,
    block_bytes: usize,
    noise: Bytes,
    /// By number; zero for those that were not met.
    hashes: Vec<BlockHash>,
    path: Vec<u32>,
    hit_tokens: u64,
    read_blocks: u64,
    accepted_bytes: u64,
}

const UNMET: BlockHash = BlockHash([0; 32]);

impl<'a> Replay<'a> {
    fn new(trace: &'a Trace, bytes_per_token: u32, store: &'a Store) -> Self {
        let (scope, namespace) = identity(&v4_flash());
        let block_bytes = trace.block_tokens as usize * bytes_per_token as usize;
        let mut noise = vec![0; NOISE_BYTES + block_bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        Self {
            trace,
            store,
            scope,
            namespace,
            block_bytes,
            noise: noise.into(),
            hashes: vec![UNMET; trace.blocks()],
            path: Vec::new(),
            hit_tokens: 0,
            read_blocks: 0,
            accepted_bytes: 0,
        }
    }

    fn serve(&mut self, request: &Request) -> anyhow::Result<()> {
        let mut path = std::mem::take(&mut self.path);
        self.trace.path(request, &mut path);
        let ids: Vec<ObjectId> = path.iter().map(|&block| self.name(block)).collect();
        let mut found = self.store.lookup(&ids);
        let count = found.len();
        let tokens = count as u64 * u64::from(self.trace.block_tokens);
        self.hit_tokens += tokens.min(u64::from(request.input_tokens));
        // Held while what comes behind it is put, as a server holds what it has granted.
        let mut held = self.store.pin(&ids[count.saturating_sub(1)..count]);
        if let Some(last) = found.pop() {
            self.read(last, path[count - 1])?;
        }
        let missing: Vec<(usize, u32)> = path.iter().copied().enumerate().skip(count).collect();
        for some in missing.chunks((PUT_BYTES / self.block_bytes).max(1)) {
            let objects = some.iter().map(|&(at, block)| self.object(request, at, block, &ids)).collect();
            let last = some.last().map_or(count, |(at, _)| *at);
            for outcome in self.store.put(objects) {
                match outcome {
                    Ok(PutOutcome::Stored) => self.accepted_bytes += self.block_bytes as u64,
                    // What hangs on a declined one is put all the same: the store learns from what it refuses.
                    Ok(PutOutcome::Present | PutOutcome::Declined) => {}
                    // Of a prompt that is larger than all there is room for.
                    Err(StoreError::MissingParent { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            // First the new end, then the old one is let go.
            let further = self.store.pin(&ids[last..=last]);
            if !further.ends().is_empty() {
                held = further;
            }
        }
        drop(held);
        self.path = path;
        Ok(())
    }

    /// The name of a block: of the chain of made-up tokens that ends in it.
    fn name(&mut self, block: u32) -> ObjectId {
        if self.hashes[block as usize] == UNMET {
            let mut chain = match self.trace.parent(block) {
                // The first block of a prompt comes first in its path.
                Some(parent) => Chain::resume(&self.scope, self.hashes[parent as usize]),
                None => Chain::genesis(&self.scope, self.namespace, &[]),
            };
            let first = block.wrapping_mul(0x9e37_79b9);
            let tokens: Vec<TokenId> =
                (0..self.trace.block_tokens).map(|at| TokenId(first.wrapping_add(at) & 0x1ffff)).collect();
            // The number itself, so that no two blocks are the same by accident.
            let tokens = [&[TokenId(block)], &tokens[1..]].concat();
            self.hashes[block as usize] = chain.push(&tokens);
        }
        ObjectId { kind: ObjectKind::Block, hash: self.hashes[block as usize] }
    }

    fn object(&self, request: &Request, at: usize, block: u32, ids: &[ObjectId]) -> PutObject {
        let end = (at as u64 + 1) * u64::from(self.trace.block_tokens);
        let bytes = self.bytes(block);
        let count = self.block_bytes.div_ceil(PLANE_BYTES);
        let len = self.block_bytes.div_ceil(count);
        let plane = |index: usize| {
            let bytes = bytes.slice(index * len..self.block_bytes.min((index + 1) * len));
            let first_layer = u16::try_from(index).unwrap_or(u16::MAX);
            let spec = PlaneSpec { group: 0, first_layer, layers: 1, len_bytes: bytes.len() as u64 };
            PutPlane { spec, shape: None, bytes }
        };
        PutObject {
            id: ids[at],
            parent: at.checked_sub(1).map(|before| ids[before]),
            namespace: self.namespace,
            scope: self.scope.tag(),
            writer: WriterId::UNNAMED,
            class: CLASS,
            tokens: end.min(u64::from(request.input_tokens)),
            planes: (0..count).map(plane).collect(),
        }
    }

    fn bytes(&self, block: u32) -> Bytes {
        // A step that shares no factor with the length of the noise visits all of it.
        let start = (block as usize).wrapping_mul(7_919 * 64) % NOISE_BYTES;
        self.noise.slice(start..start + self.block_bytes)
    }

    /// Reads a block, proven by the store, and compares it with what was put.
    fn read(&mut self, found: esker_store::Found, block: u32) -> anyhow::Result<()> {
        let request = FetchRequest {
            objects: vec![found],
            planes: PlaneSelection::All,
            order: FetchOrder::ByObject,
            deadline: None,
        };
        let expected = self.bytes(block);
        let mut at = 0;
        for event in self.store.fetch(request) {
            match event {
                FetchEvent::Plane { bytes, .. } => {
                    ensure!(
                        expected[at..].starts_with(&bytes),
                        "block {block} has other bytes than were put"
                    );
                    at += bytes.len();
                }
                FetchEvent::Miss { kind, .. } => {
                    anyhow::bail!("block {block} was found and cannot be read: {kind}")
                }
            }
        }
        ensure!(at == expected.len(), "block {block} came short");
        self.read_blocks += 1;
        Ok(())
    }
}

/// The time of the trace.
#[derive(Debug, Default)]
struct TraceClock(AtomicU64);

impl Clock for TraceClock {
    fn boot_id(&self) -> String {
        "trace".to_owned()
    }

    fn since_boot(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::Relaxed))
    }
}

/// Bytes that this process has caused to be written to a device: its direct writes, and pages that it dirtied and did not
/// discard again. A file system's own journal is not in it.
fn device_written_bytes() -> anyhow::Result<u64> {
    let text =
        std::fs::read_to_string("/proc/self/io").context("the kernel counts no I/O of processes here")?;
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value
            .and_then(|value| value.trim().parse::<u64>().ok())
            .with_context(|| format!("no {name} in /proc/self/io"))
    };
    Ok(field("write_bytes:")?.saturating_sub(field("cancelled_write_bytes:")?))
}
