use super::*;
use crate::ObjectKind;

const V32: &str = r#"{"model_type":"deepseek_v32","num_hidden_layers":61,"kv_lora_rank":512,"qk_rope_head_dim":64,
    "index_head_dim":128}"#;
const GLM5: &str = r#"{"model_type":"glm_moe_dsa","num_hidden_layers":78,"kv_lora_rank":512,"qk_rope_head_dim":64,
    "index_head_dim":128}"#;

fn glm52() -> String {
    let types: Vec<String> = (0..78_i32)
        .map(|i| if (i - 3 + 1).max(0) % 4 == 0 { "\"full\"".into() } else { "\"shared\"".into() })
        .collect();
    GLM5.replace("}", &format!(",\"indexer_types\":[{}]}}", types.join(",")))
}

fn v4(layers: usize, ratios: &[u32]) -> String {
    format!(
        r#"{{"model_type":"deepseek_v4","num_hidden_layers":{layers},"head_dim":512,"qk_rope_head_dim":64,
        "index_head_dim":128,"sliding_window":128,"compress_ratios":{ratios:?}}}"#
    )
}

fn flash() -> String {
    let mut ratios = vec![0, 0];
    ratios.extend([4, 128].repeat(20));
    ratios.extend([4, 0]);
    v4(43, &ratios)
}

fn pro() -> String {
    let mut ratios = vec![128, 128];
    ratios.extend([4, 128].repeat(29));
    ratios.extend([4, 0]);
    v4(61, &ratios)
}

fn layout(config: &str, format: RowFormat) -> KvLayout {
    KvLayout::from_config(config, format, 128).unwrap()
}

#[test]
fn published_byte_counts_are_reproduced() {
    let per_token = |config: &str, format| layout(config, format).bytes_per_token();
    assert_eq!(per_token(V32, RowFormat::Deployed), 48_068.0);
    assert_eq!(per_token(V32, RowFormat::Bf16), 85_888.0);
    assert_eq!(per_token(GLM5, RowFormat::Deployed), 61_464.0);
    assert_eq!(per_token(GLM5, RowFormat::Bf16), 109_824.0);
    assert_eq!(per_token(&glm52(), RowFormat::Deployed), 53_940.0);
    let by_frequency = GLM5.replace('}', ",\"index_topk_freq\":4,\"index_skip_topk_offset\":3}");
    assert_eq!(per_token(&by_frequency, RowFormat::Deployed), 53_940.0);
    assert_eq!(per_token(&flash(), RowFormat::Deployed), 3_514.25);
    assert_eq!(per_token(&flash(), RowFormat::DeployedFp8Keys), 3_850.25);
    assert_eq!(per_token(&flash(), RowFormat::Bf16), 6_880.0);
    assert_eq!(per_token(&pro(), RowFormat::Deployed), 644_024.0 / 128.0); // 5,031.4
    assert_eq!(per_token(&pro(), RowFormat::Bf16), 9_848.0);

    let block = |config: &str, format| layout(config, format).object_bytes(ObjectKind::Block);
    assert_eq!(block(V32, RowFormat::Deployed), 6_152_704);
    assert_eq!(block(&flash(), RowFormat::Deployed), 449_824);
    assert_eq!(block(&pro(), RowFormat::Deployed), 644_024);
    assert_eq!(block(&flash(), RowFormat::DeployedFp8Keys), 492_832);
    assert_eq!(block(&pro(), RowFormat::DeployedFp8Keys), 705_464);

    let state = |config: &str| layout(config, RowFormat::Deployed).object_bytes_at(ObjectKind::State, 128);
    assert_eq!(state(V32), 0);
    assert_eq!(state(&flash()), 3_214_336 + 430_080);
    assert_eq!(state(&pro()), 4_559_872 + 614_400);
}

/// Off the block grid a state has open runs and the rows behind the last whole block; on it, neither.
#[test]
fn a_state_is_as_long_as_its_boundary_says() {
    let flash = layout(&flash(), RowFormat::Deployed);
    let rows = |name: &str, kind, tokens: u64| -> Vec<u64> {
        let of_group = |plane: &&PlaneSpec| flash.groups()[usize::from(plane.group)].name == name;
        let planes = flash.planes_at(kind, tokens);
        let rows = |plane: &PlaneSpec| {
            plane.len_bytes / (u64::from(plane.layers) * flash.groups()[usize::from(plane.group)].row_bytes())
        };
        let mut rows: Vec<u64> = planes.iter().filter(of_group).map(rows).collect();
        rows.dedup();
        rows
    };
    let state = |name: &str, tokens| rows(name, ObjectKind::State, tokens);
    for (tokens, csa_pending, hca_pending, csa, hca) in
        [(128, 0, 0, None, None), (90, 2, 90, Some(23), Some(1)), (1900, 0, 108, Some(27), Some(1))]
    {
        assert_eq!(state("window", tokens), [128]);
        assert_eq!(state("csa_overlap", tokens), [4]);
        assert_eq!(
            (state("csa_pending", tokens), state("hca_128_pending", tokens)),
            (vec![csa_pending], vec![hca_pending])
        );
        assert_eq!(state("csa", tokens), Vec::from_iter(csa));
        assert_eq!(state("hca_128", tokens), Vec::from_iter(hca));
    }
    assert_eq!(rows("csa", ObjectKind::Block, 256), [32]);
    let most = flash.max_object_bytes();
    for (kind, tokens) in
        (1..300).flat_map(|tokens| [(ObjectKind::State, tokens), (ObjectKind::Block, tokens)])
    {
        let planes = flash.planes_at(kind, tokens);
        assert_eq!(flash.planes_count(kind, tokens), planes.len());
        let bytes = flash.object_bytes_at(kind, tokens);
        assert_eq!(bytes, planes.iter().map(|plane| plane.len_bytes).sum::<u64>(), "{kind:?} at {tokens}");
        assert!(bytes <= most);
    }
    // Without state groups the rows are all that there is.
    let v32 = layout(V32, RowFormat::Deployed);
    assert_eq!(v32.object_bytes_at(ObjectKind::State, 512), 0);
    let of_block = v32.object_bytes(ObjectKind::Block);
    assert_eq!(v32.object_bytes_at(ObjectKind::State, 512 + 3), of_block * 3 / 128);
}

/// What a coarse group has lies in the last of its blocks, and inside others no state can begin.
#[test]
fn a_coarse_group_is_whole_where_states_may_lie() {
    let group = |name: &str, grain_blocks| Group {
        name: name.into(),
        family: Family::History,
        layers: vec![0],
        rows: 4,
        fields: vec![Field { name: "value".into(), dtype: Dtype::U8, count: 1 }],
        restore_order: 0,
        plane_layers: 1,
        optional: false,
        grain_blocks,
        run_tokens: 0,
    };
    let layout = KvLayout::new("coarse", 4, vec![group("fine", 1), group("coarse", 4)]).unwrap();
    let lengths = |kind, tokens| -> Vec<u64> {
        layout.planes_at(kind, tokens).iter().map(|plane| plane.len_bytes).collect()
    };
    assert_eq!(lengths(ObjectKind::Block, 12), [4, 0]);
    assert_eq!(lengths(ObjectKind::Block, 16), [4, 4]);
    assert_eq!(lengths(ObjectKind::State, 18), [2, 1]);
    for (kind, tokens, bytes) in [
        (ObjectKind::Block, 12, 4),
        (ObjectKind::Block, 16, 8),
        (ObjectKind::State, 18, 3),
        (ObjectKind::State, 16, 0),
    ] {
        assert_eq!(layout.object_bytes_at(kind, tokens), bytes);
    }
    let may = (0..20).filter(|&tokens| layout.has_boundary(tokens)).collect::<Vec<_>>();
    assert_eq!(may, [1, 2, 3, 4, 8, 12, 16, 17, 18, 19]);
    for (run_tokens, rows, family) in [(4, 4, Family::State), (5, 4, Family::History)] {
        let bad = Group { run_tokens, rows, family, ..group("runs", 1) };
        let error = KvLayout::new("bad", 4, vec![group("fine", 1), bad]).unwrap_err();
        assert!(error.to_string().contains("run_tokens"), "{error}");
    }
}

#[test]
fn both_namings_of_a_v4_schedule_mean_the_same() {
    let new_names = r#"{"model_type":"deepseek_v4","num_hidden_layers":3,"head_dim":512,"partial_rotary_factor":0.125,
        "index_head_dim":128,"sliding_window":128,
        "layer_types":["sliding_attention","compressed_sparse_attention","heavily_compressed_attention"],
        "compress_rates":{"compressed_sparse_attention":4,"heavily_compressed_attention":128}}"#;
    assert_eq!(
        layout(new_names, RowFormat::Deployed).id(),
        layout(&v4(3, &[0, 4, 128]), RowFormat::Deployed).id()
    );
}

#[test]
fn types_tell_the_kind_of_a_v4_layer_where_both_are_given() {
    let of = |ratios: &str, rates: &str| {
        let config = format!(
            r#"{{"model_type":"deepseek_v4","num_hidden_layers":3,"head_dim":32,"qk_rope_head_dim":8,"index_head_dim":16,
            "sliding_window":8,"layer_types":["compressed_sparse_attention","heavily_compressed_attention",
            "sliding_attention"]{ratios}{rates}}}"#
        );
        KvLayout::from_config(&config, RowFormat::F32, 16)
    };
    let rates = r#","compress_rates":{"compressed_sparse_attention":8,"heavily_compressed_attention":4}"#;
    let layout = of("", rates).unwrap();
    let groups: Vec<_> =
        layout.groups().iter().map(|group| (group.name.as_str(), group.layers.clone(), group.rows)).collect();
    assert_eq!(
        groups,
        [
            ("csa_indexer_key", vec![0], 2),
            ("csa", vec![0], 2),
            ("hca_4", vec![1], 4),
            ("window", vec![0, 1, 2], 8),
            ("csa_overlap", vec![0], 8),
            ("csa_pending", vec![0], 7),
            ("hca_4_pending", vec![1], 3),
        ]
    );
    assert_eq!(of(r#","compress_ratios":[8,4,0]"#, "").unwrap().id(), layout.id());
    assert!(of("", "").unwrap_err().to_string().contains("compress_rates"));
    assert!(of(r#","compress_ratios":[8,4]"#, "").unwrap_err().to_string().contains("2 entries"));
    assert!(of(r#","compress_ratios":[1,4,0]"#, "").unwrap_err().to_string().contains("ratio 1"));
}

/// A block that cuts runs has room for the rows that it may complete, and its state for what is open.
#[test]
fn blocks_may_cut_the_runs_of_v4() {
    let layout = |block: u32| KvLayout::from_config(&v4(2, &[4, 128]), RowFormat::Deployed, block).unwrap();
    let rows = |block: u32| -> Vec<(String, u32, u64)> {
        let layout = layout(block);
        layout.groups().iter().map(|group| (group.name.clone(), group.rows, group.row_bytes())).collect()
    };
    let named =
        |block: u32, name: &str| rows(block).into_iter().find(|group| group.0 == name).map(|g| (g.1, g.2));
    // Whole blocks leave no run open.
    assert_eq!(
        layout(128).object_bytes_at(ObjectKind::State, 128),
        layout(256).object_bytes_at(ObjectKind::State, 256)
    );
    assert_eq!((named(64, "hca_128"), named(64, "csa")), (Some((1, 584)), Some((16, 584))));
    // Values and gates of up to 127 tokens, F32.
    assert_eq!(named(64, "hca_128_pending"), Some((127, 2 * 512 * 4)));
    // Both halves of the channels, of the indexer's too.
    assert_eq!(named(2, "csa_pending"), Some((3, 4 * (512 + 128) * 4)));
    assert_eq!(named(2, "csa"), Some((1, 584)));
}

#[test]
fn planes_follow_restore_order_and_cover_every_layer_once() {
    let layout = layout(V32, RowFormat::Deployed);
    let planes = layout.planes(ObjectKind::Block);
    assert_eq!(layout.groups()[usize::from(planes[0].group)].name, "indexer_key");
    for (index, group) in layout.groups().iter().enumerate() {
        let mut next = 0;
        for plane in planes.iter().filter(|plane| usize::from(plane.group) == index) {
            assert_eq!(plane.first_layer, next);
            next += plane.layers;
        }
        assert_eq!(usize::from(next), group.layers.len());
    }
    assert_eq!(
        planes.iter().map(|plane| plane.len_bytes).sum::<u64>(),
        layout.object_bytes(ObjectKind::Block)
    );
}

#[test]
fn json_keeps_the_id() {
    for config in [V32.to_owned(), glm52(), flash(), pro()] {
        let layout = layout(&config, RowFormat::Deployed);
        assert_eq!(KvLayout::from_json(&layout.to_json()).unwrap(), layout);
    }
}

#[test]
fn ids_do_not_change_by_accident() {
    // Golden digests: a change here orphans every stored block of these models.
    assert_eq!(
        layout(V32, RowFormat::Deployed).id().to_hex(),
        "7e2daaff01ec9acdb84a73376ea409cf6f22933c8f04477fa454e4d9a90ea68d"
    );
    assert_eq!(
        layout(&flash(), RowFormat::Deployed).id().to_hex(),
        "5277070b041ea82df04ea1c49a41751949000a549544adc1495ef72d06c714de"
    );
}

#[test]
fn an_opaque_chunk_is_a_table_too() {
    let group = Group {
        name: "chunk".into(),
        family: Family::History,
        layers: vec![0],
        rows: 1,
        fields: vec![Field { name: "bytes".into(), dtype: Dtype::U8, count: 1 << 20 }],
        restore_order: 0,
        plane_layers: 1,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    };
    assert_eq!(KvLayout::new("opaque", 256, vec![group]).unwrap().object_bytes(ObjectKind::Block), 1 << 20);
}

#[test]
fn unusable_layouts_are_named() {
    let good = layout(V32, RowFormat::Deployed);
    let mut group = good.groups()[0].clone();
    let reason = |block_tokens, groups| KvLayout::new("x", block_tokens, groups).unwrap_err().to_string();
    assert!(reason(100, vec![group.clone()]).contains("power of two"));
    assert!(reason(128, vec![]).contains("1 to 64 groups"));
    assert!(reason(128, vec![group.clone(), group.clone()]).contains("twice"));
    group.rows = u32::MAX;
    assert!(reason(128, vec![group.clone()]).contains("would exceed"));
    // A model of windows alone has blocks all the same, of nothing: its states stand behind them.
    group.family = Family::State;
    group.rows = 1;
    let windows = KvLayout::new("x", 128, vec![group]).unwrap();
    assert_eq!(windows.object_bytes(ObjectKind::Block), 0);
    assert!(windows.object_bytes(ObjectKind::State) > 0);
    let config = KvLayout::from_config(r#"{"model_type":"gpt2","num_hidden_layers":1}"#, RowFormat::F32, 128);
    assert!(config.unwrap_err().to_string().contains("gpt2"));
}
