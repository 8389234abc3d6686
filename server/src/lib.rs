//! The Esker service: joins store, decoder and wire, and knows what they do not: who asks, what is granted, and
//! when work must stop.
//!
//! Architecture invariant: bytes of blocks pass through here but are never interpreted. Nothing here decides
//! whether bytes are right: that is the store's word alone.

pub mod bundled;
pub mod command;
mod generate;
mod grant;
mod model_folder;
mod namespaces;
mod node;
mod secret;
mod serve;
mod service;
mod write_behind;

pub use model_folder::{LoadedModel, load_model};
pub use node::{Node, NodeSettings};
pub use serve::{Running, start};
