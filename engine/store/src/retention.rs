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
//! Whose turn it is. Every block counts for an *owner*, and the one that holds most gives ([`Owners`]): an owner below its fair
//! share loses nothing to one above it. One that holds less than the giver is given room without being asked what for; one
//! that holds as much competes with itself alone.
//!
//! The choice, among the blocks of one owner. Every use of a block, stored or not, is counted by [`sample`] into the life
//! tables of its [`Class`]: what a block is by its number of uses, the time between the last two, and where it hangs.
//! [`reuse`] turns them into a *worth*: expected uses per second of keeping it, which changes with the time since the last
//! use. The victim is the leaf with the least worth per byte. A new block is admitted to a full store if it is worth more than the victim. Nothing about
//! traffic is assumed beyond that: where nothing is known the order is that of the last use; in traffic that returns soon
//! everything is admitted; where most blocks are never read again the drive is not worn for them; and when more is read in
//! a loop than fits, a part is kept rather than nothing in time.
//!
//! What an owner's blocks are worth is learned from its own alone ([`Learner`]): what others write and read changes nothing
//! of it.
//!
//! Cost per operation: O(log leaves + log owners), and O(classes) to choose; [`touch`](Retention::touch) walks its path. Memory: 24
//! bytes per block, about 12 more per leaf (8 in a B-tree), 3 MiB for what is remembered of blocks that are not stored, 12
//! bytes per ghost, and for each of at most 64 owners up to 0.4 MiB for what was learned.

mod age;
mod class;
mod ghost;
mod learner;
mod owners;
mod queue;
mod reuse;
mod sample;

#[cfg(test)]
mod tests;

pub use class::Context;

use class::Class;
use ghost::{Ghost, Ghosts};
use learner::{LEARNERS_MAX, Learner};
use owners::Owners;
use queue::Leaf;

/// A parent that is not there.
const NO_PARENT: u32 = u32::MAX;

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
    owner: u32,
    print: u32,
    class: Class,
    grade: u8,
    uses: u8,
}

/// One stored block. 24 bytes.
#[derive(Clone, Copy, Debug)]
struct Node {
    parent: u32,
    children: u32,
    last_s: u32,
    /// Fingerprint of the key: what learners and [`Ghosts`] know the block by.
    print: u32,
    owner: u32,
    pins: u16,
    /// Class and grade: [`queue::line`].
    line: u8,
    /// Uses, saturating; 0 marks a slot that is free.
    uses: u8,
}

const FREE: Node =
    Node { parent: NO_PARENT, children: 0, last_s: 0, print: 0, owner: 0, pins: 0, line: 0, uses: 0 };

/// The tree of stored blocks and what is known of their use.
#[derive(Debug)]
pub struct Retention {
    settings: RetentionSettings,
    nodes: Vec<Node>,
    owners: Owners,
    ghosts: Ghosts,
    learners: Vec<Learner>,
    /// The leaf worth least of an owner at a time, as long as nothing changed.
    cheapest: Option<(u32, u32, Leaf, f32)>,
}

impl Retention {
    /// Nothing stored, nothing known.
    pub fn new(settings: RetentionSettings) -> Self {
        let ghosts = Ghosts::new(if settings.lru_leaf { 0 } else { settings.ghosts });
        Self {
            settings,
            nodes: Vec::new(),
            owners: Owners::default(),
            ghosts,
            learners: Vec::new(),
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
            let Node { parent, print, owner, uses, .. } = *node;
            if !self.settings.lru_leaf {
                let class = Class::again(uses, gap_s);
                node.line = queue::line(class, queue::grade(node.line));
                let learner = self.learner(owner);
                self.learners[usize::from(learner)].use_block(print, class, now_s);
            }
            slot = parent;
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
        self.nodes.capacity() * size_of::<Node>() + self.owners.leaf_count() * size_of::<Leaf>()
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
    /// `owner` is whom it will count for; `key` is any 64 bits of the block's hash; `context` comes from the deepest stored
    /// block of the prompt.
    pub fn missed(
        &mut self,
        owner: u32,
        key: u64,
        context: Context,
        bytes: u32,
        tokens: u32,
        now_s: u32,
    ) -> Candidate {
        let print = print(key);
        let grade = self.grade(bytes, tokens);
        if self.settings.lru_leaf {
            return Candidate { owner, print, class: Class::default(), grade: 0, uses: 1 };
        }
        let learner = self.learner(owner);
        let (class, uses) = match self.ghosts.get(learner, print) {
            None => (Class::first(context), 1),
            Some(ghost) => {
                let uses = ghost.uses.saturating_add(1);
                (Class::again(uses, now_s.saturating_sub(ghost.last_s)), uses)
            }
        };
        self.ghosts.put(learner, print, Ghost { last_s: now_s, uses });
        self.learners[usize::from(learner)].use_block(print, class, now_s);
        self.appraise_in_time(now_s);
        Candidate { owner, print, class, grade, uses }
    }

    /// A block found on the drive when the store was opened: taken for one seen once. Nothing is counted.
    pub fn recovered(&self, owner: u32, key: u64, context: Context, bytes: u32, tokens: u32) -> Candidate {
        let (class, grade) = if self.settings.lru_leaf {
            (Class::default(), 0)
        } else {
            (Class::first(context), self.grade(bytes, tokens))
        };
        Candidate { owner, print: print(key), class, grade, uses: 1 }
    }

    /// Whether a full store should take `candidate`. An owner that holds less than whoever gives has a right to the room; one that
    /// holds most gives itself, and takes what is worth more than what it would lose: at equal worth the write would be for
    /// nothing. One that holds most and has nothing to give gets nothing. A store with room takes anything.
    pub fn admits(&mut self, candidate: &Candidate, now_s: u32) -> bool {
        let &Candidate { owner, class, grade, .. } = candidate;
        let Some(giver) = self.owners.giver() else { return self.settings.lru_leaf };
        if giver != owner {
            return self.owners.pages(owner) < self.owners.pages(giver);
        }
        if self.settings.lru_leaf {
            return true;
        }
        let least = self.cheapest(owner, now_s).map(|(_, least)| least);
        least.is_some_and(|least| self.worth(owner, class, grade, 0) > least)
    }

    /// Pages of records that count for an owner.
    pub fn pages(&self, owner: u32) -> u64 {
        self.owners.pages(owner)
    }

    /// The same, of every owner.
    pub fn all_pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.owners.all_pages()
    }

    /// So many pages count for an owner from now on.
    pub fn set_pages(&mut self, owner: u32, pages: u64) {
        self.owners.set_pages(owner, pages);
    }

    /// The block in `slot` counts for another owner from now on. Its pages are the caller's to move.
    pub fn set_owner(&mut self, slot: u32, owner: u32) {
        if self.nodes[slot as usize].owner != owner {
            self.dequeue(slot);
            self.nodes[slot as usize].owner = owner;
            self.enqueue(slot);
        }
    }

    /// `candidate` was stored in `slot`, a free one, behind `parent`. `now_s` may not be after the parent's last use.
    pub fn insert(&mut self, slot: u32, parent: Option<u32>, candidate: &Candidate, now_s: u32) {
        if let Some(parent) = parent {
            self.dequeue(parent);
            self.nodes[parent as usize].children += 1;
        }
        let Candidate { owner, print, class, grade, uses } = *candidate;
        if self.nodes.len() <= slot as usize {
            self.nodes.resize(slot as usize + 1, FREE);
        }
        let node = &mut self.nodes[slot as usize];
        debug_assert!(node.uses == 0, "slot {slot} is taken");
        let (parent, line) = (parent.unwrap_or(NO_PARENT), queue::line(class, grade));
        *node = Node { parent, children: 0, last_s: now_s, print, owner, pins: 0, line, uses };
        self.enqueue(slot);
    }

    /// What is in `slot` turns out to be `candidate`, behind `parent`: until now it was there only because something hangs on it.
    pub fn fill(&mut self, slot: u32, parent: Option<u32>, candidate: &Candidate) {
        self.dequeue(slot);
        let Candidate { owner, print, class, grade, uses } = *candidate;
        let node = &mut self.nodes[slot as usize];
        debug_assert!(node.uses > 0 && node.parent == NO_PARENT, "slot {slot} has its place");
        *node = Node { print, owner, line: queue::line(class, grade), uses, ..*node };
        let last_s = node.last_s;
        if let Some(parent) = parent {
            self.dequeue(parent);
            self.nodes[parent as usize].children += 1;
            self.nodes[slot as usize].parent = parent;
            self.renew(parent, last_s);
        }
        self.enqueue(slot);
    }

    /// Whether the path that ends in `slot` leads through `other`. Walks it.
    pub fn hangs_on(&self, slot: u32, other: u32) -> bool {
        let mut at = slot;
        while at != NO_PARENT && at != other {
            at = self.nodes[at as usize].parent;
        }
        at == other
    }

    /// Makes a path that leads back to its beginning end somewhere. Walks all that is stored, once.
    pub fn cut_circles(&mut self) {
        /// Of no walk yet.
        const NEW: u32 = u32::MAX;
        let mut walks = vec![NEW; self.nodes.len()];
        for walk in 0..u32::try_from(walks.len()).unwrap_or(NEW) {
            let (mut at, mut below) = (walk, NO_PARENT);
            while at != NO_PARENT && walks[at as usize] == NEW {
                walks[at as usize] = walk;
                (below, at) = (at, self.nodes[at as usize].parent);
            }
            if at != NO_PARENT && below != NO_PARENT && walks[at as usize] == walk {
                self.nodes[below as usize].parent = NO_PARENT;
                self.nodes[at as usize].children -= 1;
                self.enqueue(at);
            }
        }
    }

    /// The leaf that should go, if there is one that may. It stays until it is removed.
    pub fn victim(&mut self, now_s: u32) -> Option<u32> {
        let owner = self.owners.giver()?;
        let (leaf, _) = self.cheapest(owner, now_s)?;
        let learner = self.learner(owner);
        self.learners[usize::from(learner)].evicts(now_s.saturating_sub(leaf.last_s));
        Some(leaf.slot)
    }

    /// The block in `slot` is no longer stored, and the slot is free. It must be a leaf: what is lost with blocks behind it
    /// takes those along, from the ends of their paths on. Pins on it are forgotten.
    pub fn remove(&mut self, slot: u32) {
        self.dequeue(slot);
        let node = std::mem::replace(&mut self.nodes[slot as usize], FREE);
        debug_assert!(node.uses > 0 && node.children == 0, "slot {slot} holds no leaf");
        if !self.settings.lru_leaf {
            let learner = self.learner(node.owner);
            self.ghosts.put(learner, node.print, Ghost { last_s: node.last_s, uses: node.uses });
        }
        if node.parent != NO_PARENT {
            self.nodes[node.parent as usize].children -= 1;
            self.enqueue(node.parent);
        }
    }

    /// An owner's leaf worth least per byte, and that worth. Of a queue only the ends are asked: worth rises with age, if at all,
    /// up to when the block is expected back, and falls from then on.
    fn cheapest(&mut self, owner: u32, now_s: u32) -> Option<(Leaf, f32)> {
        if self.settings.lru_leaf {
            return self.owners.ends(owner).next().map(|leaf| (leaf, 0.0));
        }
        if let Some((of, at_s, leaf, worth)) = self.cheapest
            && (of, at_s) == (owner, now_s)
        {
            return Some((leaf, worth));
        }
        let learner = self.learner(owner);
        let learner = &self.learners[usize::from(learner)];
        let ranked = self.owners.ends(owner).map(|leaf| {
            let age_s = now_s.saturating_sub(leaf.last_s);
            (leaf, learner.worth(leaf.class(), leaf.grade(), age_s))
        });
        let order = |leaf: &Leaf| (leaf.last_s, leaf.slot);
        let found = ranked.min_by(|a, b| a.1.total_cmp(&b.1).then_with(|| order(&a.0).cmp(&order(&b.0))))?;
        self.cheapest = Some((owner, now_s, found.0, found.1));
        Some(found)
    }

    fn worth(&mut self, owner: u32, class: Class, grade: u8, age_s: u32) -> f32 {
        let learner = self.learner(owner);
        self.learners[usize::from(learner)].worth(class, grade, age_s)
    }

    /// Who learns from the uses of an owner's blocks.
    fn learner(&mut self, owner: u32) -> u8 {
        let Self { owners, learners, ghosts, .. } = self;
        owners.learner(owner, || {
            if learners.len() < usize::from(LEARNERS_MAX) {
                learners.push(Learner::new());
                ghosts.share_out(learners.len());
            }
            u8::try_from(learners.len() - 1).unwrap_or(LEARNERS_MAX - 1)
        })
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
        for learner in &mut self.learners {
            if learner.appraise_in_time(now_s) {
                self.cheapest = None;
            }
        }
    }

    /// The entry of `slot` in the queues, if it belongs there.
    fn leaf(&self, slot: u32) -> Option<Leaf> {
        let node = &self.nodes[slot as usize];
        (node.children == 0 && node.pins == 0).then_some(Leaf { line: node.line, last_s: node.last_s, slot })
    }

    fn enqueue(&mut self, slot: u32) {
        if let Some(leaf) = self.leaf(slot) {
            self.owners.insert(self.nodes[slot as usize].owner, leaf);
            self.cheapest = None;
        }
    }

    fn dequeue(&mut self, slot: u32) {
        if let Some(leaf) = self.leaf(slot) {
            self.owners.remove(self.nodes[slot as usize].owner, leaf);
            self.cheapest = None;
        }
    }
}

/// 32 bits of a key, spread.
fn print(key: u64) -> u32 {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}
