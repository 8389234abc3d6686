//! The Rust client of Esker: the prefix cache and the decoder of one node.
//!
//! Architecture invariant: speaks `esker.v1` and nothing else; holds no cache of its own. Values in and out are
//! those of `esker-prefix`.

mod cache;
mod decode;
mod error;
mod local;
mod usage;
mod warmup;

pub use cache::{Fetched, Found, Object, PutResult};
pub use decode::{Event, Events, Prompt, Request};
pub use error::{ClientError, Result};
pub use esker_proto::v1;
pub use local::{Filled, LocalClient, LocalEvent, LocalFetch};
pub use warmup::Watched;

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use esker_proto::MAX_MESSAGE_BYTES;
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
    cache: PrefixCacheClient<Channel>,
    decoder: DecoderClient<Channel>,
    usage: UsageClient<Channel>,
    warmup: WarmupClient<Channel>,
}

impl Client {
    /// Connects to `address`, such as `127.0.0.1:7410`, `http://node-3:7410` or `unix:///run/esker.sock`.
    pub async fn connect(address: &str) -> Result<Self> {
        let whole = address.contains("://") || address.starts_with("unix:");
        let url = if whole { address.to_owned() } else { format!("http://{address}") };
        let fail = |source| ClientError::Connect { address: address.to_owned(), source };
        let endpoint = tuned(Endpoint::from_shared(url).map_err(fail)?);
        Ok(Self::over(endpoint.connect().await.map_err(fail)?))
    }

    /// Over a channel that the caller has set up: with TLS, a certificate of its own, other time-outs. [`tuned`] makes it fast.
    pub fn over(channel: Channel) -> Self {
        Self {
            cache: PrefixCacheClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            decoder: DecoderClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            warmup: WarmupClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            usage: UsageClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
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
