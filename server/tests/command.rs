//! The `esker` command itself. As a test of this package it also makes cargo build the binary, which the tests of
//! `esker-tests` start.

use std::process::Command;

#[test]
fn the_version_is_the_package_s() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_esker")).arg("--version").output().expect("esker can be started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.trim(), concat!("esker ", env!("CARGO_PKG_VERSION")));
}
