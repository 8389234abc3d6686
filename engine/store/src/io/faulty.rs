//! A disk that fails on purpose, around one that works, and keeps a trace of what was asked and answered.
//!
//! For tests. Faults are named by the number of the op among its kind, counted from the last [`FaultyDisk::arm`].

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use super::{Disk, FileId, IoEngine, Op, OpKind, PAGE, Region};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The op fails with this error number and moves nothing.
    Errno(i32),
    /// The op moves this many bytes and says so.
    Short(usize),
    /// One bit of the data differs: on its way to the disk, or from it.
    FlipBit(usize),
    /// The write is reported done and does not happen.
    Lost,
    /// The write lands this many bytes behind where it should.
    Misdirected(u64),
}

/// Which ops meet a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Kind of the ops.
    pub kind: OpKind,
    /// Number of the first, from 0.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// What happens to them.
    pub fault: Fault,
}

/// What a disk saw, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// An op ended; whether it moved everything.
    Done(OpKind, FileId, u64, bool),
    /// A put was acknowledged: written by the test.
    Acknowledged(u64),
}

/// See the module.
pub struct FaultyDisk {
    inner: Arc<dyn Disk>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    plans: Plans,
    create_error: Option<i32>,
    trace: Vec<Trace>,
    holeless: bool,
    /// Ops of this kind wait.
    held: Option<OpKind>,
    waiting: VecDeque<Op>,
}

/// The faults of a disk, and the count of its ops that they go by.
#[derive(Default)]
pub(super) struct Plans {
    plans: Vec<Plan>,
    seen: [u64; 3],
}

impl Plans {
    pub(super) fn arm(&mut self, plans: &[Plan]) {
        *self = Self { plans: plans.to_vec(), seen: [0; 3] };
    }

    pub(super) fn seen(&self, kind: OpKind) -> u64 {
        self.seen[kind as usize]
    }

    /// Counts an op, and tells what happens to it.
    pub(super) fn meet(&mut self, kind: OpKind) -> Option<Fault> {
        let number = self.seen[kind as usize];
        self.seen[kind as usize] += 1;
        let meets = |plan: &&Plan| {
            plan.kind == kind && (plan.first..plan.first.saturating_add(plan.count)).contains(&number)
        };
        self.plans.iter().find(meets).map(|plan| plan.fault)
    }
}

impl FaultyDisk {
    /// A disk without faults, for now.
    pub fn new(inner: Arc<dyn Disk>) -> Arc<Self> {
        Arc::new(Self { inner, state: Mutex::default() })
    }

    /// Sets the faults and counts ops from here on.
    pub fn arm(&self, plans: &[Plan]) {
        self.state().plans.arm(plans);
    }

    /// Makes every creation of a file fail with this error number, or work again.
    pub fn fail_create(&self, errno: Option<i32>) {
        self.state().create_error = errno;
    }

    /// Makes it a disk that cannot give back parts of a file.
    pub fn refuse_holes(&self) {
        self.state().holeless = true;
    }

    /// From now on ops of this kind wait until they are let go of.
    pub fn hold(&self, kind: Option<OpKind>) {
        self.state().held = kind;
    }

    /// Ops that wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Carries out the oldest op that waits, if there is one.
    pub fn let_go(&self) {
        let op = self.state().waiting.pop_front();
        op.into_iter().for_each(|op| self.carry_out(op));
    }

    /// Adds to the trace.
    pub fn note(&self, event: Trace) {
        self.state().trace.push(event);
    }

    /// Takes the trace.
    pub fn trace(&self) -> Vec<Trace> {
        std::mem::take(&mut self.state().trace)
    }

    /// Ops of a kind since [`FaultyDisk::arm`].
    pub fn seen(&self, kind: OpKind) -> u64 {
        self.state().plans.seen(kind)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an op on the real disk to its end.
    fn run(&self, op: &mut Op, offset: u64) -> io::Result<usize> {
        let (reply, completions) = mpsc::channel();
        let (file, kind, buf) = (op.file, op.kind, op.buf.take());
        self.inner.submit(Op { file, kind, offset, buf, tag: 0, permit: None, reply: Some(Box::new(reply)) });
        let completion = completions.recv().map_err(io::Error::other)?;
        op.buf = completion.buf;
        completion.result
    }
}

impl Disk for FaultyDisk {
    fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId> {
        if let Some(errno) = self.state().create_error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.inner.create(name, len_bytes)
    }

    fn open(&self, name: &str) -> io::Result<(FileId, u64)> {
        self.inner.open(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn punch(&self, file: FileId, offset: u64, len_bytes: u64) -> io::Result<()> {
        if self.state().holeless {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.inner.punch(file, offset, len_bytes)
    }

    fn allocated_bytes(&self, file: FileId) -> io::Result<u64> {
        self.inner.allocated_bytes(file)
    }

    fn next_data(&self, file: FileId, offset: u64) -> u64 {
        self.inner.next_data(file, offset)
    }

    fn next_hole(&self, file: FileId, offset: u64) -> u64 {
        self.inner.next_hole(file, offset)
    }

    fn register(&self, region: &Arc<Region>) -> io::Result<()> {
        self.inner.register(region)
    }

    fn submit(&self, op: Op) {
        let mut state = self.state();
        if state.held == Some(op.kind) {
            state.waiting.push_back(op);
            return;
        }
        drop(state);
        self.carry_out(op);
    }

    fn engine(&self) -> IoEngine {
        self.inner.engine()
    }

    fn in_flight(&self) -> u64 {
        self.inner.in_flight()
    }

    fn unknown_completions(&self) -> u64 {
        self.inner.unknown_completions()
    }
}

impl FaultyDisk {
    fn carry_out(&self, mut op: Op) {
        let wanted = op.len_bytes();
        let (kind, file, offset) = (op.kind, op.file, op.offset);
        let flip = |op: &mut Op, bit: usize| op.buf.iter_mut().for_each(|buf| flip(buf, bit));
        let fault = self.state().plans.meet(kind);
        let result = match fault {
            None => self.run(&mut op, offset),
            Some(Fault::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Short(moved)) => self.run(&mut op, offset).map(|done| done.min(moved)),
            Some(Fault::Lost) => Ok(wanted),
            Some(Fault::Misdirected(by)) => self.run(&mut op, offset + by / PAGE as u64 * PAGE as u64),
            Some(Fault::FlipBit(bit)) if kind == OpKind::Write => {
                flip(&mut op, bit);
                let result = self.run(&mut op, offset);
                flip(&mut op, bit);
                result
            }
            Some(Fault::FlipBit(bit)) => {
                let result = self.run(&mut op, offset);
                flip(&mut op, bit);
                result
            }
        };
        let done = matches!(result, Ok(moved) if moved == wanted);
        self.note(Trace::Done(kind, file, offset, done));
        op.complete(result);
    }
}

/// Flips one bit, counted modulo those there are.
pub(super) fn flip(bytes: &mut [u8], bit: usize) {
    if !bytes.is_empty() {
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
