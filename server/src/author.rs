//! Who puts, and where: what is stored on its word gets its place here, and is accounted for, whether it was put just now or had
//! waited.

use std::sync::{Mutex, PoisonError};

use esker_store::{ErrorKind, PutObject, PutOutcome, StoreError, Submitted};

use crate::audit::Event;
use crate::candidates::{Gone, Placed};
use crate::node::Node;
use crate::principal::Principal;
use crate::writers::Place;

/// See the module.
pub(crate) struct Author {
    pub(crate) principal: Principal,
    pub(crate) place: Place,
    gone: Mutex<Gone>,
}

/// Objects of an author that are on their way to the store.
#[must_use = "only `wait` tells what became of the objects"]
pub(crate) struct Submission {
    submitted: Submitted,
    /// Whether each was there already, as its author can tell.
    known: Vec<bool>,
}

impl Author {
    pub(crate) fn new(principal: Principal, place: Place) -> Self {
        Self { principal, place, gone: Mutex::default() }
    }

    /// Sends objects, by their names in the scope that they are put to, on their way.
    pub(crate) fn submit(&self, node: &Node, objects: Vec<PutObject>) -> Submission {
        let placed = {
            let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
            self.place.sight.place(&node.store, &self.place.peers, objects, &mut gone)
        };
        let (objects, known) = placed.into_iter().map(|Placed { object, known }| (object, known)).unzip();
        Submission { submitted: node.store.submit(objects), known }
    }

    /// Waits for them, and writes down what others should know of the results.
    pub(crate) fn wait(
        &self,
        node: &Node,
        Submission { submitted, known }: Submission,
    ) -> Vec<Result<PutOutcome, StoreError>> {
        let mut results = submitted.wait();
        let is_mismatch = |result: &&Result<PutOutcome, StoreError>| {
            result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ContentMismatch)
        };
        let mismatches = results.iter().filter(is_mismatch).count();
        if mismatches > 0 {
            let event = Event::new(&self.principal, "put", "other bytes under a known name", "refused");
            node.audit.record(&event.count(mismatches as u64));
        }
        for (result, _) in results.iter_mut().zip(known).filter(|(_, known)| *known) {
            // That it was stored once more, for others, says that they have put the same.
            if let Ok(outcome @ PutOutcome::Stored) = result {
                *outcome = PutOutcome::Present;
            }
        }
        results
    }
}
