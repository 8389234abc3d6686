//! What fuzz targets call, with the feature `fuzzing`, and what this crate's own test changes by chance: bytes of a node.

/// What a node says of an arena, and of a slot in it.
pub fn local_arena(bytes: &[u8]) -> bool {
    crate::local::arena::hear(bytes)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use esker_proto::v1;
    use prost::Message;

    use super::local_arena;

    /// `ESKER_WRITE_CORPUS=1` writes the corpus, `ESKER_SEED` repeats a run.
    #[test]
    fn an_arena_can_be_described_at_will() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/local_arena");
        if std::env::var_os("ESKER_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("small"), sample(sound())).unwrap();
        }
        let seed = std::env::var("ESKER_SEED").ok().and_then(|seed| seed.parse().ok());
        let mut state: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5eed);
        println!("ESKER_SEED={state}");
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % bound.max(1)
        };
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let kept = std::fs::read(&path).unwrap();
            assert!(local_arena(&kept), "{} is refused", path.display());
            for _ in 0..10_000 {
                let mut bytes = kept.clone();
                for _ in 0..=below(3) {
                    let at = below(bytes.len());
                    bytes[at] = [0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 16][below(6)];
                }
                local_arena(&bytes);
            }
        }
        // Numbers as a forger chooses them.
        let mut accepted = 0;
        for _ in 0..10_000 {
            let mut attached = sound();
            let numbers = [0, 1, 64, 4096, 1 << 20, u64::MAX - 4095, u64::MAX];
            let mut any = |number: &mut u64| {
                if below(3) == 0 {
                    *number = numbers[below(7)];
                }
            };
            any(&mut attached.slots_at);
            any(&mut attached.put_at);
            any(&mut attached.arena_bytes);
            let (mut slots, mut slot_bytes) = (attached.slots.into(), attached.slot_bytes.into());
            any(&mut slots);
            any(&mut slot_bytes);
            let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
            (attached.slots, attached.slot_bytes) = (narrow(slots), narrow(slot_bytes));
            accepted += u64::from(local_arena(&sample(attached)));
        }
        assert!(accepted > 0 && accepted < 10_000, "{accepted} were accepted");
        let over = v1::Attached { slots_at: u64::MAX - 4095, slots: 2, slot_bytes: 4096, ..sound() };
        assert!(!local_arena(&sample(over)), "its slots end where they do not begin");
    }

    fn sound() -> v1::Attached {
        v1::Attached {
            arena: vec![7; 16].into(),
            arena_bytes: 4096 * 6,
            slots: 4,
            slot_bytes: 4096,
            slots_at: 4096,
            put_at: 4096 * 5,
            lease_ms: 1000,
            together: true,
            ..Default::default()
        }
    }

    fn sample(attached: v1::Attached) -> Vec<u8> {
        let attached = attached.encode_to_vec();
        let part = v1::LocalPart { at: 64, bytes: 128, plane_bytes: 128, ..Default::default() };
        let filled = v1::FilledSlot { slot: 3, stamp: 9, parts: vec![part] };
        let len = u8::try_from(attached.len()).unwrap();
        [&(4096_u64 * 6).to_le_bytes()[..], &[len], &attached, &filled.encode_to_vec()].concat()
    }
}
