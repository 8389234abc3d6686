//! The gate before whatever stores something for a tenant: an erasure closes it to all that began before.
//!
//! Who may store has a [`Pass`], of the epoch in which it was given, and stores only while it is let in by it. Closing waits for
//! those who are inside. So once an erasure has closed the gate nothing of earlier epochs comes any more, and what is removed
//! behind that is all there is, in whatever scope it lies.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, TryLockError};

/// Of one tenant. Holds the first epoch that is let in.
#[derive(Default)]
pub(crate) struct Gate(RwLock<u32>);

/// Leads through a gate until that is closed. The default one is of a gate that nobody closes.
#[derive(Clone, Default)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    epoch: u32,
}

/// Inside: what is stored before this is dropped is seen by an erasure.
pub(crate) struct Inside<'p> {
    _open: RwLockReadGuard<'p, u32>,
}

/// The tenant was erased since the pass was given, or is being erased just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tenant was erased meanwhile: put again what is to be stored")]
pub(crate) struct Erased;

impl Gate {
    pub(crate) fn pass(self: &Arc<Self>, epoch: u32) -> Pass {
        Pass { gate: Arc::clone(self), epoch }
    }

    /// Lets in no pass of an earlier epoch any more. Waits for those who are inside: for commits that are under way.
    pub(crate) fn close_before(&self, epoch: u32) {
        let mut first = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *first = epoch.max(*first);
    }
}

impl Pass {
    /// Never waits: who comes while an erasure waits for others is turned away.
    pub(crate) fn enter(&self) -> Result<Inside<'_>, Erased> {
        let open = match self.gate.0.try_read() {
            Ok(open) => open,
            Err(TryLockError::Poisoned(open)) => open.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Erased),
        };
        if self.epoch < *open { Err(Erased) } else { Ok(Inside { _open: open }) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn closing_waits_for_who_is_inside_and_lets_in_no_earlier_epoch() {
        let gate = Arc::new(Gate::default());
        let (before, after) = (gate.pass(3), gate.pass(4));
        let inside = before.enter().unwrap();
        let (closed, told) = mpsc::channel();
        let closing = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            closing.close_before(4);
            closed.send(()).unwrap();
        });
        assert!(told.recv_timeout(std::time::Duration::from_millis(50)).is_err(), "somebody is inside");
        drop(inside);
        told.recv().unwrap();
        thread.join().unwrap();
        assert_eq!(before.enter().err(), Some(Erased));
        assert!(after.enter().is_ok() && Pass::default().enter().is_ok());
        gate.close_before(2);
        assert_eq!(before.enter().err(), Some(Erased), "it stays closed");
    }
}
