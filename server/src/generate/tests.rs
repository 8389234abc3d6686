//! However a prefix is put back, the answer is the same.

use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use esker_decoder::{KvFormat, ModelBuilder, Sampler};
use esker_prefix::{ObjectId, ObjectKind, RootSecret, ScopeKey, ScopeKind, TokenId};
use esker_store::{FetchEvent, FetchOrder, FetchRequest, MissKind, PlaneSelection, StoreSettings, TtlClass};

use super::trail::Trail;
use super::{Account, Event, Guessing, Job, RestoreMode, generate};
use crate::bundled;
use crate::model_folder::LoadedModel;
use crate::node::{Node, NodeSettings};
use crate::writers::Place;

#[path = "../../../engine/decoder/tests/support/mod.rs"]
mod support;

/// Large enough to be read layer after layer.
const PROMPT_TOKENS: u32 = 8_000;
const NEW_TOKENS: usize = 5;

fn open(data: &Path) -> Node {
    let store = StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() };
    let settings = NodeSettings { data: data.to_owned(), store, ..NodeSettings::default() };
    Node::open(&settings, Some(bundled::load(KvFormat::Bf16, 128).unwrap())).unwrap()
}

fn job(prompt: &[TokenId], restore: RestoreMode) -> Job {
    let place = Place::unshared(ScopeKey::derive(&RootSecret::new([7; 32]), ScopeKind::Private, "test", 0));
    Job {
        prompt: prompt.to_vec(),
        max_new_tokens: NEW_TOKENS,
        sampler: Sampler::seeded(0.0, 1.0, 0).unwrap(),
        logits_digest: true,
        stop: Vec::new(),
        place,
        class: TtlClass::default(),
        stores: restore == RestoreMode::Nothing,
        restore,
        resident_bytes: None,
        guessing: Guessing::default(),
    }
}

/// A token, and the digest of the logits that it was drawn from.
type Emitted = (TokenId, Option<[u8; 32]>);

/// What was emitted, and the account.
fn run(node: &Node, job: Job) -> (Vec<Emitted>, Account) {
    let (mut tokens, mut account) = (Vec::new(), None);
    generate(node, node.engine.as_ref().unwrap(), job, &mut |event| {
        match event {
            Event::Token { id, logits_digest, .. } => tokens.push((id, logits_digest)),
            Event::Done(done) => account = Some(done),
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    (tokens, account.unwrap())
}

fn prompt(vocab: usize) -> Vec<TokenId> {
    let vocab = u32::try_from(vocab).unwrap();
    (0..PROMPT_TOKENS).map(|at| TokenId(at.wrapping_mul(2_654_435_761) / 7 % vocab)).collect()
}

#[test]
fn in_order_at_once_and_computed_give_the_same_also_where_a_later_plane_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let node = open(dir.path());
    let model = &node.engine.as_ref().unwrap().loaded.model;
    let prompt = prompt(model.config().vocab_size);
    assert!(
        f64::from(PROMPT_TOKENS) * model.layout().bytes_per_token()
            > 1.2 * super::resume::ORDERED_FROM_BYTES as f64,
        "the prompt is too short to be read in order: a token takes {} bytes",
        model.layout().bytes_per_token()
    );
    let (expected, account) = run(&node, job(&prompt, RestoreMode::Nothing));
    assert_eq!((account.hit_tokens, account.bytes_read), (0, 0));
    // Dropping the node stores what waits.
    drop(node);
    let node = open(dir.path());
    let mut whole_hit = 0;
    for mode in [RestoreMode::Whole, RestoreMode::Ordered] {
        let (got, account) = run(&node, job(&prompt, mode));
        assert_eq!(got, expected, "{mode:?}");
        assert_eq!(account.hit_tokens, 7_936, "{mode:?}");
        assert!(account.bytes_read > 256 << 10, "{mode:?}");
        assert_eq!(account.lost, None, "{mode:?}");
        whole_hit = account.hit_tokens;
    }

    // With most rows left on SSD, none or some of them in memory.
    for resident_bytes in [0, 512 << 10] {
        let job = Job { resident_bytes: Some(resident_bytes), ..job(&prompt, RestoreMode::Ordered) };
        let (got, account) = run(&node, job);
        assert_eq!(got, expected, "{resident_bytes}");
        assert_eq!(account.hit_tokens, whole_hit);
        let parked = account.parked.unwrap();
        assert!(parked.prefill.rows_picked > 0 && parked.total.rows_picked > parked.prefill.rows_picked);
        assert!(parked.total.bytes_fetched > 0 && parked.total.pool_hits < parked.total.rows_picked);
        assert_eq!(parked.total.pool_hits > 0, resident_bytes > 0);
    }
    let (_, all) = run(&node, Job { resident_bytes: Some(u64::MAX), ..job(&prompt, RestoreMode::Ordered) });
    assert!(all.parked.is_none(), "what fits is not parked");

    // The second half ends with states.
    damage(&node, dir.path(), 50);
    // Keys that are read at once may be sound where a row is not that is picked later, or the other way round.
    let (got, account) =
        run(&node, Job { resident_bytes: Some(256 << 10), ..job(&prompt, RestoreMode::Ordered) });
    assert_eq!(got, expected);
    assert!(account.hit_tokens < whole_hit && account.lost.is_some_and(MissKind::is_damage));
    // What is sound still stays on SSD, and what it costs is told.
    let parked = account.parked.unwrap();
    assert!(parked.prefill.rows_picked > 0 && parked.total.rows_picked > parked.prefill.rows_picked);
    assert!(parked.total.bytes_fetched > 0 && parked.waited[1] >= parked.waited[0]);
    let (got, account) = run(&node, job(&prompt, RestoreMode::Ordered));
    assert_eq!(got, expected);
    assert!((1..whole_hit).contains(&account.hit_tokens), "{} of {whole_hit}", account.hit_tokens);
}

#[test]
fn rows_that_are_lost_while_decoding_leave_the_others_on_ssd() {
    let dir = tempfile::tempdir().unwrap();
    let node = open(dir.path());
    let prompt = prompt(node.engine.as_ref().unwrap().loaded.model.config().vocab_size);
    let job = |restore| Job { max_new_tokens: 12, ..job(&prompt, restore) };
    let (expected, _) = run(&node, job(RestoreMode::Nothing));
    settle(&node);
    let parked = || Job { resident_bytes: Some(0), ..job(RestoreMode::Ordered) };
    let of_steps = |account: &Account| {
        let parked = account.parked.unwrap();
        parked.total.rows_picked - parked.prefill.rows_picked
    };
    let (_, undisturbed) = run(&node, parked());

    let (mut got, mut account, mut bytes) = (Vec::new(), None, Vec::new());
    generate(&node, node.engine.as_ref().unwrap(), parked(), &mut |event| {
        match event {
            Event::Token { id, logits_digest, raw_bytes, .. } => {
                got.push((id, logits_digest));
                bytes.push(raw_bytes);
                if got.len() == 4 {
                    damage(&node, dir.path(), 25);
                }
            }
            Event::Done(done) => account = Some(done),
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(got, expected);
    assert!(bytes.is_sorted(), "{bytes:?}");
    let account = account.unwrap();
    assert_eq!(account.hit_tokens, undisturbed.hit_tokens);
    // With all rows in memory nothing would be picked behind the loss, which is most of the steps.
    let (some, all) = (of_steps(&account), of_steps(&undisturbed));
    assert!(some > all / 2, "{some} of {all}");
    assert_eq!(account.parked.unwrap().total.pool_hits, 0, "there is no pool");
    let (_, after) = run(&node, parked());
    assert!(after.hit_tokens < account.hit_tokens, "nothing was lost");
}

#[test]
fn a_fork_inside_a_long_output_finds_a_state() {
    for guessing in [Guessing::Never, Guessing::Always] {
        let dir = tempfile::tempdir().unwrap();
        let node = node_with(drafting(), dir.path()).with_state_interval(2);
        let prompt = support::Random(1).tokens(37, 4);
        let job = |prompt: &[TokenId], restore| Job { max_new_tokens: 150, guessing, ..job(prompt, restore) };
        let (output, _) = run(&node, job(&prompt, RestoreMode::Nothing));
        settle(&node);
        let output: Vec<TokenId> = output.iter().map(|&(id, _)| id).collect();
        // Behind tokens of the output another turn: the states of every second block are found.
        for (after, expected) in [(70, 96), (100, 128), (130, 160)] {
            let fork: Vec<TokenId> =
                [&prompt[..], &output[..after], &support::Random(7).tokens(20, 4)].concat();
            let (got, account) = run(&node, job(&fork, RestoreMode::Ordered));
            assert_eq!((account.hit_tokens, account.replayed_tokens), (expected, 0), "after {after}");
            let computed = Job { stores: false, ..job(&fork, RestoreMode::Nothing) };
            assert!(got == run(&node, computed).0, "after {after}");
        }
    }
}

#[test]
fn wide_rows_come_plane_after_plane_sound_and_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_with(random(serde_json::json!({"head_dim": 512}), 128), dir.path());
    let prompt = support::Random(3).tokens(1_400, 61);
    let (expected, _) = run(&node, job(&prompt, RestoreMode::Nothing));
    settle(&node);
    let (got, account) = run(&node, job(&prompt, RestoreMode::Ordered));
    assert_eq!(got, expected);
    assert_eq!((account.hit_tokens, account.replayed_tokens), (1_280, 0));
    let (small, least) = (super::resume::SMALL_RECORD_BYTES, super::resume::ORDERED_FROM_BYTES);
    assert!(account.bytes_read > 10 * small && account.raw_bytes > least, "{account:?}");

    // What comes plane after plane ends before a bad one.
    damage_object(&node, dir.path(), &prompt[..7 * 128], ObjectKind::Block);
    let (got, account) = run(&node, job(&prompt, RestoreMode::Ordered));
    assert_eq!(got, expected);
    assert_eq!(account.hit_tokens, 6 * 128);
    assert!(account.lost.is_some_and(MissKind::is_damage));
}

#[test]
fn where_a_state_is_damaged_an_earlier_one_may_cost_less_than_a_replay() {
    // To step back costs a block of 16 tokens. A replay costs more of windows of nine, and less of windows of two.
    for (window, hit_tokens) in [(9, 112), (2, 128)] {
        let dir = tempfile::tempdir().unwrap();
        let changes = serde_json::json!({"sliding_window": window, "compress_ratios": [0, 4, 4, 4, 4, 0]});
        let model = random(changes, 16);
        assert_eq!(model.model.replay_cost(128) < 16, window == 2);
        let replayed_tokens = if window == 2 { model.model.replay_tokens(128) } else { 0 };
        let node = node_with(model, dir.path()).with_state_interval(1);
        let first = support::Random(5).tokens(140, 61);
        run(&node, job(&first, RestoreMode::Nothing));
        settle(&node);
        damage_object(&node, dir.path(), &first[..128], ObjectKind::State);
        let prompt: Vec<TokenId> = [&first[..133], &support::Random(6).tokens(40, 61)].concat();
        let (expected, _) = run(&node, Job { stores: false, ..job(&prompt, RestoreMode::Nothing) });
        let (got, account) = run(&node, job(&prompt, RestoreMode::Ordered));
        assert_eq!(got, expected);
        assert_eq!((account.hit_tokens, account.replayed_tokens), (hit_tokens, replayed_tokens), "{window}");
    }
}

/// A bit in the largest plane of the object at the end of this prefix is another one.
fn damage_object(node: &Node, data: &Path, prefix: &[TokenId], kind: ObjectKind) {
    let job = job(prefix, RestoreMode::Nothing);
    let mut trail = Trail::new(node.engine.as_ref().unwrap(), &job.place, job.class);
    trail.extend(prefix);
    let id = ObjectId { kind, hash: *trail.hashes_within(prefix.len()).last().unwrap() };
    let fetch = node.store.fetch(FetchRequest {
        objects: node.store.get(&[id]).into_iter().flatten().collect(),
        planes: PlaneSelection::All,
        order: FetchOrder::ByObject,
        deadline: None,
    });
    let planes = fetch.map(|event| match event {
        FetchEvent::Plane { bytes, .. } => bytes,
        FetchEvent::Miss { kind, .. } => panic!("{kind:?}"),
    });
    let plane = planes.max_by_key(Bytes::len).unwrap();
    let mut found = 0;
    for segment in std::fs::read_dir(data.join("store/segments")).unwrap() {
        let file = std::fs::File::options().read(true).write(true).open(segment.unwrap().path()).unwrap();
        let used = usize::try_from(file.metadata().unwrap().len().min(16 << 20)).unwrap();
        let mut held = vec![0; used];
        file.read_exact_at(&mut held, 0).unwrap();
        let end = &plane[plane.len() - 64..];
        for at in (0..used.saturating_sub(64)).filter(|&at| held[at..].starts_with(end)) {
            file.write_all_at(&[held[at] ^ 0x10], at as u64).unwrap();
            found += 1;
        }
        file.sync_all().unwrap();
    }
    assert_eq!(found, 1, "the plane is stored as it is, once");
}

/// One byte in every 64 KiB of what is stored, but for the first so many percent, is another one.
fn damage(node: &Node, data: &Path, from_percent: u64) {
    let used = node.store.stats().record_bytes;
    let segments = std::fs::read_dir(data.join("store/segments")).unwrap();
    let largest = segments.map(|entry| entry.unwrap().path()).max_by_key(|path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).unwrap().blocks()
    });
    let file = std::fs::File::options().read(true).write(true).open(largest.unwrap()).unwrap();
    for at in (used * from_percent / 100..used).step_by(64 << 10) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
    file.sync_all().unwrap();
}

/// A random model of four words with a draft block: small enough that it guesses right now and then.
fn drafting() -> LoadedModel {
    random(
        serde_json::json!({"vocab_size": 4, "num_nextn_predict_layers": 1, "max_position_embeddings": 1024}),
        16,
    )
}

/// A random V4 with these changes.
fn random(changes: serde_json::Value, block_tokens: u32) -> LoadedModel {
    let checkpoint = support::Checkpoint::random(support::with(support::v4(), changes), 11);
    let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, block_tokens).unwrap();
    builder.shard("model.safetensors", checkpoint.shard()).unwrap();
    builder.draft_if_present();
    let model = builder.finish().unwrap();
    LoadedModel { name: "random".into(), model, ..bundled::load(KvFormat::F32, block_tokens).unwrap() }
}

fn node_with(model: LoadedModel, data: &Path) -> Node {
    // Raw, so that a test finds the bytes of a plane.
    let store = StoreSettings { scrub_bytes_per_s: 0, zstd_level: None, ..StoreSettings::default() };
    let settings = NodeSettings { data: data.to_owned(), store, ..NodeSettings::default() };
    Node::open(&settings, Some(model)).unwrap()
}

/// Waits until what was computed is stored.
fn settle(node: &Node) {
    while node.engine.as_ref().unwrap().write_behind.waiting_bytes() > 0 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn what_is_computed_when_the_client_hangs_up_is_stored() {
    let changes = serde_json::json!({"num_nextn_predict_layers": 1, "vocab_size": 4});
    for (seed, guessing) in [(1, Guessing::Never), (2, Guessing::Always), (3, Guessing::Always)] {
        let dir = tempfile::tempdir().unwrap();
        let node = node_with(random(changes.clone(), 16), dir.path());
        let all = support::Random(seed).tokens(1_500, 4);
        let job = |prompt: &[TokenId], restore| Job {
            max_new_tokens: 60,
            guessing,
            stores: true,
            ..job(prompt, restore)
        };
        let hang_up = |job: Job, at: &dyn Fn(&Event) -> bool| {
            let mut tokens = Vec::new();
            let ended = generate(&node, node.engine.as_ref().unwrap(), job, &mut |event| {
                if at(&event) {
                    return ControlFlow::Break(());
                }
                if let Event::Token { id, .. } = event {
                    tokens.push(id);
                }
                ControlFlow::Continue(())
            });
            assert!(ended.unwrap_err().is_cancelled());
            settle(&node);
            tokens
        };

        // While the prompt is computed nothing is stored: nobody was billed for it.
        hang_up(job(&all[..1_101], RestoreMode::Ordered), &|event| {
            matches!(event, Event::Prefilling { done: 512.., .. })
        });
        let (_, account) = run(&node, Job { stores: false, ..job(&all[..1_101], RestoreMode::Ordered) });
        assert_eq!(account.hit_tokens, 0);

        // After some tokens: all of the prompt, and the end.
        for after in [0, 1, 20, 37] {
            let prompt = &all[..1_110 + after];
            let count = std::cell::Cell::new(0);
            let got = hang_up(job(prompt, RestoreMode::Ordered), &|event| {
                count.set(count.get() + usize::from(matches!(event, Event::Token { .. })));
                count.get() > after
            });
            assert_eq!(got.len(), after);
            let turn: Vec<TokenId> = [prompt, &got, &[TokenId(0); 3]].concat();
            let (answer, account) = run(&node, Job { stores: false, ..job(&turn, RestoreMode::Ordered) });
            // The last token that was sent may not be computed yet.
            let held = (prompt.len() + got.len()).saturating_sub(1)..=prompt.len() + got.len();
            assert!(held.contains(&account.hit_tokens), "{} of {held:?}", account.hit_tokens);
            assert_eq!(account.replayed_tokens, 0);
            assert!(answer == run(&node, Job { stores: false, ..job(&turn, RestoreMode::Nothing) }).0);
        }
    }
}

#[test]
fn guessing_changes_nothing_but_the_time() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_with(drafting(), dir.path());
    assert!(node.engine.as_ref().unwrap().loaded.model.has_draft());
    for (seed, temperature, prompt_tokens) in [(1, 0.0, 37), (2, 0.0, 300), (3, 0.9, 5), (4, 1.3, 127)] {
        let prompt = support::Random(seed).tokens(prompt_tokens, 4);
        let job = |guessing, restore| Job {
            max_new_tokens: 150,
            sampler: Sampler::seeded(temperature, 0.95, seed).unwrap(),
            guessing,
            ..job(&prompt, restore)
        };
        let (expected, plain) = run(&node, job(Guessing::Never, RestoreMode::Nothing));
        assert_eq!((expected.len(), plain.guessed_tokens), (150, 0));
        for guessing in [Guessing::Always, Guessing::Measured] {
            // Everything computed, and stored with guesses cut off in between; then resumed from what was stored.
            for restore in [RestoreMode::Nothing, RestoreMode::Ordered] {
                let (got, account) = run(&node, job(guessing, restore));
                assert!(got == expected, "{guessing:?}, {restore:?}, seed {seed}");
                let (guessed, accepted) = (account.guessed_tokens, account.accepted_tokens);
                assert!(guessed > accepted && (accepted > 0 || guessing != Guessing::Always), "{accepted}");
            }
        }
    }
    // At the end of the context there is no room for a guess.
    let prompt = support::Random(9).tokens(1000, 4);
    let all = |guessing| Job { max_new_tokens: 24, guessing, ..job(&prompt, RestoreMode::Nothing) };
    assert_eq!(run(&node, all(Guessing::Always)).0, run(&node, all(Guessing::Never)).0);
}
