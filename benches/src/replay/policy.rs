//! The policies by name, and what a cache does with a request.

/// Which blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The store's own retention and admission.
    Esker,
    /// Least recently used leaf first.
    LruLeaf,
    /// Least recently used block first, whatever hangs below it.
    Lru,
    /// Oldest block first.
    Fifo,
    /// S3-FIFO.
    S3Fifo,
    /// The block whose next use is furthest.
    Clairvoyant,
    /// Nothing is ever evicted.
    Infinite,
}

impl Policy {
    /// Every policy, the infinite cache last.
    pub const ALL: [Self; 7] =
        [Self::Esker, Self::LruLeaf, Self::Lru, Self::Fifo, Self::S3Fifo, Self::Clairvoyant, Self::Infinite];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Esker => "esker",
            Self::LruLeaf => "lru-leaf",
            Self::Lru => "lru",
            Self::Fifo => "fifo",
            Self::S3Fifo => "s3-fifo",
            Self::Clairvoyant => "clairvoyant",
            Self::Infinite => "infinite",
        }
    }
}

/// What a request found and did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    /// Blocks of its leading run that were stored.
    pub(super) found_blocks: u32,
    /// Blocks written for it.
    pub(super) written_blocks: u32,
    /// Blocks evicted to make room.
    pub(super) evicted_blocks: u32,
}

/// A cache of so many blocks.
pub(super) trait Cache {
    /// Serves the `index`th request of the trace.
    fn serve(&mut self, index: usize) -> Served;
}
