//! The Rust client of Esker: the prefix cache and the decoder of one node.
//!
//! Architecture invariant: speaks `esker.v1` and nothing else; holds no cache of its own. Values in and out are
//! those of `esker-prefix`.

mod admin;
mod cache;
mod credentials;
mod decode;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod local;
mod usage;
mod warmup;

pub use cache::{Fetched, Found, Object, PutResult};
pub use credentials::Credentials;
pub use decode::{Event, Events, Prompt, Request};
pub use error::{ClientError, Result};
pub use esker_proto::v1;
pub use local::{Filled, LocalClient, LocalEvent, LocalFetch};
pub use warmup::Watched;

use std::time::Duration;

use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use credentials::Bearer;
use esker_proto::MAX_MESSAGE_BYTES;
use v1::admin_client::AdminClient;
use v1::decoder_client::DecoderClient;
use v1::prefix_cache_client::PrefixCacheClient;
use v1::usage_client::UsageClient;
use v1::warmup_client::WarmupClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What a node may send before it has been taken: in one stream, which is a few chunks of a fetch, and over the connection.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Largest HTTP/2 frame: a chunk of a fetch and what is around it. Small ones cost the node a system call every 16 KiB.
const FRAME_BYTES: u32 = (1 << 20) + (4 << 10);

/// A connection to one node. Cheap to clone; all clones share the connection.
#[derive(Clone)]
pub struct Client {
    cache: PrefixCacheClient<Calls>,
    decoder: DecoderClient<Calls>,
    usage: UsageClient<Calls>,
    warmup: WarmupClient<Calls>,
    admin: AdminClient<Calls>,
}

/// A connection, and who calls over it.
type Calls = InterceptedService<Channel, Bearer>;

impl Client {
    /// Connects to `address`, such as `127.0.0.1:7410`, `http://node-3:7410` or `unix:///run/esker.sock`.
    pub async fn connect(address: &str) -> Result<Self> {
        Self::connect_as(address, &Credentials::default()).await
    }

    /// Connects to a node that asks who calls.
    pub async fn connect_as(address: &str, credentials: &Credentials) -> Result<Self> {
        let whole = address.contains("://") || address.starts_with("unix:");
        let url = if whole { address.to_owned() } else { format!("{}://{address}", credentials.scheme()) };
        let fail = |source| ClientError::Connect { address: address.to_owned(), source };
        let endpoint = tuned(credentials.endpoint(&url)?);
        let bearer = credentials.bearer()?;
        Ok(Self::calling(endpoint.connect().await.map_err(fail)?, bearer))
    }

    /// Over a channel that the caller has set up: with TLS, a certificate of its own, other time-outs. [`tuned`] makes it fast.
    pub fn over(channel: Channel) -> Self {
        Self::calling(channel, Bearer::default())
    }

    fn calling(channel: Channel, bearer: Bearer) -> Self {
        let calls = InterceptedService::new(channel, bearer);
        Self {
            cache: PrefixCacheClient::new(calls.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            decoder: DecoderClient::new(calls.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            warmup: WarmupClient::new(calls.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            admin: AdminClient::new(calls.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            usage: UsageClient::new(calls).max_decoding_message_size(MAX_MESSAGE_BYTES),
        }
    }
}

/// An endpoint with the windows and frames that fetches of many megabytes need.
pub fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
}
