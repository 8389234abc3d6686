//! The sparse-attention decoder: tensors in, tensors out. No network, no storage, no async.
