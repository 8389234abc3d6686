//! New blocks on their way to the store, behind a bounded queue that never makes decoding wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use esker_store::{PutObject, PutOutcome, Store};

/// Most raw bytes waiting, 256 MiB. What does not fit is dropped and logged: it costs a later recompute, never a
/// delay now.
const MAX_WAITING_BYTES: usize = 256 << 20;
/// Most raw bytes handed to the store at once, 16 MiB: one group commit.
const BATCH_BYTES: usize = 16 << 20;

/// The queue and its thread. Dropping it stores what is still waiting.
pub(crate) struct WriteBehind {
    queue: Option<Sender<(PutObject, usize)>>,
    waiting_bytes: Arc<AtomicUsize>,
    worker: Option<JoinHandle<()>>,
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
    pub(crate) fn offer(&self, object: PutObject) -> bool {
        let bytes: usize = object.planes.iter().map(|plane| plane.bytes.len()).sum();
        let room = self.waiting_bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| {
            Some(waiting + bytes).filter(|&sum| sum <= MAX_WAITING_BYTES)
        });
        let sent =
            room.is_ok() && self.queue.as_ref().is_some_and(|queue| queue.send((object, bytes)).is_ok());
        if !sent {
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

fn run(store: &Store, queue: &Receiver<(PutObject, usize)>, waiting_bytes: &AtomicUsize) {
    while let Ok((first, mut bytes)) = queue.recv() {
        let mut batch = vec![first];
        while bytes < BATCH_BYTES {
            let Ok((object, more)) = queue.try_recv() else { break };
            batch.push(object);
            bytes += more;
        }
        for result in store.put(batch) {
            match result {
                Ok(PutOutcome::Stored | PutOutcome::Present | PutOutcome::Declined) => {}
                Err(error) => {
                    tracing::warn!(%error, "a new block was not stored");
                }
            }
        }
        waiting_bytes.fetch_sub(bytes, Ordering::AcqRel);
    }
}
