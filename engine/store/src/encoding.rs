//! From an object to the bytes of its record: on the putter's thread, so that writers compress in parallel.

use std::cell::RefCell;

use crate::fields::narrow;
use crate::io::{AlignedBuf, BufferPool};
use crate::record::{self, Codec, ContentDigest, MAX_PLANES, Plane, RecordHeader};
use crate::sealing::{self, Named, Seal, Sealer, TAG_BYTES};
use crate::segment::RECORDS_AT;
use crate::{PutObject, PutPlane, Result, StoreError, StoreSettings, codec};

use std::sync::Arc;

/// Compressed planes larger than this share of the raw ones, in percent, are stored raw.
const WORTH_COMPRESSING_PERCENT: usize = 97;

/// An object whose planes have been hashed.
pub(crate) struct Hashed {
    object: PutObject,
    digests: Vec<[u8; 32]>,
    seal: Option<Seal>,
}

/// A record that lacks only its place.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) header: RecordHeader,
    pub(crate) digest: ContentDigest,
    /// Planes in place; room for the header.
    pub(crate) record: AlignedBuf,
}

impl Hashed {
    /// Checks an object against its specs and against what a segment holds, and hashes its planes.
    pub(crate) fn new(object: PutObject, settings: &StoreSettings, seal: Option<Seal>) -> Result<Self> {
        check(&object, settings.segment_bytes_of(object.class), seal.is_some())?;
        let digests = digests(&object);
        Ok(Self { object, digests, seal })
    }

    pub(crate) fn digest(&self) -> ContentDigest {
        record::content_digest(self.digests.iter())
    }

    /// Bytes of the record if nothing is compressed.
    pub(crate) fn max_record_bytes(&self) -> usize {
        max_record_bytes(&self.object, self.seal.is_some())
    }

    /// Lays the record out, and seals it if it is to be sealed.
    pub(crate) fn encode(
        self,
        pool: &Arc<BufferPool>,
        settings: &StoreSettings,
        sealer: Option<&dyn Sealer>,
    ) -> Result<Encoded> {
        let seal = self.seal;
        let sealing = seal.zip(sealer);
        let tag_bytes = if sealing.is_some() { TAG_BYTES } else { 0 };
        let mut record = pool.take(self.max_record_bytes());
        let mut end = record::header_bytes(self.digests.len());
        let mut planes = Vec::with_capacity(self.digests.len());
        let named = Named {
            id: &self.object.id,
            namespace: &self.object.namespace,
            scope: &self.object.scope,
            writer: self.object.writer,
            tokens: self.object.tokens,
        };
        SCRATCH.with_borrow_mut(|scratch| -> Result<()> {
            for (plane, &digest) in self.object.planes.iter().zip(&self.digests) {
                let raw = &plane.bytes[..];
                let offset = record::plane_offset(end);
                record[end..offset].fill(0);
                // What is before takes no more than it would uncompressed: there is room for all of it.
                let room = &mut record[offset..offset + raw.len()];
                let level = settings.zstd_level.filter(|_| raw.len() >= settings.compressed_from_bytes);
                let compressed = level.and_then(|level| scratch.compress(plane, level, room));
                let (codec, stored_bytes) = compressed.unwrap_or_else(|| {
                    room.copy_from_slice(raw);
                    (Codec::Raw, raw.len())
                });
                end = offset + stored_bytes + tag_bytes;
                let mut laid = Plane {
                    group: plane.spec.group,
                    first_layer: plane.spec.first_layer,
                    layers: plane.spec.layers,
                    codec,
                    offset: narrow(offset),
                    stored_bytes: narrow(end - offset),
                    raw_bytes: narrow(raw.len()),
                    stored_checksum: 0,
                    digest,
                };
                if let Some((seal, sealer)) = &sealing {
                    let (index, failed) =
                        (narrow(planes.len()), |error| StoreError::Sealing { id: self.object.id, error });
                    let about = sealing::about(&named, index, &laid);
                    let content = &mut record[offset..end - tag_bytes];
                    let tag = sealer.seal(seal, index, &about, content).map_err(failed)?;
                    record[end - tag_bytes..end].copy_from_slice(&tag);
                }
                if codec != Codec::Raw || sealing.is_some() {
                    laid.stored_checksum = xxhash_rust::xxh3::xxh3_64(&record[offset..end]);
                }
                planes.push(laid);
            }
            Ok(())
        })?;
        record.truncate(end);
        record[end..].fill(0);
        let PutObject { id, parent, namespace, scope, writer, class, tokens, .. } = self.object;
        let header = RecordHeader { id, parent, namespace, scope, writer, class, tokens, seal, planes };
        Ok(Encoded { digest: header.content_digest(), header, record })
    }
}

/// The digest of an object's content, whether it could be stored or not.
pub(crate) fn content_digest(object: &PutObject) -> ContentDigest {
    record::content_digest(digests(object).iter())
}

/// Of each plane.
fn digests(object: &PutObject) -> Vec<[u8; 32]> {
    object.planes.iter().map(|plane| *blake3::hash(&plane.bytes).as_bytes()).collect()
}

fn check(object: &PutObject, segment_bytes: u64, sealed: bool) -> Result<()> {
    for (plane, put) in object.planes.iter().enumerate() {
        let (expected, got) = (put.spec.len_bytes, put.bytes.len() as u64);
        if expected != got {
            return Err(StoreError::PlaneLength { id: object.id, plane, expected, got });
        }
    }
    let (needed_bytes, max_bytes) = (max_record_bytes(object, sealed) as u64, max_record_in(segment_bytes));
    if object.planes.len() > MAX_PLANES || needed_bytes > max_bytes {
        return Err(StoreError::TooLarge {
            id: object.id,
            needed_bytes,
            planes: object.planes.len(),
            max_bytes,
            max_planes: MAX_PLANES,
        });
    }
    Ok(())
}

/// Room for records in a segment: all but its header and seal pages.
pub(crate) fn max_record_in(segment_bytes: u64) -> u64 {
    segment_bytes - 2 * RECORDS_AT
}

fn max_record_bytes(object: &PutObject, sealed: bool) -> usize {
    let tag_bytes = if sealed { TAG_BYTES } else { 0 };
    let end = object.planes.iter().fold(record::header_bytes(object.planes.len()), |end, plane| {
        record::plane_offset(end) + plane.bytes.len() + tag_bytes
    });
    crate::io::page_ceil(end)
}

/// A compressor, kept per thread: making one costs more than compressing a small plane.
#[derive(Default)]
struct Scratch {
    compressor: Option<(i32, zstd::bulk::Compressor<'static>)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Compresses into `out`, as long as the plane, by columns where the shape is known. Gives the length; `None` if it is not
    /// worth it, and `out` holds anything then.
    fn compress(&mut self, plane: &PutPlane, level: i32, out: &mut [u8]) -> Option<(Codec, usize)> {
        let raw = &plane.bytes[..];
        let (codec, stored) = match &plane.shape {
            Some(shape) => (Codec::Columns, codec::encode(shape, raw, out)?),
            None => (Codec::Zstd, self.zstd(raw, level, out)?),
        };
        let worth = stored > 0 && stored * 100 <= raw.len() * WORTH_COMPRESSING_PERCENT;
        worth.then_some((codec, stored))
    }

    fn zstd(&mut self, raw: &[u8], level: i32, out: &mut [u8]) -> Option<usize> {
        if self.compressor.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            self.compressor = zstd::bulk::Compressor::new(level).ok().map(|compressor| (level, compressor));
        }
        let (_, compressor) = self.compressor.as_mut()?;
        // If the output does not fit, it did not shrink.
        compressor.compress_to_buffer(raw, out).ok()
    }
}
