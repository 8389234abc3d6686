//! The block device below a folder, as Linux tells of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Sectors of `/sys/dev/block/*/stat` have 512 bytes whatever the device's have.
const SECTOR_BYTES: u64 = 512;

/// See the module.
pub(super) struct Device {
    pub(super) name: String,
    /// By everything since the machine started.
    pub(super) written_bytes: u64,
}

/// `None` where the folder lies on no block device, as on an overlay or a network.
pub(super) fn of(folder: &Path) -> Option<Device> {
    let number = fs::metadata(folder).ok()?.dev();
    // Of Linux's device numbers (makedev(3)).
    let major = (number >> 8) & 0xfff | (number >> 32) & !0xfff;
    let minor = number & 0xff | (number >> 12) & !0xff;
    let path = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let written_bytes = written(&fs::read_to_string(path.join("stat")).ok()?)?;
    Some(Device { name: path.file_name()?.to_string_lossy().into_owned(), written_bytes })
}

/// The seventh number of `stat` (Documentation/block/stat.rst).
fn written(stat: &str) -> Option<u64> {
    stat.split_whitespace().nth(6)?.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_written_are_found() {
        let stat = "  179031     1200 13600210    80230   511200   300100  2048   92100   0   71000   172330";
        assert_eq!(written(stat), Some(1 << 20));
        assert_eq!(written("1 2 3"), None);
    }
}
