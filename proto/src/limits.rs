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
