//! Compiles the `.proto` files with protox, so that nobody has to install protoc.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["cache", "decoder", "sessions", "warmup", "usage", "admin", "events", "local"]
        .map(|name| format!("esker/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("esker_descriptor.bin"), prost::Message::encode_to_vec(&descriptors))?;
    // Payload bytes stay shared buffers from the socket to the disk.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
