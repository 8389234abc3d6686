//! The oracle of the crash tests: what nodes have acknowledged. It never asks a store what it should contain.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use esker_client::v1;
use esker_prefix::ObjectKind;

use crate::{Node, Prompt};

/// Acknowledged objects by prompt.
#[derive(Default)]
pub struct Journal(Mutex<BTreeMap<u64, (Prompt, BTreeSet<u64>)>>);

/// What became of acknowledged objects.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Objects that were acknowledged.
    pub acknowledged: usize,
    /// Objects that were not found.
    pub lost: usize,
    /// Planes with other bytes than were put.
    pub wrong: usize,
}

impl Journal {
    /// Stores blocks of a prompt, noting each acknowledgement as it comes. An error ends it: the node may be gone.
    pub async fn put(
        &self,
        node: &Node,
        prompt: &Prompt,
        numbers: std::ops::RangeInclusive<u64>,
    ) -> Result<()> {
        let mut replies = node.put_stream(prompt, prompt.blocks(numbers)).await?;
        while let Some(reply) = replies.message().await? {
            let stored = matches!(reply.outcome(), v1::Outcome::Stored | v1::Outcome::Present);
            if stored && reply.durability() == v1::Durability::Durable {
                let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let entry = entries.entry(prompt.seed).or_insert_with(|| (prompt.clone(), BTreeSet::new()));
                entry.1.insert(reply.tokens);
            }
        }
        Ok(())
    }

    /// Objects that were acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.values().map(|(_, acknowledged)| acknowledged.len()).sum()
    }

    /// Looks for everything on a node.
    pub async fn audit(&self, node: &Node) -> Result<Audit> {
        let entries: Vec<_> =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let mut audit = Audit::default();
        for (prompt, acknowledged) in entries {
            let fetched = node.fetch_best(&prompt).await?;
            audit.acknowledged += acknowledged.len();
            audit.wrong += fetched.wrong_planes(&prompt);
            let whole = fetched.whole_objects(&prompt);
            audit.lost +=
                acknowledged.iter().filter(|&&at| !whole.contains(&(ObjectKind::Block, at))).count();
        }
        Ok(audit)
    }
}
