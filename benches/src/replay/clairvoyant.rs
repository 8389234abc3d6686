//! The clairvoyant bound: Belady's MIN with bypass, over leaves.
//!
//! When a block has to go, the one whose next use is furthest goes; a new block that is used later than everything
//! stored is not written at all. A path is used from its first block on, so no block's next use is after that of one
//! below it: among the blocks with the furthest next use there always is a leaf, and evicting leaves only costs the bound
//! nothing. For blocks of equal size MIN finds the most blocks that any policy can find, and asking for a contiguous run
//! from the first block cannot find more. What it maximises is blocks; a last block that is not full counts its tokens
//! only, so that in tokens a policy could in principle come out ahead by what those few weigh.

use std::collections::BTreeSet;

use super::policy::{Cache, Served};
use super::trace::{NO_PARENT, Trace};

/// Never used again.
const NEVER: u32 = u32::MAX;

/// For every request, when each block of its path is used next: as runs, for along a path that time never falls.
pub struct NextUses {
    /// (blocks of the run, index of the request that uses them next), from the path's last block to its first.
    runs: Vec<(u32, u32)>,
    /// Where a request's runs start and end.
    bounds: Vec<(usize, usize)>,
}

impl NextUses {
    /// Reads the trace backwards.
    pub fn of(trace: &Trace) -> Self {
        let mut next = vec![NEVER; trace.blocks()];
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut bounds = vec![(0, 0); trace.requests.len()];
        for (index, request) in trace.requests.iter().enumerate().rev() {
            let start = runs.len();
            let this = u32::try_from(index).expect("traces have far fewer than 2^32 requests");
            let mut block = request.leaf;
            for _ in 0..request.blocks {
                let use_next = std::mem::replace(&mut next[block as usize], this);
                match runs[start..].last_mut() {
                    Some((blocks, time)) if *time == use_next => *blocks += 1,
                    _ => runs.push((1, use_next)),
                }
                block = trace.parent(block).unwrap_or(NO_PARENT);
            }
            bounds[index] = (start, runs.len());
        }
        Self { runs, bounds }
    }
}

pub(super) struct Clairvoyant<'a> {
    trace: &'a Trace,
    next_uses: &'a NextUses,
    path: Vec<u32>,
    nodes: Vec<Node>,
    /// Stored leaves by next use.
    leaves: BTreeSet<(u32, u32)>,
    stored: u32,
    capacity: u32,
}

#[derive(Clone, Default)]
struct Node {
    stored: bool,
    children: u32,
    next: u32,
}

impl<'a> Clairvoyant<'a> {
    pub(super) fn new(trace: &'a Trace, next_uses: &'a NextUses, capacity: u32) -> Self {
        let nodes = vec![Node::default(); trace.blocks()];
        Self { trace, next_uses, path: Vec::new(), nodes, leaves: BTreeSet::new(), stored: 0, capacity }
    }

    /// Moves the next use of every block of the path past this request.
    fn advance(&mut self, index: usize) {
        let (start, end) = self.next_uses.bounds[index];
        let mut blocks = self.path.iter().rev();
        for &(count, next) in &self.next_uses.runs[start..end] {
            for block in blocks.by_ref().take(count as usize) {
                let node = &mut self.nodes[*block as usize];
                if node.stored && node.children == 0 {
                    self.leaves.remove(&(node.next, *block));
                    self.leaves.insert((next, *block));
                }
                node.next = next;
            }
        }
    }

    fn evict(&mut self, leaf: u32) {
        let node = &mut self.nodes[leaf as usize];
        node.stored = false;
        self.leaves.remove(&(node.next, leaf));
        self.stored -= 1;
        if let Some(parent) = self.trace.parent(leaf) {
            let node = &mut self.nodes[parent as usize];
            node.children -= 1;
            if node.children == 0 {
                self.leaves.insert((node.next, parent));
            }
        }
    }

    fn store(&mut self, block: u32) {
        let node = &mut self.nodes[block as usize];
        node.stored = true;
        self.leaves.insert((node.next, block));
        self.stored += 1;
        if let Some(parent) = self.trace.parent(block) {
            let node = &mut self.nodes[parent as usize];
            node.children += 1;
            self.leaves.remove(&(node.next, parent));
        }
    }
}

impl Cache for Clairvoyant<'_> {
    fn serve(&mut self, index: usize) -> Served {
        let mut path = std::mem::take(&mut self.path);
        self.trace.path(&self.trace.requests[index], &mut path);
        self.path = path;
        let mut served = Served::default();
        self.advance(index);
        let found = self.path.iter().take_while(|block| self.nodes[**block as usize].stored).count();
        served.found_blocks = u32::try_from(found).expect("paths are counted in 32 bits");
        for i in found..self.path.len() {
            let block = self.path[i];
            let next = self.nodes[block as usize].next;
            if self.stored == self.capacity {
                match self.leaves.last() {
                    Some(&(furthest, leaf)) if furthest > next => {
                        self.evict(leaf);
                        served.evicted_blocks += 1;
                    }
                    _ => break,
                }
            }
            self.store(block);
            served.written_blocks += 1;
        }
        served
    }
}
