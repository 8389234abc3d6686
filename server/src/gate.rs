//! The gate before whatever is stored or written down for a tenant: an erasure closes it until it is done.
//!
//! Who may store has a [`Pass`], of the epoch in which it was given, and stores only while it is let in by it. Closing waits for
//! those who are inside. So what an erasure removes behind a closed gate is all there is, in whatever scope it lies, and what is
//! stored once the gate is open again stays.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// Of one tenant.
#[derive(Default)]
pub(crate) struct Gate(RwLock<Entrance>);

#[derive(Default)]
struct Entrance {
    /// The first epoch that is let in.
    first: u32,
    closed: bool,
}

/// Leads through a gate until the tenant is erased. The default one is of a gate that nobody closes.
#[derive(Clone, Default)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    epoch: u32,
}

/// Inside: what is stored before this is dropped is seen by an erasure.
pub(crate) struct Inside<'p> {
    _open: RwLockReadGuard<'p, Entrance>,
}

/// Why a pass lets nobody in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the tenant is being erased; try again after that")]
    Erasing,
    /// The pass is of an epoch that was given up.
    #[error("the tenant was erased meanwhile: put again what is to be stored")]
    Erased,
}

impl Gate {
    pub(crate) fn pass(self: &Arc<Self>, epoch: u32) -> Pass {
        Pass { gate: Arc::clone(self), epoch }
    }

    /// Lets nobody in any more. Waits for those who are inside: for commits that are under way.
    pub(crate) fn close(&self) {
        self.entrance().closed = true;
    }

    /// Lets in passes of this epoch and of later ones.
    pub(crate) fn open_from(&self, epoch: u32) {
        *self.entrance() = Entrance { first: epoch, closed: false };
    }

    fn entrance(&self) -> RwLockWriteGuard<'_, Entrance> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    /// Never waits: who comes while an erasure waits for others is turned away.
    pub(crate) fn enter(&self) -> Result<Inside<'_>, Refused> {
        let open = match self.gate.0.try_read() {
            Ok(open) => open,
            Err(TryLockError::Poisoned(open)) => open.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Refused::Erasing),
        };
        match *open {
            Entrance { closed: true, .. } => Err(Refused::Erasing),
            Entrance { first, .. } if self.epoch < first => Err(Refused::Erased),
            _ => Ok(Inside { _open: open }),
        }
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn closing_waits_for_who_is_inside_and_nobody_comes_until_it_is_open_again() {
        let gate = Arc::new(Gate::default());
        let (before, after) = (gate.pass(3), gate.pass(4));
        let inside = before.enter().unwrap();
        let (closed, told) = mpsc::channel();
        let closing = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            closing.close();
            closed.send(()).unwrap();
        });
        assert!(told.recv_timeout(std::time::Duration::from_millis(50)).is_err(), "somebody is inside");
        drop(inside);
        told.recv().unwrap();
        thread.join().unwrap();
        for pass in [&before, &after] {
            assert_eq!(pass.enter().err(), Some(Refused::Erasing));
        }
        gate.open_from(4);
        assert_eq!(before.enter().err(), Some(Refused::Erased));
        assert!(after.enter().is_ok() && Pass::default().enter().is_ok());
        gate.close();
        assert_eq!(after.enter().err(), Some(Refused::Erasing));
    }
}
