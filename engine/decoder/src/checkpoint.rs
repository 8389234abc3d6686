//! Published checkpoints: safetensors shards in, named F32 tensors out.
//!
//! Weights come as F32, BF16, F16, or FP8 e4m3 with one scale per block (`{name}_scale_inv`, usually 128 x 128), the
//! form in which DeepSeek publishes V3.2. All become F32 when taken: four bytes per parameter in memory, whatever
//! the file held. Shards are kept as they were given until the model is complete, so the peak is files plus F32.
//! Tensors that the model never takes, such as the layers of a multi-token-prediction head, are ignored.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use bytes::Bytes;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::{DecoderError, Result};

/// The tensors of all shards given so far.
pub(crate) struct Checkpoint {
    shards: Vec<String>,
    tensors: HashMap<String, Tensor>,
    weight_block: [usize; 2],
}

struct Tensor {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes,
}

impl Checkpoint {
    pub(crate) fn new(weight_block: [usize; 2]) -> Self {
        Self { shards: Vec::new(), tensors: HashMap::new(), weight_block }
    }

    /// Adds the tensors of one file; nothing is copied.
    pub(crate) fn add(&mut self, name: &str, bytes: &Bytes) -> Result<()> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|source| DecoderError::Shard { shard: name.to_owned(), source })?;
        let shard = self.shards.len();
        self.shards.push(name.to_owned());
        for (tensor, view) in file.iter() {
            let bytes = bytes.slice_ref(view.data());
            let value = Tensor { shard, dtype: view.dtype(), shape: view.shape().to_vec(), bytes };
            match self.tensors.entry(tensor.to_owned()) {
                Entry::Vacant(slot) => drop(slot.insert(value)),
                Entry::Occupied(slot) => {
                    return Err(DecoderError::DuplicateTensor {
                        tensor: tensor.to_owned(),
                        first: self.shards[slot.get().shard].clone(),
                        second: name.to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Takes one tensor out, as F32, if it has exactly this shape.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.take_raw(name, shape)?;
        match tensor.dtype {
            Dtype::F8_E4M3 => {
                let [block_rows, block_cols] = self.weight_block;
                let &[rows, cols] = shape else {
                    return Err(dtype_error(name, tensor.dtype));
                };
                let scale_name = format!("{name}_scale_inv");
                let scale_shape = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
                let scales = self.take_raw(&scale_name, &scale_shape)?;
                let scales = floats(&scales).ok_or_else(|| dtype_error(&scale_name, scales.dtype))?;
                Ok(dequantise(&tensor.bytes, cols, &scales, self.weight_block))
            }
            dtype => floats(&tensor).ok_or_else(|| dtype_error(name, dtype)),
        }
    }

    /// Takes one tensor of integers out, I64 or I32, if it has exactly this shape.
    pub(crate) fn take_integers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<i64>> {
        let tensor = self.take_raw(name, shape)?;
        let bytes = &tensor.bytes;
        match tensor.dtype {
            Dtype::I64 => Ok(bytes.as_chunks().0.iter().map(|&x| i64::from_le_bytes(x)).collect()),
            Dtype::I32 => Ok(bytes.as_chunks().0.iter().map(|&x| i32::from_le_bytes(x).into()).collect()),
            dtype => Err(DecoderError::TensorDtype {
                tensor: name.to_owned(),
                got: format!("{dtype:?}"),
                expected: "I64 or I32",
            }),
        }
    }

    fn take_raw(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.remove(name).ok_or_else(|| DecoderError::MissingTensor {
            tensor: name.to_owned(),
            expected: shape.to_vec(),
        })?;
        if tensor.shape != shape {
            return Err(DecoderError::TensorShape {
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                got: tensor.shape,
            });
        }
        Ok(tensor)
    }
}

fn dtype_error(tensor: &str, got: Dtype) -> DecoderError {
    DecoderError::TensorDtype {
        tensor: tensor.to_owned(),
        got: format!("{got:?}"),
        expected: "F32, BF16, F16 or F8_E4M3 with block scales",
    }
}

/// The numbers of a tensor in a plain floating-point format.
fn floats(tensor: &Tensor) -> Option<Vec<f32>> {
    let bytes = &tensor.bytes;
    Some(match tensor.dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect(),
        _ => return None,
    })
}

/// FP8 with one scale per block: `weight[i, j] = e4m3(bytes[i, j]) * scales[i / block_rows, j / block_cols]`.
fn dequantise(bytes: &[u8], cols: usize, scales: &[f32], block: [usize; 2]) -> Vec<f32> {
    let table: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
    let scale_cols = cols.div_ceil(block[1]);
    let mut out = Vec::with_capacity(bytes.len());
    for (row, bytes) in bytes.chunks_exact(cols).enumerate() {
        let scales = &scales[row / block[0] * scale_cols..][..scale_cols];
        for (run, scale) in bytes.chunks(block[1]).zip(scales) {
            out.extend(run.iter().map(|&byte| table[usize::from(byte)] * scale));
        }
    }
    out
}

/// One number of format e4m3 (OCP FP8, "fn": no infinities, NaN at all ones).
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xF), f32::from(byte & 7));
    sign * match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_hand_vectors() {
        let cases = [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x40, 2.0),
            (0x7E, 448.0),
            (0xB8, -1.0),
            (0xFE, -448.0),
        ];
        for (byte, value) in cases {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan());
    }

    #[test]
    fn scales_apply_to_their_block_and_edges_are_short() {
        // 3 x 5 in blocks of 2 x 3: scales are 2 x 2. 0x38 is 1.
        let out = dequantise(&[0x38; 15], 5, &[1.0, 10.0, 100.0, 1000.0], [2, 3]);
        let top = [1.0, 1.0, 1.0, 10.0, 10.0];
        let bottom = [100.0, 100.0, 100.0, 1000.0, 1000.0];
        assert_eq!(out, [top, top, bottom].concat());
    }
}
