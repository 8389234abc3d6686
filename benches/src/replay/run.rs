//! One run: a trace, a policy, a size.

use rayon::prelude::*;

use super::blind::{Fifo, Lru, S3Fifo};
use super::clairvoyant::{Clairvoyant, NextUses};
use super::esker::Leaves;
use super::policy::{Cache, Policy};
use super::trace::Trace;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Run {
    /// The policy.
    pub policy: Policy,
    /// Blocks that fit.
    pub capacity_blocks: u32,
    /// Tokens of all prompts.
    pub input_tokens: u64,
    /// Tokens found.
    pub hit_tokens: u64,
    /// Blocks written.
    pub written_blocks: u64,
    /// Blocks evicted.
    pub evicted_blocks: u64,
    /// Seconds that the run took.
    pub wall_s: f64,
}

impl Run {
    /// Tokens found over tokens asked for.
    #[expect(clippy::cast_precision_loss, reason = "a ratio to print")]
    pub fn hit_ratio(&self) -> f64 {
        self.hit_tokens as f64 / (self.input_tokens as f64).max(1.0)
    }
}

/// Replays `trace` through `policy` with room for `capacity_blocks`. `progress` is called for every request.
pub fn replay(trace: &Trace, policy: Policy, capacity_blocks: u32, progress: impl FnMut()) -> Run {
    let next_uses = (policy == Policy::Clairvoyant).then(|| NextUses::of(trace));
    one(trace, next_uses.as_ref(), policy, capacity_blocks, progress)
}

/// Replays `trace` through each of `policies` at each of `capacities_blocks`, on all idle cores. The infinite cache
/// runs once. Runs come back in order of capacity, then of policy.
pub fn replay_all(
    trace: &Trace,
    policies: &[Policy],
    capacities_blocks: &[u32],
    progress: impl Fn() + Sync,
) -> Vec<Run> {
    let next_uses = policies.contains(&Policy::Clairvoyant).then(|| NextUses::of(trace));
    let finite = policies.iter().filter(|policy| **policy != Policy::Infinite);
    let mut runs: Vec<(Policy, u32)> = capacities_blocks
        .iter()
        .flat_map(|capacity| finite.clone().map(move |policy| (*policy, *capacity)))
        .collect();
    if policies.contains(&Policy::Infinite) {
        runs.push((Policy::Infinite, u32::MAX));
    }
    let run =
        |&(policy, capacity): &(Policy, u32)| one(trace, next_uses.as_ref(), policy, capacity, &progress);
    runs.par_iter().map(run).collect()
}

fn one(
    trace: &Trace,
    next_uses: Option<&NextUses>,
    policy: Policy,
    capacity_blocks: u32,
    mut progress: impl FnMut(),
) -> Run {
    let started = std::time::Instant::now();
    let mut cache: Box<dyn Cache + '_> = match policy {
        Policy::Esker => Box::new(Leaves::new(trace, capacity_blocks, false)),
        Policy::LruLeaf => Box::new(Leaves::new(trace, capacity_blocks, true)),
        Policy::Infinite => Box::new(Leaves::new(trace, u32::MAX, true)),
        Policy::Lru => Box::new(Lru::new(trace, capacity_blocks)),
        Policy::Fifo => Box::new(Fifo::new(trace, capacity_blocks)),
        Policy::S3Fifo => Box::new(S3Fifo::new(trace, capacity_blocks)),
        Policy::Clairvoyant => {
            let next_uses = next_uses.expect("computed for this policy");
            Box::new(Clairvoyant::new(trace, next_uses, capacity_blocks))
        }
    };
    let mut run = Run {
        policy,
        capacity_blocks,
        input_tokens: trace.input_tokens(),
        hit_tokens: 0,
        written_blocks: 0,
        evicted_blocks: 0,
        wall_s: 0.0,
    };
    for (index, request) in trace.requests.iter().enumerate() {
        let served = cache.serve(index);
        let found = u64::from(served.found_blocks) * u64::from(trace.block_tokens);
        run.hit_tokens += found.min(u64::from(request.input_tokens));
        run.written_blocks += u64::from(served.written_blocks);
        run.evicted_blocks += u64::from(served.evicted_blocks);
        progress();
    }
    run.wall_s = started.elapsed().as_secs_f64();
    run
}
