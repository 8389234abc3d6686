//! ZMTP 3.0 (ZeroMQ RFC 23) with the mechanism NULL, the side that listens: greeting, handshake, frames.
//!
//! Written here since it is small, and since the crate `zeromq` (0.7) sets aside whatever length a peer's frame claims, so that nine
//! bytes from anyone end the process. Here a frame is measured before anything is set aside for it.
//!
//! A peer's message is read to its end or not at all: the futures here are not to be dropped half way, but with their connection.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Longest frame of a peer: a command, a topic to subscribe to, a number.
const MAX_FRAME_BYTES: u64 = 4096;
/// Most frames of a peer's message.
const MAX_FRAMES: usize = 8;
/// A peer that has not finished its handshake by then is let go, and so is one that takes nothing for as long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes gathered before they are written.
const WRITE_BUFFER: usize = 64 << 10;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

const MECHANISM: &[u8; 20] = b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// What a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Sends to all that subscribe.
    Publisher,
    /// Answers each that asks.
    Router,
}

impl Kind {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Publisher => b"PUB",
            Self::Router => b"ROUTER",
        }
    }

    /// Whether the two kinds talk to each other.
    fn takes(self, peer: &[u8]) -> bool {
        match self {
            Self::Publisher => [&b"SUB"[..], b"XSUB"].contains(&peer),
            Self::Router => [&b"REQ"[..], b"DEALER", b"ROUTER"].contains(&peer),
        }
    }
}

/// What a peer says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// A message, by its frames.
    Message(Vec<Vec<u8>>),
    /// It wants what begins so.
    Subscribe(Vec<u8>),
    /// It does not any more.
    Cancel(Vec<u8>),
    /// It wants a sign of life, with these bytes in it.
    Ping(Vec<u8>),
}

/// From a peer.
pub(super) struct Reader<S = OwnedReadHalf> {
    stream: BufReader<S>,
    kind: Kind,
}

/// To a peer.
pub(super) struct Writer {
    stream: BufWriter<OwnedWriteHalf>,
}

/// Greets a peer and agrees with it on who is what.
pub(super) async fn accept(stream: TcpStream, kind: Kind) -> io::Result<(Reader, Writer)> {
    timeout(PATIENCE, shake_hands(stream, kind)).await?
}

async fn shake_hands(stream: TcpStream, kind: Kind) -> io::Result<(Reader, Writer)> {
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.into_split();
    let mut writer = Writer { stream: BufWriter::with_capacity(WRITE_BUFFER, writer) };
    let mut reader = Reader { stream: BufReader::new(reader), kind };
    writer.stream.write_all(&greeting()).await?;
    writer.frame(COMMAND, &ready(kind)).await?;
    writer.stream.flush().await?;

    reader.meet().await?;
    Ok((reader, writer))
}

fn greeting() -> [u8; 64] {
    let mut greeting = [0; 64];
    // A length for peers of old, between the two marks; then version 3.0.
    (greeting[0], greeting[8], greeting[9], greeting[10]) = (0xff, 1, 0x7f, 3);
    greeting[12..32].copy_from_slice(MECHANISM);
    greeting
}

fn ready(kind: Kind) -> Vec<u8> {
    let name = kind.name();
    let length = u32::try_from(name.len()).unwrap_or_default().to_be_bytes();
    [b"\x05READY\x0bSocket-Type", &length[..], name].concat()
}

/// The property of that name.
fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    loop {
        let (&length, rest) = properties.split_first()?;
        let (name, rest) = rest.split_at_checked(length.into())?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
}

impl<S: AsyncRead + Unpin> Reader<S> {
    /// The peer's greeting and its part of the handshake.
    async fn meet(&mut self) -> io::Result<()> {
        let mut theirs = [0; 64];
        self.stream.read_exact(&mut theirs).await?;
        if (theirs[0], theirs[9]) != (0xff, 0x7f) || theirs[10] < 3 {
            return Err(bad("a peer does not speak ZMTP 3"));
        }
        if &theirs[12..32] != MECHANISM {
            return Err(bad("a peer asks for another mechanism than NULL"));
        }
        let (flags, body) = self.frame().await?;
        let Some(properties) = body.strip_prefix(b"\x05READY").filter(|_| flags & COMMAND != 0) else {
            return Err(bad("a peer's handshake is not READY"));
        };
        match socket_type(properties) {
            Some(peer) if self.kind.takes(peer) => Ok(()),
            _ => Err(bad("a peer's kind of socket does not go with this one")),
        }
    }

    /// The next that the peer says.
    pub(super) async fn next(&mut self) -> io::Result<Said> {
        let mut frames = Vec::new();
        loop {
            let (flags, body) = self.frame().await?;
            if flags & COMMAND != 0 {
                match command(&body) {
                    Some(said) => return Ok(said),
                    // Others are for peers that know them.
                    None => continue,
                }
            }
            frames.push(body);
            if frames.len() > MAX_FRAMES {
                return Err(bad("a peer's message has too many frames"));
            }
            if flags & MORE == 0 {
                return Ok(match (self.kind, &frames[..]) {
                    // As subscriptions were before they were commands.
                    (Kind::Publisher, [only]) if only.first() == Some(&1) => {
                        Said::Subscribe(only[1..].to_vec())
                    }
                    (Kind::Publisher, [only]) if only.first() == Some(&0) => Said::Cancel(only[1..].to_vec()),
                    _ => Said::Message(frames),
                });
            }
        }
    }

    async fn frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let flags = self.stream.read_u8().await?;
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(bad("a peer's frame has flags that are not known"));
        }
        let length = match flags & LONG {
            0 => self.stream.read_u8().await?.into(),
            _ => self.stream.read_u64().await?,
        };
        if length > MAX_FRAME_BYTES {
            return Err(bad("a peer's frame is too long"));
        }
        let mut body = vec![0; usize::try_from(length).unwrap_or_default()];
        self.stream.read_exact(&mut body).await?;
        Ok((flags, body))
    }
}

fn command(body: &[u8]) -> Option<Said> {
    let (&length, rest) = body.split_first()?;
    let (name, rest) = rest.split_at_checked(length.into())?;
    match name {
        b"SUBSCRIBE" => Some(Said::Subscribe(rest.to_vec())),
        b"CANCEL" => Some(Said::Cancel(rest.to_vec())),
        // Two bytes say for how long the peer lives by it.
        b"PING" => Some(Said::Ping(rest.get(2..)?.to_vec())),
        _ => None,
    }
}

impl Writer {
    /// A message, which is sent at the latest by the next [`Self::flush`].
    pub(super) async fn message(&mut self, frames: &[&[u8]]) -> io::Result<()> {
        timeout(PATIENCE, async {
            for (number, frame) in frames.iter().enumerate() {
                self.frame(if number + 1 < frames.len() { MORE } else { 0 }, frame).await?;
            }
            Ok(())
        })
        .await?
    }

    /// The answer to a ping.
    pub(super) async fn pong(&mut self, context: &[u8]) -> io::Result<()> {
        timeout(PATIENCE, self.frame(COMMAND, &[b"\x04PONG", context].concat())).await?
    }

    /// Sends what was gathered.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        timeout(PATIENCE, self.stream.flush()).await?
    }

    async fn frame(&mut self, flags: u8, body: &[u8]) -> io::Result<()> {
        match u8::try_from(body.len()) {
            Ok(length) => self.stream.write_all(&[flags, length]).await?,
            Err(_) => {
                self.stream.write_u8(flags | LONG).await?;
                self.stream.write_u64(body.len() as u64).await?;
            }
        }
        self.stream.write_all(body).await
    }
}

/// For fuzzing: a peer says this and no more. It is understood or refused, and nothing that it did not say is made of it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(said: &[u8]) -> io::Result<usize> {
    use futures_util::FutureExt;
    let kinds = [Kind::Publisher, Kind::Router];
    let heard = kinds.map(|kind| {
        let mut reader = Reader { stream: BufReader::new(said), kind };
        let all = async {
            reader.meet().await?;
            let (mut count, mut bytes) = (0, 0);
            loop {
                match reader.next().await {
                    Ok(Said::Message(frames)) => {
                        assert!((1..=MAX_FRAMES).contains(&frames.len()), "{} frames", frames.len());
                        bytes += frames.iter().map(Vec::len).sum::<usize>();
                    }
                    Ok(Said::Subscribe(said) | Said::Cancel(said) | Said::Ping(said)) => bytes += said.len(),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(count),
                    Err(error) => return Err(error),
                }
                count += 1;
                assert!(bytes <= said.len(), "more was heard than was said");
            }
        };
        all.now_or_never().expect("bytes in memory are there at once")
    });
    let [publisher, router] = heard;
    publisher.or(router)
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// A peer that subscribes to all, and what it hears.
    pub(in crate::events) async fn subscriber(address: std::net::SocketAddr) -> Reader {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(&[&hello(b"SUB")[..], b"\0\x01\x01", b"\x04\x07\x04PING\0\0"].concat())
            .await
            .unwrap();
        let (stream, end) = stream.into_split();
        // It has no more to say, but stays.
        end.forget();
        let mut reader = Reader { stream: BufReader::new(stream), kind: Kind::Router };
        let mut theirs = [0; 64];
        reader.stream.read_exact(&mut theirs).await.unwrap();
        reader.frame().await.unwrap();
        // The answer comes after the subscription was heard.
        assert_eq!(reader.frame().await.unwrap(), (COMMAND, b"\x04PONG".to_vec()));
        reader
    }

    /// A peer that says this and no more, and what the socket made of it.
    async fn meets(kind: Kind, said: &[u8]) -> (io::Result<Vec<Said>>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        peer.write_all(said).await.unwrap();
        peer.shutdown().await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let understood = async {
            let (mut reader, mut writer) = accept(stream, kind).await?;
            writer.message(&[b"", &[7; 300]]).await?;
            writer.flush().await?;
            let mut all = Vec::new();
            loop {
                match reader.next().await {
                    Ok(said) => all.push(said),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(all),
                    Err(error) => return Err(error),
                }
            }
        };
        let understood = understood.await;
        let mut heard = Vec::new();
        // Whoever is cut off while speaking gets a reset.
        let _ = peer.read_to_end(&mut heard).await;
        (understood, heard)
    }

    fn hello(kind: &[u8]) -> Vec<u8> {
        let mut hello = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
        hello.extend_from_slice(b"NULL");
        hello.resize(64, 0);
        let ready = [b"\x05READY\x0bSocket-Type\0\0\0", &[u8::try_from(kind.len()).unwrap()][..], kind];
        let ready = [&ready.concat()[..], b"\x08Identity\0\0\0\0"].concat();
        hello.extend_from_slice(&[4, u8::try_from(ready.len()).unwrap()]);
        hello.extend_from_slice(&ready);
        hello
    }

    #[tokio::test]
    async fn what_passes_between_a_publisher_and_a_subscriber() {
        let said = [&hello(b"SUB")[..], b"\0\x03\x01kv", b"\x04\x0c\x09SUBSCRIBEab", b"\0\x03\0kv"].concat();
        let said = [&said[..], b"\x04\x09\x04PING\0\x0axy", b"\x04\x04\x03HEY", b"\0\x01\x01"].concat();
        let (understood, heard) = meets(Kind::Publisher, &said).await;
        let expected = [
            Said::Subscribe(b"kv".to_vec()),
            Said::Subscribe(b"ab".to_vec()),
            Said::Cancel(b"kv".to_vec()),
            Said::Ping(b"xy".to_vec()),
            Said::Subscribe(Vec::new()),
        ];
        assert_eq!(understood.unwrap(), expected);
        let mut golden = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 0];
        golden.extend_from_slice(b"NULL");
        golden.resize(64, 0);
        golden.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB");
        golden.extend_from_slice(b"\x01\0\x02\0\0\0\0\0\0\x01\x2c");
        golden.extend_from_slice(&[7; 300]);
        assert_eq!(heard, golden);
    }

    /// Sound conversations with bytes changed, taken out and repeated: no panic, nothing made up.
    #[test]
    fn whatever_a_peer_says_is_understood_or_refused() {
        let mut state = 0x5eed_u64;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % bound
        };
        let more: [&[u8]; 5] = [
            b"\0\x03\x01kv",
            b"\x04\x0c\x09SUBSCRIBEab",
            b"\x04\x09\x04PING\0\x0axy",
            b"\x02\0\0\0\0\0\0\0\x02\x01a",
            b"\x01\0\0\x02\x01\x02",
        ];
        let (mut understood, mut refused) = (0, 0);
        for _ in 0..100_000 {
            let mut said = hello([&b"SUB"[..], b"XSUB", b"REQ", b"DEALER"][below(4)]);
            for _ in 0..below(6) {
                said.extend_from_slice(more[below(more.len())]);
            }
            for _ in 0..below(4) {
                let at = below(said.len());
                match below(4) {
                    0 => said[at] ^= 1 << below(8),
                    1 => said[at] = [0, 1, 0x7f, 0x80, 0xff][below(5)],
                    2 => said.truncate(at.max(1)),
                    _ => {
                        let again = said[at..].to_vec();
                        said.extend_from_slice(&again);
                    }
                }
            }
            match hear(&said) {
                Ok(_) => understood += 1,
                Err(_) => refused += 1,
            }
        }
        assert!(understood > 1_000 && refused > 1_000, "{understood} understood, {refused} refused");
    }

    #[tokio::test]
    async fn a_router_takes_messages_of_several_frames() {
        let said = [&hello(b"REQ")[..], b"\x01\0\0\x02\x01\x02"].concat();
        let (understood, _) = meets(Kind::Router, &said).await;
        assert_eq!(understood.unwrap(), [Said::Message(vec![vec![], vec![1, 2]])]);
    }

    #[tokio::test]
    async fn who_breaks_the_rules_is_let_go() {
        let of = |more: &[u8]| [&hello(b"SUB")[..], more].concat();
        let mut other_mechanism = hello(b"SUB");
        other_mechanism[12..16].copy_from_slice(b"PLAI");
        let mut old = hello(b"SUB");
        old[10] = 2;
        for (said, why) in [
            (
                b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: somebody-with-a-long-name/1.0\r\n\r\n"
                    .to_vec(),
                "ZMTP",
            ),
            (old, "ZMTP"),
            (other_mechanism, "mechanism"),
            (hello(b"PULL"), "kind"),
            (hello(b"SUB")[..64].to_vec(), "end of file"),
            ([&hello(b"SUB")[..64], b"\0\x05READY"].concat(), "READY"),
            ([&hello(b"SUB")[..64], b"\x04\x08\x05READY\x0bS"].concat(), "kind"),
            (of(b"\x02\xff\xff\xff\xff\xff\xff\xff\xff"), "too long"),
            (of(b"\x02\x3f\xff\xff\xff\xff\xff\xff\xff"), "too long"),
            (of(b"\x08\0"), "flags"),
            (of(&b"\x01\0".repeat(9)), "too many"),
        ] {
            let error = meets(Kind::Publisher, &said).await.0.unwrap_err().to_string();
            assert!(error.contains(why), "{error}, not {why}");
        }
    }
}
