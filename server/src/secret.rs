//! The root secret: from which every scope key of this deployment is derived.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use esker_prefix::RootSecret;

const LEN: usize = 32;

/// Reads `DIR/root-secret`, making it on first use. Losing the file orphans every stored block; leaking it lets
/// its holder name them.
pub(crate) fn root_secret(dir: &Path) -> anyhow::Result<RootSecret> {
    let path = dir.join("root-secret");
    if !path.exists() {
        create(dir, &path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let Ok(secret) = <[u8; LEN]>::try_from(bytes.as_slice()) else {
        bail!("{} must hold {LEN} bytes, has {}: restore it from a backup", path.display(), bytes.len());
    };
    Ok(RootSecret::new(secret))
}

/// Written under another name, flushed, then renamed: a crash leaves either no secret or a whole one.
fn create(dir: &Path, path: &Path) -> std::io::Result<()> {
    let mut secret = [0; LEN];
    File::open("/dev/urandom")?.read_exact(&mut secret)?;
    let draft = dir.join("root-secret.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(&secret)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use esker_prefix::{ScopeKey, ScopeKind};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_secret_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let key = |secret| ScopeKey::derive(&secret, ScopeKind::Private, "a", 0);
        let first = key(root_secret(dir.path()).unwrap());
        assert!(first == key(root_secret(dir.path()).unwrap()));
        let mode = std::fs::metadata(dir.path().join("root-secret")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_cut_secret_is_an_error_not_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("root-secret"), b"short").unwrap();
        assert!(root_secret(dir.path()).unwrap_err().to_string().contains("must hold 32 bytes, has 5"));
    }
}
