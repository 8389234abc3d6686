//! Planes put together from their chunks, with memory bounded by the layout.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use esker_prefix::{KvLayout, ObjectKind, PlaneSpec};

use crate::limits::MAX_CHUNK_BYTES;
use crate::{WireError, v1};

/// Collects the chunks of one plane at a time, and hands the plane out when it is whole.
///
/// Allocates only what the layout says a plane has, and that only as bytes arrive.
pub struct PlaneReader<'l> {
    layout: &'l KvLayout,
    /// Planes of the object seen last.
    planes: Option<(ObjectKind, u64, Cow<'l, [PlaneSpec]>)>,
    current: Option<(WholePlane, BytesMut)>,
}

/// A plane all of whose chunks have arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholePlane {
    /// Block or state.
    pub kind: ObjectKind,
    /// Prefix length that its object completes.
    pub tokens: u64,
    /// Position in the layout's restore order.
    pub plane: usize,
    /// Its bytes; none for a plane that its object lacks.
    pub bytes: Bytes,
}

/// Collects the planes of one object at a time, in restore order, and hands the object out when its last plane is whole.
pub struct PlaneAssembler<'l> {
    reader: PlaneReader<'l>,
    current: Option<Assembled>,
}

/// An object all of whose planes have arrived.
#[derive(Debug, PartialEq, Eq)]
pub struct Assembled {
    /// Block or state.
    pub kind: ObjectKind,
    /// Prefix length that it completes.
    pub tokens: u64,
    /// Its planes, in restore order.
    pub planes: Vec<Bytes>,
}

impl<'l> PlaneReader<'l> {
    /// For planes of `layout`.
    pub fn new(layout: &'l KvLayout) -> Self {
        Self { layout, planes: None, current: None }
    }

    /// Takes the next chunk; gives the plane that it completes, if it does.
    pub fn push(&mut self, chunk: v1::PlaneChunk) -> Result<Option<WholePlane>, WireError> {
        let kind = object_kind(chunk.kind())?;
        if chunk.data.len() > MAX_CHUNK_BYTES {
            let (limit, got) = (MAX_CHUNK_BYTES, chunk.data.len());
            return Err(WireError::TooLarge { field: "chunk.data", unit: "bytes", limit, got });
        }
        let tokens = chunk.tokens;
        let index = chunk.plane as usize;
        let known = self.planes.take_if(|(of, at, _)| (*of, *at) == (kind, tokens));
        let known = known.unwrap_or_else(|| (kind, tokens, self.layout.planes_at(kind, tokens)));
        let (_, _, specs) = &*self.planes.insert(known);
        let Some(spec) = specs.get(index) else {
            let (id, planes) = (self.layout.id(), specs.len());
            return Err(WireError::Sequence(match planes {
                0 => format!("layout {id} has no {kind:?} planes"),
                _ => format!("layout {id} has {planes} {kind:?} planes, counted from 0; got plane {index}"),
            }));
        };
        let begun = WholePlane { kind, tokens, plane: index, bytes: Bytes::new() };
        let (plane, growing) = self.current.get_or_insert_with(|| (begun, BytesMut::new()));
        if (plane.kind, plane.tokens, plane.plane) != (kind, tokens, index)
            || chunk.offset != growing.len() as u64
        {
            return Err(WireError::Sequence(format!(
                "expected plane {} of {:?} at {} tokens at offset {}, got plane {index} of {kind:?} at {tokens} tokens \
                 at offset {}",
                plane.plane,
                plane.kind,
                plane.tokens,
                growing.len(),
                chunk.offset
            )));
        }
        let group = &self.layout.groups()[usize::from(spec.group)];
        let len_bytes = if group.optional && chunk.plane_bytes == 0 { 0 } else { spec.len_bytes };
        let arrived = growing.len() as u64 + chunk.data.len() as u64;
        if chunk.plane_bytes != len_bytes || arrived > len_bytes {
            return Err(WireError::Sequence(format!(
                "plane {index} of layout {} has {} bytes; the request says {} and has sent {arrived}",
                self.layout.id(),
                spec.len_bytes,
                chunk.plane_bytes,
            )));
        }
        if arrived < len_bytes {
            if chunk.data.is_empty() {
                return Err(WireError::Empty("chunk.data"));
            }
            growing.extend_from_slice(&chunk.data);
            return Ok(None);
        }
        // The common case, a plane in one chunk, keeps the buffer it came in.
        let bytes = if growing.is_empty() {
            chunk.data
        } else {
            growing.extend_from_slice(&chunk.data);
            growing.split().freeze()
        };
        Ok(self.current.take().map(|(plane, _)| WholePlane { bytes, ..plane }))
    }

    /// Ends the stream; an error if a plane is incomplete.
    pub fn finish(self) -> Result<(), WireError> {
        match self.current {
            None => Ok(()),
            Some((WholePlane { kind, tokens, plane, .. }, _)) => Err(WireError::Sequence(format!(
                "stream ended inside plane {plane} of {kind:?} at {tokens} tokens"
            ))),
        }
    }
}

impl<'l> PlaneAssembler<'l> {
    /// For objects of `layout`.
    pub fn new(layout: &'l KvLayout) -> Self {
        Self { reader: PlaneReader::new(layout), current: None }
    }

    /// Takes the next chunk; gives the object that it completes, if it does.
    pub fn push(&mut self, chunk: v1::PlaneChunk) -> Result<Option<Assembled>, WireError> {
        let kind = object_kind(chunk.kind())?;
        let next = self.current.as_ref().map_or(0, |object| object.planes.len());
        if let Some(object) = self.current.as_ref().filter(|o| (o.kind, o.tokens) != (kind, chunk.tokens)) {
            return Err(WireError::Sequence(format!(
                "chunk of {kind:?} at {} tokens while {:?} at {} tokens is incomplete ({next} of {} planes)",
                chunk.tokens,
                object.kind,
                object.tokens,
                self.reader.layout.planes_count(object.kind, object.tokens),
            )));
        }
        let planes = self.reader.layout.planes_count(kind, chunk.tokens);
        if chunk.plane as usize != next && planes > 0 {
            return Err(WireError::Sequence(format!(
                "expected plane {next} of {kind:?} at {} tokens, got plane {}",
                chunk.tokens, chunk.plane
            )));
        }
        let Some(WholePlane { kind, tokens, bytes, .. }) = self.reader.push(chunk)? else { return Ok(None) };
        let object = self.current.get_or_insert_with(|| Assembled {
            kind,
            tokens,
            planes: Vec::with_capacity(planes),
        });
        object.planes.push(bytes);
        if object.planes.len() < planes {
            return Ok(None);
        }
        Ok(self.current.take())
    }

    /// Ends the stream; an error if an object is incomplete.
    pub fn finish(self) -> Result<(), WireError> {
        if let Some(object) = &self.current {
            return Err(WireError::Sequence(format!(
                "stream ended inside {:?} at {} tokens ({} of {} planes)",
                object.kind,
                object.tokens,
                object.planes.len(),
                self.reader.layout.planes_count(object.kind, object.tokens),
            )));
        }
        self.reader.finish()
    }
}

impl From<ObjectKind> for v1::ObjectKind {
    fn from(kind: ObjectKind) -> Self {
        match kind {
            ObjectKind::Block => Self::Block,
            ObjectKind::State => Self::State,
            ObjectKind::Layout | ObjectKind::Lease | ObjectKind::Erasure => Self::Unspecified,
        }
    }
}

/// The kind of an object that a message names.
pub fn object_kind(kind: v1::ObjectKind) -> Result<ObjectKind, WireError> {
    match kind {
        v1::ObjectKind::Block => Ok(ObjectKind::Block),
        v1::ObjectKind::State => Ok(ObjectKind::State),
        v1::ObjectKind::Unspecified => Err(WireError::Missing("kind")),
    }
}

/// The chunks of one plane, none above [`MAX_CHUNK_BYTES`], without copying.
pub fn chunks(
    kind: ObjectKind,
    tokens: u64,
    plane: u32,
    bytes: Bytes,
) -> impl Iterator<Item = v1::PlaneChunk> {
    (0..bytes.len().max(1)).step_by(MAX_CHUNK_BYTES).map(move |offset| v1::PlaneChunk {
        kind: v1::ObjectKind::from(kind).into(),
        tokens,
        plane,
        plane_bytes: bytes.len() as u64,
        offset: offset as u64,
        data: bytes.slice(offset..(offset + MAX_CHUNK_BYTES).min(bytes.len())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use esker_prefix::RowFormat;
    use proptest::prelude::*;

    fn layout() -> KvLayout {
        let config = r#"{"model_type":"deepseek_v32","num_hidden_layers":61,"kv_lora_rank":512,
            "qk_rope_head_dim":64,"index_head_dim":128}"#;
        KvLayout::from_config(config, RowFormat::Bf16, 512).unwrap()
    }

    fn object(layout: &KvLayout) -> Vec<Bytes> {
        let planes = layout.planes(ObjectKind::Block).iter().enumerate();
        planes
            .map(|(i, spec)| {
                Bytes::from(vec![u8::try_from(i % 251).unwrap(); usize::try_from(spec.len_bytes).unwrap()])
            })
            .collect()
    }

    #[test]
    fn an_object_survives_the_wire() {
        let layout = layout();
        let planes = object(&layout);
        let mut assembler = PlaneAssembler::new(&layout);
        let mut whole = None;
        for (index, plane) in planes.iter().enumerate() {
            for chunk in chunks(ObjectKind::Block, 512, u32::try_from(index).unwrap(), plane.clone()) {
                assert!(whole.is_none());
                whole = assembler.push(chunk).unwrap();
            }
        }
        assert_eq!(whole, Some(Assembled { kind: ObjectKind::Block, tokens: 512, planes }));
        assembler.finish().unwrap();
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let layout = layout();
        let first = object(&layout).swap_remove(0);
        let good = chunks(ObjectKind::Block, 512, 0, first).next().unwrap();
        let error = |change: &dyn Fn(&mut v1::PlaneChunk)| {
            let mut chunk = good.clone();
            change(&mut chunk);
            PlaneAssembler::new(&layout).push(chunk).unwrap_err().to_string()
        };
        assert!(error(&|c| c.plane_bytes += 1).contains("the request says"));
        assert!(error(&|c| c.plane = 1).contains("expected plane 0"));
        assert!(error(&|c| c.offset = 4).contains("at offset 4"));
        assert!(error(&|c| c.kind = 0).contains("kind"));
        assert!(error(&|c| c.kind = v1::ObjectKind::State.into()).contains("no State planes"));
        assert!(error(&|c| c.data = Bytes::from(vec![0; MAX_CHUNK_BYTES + 1])).contains("limited"));
        let mut assembler = PlaneAssembler::new(&layout);
        assembler.push(good).unwrap();
        assert!(assembler.finish().unwrap_err().to_string().contains("ended inside"));
    }

    proptest! {
        #[test]
        fn hostile_chunks_never_panic_or_grow(
            plane in any::<u32>(), plane_bytes in any::<u64>(), offset in any::<u64>(), kind in -1..4_i32, len in 0..64_usize,
        ) {
            let layout = layout();
            let chunk = v1::PlaneChunk { kind, tokens: 1, plane, plane_bytes, offset, data: Bytes::from(vec![0; len]) };
            prop_assert!(!matches!(PlaneAssembler::new(&layout).push(chunk), Ok(Some(_))));
        }
    }
}
