//! The oracle: a model that checks every prefix length by itself against what was put, and knows no chain, no table, no run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use esker_prefix::{
    BlockHash, BlockObject, Chain, Dtype, Family, Field, Group, KvLayout, NamespaceId, ObjectId, ObjectKind,
    RootSecret, ScopeKey, ScopeKind, StateObject, TokenId,
};
use esker_proto::PrefixNames;
use esker_store::{Erase, PutObject, Store, StoreSettings};

use super::{MAX_RESUME_POINTS, Question};
use crate::staging::Staging;
use crate::writers::Place;

/// Questions; each is asked by tokens or by hashes.
const QUESTIONS: usize = 100_000;
const QUESTIONS_A_ROUND: usize = 500;
const BLOCK_TOKENS: usize = 4;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).unwrap()
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// What is stored, as facts about token strings: the rows of a block, by the whole prefix that it ends; the same for states,
/// with whether the optional group is there.
#[derive(Default)]
struct Model {
    blocks: BTreeSet<Vec<u32>>,
    states: BTreeMap<Vec<u32>, bool>,
}

impl Model {
    /// Tokens up to which a group that has rows for `grain` blocks at a time is whole.
    fn closed(&self, prompt: &[u32], grain: usize) -> usize {
        let mut closed = 0;
        for chunk in 0.. {
            let ends = (1..=grain).map(|block| (chunk * grain + block) * BLOCK_TOKENS);
            for end in ends.clone() {
                if end > prompt.len() || !self.blocks.contains(&prompt[..end]) {
                    return closed;
                }
            }
            closed = ends.max().unwrap_or(closed);
        }
        closed
    }

    fn history(&self, layout: &KvLayout, prompt: &[u32]) -> usize {
        // The last token is never offered.
        let prompt = &prompt[..prompt.len() - 1];
        let history = layout.groups().iter().filter(|group| group.family == Family::History);
        history.map(|group| self.closed(prompt, group.grain_blocks as usize)).min().unwrap_or(0)
    }

    /// Every prefix length that can be resumed, and whether the optional group is missing there. Where the tokens behind `known`
    /// are all that is known of a prompt but hashes, nothing off the block grid is found before them.
    fn resumable(&self, layout: &KvLayout, prompt: &[u32], known: usize) -> BTreeMap<usize, bool> {
        let history = self.history(layout, prompt);
        let has_states = layout.groups().iter().any(|group| group.family == Family::State);
        let grain = layout.groups().iter().map(|group| group.grain_blocks as usize).max().unwrap_or(1);
        let mut points = BTreeMap::new();
        for n in 1..prompt.len() {
            // Fetched alone, a prefix has the rows of the coarsest group only where that group ends.
            let (floor, on_grid) = (n - n % BLOCK_TOKENS, n % BLOCK_TOKENS == 0);
            if floor > history || floor % (grain * BLOCK_TOKENS) != 0 {
                continue;
            }
            // What needs no state at the end of its last whole block is not resumed inside an earlier one.
            if !on_grid && (floor < known || !has_states && floor < history) {
                continue;
            }
            match self.states.get(&prompt[..n]) {
                Some(&optional) => points.insert(n, has_states && !optional),
                None if !has_states && on_grid => points.insert(n, false),
                None => None,
            };
        }
        // The longest are enough.
        let off_grid = points.keys().rev().filter(|&n| !n.is_multiple_of(BLOCK_TOKENS));
        for beyond in off_grid.skip(MAX_RESUME_POINTS).copied().collect::<Vec<_>>() {
            points.remove(&beyond);
        }
        points
    }
}

fn random_layout(random: &mut Random) -> Arc<KvLayout> {
    let group = |name: String, family| Group {
        name,
        family,
        layers: vec![0],
        rows: 1,
        fields: vec![Field { name: "values".into(), dtype: Dtype::U8, count: 8 }],
        restore_order: 0,
        plane_layers: 1,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    };
    let mut groups: Vec<Group> =
        (0..1 + random.below(3)).map(|at| group(format!("history {at}"), Family::History)).collect();
    for coarse in groups.iter_mut().skip(1) {
        coarse.grain_blocks = 1 << random.below(3);
    }
    let states = random.below(3);
    groups.extend((0..states).map(|at| group(format!("state {at}"), Family::State)));
    if states > 0 && random.chance(50) {
        groups.push(Group { optional: true, ..group("draft".into(), Family::State) });
    }
    let block_tokens = u32::try_from(BLOCK_TOKENS).unwrap();
    Arc::new(KvLayout::new("random", block_tokens, groups).unwrap())
}

/// A store's content, made at random: chains that fork, with states here and there, and holes where something was erased.
struct Round {
    layout: Arc<KvLayout>,
    namespace: NamespaceId,
    key: ScopeKey,
    model: Model,
    chains: Vec<Vec<u32>>,
    _dir: tempfile::TempDir,
    store: Store,
}

impl Round {
    fn new(random: &mut Random) -> Self {
        let layout = random_layout(random);
        let dir = tempfile::tempdir().unwrap();
        let settings = StoreSettings { segment_bytes: 4 << 20, ..StoreSettings::default() };
        let store = Store::open(dir.path(), settings).unwrap();
        let key = ScopeKey::derive(&RootSecret::new([3; 32]), ScopeKind::Private, "a", 0);
        let namespace = NamespaceId([7; 32]);
        let mut round =
            Self { layout, namespace, key, model: Model::default(), chains: Vec::new(), _dir: dir, store };
        for _ in 0..1 + random.below(6) {
            round.grow(random);
        }
        round
    }

    /// Another chain, perhaps a branch of one that is there.
    fn grow(&mut self, random: &mut Random) {
        let mut tokens = Vec::new();
        if !self.chains.is_empty() && random.chance(70) {
            let trunk = &self.chains[random.below(self.chains.len())];
            tokens.extend_from_slice(&trunk[..random.below(trunk.len() + 1)]);
        }
        let blocks = 1 + random.below(24);
        while tokens.len() < blocks * BLOCK_TOKENS {
            tokens.push(u32::try_from(random.below(3)).unwrap());
        }
        let ids: Vec<TokenId> = tokens.iter().copied().map(TokenId).collect();
        let block_tokens = u32::try_from(BLOCK_TOKENS).unwrap();
        let (genesis, hashes) = Chain::hashes(&self.key, self.namespace, block_tokens, &ids);
        let stored = random.below(hashes.len() + 1);
        let mut objects = Vec::new();
        for at in 0..stored {
            let parent = if at == 0 { genesis } else { hashes[at - 1] };
            objects.push(PutObject::block(&self.layout, self.block(parent, hashes[at], at + 1)));
            self.model.blocks.insert(tokens[..(at + 1) * BLOCK_TOKENS].to_vec());
            let states = self.layout.planes(ObjectKind::State).len();
            let end = &tokens[..(at + 1) * BLOCK_TOKENS];
            if states > 0 && random.chance(25) && !self.model.states.contains_key(end) {
                let optional = random.chance(50);
                let state = self.state(parent, hashes[at], end.len(), optional);
                objects.push(PutObject::state(&self.layout, state));
                self.model.states.insert(end.to_vec(), optional);
            }
        }
        for _ in 0..random.below(4) {
            // Inside the block behind some that are stored.
            let blocks = random.below(stored + 1);
            let end = blocks * BLOCK_TOKENS + 1 + random.below(BLOCK_TOKENS - 1);
            let aligned = blocks.is_multiple_of(self.layout.grain_blocks() as usize);
            if end < tokens.len() && aligned && !self.model.states.contains_key(&tokens[..end]) {
                let optional = random.chance(50);
                let (parent, hash) = self.tail_name(&tokens[..end]);
                objects.push(PutObject::state(&self.layout, self.state(parent, hash, end, optional)));
                self.model.states.insert(tokens[..end].to_vec(), optional);
            }
        }
        for result in self.store.put(objects) {
            result.unwrap();
        }
        self.chains.push(tokens);
        if random.chance(40) && stored > 0 {
            self.erase(random, stored, &hashes);
        }
    }

    /// Hashes of the whole blocks of a prefix that ends off the grid, and its own.
    fn tail_name(&self, tokens: &[u32]) -> (BlockHash, BlockHash) {
        let ids: Vec<TokenId> = tokens.iter().copied().map(TokenId).collect();
        let block_tokens = u32::try_from(BLOCK_TOKENS).unwrap();
        let (genesis, hashes) = Chain::hashes(&self.key, self.namespace, block_tokens, &ids);
        let parent = hashes.last().copied().unwrap_or(genesis);
        let tail = &ids[hashes.len() * BLOCK_TOKENS..];
        (parent, Chain::resume(&self.key, parent).push(tail))
    }

    /// Takes out a state, or the last block of a chain if nothing continues it.
    fn erase(&mut self, random: &mut Random, stored: usize, hashes: &[BlockHash]) {
        let tokens = self.chains.last().unwrap();
        let at = random.below(stored);
        let off_grid =
            |prefix: &&Vec<u32>| !prefix.len().is_multiple_of(BLOCK_TOKENS) && tokens.starts_with(prefix);
        let tail = self.model.states.keys().filter(off_grid).nth(random.below(3)).cloned();
        if let Some(tail) = tail {
            let (_, hash) = self.tail_name(&tail);
            self.store.erase(Erase::Object(ObjectId { kind: ObjectKind::State, hash })).unwrap();
            self.model.states.remove(&tail);
            return;
        }
        let end = tokens[..(at + 1) * BLOCK_TOKENS].to_vec();
        if self.model.states.remove(&end).is_some() {
            self.store.erase(Erase::Object(ObjectId { kind: ObjectKind::State, hash: hashes[at] })).unwrap();
            return;
        }
        let continued = |prefix: &&Vec<u32>| prefix.len() > end.len() && prefix.starts_with(&end);
        if self.model.blocks.iter().chain(self.model.states.keys()).find(continued).is_none() {
            self.store.erase(Erase::Object(ObjectId { kind: ObjectKind::Block, hash: hashes[at] })).unwrap();
            self.model.blocks.remove(&end);
        }
    }

    fn planes(&self, kind: ObjectKind, tokens: usize, optional: bool) -> Vec<Bytes> {
        let planes = self.layout.planes_at(kind, tokens as u64);
        let planes = planes.iter().map(|spec| {
            let lacks = self.layout.groups()[usize::from(spec.group)].optional && !optional;
            Bytes::from(vec![1; if lacks { 0 } else { usize::try_from(spec.len_bytes).unwrap() }])
        });
        planes.collect()
    }

    fn block(&self, parent: BlockHash, hash: BlockHash, blocks: usize) -> BlockObject {
        let tokens = blocks * BLOCK_TOKENS;
        let planes = self.planes(ObjectKind::Block, tokens, false);
        let (tag, tokens) = (self.key.tag(), tokens as u64);
        BlockObject::new(&self.layout, self.namespace, tag, parent, hash, tokens, planes).unwrap()
    }

    fn state(&self, parent: BlockHash, hash: BlockHash, tokens: usize, optional: bool) -> StateObject {
        let planes = self.planes(ObjectKind::State, tokens, optional);
        let (tag, tokens) = (self.key.tag(), tokens as u64);
        StateObject::new(&self.layout, self.namespace, tag, parent, hash, tokens, planes).unwrap()
    }

    /// A prompt that has something to do with what is stored.
    fn prompt(&self, random: &mut Random) -> Vec<u32> {
        let mut prompt = self.chains[random.below(self.chains.len())].clone();
        prompt.truncate(random.below(prompt.len() + 1));
        for _ in 0..random.below(3 * BLOCK_TOKENS) {
            prompt.push(u32::try_from(random.below(3)).unwrap());
        }
        if prompt.is_empty() {
            prompt.push(0);
        }
        prompt
    }

    /// What the service answers, against the model.
    fn check(&self, prompt: &[u32], by_hashes: bool) {
        let tokens: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
        let names = match by_hashes {
            true => {
                let block_tokens = u32::try_from(BLOCK_TOKENS).unwrap();
                let (whole, tail) = tokens.split_at(tokens.len() / BLOCK_TOKENS * BLOCK_TOKENS);
                let hashes = Chain::hashes(&self.key, self.namespace, block_tokens, whole).1;
                if hashes.is_empty() {
                    return;
                }
                PrefixNames::Hashes(hashes, tail.to_vec())
            }
            false => PrefixNames::Tokens(tokens),
        };
        let (namespace, layout) = (self.namespace, Arc::clone(&self.layout));
        let prompt_tokens = prompt.len() as u64;
        let (scopes, sight) = (vec![self.key.clone()], Place::unshared(self.key.clone()).sight);
        let question = Question { namespace, layout, names, prompt_tokens, scopes, sight };
        let (answer, _pins) = question.answer(&self.store, true);
        let reply = answer.reply(
            &Staging::new(&crate::budget::Budget::new(1 << 30)).of(&crate::principal::TenantId("a".into())),
            false,
        );

        let known = if by_hashes { prompt.len() / BLOCK_TOKENS * BLOCK_TOKENS } else { 0 };
        let points = self.model.resumable(&self.layout, prompt, known);
        let has_states = !self.layout.planes(ObjectKind::State).is_empty();
        assert_eq!(
            reply.history_tokens,
            self.model.history(&self.layout, prompt) as u64,
            "history of {prompt:?}"
        );
        let best = points.keys().last().copied().unwrap_or(0);
        let told = reply.best.unwrap();
        let replay = reply.history_tokens.saturating_sub(best as u64);
        assert_eq!((told.tokens, told.replay_tokens), (best as u64, replay));
        let listed: Vec<(u64, bool)> = reply
            .resume_points
            .iter()
            .map(|point| (point.tokens, !point.missing_optional.is_empty()))
            .collect();
        let drafts = self.layout.optional_group().is_some();
        let on_grid = |n: usize| n.is_multiple_of(BLOCK_TOKENS);
        // Of the points that need no state only the greatest is listed.
        let greatest = points.keys().copied().filter(|&n| on_grid(n)).max();
        let said = points.iter().filter(|&(&n, _)| has_states || !on_grid(n) || Some(n) == greatest);
        let expected = said.rev().map(|(&n, &missing)| (n as u64, missing && drafts));
        assert_eq!(listed, expected.take(MAX_RESUME_POINTS).collect::<Vec<_>>(), "points of {prompt:?}");
        let bits = reply.resumable.iter().enumerate();
        let bitmap: BTreeSet<usize> = bits
            .flat_map(|(at, byte)| {
                (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| 8 * at + bit + 1)
            })
            .map(|blocks| blocks * BLOCK_TOKENS)
            .collect();
        let resumable = points.keys().copied().filter(|&n| on_grid(n)).collect();
        assert_eq!(bitmap, resumable, "bitmap of {prompt:?}");
        for n in 0..=prompt.len() as u64 + 8 {
            let is_point = usize::try_from(n).is_ok_and(|n| points.contains_key(&n));
            assert_eq!(answer.is_resumable(n), is_point, "{n} of {prompt:?}");
        }
        for point in &reply.resume_points {
            assert!(point.bytes_by_group.iter().all(|group| group.bytes > 0 || point.tokens < 16));
        }
    }
}

#[test]
fn every_answer_is_the_models() {
    let seed = std::env::var("ESKER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::from(now.subsec_nanos())
    });
    println!("ESKER_SEED={seed}");
    let mut random = Random(seed);
    let (mut asked, mut found, mut off_grid) = (0, 0, 0);
    while asked < QUESTIONS {
        let round = Round::new(&mut random);
        for _ in 0..QUESTIONS_A_ROUND {
            let prompt = round.prompt(&mut random);
            round.check(&prompt, random.chance(50));
            let points = round.model.resumable(&round.layout, &prompt, 0);
            found += usize::from(!points.is_empty());
            off_grid += usize::from(points.keys().any(|n| n % BLOCK_TOKENS != 0));
            asked += 1;
        }
    }
    println!("{asked} questions, {found} with a resume point, {off_grid} with one off the block grid");
    assert!(found * 10 > asked, "too few questions find anything");
    assert!(off_grid * 20 > asked, "too few questions find a state off the grid");
}
