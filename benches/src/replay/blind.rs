//! Caches that do not see the tree: LRU, FIFO and S3-FIFO over single blocks.
//!
//! They may evict a block that others hang from; those then take up room until they are evicted too or the block is
//! written again. A request uses its blocks in the order of its path, all of them: what lies behind a hole is put again,
//! which finds it stored.

use std::collections::VecDeque;

use super::policy::{Cache, Served};
use super::trace::Trace;

const NONE: u32 = u32::MAX;

/// A cache of single blocks.
trait Blind {
    /// Whether the block is stored; if so, it is used.
    fn use_block(&mut self, block: u32) -> bool;

    /// Stores the block; the count of those evicted for it.
    fn write_block(&mut self, block: u32) -> u32;
}

fn serve(cache: &mut impl Blind, path: &[u32]) -> Served {
    let mut served = Served::default();
    for block in path {
        if cache.use_block(*block) {
            served.found_blocks += u32::from(served.written_blocks == 0);
        } else {
            served.evicted_blocks += cache.write_block(*block);
            served.written_blocks += 1;
        }
    }
    served
}

/// Declares `Cache` for a blind cache with fields `trace` and `path`.
macro_rules! serve_blindly {
    ($name:ident) => {
        impl Cache for $name<'_> {
            fn serve(&mut self, index: usize) -> Served {
                let mut path = std::mem::take(&mut self.path);
                self.trace.path(&self.trace.requests[index], &mut path);
                let served = serve(self, &path);
                self.path = path;
                served
            }
        }
    };
}
serve_blindly!(Lru);
serve_blindly!(Fifo);
serve_blindly!(S3Fifo);

/// Least recently used, as a list through the blocks: `links` is (older, newer), its last entry the list's two ends.
pub(super) struct Lru<'a> {
    trace: &'a Trace,
    path: Vec<u32>,
    links: Vec<(u32, u32)>,
    stored: u32,
    capacity: u32,
}

impl<'a> Lru<'a> {
    pub(super) fn new(trace: &'a Trace, capacity: u32) -> Self {
        let blocks = trace.blocks();
        let mut links = vec![(NONE, NONE); blocks + 1];
        let end = u32::try_from(blocks).expect("blocks are numbered in 32 bits");
        links[blocks] = (end, end);
        Self { trace, path: Vec::new(), links, stored: 0, capacity }
    }

    fn unlink(&mut self, block: u32) {
        let (older, newer) = self.links[block as usize];
        self.links[older as usize].1 = newer;
        self.links[newer as usize].0 = older;
        self.links[block as usize] = (NONE, NONE);
    }

    fn link_newest(&mut self, block: u32) {
        let end = self.trace.blocks();
        let newest = self.links[end].0;
        let end_block = self.links[newest as usize].1;
        self.links[block as usize] = (newest, end_block);
        self.links[newest as usize].1 = block;
        self.links[end].0 = block;
    }
}

impl Blind for Lru<'_> {
    fn use_block(&mut self, block: u32) -> bool {
        if self.links[block as usize].0 == NONE {
            return false;
        }
        self.unlink(block);
        self.link_newest(block);
        true
    }

    fn write_block(&mut self, block: u32) -> u32 {
        let mut evicted = 0;
        if self.stored == self.capacity {
            let oldest = self.links[self.trace.blocks()].1;
            self.unlink(oldest);
            self.stored -= 1;
            evicted = 1;
        }
        self.link_newest(block);
        self.stored += 1;
        evicted
    }
}

/// First in, first out.
pub(super) struct Fifo<'a> {
    trace: &'a Trace,
    path: Vec<u32>,
    stored: Vec<bool>,
    queue: VecDeque<u32>,
    capacity: usize,
}

impl<'a> Fifo<'a> {
    pub(super) fn new(trace: &'a Trace, capacity: u32) -> Self {
        let stored = vec![false; trace.blocks()];
        Self { trace, path: Vec::new(), stored, queue: VecDeque::new(), capacity: capacity as usize }
    }
}

impl Blind for Fifo<'_> {
    fn use_block(&mut self, block: u32) -> bool {
        self.stored[block as usize]
    }

    fn write_block(&mut self, block: u32) -> u32 {
        let full = self.queue.len() == self.capacity;
        if let Some(oldest) = if full { self.queue.pop_front() } else { None } {
            self.stored[oldest as usize] = false;
        }
        self.stored[block as usize] = true;
        self.queue.push_back(block);
        u32::from(full)
    }
}

/// Where S3-FIFO has a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Small,
    Main,
    Ghost,
}

/// S3-FIFO, Algorithm 1 of the paper: a small queue of 10 %, a main queue of 90 %, and as many ghosts as the main
/// queue has places. Counts of use stop at 3; more than one use in the small queue moves a block to the main one.
pub(super) struct S3Fifo<'a> {
    trace: &'a Trace,
    path: Vec<u32>,
    places: Vec<(Place, u8)>,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    ghosts: VecDeque<u32>,
    small_capacity: usize,
    capacity: usize,
}

impl<'a> S3Fifo<'a> {
    pub(super) fn new(trace: &'a Trace, capacity: u32) -> Self {
        let capacity = capacity as usize;
        Self {
            trace,
            path: Vec::new(),
            places: vec![(Place::Nowhere, 0); trace.blocks()],
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            small_capacity: (capacity / 10).max(1),
            capacity,
        }
    }

    /// Moves blocks along until one is evicted.
    fn evict(&mut self) {
        while self.small.len() >= self.small_capacity || self.main.is_empty() {
            let Some(block) = self.small.pop_front() else { return };
            let (place, uses) = &mut self.places[block as usize];
            if *uses > 1 {
                (*place, *uses) = (Place::Main, 0);
                self.main.push_back(block);
                if self.main.len() > self.capacity - self.small_capacity {
                    return self.evict_main();
                }
            } else {
                *place = Place::Ghost;
                self.ghosts.push_back(block);
                if self.ghosts.len() > self.capacity - self.small_capacity {
                    self.forget_ghost();
                }
                return;
            }
        }
        self.evict_main();
    }

    fn evict_main(&mut self) {
        while let Some(block) = self.main.pop_front() {
            let (place, uses) = &mut self.places[block as usize];
            if *uses == 0 {
                *place = Place::Nowhere;
                return;
            }
            *uses -= 1;
            self.main.push_back(block);
        }
    }

    fn forget_ghost(&mut self) {
        if let Some(block) = self.ghosts.pop_front() {
            let place = &mut self.places[block as usize].0;
            if *place == Place::Ghost {
                *place = Place::Nowhere;
            }
        }
    }
}

impl Blind for S3Fifo<'_> {
    fn use_block(&mut self, block: u32) -> bool {
        let (place, uses) = &mut self.places[block as usize];
        let stored = matches!(place, Place::Small | Place::Main);
        if stored {
            *uses = (*uses + 1).min(3);
        }
        stored
    }

    fn write_block(&mut self, block: u32) -> u32 {
        let stored = self.small.len() + self.main.len();
        let full = stored >= self.capacity;
        if full {
            self.evict();
        }
        let ghost = self.places[block as usize].0 == Place::Ghost;
        if ghost {
            self.places[block as usize] = (Place::Main, 0);
            self.main.push_back(block);
        } else {
            self.places[block as usize] = (Place::Small, 0);
            self.small.push_back(block);
        }
        u32::from(full)
    }
}
