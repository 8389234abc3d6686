//! The system calls that `std` does not offer.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Bytes that are free, to anybody, on the file system of `file`: `fstatvfs(3)`.
pub(super) fn free_bytes(file: &File) -> io::Result<u64> {
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the descriptor is open and the pointer is to memory of the right size, which the call fills.
    match unsafe { libc::fstatvfs(file.as_raw_fd(), stats.as_mut_ptr()) } {
        0 => {
            // SAFETY: the call succeeded, so it filled the whole structure.
            let stats = unsafe { stats.assume_init() };
            Ok(stats.f_bavail.saturating_mul(stats.f_frsize))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// `fallocate(2)` of `[0, len)`: reserves blocks and sets the length.
pub(super) fn fallocate(file: &File, len: libc::off_t) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `fallocate(2)` with a hole: gives back blocks and leaves the length alone.
pub(super) fn punch(file: &File, offset: libc::off_t, len: libc::off_t) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Err(io::ErrorKind::Unsupported.into()),
            error => Err(error),
        },
    }
}

/// What [`seek`] looks for.
pub(super) enum Seek {
    Data,
    Hole,
}

/// `lseek(2)` to the first byte at or behind `offset` that is in no hole, or in one; the end of the file is in one. `None` if
/// there is none.
pub(super) fn seek(file: &File, offset: libc::off_t, what: Seek) -> io::Result<Option<libc::off_t>> {
    let whence = match what {
        Seek::Data => libc::SEEK_DATA,
        Seek::Hole => libc::SEEK_HOLE,
    };
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed. Nobody uses its position.
    match unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } {
        -1 => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
        found => Ok(Some(found)),
    }
}
