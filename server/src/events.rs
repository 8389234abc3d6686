//! KV events: what comes and goes in each scope, in order, for routers that follow this node.
//!
//! Every scope has a log of its own with numbers without gaps, so that nobody learns from a number how busy others are; whoever
//! subscribes names a scope that is its own to read, and sees no other. Logs are bounded, each and all together: the oldest
//! events go first, and a subscriber who asks for one that is gone is told that it lost some. Numbers begin anew with every
//! process, which the epoch tells. The logs themselves are bounded, too: of many scopes those without events are let go, and
//! numbers of one that comes again go on behind any that it had.
//!
//! The store knows hashes only. What a block's tokens are, or what an engine calls it, is noted before the put by whoever knows
//! it, and kept until the store says that the block has come.
//!
//! Two ways lead out: the stream of `Events.Subscribe`, and the sockets of vLLM's publisher ([`publisher`]). Either reads the logs
//! from where its follower is, so that a slow follower holds nothing up and costs no memory: it loses what the log lets go.

mod feed;
mod message;
pub(crate) mod publisher;
pub(crate) mod zmtp;

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use esker_prefix::{BlockHash, NamespaceId, ObjectKind, ScopeTag};
use esker_proto::v1;
use esker_store::{Change, Observer, Removal};
use tokio::sync::watch;

/// Events kept of one scope.
const MAX_SCOPE_EVENTS: usize = 1 << 14;
/// Events kept of all scopes together, about 700 bytes of memory each.
const MAX_EVENTS: usize = 1 << 16;
/// Scopes that have a log, about 100 bytes each; all that have events among them.
const MAX_SCOPES: usize = 2 * MAX_EVENTS;
/// Blocks about to be put of which something is noted.
const MAX_NOTES: usize = 1 << 14;

/// The logs of a node.
pub(crate) struct Events {
    epoch: u64,
    logs: Mutex<Logs>,
    notes: Mutex<Notes>,
    /// Changes with every event of any scope.
    grew: watch::Sender<()>,
}

#[derive(Default)]
struct Logs {
    scopes: HashMap<ScopeTag, Log>,
    /// Scope and number of the events, oldest first; some may be gone already.
    order: VecDeque<(ScopeTag, u64)>,
    /// Events that are kept.
    kept: usize,
    /// First number of new logs: no log that was let go had come so far. Rounded up, so that it tells little of them.
    floor: u64,
}

#[derive(Default)]
struct Log {
    /// Number of the next event.
    next: u64,
    events: VecDeque<Logged>,
    /// The scope is erased: what comes now is of no interest.
    cleared: bool,
}

/// An event and when it happened, since 1970.
#[derive(Clone)]
struct Logged {
    at: Duration,
    event: v1::kv_event::Event,
}

/// What is known of blocks about to be put.
#[derive(Default)]
struct Notes {
    known: HashMap<BlockHash, Note>,
    order: VecDeque<BlockHash>,
}

/// What is known of a block besides its hash.
#[derive(Clone, Debug, Default)]
struct Note {
    /// Length of the block.
    block_tokens: u32,
    tokens: Vec<u32>,
    engine_hash: Bytes,
}

/// Events of one scope.
pub(crate) struct Read {
    /// Some of those asked for are gone.
    pub(crate) lost: bool,
    /// Number of the first of these, or of the next one if there are none.
    pub(crate) first: u64,
    pub(crate) events: Vec<v1::KvEvent>,
    /// When the first happened.
    pub(crate) at: Duration,
    /// The scope is erased: nothing comes any more.
    pub(crate) cleared: bool,
}

impl Default for Events {
    fn default() -> Self {
        let epoch = u64::try_from(now().as_micros()).unwrap_or(1).max(1);
        Self { epoch, logs: Mutex::default(), notes: Mutex::default(), grew: watch::Sender::new(()) }
    }
}

impl Events {
    /// Of this process; never 0.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Resolves whenever anything happened, in whatever scope.
    pub(crate) fn grew(&self) -> watch::Receiver<()> {
        self.grew.subscribe()
    }

    /// Says which tokens are in a block that is about to be put.
    pub(crate) fn note(&self, hash: BlockHash, tokens: Vec<u32>) {
        let block_tokens = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        self.keep(hash, Note { block_tokens, tokens, engine_hash: Bytes::new() });
    }

    /// Says what an engine calls a block that is about to be put.
    pub(crate) fn note_engine(&self, hash: BlockHash, block_tokens: u32, engine_hash: Bytes) {
        self.keep(hash, Note { block_tokens, tokens: Vec::new(), engine_hash });
    }

    fn keep(&self, hash: BlockHash, note: Note) {
        let mut kept = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.known.insert(hash, note).is_none() {
            kept.order.push_back(hash);
        }
        // What is put again, or was refused, never comes.
        while kept.order.len() > MAX_NOTES {
            let oldest = kept.order.pop_front();
            oldest.and_then(|oldest| kept.known.remove(&oldest));
        }
    }

    /// Everything of these scopes is erased: what their logs tell of its content, too, and nothing comes behind that.
    pub(crate) fn cleared(&self, scopes: &[ScopeTag]) {
        let event = v1::kv_event::Event::AllBlocksCleared(v1::AllBlocksCleared {});
        let mut logs = self.logs();
        for &scope in scopes {
            logs.clear(scope);
            logs.push(scope, event.clone());
        }
        drop(logs);
        self.grew.send_replace(());
    }

    /// Number of a scope's next event.
    pub(crate) fn next(&self, scope: ScopeTag) -> u64 {
        let logs = self.logs();
        logs.scopes.get(&scope).map_or(logs.floor, |log| log.next)
    }

    /// At most `limit` events of a scope, from number `from` on.
    pub(crate) fn read(&self, scope: ScopeTag, from: u64, limit: usize) -> Read {
        let (first, events) = self.logged(scope, from, limit);
        Read {
            lost: first != from,
            first,
            at: events.first().map_or_else(now, |event| event.at),
            cleared: events
                .iter()
                .any(|logged| matches!(logged.event, v1::kv_event::Event::AllBlocksCleared(_))),
            events: events.into_iter().map(|logged| v1::KvEvent { event: Some(logged.event) }).collect(),
        }
    }

    /// At most `limit` events of a scope, from number `from` on or the oldest that is kept, with the number of the first.
    fn logged(&self, scope: ScopeTag, from: u64, limit: usize) -> (u64, Vec<Logged>) {
        let logs = self.logs();
        let Some(log) = logs.scopes.get(&scope) else { return (logs.floor, Vec::new()) };
        let oldest = log.oldest();
        let first = from.clamp(oldest, log.next);
        let skip = usize::try_from(first - oldest).unwrap_or(usize::MAX);
        (first, log.events.iter().skip(skip).take(limit).cloned().collect())
    }

    /// Number of the event after a scope's last, if the scope is erased, or its log may have been let go since.
    fn ended(&self, scope: ScopeTag) -> Option<u64> {
        let logs = self.logs();
        match logs.scopes.get(&scope) {
            Some(log) => Some(log.next).filter(|_| log.cleared),
            None => Some(logs.floor).filter(|floor| *floor > 0),
        }
    }

    fn stored(&self, change: &Change) -> v1::kv_event::Event {
        let note = self.notes.lock().unwrap_or_else(PoisonError::into_inner).take(change.id.hash);
        v1::kv_event::Event::BlockStored(v1::BlockStored {
            block_hashes: vec![hash(change.id.hash)],
            parent_block_hash: change.parent.map(|parent| hash(parent.hash)).unwrap_or_default(),
            token_ids: note.tokens,
            block_size: note.block_tokens,
            medium: MEDIUM.into(),
            locality: LOCALITY.into(),
            namespace: namespace(change.namespace),
            tokens: change.tokens,
            engine_hashes: Some(note.engine_hash).filter(|name| !name.is_empty()).into_iter().collect(),
        })
    }

    fn logs(&self) -> MutexGuard<'_, Logs> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What vLLM calls a drive, and one in this machine.
const MEDIUM: &str = "STORAGE";
const LOCALITY: &str = "LOCAL";

impl Observer for Events {
    fn changed(&self, changes: Vec<Change>) {
        // States are of no use to a router: what can be resumed is asked for.
        for change in changes.iter().filter(|change| change.id.kind == ObjectKind::Block) {
            let event = match change.removal {
                None => self.stored(change),
                Some(reason) => removed(change, reason),
            };
            self.logs().push(change.scope, event);
        }
        self.grew.send_replace(());
    }
}

fn removed(change: &Change, reason: Removal) -> v1::kv_event::Event {
    v1::kv_event::Event::BlockRemoved(v1::BlockRemoved {
        block_hashes: vec![hash(change.id.hash)],
        medium: MEDIUM.into(),
        locality: LOCALITY.into(),
        reason: reason.name().into(),
        namespace: namespace(change.namespace),
    })
}

impl Logs {
    fn push(&mut self, scope: ScopeTag, event: v1::kv_event::Event) {
        if self.scopes.len() >= MAX_SCOPES && !self.scopes.contains_key(&scope) {
            self.let_go();
        }
        let next = self.floor;
        let log = self.scopes.entry(scope).or_insert_with(|| Log { next, ..Log::default() });
        if log.cleared {
            return;
        }
        log.next += 1;
        log.cleared |= matches!(event, v1::kv_event::Event::AllBlocksCleared(_));
        log.events.push_back(Logged { at: now(), event });
        self.kept += 1;
        let number = log.next - 1;
        if log.events.len() > MAX_SCOPE_EVENTS {
            log.events.pop_front();
            self.kept -= 1;
        }
        self.order.push_back((scope, number));
        while self.kept > MAX_EVENTS
            && let Some((scope, number)) = self.order.pop_front()
        {
            self.forget(scope, number);
        }
        if self.order.len() > 2 * MAX_EVENTS {
            let scopes = &self.scopes;
            self.order.retain(|(scope, number)| scopes.get(scope).is_some_and(|log| log.oldest() <= *number));
        }
    }

    /// Keeps nothing of a scope that tells what was stored in it, nor what is older. Numbers are not given again.
    fn clear(&mut self, scope: ScopeTag) {
        if let Some(log) = self.scopes.get_mut(&scope) {
            let told = |logged: &Logged| matches!(logged.event, v1::kv_event::Event::BlockStored(_));
            let end = log.events.iter().rposition(told).map_or(0, |last| last + 1);
            self.kept -= log.events.drain(..end).len();
            log.events.shrink_to_fit();
        }
    }

    /// An event, if it still is its scope's oldest.
    fn forget(&mut self, scope: ScopeTag, number: u64) {
        if let Some(log) = self.scopes.get_mut(&scope)
            && log.oldest() == number
            && log.events.pop_front().is_some()
        {
            self.kept -= 1;
            // A scope that was busy once does not keep the memory of it.
            if log.events.len() < log.events.capacity() / 4 {
                log.events.shrink_to(log.events.len() * 2);
            }
        }
    }

    /// Lets the logs without events go: half of all at least, since no more events are kept than that.
    fn let_go(&mut self) {
        let mut furthest = 0;
        self.scopes.retain(|_, log| {
            if log.events.is_empty() {
                furthest = furthest.max(log.next);
            }
            !log.events.is_empty()
        });
        self.floor = self.floor.max(furthest.next_multiple_of(MAX_SCOPE_EVENTS as u64));
    }
}

impl Log {
    /// Number of the oldest event that is kept, or of the next one.
    fn oldest(&self) -> u64 {
        self.next - self.events.len() as u64
    }
}

impl Notes {
    fn take(&mut self, hash: BlockHash) -> Note {
        // Its place in the order is passed over later.
        self.known.remove(&hash).unwrap_or_default()
    }
}

fn hash(hash: BlockHash) -> Bytes {
    Bytes::copy_from_slice(hash.as_bytes())
}

fn namespace(id: NamespaceId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use esker_prefix::ObjectId;

    pub(super) fn change(scope: u8, number: u64, removal: Option<Removal>) -> Change {
        let mut name = [0; 32];
        name[..8].copy_from_slice(&number.to_le_bytes());
        Change {
            id: ObjectId { kind: ObjectKind::Block, hash: BlockHash(name) },
            parent: None,
            namespace: NamespaceId([7; 32]),
            scope: ScopeTag([scope; 16]),
            tokens: 128,
            removal,
        }
    }

    #[test]
    fn each_scope_counts_for_itself_and_sees_itself_only() {
        let events = Events::default();
        events.changed(vec![change(1, 1, None), change(2, 2, None), change(1, 3, Some(Removal::Evicted))]);
        let one = events.read(ScopeTag([1; 16]), 0, 10);
        assert_eq!((one.first, one.events.len(), one.lost, one.cleared), (0, 2, false, false));
        assert_eq!(events.next(ScopeTag([1; 16])), 2);
        assert_eq!(events.read(ScopeTag([2; 16]), 0, 10).events.len(), 1);
        assert!(events.read(ScopeTag([3; 16]), 0, 10).events.is_empty());
        events.cleared(&[ScopeTag([2; 16])]);
        assert!(events.read(ScopeTag([2; 16]), 0, 10).cleared);
        assert!(!events.read(ScopeTag([1; 16]), 0, 10).cleared);
    }

    #[test]
    fn scopes_that_are_long_quiet_are_let_go_and_their_followers_are_told() {
        let events = Events::default();
        let tag = |number: u64| {
            let mut tag = [0; 16];
            tag[..8].copy_from_slice(&number.to_le_bytes());
            ScopeTag(tag)
        };
        let put = |number: u64, count: u64| {
            let change = |at| Change { scope: tag(number), ..change(0, at, None) };
            events.changed((0..count).map(change).collect());
        };
        put(0, 100);
        put(1, MAX_SCOPE_EVENTS as u64);
        (2..4 * MAX_EVENTS as u64 - 9).for_each(|number| put(number, 1));
        let (scopes, memory) = {
            let logs = events.logs();
            (logs.scopes.len(), logs.scopes.values().map(|log| log.events.capacity()).sum::<usize>())
        };
        assert!(scopes <= MAX_SCOPES, "{scopes} scopes");
        assert!(memory <= 8 * MAX_EVENTS, "room for {memory} events");
        // Whoever had followed the first is told, and not twice.
        let read = events.read(tag(0), 100, 10);
        assert!(read.lost && read.events.is_empty() && read.first > 100);
        assert!(!events.read(tag(0), read.first, 10).lost);
        put(0, 2);
        let again = events.read(tag(0), read.first, 10);
        assert_eq!((again.lost, again.events.len()), (false, 2));
    }

    #[test]
    fn what_is_noted_comes_with_the_block_once() {
        let events = Events::default();
        let noted = change(1, 5, None);
        events.note(noted.id.hash, vec![1, 2, 3, 4]);
        events.changed(vec![noted.clone(), noted]);
        let sizes: Vec<usize> = events
            .read(ScopeTag([1; 16]), 0, 10)
            .events
            .into_iter()
            .map(|event| match event.event {
                Some(v1::kv_event::Event::BlockStored(stored)) => stored.token_ids.len(),
                _ => 99,
            })
            .collect();
        assert_eq!(sizes, [4, 0]);
    }

    #[test]
    fn logs_are_bounded_and_a_gap_is_told() {
        let events = Events::default();
        let scope = ScopeTag([1; 16]);
        let count = MAX_SCOPE_EVENTS as u64 + 10;
        events.changed((0..count).map(|number| change(1, number, None)).collect());
        let read = events.read(scope, 0, 1);
        assert_eq!((read.lost, read.first), (true, 10));
        assert!(!events.read(scope, 10, 1).lost);
        // Others push it out when all together are too many.
        for other in 2..7 {
            events.changed((0..MAX_SCOPE_EVENTS as u64).map(|number| change(other, number, None)).collect());
        }
        let read = events.read(scope, count - 1, 1);
        assert!(read.lost && read.events.is_empty() && read.first == count);
        let logs = events.logs();
        assert!(logs.kept <= MAX_EVENTS && logs.order.len() <= 2 * MAX_EVENTS);
        assert_eq!(logs.scopes.values().map(|log| log.events.len()).sum::<usize>(), logs.kept);
        drop(logs);
        (0..2 * MAX_NOTES as u64).for_each(|number| events.note(change(1, number, None).id.hash, vec![1]));
        assert!(events.notes.lock().unwrap().known.len() <= MAX_NOTES);
    }
}
