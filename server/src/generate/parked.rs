//! Planes of stored blocks for a parked sequence: each miss of a layer is one fetch, and while a layer computes, what the
//! next one may pick is read ahead on a thread.
//!
//! What is read ahead is decided by what the layer before picked. It is never used to select, and dropped if it is not
//! asked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_decoder::PlaneSource;
use esker_prefix::PlaneSpec;
use esker_store::{FetchEvent, FetchOrder, FetchRequest, Found, Pins, PlaneSelection, Store};

use super::offer::Offer;

/// Longest wait for one layer's rows; beyond it they are given up, and the prefix is resumed in another way.
const DEADLINE: Duration = Duration::from_secs(10);
/// Most planes read ahead for one layer: a guess is not worth more.
const AHEAD_BLOCKS: usize = 64;

/// See the module.
pub(super) struct StoredPlanes {
    stored: Stored,
    _pins: Pins,
    counts: Arc<Counts>,
    ahead: Ahead,
}

/// What reading parked rows has cost a generation so far, whatever number of attempts it takes.
#[derive(Default)]
pub(super) struct Counts {
    waited_us: AtomicU64,
    raw_bytes: AtomicU64,
}

impl Counts {
    /// Time that a sequence waited.
    pub(super) fn waited(&self) -> Duration {
        Duration::from_micros(self.waited_us.load(Ordering::Relaxed))
    }

    /// Bytes of the planes that it was given, as they were put. What was read ahead in vain is not among them.
    pub(super) fn raw_bytes(&self) -> u64 {
        self.raw_bytes.load(Ordering::Relaxed)
    }

    /// What was read since it had counted so many bytes was read for a loss, and serves nobody.
    pub(super) fn forget_bytes_since(&self, raw_bytes: u64) {
        self.raw_bytes.store(raw_bytes, Ordering::Relaxed);
    }
}

/// Where the planes are.
#[derive(Clone)]
struct Stored {
    store: Arc<Store>,
    blocks: Arc<[Found]>,
    planes: Arc<[PlaneSpec]>,
    /// Where it is noted that something did not come.
    offer: Arc<Offer>,
}

/// The thread that reads ahead. At most one reading is under way.
struct Ahead {
    wanted: Option<SyncSender<(usize, Vec<usize>)>>,
    got: Receiver<Option<Vec<Bytes>>>,
    under_way: Option<(usize, Vec<usize>)>,
    thread: Option<JoinHandle<()>>,
}

impl StoredPlanes {
    /// Counts on `counts`. Of `blocks`, a prefix, which is kept in the store for as long as this lives. They should
    /// [remember](Found::remembering) their headers.
    pub(super) fn new(
        store: &Arc<Store>,
        blocks: &[Found],
        planes: &[PlaneSpec],
        offer: &Arc<Offer>,
        counts: &Arc<Counts>,
    ) -> std::io::Result<Self> {
        let pins = store.pin(&blocks.iter().rev().take(1).map(|found| found.id).collect::<Vec<_>>());
        let (store, offer) = (Arc::clone(store), Arc::clone(offer));
        let stored = Stored { store, blocks: blocks.into(), planes: planes.into(), offer };
        let ahead = Ahead::start(stored.clone())?;
        Ok(Self { stored, _pins: pins, counts: Arc::clone(counts), ahead })
    }
}

impl PlaneSource for StoredPlanes {
    fn fetch(&mut self, plane: usize, blocks: &[usize]) -> Option<Vec<Bytes>> {
        let started = Instant::now();
        let mut early = self.ahead.take(plane);
        let late: Vec<usize> = blocks.iter().copied().filter(|block| !early.contains_key(block)).collect();
        if !late.is_empty() {
            early.extend(late.iter().copied().zip(self.stored.fetch(plane, &late)?));
        }
        let planes: Option<Vec<Bytes>> = blocks.iter().map(|block| early.remove(block)).collect();
        let waited_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counts.waited_us.fetch_add(waited_us, Ordering::Relaxed);
        let raw_bytes = planes.iter().flatten().map(|plane| plane.len() as u64).sum();
        self.counts.raw_bytes.fetch_add(raw_bytes, Ordering::Relaxed);
        planes
    }

    fn hint(&mut self, plane: usize, blocks: &[usize]) {
        self.ahead.begin(plane, &blocks[..blocks.len().min(AHEAD_BLOCKS)]);
    }
}

impl Stored {
    fn fetch(&self, plane: usize, blocks: &[usize]) -> Option<Vec<Bytes>> {
        let spec = self.planes.get(plane)?;
        let objects = blocks.iter().map(|&block| self.blocks.get(block).cloned()).collect::<Option<_>>()?;
        let layers = spec.first_layer..spec.first_layer + spec.layers;
        let fetch = self.store.fetch(FetchRequest {
            objects,
            planes: PlaneSelection::Layers(vec![(spec.group, layers)]),
            order: FetchOrder::ByObject,
            deadline: Some(Instant::now() + DEADLINE),
        });
        let planes = fetch.map_while(|event| match event {
            // A copy, so that what is kept of a plane does not keep the whole read.
            FetchEvent::Plane { bytes, .. } => Some(Bytes::copy_from_slice(&bytes)),
            FetchEvent::Miss { kind, .. } => {
                self.offer.miss(kind);
                None
            }
        });
        Some(planes.collect::<Vec<_>>()).filter(|planes| planes.len() == blocks.len())
    }
}

impl Ahead {
    fn start(stored: Stored) -> std::io::Result<Self> {
        let (wanted, requests) = sync_channel::<(usize, Vec<usize>)>(1);
        let (answers, got) = sync_channel(1);
        let thread = std::thread::Builder::new().name("esker-ahead".into()).spawn(move || {
            for (plane, blocks) in requests {
                if answers.send(stored.fetch(plane, &blocks)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { wanted: Some(wanted), got, under_way: None, thread: Some(thread) })
    }

    /// Begins a reading, unless one is under way.
    fn begin(&mut self, plane: usize, blocks: &[usize]) {
        if self.under_way.is_some() {
            return;
        }
        let Some(wanted) = &self.wanted else { return };
        match wanted.try_send((plane, blocks.to_vec())) {
            Ok(()) => self.under_way = Some((plane, blocks.to_vec())),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }

    /// What was read ahead of this plane; waits for it if it is under way. A reading of another plane is forgotten.
    fn take(&mut self, plane: usize) -> HashMap<usize, Bytes> {
        let Some((of, blocks)) = self.under_way.take() else { return HashMap::new() };
        match self.got.recv() {
            Ok(Some(planes)) if of == plane => blocks.into_iter().zip(planes).collect(),
            _ => HashMap::new(),
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.wanted = None;
        if self.under_way.take().is_some() {
            let _ = self.got.recv();
        }
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
