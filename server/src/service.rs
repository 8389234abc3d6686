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
