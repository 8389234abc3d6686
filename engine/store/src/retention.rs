//! Retention: which stored block goes when the disk budget is reached, and which new block is worth its place.
//!
//! Data structures only: no I/O, no clock (time is handed in, in seconds), no randomness. Blocks are known by *slot*, a
//! dense number that the caller gives out and may give out again once the block is removed.
//!
//! Invariants:
//! - What is stored is closed under parents. Only a leaf (a stored block without stored children) is ever a victim, so no
//!   block goes before those that need it.
//! - A pinned block is never a victim; nor is anything above it, for it is no leaf.
//! - The last use of a block is at or after that of every block below it: using a block uses its path.
//!
//! The choice. Every use of a block, stored or not, is counted by [`Sample`] into the life tables of its [`Class`]: what a
//! block is by its number of uses, the time between the last two, and where it hangs. [`Reuse`] turns them into a *worth*:
//! expected uses per second of keeping it, which changes with the time since the last use. The victim is the leaf with
//! the least worth per byte. A new block is admitted to a full store if it is worth more than the victim. Nothing about
//! traffic is assumed beyond that: where nothing is known the order is that of the last use; in traffic that returns soon
//! everything is admitted; where most blocks are never read again the drive is not worn for them; and when more is read in
//! a loop than fits, a part is kept rather than nothing in time.
//!
//! Cost per operation: O(log leaves), and O(classes) to choose; [`touch`](Retention::touch) walks its path. Memory: 20 bytes
//! per block, about 12 more per leaf (8 in a B-tree), and some 4 MiB for what is remembered of blocks that are not stored:
//! 12 bytes per ghost, and the sample.

mod age;
mod class;
mod ghost;
mod queue;
mod reuse;
mod sample;

#[cfg(test)]
mod tests;

pub use class::Context;

use class::Class;
use ghost::{Ghost, Ghosts};
use queue::{Leaf, LeafQueues};
use reuse::Reuse;
use sample::Sample;

/// A parent that is not there.
const NO_PARENT: u32 = u32::MAX;

/// Uses of sampled blocks between two appraisals: rare enough to cost little per use, often enough to follow the day.
const APPRAISE_USES: u32 = 1024;

/// Blocks unused for this many times the age at which blocks are evicted teach nothing that eviction could use.
const HORIZON_EVICTION_AGES: u32 = 16;

/// The least horizon, seconds, for when nothing was evicted yet.
const HORIZON_S_MIN: u32 = 600;

/// How a [`Retention`] chooses.
#[derive(Clone, Debug)]
pub struct RetentionSettings {
    /// Evict by last use alone and admit everything: for comparison.
    pub lru_leaf: bool,
    /// Blocks remembered after they were evicted or refused; 12 bytes each, rounded up to a power of two.
    pub ghosts: usize,
    /// Bytes per token of an ordinary block. What takes more bytes for a token is worth less for each of them.
    pub bytes_per_token: u32,
}

impl RetentionSettings {
    /// For a store of blocks that take so many bytes per token.
    pub fn new(bytes_per_token: u32) -> Self {
        Self { lru_leaf: false, ghosts: 256 * 1024, bytes_per_token: bytes_per_token.max(1) }
    }
}

/// A block that is not stored, as [`Retention::missed`] judged it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    print: u32,
    class: Class,
    grade: u8,
    uses: u8,
}

/// One stored block. 20 bytes.
#[derive(Clone, Copy, Debug)]
struct Node {
    parent: u32,
    children: u32,
    last_s: u32,
    /// Fingerprint of the key: what [`Sample`] and [`Ghosts`] know the block by.
    print: u32,
    pins: u16,
    /// Class and grade: [`queue::line`].
    line: u8,
    /// Uses, saturating; 0 marks a slot that is free.
    uses: u8,
}

const FREE: Node = Node { parent: NO_PARENT, children: 0, last_s: 0, print: 0, pins: 0, line: 0, uses: 0 };

/// The tree of stored blocks and what is known of their use.
#[derive(Debug)]
pub struct Retention {
    settings: RetentionSettings,
    nodes: Vec<Node>,
    leaves: LeafQueues,
    ghosts: Ghosts,
    sample: Sample,
    reuse: Reuse,
    uses_since_appraisal: u32,
    /// Time from last use to eviction of recent victims, the longest of them.
    eviction_age_s: f32,
    /// The leaf worth least, as long as nothing changed.
    cheapest: Option<(u32, Leaf, f32)>,
}

impl Retention {
    /// Nothing stored, nothing known.
    pub fn new(settings: RetentionSettings) -> Self {
        let ghosts = Ghosts::new(if settings.lru_leaf { 0 } else { settings.ghosts });
        Self {
            settings,
            nodes: Vec::new(),
            leaves: LeafQueues::new(),
            ghosts,
            sample: Sample::new(),
            reuse: Reuse::new(),
            uses_since_appraisal: 0,
            eviction_age_s: 0.0,
            cheapest: None,
        }
    }

    /// When `slot` was used last.
    pub fn last_s(&self, slot: u32) -> u32 {
        self.nodes[slot as usize].last_s
    }

    /// The path that ends in `tip` was read. Every block of it was used.
    pub fn touch(&mut self, tip: u32, now_s: u32) {
        self.dequeue(tip);
        let mut slot = tip;
        while slot != NO_PARENT {
            let node = &mut self.nodes[slot as usize];
            debug_assert!(node.uses > 0, "slot {slot} is free");
            let gap_s = now_s.saturating_sub(node.last_s);
            node.uses = node.uses.saturating_add(1);
            node.last_s = node.last_s.max(now_s);
            if !self.settings.lru_leaf {
                let class = Class::again(node.uses, gap_s);
                node.line = queue::line(class, queue::grade(node.line));
                let sampled = self.sample.use_block(node.print, class, now_s, &mut self.reuse);
                self.uses_since_appraisal += u32::from(sampled);
            }
            slot = node.parent;
        }
        self.enqueue(tip);
        self.appraise_in_time(now_s);
    }

    /// Something behind `slot` is used at `now_s`: no block of the path is older than that. Counts as no use.
    pub fn renew(&mut self, slot: u32, now_s: u32) {
        self.dequeue(slot);
        let mut at = slot;
        while at != NO_PARENT && self.nodes[at as usize].last_s < now_s {
            self.nodes[at as usize].last_s = now_s;
            at = self.nodes[at as usize].parent;
        }
        self.enqueue(slot);
    }

    /// Nobody expects `slot` to be used again: among leaves it goes first.
    pub fn demote(&mut self, slot: u32) {
        self.dequeue(slot);
        let node = &mut self.nodes[slot as usize];
        node.line = queue::line(queue::class(node.line), queue::GRADE_MAX);
        self.enqueue(slot);
    }

    /// The stored block before `slot`.
    pub fn parent(&self, slot: u32) -> Option<u32> {
        Some(self.nodes[slot as usize].parent).filter(|&parent| parent != NO_PARENT)
    }

    /// Whether nothing stored comes behind `slot`.
    pub fn is_leaf(&self, slot: u32) -> bool {
        self.nodes[slot as usize].children == 0
    }

    /// How many stored blocks come right behind `slot`.
    pub fn children(&self, slot: u32) -> u32 {
        self.nodes[slot as usize].children
    }

    /// Bytes of memory per block, leaves and all; what is remembered of others is bounded and not counted.
    pub fn memory_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>() + self.leaves.len() * size_of::<Leaf>()
    }

    /// Whether `slot` is pinned itself.
    pub fn is_pinned(&self, slot: u32) -> bool {
        self.nodes[slot as usize].pins > 0
    }

    /// Keeps `slot`, and so its path, until it is unpinned as often. `false`, and nothing done, after 65,535 pins of one slot.
    pub fn pin(&mut self, slot: u32) -> bool {
        let Some(pins) = self.nodes[slot as usize].pins.checked_add(1) else { return false };
        self.dequeue(slot);
        self.nodes[slot as usize].pins = pins;
        true
    }

    /// Takes one pin back.
    pub fn unpin(&mut self, slot: u32) {
        let node = &mut self.nodes[slot as usize];
        node.pins = node.pins.checked_sub(1).expect("unpinned more often than pinned");
        self.enqueue(slot);
    }

    /// What a new block behind `parent` is, as far as its place says.
    pub fn context(&self, parent: Option<u32>) -> Context {
        let Some(parent) = parent else { return Context::ROOT };
        let node = &self.nodes[parent as usize];
        match queue::class(node.line) {
            class if class.is_first() => Context::of_new(class),
            _ if node.children > 0 => Context::BRANCH,
            _ if node.uses == 2 => Context::SECOND,
            _ => Context::LATER,
        }
    }

    /// A block was asked for that is not stored. To be called once for every such block of a prompt, in order and whether it
    /// can be stored or not: that is how the worth of refused blocks is learned.
    ///
    /// `key` is any 64 bits of the block's hash; `context` comes from the deepest stored block of the prompt.
    pub fn missed(&mut self, key: u64, context: Context, bytes: u32, tokens: u32, now_s: u32) -> Candidate {
        let print = print(key);
        let grade = self.grade(bytes, tokens);
        if self.settings.lru_leaf {
            return Candidate { print, class: Class::default(), grade: 0, uses: 1 };
        }
        let (class, uses) = match self.ghosts.get(print) {
            None => (Class::first(context), 1),
            Some(ghost) => {
                let uses = ghost.uses.saturating_add(1);
                (Class::again(uses, now_s.saturating_sub(ghost.last_s)), uses)
            }
        };
        self.ghosts.put(print, Ghost { last_s: now_s, uses });
        let sampled = self.sample.use_block(print, class, now_s, &mut self.reuse);
        self.uses_since_appraisal += u32::from(sampled);
        self.appraise_in_time(now_s);
        Candidate { print, class, grade, uses }
    }

    /// A block found on the drive when the store was opened: taken for one seen once. Nothing is counted.
    pub fn recovered(&self, key: u64, context: Context, bytes: u32, tokens: u32) -> Candidate {
        let (class, grade) = if self.settings.lru_leaf {
            (Class::default(), 0)
        } else {
            (Class::first(context), self.grade(bytes, tokens))
        };
        Candidate { print: print(key), class, grade, uses: 1 }
    }

    /// Whether `candidate` is worth more than what a full store would evict for it: at equal worth the write would be for
    /// nothing. A store with room takes anything.
    pub fn admits(&mut self, candidate: &Candidate, now_s: u32) -> bool {
        let worth = self.worth(candidate.class, candidate.grade, 0);
        let cheapest = self.cheapest(now_s);
        self.settings.lru_leaf || cheapest.is_some_and(|(_, least)| worth > least)
    }

    /// `candidate` was stored in `slot`, a free one, behind `parent`. `now_s` may not be after the parent's last use.
    pub fn insert(&mut self, slot: u32, parent: Option<u32>, candidate: &Candidate, now_s: u32) {
        if let Some(parent) = parent {
            self.dequeue(parent);
            self.nodes[parent as usize].children += 1;
        }
        let Candidate { print, class, grade, uses } = *candidate;
        if self.nodes.len() <= slot as usize {
            self.nodes.resize(slot as usize + 1, FREE);
        }
        let node = &mut self.nodes[slot as usize];
        debug_assert!(node.uses == 0, "slot {slot} is taken");
        let (parent, line) = (parent.unwrap_or(NO_PARENT), queue::line(class, grade));
        *node = Node { parent, children: 0, last_s: now_s, print, pins: 0, line, uses };
        self.enqueue(slot);
    }

    /// The leaf that should go, if there is one that may. It stays until it is removed.
    pub fn victim(&mut self, now_s: u32) -> Option<u32> {
        let (leaf, _) = self.cheapest(now_s)?;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let age_s = now_s.saturating_sub(leaf.last_s) as f32;
        // Decays by half in some 700 evictions.
        self.eviction_age_s = (self.eviction_age_s * 0.999).max(age_s);
        Some(leaf.slot)
    }

    /// The block in `slot` is no longer stored, and the slot is free. It must be a leaf: what is lost with blocks behind it
    /// takes those along, from the ends of their paths on. Pins on it are forgotten.
    pub fn remove(&mut self, slot: u32) {
        self.dequeue(slot);
        let node = std::mem::replace(&mut self.nodes[slot as usize], FREE);
        debug_assert!(node.uses > 0 && node.children == 0, "slot {slot} holds no leaf");
        if !self.settings.lru_leaf {
            self.ghosts.put(node.print, Ghost { last_s: node.last_s, uses: node.uses });
        }
        if node.parent != NO_PARENT {
            self.nodes[node.parent as usize].children -= 1;
            self.enqueue(node.parent);
        }
    }

    /// The leaf worth least per byte, and that worth. Of a queue only the ends are asked: worth rises with age, if at all,
    /// up to when the block is expected back, and falls from then on.
    fn cheapest(&mut self, now_s: u32) -> Option<(Leaf, f32)> {
        if self.settings.lru_leaf {
            return self.leaves.ends().next().map(|leaf| (leaf, 0.0));
        }
        if let Some((at_s, leaf, worth)) = self.cheapest
            && at_s == now_s
        {
            return Some((leaf, worth));
        }
        let ranked = self.leaves.ends().map(|leaf| {
            let age_s = now_s.saturating_sub(leaf.last_s);
            (leaf, self.worth(leaf.class(), leaf.grade(), age_s))
        });
        let order = |leaf: &Leaf| (leaf.last_s, leaf.slot);
        let found = ranked.min_by(|a, b| a.1.total_cmp(&b.1).then_with(|| order(&a.0).cmp(&order(&b.0))))?;
        self.cheapest = Some((now_s, found.0, found.1));
        Some(found)
    }

    fn worth(&self, class: Class, grade: u8, age_s: u32) -> f32 {
        self.reuse.worth(class, age_s) / f32::from(1_u16 << grade)
    }

    /// Steps of a factor of 2 by which the block takes more bytes per token than an ordinary one, to the nearest.
    fn grade(&self, bytes: u32, tokens: u32) -> u8 {
        let ordinary = u64::from(tokens.max(1)) * u64::from(self.settings.bytes_per_token);
        // Twice the squared ratio: its logarithm of base 2, halved and rounded down, is that of the ratio to the nearest.
        let ratio = u128::from(bytes) * u128::from(bytes) * 2 / (u128::from(ordinary) * u128::from(ordinary));
        let steps = ratio.checked_ilog2().unwrap_or(0) / 2;
        u8::try_from(steps).unwrap_or(u8::MAX).min(queue::GRADE_MAX)
    }

    fn appraise_in_time(&mut self, now_s: u32) {
        if self.uses_since_appraisal < APPRAISE_USES {
            return;
        }
        self.uses_since_appraisal = 0;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made of u32 seconds")]
        let eviction_age_s = self.eviction_age_s as u32;
        let horizon_s = eviction_age_s.saturating_mul(HORIZON_EVICTION_AGES).max(HORIZON_S_MIN);
        self.sample.count_unused(now_s, horizon_s, &mut self.reuse);
        self.reuse.appraise();
        self.cheapest = None;
    }

    /// The entry of `slot` in the queues, if it belongs there.
    fn leaf(&self, slot: u32) -> Option<Leaf> {
        let node = &self.nodes[slot as usize];
        (node.children == 0 && node.pins == 0).then_some(Leaf { line: node.line, last_s: node.last_s, slot })
    }

    fn enqueue(&mut self, slot: u32) {
        if let Some(leaf) = self.leaf(slot) {
            self.leaves.insert(leaf);
            self.cheapest = None;
        }
    }

    fn dequeue(&mut self, slot: u32) {
        if let Some(leaf) = self.leaf(slot) {
            self.leaves.remove(leaf);
            self.cheapest = None;
        }
    }
}

/// 32 bits of a key, spread.
fn print(key: u64) -> u32 {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}
