//! What a store writes for what it accepts, when it is full and old blocks expire: a trace replayed against the store itself.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::replay::synthetic::Traffic;
use crate::replay::{RealOptions, Trace, replay_real};
use crate::v4_flash;

/// Seed of the made-up trace.
const SEED: u64 = 3;
/// Bytes that are to be written: enough to fill the store several times.
const WRITTEN_BYTES: u64 = 5 << 30;
/// What fits.
const CAPACITY_BYTES: u64 = 1 << 30;
/// How long what is not used stays. Chats of the made-up trace pause for minutes.
const TTL: Duration = Duration::from_secs(1800);

pub(super) fn run(dir: &Path, trace: Option<&Path>, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let trace = match trace {
        Some(path) => Trace::read(path, |_| ())?,
        None => Traffic::Chats.trace(SEED),
    };
    // Blocks as long as those of V4-Flash, whatever number of tokens the trace has in them.
    let block_bytes: u64 =
        v4_flash().planes(esker_prefix::ObjectKind::Block).iter().map(|plane| plane.len_bytes).sum();
    let bytes_per_token = u32::try_from(block_bytes / u64::from(trace.block_tokens))?;
    let requests = trace.requests_of(WRITTEN_BYTES / block_bytes);
    let trace = trace.first(requests);
    let options = RealOptions { dir, capacity_bytes: CAPACITY_BYTES, bytes_per_token, ttl: TTL };
    let run = replay_real(&trace, &options, || ())?;
    figures.insert("write_amplification".into(), run.write_amplification().into());
    figures.insert("write_amplification_accepted_bytes".into(), json!(run.accepted_bytes));
    figures.insert("write_amplification_device_bytes".into(), json!(run.device_bytes));
    figures.insert("write_amplification_segment_bytes".into(), json!(run.segment_bytes));
    figures.insert("write_amplification_evicted_blocks".into(), json!(run.stats.evicted));
    figures.insert("write_amplification_expired_blocks".into(), json!(run.stats.expired));
    figures.insert("write_amplification_declined_blocks".into(), json!(run.stats.declined));
    figures.insert("write_amplification_token_hit_ratio".into(), run.hit_ratio().into());
    Ok(())
}
