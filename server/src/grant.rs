//! Grants: what one lookup found, pinned until it expires.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use esker_prefix::KvLayout;
use esker_store::Found;

/// How long a grant holds what it lists.
pub(crate) const GRANT_TTL: Duration = Duration::from_secs(30);
/// Most objects that all grants together list, about 250 bytes of memory each. A lookup beyond that is refused.
const MAX_GRANTED_OBJECTS: usize = 1 << 20;

/// Name of a grant; random to everyone but this process.
pub(crate) type GrantId = [u8; 16];

/// What a lookup found.
pub(crate) struct Granted {
    /// Layout of the namespace.
    pub(crate) layout: Arc<KvLayout>,
    /// Block objects from the first token on, without a hole.
    pub(crate) blocks: Vec<Found>,
    /// State objects by boundary, descending; empty for a layout without state groups.
    pub(crate) states: Vec<Found>,
    /// Prefix lengths that can be resumed, descending.
    pub(crate) resume_points: Vec<u64>,
}

/// Live grants.
pub(crate) struct Grants {
    key: [u8; 32],
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    issued: u64,
    objects: usize,
    live: HashMap<GrantId, Arc<Granted>>,
    /// In the order of issue, which is that of expiry since all grants live equally long.
    expiry: VecDeque<(Instant, GrantId)>,
}

impl Grants {
    /// `seed` must differ between processes, so that an id never outlives the process that gave it.
    pub(crate) fn new(seed: &[u8]) -> Self {
        Self { key: blake3::derive_key("esker 2026-11 grant ids v1", seed), table: Mutex::default() }
    }

    /// Pins `granted`; `None` when the table is full.
    pub(crate) fn issue(&self, granted: Granted, now: Instant) -> Option<GrantId> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.drop_expired(now);
        if table.objects + granted.objects() > MAX_GRANTED_OBJECTS {
            return None;
        }
        table.issued += 1;
        let digest = blake3::keyed_hash(&self.key, &table.issued.to_le_bytes());
        let mut id = GrantId::default();
        id.copy_from_slice(&digest.as_bytes()[..16]);
        table.objects += granted.objects();
        table.live.insert(id, Arc::new(granted));
        table.expiry.push_back((now + GRANT_TTL, id));
        Some(id)
    }

    /// What a live grant pins.
    pub(crate) fn get(&self, id: &GrantId, now: Instant) -> Option<Arc<Granted>> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.drop_expired(now);
        table.live.get(id).cloned()
    }
}

impl Table {
    fn drop_expired(&mut self, now: Instant) {
        while let Some((_, id)) = self.expiry.pop_front_if(|(expires, _)| *expires <= now) {
            if let Some(granted) = self.live.remove(&id) {
                self.objects -= granted.objects();
            }
        }
    }
}

impl Granted {
    fn objects(&self) -> usize {
        self.blocks.len() + self.states.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use esker_prefix::RowFormat;

    #[test]
    fn a_grant_lives_its_time_and_ids_do_not_repeat() {
        let config = r#"{"model_type":"deepseek_v32","num_hidden_layers":1,"kv_lora_rank":128,"qk_rope_head_dim":8,
            "index_head_dim":128}"#;
        let layout = Arc::new(KvLayout::from_config(config, RowFormat::F32, 64).unwrap());
        let granted =
            || Granted { layout: layout.clone(), blocks: vec![], states: vec![], resume_points: vec![64] };
        let grants = Grants::new(b"seed");
        let start = Instant::now();
        let first = grants.issue(granted(), start).unwrap();
        let second = grants.issue(granted(), start).unwrap();
        assert_ne!(first, second);
        assert!(grants.get(&first, start + GRANT_TTL / 2).is_some());
        assert!(grants.get(&first, start + GRANT_TTL).is_none());
        assert!(grants.get(&[0; 16], start).is_none());
    }
}
