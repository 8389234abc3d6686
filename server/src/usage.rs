//! Usage, as others read it: in the shapes of public APIs, in rows for people, as events for metering systems, as FOCUS columns
//! for finance. Everything here is a pure function of what the ledger says; files and sockets are only in usage/sink.rs.

pub(crate) mod calendar;
pub(crate) mod event;
pub(crate) mod focus;
pub(crate) mod rows;
mod shapes;
pub(crate) mod sink;

pub(crate) use shapes::PromptAccount;
