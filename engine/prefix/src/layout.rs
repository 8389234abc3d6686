//! KV layouts: a data-driven table of what a model keeps per block of tokens and per state boundary.
//!
//! No model is known to the code that stores or moves bytes. A layout lists *groups*; a group is a set of layers
//! that share row format, rate and retention. The object of one block (or state) is cut into *planes*, one per
//! group and run of layers; inside a plane the order is layer, then row, then the fields of the row, packed.
//! Published models are tables too: see `published.rs`.

mod published;

use serde::{Deserialize, Serialize};

use crate::chain::{digest_type, len_u32};
use crate::object::ObjectKind;
use crate::{PrefixError, Result};
pub use published::RowFormat;

use std::borrow::Cow;
use std::fmt;

const LAYOUT_CONTEXT: &str = "esker 2026-11 kv layout v1";
/// Of a table with an optional or a coarse group, whose groups are digested with these fields as well.
const WIDE_LAYOUT_CONTEXT: &str = "esker 2026-11 kv layout v1 with optional and grain";
/// Of a table with a group of open runs, whose groups are digested with that field too.
const RUN_LAYOUT_CONTEXT: &str = "esker 2026-11 kv layout v1 with optional, grain and runs";

/// A plane below this many bytes costs more to find than to read; layers are joined until it is reached.
const PLANE_TARGET_BYTES: u64 = 64 * 1024;
/// Blocks that are small as a whole come in about this many planes, so that the first layers can be computed with while the
/// others come, but in none below a page.
const SMALL_BLOCK_PLANES: u64 = 6;
const SMALL_PLANE_BYTES: u64 = 4096;
/// Bound on the table itself, so that a hostile layout cannot ask for unbounded work.
const MAX_GROUPS: usize = 64;
const MAX_LAYERS: usize = 4096;
const MAX_FIELDS: usize = 64;
/// Bound on one object, 1 GiB: far above any published model, far below what would exhaust a host.
const MAX_OBJECT_BYTES: u64 = 1 << 30;

digest_type! {
    /// Digest of a [`KvLayout`]: two layouts with one id describe the same bytes.
    LayoutId
}

/// Number format of a field. Tells sizes, and what a codec may exploit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Dtype {
    /// Opaque bytes, padding included.
    U8 = 0,
    /// IEEE 754 single.
    F32 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// FP8 e4m3.
    F8E4m3 = 3,
    /// Power-of-two scale (ue8m0).
    F8E8m0 = 4,
    /// FP4 e2m1, two to a byte.
    F4E2m1 = 5,
}

impl Dtype {
    fn bits(self) -> u64 {
        match self {
            Self::F32 => 32,
            Self::Bf16 => 16,
            Self::U8 | Self::F8E4m3 | Self::F8E8m0 => 8,
            Self::F4E2m1 => 4,
        }
    }
}

/// Part of a row: `count` numbers of one format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// What the numbers are, such as `latent`, `rope_key`, `scales`.
    pub name: String,
    /// Their format.
    pub dtype: Dtype,
    /// How many.
    pub count: u32,
}

/// Whether a group needs every row of a prefix or only something at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Family {
    /// Every row of `[0, n)` is needed to resume at `n`: latents, compressed rows, indexer keys.
    History = 0,
    /// Only something at `n` is needed: sliding windows, compressor overlap.
    State = 1,
}

/// Layers that share row format, rate and retention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Name, unique in the layout.
    pub name: String,
    /// History or state.
    pub family: Family,
    /// Model layers, ascending.
    pub layers: Vec<u16>,
    /// Rows per layer: in one block (history) or in one state.
    pub rows: u32,
    /// Fields of one row, in order, without gaps.
    pub fields: Vec<Field>,
    /// Position in a restore: lower first.
    pub restore_order: u16,
    /// Layers joined in one plane.
    pub plane_layers: u16,
    /// A state group that nobody needs to resume, such as the state of a draft: an object may lack it. At most one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// Blocks that share one set of rows, which lies in the last of them; a power of two, 1 for all but coarse history groups.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub grain_blocks: u32,
    /// Tokens of a run, in a state group that has one row for each token since the last multiple of so many, and so at most
    /// one less than that: what a run of tokens has before it is compressed. 0 for every other group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub run_tokens: u32,
}

fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_one(grain: &u32) -> bool {
    *grain == 1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_zero(run: &u32) -> bool {
    *run == 0
}

impl Group {
    /// Whether an object that completes a prefix of this many blocks has this group's rows: `None` if it may and need not.
    pub fn is_in(&self, blocks: u64) -> Option<bool> {
        if self.optional { None } else { Some(blocks.is_multiple_of(u64::from(self.grain_blocks))) }
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> u64 {
        self.fields.iter().map(|field| u64::from(field.count) * field.dtype.bits() / 8).sum()
    }

    /// Bytes of a layer of it, at most.
    fn layer_bytes(&self) -> u64 {
        u64::from(self.rows) * self.row_bytes()
    }

    /// Rows of a layer in the state after `tokens` tokens: of a history group those behind the last block boundary, of which
    /// none is in a block yet.
    fn state_rows(&self, tokens: u64, block_tokens: u32) -> u64 {
        let (rows, block_tokens) = (u64::from(self.rows), u64::from(block_tokens));
        match self.family {
            Family::State if self.run_tokens > 0 => tokens % u64::from(self.run_tokens),
            Family::State => rows,
            Family::History => {
                // Rounded up: where blocks cut runs, a few tokens may complete one more than their share.
                (rows * (tokens % block_tokens)).div_ceil(block_tokens * u64::from(self.grain_blocks))
            }
        }
    }

    /// Joins the smallest run of layers whose plane reaches this length.
    fn with_planes_of(mut self, bytes: u64) -> Self {
        let wanted = bytes.div_ceil(self.layer_bytes().max(1)).min(self.layers.len() as u64);
        self.plane_layers = u16::try_from(wanted.max(1)).unwrap_or(u16::MAX);
        self
    }
}

/// Divides groups into planes.
fn with_default_planes(groups: Vec<Group>) -> Vec<Group> {
    let block_bytes: u64 = groups
        .iter()
        .filter(|group| group.family == Family::History)
        .map(|group| group.layer_bytes() * group.layers.len() as u64)
        .sum();
    let of_block = (block_bytes / SMALL_BLOCK_PLANES).clamp(SMALL_PLANE_BYTES, PLANE_TARGET_BYTES);
    let bytes = |group: &Group| if group.family == Family::History { of_block } else { PLANE_TARGET_BYTES };
    groups
        .into_iter()
        .map(|group| {
            let bytes = bytes(&group);
            group.with_planes_of(bytes)
        })
        .collect()
}

/// One plane of an object: a run of a group's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaneSpec {
    /// Index of the group in [`KvLayout::groups`].
    pub group: u16,
    /// First of the group's layers (an index into [`Group::layers`]).
    pub first_layer: u16,
    /// Number of layers.
    pub layers: u16,
    /// Raw length in bytes.
    pub len_bytes: u64,
}

/// The group table of a model's cache. Checked when made: a `KvLayout` that exists is usable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    table: Table,
    id: LayoutId,
    block_planes: Vec<PlaneSpec>,
    state_planes: Vec<PlaneSpec>,
}

/// The table as it is written in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    name: String,
    block_tokens: u32,
    groups: Vec<Group>,
}

impl KvLayout {
    /// Checks a table. `block_tokens` is a power of two; groups have unique names, layers, whole-byte rows.
    pub fn new(name: impl Into<String>, block_tokens: u32, groups: Vec<Group>) -> Result<Self> {
        let table = Table { name: name.into(), block_tokens, groups };
        check(&table).map_err(|reason| PrefixError::BadLayout { layout: table.name.clone(), reason })?;
        let id = id(&table);
        let block_planes = planes(&table, Family::History);
        let state_planes = planes(&table, Family::State);
        Ok(Self { table, id, block_planes, state_planes })
    }

    /// Reads the JSON form and checks it.
    pub fn from_json(text: &str) -> Result<Self> {
        let table: Table = serde_json::from_str(text)
            .map_err(|error| PrefixError::BadLayout { layout: "(json)".into(), reason: error.to_string() })?;
        Self::new(table.name, table.block_tokens, table.groups)
    }

    /// The JSON form: what travels on the wire and lies in the store.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.table).expect("a table of names and numbers always serialises")
    }

    /// Name, for people; part of the id.
    pub fn name(&self) -> &str {
        &self.table.name
    }

    /// Tokens per block.
    pub fn block_tokens(&self) -> u32 {
        self.table.block_tokens
    }

    /// The groups.
    pub fn groups(&self) -> &[Group] {
        &self.table.groups
    }

    /// Digest of the table.
    pub fn id(&self) -> LayoutId {
        self.id
    }

    /// Whether something is needed at a boundary besides the rows before it.
    pub fn has_states(&self) -> bool {
        !self.state_planes.is_empty()
    }

    /// Whether states after so many tokens, at least one, can be stored: off the block grid only where every coarse group is
    /// whole at the block boundary before.
    pub fn has_boundary(&self, tokens: u64) -> bool {
        let block_tokens = u64::from(self.block_tokens());
        let blocks = tokens / block_tokens;
        tokens > 0
            && (tokens.is_multiple_of(block_tokens) || blocks.is_multiple_of(u64::from(self.grain_blocks())))
    }

    /// Planes of the object of this kind that completes a prefix of `tokens` tokens, in restore order, each as long as it is
    /// there: empty for a coarse group between its boundaries. Off the block grid a state has planes for the rows of the
    /// tokens behind its last block boundary too, behind its own, in the order of a block's.
    pub fn planes_at(&self, kind: ObjectKind, tokens: u64) -> Cow<'_, [PlaneSpec]> {
        let planes = self.planes(kind);
        let groups = self.groups();
        let resized = |spec: &PlaneSpec, rows: u64| {
            let len_bytes = u64::from(spec.layers) * rows * groups[usize::from(spec.group)].row_bytes();
            PlaneSpec { len_bytes, ..*spec }
        };
        let block_tokens = self.block_tokens();
        match kind {
            ObjectKind::Block if self.grain_blocks() > 1 => {
                let blocks = tokens / u64::from(block_tokens);
                let exact = |spec: &PlaneSpec| {
                    let group = &groups[usize::from(spec.group)];
                    resized(spec, if group.is_in(blocks) == Some(false) { 0 } else { u64::from(group.rows) })
                };
                planes.iter().map(exact).collect()
            }
            ObjectKind::State => {
                let tail =
                    if tokens.is_multiple_of(u64::from(block_tokens)) { &[] } else { &self.block_planes[..] };
                if tail.is_empty() && groups.iter().all(|group| group.run_tokens == 0) {
                    return planes.into();
                }
                let exact = |spec: &PlaneSpec| {
                    resized(spec, groups[usize::from(spec.group)].state_rows(tokens, block_tokens))
                };
                planes.iter().chain(tail).map(exact).collect()
            }
            _ => planes.into(),
        }
    }

    /// How many planes [`KvLayout::planes_at`] gives.
    pub fn planes_count(&self, kind: ObjectKind, tokens: u64) -> usize {
        let tail = kind == ObjectKind::State && !tokens.is_multiple_of(u64::from(self.block_tokens()));
        self.planes(kind).len() + if tail { self.block_planes.len() } else { 0 }
    }

    /// Planes that an object of this kind may have, in restore order, each as long as it can be: those of every block, and of
    /// every state on the block grid. Layout objects have one plane of any length, so none is listed for them.
    pub fn planes(&self, kind: ObjectKind) -> &[PlaneSpec] {
        match kind {
            ObjectKind::Block => &self.block_planes,
            ObjectKind::State => &self.state_planes,
            ObjectKind::Layout | ObjectKind::Lease | ObjectKind::Erasure => &[],
        }
    }

    /// Blocks at whose multiples every history group is whole: the coarsest grain.
    pub fn grain_blocks(&self) -> u32 {
        self.table.groups.iter().map(|group| group.grain_blocks).max().unwrap_or(1)
    }

    /// The group that an object may lack, if there is one.
    pub fn optional_group(&self) -> Option<&Group> {
        self.table.groups.iter().find(|group| group.optional)
    }

    /// For each plane of an object of this kind its place where who computes layer after layer needs them: by the first model
    /// layer that it serves, and of one layer as the planes stand. That is not the order of the planes where a group of later
    /// layers comes before one of earlier ones.
    pub fn plane_ranks(&self, kind: ObjectKind) -> Vec<u16> {
        let planes = self.planes(kind);
        let first = |plane: &PlaneSpec| {
            let layers = &self.groups()[usize::from(plane.group)].layers;
            layers.get(usize::from(plane.first_layer)).copied().unwrap_or(0)
        };
        let mut order: Vec<usize> = (0..planes.len()).collect();
        order.sort_by_key(|&plane| first(&planes[plane]));
        let mut ranks = vec![0; planes.len()];
        for (rank, plane) in order.into_iter().enumerate() {
            ranks[plane] = narrow(rank);
        }
        ranks
    }

    /// Raw bytes of the planes of this kind, each as long as it can be.
    pub fn object_bytes(&self, kind: ObjectKind) -> u64 {
        self.planes(kind).iter().map(|plane| plane.len_bytes).sum()
    }

    /// Raw bytes of the object of this kind that completes a prefix of `tokens` tokens and lacks nothing.
    pub fn object_bytes_at(&self, kind: ObjectKind, tokens: u64) -> u64 {
        let block_tokens = self.block_tokens();
        let blocks = tokens / u64::from(block_tokens);
        let off_grid = !tokens.is_multiple_of(u64::from(block_tokens));
        let rows = |group: &Group| match (kind, group.family) {
            (ObjectKind::Block, Family::History) if group.is_in(blocks) == Some(true) => {
                u64::from(group.rows)
            }
            (ObjectKind::State, Family::State) => group.state_rows(tokens, block_tokens),
            (ObjectKind::State, Family::History) if off_grid => group.state_rows(tokens, block_tokens),
            _ => 0,
        };
        let bytes = |group: &Group| rows(group) * group.row_bytes() * group.layers.len() as u64;
        self.groups().iter().map(bytes).sum()
    }

    /// No object has more raw bytes.
    pub fn max_object_bytes(&self) -> u64 {
        // A state off the grid has less than a block's rows.
        self.object_bytes(ObjectKind::Block) + self.object_bytes(ObjectKind::State)
    }

    /// Raw bytes of the growing part per token, `object_bytes(Block) / block_tokens`.
    pub fn bytes_per_token(&self) -> f64 {
        self.object_bytes(ObjectKind::Block) as f64 / f64::from(self.table.block_tokens)
    }
}

fn check(table: &Table) -> std::result::Result<(), String> {
    if !table.block_tokens.is_power_of_two() || table.block_tokens > 65_536 {
        return Err(format!("block_tokens is a power of two up to 65,536, got {}", table.block_tokens));
    }
    if table.groups.is_empty() || table.groups.len() > MAX_GROUPS {
        return Err(format!("needs 1 to {MAX_GROUPS} groups, got {}", table.groups.len()));
    }
    for (index, group) in table.groups.iter().enumerate() {
        let fail = |what: String| Err(format!("group {:?}: {what}", group.name));
        if table.groups[..index].iter().any(|other| other.name == group.name) {
            return fail("name is used twice".into());
        }
        if group.layers.is_empty() || group.layers.len() > MAX_LAYERS {
            return fail(format!("needs 1 to {MAX_LAYERS} layers, got {}", group.layers.len()));
        }
        if !group.layers.is_sorted_by(|a, b| a < b) {
            return fail("layers must ascend".into());
        }
        if group.rows == 0 || group.plane_layers == 0 {
            return fail("rows and plane_layers must be positive".into());
        }
        if group.fields.is_empty() || group.fields.len() > MAX_FIELDS {
            return fail(format!("needs 1 to {MAX_FIELDS} fields, got {}", group.fields.len()));
        }
        if group.optional && group.family != Family::State {
            return fail("only a state group can be optional: history is needed, all of it".into());
        }
        if group.optional && table.groups[..index].iter().any(|other| other.optional) {
            return fail("is the second optional group; one at most".into());
        }
        if !group.grain_blocks.is_power_of_two() || (group.grain_blocks > 1 && group.family == Family::State)
        {
            let grain = group.grain_blocks;
            return fail(format!("grain_blocks is a power of two, and 1 for a state group; got {grain}"));
        }
        if group.run_tokens != 0
            && (group.family != Family::State || group.optional || group.rows != group.run_tokens - 1)
        {
            let (rows, run) = (group.rows, group.run_tokens);
            return fail(format!(
                "run_tokens is for a state group that is needed, with one row less; got {run} with {rows} rows"
            ));
        }
        for field in &group.fields {
            if field.count == 0 || u64::from(field.count) * field.dtype.bits() % 8 != 0 {
                return fail(format!("field {:?} must fill a positive whole number of bytes", field.name));
            }
        }
    }
    for family in [Family::History, Family::State] {
        let bytes =
            table.groups.iter().filter(|group| group.family == family).try_fold(0_u64, |sum, group| {
                let layer = u64::from(group.rows).checked_mul(group.row_bytes())?;
                sum.checked_add(layer.checked_mul(group.layers.len() as u64)?)
            });
        match bytes {
            Some(bytes) if bytes <= MAX_OBJECT_BYTES => {}
            _ => return Err(format!("one {family:?} object would exceed {MAX_OBJECT_BYTES} bytes")),
        }
    }
    let always = |family| {
        let mut groups = table.groups.iter().filter(|group| group.family == family && !group.optional);
        groups.any(|group| group.grain_blocks == 1 && group.run_tokens == 0)
    };
    // A model of windows alone has blocks of nothing, behind which its states stand.
    let has = |family| table.groups.iter().any(|group| group.family == family);
    let has_history = has(Family::History);
    if has_history && !always(Family::History) {
        return Err("has no history group with rows in every block, so some could hold nothing".into());
    }
    if (!has_history || has(Family::State)) && !always(Family::State) {
        return Err("has no state group with rows in every state, so one could hold nothing".into());
    }
    Ok(())
}

fn planes(table: &Table, family: Family) -> Vec<PlaneSpec> {
    let mut order: Vec<usize> =
        (0..table.groups.len()).filter(|&g| table.groups[g].family == family).collect();
    order.sort_by_key(|&g| (table.groups[g].restore_order, g));
    let mut planes = Vec::new();
    for index in order {
        let group = &table.groups[index];
        let step = usize::from(group.plane_layers);
        for first in (0..group.layers.len()).step_by(step) {
            let layers = step.min(group.layers.len() - first);
            planes.push(PlaneSpec {
                group: narrow(index),
                first_layer: narrow(first),
                layers: narrow(layers),
                len_bytes: layers as u64 * group.layer_bytes(),
            });
        }
    }
    planes
}

/// Group and layer numbers, bounded by `check`.
fn narrow(value: usize) -> u16 {
    u16::try_from(value).expect("checked against MAX_GROUPS and MAX_LAYERS")
}

/// Canonical encoding under a digest; strings and lists carry a u32 LE length:
///
/// ```text
/// name | block_tokens u32 | groups: name | family u8 | layers: u16.. | rows u32 | fields: name | dtype u8 | count u32
///                                  | restore_order u16 | plane_layers u16 [| optional u8 | grain_blocks u32 [| run_tokens u32]]
/// ```
///
/// What stands in brackets is there, for every group, where some group is optional or coarse, or has runs; the context says which.
fn id(table: &Table) -> LayoutId {
    let runs = table.groups.iter().any(|group| group.run_tokens != 0);
    let wide = runs || table.groups.iter().any(|group| group.optional || group.grain_blocks != 1);
    let context = match (wide, runs) {
        (_, true) => RUN_LAYOUT_CONTEXT,
        (true, _) => WIDE_LAYOUT_CONTEXT,
        _ => LAYOUT_CONTEXT,
    };
    let mut hasher = blake3::Hasher::new_derive_key(context);
    let text = |hasher: &mut blake3::Hasher, value: &str| {
        hasher.update(&len_u32(value.len())).update(value.as_bytes());
    };
    text(&mut hasher, &table.name);
    hasher.update(&table.block_tokens.to_le_bytes()).update(&len_u32(table.groups.len()));
    for group in &table.groups {
        text(&mut hasher, &group.name);
        hasher.update(&[group.family as u8]).update(&len_u32(group.layers.len()));
        for layer in &group.layers {
            hasher.update(&layer.to_le_bytes());
        }
        hasher.update(&group.rows.to_le_bytes()).update(&len_u32(group.fields.len()));
        for field in &group.fields {
            text(&mut hasher, &field.name);
            hasher.update(&[field.dtype as u8]).update(&field.count.to_le_bytes());
        }
        hasher.update(&group.restore_order.to_le_bytes()).update(&group.plane_layers.to_le_bytes());
        if wide {
            hasher.update(&[u8::from(group.optional)]).update(&group.grain_blocks.to_le_bytes());
        }
        if runs {
            hasher.update(&group.run_tokens.to_le_bytes());
        }
    }
    LayoutId(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests;
