//! A sample of all blocks, stored or not, that tells when blocks are used again.
//!
//! Blocks are sampled by fingerprint, so a block is always in the sample or never: its uses are seen whether it is stored,
//! evicted or refused. The share that is sampled halves when the sample is full and doubles when it runs empty; blocks
//! unused for far longer than the store keeps anything are dropped.

use std::collections::HashMap;

use super::age;
use super::class::Class;
use super::reuse::Reuse;

/// Most blocks in the sample.
const SAMPLE_BLOCKS_MAX: usize = 16 * 1024;

/// Odd constant that spreads fingerprints; the share sampled is decided by bits that nothing else uses.
const SPREAD: u64 = 0xd6e8_feb8_6659_fd93;

#[derive(Clone, Copy, Debug)]
struct Sampled {
    last_s: u32,
    class: Class,
    /// Age bucket up to which it was counted unused.
    counted: u8,
}

/// The sample.
#[derive(Debug)]
pub(super) struct Sample {
    blocks: HashMap<u32, Sampled>,
    /// Sampled are fingerprints that spread to `1 in 2^shift`.
    shift: u32,
}

impl Sample {
    pub(super) fn new() -> Self {
        Self { blocks: HashMap::new(), shift: 0 }
    }

    /// A block was used and is of `class` from now on; whether it is in the sample.
    pub(super) fn use_block(&mut self, print: u32, class: Class, now_s: u32, reuse: &mut Reuse) -> bool {
        if !sampled(print, self.shift) {
            return false;
        }
        reuse.count_block(class, now_s);
        let next = Sampled { last_s: now_s, class, counted: 0 };
        if let Some(before) = self.blocks.insert(print, next) {
            let at = age::bucket(now_s.saturating_sub(before.last_s));
            reuse.count_used(before.class, usize::from(before.counted), at);
        } else if self.blocks.len() > SAMPLE_BLOCKS_MAX {
            self.shift += 1;
            let shift = self.shift;
            self.blocks.retain(|print, _| sampled(*print, shift));
        }
        true
    }

    /// Counts what stayed unused until now, and drops what did so for longer than `horizon_s`.
    pub(super) fn count_unused(&mut self, now_s: u32, horizon_s: u32, reuse: &mut Reuse) {
        self.blocks.retain(|_, block| {
            let age_s = now_s.saturating_sub(block.last_s);
            let at = age::bucket(age_s);
            reuse.count_unused(block.class, usize::from(block.counted), at);
            block.counted = block.counted.max(u8::try_from(at).unwrap_or(u8::MAX));
            age_s <= horizon_s
        });
        if self.blocks.len() < SAMPLE_BLOCKS_MAX / 4 {
            self.shift = self.shift.saturating_sub(1);
        }
    }
}

fn sampled(print: u32, shift: u32) -> bool {
    shift == 0 || u64::from(print).wrapping_mul(SPREAD) >> (64 - shift.min(63)) == 0
}
