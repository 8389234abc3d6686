//! Tests that break the store on purpose, and so need to reach inside. Behaviour seen from outside is in `tests/`.

mod breaker;
#[path = "../tests/common/mod.rs"]
pub(crate) mod common;
mod crash;
mod damage;
mod faults;
mod fetching;
mod fsck;
mod lapse;
mod nth;
mod parsers;
mod power;
mod scrub;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::index::{Changes, Entry};
use crate::{Store, StoreSettings};
use esker_prefix::ObjectId;

/// The store is shared by threads; a fetch moves to the one that drives it.
const fn is_shared<T: Send + Sync>() {}
const fn is_moved<T: Send>() {}
const _: () = is_shared::<Store>();
const _: () = is_moved::<crate::Fetch>();

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("segments/{number:08}.seg"))
}

fn segment(dir: &Path, number: u64) -> File {
    File::options().read(true).write(true).open(segment_path(dir, number)).unwrap()
}

fn flip(file: &File, offset: u64, mask: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
}

fn entry(store: &Store, id: ObjectId) -> Entry {
    let located = store.shared.table.get(id).unwrap();
    store.shared.index.get(located.spot).unwrap().unwrap()
}

/// Makes the table and the index mean `entry` by `id`.
fn set_entry(store: &Store, id: ObjectId, entry: &Entry) {
    let entry = Entry { id, ..*entry };
    let mut changes = Changes::default();
    changes.put(&entry);
    store.shared.index.write(changes).unwrap();
    store.shared.table.insert(&entry);
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            copy_dir(&item.path(), &target);
        } else {
            fs::copy(item.path(), target).unwrap();
        }
    }
}

/// Through the page cache: as fast as memory, for tests of many small reads.
/// A process that another test starts holds the lock of a closed store for a moment.
fn buffered() -> StoreSettings {
    StoreSettings {
        io_engines: vec![crate::io::IoEngine::PositionalBuffered],
        lock_wait: std::time::Duration::from_secs(10),
        ..common::settings()
    }
}
