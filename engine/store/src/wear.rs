//! Wear: what was ever written to the drive for what was accepted, across restarts. A figure for people and no promise: it is
//! written down every few seconds without a flush, and a crash may cost the last of it or all.
//!
//! ```text
//! DIR/wear, one line of text: esker-wear 1 WRITTEN_BYTES ACCEPTED_BYTES
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use crate::stats::Counters;

/// Bytes written to the device, and bytes of planes that were accepted for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wear {
    /// Written: records with their headers and padding, and the pages of segments.
    pub written_bytes: u64,
    /// Accepted: raw bytes of what was stored.
    pub accepted_bytes: u64,
}

/// The file, and what it said when the store was opened.
#[derive(Debug)]
pub(crate) struct WearFile {
    path: PathBuf,
    before: Wear,
}

impl WearFile {
    pub(crate) fn open(dir: &Path) -> Self {
        Self { path: dir.join("wear"), before: peek(dir) }
    }

    /// Since the store was made.
    pub(crate) fn total(&self, counters: &Counters) -> Wear {
        Wear {
            written_bytes: self.before.written_bytes + counters.written_bytes.get(),
            accepted_bytes: self.before.accepted_bytes + counters.stored_raw_bytes.get(),
        }
    }

    pub(crate) fn save(&self, counters: &Counters) {
        let Wear { written_bytes, accepted_bytes } = self.total(counters);
        let new = self.path.with_extension("wear-new");
        let saved = fs::write(&new, format!("esker-wear 1 {written_bytes} {accepted_bytes}\n"))
            .and_then(|()| fs::rename(&new, &self.path));
        if let Err(error) = saved {
            tracing::debug!(%error, "the wear could not be written down");
        }
    }
}

/// What the file in `dir` says; nothing if there is none or it cannot be understood.
pub(crate) fn peek(dir: &Path) -> Wear {
    let text = fs::read_to_string(dir.join("wear")).unwrap_or_default();
    let mut words = text.split_whitespace();
    if (words.next(), words.next()) != (Some("esker-wear"), Some("1")) {
        return Wear::default();
    }
    let mut number = || words.next()?.parse().ok();
    match (number(), number()) {
        (Some(written_bytes), Some(accepted_bytes)) => Wear { written_bytes, accepted_bytes },
        _ => Wear::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wear_goes_on_across_restarts_and_nonsense_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let counters = Counters::default();
        counters.written_bytes.add(100);
        counters.stored_raw_bytes.add(90);
        WearFile::open(dir.path()).save(&counters);
        let again = WearFile::open(dir.path());
        again.save(&counters);
        assert_eq!(peek(dir.path()), Wear { written_bytes: 200, accepted_bytes: 180 });
        for text in ["", "esker-wear 2 1 1", "esker-wear 1 5", "esker-wear 1 x 1"] {
            fs::write(dir.path().join("wear"), text).unwrap();
            assert_eq!(peek(dir.path()), Wear::default(), "{text:?}");
        }
    }
}
