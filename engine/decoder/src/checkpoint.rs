//! Published checkpoints: safetensors shards in, named F32 tensors out.
//!
//! Weights come as F32, BF16 or F16, or narrow with a scale per block, the forms in which DeepSeek publishes: FP8 e4m3
//! with blocks usually of 128 x 128 (V3.2 calls the scales `{name}_scale_inv`, F32; V4 `.scale` in place of `.weight`,
//! powers of two), and the experts of V4 as FP4 e2m1, two to a byte, the even column in the low half, with a scale per
//! 32 columns. All become F32 when taken: four bytes per parameter in memory, whatever the file held. Shards are kept as
//! they were given until the model is complete, so the peak is files plus F32. Tensors that the model never takes, such as
//! the layers of a multi-token-prediction head, are ignored.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use bytes::Bytes;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::formats::{from_e2m1, from_e4m3, from_e8m0};
use crate::{DecoderError, Result};

/// Rows and columns of FP4 weights that share a scale.
const FP4_BLOCK: [usize; 2] = [1, 32];

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
            self.insert(tensor.to_owned(), value)?;
        }
        Ok(())
    }

    /// Gives tensors other names: `rename` says what a tensor is to be called.
    pub(crate) fn rename(&mut self, rename: impl Fn(&str) -> String) -> Result<()> {
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            self.insert(rename(&name), tensor)?;
        }
        Ok(())
    }

    /// Cuts a tensor into its rows, each of a shape with one dimension less, named by `name_of` its index; does nothing
    /// if there is none of that name. Nothing is copied.
    pub(crate) fn split(&mut self, name: &str, name_of: impl Fn(usize) -> String) -> Result<()> {
        let Some(tensor) = self.tensors.remove(name) else { return Ok(()) };
        let Some((&count, shape)) = tensor.shape.split_first().filter(|(count, _)| **count > 0) else {
            return Err(dtype_error(name, tensor.dtype));
        };
        let bytes = tensor.bytes.len() / count;
        for index in 0..count {
            let part = tensor.bytes.slice(index * bytes..(index + 1) * bytes);
            let row = Tensor { shard: tensor.shard, dtype: tensor.dtype, shape: shape.to_vec(), bytes: part };
            self.insert(name_of(index), row)?;
        }
        Ok(())
    }

    /// Cuts a tensor into an upper and a lower half, of half the rows each.
    pub(crate) fn halve(&mut self, name: &str, names: [String; 2]) -> Result<()> {
        if let Some(tensor) = self.tensors.get_mut(name) {
            match tensor.shape.first_mut() {
                Some(rows) if *rows % 2 == 0 => *rows /= 2,
                _ => return Err(dtype_error(name, tensor.dtype)),
            }
            tensor.shape.insert(0, 2);
        }
        let [upper, lower] = names;
        self.split(name, |half| if half == 0 { upper.clone() } else { lower.clone() })
    }

    fn insert(&mut self, name: String, tensor: Tensor) -> Result<()> {
        match self.tensors.entry(name) {
            Entry::Vacant(slot) => drop(slot.insert(tensor)),
            Entry::Occupied(slot) => {
                return Err(DecoderError::DuplicateTensor {
                    tensor: slot.key().clone(),
                    first: self.shards[slot.get().shard].clone(),
                    second: self.shards[tensor.shard].clone(),
                });
            }
        }
        Ok(())
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes one tensor out, as F32, if it has exactly this shape; that of FP4 is half as wide where two columns count
    /// as one byte.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = self.take_values(name, shape)?;
        // One such number reaches every logit, and every row that would be stored.
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(DecoderError::NotFinite { tensor: name.to_owned(), at, value: values[at] }),
        }
    }

    fn take_values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let dtype = self.tensors.get(name).map(|tensor| tensor.dtype);
        match (dtype, shape) {
            (Some(Dtype::F8_E4M3), &[_, cols]) => {
                let tensor = self.take_raw(name, shape)?;
                let scales = self.take_scales(name, shape, self.weight_block)?;
                Ok(dequantise(tensor.bytes.iter().copied(), cols, &scales, self.weight_block, from_e4m3))
            }
            (Some(dtype @ (Dtype::I8 | Dtype::U8 | Dtype::F4)), &[rows, cols]) if cols % 2 == 0 => {
                let held = if dtype == Dtype::F4 { cols } else { cols / 2 };
                let tensor = self.take_raw(name, &[rows, held])?;
                let scales = self.take_scales(name, shape, FP4_BLOCK)?;
                let halves = tensor.bytes.iter().flat_map(|&byte| [byte & 0xF, byte >> 4]);
                Ok(dequantise(halves, cols, &scales, FP4_BLOCK, from_e2m1))
            }
            _ => {
                let tensor = self.take_raw(name, shape)?;
                floats(&tensor).ok_or_else(|| dtype_error(name, tensor.dtype))
            }
        }
    }

    /// The scales of a narrow tensor of this shape, one per block.
    fn take_scales(&mut self, name: &str, shape: &[usize], block: [usize; 2]) -> Result<Vec<f32>> {
        let older = format!("{name}_scale_inv");
        let newer = name.strip_suffix(".weight").map(|stem| format!("{stem}.scale"));
        let scale = newer.filter(|newer| self.has(newer)).unwrap_or(older);
        let shape: Vec<usize> = shape.iter().zip(block).map(|(&size, block)| size.div_ceil(block)).collect();
        let scales = self.take_raw(&scale, &shape)?;
        match scales.dtype {
            // Files written without a name for powers of two call them bytes.
            Dtype::F8_E8M0 | Dtype::U8 => Ok(scales.bytes.iter().map(|&byte| from_e8m0(byte)).collect()),
            dtype => floats(&scales).ok_or_else(|| dtype_error(&scale, dtype)),
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
        expected: "F32, BF16, F16, or FP8 or FP4 with block scales",
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

/// Numbers with one scale per block: `weight[i, j] = number(codes[i, j]) * scales[i / block_rows, j / block_cols]`.
fn dequantise(
    codes: impl Iterator<Item = u8>,
    cols: usize,
    scales: &[f32],
    block: [usize; 2],
    number: impl Fn(u8) -> f32,
) -> Vec<f32> {
    let table: Vec<f32> = (0..=u8::MAX).map(number).collect();
    let scale_cols = cols.div_ceil(block[1]);
    let mut out: Vec<f32> = codes.map(|code| table[usize::from(code)]).collect();
    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
        let scales = &scales[row / block[0] * scale_cols..][..scale_cols];
        for (run, scale) in out.chunks_mut(block[1]).zip(scales) {
            run.iter_mut().for_each(|out| *out *= scale);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_apply_to_their_block_and_edges_are_short() {
        // 3 x 5 in blocks of 2 x 3: scales are 2 x 2. 0x38 is 1.
        let out = dequantise([0x38; 15].into_iter(), 5, &[1.0, 10.0, 100.0, 1000.0], [2, 3], from_e4m3);
        let top = [1.0, 1.0, 1.0, 10.0, 10.0];
        let bottom = [100.0, 100.0, 100.0, 1000.0, 1000.0];
        assert_eq!(out, [top, top, bottom].concat());
    }
}
