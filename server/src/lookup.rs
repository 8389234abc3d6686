//! Lookup: which prefix lengths of a prompt can be resumed exactly, in which of the caller's scopes.
//!
//! A prefix of `n` tokens can be resumed if every block up to `n` is stored and, for a layout with state groups, the state at
//! `n`; and if at least one token of the prompt is behind it, whose logits are what the caller came for. Off the block grid it
//! takes the blocks before `n` and the state at `n`, which brings the rows between. Every scope has names of its own for the same
//! tokens; the first scope, in the order private, org, public, with the longest answer gives it. What is not stored, not the
//! caller's, expired, evicted or erased is equally absent.

mod tails;

use std::sync::Arc;

use bytes::Bytes;
use esker_prefix::{
    BlockHash, Chain, Family, Group, KvLayout, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeKey,
    ScopeTag, rekey,
};
use esker_proto::{PrefixNames, v1};
use esker_store::{Found, Pins, Store};

use crate::candidates::Sight;
use crate::staging::OfTenant;
pub(crate) use tails::Tails;

/// Most resume points listed in a reply; the greatest is always among them.
const MAX_RESUME_POINTS: usize = 8;
/// A grant pins what was found a moment ago; where something has gone meanwhile, the search is made again.
const ATTEMPTS: usize = 3;

/// A checked question.
pub(crate) struct Question {
    pub(crate) namespace: NamespaceId,
    pub(crate) layout: Arc<KvLayout>,
    pub(crate) names: PrefixNames,
    /// Tokens of the whole prompt, where they are not given themselves; 0 for one more than the hashes cover.
    pub(crate) prompt_tokens: u64,
    /// Scopes to ask, in this order.
    pub(crate) scopes: Vec<ScopeKey>,
    /// What is found by the names of the org's, if that is one of them.
    pub(crate) sight: Sight,
}

/// What is stored of it.
pub(crate) struct Answer {
    pub(crate) layout: Arc<KvLayout>,
    pub(crate) prompt_tokens: u64,
    /// Whether the caller said how long the prompt is, rather than only what hashes cover.
    pub(crate) prompt_given: bool,
    /// Blocks that are there: the position of each in the prefix, and the block. A run from 0 on if the prefix is a chain.
    pub(crate) blocks: Vec<(usize, Found)>,
    /// States that are there, by boundary, ascending; of a layout without state groups those off the block grid.
    pub(crate) states: Vec<Found>,
    /// Whether each block continues the one before it.
    pub(crate) chained: bool,
    /// Blocks that could be offered at most.
    asked_blocks: usize,
    /// Blocks that are stored of a chain without a hole, those behind the last boundary of the coarsest group included.
    run_blocks: usize,
    /// Names in the scope that answered.
    hashes: Vec<BlockHash>,
}

/// Where in a scope a prefix is, by names.
struct Names<'a> {
    hashes: Vec<BlockHash>,
    /// What is found by them.
    sight: Sight,
    /// What names it off the block grid, where that is known; in each of these scopes.
    tails: Vec<Tails<'a>>,
    /// Only what is in one of these scopes counts, where the names do not say it.
    only: Option<Vec<ScopeTag>>,
}

impl Question {
    /// Blocks that may be offered: all but those that would leave nothing to compute.
    pub(crate) fn blocks(&self) -> usize {
        let block_tokens = self.layout.block_tokens() as usize;
        let given = match &self.names {
            PrefixNames::Tokens(tokens) => return (tokens.len() - 1) / block_tokens,
            PrefixNames::Hashes(hashes, _) => hashes.len(),
            PrefixNames::Engine { hashes, .. } => hashes.len(),
        };
        let by_length = self.prompt_tokens.saturating_sub(1) / u64::from(self.layout.block_tokens());
        let limited = self.prompt_tokens > 0 && self.chained();
        if limited { given.min(usize::try_from(by_length).unwrap_or(given)) } else { given }
    }

    fn grain(&self) -> usize {
        self.layout.grain_blocks() as usize
    }

    fn chained(&self) -> bool {
        !matches!(self.names, PrefixNames::Engine { chained: false, .. })
    }

    fn prompt_tokens(&self) -> u64 {
        match &self.names {
            PrefixNames::Tokens(tokens) => tokens.len() as u64,
            _ if self.prompt_tokens > 0 => self.prompt_tokens,
            PrefixNames::Hashes(hashes, tail) if !tail.is_empty() => {
                hashes.len() as u64 * u64::from(self.layout.block_tokens()) + tail.len() as u64
            }
            _ => self.blocks() as u64 * u64::from(self.layout.block_tokens()) + 1,
        }
    }

    fn prompt_given(&self) -> bool {
        self.prompt_tokens > 0 || matches!(self.names, PrefixNames::Tokens(_))
    }

    /// Which of the scopes an answer is from: private, org or public.
    pub(crate) fn scope_of(&self, answer: &Answer) -> &'static str {
        let first = answer.blocks.first().map(|(_, block)| block).or(answer.states.first());
        let Some(found) = first.map(|found| found.scope) else { return "private" };
        // The caller's own is asked first.
        match self.scopes.iter().position(|scope| scope.tag() == found) {
            _ if self.sight.is_of(found) => "org",
            None | Some(0) => "private",
            Some(_) => "public",
        }
    }

    /// Searches, and pins what is found if `pin` says so.
    pub(crate) fn answer(&self, store: &Store, pin: bool) -> (Answer, Option<Pins>) {
        for _ in 1..ATTEMPTS {
            let answer = self.search(store);
            if !pin || answer.best() == 0 && answer.blocks.is_empty() {
                return (answer, None);
            }
            let ends = answer.ends();
            let pins = store.pin(&ends);
            if pins.ends().len() == ends.len() {
                return (answer, Some(pins));
            }
        }
        // Under this much pressure an answer of nothing is true by the time it arrives.
        (self.nothing(), None)
    }

    fn search(&self, store: &Store) -> Answer {
        let blocks = self.blocks();
        let mut best: Option<Answer> = None;
        for names in self.names_by_scope(store, blocks) {
            let answer = self.search_in(store, names, blocks);
            let better =
                |than: &Answer| (answer.best(), answer.blocks.len()) > (than.best(), than.blocks.len());
            if best.as_ref().is_none_or(better) {
                best = Some(answer);
            }
        }
        best.unwrap_or_else(|| self.nothing())
    }

    fn names_by_scope<'a>(&'a self, store: &'a Store, blocks: usize) -> impl Iterator<Item = Names<'a>> + 'a {
        let by_hashes = matches!(self.names, PrefixNames::Hashes(..));
        // Hashes are of one scope already: they are asked for once.
        let scopes = if by_hashes { &self.scopes[..1] } else { &self.scopes[..] };
        // The first scope is always asked; an empty shared one costs nothing.
        let has_some = |scope: &ScopeKey| {
            let tags = std::iter::once(scope.tag()).chain(self.sight.within(scope.tag()).tag());
            tags.map(|tag| store.scope_bytes(tag)).any(|bytes| bytes > 0)
        };
        let asked = scopes.iter().enumerate().filter(move |(at, scope)| *at == 0 || has_some(scope));
        let block_tokens = self.layout.block_tokens();
        let tails = move |scope: &'a ScopeKey, first_block, tokens| Tails {
            namespace: self.namespace,
            scope,
            sight: self.sight.within(scope.tag()),
            block_tokens,
            first_block,
            from_block: 0,
            tokens,
            below: self.prompt_tokens(),
        };
        asked.map(move |(_, scope)| match &self.names {
            PrefixNames::Tokens(tokens) => {
                let whole = &tokens[..blocks * block_tokens as usize];
                let (_, hashes) = Chain::hashes(scope, self.namespace, block_tokens, whole);
                let sight = self.sight.within(scope.tag());
                Names { hashes, sight, tails: vec![tails(scope, 0, tokens)], only: None }
            }
            PrefixNames::Hashes(hashes, tail) => Names {
                hashes: hashes[..blocks].to_vec(),
                sight: self.sight.clone(),
                tails: self.scopes.iter().map(|scope| tails(scope, hashes.len(), tail)).collect(),
                only: Some(self.scopes.iter().map(ScopeKey::tag).chain(self.sight.tag()).collect()),
            },
            PrefixNames::Engine { hashes, .. } => {
                let names = hashes[..blocks].iter().map(|hash| rekey(scope, self.namespace, 0, hash));
                let sight = self.sight.within(scope.tag());
                Names { hashes: names.collect(), sight, tails: Vec::new(), only: None }
            }
        })
    }

    fn search_in(&self, store: &Store, names: Names<'_>, asked_blocks: usize) -> Answer {
        let Names { hashes, sight, tails, only } = names;
        let ids = |kind| hashes.iter().map(move |&hash| ObjectId { kind, hash }).collect::<Vec<_>>();
        let ours = |found: &Found| {
            found.namespace == self.namespace
                && only.as_ref().is_none_or(|scopes| scopes.contains(&found.scope))
        };
        let chained = self.chained();
        let mut blocks: Vec<(usize, Found)> = if chained {
            let run = sight.run(store, self.namespace, &ids(ObjectKind::Block), ours);
            run.into_iter().enumerate().collect()
        } else {
            let found = sight.find(store, self.namespace, &ids(ObjectKind::Block)).into_iter().enumerate();
            found.filter_map(|(at, found)| Some((at, found.filter(ours)?))).collect()
        };
        blocks.truncate(asked_blocks);
        let run_blocks = blocks.len();
        if chained {
            // A coarse group is whole at multiples of its grain only; grains are powers of two, so the coarsest decides.
            blocks.truncate(run_blocks / self.grain() * self.grain());
        }
        let mut states: Vec<Found> = if chained && self.layout.has_states() {
            let ids = ids(ObjectKind::State);
            let found = sight.find(store, self.namespace, &ids[..blocks.len()]).into_iter().flatten();
            found.filter(ours).filter(|state| is_multiple(state.tokens, &self.layout)).collect()
        } else {
            Vec::new()
        };
        let (hashes_there, scope) = (&hashes[..blocks.len()], blocks.last().map(|(_, block)| block.scope));
        for mut tails in tails.into_iter().filter(|tails| scope.is_none_or(|scope| tails.are_of(scope))) {
            if !self.layout.has_states() {
                // Whole blocks can be resumed as they are, so only what lies behind all of them is worth finding.
                tails.from_block = blocks.len();
            }
            states.extend(tails.find(store, hashes_there, MAX_RESUME_POINTS, ours));
        }
        states.sort_by_key(|state| state.tokens);
        let (layout, prompt_tokens) = (Arc::clone(&self.layout), self.prompt_tokens());
        let prompt_given = self.prompt_given();
        Answer {
            layout,
            prompt_tokens,
            prompt_given,
            blocks,
            states,
            chained,
            asked_blocks,
            run_blocks,
            hashes,
        }
    }

    fn nothing(&self) -> Answer {
        Answer {
            layout: Arc::clone(&self.layout),
            prompt_tokens: self.prompt_tokens(),
            prompt_given: self.prompt_given(),
            blocks: Vec::new(),
            states: Vec::new(),
            chained: self.chained(),
            asked_blocks: self.blocks(),
            run_blocks: 0,
            hashes: Vec::new(),
        }
    }
}

impl Answer {
    fn block_tokens(&self) -> u64 {
        u64::from(self.layout.block_tokens())
    }

    /// Tokens of the blocks that could be offered at most.
    pub(crate) fn asked_tokens(&self) -> u64 {
        self.asked_blocks as u64 * self.block_tokens()
    }

    /// Tokens of the leading blocks without a hole.
    pub(crate) fn history_tokens(&self) -> u64 {
        let run = self.blocks.iter().enumerate().take_while(|(at, (position, _))| at == position).count();
        run as u64 * self.block_tokens()
    }

    /// Whether nothing can be resumed without a state.
    fn needs_states(&self) -> bool {
        self.layout.has_states() && self.chained
    }

    /// The greatest prefix that can be resumed; 0 for none.
    pub(crate) fn best(&self) -> u64 {
        let with_state = self.states.last().map_or(0, |state| state.tokens);
        if self.needs_states() { with_state } else { with_state.max(self.history_tokens()) }
    }

    /// Whether a prefix of this many tokens can be resumed.
    pub(crate) fn is_resumable(&self, tokens: u64) -> bool {
        let of_blocks = || tokens > 0 && tokens <= self.history_tokens() && is_multiple(tokens, &self.layout);
        self.states.iter().any(|state| state.tokens == tokens) || !self.needs_states() && of_blocks()
    }

    /// The most tokens that an account may say came from this grant.
    pub(crate) fn best_credit(&self) -> u64 {
        if self.chained { self.best() } else { self.blocks.len() as u64 * self.block_tokens() }
    }

    /// Whether an account may say so many: a prefix that can be resumed, or some blocks where each stands for itself.
    pub(crate) fn is_creditable(&self, tokens: u64) -> bool {
        if self.chained {
            self.is_resumable(tokens)
        } else {
            tokens > 0 && tokens <= self.best_credit() && tokens.is_multiple_of(self.block_tokens())
        }
    }

    /// Prefix lengths worth listing, descending.
    pub(crate) fn resume_points(&self) -> Vec<u64> {
        let mut points: Vec<u64> = self.states.iter().map(|state| state.tokens).collect();
        if !self.needs_states() {
            // Of whole blocks the most: every shorter one can be resumed as well.
            points.extend(Some(self.history_tokens()).filter(|&tokens| tokens > 0));
        }
        points.sort_unstable_by(|a, b| b.cmp(a));
        points.truncate(MAX_RESUME_POINTS);
        points
    }

    /// What a pin has to hold.
    fn ends(&self) -> Vec<ObjectId> {
        // Of a chain the last block, and the last of the org's before the first of the tenant's own.
        let is_end = |at: usize| {
            let next = self.blocks.get(at + 1);
            !self.chained || next.is_none_or(|(_, next)| next.scope != self.blocks[at].1.scope)
        };
        let ends = (0..self.blocks.len()).filter(|&at| is_end(at)).map(|at| self.blocks[at].1.id);
        ends.chain(self.states.iter().map(|state| state.id)).collect()
    }

    /// Objects listed.
    pub(crate) fn objects(&self) -> usize {
        self.blocks.len() + self.states.len()
    }

    /// The reply, without a grant.
    pub(crate) fn reply(&self, staging: &OfTenant<'_>, want_hashes: bool) -> v1::LookupReply {
        let history_tokens = self.history_tokens();
        let best = self.best();
        let hashes = if want_hashes { &self.hashes[..self.blocks.len().min(self.hashes.len())] } else { &[] };
        v1::LookupReply {
            history_tokens,
            resume_points: self
                .resume_points()
                .into_iter()
                .map(|tokens| resume_point(&self.layout, tokens, self.lacks_optional(tokens)))
                .collect(),
            best: Some(v1::Best { tokens: best, replay_tokens: history_tokens.saturating_sub(best) }),
            resumable: self.resumable(),
            hashes: hashes.iter().map(|hash| Bytes::copy_from_slice(hash.as_bytes())).collect(),
            misses: self.misses(staging),
            ..Default::default()
        }
    }

    fn resumable(&self) -> Bytes {
        let mut bits = vec![0_u8; self.blocks.last().map_or(0, |(last, _)| last / 8 + 1)];
        let mut set = |at: usize| bits[at / 8] |= 1 << (at % 8);
        if self.needs_states() {
            let on_grid = self.states.iter().filter(|state| state.tokens.is_multiple_of(self.block_tokens()));
            let at = |state: &Found| usize::try_from(state.tokens / self.block_tokens()).unwrap_or(1) - 1;
            on_grid.map(at).for_each(&mut set);
        } else {
            let resumable =
                |at: usize| !self.chained || (at + 1).is_multiple_of(self.layout.grain_blocks() as usize);
            self.blocks.iter().map(|(at, _)| *at).filter(|&at| resumable(at)).for_each(&mut set);
        }
        bits.into()
    }

    /// Whether the state at a resume point lacks the optional group: its object is shorter by just that.
    fn lacks_optional(&self, tokens: u64) -> bool {
        let state = self.states.iter().find(|state| state.tokens == tokens);
        state.is_some_and(|state| {
            state.raw_bytes < self.layout.object_bytes_at(ObjectKind::State, state.tokens)
        })
    }

    /// Up to where a history group is there: stored, or waiting for the other groups of its blocks.
    fn closed_tokens(&self, group: &Group, staging: &OfTenant<'_>) -> u64 {
        let layout = &self.layout;
        let name = |spec: &PlaneSpec| layout.groups()[usize::from(spec.group)].name == group.name;
        let mut blocks = self.run_blocks;
        for &hash in self.hashes.iter().take(self.asked_blocks).skip(self.run_blocks) {
            let waiting = staging.planes(ObjectId { kind: ObjectKind::Block, hash });
            let mut of_group =
                layout.planes(ObjectKind::Block).iter().zip(&waiting).filter(|(spec, _)| name(spec));
            if waiting.is_empty() || !of_group.all(|(_, is_there)| *is_there) {
                break;
            }
            blocks += 1;
        }
        let grain = group.grain_blocks as usize;
        (blocks / grain * grain) as u64 * self.block_tokens()
    }

    fn misses(&self, staging: &OfTenant<'_>) -> Vec<v1::Miss> {
        let history_tokens = self.history_tokens();
        let asked_tokens = self.asked_blocks as u64 * self.block_tokens();
        let no_state = self.chained && self.best() < history_tokens;
        let groups = self.layout.groups().iter();
        let missing = groups.filter_map(|group| match group.family {
            Family::History => {
                let closed = if self.chained { self.closed_tokens(group, staging) } else { history_tokens };
                (closed < asked_tokens).then_some((group, closed, "absent"))
            }
            Family::State if no_state && !group.optional => Some((group, self.best(), "no_state")),
            Family::State => None,
        });
        missing
            .map(|(group, first_missing_token, reason)| v1::Miss {
                group: group.name.clone(),
                first_missing_token,
                reason: reason.into(),
            })
            .collect()
    }
}

/// Whether a prefix ends where the coarsest group does.
fn is_multiple(tokens: u64, layout: &KvLayout) -> bool {
    let block_tokens = u64::from(layout.block_tokens());
    tokens.is_multiple_of(block_tokens * u64::from(layout.grain_blocks()))
}

fn resume_point(layout: &KvLayout, tokens: u64, lacks_optional: bool) -> v1::ResumePoint {
    let blocks = tokens / u64::from(layout.block_tokens());
    let missing = |group: &Group| lacks_optional && group.optional;
    let at_end = layout.planes_at(ObjectKind::State, tokens);
    let bytes_by_group = layout.groups().iter().zip(0..).filter(|(group, _)| !missing(group)).map(
        |(group, index): (&Group, u16)| {
            let of_state = at_end.iter().filter(|plane| plane.group == index);
            let of_state: u64 = of_state.map(|plane| plane.len_bytes).sum();
            let of_block = u64::from(group.rows) * group.row_bytes() * group.layers.len() as u64;
            let of_blocks = match group.family {
                Family::History => of_block * (blocks / u64::from(group.grain_blocks)),
                Family::State => 0,
            };
            v1::GroupBytes { group: group.name.clone(), bytes: of_blocks + of_state }
        },
    );
    let missing_optional = layout.groups().iter().filter(|group| missing(group));
    v1::ResumePoint {
        tokens,
        bytes_by_group: bytes_by_group.collect(),
        missing_optional: missing_optional.map(|group| group.name.clone()).collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
