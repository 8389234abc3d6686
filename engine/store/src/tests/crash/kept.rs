//! States that have failed are kept as files: threads decide what a seed comes to, an image is the same for ever.
//!
//! A failing state is written to `$ESKER_FAILED_IMAGES`, or else below the folder for temporary files. What is mended
//! afterwards goes to `images/` beside this file, and every run begins with those.
//!
//! ```text
//! one zstd frame of: "esker crash image 2\n", then fields, each u64 length LE and bytes
//!   why | segment_bytes | capacity_bytes | may_lose | later_s | clock, "" if there is none       numbers as text
//!   count | then for each file of the medium: name | bytes | numbers of sectors that were given back, u32 LE
//!   count | then for each pair of the index: key | value
//!   count | then for each object: kind u8 and hash | "must" or "may" | digest of the planes that are right
//! ```
//!
//! An object may be named several times, with different planes that are all right. What is named and found must have
//! planes that are right; an object with "never" and no digest may not be found unless another line allows it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use esker_prefix::{BlockHash, ObjectId, ObjectKind};

use super::State;
use super::oracle::Oracle;
use super::script::{number_of, scratch};
use crate::index::memory::{self, Contents};
use crate::io::sim::{Image, SimDisk};
use crate::tests::common::{ManualClock, all, fetch, planes};
use crate::{Store, StoreSettings};

const MAGIC: &[u8] = b"esker crash image 2\n";

/// Writes a state down. Says where.
pub(super) fn keep(state: &State<'_>, name: &str, why: &str) -> String {
    let dir = std::env::var_os("ESKER_FAILED_IMAGES")
        .map_or_else(|| std::env::temp_dir().join("esker-failed-images"), PathBuf::from);
    let path = dir.join(format!("{name}.image"));
    let image = Kept::of(state, why).encode();
    let written = std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, image));
    match written {
        Ok(()) => format!("the state is kept in {}", path.display()),
        Err(error) => format!("the state could not be kept in {}: {error}", path.display()),
    }
}

#[test]
fn states_that_have_failed_once_hold() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tests/crash/images");
    let mut images: Vec<PathBuf> =
        std::fs::read_dir(&dir).unwrap().map(|item| item.unwrap().path()).collect();
    images.retain(|path| path.extension().is_some_and(|extension| extension == "image"));
    assert!(!images.is_empty(), "no images in {}", dir.display());
    for path in images {
        let kept = Kept::decode(&std::fs::read(&path).unwrap()).unwrap();
        kept.examine().unwrap_or_else(|failure| panic!("{} ({}): {failure}", path.display(), kept.why));
        // The control: what is right is told from what is not.
        let mut wrong = kept.clone();
        wrong
            .objects
            .iter_mut()
            .filter(|(_, what, _)| what == "must")
            .for_each(|(.., digest)| digest[0] ^= 1);
        assert!(wrong.examine().is_err(), "{}: the oracle is blind", path.display());
    }
}

/// See the module.
#[derive(Clone)]
struct Kept {
    why: String,
    segment_bytes: u64,
    capacity_bytes: u64,
    may_lose: u64,
    later_s: u64,
    clock: String,
    files: Vec<(String, Vec<u8>, Vec<usize>)>,
    index: Contents,
    objects: Vec<(ObjectId, String, Vec<u8>)>,
}

impl Kept {
    fn of(state: &State<'_>, why: &str) -> Self {
        Self {
            why: why.to_owned(),
            segment_bytes: state.settings.segment_bytes,
            capacity_bytes: state.settings.capacity_bytes,
            may_lose: state.may_lose as u64,
            later_s: state.later_s,
            clock: state.clock.clone().unwrap_or_default(),
            files: state
                .image
                .files()
                .map(|(name, bytes, holes)| (name.to_owned(), bytes.to_vec(), holes))
                .collect(),
            index: state.index.clone(),
            objects: objects(&state.oracle),
        }
    }

    fn examine(&self) -> Result<(), String> {
        let dir = scratch();
        if !self.clock.is_empty() {
            std::fs::write(dir.path().join("clock"), &self.clock).unwrap();
        }
        memory::expect(&self.index);
        let settings = StoreSettings {
            segment_bytes: self.segment_bytes,
            capacity_bytes: self.capacity_bytes,
            scrub_bytes_per_s: 0,
            ..StoreSettings::default()
        };
        let (disk, clock) =
            (SimDisk::open(Image::of(self.files.iter().cloned()), u64::MAX), ManualClock::after_power_cut());
        let store = Store::open_on_at(dir.path(), settings, disk, clock.clone());
        let store = store.map_err(|error| format!("does not open: {error}"))?;
        if self.later_s > 0 {
            clock.pass(Duration::from_secs(self.later_s));
            store.keep_house();
        }
        let mut right: HashMap<ObjectId, Vec<&[u8]>> = HashMap::new();
        for (id, what, digest) in &self.objects {
            let digests = right.entry(*id).or_default();
            if what != "never" {
                digests.push(digest);
            }
        }
        let ids: Vec<ObjectId> = right.keys().copied().collect();
        let found: Vec<_> = store.get(&ids).into_iter().flatten().collect();
        let mut there = HashMap::new();
        for (found, got) in found.iter().zip(fetch(&store, all(found.clone()))) {
            let Ok(bytes) = got else { continue };
            let digest = digest(&bytes);
            if !right[&found.id].contains(&&digest[..]) {
                return Err(format!("{:?} has bytes that it should not have", found.id));
            }
            there.insert(found.id, digest);
        }
        let musts = self.objects.iter().filter(|(_, what, _)| what == "must");
        let lost = musts.filter(|(id, _, digest)| there.get(id) != Some(digest)).count() as u64;
        if lost > self.may_lose { Err(format!("{lost} lost")) } else { Ok(()) }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Fields(MAGIC.to_vec());
        out.text(&self.why);
        for number in [self.segment_bytes, self.capacity_bytes, self.may_lose, self.later_s] {
            out.number(number);
        }
        out.text(&self.clock);
        out.number(self.files.len() as u64);
        for (name, bytes, holes) in &self.files {
            let holes = holes.iter().flat_map(|&sector| u32::try_from(sector).unwrap().to_le_bytes());
            out.text(name).field(bytes).field(&holes.collect::<Vec<u8>>());
        }
        out.number(self.index.len() as u64);
        self.index.iter().for_each(|(key, value)| {
            out.field(key);
            out.field(value);
        });
        out.number(self.objects.len() as u64);
        for (id, what, digest) in &self.objects {
            let mut name = vec![id.kind as u8];
            name.extend(id.hash.0);
            out.field(&name);
            out.text(what).field(digest);
        }
        zstd::bulk::compress(&out.0, 19).unwrap()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = zstd::bulk::decompress(bytes, 64 << 20).ok()?;
        let mut rest = Rest(bytes.strip_prefix(MAGIC)?);
        Some(Self {
            why: rest.text()?,
            segment_bytes: rest.number()?,
            capacity_bytes: rest.number()?,
            may_lose: rest.number()?,
            later_s: rest.number()?,
            clock: rest.text()?,
            files: rest.many(|rest| Some((rest.text()?, rest.field()?.to_vec(), rest.sectors()?)))?,
            index: rest.many(|rest| Some((rest.field()?.into(), rest.field()?.into())))?,
            objects: rest.many(|rest| {
                let (&kind, hash) = rest.field()?.split_first()?;
                let id =
                    ObjectId { kind: ObjectKind::from_u8(kind)?, hash: BlockHash(hash.try_into().ok()?) };
                Some((id, rest.text()?, rest.field()?.to_vec()))
            })?,
        })
    }
}

/// What the oracle knows, by object.
fn objects(oracle: &Oracle<'_>) -> Vec<(ObjectId, String, Vec<u8>)> {
    let mut lines: BTreeMap<(ObjectId, Vec<u8>), &str> = BTreeMap::new();
    for (position, attempt) in oracle.attempts.iter().enumerate() {
        if oracle.must.contains_key(&number_of(attempt)) {
            continue;
        }
        match oracle.erased.contains(&position) {
            true => lines.entry((attempt.id, Vec::new())).or_insert("never"),
            false => lines.entry((attempt.id, digest(&planes(attempt)))).or_insert("may"),
        };
    }
    lines.extend(oracle.must.values().map(|(id, planes)| ((*id, digest(planes)), "must")));
    lines.into_iter().map(|((id, digest), what)| (id, what.to_owned(), digest)).collect()
}

fn digest(planes: &[Bytes]) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    for plane in planes {
        hasher.update(&(plane.len() as u64).to_le_bytes()).update(plane);
    }
    hasher.finalize().as_bytes().to_vec()
}

struct Fields(Vec<u8>);

impl Fields {
    fn field(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend((bytes.len() as u64).to_le_bytes());
        self.0.extend(bytes);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.field(text.as_bytes())
    }

    fn number(&mut self, number: u64) {
        self.text(&number.to_string());
    }
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn field(&mut self) -> Option<&'a [u8]> {
        let (len, rest) = self.0.split_first_chunk()?;
        let (field, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.0 = rest;
        Some(field)
    }

    fn sectors(&mut self) -> Option<Vec<usize>> {
        let (sectors, rest) = self.field()?.as_chunks();
        let number = |sector| usize::try_from(u32::from_le_bytes(sector)).unwrap();
        rest.is_empty().then(|| sectors.iter().copied().map(number).collect())
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.field()?.to_vec()).ok()
    }

    fn number(&mut self) -> Option<u64> {
        self.text()?.parse().ok()
    }

    fn many<T>(&mut self, one: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        (0..self.number()?).map(|_| one(self)).collect()
    }
}
