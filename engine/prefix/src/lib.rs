//! The vocabulary of Esker: tokens, chain hashes, namespaces, scopes, KV layouts, block and state objects.
//!
//! Architecture invariant: no I/O, no clock, no randomness. Everything here is a value or a pure function of
//! values, so that store, decoder, wire and client agree on one meaning of each word. What a prefix *costs*, who
//! may read it and where its bytes lie is decided elsewhere.

mod chain;
mod error;
mod layout;
mod namespace;
mod object;
mod scope;
mod token;
mod writer;

pub use chain::{BlockHash, Chain, rekey};
pub use error::{PrefixError, Result};
pub use layout::{Dtype, Family, Field, Group, KvLayout, LayoutId, PlaneSpec, RowFormat};
pub use namespace::{Namespace, NamespaceId};
pub use object::{BlockObject, ObjectId, ObjectKind, StateObject};
pub use scope::{RootSecret, ScopeKey, ScopeKind, ScopeTag};
pub use token::TokenId;
pub use writer::WriterId;
