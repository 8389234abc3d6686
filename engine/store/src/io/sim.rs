//! A disk in memory that can lose power, for tests.
//!
//! Reads see every write at once, as through a device's cache. What a power cut leaves is another matter: a write is
//! durable only after a successful sync of its file, and until then any subset of its sectors of 512 bytes may be, in
//! any order; after a *failed* sync even a later, successful one says nothing of it. Creating and removing a file is
//! durable when the call returns, as the contract of [`Disk`] demands, and half done before. The disk keeps its
//! [`History`], so that one run of a program gives a crash after each of its ops, and many states of the medium for
//! each crash.
//!
//! Ops run inline, on the thread that submits them: no op waits for a thread, and a thousand stores a second can be
//! opened. A disk made with [`SimDisk::late`] takes its time instead and completes ops out of order, so that several
//! batches are under way at once; a sync then covers the writes whose completion was out when it was submitted, no others.
//! Faults are those of [`faulty`](super::faulty), with what only the medium can know: a failed write may have
//! written a part.

mod history;
mod image;
mod late;
mod random;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use history::{History, Replay};
pub use image::{Damage, Image};
pub use random::Random;

use super::faulty::{self, Fault, Plan, Plans};
use super::{Disk, FileId, IoEngine, Op, OpKind, PAGE};
use history::{Covered, Event};
use late::Late;

/// What tears: bytes that a device writes whole or not at all.
pub const SECTOR: usize = 512;

/// See the module.
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    /// Where ops wait for their completion, if they do.
    late: Option<Sender<Late>>,
}

struct State {
    /// What reads see.
    live: Image,
    capacity_bytes: u64,
    open: HashMap<FileId, String>,
    next_file: u32,
    history: History,
    plans: Plans,
    /// Writes whose completion is not out.
    in_flight: Vec<u64>,
    creates: u64,
    failing_creates: Option<(Range<u64>, i32)>,
    holeless: bool,
}

impl SimDisk {
    /// A disk that holds what a crash has left, with room for `capacity_bytes` in all.
    pub fn open(image: Image, capacity_bytes: u64) -> Arc<Self> {
        let state = State {
            live: image.clone(),
            capacity_bytes,
            open: HashMap::new(),
            next_file: 0,
            history: History::new(image),
            plans: Plans::default(),
            in_flight: Vec::new(),
            creates: 0,
            failing_creates: None,
            holeless: false,
        };
        Arc::new(Self { state: Arc::new(Mutex::new(state)), late: None })
    }

    /// As [`SimDisk::open`], completing ops out of order and a little later.
    pub fn late(image: Image, capacity_bytes: u64, seed: u64) -> Arc<Self> {
        let inline = Self::open(image, capacity_bytes);
        let late = late::start(Arc::clone(&inline.state), seed);
        Arc::new(Self { state: Arc::clone(&inline.state), late: Some(late) })
    }

    /// Sets the faults and counts ops from here on.
    pub fn arm(&self, plans: &[Plan]) {
        let mut state = self.state();
        state.plans.arm(plans);
        state.creates = 0;
    }

    /// Fails the creations with these numbers, counted from the last [`SimDisk::arm`].
    pub fn fail_creates(&self, numbers: Range<u64>, errno: i32) {
        self.state().failing_creates = Some((numbers, errno));
    }

    /// Makes it a disk that cannot give back parts of a file.
    pub fn refuse_holes(&self) {
        self.state().holeless = true;
    }

    /// Ops of a kind since [`SimDisk::arm`].
    pub fn seen(&self, kind: OpKind) -> u64 {
        self.state().plans.seen(kind)
    }

    /// Creations since [`SimDisk::arm`].
    pub fn creates(&self) -> u64 {
        self.state().creates
    }

    /// Length of the history: a crash at this point comes after everything so far.
    pub fn position(&self) -> usize {
        self.state().history.len()
    }

    /// What has happened since the disk was opened.
    pub fn history(&self) -> History {
        self.state().history.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What becomes true when the completion of an op is out.
enum Settled {
    Nothing,
    Write(u64),
    Sync { name: String, done: bool, covered: Covered },
}

impl Disk for SimDisk {
    fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId> {
        let mut state = self.state();
        let number = state.creates;
        state.creates += 1;
        if let Some((numbers, errno)) = &state.failing_creates
            && numbers.contains(&number)
        {
            return Err(io::Error::from_raw_os_error(*errno));
        }
        if state.live.get(name).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if state.live.len_bytes().saturating_add(len_bytes) > state.capacity_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        state.history.push(Event::Creating(name.to_owned(), len));
        state.history.push(Event::Created(name.to_owned(), len));
        state.live.insert(name, vec![0; len]);
        Ok(state.add(name))
    }

    fn open(&self, name: &str) -> io::Result<(FileId, u64)> {
        let mut state = self.state();
        let len_bytes = state.live.get(name).ok_or(io::ErrorKind::NotFound)?.len() as u64;
        Ok((state.add(name), len_bytes))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.state().live.names().map(str::to_owned).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        if !state.live.remove(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.open.retain(|_, open| open != name);
        state.history.push(Event::Removing(name.to_owned()));
        state.history.push(Event::Removed(name.to_owned()));
        Ok(())
    }

    /// As a write of zeros: lost in part or in whole unless the file is synced later.
    fn punch(&self, file: FileId, offset: u64, len_bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        if state.holeless {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let name = state.open.get(&file).cloned().ok_or(io::ErrorKind::NotFound)?;
        let part = |bytes| usize::try_from(bytes).map_err(io::Error::other);
        let (offset, zeros) = (part(offset)?, vec![0; part(len_bytes)?]);
        let file = state.live.get_mut(&name).ok_or(io::ErrorKind::NotFound)?;
        file.put(offset, &zeros, true);
        state.history.push(Event::Wrote { name, offset, data: zeros.into(), failed: false, hole: true });
        Ok(())
    }

    fn allocated_bytes(&self, file: FileId) -> io::Result<u64> {
        let state = self.state();
        let name = state.open.get(&file).ok_or(io::ErrorKind::NotFound)?;
        Ok(state.live.get(name).ok_or(io::ErrorKind::NotFound)?.len() as u64)
    }

    /// Zeros are holes, whoever wrote them.
    fn next_data(&self, file: FileId, offset: u64) -> u64 {
        let state = self.state();
        let bytes = state.open.get(&file).and_then(|name| state.live.get(name)).unwrap_or_default();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let blank = bytes[from..].chunks(PAGE).take_while(|page| page.iter().all(|&byte| byte == 0)).count();
        let at = offset + (blank * PAGE) as u64;
        if at < bytes.len() as u64 { at } else { u64::MAX }
    }

    fn next_hole(&self, file: FileId, offset: u64) -> u64 {
        let (state, from) = (self.state(), usize::try_from(offset).unwrap_or(usize::MAX));
        let hole = state.open.get(&file).and_then(|name| state.live.next_hole(name, from));
        hole.map_or(u64::MAX, |at| at as u64)
    }

    fn submit(&self, mut op: Op) {
        let (result, settled) = self.state().run(&mut op);
        let late = Late { op, result, settled };
        match &self.late {
            None => late.complete(&self.state),
            Some(queue) => {
                if let Err(refused) = queue.send(late) {
                    refused.0.complete(&self.state);
                }
            }
        }
    }

    /// Nearest of the real ones: no alignment is demanded of the medium, and nothing is durable unasked.
    fn engine(&self) -> IoEngine {
        IoEngine::PositionalBuffered
    }
}

impl State {
    fn add(&mut self, name: &str) -> FileId {
        let id = FileId(self.next_file);
        self.next_file += 1;
        self.open.insert(id, name.to_owned());
        id
    }

    /// Does what an op asks for, all but what waits for its completion.
    fn run(&mut self, op: &mut Op) -> (io::Result<usize>, Settled) {
        let Some(name) = self.open.get(&op.file).cloned() else {
            return (Err(io::ErrorKind::NotFound.into()), Settled::Nothing);
        };
        let fault = self.plans.meet(op.kind);
        let offset = usize::try_from(op.offset).expect("files fit in memory");
        let Some(buf) = op.buf.as_deref_mut() else {
            let result = match fault {
                Some(Fault::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
                _ => Ok(0),
            };
            let covered = Covered { before: self.history.writes(), in_flight: self.in_flight.clone() };
            let settled = Settled::Sync { name, done: result.is_ok(), covered };
            return (result, settled);
        };
        if op.kind == OpKind::Read {
            return (self.read(&name, offset, buf, fault), Settled::Nothing);
        }
        let number = self.history.writes();
        let result = self.write(&name, offset, buf, fault);
        if self.history.writes() == number {
            return (result, Settled::Nothing);
        }
        self.in_flight.push(number);
        (result, Settled::Write(number))
    }

    fn settle(&mut self, settled: Settled) {
        match settled {
            Settled::Nothing => {}
            Settled::Write(number) => self.in_flight.retain(|&other| other != number),
            Settled::Sync { name, done: true, covered } => self.history.push(Event::Synced(name, covered)),
            Settled::Sync { name, .. } => self.history.push(Event::SyncFailed(name)),
        }
    }

    fn read(&self, name: &str, offset: usize, buf: &mut [u8], fault: Option<Fault>) -> io::Result<usize> {
        if let Some(Fault::Errno(errno)) = fault {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let offset = offset + misdirection(fault);
        let file = self.live.get(name).ok_or(io::ErrorKind::NotFound)?;
        let there = file.get(offset..).unwrap_or_default();
        let mut len = there.len().min(buf.len());
        if let Some(Fault::Short(moved)) = fault {
            len = len.min(moved);
        }
        buf[..len].copy_from_slice(&there[..len]);
        if let Some(Fault::FlipBit(bit)) = fault {
            faulty::flip(&mut buf[..len], bit);
        }
        Ok(len)
    }

    fn write(&mut self, name: &str, offset: usize, buf: &[u8], fault: Option<Fault>) -> io::Result<usize> {
        let offset = offset + misdirection(fault);
        let Self { live, history, .. } = self;
        let file = live.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
        let offset = offset.min(file.len());
        let len = (file.len() - offset).min(buf.len());
        let mut data = buf[..len].to_vec();
        let mut put = |data: &[u8]| file.put(offset, data, false);
        match fault {
            Some(Fault::Lost) => return Ok(buf.len()),
            // Nobody sees it before the power cut, and then perhaps a part of it.
            Some(Fault::Errno(errno)) => {
                history.push(Event::Wrote {
                    name: name.to_owned(),
                    offset,
                    data: data.into(),
                    failed: true,
                    hole: false,
                });
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(Fault::Short(moved)) => data.truncate(moved),
            Some(Fault::FlipBit(bit)) => faulty::flip(&mut data, bit),
            Some(Fault::Misdirected(_)) | None => {}
        }
        put(&data);
        let moved = data.len();
        history.push(Event::Wrote {
            name: name.to_owned(),
            offset,
            data: data.into(),
            failed: false,
            hole: false,
        });
        Ok(if matches!(fault, Some(Fault::Misdirected(_))) { buf.len() } else { moved })
    }
}

/// How far from where it should a transfer lands, in bytes.
fn misdirection(fault: Option<Fault>) -> usize {
    match fault {
        Some(Fault::Misdirected(by)) => usize::try_from(by).unwrap_or_default() / PAGE * PAGE,
        _ => 0,
    }
}
