//! A bound on bytes: who wants to hold more waits until others let go.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A budget of bytes. A request above the whole budget is let through when it is alone, so nothing waits for ever.
#[derive(Debug)]
pub struct ByteGate {
    limit_bytes: usize,
    used_bytes: Mutex<usize>,
    released: Condvar,
}

impl ByteGate {
    /// A gate with nothing taken.
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self { limit_bytes, used_bytes: Mutex::new(0), released: Condvar::new() })
    }

    /// Waits until `bytes` fit.
    pub fn acquire(self: &Arc<Self>, bytes: usize) -> Permit {
        let mut used = self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        while *used > 0 && *used + bytes > self.limit_bytes {
            used = self.released.wait(used).unwrap_or_else(PoisonError::into_inner);
        }
        *used += bytes;
        Permit { gate: Arc::clone(self), bytes }
    }

    /// Takes `bytes` if they fit now.
    pub fn try_acquire(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        let mut used = self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if *used > 0 && *used + bytes > self.limit_bytes {
            return None;
        }
        *used += bytes;
        Some(Permit { gate: Arc::clone(self), bytes })
    }

    /// Takes `bytes` whether they fit or not: for the one transfer without which its owner cannot go on.
    pub fn force(self: &Arc<Self>, bytes: usize) -> Permit {
        *self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner) += bytes;
        Permit { gate: Arc::clone(self), bytes }
    }

    /// Bytes held now.
    pub fn used_bytes(&self) -> usize {
        *self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes held of a [`ByteGate`]; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<ByteGate>,
    bytes: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        *self.gate.used_bytes.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.gate.released.notify_all();
    }
}
