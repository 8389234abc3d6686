//! Errors as gRPC status: the one place that decides which code a caller sees.

use esker_decoder::DecoderError;
use esker_proto::WireError;
use esker_store::StoreError;
use tonic::Status;

use crate::gate::Refused;
use crate::generate::GenerateError;
use crate::ledger::LedgerError;
use crate::namespaces::RegisterError;
use crate::tenants::exhausted;

pub(super) fn from_wire(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn from_store(error: &StoreError) -> Status {
    let text = error.to_string();
    match error.kind() {
        esker_store::ErrorKind::Full => exhausted(text, 10_000),
        esker_store::ErrorKind::Invalid => Status::invalid_argument(text),
        esker_store::ErrorKind::MissingParent => Status::failed_precondition(text),
        esker_store::ErrorKind::ContentMismatch => Status::aborted(text),
        esker_store::ErrorKind::Unavailable => Status::unavailable(text),
        _ => Status::internal(text),
    }
}

pub(super) fn from_register(error: &RegisterError) -> Status {
    match error {
        RegisterError::ObjectTooLarge { .. } => Status::invalid_argument(error.to_string()),
        RegisterError::TooMany | RegisterError::TooManyOfTenant => exhausted(error.to_string(), 60_000),
        RegisterError::Unwritten => Status::unavailable(error.to_string()),
        RegisterError::Store(store) => from_store(store),
    }
}

/// What a caller sees whose tenant is erased: whatever it does anew is of the tenant as it is then.
pub(crate) fn from_gate(refused: Refused) -> Status {
    Status::aborted(refused.to_string())
}

pub(super) fn from_generate(error: &GenerateError) -> Status {
    match error {
        GenerateError::Decoder(decoder) => from_decoder(decoder),
        GenerateError::Store(store) => from_store(store),
        GenerateError::Cancelled => Status::cancelled(error.to_string()),
        GenerateError::Erased(refused) => from_gate(*refused),
        GenerateError::Thread(_) => exhausted(error.to_string(), 1000),
    }
}

fn from_decoder(error: &DecoderError) -> Status {
    match error.kind() {
        esker_decoder::ErrorKind::Request => Status::invalid_argument(error.to_string()),
        esker_decoder::ErrorKind::Cancelled => Status::cancelled(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}

/// Which code a caller sees when its account cannot be closed.
pub(crate) fn from_ledger(error: &LedgerError) -> Status {
    let text = error.to_string();
    match error {
        LedgerError::Conflict { .. } => Status::already_exists(text),
        LedgerError::Full { .. } => exhausted(text, 10_000),
        LedgerError::Busy => exhausted(text, 100),
        LedgerError::TooLarge { .. } => Status::invalid_argument(text),
        LedgerError::Damaged { .. } => Status::data_loss(text),
        LedgerError::Failed | LedgerError::Index(_) | LedgerError::Stopping => Status::unavailable(text),
    }
}

/// A task of ours ended without an answer: it panicked, or the runtime is going down.
pub(super) fn from_join(error: &tokio::task::JoinError) -> Status {
    tracing::error!(%error, "a request's task did not finish");
    Status::internal("the request failed inside the node; its log says why")
}
