//! Blocks may cut the runs of tokens that become one compressed row: whatever the ratios and the block, a sequence goes on
//! bit for bit from its blocks and the state of their end, and from its blocks alone.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{KvFormat, Logits, Sequence};
use esker_prefix::ObjectKind;
use serde_json::json;
use support::{Checkpoint, Random, identity, logit_bits, v4, with};

#[test]
fn any_ratio_goes_with_any_block() {
    let names = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"];
    for seed in 0..24 {
        let mut random = Random(seed);
        let mut one_of = |values: &[usize]| values[random.below(values.len())];
        let (sparse, heavy) = (one_of(&[2, 3, 4, 6, 20]), one_of(&[3, 5, 12, 24, 48, 128]));
        let block_tokens = one_of(&[1, 2, 8, 16, 32]);
        let types = [names[one_of(&[1, 2])], names[one_of(&[0, 1, 2])], names[one_of(&[1, 2])]];
        let config = json!({
            "num_hidden_layers": 3, "sliding_window": one_of(&[1, 3, 8, 30]), "compress_ratios": null,
            "layer_types": types, "compress_rates": {(names[1]): sparse, (names[2]): heavy},
        });
        let format = if seed % 3 == 0 { KvFormat::Bf16 } else { KvFormat::F32 };
        let about = format!("seed {seed}: {config}, blocks of {block_tokens}");
        let block = u32::try_from(block_tokens).unwrap();
        let model = Checkpoint::random(with(v4(), config), seed).load(format, block);
        let count = 20 + random.below(80);
        let tokens = random.tokens(count, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[count]);

        let mut sequence = Sequence::new(&model);
        let (mut blocks, mut states) = (Vec::new(), Vec::new());
        for (index, chunk) in tokens.chunks_exact(block_tokens).enumerate() {
            sequence.prefill(&model, chunk, Logits::None).unwrap();
            blocks.push(sequence.block(&model, index, identity(0, index)).unwrap());
            states.push(sequence.state(&model, index, identity(0, index)).unwrap());
        }
        for boundary in (1..=blocks.len()).filter(|boundary| block_tokens > 2 || boundary % 7 == 3) {
            let (start, index) = (boundary * block_tokens, boundary - 1);
            let restored = || {
                let mut sequence = Sequence::new(&model);
                blocks[..boundary].iter().for_each(|block| sequence.restore(&model, block).unwrap());
                sequence
            };
            let mut by_state = restored();
            by_state.restore_state(&model, &states[index]).unwrap();
            let mut by_replay = restored();
            by_replay.replay(&model, &tokens[..start]).unwrap();
            for mut sequence in [by_state, by_replay] {
                assert_eq!(
                    sequence.state(&model, index, identity(0, index)).unwrap(),
                    states[index],
                    "{about}"
                );
                let rest = logit_bits(&model, &mut sequence, &tokens[start..], &[1, 7, 2]);
                assert!(rest == whole[start..], "{about}, at {start}");
                for (index, block) in blocks.iter().enumerate() {
                    assert_eq!(&sequence.block(&model, index, identity(0, index)).unwrap(), block, "{about}");
                }
            }
        }
    }
}

/// What belongs to an open run costs state only where blocks cut runs.
#[test]
fn whole_runs_need_no_place_in_the_state() {
    // At the end of the first block.
    let of = |block: u32| {
        let model = Checkpoint::random(v4(), 1).load(KvFormat::F32, block);
        model.layout().object_bytes_at(ObjectKind::State, u64::from(block))
    };
    // Of each open token two heavy layers of ratio 16 keep 24 values and gates, two sparse ones of ratio 4 twice 24 + 16.
    let (heavy, sparse) = (2 * 2 * 24 * 4, 2 * 2 * 2 * (24 + 16) * 4);
    assert_eq!(of(8) - of(16), 8 * heavy);
    assert_eq!(of(2) - of(16), 2 * heavy + 2 * sparse);
    assert_eq!(of(64), of(16));
}
