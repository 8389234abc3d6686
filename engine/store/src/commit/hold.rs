//! Holds: from when a record is judged until it is published or refused, what it hangs on stays, stored or on its way.

use std::sync::{Arc, OnceLock};

use esker_prefix::ObjectId;

use crate::shared::Shared;

/// Keeps an object from when it is stored, for as long as there is a clone.
#[derive(Clone, Default)]
pub(super) struct Hold(Arc<OnceLock<Pin>>);

struct Pin {
    shared: Arc<Shared>,
    id: ObjectId,
}

impl Hold {
    /// Of an object that is stored. `None` if it is not.
    pub(super) fn stored(shared: &Arc<Shared>, id: ObjectId) -> Option<Self> {
        let hold = Self::default();
        match shared.table.pin(id) {
            true => hold.keep(shared, id),
            // What is held as often as can be is held.
            false => drop(shared.table.get(id)?),
        }
        Some(hold)
    }

    /// Whether anything waits for the object.
    pub(super) fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Takes over a pin on the object, which is stored now.
    pub(super) fn keep(&self, shared: &Arc<Shared>, id: ObjectId) {
        let _ = self.0.set(Pin { shared: Arc::clone(shared), id });
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.shared.table.unpin(self.id);
    }
}
