//! The store's own retention under a trace: lookup, put and eviction as the store does them, without the bytes.

use esker_store::{Context, Retention, RetentionSettings};

use super::policy::{Cache, Served};
use super::trace::Trace;

/// Bytes of a token. Sizes are counted in blocks here; only that all blocks take the same matters.
const TOKEN_BYTES: u32 = 1024;

/// Whom all blocks count for.
const OWNER: u32 = 0;

/// A [`Retention`] whose slots are the numbers of the trace's blocks.
pub(super) struct Leaves<'a> {
    trace: &'a Trace,
    /// Blocks of the request that are not stored, the last one first.
    missing: Vec<u32>,
    stored: Vec<bool>,
    stored_blocks: u32,
    capacity: u32,
    retention: Retention,
}

impl<'a> Leaves<'a> {
    pub(super) fn new(trace: &'a Trace, capacity: u32, lru_leaf: bool) -> Self {
        let settings = RetentionSettings { lru_leaf, ..RetentionSettings::new(TOKEN_BYTES) };
        Self {
            trace,
            missing: Vec::new(),
            stored: vec![false; trace.blocks()],
            stored_blocks: 0,
            capacity,
            retention: Retention::new(settings),
        }
    }

    /// Makes room for one block, if need be; the number of blocks evicted, or none if all that is stored is in use.
    fn make_room(&mut self, now_s: u32) -> Option<u32> {
        if self.stored_blocks < self.capacity {
            return Some(0);
        }
        let victim = self.retention.victim(now_s)?;
        self.retention.remove(victim);
        self.stored[victim as usize] = false;
        self.stored_blocks -= 1;
        Some(1)
    }
}

impl Cache for Leaves<'_> {
    fn serve(&mut self, index: usize) -> Served {
        let request = &self.trace.requests[index];
        let now_s = request.second;
        // What is stored is closed under parents: the run that is found ends at the deepest stored block.
        self.missing.clear();
        let mut tip = (request.blocks > 0).then_some(request.leaf);
        while let Some(block) = tip.filter(|block| !self.stored[*block as usize]) {
            self.missing.push(block);
            tip = self.trace.parent(block);
        }
        let missing = u32::try_from(self.missing.len()).expect("paths are counted in 32 bits");
        let mut served = Served { found_blocks: request.blocks - missing, ..Served::default() };
        if let Some(tip) = tip {
            self.retention.touch(tip, now_s);
            self.retention.pin(tip);
        }
        let place = self.retention.context(tip);
        let block_tokens = self.trace.block_tokens;
        let last_tokens = request.input_tokens - (request.blocks.max(1) - 1) * block_tokens;
        let mut refused = false;
        while let Some(block) = self.missing.pop() {
            let last = self.missing.is_empty();
            let tokens = if last { last_tokens.min(block_tokens) } else { block_tokens };
            let context = if tokens < block_tokens { Context::SHORT } else { place };
            let bytes = block_tokens * TOKEN_BYTES;
            let candidate = self.retention.missed(OWNER, u64::from(block), context, bytes, tokens, now_s);
            if refused {
                continue;
            }
            let full = self.stored_blocks == self.capacity;
            refused = full && !self.retention.admits(&candidate, now_s);
            let Some(evicted) = (if refused { None } else { self.make_room(now_s) }) else {
                refused = true;
                continue;
            };
            served.evicted_blocks += evicted;
            // The end of the path is pinned while the next block is put behind it.
            self.retention.insert(block, tip, &candidate, now_s);
            self.retention.pin(block);
            self.stored[block as usize] = true;
            self.stored_blocks += 1;
            served.written_blocks += 1;
            if let Some(tip) = tip.replace(block) {
                self.retention.unpin(tip);
            }
        }
        if let Some(tip) = tip {
            self.retention.unpin(tip);
        }
        served
    }
}
