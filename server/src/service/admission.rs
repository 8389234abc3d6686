//! Admission: how many fetches run at a time, how many wait for their turn, and for how long.
//!
//! Past saturation more concurrency gives no more bytes, only later ones; a request that is served after its caller has given up
//! is work lost. So few run, few wait, and what waits too long is refused, with the time after which to come again, before it has
//! cost any I/O. A fetch whose client takes its time gives its turn up and goes on without one ([`Turn::yield_now`]): slow clients
//! neither keep the others waiting nor cost them anything, and are bounded in number.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use crate::tenants::full;

/// Fetches that run at a time. More of them than saturate drive and cores only end later.
const FETCHES: usize = 16;
/// Fetches that wait for one of those to end.
const WAITING: usize = 64;
/// Fetches that are open at a time, those of slow clients among them. Each holds a few planes and a thread.
const OPEN: usize = 256;
/// Longest wait for a turn. Of a caller's own deadline at most half is spent on it, so that the fetch itself has the rest.
const PATIENCE: Duration = Duration::from_millis(500);
/// When one that was refused should come again, at the soonest.
const RETRY_AFTER_MS: u64 = 100;

/// What all services of a node share.
#[derive(Clone)]
pub(crate) struct Admission {
    open: Arc<Semaphore>,
    fetches: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Admission {
    pub(crate) fn new() -> Self {
        Self {
            open: Arc::new(Semaphore::new(OPEN)),
            fetches: Arc::new(Semaphore::new(FETCHES)),
            waiting: Arc::new(Semaphore::new(WAITING)),
        }
    }

    /// A turn for one fetch, held until it is dropped.
    pub(super) async fn fetch(&self, deadline: Option<Instant>) -> Result<Turn, Status> {
        let taken = |_| full("open fetches", OPEN as u64, RETRY_AFTER_MS);
        let open = Arc::clone(&self.open).try_acquire_owned().map_err(taken)?;
        if let Ok(permit) = Arc::clone(&self.fetches).try_acquire_owned() {
            return Ok(Turn { running: Some(permit), _open: open });
        }
        let refused = || full("fetches", FETCHES as u64, RETRY_AFTER_MS);
        let _place = self.waiting.try_acquire().map_err(|_| refused())?;
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()) / 2);
        let patience = left.map_or(PATIENCE, |left| left.min(PATIENCE));
        match tokio::time::timeout(patience, Arc::clone(&self.fetches).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Turn { running: Some(permit), _open: open }),
            _ => Err(refused()),
        }
    }
}

/// A turn of one fetch.
pub(crate) struct Turn {
    running: Option<OwnedSemaphorePermit>,
    _open: OwnedSemaphorePermit,
}

impl Turn {
    /// Lets another run. This one goes on, as slow as its client.
    pub(super) fn yield_now(&mut self) {
        self.running = None;
    }
}
