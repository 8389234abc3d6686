//! The Esker service: joins store, decoder and wire, and knows what they do not: who asks, what is granted, and
//! when work must stop.
//!
//! Architecture invariant: bytes of blocks pass through here but are never interpreted. Nothing here decides
//! whether bytes are right: that is the store's word alone.

mod access;
mod arrival;
mod audit;
mod auth;
mod author;
mod budget;
pub mod bundled;
mod candidates;
mod chat_template;
pub mod command;
mod control;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod gate;
mod generate;
mod grant;
mod history;
mod http;
mod keys;
mod ledger;
mod live;
mod local;
mod lookup;
mod memory;
mod metrics;
mod model_folder;
mod namespaces;
mod node;
mod policy;
mod price;
mod principal;
mod replay;
mod secret;
mod serve;
mod service;
mod sessions;
mod staging;
mod tenants;
mod traces;
mod usage;
mod users;
mod warmups;
mod write_behind;
mod writers;

pub use events::publisher::PublisherSettings;
pub use ledger::LedgerSettings;
pub use local::LocalSettings;
pub use model_folder::{LoadedModel, load_model};
pub use node::{Node, NodeSettings};
pub use principal::{Principal, Role, Roles, TenantId};
pub use serve::{ListenSettings, Running, TlsFiles, start};
pub use traces::Traces;
pub use usage::sink::SinkSettings;
