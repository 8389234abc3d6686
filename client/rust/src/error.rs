//! What a call can end with.

use std::error::Error;

/// Result of a call.
pub type Result<T> = std::result::Result<T, ClientError>;

/// Why a call gave nothing. A cache miss is not among them: it is an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No connection.
    #[error("cannot connect to {address}: is `esker serve` running there?")]
    Connect {
        /// Where to.
        address: String,
        /// What the transport says.
        #[source]
        source: tonic::transport::Error,
    },
    /// What is to say who calls cannot be used.
    #[error("{0}")]
    Credentials(&'static str),
    /// No arena.
    #[error("cannot attach to {path}: is `esker serve --local {path}` running here?")]
    Attach {
        /// Where to.
        path: String,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The arena cannot be mapped, read or written.
    #[error("the arena failed")]
    Arena(#[source] std::io::Error),
    /// The node may still read what an earlier put has left in the arena.
    #[error("a put through this arena was given up half-way: attach again")]
    PutGivenUp,
    /// A slot was written again before it was read: its lease was over.
    #[error("the slot's lease was over before it was read: look the prefix up again")]
    LeaseOver,
    /// The node refused, or the connection broke.
    #[error("{}", told(.0))]
    Refused(Box<tonic::Status>),
    /// The node sent something that breaks the protocol.
    #[error("the node broke the protocol: {0}")]
    Protocol(#[from] esker_proto::WireError),
}

impl From<tonic::Status> for ClientError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl ClientError {
    /// The status code, where the node gave one.
    pub fn code(&self) -> Option<tonic::Code> {
        match self {
            Self::Refused(status) => Some(status.code()),
            _ => None,
        }
    }
}

/// What a status says: the node's own words, or why none came.
fn told(status: &tonic::Status) -> String {
    let broken = status.source().filter(|source| source.is::<tonic::transport::Error>());
    let root = std::iter::successors(broken, |&cause| cause.source()).last();
    match root {
        Some(root) => format!(
            "the connection broke: {root}; if it never worked, the node may speak TLS: name the authority of its certificate"
        ),
        None => format!("{}: {}", status.code(), status.message()),
    }
}
