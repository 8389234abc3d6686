//! A trace in memory: a tree of blocks, and requests that each name the end of a path in it.

use std::collections::HashMap;
use std::fs::File;
use std::hash::BuildHasherDefault;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::format::Line;

/// Magic number of a zstd frame, little-endian: how a compressed trace is told from a plain one.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Longest line that is read. The longest prompt known has 20,000 ids of 7 digits.
const LINE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Most distinct blocks of a trace: the tree numbers them in 32 bits, and 2^28 already take gigabytes.
const BLOCKS_MAX: usize = 1 << 28;

/// A parent that is not there: the block starts a prompt.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// Why a trace cannot be replayed.
#[derive(Debug)]
pub enum TraceError {
    /// The file cannot be opened or read.
    Io(PathBuf, std::io::Error),
    /// A line is not a request.
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// No request in it.
    Empty(PathBuf),
}

impl std::error::Error for TraceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            Self::Line { .. } | Self::Empty(_) => None,
        }
    }
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(path, error) => write!(f, "cannot read the trace {}: {error}", path.display()),
            Self::Line { path, line, reason } => write!(f, "{}, line {line}: {reason}", path.display()),
            Self::Empty(path) => write!(f, "{} holds no request", path.display()),
        }
    }
}

/// One prompt: the path of blocks that ends in `leaf`.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Seconds since the trace began.
    pub second: u32,
    /// Tokens of the prompt.
    pub input_tokens: u32,
    /// Blocks of its path.
    pub blocks: u32,
    /// The last block of its path; meaningless if `blocks` is 0.
    pub leaf: u32,
}

/// A trace: distinct blocks as a tree, requests in order of time.
///
/// A block is an id *under its parent*: equal ids below different parents are different blocks, as they are in a
/// hash chain. Blocks are numbered by first appearance, so a parent's number is below its children's.
#[derive(Debug)]
pub struct Trace {
    /// Tokens of a full block.
    pub block_tokens: u32,
    /// The requests, by time.
    pub requests: Vec<Request>,
    parents: Vec<u32>,
}

impl Trace {
    /// Reads a trace of JSON lines, zstd-compressed or not. `progress` is told how many bytes of the file are read.
    ///
    /// Every line is one request. Three kinds of line are known:
    /// - `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [id, …]}`: Mooncake's, blocks of
    ///   512 tokens. The last id may name a block that is not full.
    /// - the same with `"runs": [[first id, count], …]` for `hash_ids`: consecutive ids, blocks of 64 tokens.
    /// - either with `"block_tokens": tokens`, which holds from there on and must not change: any other trace.
    ///
    /// Other fields are ignored. Times may not go back.
    pub fn read(path: &Path, mut progress: impl FnMut(u64)) -> Result<Self, TraceError> {
        let io = |error| TraceError::Io(path.to_owned(), error);
        let file = File::open(path).map_err(io)?;
        let position = file.try_clone().map_err(io)?;
        // The decoder's file and `position` share one offset.
        let told = || (&position).stream_position().map(&mut progress).map_err(io);
        Self::parse(file, path, TraceBuilder::default(), told)
    }

    /// The same of what need not be a file; `read_some` is called now and then.
    fn parse(
        mut source: impl Read + Seek,
        path: &Path,
        mut builder: TraceBuilder,
        mut read_some: impl FnMut() -> Result<(), TraceError>,
    ) -> Result<Self, TraceError> {
        let io = |error| TraceError::Io(path.to_owned(), error);
        let odd = |line, reason| TraceError::Line { path: path.to_owned(), line, reason };
        let mut magic = [0; 4];
        let compressed = source.read_exact(&mut magic).is_ok() && magic == ZSTD_MAGIC;
        source.seek(SeekFrom::Start(0)).map_err(io)?;
        let mut lines: Box<dyn BufRead + '_> = if compressed {
            Box::new(BufReader::new(zstd::Decoder::new(source).map_err(io)?))
        } else {
            Box::new(BufReader::new(source))
        };
        let mut text = String::new();
        for line in 1.. {
            text.clear();
            let read = lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut text);
            let bytes = read.map_err(|error| match error.kind() {
                ErrorKind::InvalidData => odd(line, "not UTF-8".to_owned()),
                _ => io(error),
            })?;
            if bytes == 0 {
                break;
            }
            if text.trim().is_empty() {
                continue;
            }
            let parsed = Line::parse(&text).and_then(|line| builder.push_line(&line));
            parsed.map_err(|reason| odd(line, reason))?;
            if line % 256 == 0 {
                read_some()?;
            }
        }
        builder.finish().ok_or_else(|| TraceError::Empty(path.to_owned()))
    }

    /// How many of its first requests name at least this many distinct blocks; all of them if it has fewer.
    pub fn requests_of(&self, blocks: u64) -> usize {
        let enough = |request: &Request| request.blocks > 0 && u64::from(request.leaf) + 1 >= blocks;
        self.requests.iter().position(enough).map_or(self.requests.len(), |at| at + 1)
    }

    /// Its first `requests` requests, and the blocks that these name.
    #[must_use]
    pub fn first(mut self, requests: usize) -> Self {
        self.requests.truncate(requests);
        // Blocks are numbered by first appearance.
        let used = self
            .requests
            .iter()
            .filter(|request| request.blocks > 0)
            .map(|request| request.leaf as usize + 1);
        let used = used.max().unwrap_or(0);
        self.parents.truncate(used);
        self
    }

    /// Distinct blocks.
    pub fn blocks(&self) -> usize {
        self.parents.len()
    }

    /// So many percent of the distinct blocks, rounded down; at least one.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a 32-bit number")]
    #[expect(clippy::cast_precision_loss, reason = "blocks are numbered in 32 bits")]
    pub fn share_blocks(&self, percent: f64) -> u32 {
        ((self.parents.len() as f64 * percent / 100.0) as u32).max(1)
    }

    /// Tokens of all prompts.
    pub fn input_tokens(&self) -> u64 {
        self.requests.iter().map(|request| u64::from(request.input_tokens)).sum()
    }

    /// The block before `block`.
    pub fn parent(&self, block: u32) -> Option<u32> {
        Some(self.parents[block as usize]).filter(|parent| *parent != NO_PARENT)
    }

    /// Fills `path` with the blocks of `request`, from the first to the last.
    pub fn path(&self, request: &Request, path: &mut Vec<u32>) {
        path.clear();
        let mut block = request.leaf;
        for _ in 0..request.blocks {
            path.push(block);
            block = self.parents[block as usize];
        }
        path.reverse();
    }
}

/// For fuzzing: a trace, of few blocks. Whether it is one; then every path leads to its beginning.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let builder = TraceBuilder { blocks_max: 1 << 12, ..TraceBuilder::default() };
    let parsed = Trace::parse(std::io::Cursor::new(bytes), Path::new("trace"), builder, || Ok(()));
    let Ok(trace) = parsed else { return false };
    assert!(!trace.requests.is_empty() && trace.requests.is_sorted_by_key(|request| request.second));
    let mut path = Vec::new();
    for request in &trace.requests {
        trace.path(request, &mut path);
        assert_eq!(path.len(), request.blocks as usize);
        assert!(path.is_sorted_by(|before, block| trace.parent(*block) == Some(*before)));
        assert!(path.first().is_none_or(|first| trace.parent(*first).is_none()), "a path without beginning");
    }
    true
}

/// Collects requests into a [`Trace`].
pub(super) struct TraceBuilder {
    /// Most distinct blocks.
    blocks_max: usize,
    block_tokens: Option<u32>,
    first_ms: Option<u64>,
    last_second: u32,
    requests: Vec<Request>,
    parents: Vec<u32>,
    numbers: HashMap<(u32, u64), u32, BuildHasherDefault<MixHasher>>,
}

impl Default for TraceBuilder {
    fn default() -> Self {
        Self {
            blocks_max: BLOCKS_MAX,
            block_tokens: None,
            first_ms: None,
            last_second: 0,
            requests: Vec::new(),
            parents: Vec::new(),
            numbers: HashMap::default(),
        }
    }
}

impl TraceBuilder {
    fn push_line(&mut self, line: &Line) -> Result<(), String> {
        let first_ms = *self.first_ms.get_or_insert(line.timestamp_ms);
        let since = line.timestamp_ms.checked_sub(first_ms);
        let second = since.and_then(|ms| u32::try_from(ms / 1000).ok());
        let second = second.filter(|second| *second >= self.last_second);
        let second = second.ok_or_else(|| {
            format!("timestamp {} ms is before an earlier line's, or beyond 2^32 s", line.timestamp_ms)
        })?;
        self.push(second, line.block_tokens, line.input_tokens, line.ids())
    }

    /// Adds a prompt of `input_tokens` tokens whose blocks are `ids`.
    pub(super) fn push(
        &mut self,
        second: u32,
        block_tokens: u32,
        input_tokens: u32,
        ids: impl Iterator<Item = u64>,
    ) -> Result<(), String> {
        if *self.block_tokens.get_or_insert(block_tokens) != block_tokens {
            return Err(format!("blocks of {block_tokens} tokens after blocks of another size"));
        }
        let (mut leaf, mut blocks) = (NO_PARENT, 0_u32);
        for id in ids {
            blocks += 1;
            if u64::from(blocks - 1) * u64::from(block_tokens) >= u64::from(input_tokens) {
                return Err(format!("more blocks of {block_tokens} tokens than {input_tokens} tokens fill"));
            }
            let next = self.parents.len();
            let number = *self.numbers.entry((leaf, id)).or_insert_with(|| {
                self.parents.push(leaf);
                u32::try_from(next).expect("bounded below")
            });
            if next >= self.blocks_max {
                return Err(format!("more than {} distinct blocks", self.blocks_max));
            }
            leaf = number;
        }
        self.last_second = second;
        self.requests.push(Request { second, input_tokens, blocks, leaf });
        Ok(())
    }

    pub(super) fn finish(self) -> Option<Trace> {
        let block_tokens = self.block_tokens?;
        Some(Trace { block_tokens, requests: self.requests, parents: self.parents })
    }
}

/// Hashes the pair of a parent and an id by multiplication: the ids of a trace are no adversary's.
#[derive(Default)]
pub(super) struct MixHasher(u64);

impl std::hash::Hasher for MixHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}
