//! The tree and its owners against a naive model under random calls.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::class::Class;
use super::learner::LEARNERS_MAX;
use super::queue::Leaf;
use super::{Context, NO_PARENT, Retention, RetentionSettings};

/// Whom everything counts for where nobody else is named.
const OWNER: u32 = 0;

/// A stored block of the model.
struct Block {
    parent: Option<u32>,
    last_s: u32,
    pins: u32,
    owner: u32,
    pages: u64,
}

type Stored = BTreeMap<u32, Block>;

#[derive(Clone, Debug)]
enum Call {
    /// A prompt: where it leaves the tree (an index into what is stored), how many new blocks, and their tokens.
    Prompt {
        tip: usize,
        blocks: u8,
        tokens: u32,
        owner: u32,
        pages: u64,
    },
    Touch {
        tip: usize,
    },
    /// A block is put again by another owner.
    Own {
        slot: usize,
        owner: u32,
    },
    Pin {
        slot: usize,
    },
    Unpin {
        slot: usize,
    },
    Evict,
    Wait {
        seconds: u32,
    },
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        3 => (any::<usize>(), 1..6_u8, 1..130_u32, 0..4_u32, 0..5_u64)
            .prop_map(|(tip, blocks, tokens, owner, pages)| Call::Prompt { tip, blocks, tokens, owner, pages }),
        3 => any::<usize>().prop_map(|tip| Call::Touch { tip }),
        1 => (any::<usize>(), 0..4_u32).prop_map(|(slot, owner)| Call::Own { slot, owner }),
        1 => any::<usize>().prop_map(|slot| Call::Pin { slot }),
        1 => any::<usize>().prop_map(|slot| Call::Unpin { slot }),
        4 => Just(Call::Evict),
        2 => prop_oneof![0..3_u32, 0..5000_u32].prop_map(|seconds| Call::Wait { seconds }),
    ]
}

struct Pair {
    retention: Retention,
    stored: Stored,
    free: Vec<u32>,
    keys: u64,
    now_s: u32,
}

impl Pair {
    fn new(lru_leaf: bool) -> Self {
        let settings = RetentionSettings { lru_leaf, ghosts: 64, ..RetentionSettings::new(10) };
        let retention = Retention::new(settings);
        Self { retention, stored: Stored::new(), free: (0..4096).rev().collect(), keys: 0, now_s: 1000 }
    }

    fn choose(&self, index: usize) -> Option<u32> {
        self.stored.keys().nth(index % self.stored.len().max(1)).copied()
    }

    fn is_leaf(&self, slot: u32) -> bool {
        self.stored.values().all(|block| block.parent != Some(slot))
    }

    /// The leaves that may go.
    fn evictable(&self) -> Vec<u32> {
        let unpinned = self.stored.iter().filter(|(_, block)| block.pins == 0);
        unpinned.map(|(slot, _)| *slot).filter(|slot| self.is_leaf(*slot)).collect()
    }

    fn touch(&mut self, tip: u32) {
        self.retention.touch(tip, self.now_s);
        let mut slot = Some(tip);
        while let Some(block) = slot.and_then(|slot| self.stored.get_mut(&slot)) {
            block.last_s = self.now_s;
            slot = block.parent;
        }
    }

    fn pages(&self, owner: u32) -> u64 {
        self.stored.values().filter(|block| block.owner == owner).map(|block| block.pages).sum()
    }

    /// Of those that have a leaf that may go whoever holds most.
    fn giver(&self) -> Option<u32> {
        let owners = self.evictable().into_iter().map(|slot| self.stored[&slot].owner);
        owners.max_by_key(|&owner| (self.pages(owner), owner))
    }

    fn change_pages(&mut self, owner: u32) {
        let pages = self.pages(owner);
        self.retention.set_pages(owner, pages);
    }

    /// The victim that the module's documentation promises, by looking at every leaf.
    fn expected_victim(&mut self) -> Option<u32> {
        let giver = self.giver()?;
        let leaves = self.evictable().into_iter().filter(|slot| self.stored[slot].owner == giver);
        let leaves: Vec<Leaf> = leaves.map(|slot| self.leaf(slot)).collect();
        let order = |leaf: &Leaf| (leaf.last_s, leaf.slot);
        if self.retention.settings.lru_leaf {
            return leaves.iter().min_by_key(|leaf| order(leaf)).map(|leaf| leaf.slot);
        }
        // Of each class and grade the oldest and the newest.
        let ends = leaves.iter().filter(|leaf| {
            let queue = leaves.iter().filter(|other| other.line == leaf.line).map(order);
            queue.clone().min() == Some(order(leaf)) || queue.max() == Some(order(leaf))
        });
        let learner = usize::from(self.retention.learner(giver));
        let learner = &self.retention.learners[learner];
        let worth = |leaf: &Leaf| learner.worth(leaf.class(), leaf.grade(), self.now_s - leaf.last_s);
        let by_worth = |a: &&Leaf, b: &&Leaf| worth(a).total_cmp(&worth(b)).then(order(a).cmp(&order(b)));
        ends.min_by(by_worth).map(|leaf| leaf.slot)
    }

    fn leaf(&self, slot: u32) -> Leaf {
        let node = &self.retention.nodes[slot as usize];
        let block = &self.stored[&slot];
        let expected = (block.parent.unwrap_or(NO_PARENT), block.last_s, block.owner);
        assert_eq!((node.parent, node.last_s, node.owner), expected, "slot {slot}");
        Leaf { line: node.line, last_s: block.last_s, slot }
    }

    fn run(&mut self, call: &Call) {
        match *call {
            Call::Prompt { tip, blocks, tokens, owner, pages } => {
                let mut tip = self.choose(tip);
                if let Some(tip) = tip {
                    self.touch(tip);
                }
                let context = self.retention.context(tip);
                for _ in 0..blocks {
                    let Some(slot) = self.free.pop() else { return };
                    // Some keys come back, so that ghosts are met.
                    self.keys += 1;
                    let key = self.keys % 300;
                    let block = self.retention.missed(owner, key, context, 1280, tokens, self.now_s);
                    self.retention.insert(slot, tip, &block, self.now_s);
                    let block = Block { parent: tip, last_s: self.now_s, pins: 0, owner, pages };
                    self.stored.insert(slot, block);
                    self.change_pages(owner);
                    tip = Some(slot);
                }
            }
            Call::Touch { tip } => {
                if let Some(tip) = self.choose(tip) {
                    self.touch(tip);
                }
            }
            Call::Own { slot, owner } => {
                if let Some(slot) = self.choose(slot) {
                    self.retention.set_owner(slot, owner);
                    let block = self.stored.get_mut(&slot).unwrap();
                    let before = std::mem::replace(&mut block.owner, owner);
                    self.change_pages(before);
                    self.change_pages(owner);
                }
            }
            Call::Pin { slot } => {
                if let Some(slot) = self.choose(slot) {
                    self.retention.pin(slot);
                    self.stored.get_mut(&slot).unwrap().pins += 1;
                }
            }
            Call::Unpin { slot } => {
                let pinned: Vec<u32> =
                    self.stored.iter().filter(|(_, b)| b.pins > 0).map(|(s, _)| *s).collect();
                if let Some(slot) = pinned.get(slot % pinned.len().max(1)) {
                    self.retention.unpin(*slot);
                    self.stored.get_mut(slot).unwrap().pins -= 1;
                }
            }
            Call::Evict => {
                let victim = self.retention.victim(self.now_s);
                assert_eq!(victim, self.expected_victim());
                assert_eq!(victim.is_none(), self.evictable().is_empty());
                if let Some(victim) = victim {
                    assert!(self.is_leaf(victim), "slot {victim} has children");
                    assert_eq!(self.stored[&victim].pins, 0, "slot {victim} is pinned");
                    self.retention.remove(victim);
                    let block = self.stored.remove(&victim).unwrap();
                    self.change_pages(block.owner);
                    self.free.push(victim);
                }
            }
            Call::Wait { seconds } => self.now_s += seconds,
        }
        // Whoever holds less than the giver is let in unasked; whoever holds more and has nothing to give is not.
        if let Some(giver) = self.giver() {
            for owner in (0..4).filter(|&owner| owner != giver) {
                let candidate = self.retention.recovered(owner, 0, Context::ROOT, 1280, 128);
                let below = self.pages(owner) < self.pages(giver);
                assert_eq!(self.retention.admits(&candidate, self.now_s), below, "{owner} beside {giver}");
            }
        }
        // The victim is asked for after every call, and twice: what is remembered of it must not go stale.
        let victim = self.retention.victim(self.now_s);
        assert_eq!(victim, self.expected_victim());
        assert_eq!(victim, self.retention.victim(self.now_s));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_victim_is_the_model_s(calls in prop::collection::vec(call(), 1..120), lru_leaf in any::<bool>()) {
        let mut pair = Pair::new(lru_leaf);
        for call in &calls {
            pair.run(call);
        }
    }
}

fn settings() -> RetentionSettings {
    RetentionSettings::new(10)
}

/// Stores a path of `blocks` blocks in the slots from `first` on, behind nothing.
fn store_path(retention: &mut Retention, first: u32, blocks: u32, now_s: u32) {
    let context = retention.context(None);
    for slot in first..first + blocks {
        let block = retention.missed(OWNER, u64::from(slot), context, 1280, 128, now_s);
        let parent = (slot > first).then(|| slot - 1);
        retention.insert(slot, parent, &block, now_s);
    }
}

#[test]
fn a_path_goes_from_its_end_and_not_at_all_while_its_end_is_pinned() {
    for lru_leaf in [false, true] {
        let mut retention = Retention::new(RetentionSettings { lru_leaf, ..settings() });
        store_path(&mut retention, 0, 3, 10);
        retention.pin(2);
        assert_eq!(retention.victim(20), None);
        retention.unpin(2);
        for expected in [2, 1, 0] {
            assert_eq!(retention.victim(20), Some(expected));
            retention.remove(expected);
        }
        assert_eq!(retention.victim(20), None);
    }
}

#[test]
fn of_two_blocks_alike_the_one_that_takes_more_bytes_per_token_goes() {
    let mut retention = Retention::new(settings());
    let context = retention.context(None);
    for (slot, bytes) in [(0, 1280), (1, 1280 * 8), (2, 1280)] {
        let block = retention.missed(OWNER, u64::from(slot), context, bytes, 128, 10);
        retention.insert(slot, None, &block, 10);
    }
    assert_eq!(retention.victim(20), Some(1));
}

#[test]
fn a_full_store_refuses_what_never_returns_for_what_does() {
    let mut retention = Retention::new(settings());
    // Ten blocks are read every minute; in between come blocks that nobody reads again.
    store_path(&mut retention, 0, 10, 0);
    let mut admitted_late = 0;
    for second in 1..40_000_u32 {
        if second % 60 == 0 {
            retention.touch(9, second);
        }
        let block = retention.missed(
            OWNER,
            1_000_000 + u64::from(second),
            retention.context(Some(9)),
            1280,
            128,
            second,
        );
        let admitted = retention.admits(&block, second);
        admitted_late += u32::from(admitted && second > 20_000);
    }
    assert_eq!(admitted_late, 0);
}

/// What a tenant's blocks are worth does not change with what another one writes and reads, however much that is.
#[test]
fn nothing_is_learned_of_an_owner_s_blocks_from_another_s() {
    let worths = |flooded: bool| {
        let mut retention = Retention::new(settings());
        store_path(&mut retention, 0, 10, 0);
        for second in 1..40_000_u32 {
            if second % 60 == 0 {
                retention.touch(9, second);
            }
            for flood in 0..if flooded { 5 } else { 0_u64 } {
                // Blocks that nobody reads again, and some that are read all the time.
                let key = if flood == 0 { 5_000_000 } else { u64::from(second) * 10 + flood };
                let _ = retention.missed(1, key, Context::ROOT, 1280, 128, second);
            }
        }
        let classes = (0..25).map(Class);
        let ages = [0, 60, 600, 6000];
        let worths = classes.flat_map(|class| ages.map(|age_s| (class, age_s)));
        worths.map(|(class, age_s)| retention.worth(OWNER, class, 0, age_s)).collect::<Vec<f32>>()
    };
    assert_eq!(worths(true), worths(false));
}

#[test]
fn more_owners_than_learners_share_the_last() {
    let mut retention = Retention::new(settings());
    for owner in 0..200 {
        let block = retention.missed(owner, u64::from(owner), Context::ROOT, 1280, 128, 10);
        retention.insert(owner, None, &block, 10);
        retention.set_pages(owner, 1);
    }
    assert_eq!(retention.learners.len(), usize::from(LEARNERS_MAX));
    for left in (0..200).rev() {
        assert_eq!(retention.victim(20), Some(left), "all hold the same: the last first");
        retention.remove(left);
        retention.set_pages(left, 0);
    }
}

#[test]
fn what_was_recovered_goes_like_what_was_put() {
    let mut retention = Retention::new(settings());
    let root = retention.recovered(OWNER, 1, retention.context(None), 1280, 128);
    retention.insert(0, None, &root, 0);
    let leaf = retention.recovered(OWNER, 2, retention.context(Some(0)), 1280, 128);
    retention.insert(1, Some(0), &leaf, 0);
    assert_eq!(retention.victim(5), Some(1));
}

#[test]
fn a_node_takes_24_bytes() {
    assert_eq!(size_of::<super::Node>(), 24);
}
