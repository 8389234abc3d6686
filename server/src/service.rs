//! The gRPC services: from messages to calls on the node and back.

mod admin;
mod admission;
mod bill;
mod cache;
mod deadline;
mod decoder;
mod events;
mod fetch;
mod local;
mod put;
mod sessions;
mod settle;
mod status;
mod usage;
mod warmup;

pub(crate) use admin::AdminService;
pub(crate) use admission::Admission;
pub(crate) use cache::CacheService;
pub(crate) use decoder::DecoderService;
pub(crate) use events::EventsService;
pub(crate) use fetch::{Delivery, Fetching};
pub(crate) use local::LocalService;
pub(crate) use put::ttl_class;
pub(crate) use sessions::SessionsService;
pub(crate) use settle::close_unsettled;
pub(crate) use status::from_gate;
pub(crate) use usage::UsageService;
pub(crate) use warmup::WarmupService;

/// For fuzzing: what each service asks of a request before it does anything for it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod hear {
    pub(crate) use super::deadline::hear as deadline;
    pub(crate) use super::decoder::hear as generate;
    pub(crate) use super::fetch::hear as fetch;
    pub(crate) use super::put::hear as put;
    pub(crate) use super::sessions::hear as session;
    pub(crate) use super::settle::hear as settle;
    pub(crate) use super::usage::hear as usage;
    pub(crate) use super::warmup::hear as warmup;
}
