//! What a medium holds when nobody is using it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Random, SECTOR};

/// The files of a disk. Cheap to clone: files are copied when they are written to.
#[derive(Clone, Debug, Default)]
pub struct Image(BTreeMap<String, Arc<File>>);

/// One of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct File {
    bytes: Vec<u8>,
    /// Sectors that were given back.
    holes: BTreeSet<usize>,
}

/// What has been done to an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub name: String,
    /// The sector of it.
    pub sector: usize,
    /// In words.
    pub what: &'static str,
}

impl Image {
    /// Bytes of all files.
    pub fn len_bytes(&self) -> u64 {
        self.0.values().map(|file| file.bytes.len() as u64).sum()
    }

    /// Damages one sector that holds anything: a flipped bit, zeros, or the content of another one. `None` if all is
    /// zero.
    pub fn damage(&mut self, random: &mut Random) -> Option<Damage> {
        let written: Vec<(&String, usize)> = self
            .0
            .iter()
            .flat_map(|(name, file)| {
                let sectors = file.bytes.chunks(SECTOR).enumerate();
                sectors
                    .filter(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))
                    .map(move |(at, _)| (name, at))
            })
            .collect();
        let (name, sector) = *written.get(random.index(written.len()))?;
        let (from, other) = written[random.index(written.len())];
        let (name, other) = (name.clone(), sector_of(&self.0[from].bytes, other).to_vec());
        let bytes = self.get_mut(&name)?.bytes.chunks_mut(SECTOR).nth(sector)?;
        let what = match random.below(4) {
            0 => {
                bytes.fill(0);
                "zeroed"
            }
            1 => {
                bytes.copy_from_slice(&other[..bytes.len()]);
                "overwritten with another sector"
            }
            _ => {
                super::faulty::flip(bytes, random.index(SECTOR * 8));
                "one bit flipped"
            }
        };
        Some(Damage { name, sector, what })
    }

    /// Files by name: their bytes, and which of their sectors were given back.
    #[cfg(test)]
    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, &[u8], Vec<usize>)> {
        self.0
            .iter()
            .map(|(name, file)| (name.as_str(), &file.bytes[..], file.holes.iter().copied().collect()))
    }

    /// Of these files.
    #[cfg(test)]
    pub(crate) fn of(files: impl Iterator<Item = (String, Vec<u8>, Vec<usize>)>) -> Self {
        let file = |(name, bytes, holes): (_, _, Vec<usize>)| {
            (name, Arc::new(File { bytes, holes: holes.into_iter().collect() }))
        };
        Self(files.map(file).collect())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub(super) fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(|file| &file.bytes[..])
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut File> {
        self.0.get_mut(name).map(Arc::make_mut)
    }

    /// First byte at or behind `offset` that was given back.
    pub(super) fn next_hole(&self, name: &str, offset: usize) -> Option<usize> {
        let holes = &self.0.get(name)?.holes;
        holes.range(offset / SECTOR..).next().map(|sector| (sector * SECTOR).max(offset))
    }

    pub(super) fn insert(&mut self, name: &str, bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), Arc::new(File { bytes, holes: BTreeSet::new() }));
    }

    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }
}

impl File {
    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Changes what is there from `offset` on, a whole number of sectors: written, or given back and zero.
    pub(super) fn put(&mut self, offset: usize, bytes: &[u8], hole: bool) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        let sectors = offset / SECTOR..(offset + bytes.len()).div_ceil(SECTOR);
        for sector in sectors {
            let _ = if hole { self.holes.insert(sector) } else { self.holes.remove(&sector) };
        }
    }
}

fn sector_of(file: &[u8], sector: usize) -> &[u8] {
    let start = sector * SECTOR;
    &file[start..file.len().min(start + SECTOR)]
}
