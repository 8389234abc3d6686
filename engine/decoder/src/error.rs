//! What can go wrong, by what the caller can do about it.

use esker_prefix::{BlockHash, NamespaceId, PrefixError, TokenId};

/// Result of an operation of this crate.
pub type Result<T> = std::result::Result<T, DecoderError>;

/// What the caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The model's files are unusable; another checkpoint or configuration is needed.
    Model,
    /// The tokens or text handed in are unusable; the sequence is as it was.
    Request,
    /// The block does not continue this sequence; the sequence is as it was.
    Block,
    /// The caller asked to stop; what was computed so far is kept.
    Cancelled,
}

/// An error of the decoder. Nothing here is fatal to the model, and none leaves a sequence half-written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecoderError {
    /// `config.json` does not describe a model of this family.
    #[error("config.json: {0}")]
    Config(String),
    /// The configuration gives no KV layout, or a block does not fit it.
    #[error(transparent)]
    Prefix(#[from] PrefixError),
    /// A shard that is not a whole safetensors file.
    #[error("checkpoint shard {shard:?}: {source}")]
    Shard {
        /// Name the caller gave it.
        shard: String,
        /// What the parser found.
        source: safetensors::SafeTensorError,
    },
    /// Two shards hold one tensor.
    #[error("tensor {tensor} is in shard {first:?} and again in {second:?}")]
    DuplicateTensor {
        /// Name of the tensor.
        tensor: String,
        /// Shard that was given first.
        first: String,
        /// Shard that repeats it.
        second: String,
    },
    /// No shard holds a tensor that the configuration calls for.
    #[error("tensor {tensor} is missing, expected shape {expected:?}")]
    MissingTensor {
        /// Name of the tensor.
        tensor: String,
        /// Shape that the configuration gives.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration gives.
    #[error("tensor {tensor} has shape {got:?}, expected {expected:?}")]
    TensorShape {
        /// Name of the tensor.
        tensor: String,
        /// Shape that the configuration gives.
        expected: Vec<usize>,
        /// Shape in the shard.
        got: Vec<usize>,
    },
    /// A tensor's number format is not one that is read.
    #[error("tensor {tensor} is {got}, expected {expected}")]
    TensorDtype {
        /// Name of the tensor.
        tensor: String,
        /// Format in the shard.
        got: String,
        /// Formats that are read.
        expected: &'static str,
    },
    /// A weight that is no number, or none that counts.
    #[error("tensor {tensor} holds {value} at element {at}: the checkpoint is damaged, or its scales are")]
    NotFinite {
        /// Name of the tensor.
        tensor: String,
        /// Position in the tensor.
        at: usize,
        /// What is there.
        value: f32,
    },
    /// A table that routes tokens to experts names one that does not exist.
    #[error("tensor {tensor} names expert {got} of {experts}")]
    ExpertTable {
        /// Name of the tensor.
        tensor: String,
        /// Number in the table.
        got: i64,
        /// Experts of the layer.
        experts: usize,
    },
    /// `tokenizer.json` is unusable, or text could not be tokenised.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A token outside the vocabulary.
    #[error("token {} is not in the vocabulary of {vocab_size}", token.0)]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A prefill of nothing has no last token to give logits for.
    #[error("no tokens were given")]
    NoTokens,
    /// The sequence would outgrow the model's positions.
    #[error("{tokens} tokens exceed max_position_embeddings {limit}")]
    TooLong {
        /// Length that was asked for.
        tokens: usize,
        /// The model's bound.
        limit: usize,
    },
    /// A sequence was used with another model than the one it was made for.
    #[error("the sequence belongs to another model")]
    OtherModel,
    /// A block of rows that the sequence does not hold in full.
    #[error("block {block} ends at token {end}, the sequence holds {tokens}")]
    BlockIncomplete {
        /// Index of the block.
        block: usize,
        /// One past its last token.
        end: usize,
        /// Tokens in the sequence.
        tokens: usize,
    },
    /// A block that is not the next one of the sequence.
    #[error("block completes a prefix of {got} tokens, the sequence expects one of {expected}")]
    BlockPosition {
        /// Prefix length that the next block completes.
        expected: u64,
        /// Prefix length that the given block completes.
        got: u64,
    },
    /// A block or state of another namespace than what was restored before it.
    #[error("the object is of namespace {got}, the sequence was restored from namespace {expected}")]
    OtherNamespace {
        /// Namespace of what was restored first.
        expected: NamespaceId,
        /// Namespace of the given object.
        got: NamespaceId,
    },
    /// A block of another prefix than the block restored before it.
    #[error("block continues prefix {got}, the sequence was restored from {expected}")]
    BlockParent {
        /// Hash of the block restored before.
        expected: BlockHash,
        /// Parent of the given block.
        got: BlockHash,
    },
    /// A sequence restored from blocks alone cannot be continued yet.
    #[error("the sequence holds the rows of {tokens} tokens, but not the state that continues them")]
    StateMissing {
        /// Tokens in the sequence.
        tokens: usize,
    },
    /// Rows that were announced did not come, or have still to come.
    #[error("the rows of layer {layer}, announced for {tokens} tokens, have not come")]
    RowsMissing {
        /// The first such layer.
        layer: usize,
        /// Tokens that the sequence held, or was to hold.
        tokens: usize,
    },
    /// A draft was asked for of a model that was loaded without a draft block.
    #[error("the model was loaded without a draft block")]
    NoDraft,
    /// A draft was given another number of next tokens than rows.
    #[error("a draft of {expected} rows needs as many next tokens, got {got}")]
    DraftTokens {
        /// Rows of the residual.
        expected: usize,
        /// Tokens given.
        got: usize,
    },
    /// A replay was given too few tokens, or more than the sequence holds.
    #[error("a replay needs the last {needed} tokens of the sequence or more, up to all {tokens}, got {got}")]
    ReplayTokens {
        /// Tokens that it computes.
        needed: usize,
        /// Tokens in the sequence.
        tokens: usize,
        /// Tokens given.
        got: usize,
    },
    /// The state at a boundary that the sequence has gone beyond, or not reached.
    #[error("the state after {end} tokens is not held, the sequence has {tokens}")]
    StateNotHeld {
        /// The boundary.
        end: usize,
        /// Tokens in the sequence.
        tokens: usize,
    },
    /// A state of another length than the sequence.
    #[error("state continues a prefix of {got} tokens, the sequence holds {expected}")]
    StatePosition {
        /// Tokens in the sequence.
        expected: u64,
        /// Tokens before the state.
        got: u64,
    },
    /// A state of another prefix than the blocks restored before it.
    #[error("state continues prefix {got}, the sequence was restored from {expected}")]
    StatePrefix {
        /// Hash of the block restored last.
        expected: BlockHash,
        /// Prefix of the state.
        got: BlockHash,
    },
    /// A temperature or top-p outside its range.
    #[error("temperature {temperature} must be 0 or more, top_p {top_p} above 0 and at most 1")]
    Sampling {
        /// Temperature given.
        temperature: f32,
        /// Top-p given.
        top_p: f32,
    },
    /// A golden file without a tensor, or with one of another shape.
    #[error("golden file: {0}")]
    Golden(String),
    /// The caller's observer asked to stop.
    #[error("cancelled after {tokens} tokens of the sequence")]
    Cancelled {
        /// Tokens that the sequence holds now.
        tokens: usize,
    },
}

impl DecoderError {
    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config(_)
            | Self::Shard { .. }
            | Self::DuplicateTensor { .. }
            | Self::MissingTensor { .. }
            | Self::TensorShape { .. }
            | Self::TensorDtype { .. }
            | Self::ExpertTable { .. }
            | Self::NotFinite { .. }
            | Self::Golden(_) => ErrorKind::Model,
            Self::Tokenizer(_)
            | Self::UnknownToken { .. }
            | Self::NoTokens
            | Self::TooLong { .. }
            | Self::OtherModel
            | Self::StateMissing { .. }
            | Self::ReplayTokens { .. }
            | Self::NoDraft
            | Self::DraftTokens { .. }
            | Self::Sampling { .. } => ErrorKind::Request,
            Self::Prefix(_)
            | Self::BlockIncomplete { .. }
            | Self::RowsMissing { .. }
            | Self::BlockPosition { .. }
            | Self::OtherNamespace { .. }
            | Self::StateNotHeld { .. }
            | Self::StatePosition { .. }
            | Self::StatePrefix { .. }
            | Self::BlockParent { .. } => ErrorKind::Block,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
        }
    }
}
