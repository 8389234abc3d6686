//! Bounds on what a request may carry. Both sides know them, so that a client fails early and says why.

/// Longest encoded message: 4 MiB, the transport's customary bound.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Longest run of payload bytes in one message: 1 MiB.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;
/// Longest prompt, in tokens; four varint bytes each stay below [`MAX_MESSAGE_BYTES`].
pub const MAX_PROMPT_TOKENS: usize = 1 << 20;
/// Longest text of a prompt, in bytes.
pub const MAX_TEXT_BYTES: usize = 3 << 20;
/// Longest layout table, in bytes.
pub const MAX_LAYOUT_JSON_BYTES: usize = 1 << 20;
/// Most blocks of one lookup or put, and of all lookups of one `LookupMany`.
pub const MAX_CHAIN_BLOCKS: usize = 1 << 16;
/// Most tokens behind the last block of a chain that is named by hashes: less than the longest block has.
pub const MAX_TAIL_TOKENS: usize = (1 << 16) - 1;
/// Most lookups of one `LookupMany`.
pub const MAX_LOOKUPS: usize = 64;
/// Longest hash of an engine, in bytes.
pub const MAX_ENGINE_HASH_BYTES: usize = 64;
/// Longest name given by a caller: of a request, a session, a job.
pub const MAX_NAME_BYTES: usize = 128;
