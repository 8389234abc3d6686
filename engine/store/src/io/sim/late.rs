//! Completions that take their time and come out of order.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Op, Random, Settled, State, lock};

/// Longest pause between two completions.
const PAUSE_US: u64 = 150;

/// An op that has been done and not been answered.
pub(super) struct Late {
    pub(super) op: Op,
    pub(super) result: io::Result<usize>,
    pub(super) settled: Settled,
}

impl Late {
    pub(super) fn complete(self, state: &Mutex<State>) {
        lock(state).settle(self.settled);
        self.op.complete(self.result);
    }
}

/// Starts the thread that answers; it ends with its queue.
pub(super) fn start(state: Arc<Mutex<State>>, seed: u64) -> Sender<Late> {
    let (queue, ops) = mpsc::channel::<Late>();
    std::thread::spawn(move || {
        let mut random = Random::new(seed);
        let mut waiting: Vec<Late> = Vec::new();
        loop {
            let pause = if waiting.is_empty() {
                Duration::MAX
            } else {
                Duration::from_micros(random.below(PAUSE_US))
            };
            match ops.recv_timeout(pause) {
                Ok(late) => waiting.push(late),
                Err(RecvTimeoutError::Timeout) => {
                    waiting.swap_remove(random.index(waiting.len())).complete(&state);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    waiting.into_iter().for_each(|late| late.complete(&state));
                    return;
                }
            }
        }
    });
    queue
}
