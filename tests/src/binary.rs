//! The `esker` binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The `esker` to be tested: `$ESKER_BIN`, or the one beside this test. Cargo builds it with `cargo test --workspace`,
/// because the server has an integration test of its own.
pub fn esker() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        if let Some(given) = std::env::var_os("ESKER_BIN") {
            return given.into();
        }
        let test = std::env::current_exe().expect("a test has an executable");
        let binary = test.ancestors().nth(2).expect("target/PROFILE/deps/test").join("esker");
        assert!(binary.exists(), "{} is needed: cargo build --release -p esker-server", binary.display());
        binary
    })
}

/// A new folder on the drive that holds the build: the system's temporary folder may be memory, which knows no
/// `O_DIRECT`.
pub fn scratch() -> TempDir {
    let test = std::env::current_exe().expect("a test has an executable");
    let parent = test.ancestors().nth(3).expect("target/PROFILE/deps/test").join("tmp");
    std::fs::create_dir_all(&parent).expect("the target folder can be written");
    TempDir::new_in(parent).expect("the target folder can be written")
}

/// Runs `esker` to its end.
pub fn output<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    Command::new(esker()).args(args).env("ESKER_LOG", "warn").output().expect("esker can be started")
}

/// What a process wrote, for people.
pub fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
