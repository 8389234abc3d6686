//! New blocks on their way to the store, behind a bounded queue that never makes decoding wait.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use esker_store::{PutObject, PutOutcome, Store};

use crate::gate::Pass;

/// Most raw bytes waiting, 256 MiB. What does not fit is dropped and logged: it costs a later recompute, never a
/// delay now.
const MAX_WAITING_BYTES: usize = 256 << 20;
/// Most raw bytes handed to the store at once, 16 MiB: one group commit.
const BATCH_BYTES: usize = 16 << 20;

/// The queue and its thread. Dropping it stores what is still waiting.
pub(crate) struct WriteBehind {
    queue: Option<Sender<Waiting>>,
    waiting_bytes: Arc<AtomicUsize>,
    worker: Option<JoinHandle<()>>,
}

/// An object on its way.
struct Waiting {
    object: PutObject,
    /// Raw ones.
    bytes: usize,
    pass: Pass,
    /// Who counts what becomes of it, with its tokens.
    receipt: Option<(Arc<Receipt>, u64)>,
}

/// Counts the tokens of objects that were stored, for whoever is charged for them.
#[derive(Default)]
pub(crate) struct Receipt {
    /// Objects that are still waiting, and tokens of those that were stored.
    state: Mutex<(usize, u64)>,
    done: Condvar,
}

impl Receipt {
    /// Tokens newly stored, once nothing waits any more, or after this long. What was there already, was declined or is late
    /// does not count.
    pub(crate) fn stored_tokens(&self, at_most: Duration) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.done.wait_timeout_while(state, at_most, |(waiting, _)| *waiting > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.1
    }

    fn add(&self, waiting: isize, tokens: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (state.0.saturating_add_signed(waiting), state.1 + tokens);
        self.done.notify_all();
    }
}

impl WriteBehind {
    /// Starts the thread.
    pub(crate) fn start(store: Arc<Store>) -> std::io::Result<Self> {
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let (queue, waiting) = channel();
        let shared = waiting_bytes.clone();
        let worker = std::thread::Builder::new()
            .name("write-behind".into())
            .spawn(move || run(&store, &waiting, &shared))?;
        Ok(Self { queue: Some(queue), waiting_bytes, worker: Some(worker) })
    }

    /// Raw bytes that wait.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes.load(Ordering::Acquire)
    }

    /// Takes an object, or drops it when the queue is full. Never blocks. Whether it was taken.
    /// Tokens of the object are counted on the receipt if it is stored.
    pub(crate) fn offer(&self, object: PutObject, pass: Pass, receipt: Option<(Arc<Receipt>, u64)>) -> bool {
        let bytes: usize = object.planes.iter().map(|plane| plane.bytes.len()).sum();
        let room = self.waiting_bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| {
            Some(waiting + bytes).filter(|&sum| sum <= MAX_WAITING_BYTES)
        });
        let counted = receipt.as_ref().map(|(receipt, _)| Arc::clone(receipt));
        counted.iter().for_each(|receipt| receipt.add(1, 0));
        let waiting = Waiting { object, bytes, pass, receipt };
        let sent = room.is_ok() && self.queue.as_ref().is_some_and(|queue| queue.send(waiting).is_ok());
        if !sent {
            counted.iter().for_each(|receipt| receipt.add(-1, 0));
            tracing::warn!(
                bytes,
                "a new block was dropped: the store takes blocks more slowly than they are made"
            );
        }
        sent
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(worker) = self.worker.take() {
            // A panic in the worker has been reported by the panic hook; there is nothing left to save here.
            let _ = worker.join();
        }
    }
}

fn run(store: &Store, queue: &Receiver<Waiting>, waiting_bytes: &AtomicUsize) {
    while let Ok(first) = queue.recv() {
        let mut bytes = first.bytes;
        let mut batch = vec![first];
        while bytes < BATCH_BYTES {
            let Ok(more) = queue.try_recv() else { break };
            bytes += more.bytes;
            batch.push(more);
        }
        store_all(store, batch);
        waiting_bytes.fetch_sub(bytes, Ordering::AcqRel);
    }
}

fn store_all(store: &Store, batch: Vec<Waiting>) {
    let (mut objects, mut passes, mut receipts) = (Vec::new(), Vec::new(), Vec::new());
    for Waiting { object, pass, receipt, .. } in batch {
        objects.push(object);
        passes.push(pass);
        receipts.push(receipt);
    }
    // Of a tenant that is erased nothing is stored any more.
    let inside: Vec<_> = passes.iter().map(|pass| pass.enter().ok()).collect();
    let let_in = objects.into_iter().zip(&inside).filter(|(_, inside)| inside.is_some());
    let mut results = store.put(let_in.map(|(object, _)| object).collect()).into_iter();
    for (inside, receipt) in inside.iter().zip(receipts) {
        let result = inside.as_ref().and_then(|_| results.next());
        if let Some((receipt, tokens)) = receipt {
            receipt.add(-1, if matches!(result, Some(Ok(PutOutcome::Stored))) { tokens } else { 0 });
        }
        if let Some(Err(error)) = result {
            tracing::warn!(%error, "a new block was not stored");
        }
    }
}

#[cfg(test)]
mod tests {
    use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeTag, WriterId};
    use esker_store::{PutPlane, StoreSettings, TtlClass};

    use super::*;
    use crate::gate::Gate;

    #[test]
    fn what_is_on_its_way_when_its_tenant_is_erased_is_not_stored() {
        let dir = tempfile::tempdir().unwrap();
        let settings = StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() };
        let store = Arc::new(Store::open(dir.path(), settings).unwrap());
        let object = |byte| {
            let spec = PlaneSpec { group: 0, first_layer: 0, layers: 1, len_bytes: 4 };
            PutObject {
                id: ObjectId { kind: ObjectKind::Block, hash: BlockHash([byte; 32]) },
                parent: None,
                namespace: NamespaceId([0; 32]),
                scope: ScopeTag([1; 16]),
                writer: WriterId(1),
                class: TtlClass::default(),
                tokens: 1,
                planes: vec![PutPlane { spec, shape: None, bytes: vec![byte; 4].into() }],
            }
        };
        let (erased, other) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
        let pass = erased.pass(0);
        erased.close();
        erased.open_from(1);
        let queue = WriteBehind::start(Arc::clone(&store)).unwrap();
        let receipt = Arc::new(Receipt::default());
        for (byte, pass) in [(1, other.pass(0)), (2, pass), (3, erased.pass(1))] {
            assert!(queue.offer(object(byte), pass, Some((Arc::clone(&receipt), 10))));
        }
        drop(queue);
        let ids = [1, 2, 3].map(|byte| object(byte).id);
        let stored: Vec<bool> = store.get(&ids).iter().map(Option::is_some).collect();
        assert_eq!(stored, [true, false, true]);
        assert_eq!(receipt.stored_tokens(Duration::ZERO), 20);
    }
}
