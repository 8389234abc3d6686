//! From the drive to a mounted file system: NBD socket, nbdfuse, loop device, ext4.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::nbd::Drive;

const DRIVE_BYTES: u64 = 96 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

type Result<T> = std::result::Result<T, String>;

/// A mounted drive. Taken apart when dropped, whether it still answers or not.
pub(super) struct Chain {
    folder: PathBuf,
    nbdfuse: Child,
    loop_device: Option<String>,
}

/// A drive with an empty file system.
pub(super) fn blank(folder: &Path) -> Result<Vec<u8>> {
    let image = folder.join("blank");
    File::create(&image).and_then(|file| file.set_len(DRIVE_BYTES)).map_err(|error| error.to_string())?;
    run("mkfs.ext4", &["-q".as_ref(), "-m".as_ref(), "0".as_ref(), image.as_os_str()])?;
    fs::read(&image).map_err(|error| error.to_string())
}

impl Chain {
    pub(super) fn up(drive: &Arc<Drive>, folder: &Path) -> Result<Self> {
        let text = |error: std::io::Error| error.to_string();
        let (socket, fuse, mount) = (folder.join("socket"), folder.join("fuse"), folder.join("mount"));
        fs::create_dir_all(&fuse).and_then(|()| fs::create_dir_all(&mount)).map_err(text)?;
        drive.serve(&socket).map_err(text)?;
        let device = fuse.join("drive");
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse.arg(&device).arg("--unix").arg(&socket).stdout(Stdio::null()).stderr(Stdio::null());
        let nbdfuse = nbdfuse.spawn().map_err(|error| format!("nbdfuse: {error}"))?;
        let mut chain = Self { folder: folder.to_owned(), nbdfuse, loop_device: None };
        let start = Instant::now();
        while fs::metadata(&device).map_or(0, |metadata| metadata.len()) != DRIVE_BYTES {
            let ended = chain.nbdfuse.try_wait().is_ok_and(|status| status.is_some());
            if ended || start.elapsed() > PATIENCE {
                return Err("nbdfuse does not show the drive".to_owned());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let words = ["--direct-io=on", "-f", "--show"].map(OsStr::new);
        let shown = run("losetup", &[&words[..], &[device.as_os_str()]].concat())?;
        let loop_device = chain.loop_device.insert(shown.trim().to_owned());
        run("mount", &["-t".as_ref(), "ext4".as_ref(), loop_device.as_ref(), mount.as_os_str()])?;
        Ok(chain)
    }

    /// Where the store lies.
    pub(super) fn store(&self) -> PathBuf {
        self.folder.join("mount/store")
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let mount = self.folder.join("mount");
        // Lazily, if need be: a drive without power cannot be written back to.
        if run("umount", &[mount.as_os_str()]).is_err() {
            let _ = run("umount", &["-l".as_ref(), mount.as_os_str()]);
        }
        if let Some(device) = &self.loop_device {
            let _ = run("losetup", &["-d".as_ref(), device.as_ref()]);
        }
        let fuse = self.folder.join("fuse");
        if run("umount", &[fuse.as_os_str()]).is_err() {
            let _ = run("umount", &["-l".as_ref(), fuse.as_os_str()]);
        }
        let start = Instant::now();
        while self.nbdfuse.try_wait().is_ok_and(|status| status.is_none()) {
            if start.elapsed() > Duration::from_secs(2) {
                let _ = self.nbdfuse.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What a command says, or why it failed.
fn run(program: &str, args: &[&OsStr]) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
