//! What can go wrong. A miss is not here: misses are values ([`MissKind`](crate::MissKind)).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use esker_prefix::ObjectId;

/// Result of an operation of this crate.
pub type Result<T> = std::result::Result<T, StoreError>;

/// An operation that was not done.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process, or another `Store` of this one, has the folder open.
    #[error("data folder {} is in use by another process", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// Files of a later format than this build knows.
    #[error("{} has format version {found}, this build knows up to {supported}", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u16,
        /// Highest version that can be read.
        supported: u16,
    },
    /// Settings that cannot work.
    #[error("setting {name} cannot be {value}: {reason}")]
    BadSetting {
        /// Field of `StoreSettings`.
        name: &'static str,
        /// Its value.
        value: u64,
        /// Why not.
        reason: &'static str,
    },
    /// A file or folder could not be made, opened or read.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// RocksDB failed.
    #[error("block index: {0}")]
    Index(#[from] rocksdb::Error),
    /// A plane whose bytes are not as many as its spec says.
    #[error("{id:?}: plane {plane} has {got} bytes, its spec says {expected}")]
    PlaneLength {
        /// The object.
        id: ObjectId,
        /// Position of the plane.
        plane: usize,
        /// Bytes by the spec.
        expected: u64,
        /// Bytes given.
        got: u64,
    },
    /// An object that no record can hold.
    #[error(
        "{id:?}: needs {needed_bytes} bytes and {planes} planes; a record has at most {max_bytes} and {max_planes}"
    )]
    TooLarge {
        /// The object.
        id: ObjectId,
        /// Bytes of its record, uncompressed.
        needed_bytes: u64,
        /// Its planes.
        planes: usize,
        /// Room in a segment.
        max_bytes: u64,
        /// Planes that a record may have.
        max_planes: usize,
    },
    /// The chain has a hole: the parent is not stored.
    #[error("{id:?}: its parent {parent:?} is not stored")]
    MissingParent {
        /// The object.
        id: ObjectId,
        /// Its parent.
        parent: ObjectId,
    },
    /// Other bytes are stored under this id. The first writer wins.
    #[error("{id:?}: other bytes are already stored under this id")]
    ContentMismatch {
        /// The object.
        id: ObjectId,
    },
    /// No room for another segment. Reads go on.
    #[error("store is full: {reason}")]
    Full {
        /// Which limit was met.
        reason: String,
    },
    /// A write or flush failed, and so did every attempt elsewhere.
    #[error("write failed: {source}")]
    WriteFailed {
        /// Why.
        source: Arc<io::Error>,
    },
    /// Writes failed so often that the device is not trusted with more. Reads go on.
    #[error("writes are refused after {failures} failed writes or flushes; reads go on")]
    WritesRefused {
        /// Segments that were given up since the store was opened.
        failures: u64,
    },
    /// A lease would hold more than leases may.
    #[error("a lease of {bytes} bytes more does not fit: {leased_bytes} of {limit_bytes} bytes are leased")]
    LeaseBudget {
        /// Bytes of the records that it would hold and no other does.
        bytes: u64,
        /// Bytes that other leases hold.
        leased_bytes: u64,
        /// Bytes that leases may hold.
        limit_bytes: u64,
    },
    /// A lease names what is not stored.
    #[error("{id:?} is not stored, so it cannot be leased")]
    NotStored {
        /// What is not there.
        id: ObjectId,
    },
    /// A lease names too many prefixes.
    #[error("a lease has at most {limit} ends, {got} were given")]
    LeaseEnds {
        /// Ends given.
        got: usize,
        /// Ends of a lease.
        limit: usize,
    },
    /// An erasure of everything that has no writer, or no scope: these are no one's, and cannot be erased as one.
    #[error(
        "an erasure must name a {what}, this one names none: erase the objects, or their scope, writer or namespace"
    )]
    EraseNobody {
        /// `writer` or `scope`.
        what: &'static str,
    },
    /// An object cannot be encrypted, and is to be stored in no other way.
    #[error("{id:?} cannot be encrypted: {error}")]
    Sealing {
        /// The object.
        id: ObjectId,
        /// What the keeper of the keys says.
        error: crate::SealError,
    },
    /// The store is closing.
    #[error("store is closed")]
    Closed,
}

/// What the caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Mend the request.
    Invalid,
    /// Store the parent first.
    MissingParent,
    /// Nothing: the id is taken by other bytes.
    ContentMismatch,
    /// Wait for room.
    Full,
    /// Mend the device or the installation.
    Unavailable,
}

impl StoreError {
    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::BadSetting { .. }
            | Self::PlaneLength { .. }
            | Self::TooLarge { .. }
            | Self::NotStored { .. }
            | Self::EraseNobody { .. }
            | Self::LeaseEnds { .. } => ErrorKind::Invalid,
            Self::MissingParent { .. } => ErrorKind::MissingParent,
            Self::ContentMismatch { .. } => ErrorKind::ContentMismatch,
            Self::Full { .. } | Self::LeaseBudget { .. } => ErrorKind::Full,
            _ => ErrorKind::Unavailable,
        }
    }

    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source: Arc::new(source) }
    }
}
