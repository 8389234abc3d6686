//! Scrubbing: sealed records are read and proven again, slowly and for ever, so that damage is found while there is still
//! somebody who can put the block again, and not by whoever needs it.
//!
//! It takes `scrub_bytes_per_s` and no more, and gives way: nothing is read while fetches hold half of the read budget or
//! more, so none of them ever waits for it, nor while the device fails. What is bad is read once more, then quarantined.
//! How far it came is kept in the index, so that restarts do not keep it in the first segments.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::index::{Changes, Entry};
use crate::segment::{SegmentId, Spot};
use crate::shared::Shared;
use crate::table::Located;
use crate::{MissKind, Result, verify};

/// After opening, others go first.
const START: Duration = Duration::from_secs(5);
/// Between the end of the last segment and the next round.
const REST: Duration = Duration::from_secs(60);
/// While others need the device, or it fails.
const GIVE_WAY: Duration = Duration::from_millis(100);
/// Entries looked up at a time.
const ENTRIES: usize = 256;
/// Bytes verified between two pauses, at least.
const STRIDE_BYTES: u64 = 256 << 10;
/// Bytes after which the position is written down.
const REMEMBER_BYTES: u64 = 64 << 20;
/// Records up to this length are read at once, longer ones plane by plane.
const WHOLE_READ_BYTES: usize = 4 << 20;

/// Handle of the thread.
pub(crate) struct Scrubber {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Scrubber {
    /// Starts it, unless it is switched off.
    pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        if shared.settings.scrub_bytes_per_s == 0 {
            return Ok(Self { stop: None, thread: None });
        }
        let (stop, stopped) = mpsc::channel();
        let mut scrub = Scrub::new(Arc::clone(shared));
        let thread = std::thread::Builder::new().name("esker-scrub".into());
        let thread = thread.spawn(move || scrub.run(&stopped))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Scrubber {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the scrubbing thread panicked");
        }
    }
}

/// One after another of all sealed records.
pub(crate) struct Scrub {
    shared: Arc<Shared>,
    /// What comes next.
    position: Spot,
    waiting: std::vec::IntoIter<Entry>,
    unremembered_bytes: u64,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes were verified.
    Verified(u64),
    /// The device is for others now.
    GaveWay,
    /// All segments were seen; the next step starts over.
    Round,
}

impl Scrub {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let start = Spot { segment: SegmentId(0), offset: 0 };
        let position = shared.index.scrub_position().ok().flatten().unwrap_or(start);
        Self { shared, position, waiting: Vec::new().into_iter(), unremembered_bytes: 0 }
    }

    /// What comes next.
    #[cfg(test)]
    pub(crate) fn position(&self) -> Spot {
        self.position
    }

    fn run(&mut self, stopped: &Receiver<()>) {
        let mut pause = START;
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
            pause = match self.step() {
                Ok(Step::Verified(bytes)) => {
                    Duration::from_secs_f64(bytes as f64 / self.shared.settings.scrub_bytes_per_s as f64)
                }
                Ok(Step::GaveWay) => GIVE_WAY,
                Ok(Step::Round) => REST,
                Err(error) => {
                    tracing::error!(%error, "scrubbing cannot read the index");
                    REST
                }
            };
        }
        self.remember();
    }

    /// Verifies some records.
    pub(crate) fn step(&mut self) -> Result<Step> {
        let mut verified = 0;
        while verified < STRIDE_BYTES {
            let reading = &self.shared.reading;
            if reading.used_bytes() > self.shared.settings.read_bytes_in_flight / 2
                || self.shared.breaker.is_open()
            {
                return Ok(if verified == 0 { Step::GaveWay } else { Step::Verified(verified) });
            }
            let Some(entry) = self.waiting.next() else {
                if self.look_up()? {
                    continue;
                }
                if verified > 0 {
                    break;
                }
                self.position = Spot { segment: SegmentId(0), offset: 0 };
                self.remember();
                let counters = &self.shared.counters;
                counters.scrub_rounds.add(1);
                counters.scrub_round_start.store(counters.scrubbed_bytes.get(), Ordering::Relaxed);
                return Ok(Step::Round);
            };
            let segment = self.shared.segments.get(entry.spot.segment);
            if !segment.is_some_and(|segment| segment.sealed) {
                // What is being written was just verified by being made; it is sealed one day.
                self.position = Spot { segment: SegmentId(entry.spot.segment.0 + 1), offset: 0 };
                self.waiting = Vec::new().into_iter();
                continue;
            }
            self.position = Spot { offset: entry.end(), ..entry.spot };
            verified += self.record(&entry);
        }
        self.unremembered_bytes += verified;
        if self.unremembered_bytes >= REMEMBER_BYTES {
            self.remember();
        }
        Ok(Step::Verified(verified))
    }

    /// Fetches the next entries. `false` if there are none.
    fn look_up(&mut self) -> Result<bool> {
        let entries = self.shared.index.entries_from(self.position).take(ENTRIES);
        let entries = entries.collect::<Result<Vec<Entry>>>()?;
        let any = !entries.is_empty();
        self.waiting = entries.into_iter();
        Ok(any)
    }

    /// Verifies one record. Returns its length.
    fn record(&self, entry: &Entry) -> u64 {
        let Some(located) = self.shared.table.get(entry.id).filter(|located| located.spot == entry.spot)
        else {
            return 0;
        };
        let prove = || self.shared.prove(entry, &located);
        if let Err(kind) = prove().or_else(|_| prove())
            && kind.is_damage()
            // What was evicted or erased meanwhile reads as zeros, and is no damage.
            && self.shared.table.is_at(entry.id, entry.spot)
        {
            self.shared.counters.scrub_bad.add(1);
            self.shared.quarantine(entry.id, &located, kind);
        }
        let bytes = located.record_bytes() as u64;
        self.shared.counters.scrubbed_bytes.add(bytes);
        bytes
    }

    /// Writes the position down.
    pub(crate) fn remember(&mut self) {
        self.unremembered_bytes = 0;
        let mut changes = Changes::default();
        changes.put_scrub_position(self.position);
        if let Err(error) = self.shared.index.write(changes) {
            tracing::warn!(%error, "the position of scrubbing could not be written down");
        }
    }
}

impl Shared {
    /// Reads a record and proves its header and all its planes.
    pub(crate) fn prove(&self, entry: &Entry, located: &Located) -> std::result::Result<(), MissKind> {
        let segment = self.segments.get(located.spot.segment).ok_or(MissKind::Absent)?;
        let whole = located.record_bytes() <= WHOLE_READ_BYTES;
        let header_pages = crate::io::page_ceil(located.header_bytes as usize);
        let read = self.read(located, 0, if whole { located.record_bytes() } else { header_pages })?;
        let header = verify::header(&read, entry.id, located, segment.generation)?;
        for plane in &header.planes {
            let range = plane.range();
            if whole {
                verify::stored(&header, plane, &read[range], &self.pool)?;
                continue;
            }
            let start = range.start / crate::io::PAGE * crate::io::PAGE;
            let read = self.read(located, start, crate::io::page_ceil(range.end - start))?;
            verify::stored(&header, plane, &read[range.start - start..range.end - start], &self.pool)?;
        }
        Ok(())
    }
}
