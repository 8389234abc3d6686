//! The folder behind a real disk: making, opening, listing and removing files.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::sys::Seek;
use super::{FileId, PAGE};

/// Open files of one folder.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    direct: bool,
    open: RwLock<HashMap<FileId, (String, Arc<File>)>>,
    next: AtomicU32,
}

impl Files {
    pub(super) fn new(dir: &Path, direct: bool) -> Self {
        Self { dir: dir.to_owned(), direct, open: RwLock::default(), next: AtomicU32::new(0) }
    }

    pub(super) fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId> {
        let path = self.dir.join(name);
        let file = self.options().create_new(true).open(&path)?;
        let made = reserve(&file, len_bytes)
            .and_then(|()| leave_headroom(&file, len_bytes))
            .and_then(|()| file.sync_all())
            .and_then(|()| self.sync_dir());
        if let Err(error) = made {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(self.add(name, file))
    }

    pub(super) fn open(&self, name: &str) -> io::Result<(FileId, u64)> {
        let file = self.options().open(self.dir.join(name))?;
        let len_bytes = file.metadata()?.len();
        Ok((self.add(name, file), len_bytes))
    }

    pub(super) fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            // A name that is not UTF-8 is none of ours.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        self.open.write().unwrap_or_else(PoisonError::into_inner).retain(|_, (open, _)| open != name);
        fs::remove_file(self.dir.join(name))?;
        self.sync_dir()
    }

    pub(super) fn punch(&self, id: FileId, offset: u64, len_bytes: u64) -> io::Result<()> {
        let part = |bytes| libc::off_t::try_from(bytes).map_err(io::Error::other);
        super::sys::punch(&*self.get(id)?, part(offset)?, part(len_bytes)?)
    }

    pub(super) fn allocated_bytes(&self, id: FileId) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        // Blocks of stat(2) have 512 bytes whatever the file system's have.
        Ok(self.get(id)?.metadata()?.blocks() * 512)
    }

    pub(super) fn next_data(&self, id: FileId, offset: u64) -> u64 {
        let found = || -> io::Result<u64> {
            let from = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            let found = super::sys::seek(&*self.get(id)?, from, Seek::Data)?;
            // Blocks of the file system may be smaller than pages.
            let page = |at: libc::off_t| u64::try_from(at).unwrap_or(offset) / PAGE as u64 * PAGE as u64;
            Ok(found.map_or(u64::MAX, page))
        };
        // Who cannot tell has to read.
        found().unwrap_or(offset).max(offset)
    }

    pub(super) fn next_hole(&self, id: FileId, offset: u64) -> u64 {
        let found = || -> io::Result<Option<libc::off_t>> {
            let file = self.get(id)?;
            let from = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            let hole = super::sys::seek(&file, from, Seek::Hole)?;
            // The end of a file counts as one.
            Ok(hole.filter(|&at| {
                u64::try_from(at).is_ok_and(|at| file.metadata().is_ok_and(|is| at < is.len()))
            }))
        };
        found().ok().flatten().and_then(|at| u64::try_from(at).ok()).unwrap_or(u64::MAX)
    }

    pub(super) fn read_now(&self, id: FileId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let file = self.get(id)?;
        moved(buf.len(), |done| file.read_at(&mut buf[done..], offset + done as u64))
    }

    pub(super) fn get(&self, id: FileId) -> io::Result<Arc<File>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&id).map(|(_, file)| Arc::clone(file)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn add(&self, name: &str, file: File) -> FileId {
        let id = FileId(self.next.fetch_add(1, Ordering::Relaxed));
        self.open
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, (name.to_owned(), Arc::new(file)));
        id
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if self.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        options
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

/// Repeats a transfer of `len` bytes until all are moved, or no more can be.
pub(super) fn moved(len: usize, mut transfer: impl FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
    let mut done = 0;
    while done < len {
        match transfer(done) {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // What is left after an odd count cannot be moved with O_DIRECT; at the end of a file nothing is left.
        if !done.is_multiple_of(PAGE) {
            break;
        }
    }
    Ok(done)
}

/// Free space that every file leaves behind it, for the index on the same file system: a share of its length, and at
/// least this many bytes. Without it the index would meet the full disk first, and it cannot refuse one write and go
/// on with the next.
const MIN_HEADROOM_BYTES: u64 = 8 << 20;

/// Bytes that stay free behind a new file of this length.
pub(crate) fn headroom_bytes(len_bytes: u64) -> u64 {
    MIN_HEADROOM_BYTES.max(len_bytes / 8)
}

fn leave_headroom(file: &File, len_bytes: u64) -> io::Result<()> {
    let (free, wanted) = (super::sys::free_bytes(file)?, headroom_bytes(len_bytes));
    if free < wanted {
        let what = format!("{free} bytes would be free, {wanted} are kept for the index");
        return Err(io::Error::new(io::ErrorKind::StorageFull, what));
    }
    Ok(())
}

/// Reserves the blocks of the whole file, so that a write into it never runs out of space.
fn reserve(file: &File, len_bytes: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len_bytes).map_err(io::Error::other)?;
    loop {
        match super::sys::fallocate(file, len) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A file system without preallocation: the length alone, and a full disk shows on the write.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return file.set_len(len_bytes),
            other => return other,
        }
    }
}
