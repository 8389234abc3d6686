//! HTTP/1.1 in small: one request over one connection, as bytes, so that a test can also send what no library would.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result};

/// A response.
#[derive(Debug)]
pub struct WebReply {
    /// Status code.
    pub status: u16,
    /// Head as text, lower case.
    pub head: String,
    /// Body, with chunks put together.
    pub body: String,
}

/// Sends a request and reads the response to its end. `headers` are whole lines.
pub fn web(address: &str, method: &str, path: &str, headers: &[&str], body: &str) -> Result<WebReply> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut request =
        format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    if !headers.iter().any(|line| line.starts_with("host:")) {
        request += &format!("host: {address}\r\n");
    }
    for line in headers {
        request += &format!("{line}\r\n");
    }
    stream.write_all(format!("{request}\r\n{body}").as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let head = head.to_lowercase();
    let body = if head.contains("transfer-encoding: chunked") { unchunked(body)? } else { body.to_owned() };
    Ok(WebReply { status, head, body })
}

fn unchunked(mut rest: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (length, after) = rest.split_once("\r\n").context("a chunk without a length")?;
        let length = usize::from_str_radix(length, 16)?;
        if length == 0 {
            return Ok(whole);
        }
        whole += after.get(..length).context("a chunk was cut")?;
        rest = after.get(length + 2..).context("a chunk was cut")?;
    }
}
