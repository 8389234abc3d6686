//! What a job would find and what it would cost, told from the table of what is stored: nothing is read or computed.

use std::collections::HashSet;

use esker_prefix::ObjectKind;

use crate::generate::{Prefix, chain_blocks, stored_blocks};
use crate::node::{Engine, Node};
use crate::service::ttl_class;
use crate::writers::Place;

use super::job::Submission;
use super::prompts::Prompt;

/// Counts in tokens of whole blocks; `tokens` = `cached` + `new`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) tokens: u64,
    /// Stored, or computed for another prompt of the same job.
    pub(crate) cached: u64,
    /// To be computed.
    pub(crate) new: u64,
    /// Estimate of what their records take.
    pub(crate) new_bytes: u64,
}

/// Looks every prompt of a job up.
pub(crate) fn plan(node: &Node, engine: &Engine, submission: &Submission, place: &Place) -> Plan {
    let layout = engine.loaded.model.layout();
    let block_tokens = u64::from(layout.block_tokens());
    let mut plan = Plan::default();
    let mut planned = HashSet::new();
    let (mut last_bytes, mut last_blocks) = (0_u64, 0);
    let (mut new_blocks, mut new_states) = (0, 0);
    for prompt in &submission.prompts {
        let (stored, ids) = match prompt {
            Prompt::Tokens(tokens) => {
                stored_blocks(node, engine, &Prefix { tokens, place, class: ttl_class(submission.ttl) })
            }
            // What is not there is said to be computed, for want of a better place.
            Prompt::Chain(hashes) => chain_blocks(node, engine, place, hashes),
        };
        // The last block that is there tells best what those after it will take.
        if let Some(found) = stored.last() {
            last_bytes += found.stored_bytes;
            last_blocks += 1;
        }
        let new = ids.iter().skip(stored.len());
        let new = new.filter(|id| planned.insert(id.hash)).count() as u64;
        plan.tokens += ids.len() as u64 * block_tokens;
        plan.new += new * block_tokens;
        new_blocks += new;
        new_states += u64::from(new > 0);
    }
    plan.cached = plan.tokens - plan.new;
    let block_bytes =
        last_bytes.checked_div(last_blocks).unwrap_or_else(|| layout.object_bytes(ObjectKind::Block));
    plan.new_bytes =
        new_blocks * block_bytes + new_states * layout.object_bytes_at(ObjectKind::State, block_tokens);
    plan
}
