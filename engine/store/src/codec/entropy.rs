//! zstd, set up in two ways: level 1, and its Huffman coder alone. Contexts are made once per thread.

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, ParamSwitch};

use super::Damaged;

/// Level of the zstd mode. Higher levels find nothing more in activations.
const LEVEL: i32 = 1;
/// The lowest level there is: match search strides so far that it costs nothing.
const NO_SEARCH_LEVEL: i32 = -(1 << 17);

/// Contexts, each made when first needed.
#[derive(Default)]
pub(super) struct Entropy {
    compressor: Option<Compressor<'static>>,
    huffman: Option<Compressor<'static>>,
    decompressor: Option<Decompressor<'static>>,
}

impl Entropy {
    /// Compresses with zstd. `None` if the result does not fit into `out`.
    pub(super) fn compress(&mut self, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
        made(&mut self.compressor, || compressor(LEVEL))?.compress_to_buffer(bytes, out).ok()
    }

    /// Codes each byte by its frequency; no matches are looked for. `None` if the result does not fit into `out`.
    pub(super) fn huffman(&mut self, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
        let huffman = made(&mut self.huffman, || {
            let mut huffman = compressor(NO_SEARCH_LEVEL)?;
            // Negative levels store literals as they are unless told otherwise.
            let literals = CParameter::LiteralCompressionMode(ParamSwitch::Enable);
            huffman.set_parameter(literals).ok().map(|()| huffman)
        })?;
        huffman.compress_to_buffer(bytes, out).ok()
    }

    /// Decompresses what either made into exactly `out`.
    pub(super) fn decompress(&mut self, stored: &[u8], out: &mut [u8]) -> Result<(), Damaged> {
        let decompressor = made(&mut self.decompressor, || Decompressor::new().ok());
        match decompressor.ok_or(Damaged("no memory to decompress"))?.decompress_to_buffer(stored, out) {
            Ok(written) if written == out.len() => Ok(()),
            Ok(_) => Err(Damaged("zstd frame is too short")),
            Err(_) => Err(Damaged("zstd frame")),
        }
    }
}

fn made<T>(slot: &mut Option<T>, make: impl FnOnce() -> Option<T>) -> Option<&mut T> {
    if slot.is_none() {
        *slot = make();
    }
    slot.as_mut()
}

fn compressor(level: i32) -> Option<Compressor<'static>> {
    let mut compressor = Compressor::new(level).ok()?;
    compressor.set_parameter(CParameter::ContentSizeFlag(false)).ok()?;
    compressor.set_parameter(CParameter::ChecksumFlag(false)).ok()?;
    Some(compressor)
}
