//! The tree against a naive model under random calls.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::queue::Leaf;
use super::{NO_PARENT, Retention, RetentionSettings};

/// A stored block of the model: parent, last use, pins.
type Stored = BTreeMap<u32, (Option<u32>, u32, u32)>;

#[derive(Clone, Debug)]
enum Call {
    /// A prompt: where it leaves the tree (an index into what is stored), how many new blocks, and their tokens.
    Prompt {
        tip: usize,
        blocks: u8,
        tokens: u32,
    },
    Touch {
        tip: usize,
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
        3 => (any::<usize>(), 1..6_u8, 1..130_u32).prop_map(|(tip, blocks, tokens)| Call::Prompt { tip, blocks, tokens }),
        3 => any::<usize>().prop_map(|tip| Call::Touch { tip }),
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
        self.stored.values().all(|(parent, ..)| *parent != Some(slot))
    }

    /// The leaves that may go.
    fn evictable(&self) -> Vec<u32> {
        let unpinned = self.stored.iter().filter(|(_, (_, _, pins))| *pins == 0);
        unpinned.map(|(slot, _)| *slot).filter(|slot| self.is_leaf(*slot)).collect()
    }

    fn touch(&mut self, tip: u32) {
        self.retention.touch(tip, self.now_s);
        let mut slot = Some(tip);
        while let Some(block) = slot.and_then(|slot| self.stored.get_mut(&slot)) {
            block.1 = self.now_s;
            slot = block.0;
        }
    }

    /// The victim that the module's documentation promises, by looking at every leaf.
    fn expected_victim(&self) -> Option<u32> {
        let leaves: Vec<Leaf> = self.evictable().iter().map(|slot| self.leaf(*slot)).collect();
        let order = |leaf: &Leaf| (leaf.last_s, leaf.slot);
        if self.retention.settings.lru_leaf {
            return leaves.iter().min_by_key(|leaf| order(leaf)).map(|leaf| leaf.slot);
        }
        // Of each class and grade the oldest and the newest.
        let ends = leaves.iter().filter(|leaf| {
            let queue = leaves.iter().filter(|other| other.line == leaf.line).map(order);
            queue.clone().min() == Some(order(leaf)) || queue.max() == Some(order(leaf))
        });
        let worth = |leaf: &Leaf| self.retention.worth(leaf.class(), leaf.grade(), self.now_s - leaf.last_s);
        let by_worth = |a: &&Leaf, b: &&Leaf| worth(a).total_cmp(&worth(b)).then(order(a).cmp(&order(b)));
        ends.min_by(by_worth).map(|leaf| leaf.slot)
    }

    fn leaf(&self, slot: u32) -> Leaf {
        let node = &self.retention.nodes[slot as usize];
        let (parent, last_s, _) = self.stored[&slot];
        assert_eq!((node.parent, node.last_s), (parent.unwrap_or(NO_PARENT), last_s), "slot {slot}");
        Leaf { line: node.line, last_s, slot }
    }

    fn run(&mut self, call: &Call) {
        match *call {
            Call::Prompt { tip, blocks, tokens } => {
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
                    let block = self.retention.missed(key, context, 1280, tokens, self.now_s);
                    self.retention.insert(slot, tip, &block, self.now_s);
                    self.stored.insert(slot, (tip, self.now_s, 0));
                    tip = Some(slot);
                }
            }
            Call::Touch { tip } => {
                if let Some(tip) = self.choose(tip) {
                    self.touch(tip);
                }
            }
            Call::Pin { slot } => {
                if let Some(slot) = self.choose(slot) {
                    self.retention.pin(slot);
                    self.stored.get_mut(&slot).unwrap().2 += 1;
                }
            }
            Call::Unpin { slot } => {
                let pinned: Vec<u32> = self.stored.iter().filter(|(_, b)| b.2 > 0).map(|(s, _)| *s).collect();
                if let Some(slot) = pinned.get(slot % pinned.len().max(1)) {
                    self.retention.unpin(*slot);
                    self.stored.get_mut(slot).unwrap().2 -= 1;
                }
            }
            Call::Evict => {
                let victim = self.retention.victim(self.now_s);
                assert_eq!(victim, self.expected_victim());
                assert_eq!(victim.is_none(), self.evictable().is_empty());
                if let Some(victim) = victim {
                    assert!(self.is_leaf(victim), "slot {victim} has children");
                    assert_eq!(self.stored[&victim].2, 0, "slot {victim} is pinned");
                    self.retention.remove(victim);
                    self.stored.remove(&victim);
                    self.free.push(victim);
                }
            }
            Call::Wait { seconds } => self.now_s += seconds,
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
        let block = retention.missed(u64::from(slot), context, 1280, 128, now_s);
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
        let block = retention.missed(u64::from(slot), context, bytes, 128, 10);
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
        let block =
            retention.missed(1_000_000 + u64::from(second), retention.context(Some(9)), 1280, 128, second);
        let admitted = retention.admits(&block, second);
        admitted_late += u32::from(admitted && second > 20_000);
    }
    assert_eq!(admitted_late, 0);
}

#[test]
fn what_was_recovered_goes_like_what_was_put() {
    let mut retention = Retention::new(settings());
    let root = retention.recovered(1, retention.context(None), 1280, 128);
    retention.insert(0, None, &root, 0);
    let leaf = retention.recovered(2, retention.context(Some(0)), 1280, 128);
    retention.insert(1, Some(0), &leaf, 0);
    assert_eq!(retention.victim(5), Some(1));
}

#[test]
fn a_node_takes_20_bytes() {
    assert_eq!(size_of::<super::Node>(), 20);
}
