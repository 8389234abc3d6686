//! Disk of `pread` and `pwrite` on a few threads: for machines on which io_uring is not allowed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::files::Files;
use super::{Disk, FileId, IoEngine, Op, OpKind};

/// Ops that may wait for a thread before `submit` blocks.
const QUEUE_OPS: usize = 256;
/// Threads, each with one op in flight.
const THREADS: usize = 8;

/// See the module.
pub(super) struct PositionalDisk {
    files: Arc<Files>,
    direct: bool,
    queue: Option<SyncSender<Op>>,
    threads: Vec<JoinHandle<()>>,
}

impl PositionalDisk {
    pub(super) fn open(dir: &Path, direct: bool) -> io::Result<Self> {
        let files = Arc::new(Files::new(dir, direct));
        let (queue, ops) = sync_channel(QUEUE_OPS);
        let ops = Arc::new(Mutex::new(ops));
        let mut threads = Vec::with_capacity(THREADS);
        for number in 0..THREADS {
            let (files, ops) = (Arc::clone(&files), Arc::clone(&ops));
            let thread = std::thread::Builder::new().name(format!("esker-io-{number}"));
            threads.push(thread.spawn(move || serve(&files, &ops))?);
        }
        Ok(Self { files, direct, queue: Some(queue), threads })
    }
}

impl Disk for PositionalDisk {
    fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId> {
        self.files.create(name, len_bytes)
    }

    fn open(&self, name: &str) -> io::Result<(FileId, u64)> {
        self.files.open(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.files.list()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files.remove(name)
    }

    fn punch(&self, file: FileId, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.files.punch(file, offset, len_bytes)
    }

    fn allocated_bytes(&self, file: FileId) -> io::Result<u64> {
        self.files.allocated_bytes(file)
    }

    fn next_data(&self, file: FileId, offset: u64) -> u64 {
        self.files.next_data(file, offset)
    }

    fn next_hole(&self, file: FileId, offset: u64) -> u64 {
        self.files.next_hole(file, offset)
    }

    fn read_now(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Option<io::Result<usize>> {
        Some(self.files.read_now(file, offset, buf))
    }

    fn submit(&self, op: Op) {
        let queue = self.queue.as_ref().expect("present until drop");
        if let Err(refused) = queue.send(op) {
            refused.0.complete(Err(io::Error::other("the disk's threads have ended")));
        }
    }

    fn engine(&self) -> IoEngine {
        if self.direct { IoEngine::PositionalDirect } else { IoEngine::PositionalBuffered }
    }
}

impl Drop for PositionalDisk {
    fn drop(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(files: &Files, ops: &Mutex<Receiver<Op>>) {
    loop {
        let next = ops.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut op) = next else { return };
        let result = files.get(op.file).and_then(|file| run(&file, &mut op));
        op.complete(result);
    }
}

fn run(file: &File, op: &mut Op) -> io::Result<usize> {
    let (kind, offset) = (op.kind, op.offset);
    let Some(buf) = op.buf.as_deref_mut() else {
        return file.sync_data().map(|()| 0);
    };
    super::files::moved(buf.len(), |done| match kind {
        OpKind::Read => file.read_at(&mut buf[done..], offset + done as u64),
        _ => file.write_at(&buf[done..], offset + done as u64),
    })
}
