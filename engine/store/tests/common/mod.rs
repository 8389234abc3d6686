//! Objects to store, and the two calls that every test makes.

#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod figures;
pub mod life;

use bytes::Bytes;
use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeTag, WriterId};
use esker_store::{
    FetchEvent, FetchOrder, FetchRequest, Found, MissKind, PlaneSelection, PutObject, PutPlane, Store,
    StoreSettings, TtlClass,
};

/// Small segments, so that tests cross their borders, and nothing that reads in the background.
pub fn settings() -> StoreSettings {
    StoreSettings {
        segment_bytes: 1 << 20,
        scrub_bytes_per_s: 0,
        compressed_from_bytes: 0,
        ..StoreSettings::default()
    }
}

pub fn id(number: u64) -> ObjectId {
    let mut hash = [0xa5; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    ObjectId { kind: ObjectKind::Block, hash: BlockHash(hash) }
}

/// Bytes that zstd cannot shrink, or can.
pub fn content(seed: u64, len: usize, compressible: bool) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = (0..len).map(|position| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let byte = (state >> 32) as u8;
        if compressible { byte & 3 | (position as u8 & 0x40) } else { byte }
    });
    bytes.collect::<Vec<u8>>().into()
}

/// A root object of one plane per length, the odd ones compressible.
pub fn object(number: u64, seed: u64, lens: &[usize]) -> PutObject {
    let plane = |(position, &len): (usize, &usize)| PutPlane {
        spec: PlaneSpec { group: position as u16, first_layer: 0, layers: 2, len_bytes: len as u64 },
        shape: None,
        bytes: content(seed * 31 + position as u64, len, position % 2 == 1),
    };
    PutObject {
        id: id(number),
        parent: None,
        namespace: NamespaceId([7; 32]),
        scope: ScopeTag([9; 16]),
        writer: WriterId::UNNAMED,
        class: TtlClass::default(),
        tokens: 128,
        planes: lens.iter().enumerate().map(plane).collect(),
    }
}

/// A chain: each object the child of the one before.
pub fn chain(first: u64, count: u64, lens: &[usize]) -> Vec<PutObject> {
    let link = |number| {
        let mut object = object(number, number, lens);
        object.parent = (number > first).then(|| id(number - 1));
        object.tokens = 128 * (number - first + 1);
        object
    };
    (first..first + count).map(link).collect()
}

pub fn all(objects: Vec<Found>) -> FetchRequest {
    FetchRequest { objects, planes: PlaneSelection::All, order: FetchOrder::ByObject, deadline: None }
}

/// Fetches whole objects: the planes of each, or why not.
pub fn fetch(store: &Store, request: FetchRequest) -> Vec<Result<Vec<Bytes>, MissKind>> {
    let mut objects: Vec<Result<Vec<Bytes>, MissKind>> = vec![Ok(Vec::new()); request.objects.len()];
    for event in store.fetch(request) {
        match event {
            FetchEvent::Plane { object, plane, bytes, .. } => {
                let planes = objects[object].as_mut().expect("nothing follows a miss");
                assert_eq!(planes.len(), plane, "planes come in order");
                planes.push(bytes);
            }
            FetchEvent::Miss { object, kind } => objects[object] = Err(kind),
        }
    }
    objects
}

pub fn planes(object: &PutObject) -> Vec<Bytes> {
    object.planes.iter().map(|plane| plane.bytes.clone()).collect()
}

/// A clock that moves when it is told to.
pub struct ManualClock(std::sync::Mutex<(u64, std::time::Duration)>);

impl ManualClock {
    /// A machine that has just booted.
    pub fn new() -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self(std::sync::Mutex::new((1, std::time::Duration::from_secs(60)))))
    }

    /// Another boot than any of [`ManualClock::new`] comes to.
    pub fn after_power_cut() -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self(std::sync::Mutex::new((1_000_000, std::time::Duration::from_secs(1)))))
    }

    pub fn pass(&self, time: std::time::Duration) {
        self.0.lock().unwrap().1 += time;
    }

    pub fn reboot(&self) {
        let mut state = self.0.lock().unwrap();
        *state = (state.0 + 1, std::time::Duration::from_secs(1));
    }
}

impl esker_store::clock::Clock for ManualClock {
    fn boot_id(&self) -> String {
        format!("boot-{}", self.0.lock().unwrap().0)
    }

    fn since_boot(&self) -> std::time::Duration {
        self.0.lock().unwrap().1
    }
}
