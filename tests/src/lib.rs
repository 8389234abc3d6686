//! Promises of Esker, seen from outside: what the tests in `tests/` have in common.
//!
//! Nothing here knows the code of server or store. A node is a child process, requests go over gRPC or HTTP, files are read as
//! their format is documented, and what was acknowledged stands in a journal of the test's own.

mod binary;
mod cage;
mod files;
pub mod identity;
mod journal;
mod node;
mod partial;
mod prompt;
mod random;
mod samples;
mod tiny;
mod web;

pub use binary::{esker, output, scratch, text_of};
pub use cage::Cage;
pub use files::{Record, change, copy_folder, pass, records};
pub use journal::{Audit, Journal};
pub use node::{Answer, Fetched, Node, put_steps, question};
pub use partial::Partial;
pub use prompt::{Prompt, flat_layout, staged_layout, tokens};
pub use random::Random;
pub use samples::{Samples, scrape, value};
pub use tiny::tiny_model;
pub use web::{WebReply, web};
