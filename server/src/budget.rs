//! The node's memory for what is on its way: one bound for all that fetches read ahead, that puts gather, that waits for what it needs,
//! and that requests bring along. What one tenant may have of it is said in [`Tenants::fly`](crate::tenants::Tenants::fly).
//!
//! A share is taken before the memory is used, and held until that is free again. Nobody waits for one: what does not fit is refused,
//! with the time after which to come again. So that writers leave readers something, puts have a part of it only.

use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

use crate::memory;
use crate::tenants::full;

/// Of puts together, where the node has memory for more: more of them than keep the drive busy only take threads.
const PUT_BYTES: u64 = 160 << 20;
/// When one that was refused should come again, at the soonest.
const RETRY_AFTER_MS: u64 = 200;

/// The least with which the longest objects can be put, and some are fetched beside them.
pub(crate) const LEAST_BYTES: u64 = 256 << 20;

/// Half of the memory that this process may use; the other half is for tables, for the drive, and for the decoder.
pub(crate) fn default_bytes() -> u64 {
    memory::limit_bytes().map_or(LEAST_BYTES, |bytes| (bytes / 2).max(LEAST_BYTES))
}

/// What bytes are on their way for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Read ahead, and on their way to a client.
    Fetch,
    /// On their way to the drive.
    Put,
    /// Put, and waiting for what they need.
    Staged,
    /// Of requests.
    Body,
}

impl Use {
    const ALL: [Self; 4] = [Self::Fetch, Self::Put, Self::Staged, Self::Body];

    fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Put => "put",
            Self::Staged => "staged",
            Self::Body => "body",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Budget {
    limit_bytes: u64,
    put_bytes: u64,
    /// By use.
    used_bytes: Mutex<[u64; Use::ALL.len()]>,
}

/// A part of it, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    of: Use,
    bytes: u64,
}

/// Which bound has no room left.
#[derive(Debug)]
pub(crate) struct NoRoom {
    pub(crate) what: &'static str,
    pub(crate) limit_bytes: u64,
}

impl Budget {
    pub(crate) fn new(limit_bytes: u64) -> Arc<Self> {
        let put_bytes = PUT_BYTES.min(limit_bytes / 8 * 5);
        Arc::new(Self { limit_bytes, put_bytes, used_bytes: Mutex::default() })
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Bytes of puts that nobody has taken, and how many there are.
    pub(crate) fn put_bytes(&self) -> (u64, u64) {
        (self.put_bytes.saturating_sub(self.used()[Use::Put as usize]), self.put_bytes)
    }

    /// Bytes taken, by use.
    pub(crate) fn used_by(&self) -> [(&'static str, u64); Use::ALL.len()] {
        let used = self.used();
        Use::ALL.map(|of| (of.name(), used[of as usize]))
    }

    /// A share of nothing yet.
    pub(crate) fn share(self: &Arc<Self>, of: Use) -> Share {
        Share { budget: Arc::clone(self), of, bytes: 0 }
    }

    fn used(&self) -> [u64; Use::ALL.len()] {
        *self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes more; RESOURCE_EXHAUSTED if there is not so much.
    pub(crate) fn grow(&mut self, bytes: u64) -> Result<(), Status> {
        self.try_grow(bytes).map_err(|NoRoom { what, limit_bytes }| full(what, limit_bytes, RETRY_AFTER_MS))
    }

    /// The same, for whoever has words of its own for it.
    pub(crate) fn try_grow(&mut self, bytes: u64) -> Result<(), NoRoom> {
        let Budget { limit_bytes, put_bytes, used_bytes } = &*self.budget;
        let mut used = used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |used: u64, limit: u64| used.checked_add(bytes).is_some_and(|sum| sum <= limit);
        if self.of == Use::Put && !fits(used[Use::Put as usize], *put_bytes) {
            return Err(NoRoom { what: "put memory", limit_bytes: *put_bytes });
        }
        if !fits(used.iter().sum(), *limit_bytes) {
            return Err(NoRoom { what: "memory in flight", limit_bytes: *limit_bytes });
        }
        used[self.of as usize] += bytes;
        self.bytes += bytes;
        Ok(())
    }

    /// Gives some of it back.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.bytes, "more than was taken");
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        let mut used = self.budget.used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        used[self.of as usize] -= bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn all_uses_together_are_bounded_and_puts_leave_something() {
        let budget = Budget::new(1000);
        let mut put = budget.share(Use::Put);
        put.grow(625).unwrap();
        let refused = put.grow(1).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.metadata().contains_key("grpc-retry-pushback-ms"), "{refused:?}");
        let (mut fetch, mut body) = (budget.share(Use::Fetch), budget.share(Use::Body));
        fetch.grow(300).unwrap();
        assert!(body.grow(76).is_err());
        body.grow(75).unwrap();
        assert!(fetch.grow(u64::MAX).is_err(), "a sum that wraps");
        assert_eq!(budget.used_by(), [("fetch", 300), ("put", 625), ("staged", 0), ("body", 75)]);
        put.shrink(600);
        fetch.grow(600).unwrap();
        drop((put, fetch, body));
        assert_eq!(budget.used_by().map(|(_, bytes)| bytes), [0; 4]);
    }
}
