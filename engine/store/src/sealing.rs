//! Sealing: planes are encrypted before they reach the disk, by someone who is given to the store and knows the keys.
//!
//! A plane is compressed, then sealed, then written. Its digest is of the raw bytes and stays above the seal: the tag proves that
//! nobody without the key made the stored bytes, the digest that they are what the writer put. What a plane *is* goes in as
//! associated data ([`about`]), so that a sealed plane opens as itself and as nothing else. The checksum of stored bytes is of the
//! sealed ones, so that damage is told from a missing key, and scans, scrub and fsck need no key.
//!
//! The sequence is not among the associated data: it is given when the record is committed, after its planes were sealed on the
//! putter's thread. The salt, new for every record, takes its place: no two records are sealed by the same key material.
//!
//! Only blocks and states are sealed. Left to others: what the keys are, whose, and when they are destroyed.

use std::fmt;

use esker_prefix::{ObjectKind, ScopeTag, WriterId};

use crate::fields::Writer;
use crate::record::{Plane, RecordHeader};

/// Bytes by which a sealed plane is longer.
pub const TAG_BYTES: usize = 16;
/// Bytes of a salt.
pub const SALT_BYTES: usize = 12;
const ABOUT_BYTES: usize = 112;

/// Encrypts and authenticates planes. Calls come from many threads at a time.
pub trait Sealer: Send + Sync + 'static {
    /// How the next record of this scope is to be sealed: by which key, and with a salt that was never given before. `None`: it
    /// is stored as it is.
    fn begin(&self, scope: ScopeTag) -> Result<Option<Seal>, SealError>;

    /// Encrypts a plane in place and returns its tag.
    fn seal(
        &self,
        seal: &Seal,
        plane: u32,
        about: &[u8],
        bytes: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], SealError>;

    /// Proves and decrypts a plane in place, its tag behind it. On an error the bytes are worth nothing.
    fn open(&self, seal: &Seal, plane: u32, about: &[u8], bytes: &mut [u8]) -> Result<(), OpenError>;
}

/// By what a record is sealed. Written into its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Number of the key; never 0.
    pub key: u32,
    /// Differs between any two records of one key.
    pub salt: [u8; SALT_BYTES],
}

/// Why something cannot be sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealError(pub String);

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why something cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// Its key was destroyed, or is not known here.
    NoKey,
    /// It is not what was sealed.
    Forged,
}

/// Whether objects of this kind hold what is to be kept secret.
pub(crate) fn is_secret(kind: ObjectKind) -> bool {
    matches!(kind, ObjectKind::Block | ObjectKind::State)
}

/// The associated data of a plane.
///
/// ```text
///   0   1  kind of the object
///   1   1  codec
///   2   2  group
///   4   2  first layer
///   6   2  layers
///   8   4  position of the plane
///  12   4  stored length in bytes, with the tag
///  16   4  raw length in bytes
///  20   4  number of the writer
///  24   8  tokens
///  32  32  hash of the object
///  64  32  namespace
///  96  16  scope tag
/// ```
pub(crate) fn about(header: &Named<'_>, index: u32, plane: &Plane) -> [u8; ABOUT_BYTES] {
    let mut about = [0; ABOUT_BYTES];
    let mut writer = Writer::new(&mut about);
    writer.u8(header.id.kind as u8).u8(plane.codec as u8);
    writer.u16(plane.group).u16(plane.first_layer).u16(plane.layers).u32(index);
    writer.u32(plane.stored_bytes).u32(plane.raw_bytes).u32(header.writer.0).u64(header.tokens);
    writer.bytes(&header.id.hash.0).bytes(&header.namespace.0).bytes(&header.scope.0);
    about
}

/// What names a record.
pub(crate) struct Named<'a> {
    pub(crate) id: &'a esker_prefix::ObjectId,
    pub(crate) namespace: &'a esker_prefix::NamespaceId,
    pub(crate) scope: &'a ScopeTag,
    pub(crate) writer: WriterId,
    pub(crate) tokens: u64,
}

impl<'a> From<&'a RecordHeader> for Named<'a> {
    fn from(header: &'a RecordHeader) -> Self {
        let RecordHeader { id, namespace, scope, writer, tokens, .. } = header;
        Self { id, namespace, scope, writer: *writer, tokens: *tokens }
    }
}
