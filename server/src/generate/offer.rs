//! What a lookup offered of a prompt, and why less than that was put back. Through no fault of this node, where it was evicted
//! meanwhile; through its fault, where it was damaged, could not be read, or did not come in time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use esker_store::MissKind;

/// Of one prompt, whatever number of attempts it takes; noted by whoever reads.
#[derive(Default)]
pub(super) struct Offer {
    tokens: AtomicUsize,
    lost: OnceLock<MissKind>,
}

impl Offer {
    /// A lookup has chosen a prefix of so many tokens. A later one, after a loss, offers no more than is left.
    pub(super) fn found(&self, tokens: usize) {
        self.tokens.fetch_max(tokens, Ordering::Relaxed);
    }

    /// The longest prefix that was offered.
    pub(super) fn tokens(&self) -> usize {
        self.tokens.load(Ordering::Relaxed)
    }

    /// Something of it did not come.
    pub(super) fn miss(&self, why: MissKind) {
        if why != MissKind::Absent {
            // The first is the cause, what it leads to is not.
            let _ = self.lost.set(why);
        }
    }

    /// Why a hit of so many tokens is shorter than what was offered, if it is and that is this node's fault.
    pub(super) fn shortfall(&self, hit_tokens: usize) -> Option<MissKind> {
        self.lost.get().copied().filter(|_| hit_tokens < self.tokens())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_hit_is_a_fault_only_if_something_was_lost() {
        let offer = Offer::default();
        offer.found(512);
        offer.found(128);
        // Evicted between the lookup and the fetch: nobody's fault.
        offer.miss(MissKind::Absent);
        assert_eq!((offer.tokens(), offer.shortfall(128)), (512, None));
        offer.miss(MissKind::Unavailable);
        offer.miss(MissKind::PlaneChecksum);
        assert_eq!(offer.shortfall(128), Some(MissKind::Unavailable));
        assert_eq!(offer.shortfall(512), None, "what was lost was had in another way");
    }
}
