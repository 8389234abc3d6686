//! Planning: which bytes to read, and in how many reads.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;

use crate::io::{PAGE, Permit};
use crate::segment::SegmentId;

/// Bytes that are read for nothing rather than starting another read.
const MAX_GAP_BYTES: u64 = 16 << 10;

/// Neighbours are joined up to so many times the length of a read when they are decoded. Whatever shrinks more than that is
/// decoded in smaller parts.
const MERGED_EXPANSION: usize = 4;

/// Taken from one kept piece at once, so that more than one thread has something to do.
const KEPT_READ_BYTES: usize = 128 << 10;

/// Something to take from a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) object: usize,
    pub(super) part: Part,
}

/// Part of a record. The order is that of delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Its start.
    Head,
    /// All of it.
    Record,
    Header,
    Plane(usize),
}

/// A read of whole pages and what is to be taken from it, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) segment: SegmentId,
    pub(super) range: Range<u64>,
    pub(super) items: Vec<Item>,
    /// The range, where an earlier read left it, and how many bytes of it are wanted now.
    pub(super) kept: Option<(Bytes, usize)>,
    /// Bytes that come of it when it is decoded, at most.
    pub(super) decoded_bytes: usize,
}

impl Read {
    /// Bytes that it brings.
    pub(super) fn len_bytes(&self) -> usize {
        match self.kept {
            Some((_, wanted_bytes)) => wanted_bytes,
            None => usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX),
        }
    }

    /// Bytes that it counts for in every budget: those that it brings, or that come of them, whichever are more.
    pub(super) fn held_bytes(&self) -> usize {
        self.len_bytes().max(self.decoded_bytes)
    }
}

/// Where something lies that is to be taken from a read, and what comes of it.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub(super) segment: SegmentId,
    pub(super) range: Range<u64>,
    /// Bytes when it is decoded, at most.
    pub(super) decoded_bytes: usize,
}

/// Reads for `items` in their order; neighbours that follow each other closely become one read of up to
/// `merge_bytes`, and of not many times that when they are decoded. An item larger than that is still one read.
pub(super) fn join(items: Vec<Item>, merge_bytes: usize, extent: impl Fn(&Item) -> Extent) -> VecDeque<Read> {
    let mut reads: VecDeque<Read> = VecDeque::new();
    for item in items {
        let Extent { segment, range, decoded_bytes } = extent(&item);
        let range = pages(range);
        if let Some(last) = reads.back_mut() {
            let end = last.range.end.max(range.end);
            let near = range.start >= last.range.start && range.start <= last.range.end + MAX_GAP_BYTES;
            let short = end - last.range.start <= merge_bytes as u64
                && last.decoded_bytes.saturating_add(decoded_bytes) <= merge_bytes * MERGED_EXPANSION;
            if last.segment == segment && near && short {
                last.range.end = end;
                last.items.push(item);
                last.decoded_bytes += decoded_bytes;
                continue;
            }
        }
        reads.push_back(Read { segment, range, items: vec![item], kept: None, decoded_bytes });
    }
    reads
}

/// What was read and stays until all of a fetch is given.
pub(super) struct Kept {
    pub(super) segment: SegmentId,
    pub(super) start: u64,
    pub(super) bytes: Bytes,
    pub(super) _permit: Option<Permit>,
}

/// Takes `items` in their order from what is kept, neighbours from one piece together; what is in none of it has to be read.
pub(super) fn from_kept(
    items: Vec<Item>,
    kept: &[Kept],
    merge_bytes: usize,
    extent: impl Fn(&Item) -> Extent,
) -> VecDeque<Read> {
    let mut reads: VecDeque<Read> = VecDeque::new();
    for item in items {
        let Extent { segment, range, decoded_bytes } = extent(&item);
        let Some(piece) = kept.iter().find(|piece| piece.holds(segment, &range)) else {
            reads.extend(join(vec![item], merge_bytes, &extent));
            continue;
        };
        let item_bytes = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        if let Some(read) = reads.back_mut()
            && (read.segment, read.range.start) == (segment, piece.start)
            && read.held_bytes() + item_bytes.max(decoded_bytes) <= KEPT_READ_BYTES
            && let Some((_, wanted_bytes)) = &mut read.kept
        {
            *wanted_bytes += item_bytes;
            read.items.push(item);
            read.decoded_bytes += decoded_bytes;
            continue;
        }
        let kept = Some((piece.bytes.clone(), item_bytes));
        reads.push_back(Read { segment, range: piece.range(), items: vec![item], kept, decoded_bytes });
    }
    reads
}

impl Kept {
    fn range(&self) -> Range<u64> {
        self.start..self.start + self.bytes.len() as u64
    }

    fn holds(&self, segment: SegmentId, range: &Range<u64>) -> bool {
        self.segment == segment && self.start <= range.start && range.end <= self.range().end
    }
}

/// `range` rounded outward to pages, and never empty.
pub(super) fn pages(range: Range<u64>) -> Range<u64> {
    let page = PAGE as u64;
    let start = range.start / page * page;
    start..range.end.max(start + 1).next_multiple_of(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(extents: &[(u64, Range<u64>)]) -> Vec<(u64, Range<u64>, usize)> {
        let items = (0..extents.len()).map(|object| Item { object, part: Part::Record }).collect();
        let reads = join(items, 64 << 10, |item| {
            let (segment, range) = &extents[item.object];
            Extent { segment: SegmentId(*segment), range: range.clone(), decoded_bytes: 0 }
        });
        reads.into_iter().map(|read| (read.segment.0, read.range, read.items.len())).collect()
    }

    #[test]
    fn neighbours_become_one_read_up_to_the_limit() {
        assert_eq!(
            joined(&[(1, 0..30_000), (1, 32_768..40_000), (1, 40_960..65_536), (1, 65_536..70_000)]),
            [(1, 0..65_536, 3), (1, 65_536..73_728, 1)]
        );
    }

    #[test]
    fn other_segments_large_gaps_and_steps_back_start_another_read() {
        assert_eq!(
            joined(&[(1, 0..10), (2, 4096..4100), (2, 40_960..41_000), (2, 8192..8200)]),
            [(1, 0..4096, 1), (2, 4096..8192, 1), (2, 40_960..45_056, 1), (2, 8192..12_288, 1)]
        );
    }

    #[test]
    fn what_becomes_much_when_it_is_decoded_is_not_joined() {
        let items = (0..8).map(|object| Item { object, part: Part::Record }).collect();
        let reads = join(items, 64 << 10, |item| {
            let start = item.object as u64 * 4096;
            Extent { segment: SegmentId(1), range: start..start + 4096, decoded_bytes: 100 << 10 }
        });
        assert_eq!(reads.iter().map(|read| read.items.len()).collect::<Vec<_>>(), [2, 2, 2, 2]);
        assert!(reads.iter().all(|read| read.held_bytes() == 200 << 10 && read.len_bytes() == 8 << 10));
    }

    #[test]
    fn packed_planes_share_their_page() {
        assert_eq!(joined(&[(1, 100..200), (1, 256..5000), (1, 5056..5100)]), [(1, 0..8192, 3)]);
    }
}
