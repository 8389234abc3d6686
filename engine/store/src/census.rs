//! What is stored, told from the resident table alone: by TTL class and time since the last use, and as a tree.
//!
//! The table is read a chunk at a time, so that others use it in between; what comes and goes meanwhile may or may not be told.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use esker_prefix::{NamespaceId, ObjectKind, ScopeTag};

use crate::store::Store;
use crate::table::Seen;
use crate::{AGE_BOUNDS_S, TtlClass};

/// Blocks of one tree that are looked at; more are left out, and the tree says so.
const MAX_TREE_BLOCKS: usize = 1 << 20;

/// Objects and bytes of their records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// How many.
    pub objects: u64,
    /// Bytes of their records.
    pub bytes: u64,
}

/// What one class holds, by the time since its last use, below each of [`AGE_BOUNDS_S`].
pub type Ages = [Held; AGE_BOUNDS_S.len()];

/// A run of blocks that no other prefix leaves or joins half-way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// First half of the hash of its last block.
    pub hash: [u8; 16],
    /// Tokens of the prefix before it, and with it.
    pub from_tokens: u64,
    /// See above.
    pub to_tokens: u64,
    /// Bytes of its blocks' records.
    pub bytes: u64,
    /// When its last block was used last.
    pub last_s: u32,
    /// Whether a pin or a lease holds it.
    pub held: bool,
    /// States behind its blocks.
    pub states: u32,
    /// Runs behind it that are left out.
    pub hidden: u32,
    /// What continues it, the largest first.
    pub next: Vec<Run>,
}

/// The prefixes of one namespace and scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forest {
    /// Tokens of the longest.
    pub tokens: u64,
    /// Whether something was left out.
    pub truncated: bool,
    /// The runs that begin prefixes, the largest first.
    pub roots: Vec<Run>,
}

impl Store {
    /// What is stored, by TTL class and time since the last use.
    pub fn census(&self) -> Vec<(TtlClass, Ages)> {
        let now_s = self.now_s();
        let segments = self.shared.segments.all().into_iter();
        let classes: HashMap<u64, TtlClass> = segments.map(|(id, segment)| (id.0, segment.class)).collect();
        let mut found: Vec<(TtlClass, Ages)> = Vec::new();
        self.shared.table.each(|seen| {
            let told = matches!(seen.kind, Some(ObjectKind::Block | ObjectKind::State));
            let Some(&class) = classes.get(&u64::from(seen.segment)).filter(|_| told) else { return };
            let at = found.iter().position(|(other, _)| *other == class).unwrap_or_else(|| {
                found.push((class, Ages::default()));
                found.len() - 1
            });
            let age_s = now_s.saturating_sub(seen.last_s);
            let age = AGE_BOUNDS_S.iter().position(|bound| age_s < *bound).unwrap_or(AGE_BOUNDS_S.len() - 1);
            found[at].1[age].objects += 1;
            found[at].1[age].bytes += seen.bytes;
        });
        found.sort_by_key(|(class, _)| *class);
        found
    }

    /// How long objects of each class are kept after their last use.
    pub fn ttl_classes(&self) -> &[Duration] {
        &self.shared.settings.ttl_classes
    }

    /// The tree of what is stored in a namespace and scope, of at most so many runs.
    pub fn forest(&self, namespace: NamespaceId, scope: ScopeTag, max_runs: usize) -> Forest {
        let mut blocks = Vec::new();
        let mut states: HashMap<u32, u32> = HashMap::new();
        let mut truncated = false;
        self.shared.table.each(|seen| {
            if seen.namespace != namespace || seen.scope != scope {
                return;
            }
            match (seen.kind, seen.parent) {
                (Some(ObjectKind::Block), _) if blocks.len() < MAX_TREE_BLOCKS => blocks.push(seen),
                (Some(ObjectKind::Block), _) => truncated = true,
                (Some(ObjectKind::State), Some(block)) => *states.entry(block).or_default() += 1,
                _ => {}
            }
        });
        let mut forest = Tree::new(blocks, states).forest(max_runs);
        forest.truncated |= truncated;
        forest
    }
}

/// Blocks and how they hang together, all by position in `blocks`.
struct Tree {
    blocks: Vec<Seen>,
    states: HashMap<u32, u32>,
    next: Vec<Vec<usize>>,
    roots: Vec<usize>,
    /// Whether it or anything behind it is pinned.
    held: Vec<bool>,
}

impl Tree {
    fn new(mut blocks: Vec<Seen>, states: HashMap<u32, u32>) -> Self {
        // Parents complete shorter prefixes than their children, so they come first.
        blocks.sort_by_key(|seen| seen.tokens);
        let at: HashMap<u32, usize> = blocks.iter().enumerate().map(|(at, seen)| (seen.slot, at)).collect();
        let parent = |seen: &Seen| seen.parent.and_then(|parent| at.get(&parent).copied());
        let mut next = vec![Vec::new(); blocks.len()];
        let mut roots = Vec::new();
        let mut bytes: Vec<u64> = blocks.iter().map(|seen| seen.bytes).collect();
        let mut held: Vec<bool> = blocks.iter().map(|seen| seen.pinned).collect();
        for (child, seen) in blocks.iter().enumerate().rev() {
            match parent(seen).filter(|&parent| parent < child) {
                Some(parent) => {
                    next[parent].push(child);
                    bytes[parent] += bytes[child];
                    held[parent] |= held[child];
                }
                None => roots.push(child),
            }
        }
        for siblings in next.iter_mut().chain([&mut roots]) {
            siblings.sort_by_key(|&at| std::cmp::Reverse(bytes[at]));
        }
        Self { blocks, states, next, roots, held }
    }

    /// Breadth first, so that what is left out lies deep.
    fn forest(&self, max_runs: usize) -> Forest {
        let mut runs: Vec<(Run, Option<usize>)> = Vec::new();
        let mut waiting: VecDeque<(usize, Option<usize>)> = self.roots.iter().map(|&at| (at, None)).collect();
        let mut truncated = false;
        while let Some((first, above)) = waiting.pop_front() {
            if runs.len() == max_runs {
                truncated = true;
                if let Some(above) = above {
                    runs[above].0.hidden += 1;
                }
                continue;
            }
            let from_tokens = above.map_or(0, |above| runs[above].0.to_tokens);
            let (run, last) = self.run(first, from_tokens);
            waiting.extend(self.next[last].iter().map(|&at| (at, Some(runs.len()))));
            runs.push((run, above));
        }
        let mut forest = Forest { truncated, ..Forest::default() };
        forest.tokens = self.blocks.last().map_or(0, |seen| seen.tokens);
        // What hangs below a run comes after it, in the order of its siblings.
        while let Some((mut run, above)) = runs.pop() {
            run.next.reverse();
            match above {
                Some(above) => runs[above].0.next.push(run),
                None => forest.roots.push(run),
            }
        }
        forest.roots.reverse();
        forest
    }

    /// The run that begins with a block, and its last block.
    fn run(&self, first: usize, from_tokens: u64) -> (Run, usize) {
        let mut last = first;
        let (mut bytes, mut states) = (0, 0);
        loop {
            bytes += self.blocks[last].bytes;
            states += self.states.get(&self.blocks[last].slot).copied().unwrap_or(0);
            // Where what is held ends, a run ends too.
            match self.next[last][..] {
                [only] if self.held[only] == self.held[last] => last = only,
                _ => break,
            }
        }
        let end = &self.blocks[last];
        let run = Run {
            hash: end.hash,
            from_tokens,
            to_tokens: end.tokens,
            bytes,
            last_s: end.last_s,
            held: self.held[last],
            states,
            hidden: 0,
            next: Vec::new(),
        };
        (run, last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(slot: u32, parent: Option<u32>, tokens: u64, pinned: bool) -> Seen {
        Seen {
            slot,
            parent,
            kind: Some(ObjectKind::Block),
            hash: [0; 16],
            tokens,
            bytes: 10,
            segment: 0,
            namespace: NamespaceId([0; 32]),
            scope: ScopeTag([0; 16]),
            last_s: slot,
            pinned,
        }
    }

    fn shape(run: &Run) -> String {
        let next: String = run.next.iter().map(shape).collect();
        let held = if run.held { "!" } else { "" };
        format!("({}-{}{held}{next})", run.from_tokens, run.to_tokens)
    }

    #[test]
    fn runs_end_where_prefixes_fork_and_where_what_is_held_ends() {
        // 1-2-3, then 4-5 and 6 behind 3; 7 stands alone; 8-9 of which a lease holds 8.
        let blocks = vec![
            block(5, Some(4), 5, false),
            block(1, None, 1, false),
            block(3, Some(2), 3, false),
            block(2, Some(1), 2, false),
            block(4, Some(3), 4, false),
            block(6, Some(3), 4, false),
            block(7, None, 1, false),
            block(8, None, 1, true),
            block(9, Some(8), 2, false),
        ];
        let tree = Tree::new(blocks, HashMap::from([(3, 2)]));
        let forest = tree.forest(100);
        let shapes: Vec<String> = forest.roots.iter().map(shape).collect();
        assert_eq!(shapes, ["(0-3(3-5)(3-4))", "(0-1!(1-2))", "(0-1)"]);
        assert_eq!((forest.tokens, forest.truncated, forest.roots[0].states), (5, false, 2));
        assert_eq!(forest.roots[0].bytes, 30);
        let cut = tree.forest(4);
        assert!(cut.truncated);
        let left: u32 = cut.roots.iter().map(|run| run.hidden + u32::try_from(run.next.len()).unwrap()).sum();
        assert_eq!((cut.roots.len(), left), (3, 3));
    }
}
