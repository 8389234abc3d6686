//! The gRPC services: from messages to calls on the node and back.

mod cache;
mod decoder;
mod status;

pub(crate) use cache::CacheService;
pub(crate) use decoder::DecoderService;
