//! Grants: what one lookup found, pinned for its caller until it is settled, released or expires.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use esker_prefix::{NamespaceId, ObjectKind};
use esker_store::{MissKind, Pins};

use crate::lookup::Answer;
use crate::principal::TenantId;

/// How long a grant holds what it lists.
pub(crate) const GRANT_TTL: Duration = Duration::from_secs(30);
/// Most objects that all grants together list, about 250 bytes of memory each. A lookup beyond that is refused.
const MAX_GRANTED_OBJECTS: usize = 1 << 20;
/// Of which one tenant may have half.
const MAX_TENANT_OBJECTS: usize = MAX_GRANTED_OBJECTS / 2;

/// Name of a grant; random to everyone but this process.
pub(crate) type GrantId = [u8; 16];

/// What a lookup found, for whom, and what of it was delivered.
pub(crate) struct Granted {
    pub(crate) tenant: TenantId,
    pub(crate) namespace: NamespaceId,
    pub(crate) answer: Answer,
    /// Keeps everything listed from being evicted and from expiring.
    pub(crate) _pins: Option<Pins>,
    /// Which of the caller's scopes answered: private, org or public.
    pub(crate) scope: &'static str,
    /// When it was given, by the wall clock: a label of its usage record.
    pub(crate) started_unix_ms: u64,
    delivered: Mutex<Delivered>,
    settling: Mutex<Option<String>>,
}

/// Planes that reached the caller.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delivered {
    /// Raw bytes of all of them.
    pub(crate) bytes: u64,
    /// Which they are; `None` before the first fetch.
    ticks: Option<Ticks>,
    /// Why something that was promised did not come.
    missed: Option<MissKind>,
}

impl Granted {
    pub(crate) fn new(
        tenant: TenantId,
        namespace: NamespaceId,
        answer: Answer,
        pins: Option<Pins>,
        scope: &'static str,
    ) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            tenant,
            namespace,
            answer,
            _pins: pins,
            scope,
            started_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            delivered: Mutex::default(),
            settling: Mutex::default(),
        }
    }

    /// Claims the grant for the account of one request: a grant is settled once. `Err` names the request that has it.
    pub(crate) fn claim(&self, request_id: &str) -> Result<(), String> {
        let mut settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = settling.get_or_insert_with(|| request_id.to_owned());
        if holder == request_id { Ok(()) } else { Err(holder.clone()) }
    }

    /// Gives the claim up: the account could not be written.
    pub(crate) fn unclaim(&self) {
        *self.settling.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether a request has claimed it.
    pub(crate) fn is_claimed(&self) -> bool {
        self.settling.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Notes that something promised could not be given.
    pub(crate) fn miss(&self, why: MissKind) {
        self.delivered.lock().unwrap_or_else(PoisonError::into_inner).missed.get_or_insert(why);
    }

    /// Why something that was promised did not come, if so.
    pub(crate) fn missed(&self) -> Option<MissKind> {
        self.delivered.lock().unwrap_or_else(PoisonError::into_inner).missed
    }

    /// Where the planes of a fetch are noted, for [`deliver`](Self::deliver): of the answer's blocks, and of its states behind
    /// them.
    pub(crate) fn ticks(&self) -> Ticks {
        let (_, most) = self.planes();
        Ticks::new(self.answer.objects(), most)
    }

    /// Planes of each block, and of each state off the block grid.
    fn planes(&self) -> (usize, usize) {
        let planes = |kind| self.answer.layout.planes(kind).len();
        let blocks = planes(ObjectKind::Block);
        (blocks, blocks + planes(ObjectKind::State))
    }

    /// Notes what one fetch delivered: raw bytes, and planes.
    pub(crate) fn deliver(&self, bytes: u64, ticks: &Ticks) {
        let mut delivered = self.delivered.lock().unwrap_or_else(PoisonError::into_inner);
        delivered.bytes += bytes;
        match &mut delivered.ticks {
            Some(known) => known.add(ticks),
            none => *none = Some(ticks.clone()),
        }
    }

    pub(crate) fn delivered_bytes(&self) -> u64 {
        self.delivered.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }

    /// Tokens of the blocks of which every plane was delivered, and of the longest part of a block that came with a state.
    /// Wherever they are: what is before them a caller may have had.
    pub(crate) fn delivered_tokens(&self) -> u64 {
        let delivered = self.delivered.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ticks) = &delivered.ticks else { return 0 };
        let block_tokens = u64::from(self.answer.layout.block_tokens());
        let blocks = self.answer.blocks.len();
        let (of_block, of_state) = self.planes();
        let whole = (0..blocks).filter(|&block| ticks.has(block, of_block)).count() as u64;
        let tails = (blocks..).zip(&self.answer.states).filter(|&(at, _)| ticks.has(at, of_state));
        let tail = tails.map(|(_, state)| state.tokens % block_tokens).max().unwrap_or(0);
        whole * block_tokens + tail
    }
}

/// Which planes of which objects were delivered, in the order of [`Answer::blocks`] and [`Answer::states`]. One that comes twice
/// counts once.
#[derive(Clone, Debug)]
pub(crate) struct Ticks {
    /// Words for each object.
    stride: usize,
    /// Of each object in turn, one bit for each of its planes.
    words: Vec<u64>,
}

impl Ticks {
    fn new(objects: usize, planes: usize) -> Self {
        let stride = planes.div_ceil(64);
        Self { stride, words: vec![0; objects * stride] }
    }

    /// Notes a plane of the object at a position.
    pub(crate) fn tick(&mut self, object: usize, plane: usize) {
        let word = object * self.stride + plane / 64;
        if let Some(word) = self.words.get_mut(word).filter(|_| plane / 64 < self.stride) {
            *word |= 1 << (plane % 64);
        }
    }

    fn add(&mut self, other: &Self) {
        for (mine, other) in self.words.iter_mut().zip(&other.words) {
            *mine |= other;
        }
    }

    /// Whether all of an object's planes, of which there are some, are there.
    fn has(&self, object: usize, planes: usize) -> bool {
        let words = &self.words[object * self.stride..(object + 1) * self.stride];
        planes > 0 && words.iter().map(|word| word.count_ones() as usize).sum::<usize>() == planes
    }
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
    tenants: HashMap<TenantId, usize>,
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
        let mut table = self.table();
        let objects = granted.answer.objects();
        let of_tenant = table.tenants.get(&granted.tenant).copied().unwrap_or(0) + objects;
        if table.objects + objects > MAX_GRANTED_OBJECTS || of_tenant > MAX_TENANT_OBJECTS {
            return None;
        }
        table.issued += 1;
        let digest = blake3::keyed_hash(&self.key, &table.issued.to_le_bytes());
        let mut id = GrantId::default();
        id.copy_from_slice(&digest.as_bytes()[..16]);
        table.objects += objects;
        table.tenants.insert(granted.tenant.clone(), of_tenant);
        table.live.insert(id, Arc::new(granted));
        table.expiry.push_back((now + GRANT_TTL, id));
        Some(id)
    }

    /// What a live grant of this tenant pins. Another tenant's grant is as unknown as one that never was.
    pub(crate) fn get(&self, id: &GrantId, tenant: &TenantId, now: Instant) -> Option<Arc<Granted>> {
        let table = self.table();
        // In time even where nobody has taken the expired ones out yet.
        let first_live = table.expiry.partition_point(|(expires, _)| *expires <= now);
        let expired = table.expiry.iter().take(first_live).any(|(_, other)| other == id);
        table.live.get(id).filter(|granted| granted.tenant == *tenant && !expired).cloned()
    }

    /// Ends a live grant of this tenant and gives what it held.
    pub(crate) fn take(&self, id: &GrantId, tenant: &TenantId, now: Instant) -> Option<Arc<Granted>> {
        self.get(id, tenant, now)?;
        self.table().remove(id)
    }

    /// Ends those whose time is over.
    pub(crate) fn expire(&self, now: Instant) -> Vec<(GrantId, Arc<Granted>)> {
        let mut table = self.table();
        let mut expired = Vec::new();
        while let Some((_, id)) = table.expiry.pop_front_if(|(expires, _)| *expires <= now) {
            expired.extend(table.remove(&id).map(|granted| (id, granted)));
        }
        expired
    }

    /// Grants, and objects that they list.
    pub(crate) fn totals(&self) -> (usize, usize) {
        let table = self.table();
        (table.live.len(), table.objects)
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn remove(&mut self, id: &GrantId) -> Option<Arc<Granted>> {
        let granted = self.live.remove(id)?;
        let objects = granted.answer.objects();
        self.objects -= objects;
        if let Some(of_tenant) = self.tenants.get_mut(&granted.tenant) {
            *of_tenant -= objects;
            if *of_tenant == 0 {
                self.tenants.remove(&granted.tenant);
            }
        }
        Some(granted)
    }
}
