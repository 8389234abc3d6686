//! Who puts, and where: what is stored on its word is accounted for here, whether it was put just now or had waited.

use esker_prefix::ObjectId;
use esker_store::{ErrorKind, PutOutcome, StoreError};

use crate::audit::Event;
use crate::node::Node;
use crate::principal::Principal;
use crate::writers::Place;

/// See the module.
pub(crate) struct Author {
    pub(crate) principal: Principal,
    pub(crate) place: Place,
}

impl Author {
    /// Writes down what others should know of the results, and leaves nothing in them that this one should not.
    pub(crate) fn account(
        &self,
        node: &Node,
        ids: &[ObjectId],
        results: &mut [Result<PutOutcome, StoreError>],
    ) {
        let is_mismatch = |result: &Result<PutOutcome, StoreError>| {
            result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ContentMismatch)
        };
        let mismatches = results.iter().filter(|result| is_mismatch(result)).count();
        if mismatches > 0 {
            let event = Event::new(&self.principal, "put", "other bytes under a known name", "refused");
            node.audit.record(&event.count(mismatches as u64));
        }
        if !self.place.is_shared() {
            return;
        }
        let hidden = self.place.hidden(&node.store, ids);
        let put = ids.iter().zip(&*results).filter(|(_, result)| result.is_ok()).map(|(id, _)| *id);
        if let Err(error) = self.place.vouch(&node.store, &put.collect::<Vec<_>>()) {
            tracing::warn!(%error, "what two tenants have put stays hidden from the others");
        }
        for (result, _) in results.iter_mut().zip(hidden).filter(|(_, hidden)| *hidden) {
            if is_mismatch(result) {
                *result = Ok(PutOutcome::Declined);
            } else if let Ok(outcome @ PutOutcome::Present) = result {
                *outcome = PutOutcome::Stored;
            }
        }
    }
}
