//! Promise: nobody learns what is stored and not his: not from a reply, not from the time that it takes. Neither of another
//! tenant, nor of one that was erased, nor of what has expired or was taken back, nor of what another tenant of an org has put
//! alone. The same measurement within one tenant must tell stored from not stored, or it would prove nothing.
//!
//! A probe compares prompts that were stored with as many that nobody stored, in random order. Where time seems to tell which is
//! which, it is made once more with the same stored prompts and other fresh ones: a leak is there again, chance is not.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::v1;
use esker_prefix::{Dtype, Family, Field, Group, KvLayout, Namespace, NamespaceId, TokenId};
use esker_tests::identity::{Bearer, Issuer};
use esker_tests::{Node, Prompt, Random, pass, put_steps, scratch, tiny_model, tokens};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::admin_client::AdminClient;
use v1::decoder_client::DecoderClient;
use v1::prefix_cache_client::PrefixCacheClient;

/// Prompts of each kind in a probe that is to tell nothing: chance alone moves an AUC by 0.05 once in ten thousand times with
/// the former, once in 150 with the latter, which take longer; twice in a row once in 25,000.
const PROMPTS: u64 = 1_000;
const PROBES: u64 = 500;
/// In a control, where the difference is great.
const CONTROLS: u64 = 50;
/// Tokens of a prompt: a block and one token.
const PROMPT_TOKENS: usize = 128 + 1;
/// Of a prompt of the control of generations: so many that computing them takes longer than reading them back.
const CONTROL_TOKENS: usize = 8 * 128 + 1;
/// Blocks of a long chain: so many that finding them takes longer than not finding them.
const CHAIN_BLOCKS: u32 = 4_000;
/// How often in a row a chain is asked for. The shortest time counts: it is the one that nothing else has stretched.
const CHAIN_ASKED: usize = 2;

/// What is asked for. Each prompt has a seed, from which it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    /// A lookup of a prompt of one block, by its tokens.
    Prompt,
    /// Lookups of a long chain, by an engine's hashes: so many, of which the shortest counts.
    Chain(usize),
    /// One token behind a prompt of so many.
    Generation(usize),
}

/// A namespace of small blocks.
struct Small {
    id: NamespaceId,
    layout: Arc<KvLayout>,
}

impl Small {
    async fn register(tenant: &mut Tenant) -> Result<Self> {
        let group = Group {
            name: "latent".into(),
            family: Family::History,
            layers: vec![0],
            rows: 128,
            fields: vec![Field { name: "values".into(), dtype: Dtype::U8, count: 8 }],
            restore_order: 0,
            plane_layers: 1,
            optional: false,
            grain_blocks: 1,
            run_tokens: 0,
        };
        let layout = Arc::new(KvLayout::new("small", 128, vec![group])?);
        let about =
            Namespace { weights: [1; 32], tokenizer: [2; 32], layout: layout.id(), adapter: String::new() };
        let request = v1::RegisterNamespaceRequest {
            weights_fingerprint: Bytes::copy_from_slice(&about.weights),
            tokenizer_digest: Bytes::copy_from_slice(&about.tokenizer),
            layout_json: layout.to_json(),
            adapter: String::new(),
        };
        tenant.cache.register_namespace(request).await?;
        Ok(Self { id: about.id(), layout })
    }

    fn namespace(&self) -> Bytes {
        Bytes::copy_from_slice(self.id.as_bytes())
    }

    fn question(&self, ask: Ask, seed: u64) -> v1::LookupRequest {
        let namespace = self.namespace();
        match ask {
            Ask::Chain(_) => v1::LookupRequest {
                namespace,
                engine_hashes: chain(seed),
                want_hashes: true,
                ..Default::default()
            },
            _ => v1::LookupRequest { namespace, tokens: ids(seed, PROMPT_TOKENS), ..Default::default() },
        }
    }
}

/// The hashes that an engine gives the blocks of a long chain.
fn chain(seed: u64) -> Vec<Bytes> {
    let mut random = Random(seed);
    let mut bytes = vec![0; CHAIN_BLOCKS as usize * 32];
    bytes.chunks_exact_mut(8).for_each(|eight| eight.copy_from_slice(&random.number().to_le_bytes()));
    let bytes = Bytes::from(bytes);
    (0..CHAIN_BLOCKS as usize).map(|block| bytes.slice(block * 32..(block + 1) * 32)).collect()
}

fn ids(seed: u64, count: usize) -> Vec<u32> {
    tokens(seed, count).into_iter().map(|TokenId(id)| id).collect()
}

/// One who asks.
#[derive(Clone)]
struct Tenant {
    cache: PrefixCacheClient<InterceptedService<Channel, Bearer>>,
    decoder: DecoderClient<InterceptedService<Channel, Bearer>>,
}

impl Tenant {
    fn new(node: &Node, issuer: &Issuer, name: &str, roles: &[&str]) -> Result<Self> {
        let bearer = issuer.token(name, roles)?;
        let channel = || InterceptedService::new(node.channel.clone(), bearer.clone());
        Ok(Self { cache: PrefixCacheClient::new(channel()), decoder: DecoderClient::new(channel()) })
    }

    /// Stores what a probe asks for, each kind under its seeds, and waits until it is found.
    async fn store(&mut self, small: &Small, stored: &Stored, ttl: v1::TtlClass) -> Result<()> {
        let mut puts = tokio::task::JoinSet::new();
        for seed in stored.prompts.clone() {
            let prompt = Prompt::new(small.id, &small.layout, seed, 1);
            puts.spawn(put(self.cache.clone(), put_steps(&prompt, prompt.blocks([1])), ttl, stored.scope));
            if puts.len() >= 8 {
                puts.join_next().await.context("some are there")???;
            }
        }
        puts.join_all().await.into_iter().collect::<Result<()>>()?;
        let prompt = Prompt::new(small.id, &small.layout, stored.chain, CHAIN_BLOCKS);
        let mut steps = put_steps(&prompt, prompt.blocks(1..=CHAIN_BLOCKS.into()));
        if let Some(v1::put_request::Step::Prefix(prefix)) = steps.first_mut() {
            prefix.tokens.clear();
            prefix.engine_hashes = chain(stored.chain);
        }
        put(self.cache.clone(), steps, ttl, stored.scope).await?;
        let of_length = |seeds: &Range<u64>, length| seeds.clone().map(move |seed| (seed, length));
        let short = of_length(&stored.generations, PROMPT_TOKENS);
        let mut generations = tokio::task::JoinSet::new();
        for (seed, length) in short.chain(of_length(&stored.controls, CONTROL_TOKENS)) {
            let mut tenant = self.clone();
            generations.spawn(async move { tenant.generate(seed, length, ttl).await });
            if generations.len() >= 8 {
                generations.join_next().await.context("some are there")???;
            }
        }
        generations.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
        let started = Instant::now();
        while self.found(small, stored).await?.contains(&false) {
            ensure!(started.elapsed() < Duration::from_secs(60), "what was stored is not found");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Whether the last that was stored of each kind is found.
    async fn found(&mut self, small: &Small, stored: &Stored) -> Result<Vec<bool>> {
        let namespace = self.decoder.describe(v1::DescribeRequest {}).await?.into_inner().namespace;
        let mut questions = vec![
            small.question(Ask::Chain(1), stored.chain),
            small.question(Ask::Prompt, stored.prompts.end - 1),
        ];
        for (seeds, length) in [(&stored.generations, PROMPT_TOKENS), (&stored.controls, CONTROL_TOKENS)] {
            if !seeds.is_empty() {
                let (namespace, tokens) = (namespace.clone(), ids(seeds.end - 1, length));
                questions.push(v1::LookupRequest { namespace, tokens, ..Default::default() });
            }
        }
        let mut found = Vec::new();
        for question in questions {
            let blocks = if question.tokens.is_empty() {
                u64::from(CHAIN_BLOCKS)
            } else {
                (question.tokens.len() as u64 - 1) / 128
            };
            let reply = self.cache.lookup(v1::LookupRequest { no_grant: true, ..question }).await?;
            found.push(reply.into_inner().history_tokens == blocks * 128);
        }
        Ok(found)
    }

    /// Every field of the reply but the ids, and the seconds that it took.
    async fn lookup(&mut self, request: v1::LookupRequest) -> Result<(String, f64)> {
        let started = Instant::now();
        let mut reply = self.cache.lookup(request).await?.into_inner();
        let took = started.elapsed().as_secs_f64();
        if !reply.grant.is_empty() {
            self.cache.release(v1::ReleaseRequest { grant: std::mem::take(&mut reply.grant) }).await?;
        }
        Ok((format!("{reply:?}"), took))
    }

    /// The account of a generation of one token, and the seconds to that token.
    async fn generate(&mut self, seed: u64, length: usize, ttl: v1::TtlClass) -> Result<(String, f64)> {
        let prompt = v1::generate_request::Prompt::Tokens(v1::Tokens { ids: ids(seed, length) });
        let request = v1::GenerateRequest {
            prompt: Some(prompt),
            max_new_tokens: 1,
            ttl: ttl.into(),
            ..Default::default()
        };
        let started = Instant::now();
        let mut events = self.decoder.generate(request).await?.into_inner();
        let (mut took, mut account) = (None, String::new());
        while let Some(reply) = events.message().await? {
            match reply.event.context("an event")? {
                v1::generate_reply::Event::Token(_) => took = Some(started.elapsed().as_secs_f64()),
                v1::generate_reply::Event::Usage(usage) => {
                    account = format!("{} {}", usage.prompt_cache_hit_tokens, usage.bytes_read);
                }
                v1::generate_reply::Event::Progress(_) | v1::generate_reply::Event::Prompt(_) => {}
            }
        }
        Ok((account, took.context("no token came")?))
    }

    async fn ask(&mut self, small: &Small, ask: Ask, seed: u64) -> Result<(String, f64)> {
        match ask {
            Ask::Generation(length) => self.generate(seed, length, v1::TtlClass::Unspecified).await,
            Ask::Prompt => self.lookup(small.question(ask, seed)).await,
            Ask::Chain(asked) => {
                let question = small.question(ask, seed);
                let (mut replies, mut least) = (String::new(), f64::INFINITY);
                for _ in 0..asked {
                    let (reply, took) = self.lookup(question.clone()).await?;
                    replies += &reply;
                    least = least.min(took);
                }
                Ok((replies, least))
            }
        }
    }
}

/// Puts objects, all of which must be taken. They are found a moment later.
async fn put(
    mut cache: PrefixCacheClient<InterceptedService<Channel, Bearer>>,
    mut steps: Vec<v1::put_request::Step>,
    ttl: v1::TtlClass,
    scope: v1::Scope,
) -> Result<()> {
    if let Some(v1::put_request::Step::Prefix(prefix)) = steps.first_mut() {
        prefix.set_ttl(ttl);
        prefix.set_scope(scope);
        prefix.set_durability(v1::Durability::Buffered);
    }
    let steps = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) });
    let mut replies = cache.put(tokio_stream::iter(steps.collect::<Vec<_>>())).await?.into_inner();
    while let Some(reply) = replies.message().await? {
        ensure!(reply.outcome() == v1::Outcome::Stored, "{reply:?}");
    }
    Ok(())
}

/// Seeds of what one tenant stores.
struct Stored {
    scope: v1::Scope,
    prompts: Range<u64>,
    chain: u64,
    /// Prompts of [`PROMPT_TOKENS`].
    generations: Range<u64>,
    /// Prompts of [`CONTROL_TOKENS`].
    controls: Range<u64>,
}

/// Gives seeds, each once.
struct Seeds(u64);

impl Seeds {
    fn take(&mut self, count: u64) -> Range<u64> {
        self.0 += count;
        self.0 - count..self.0
    }

    fn stored(&mut self, controls: u64) -> Stored {
        Stored {
            scope: v1::Scope::Private,
            prompts: self.take(PROMPTS),
            chain: self.take(1).start,
            generations: self.take(PROBES),
            controls: self.take(controls),
        }
    }

    /// For the scope of an org, in which nobody generates.
    fn shared(&mut self) -> Stored {
        let stored = self.stored(0);
        Stored { scope: v1::Scope::Org, generations: self.take(0), ..stored }
    }
}

impl Stored {
    /// So many seeds to ask for; the chain again and again.
    fn seeds(&self, ask: Ask, count: u64) -> Vec<u64> {
        let all = match ask {
            Ask::Prompt => self.prompts.clone(),
            Ask::Chain(_) => return (0..count).map(|_| self.chain).collect(),
            Ask::Generation(CONTROL_TOKENS) => self.controls.clone(),
            Ask::Generation(_) => self.generations.clone(),
        };
        all.take(usize::try_from(count).unwrap_or(usize::MAX)).collect()
    }
}

/// What a probe gave for prompts that were stored and for those that were not.
#[derive(Default)]
struct Probes {
    replies: [Vec<String>; 2],
    times: [Vec<f64>; 2],
}

impl Probes {
    fn add(&mut self, stored: bool, (reply, took): (String, f64)) {
        self.replies[usize::from(stored)].push(reply);
        self.times[usize::from(stored)].push(took);
    }

    /// Whether some field of some reply says which is which.
    fn replies_differ(&self) -> bool {
        let all: BTreeSet<&String> = self.replies.iter().flatten().collect();
        all.len() > 1
    }

    /// Area under the ROC curve of «stored is faster»: 0.5 where time says nothing; 1, or 0 where stored is slower, where it says
    /// all.
    fn auc(&self) -> f64 {
        let [cold, warm] = &self.times;
        let pairs = warm.iter().flat_map(|warm| cold.iter().map(move |cold| (warm, cold)));
        let (mut wins, mut count) = (0.0, 0.0);
        for (warm, cold) in pairs {
            wins += if warm < cold { 1.0 } else { f64::from(u8::from(warm == cold)) / 2.0 };
            count += 1.0;
        }
        wins / count
    }

    /// The probability that a difference like the one seen between the two distributions of time is chance (two-sample
    /// Kolmogorov-Smirnov test, asymptotic).
    fn chance(&self) -> f64 {
        let mut all: Vec<(f64, bool)> = Vec::new();
        for (at, times) in self.times.iter().enumerate() {
            all.extend(times.iter().map(|&time| (time, at == 1)));
        }
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let [cold, warm] = [self.times[0].len() as f64, self.times[1].len() as f64];
        let (mut below, mut greatest) = ([0.0, 0.0], 0.0_f64);
        for (_, stored) in all {
            below[usize::from(stored)] += 1.0 / if stored { warm } else { cold };
            greatest = greatest.max(f64::abs(below[0] - below[1]));
        }
        let lambda = greatest * (cold * warm / (cold + warm)).sqrt();
        let term =
            |k: i32| f64::from(1 - 2 * ((k + 1) % 2)) * (-2.0 * f64::from(k * k) * lambda * lambda).exp();
        (2.0 * (1..100).map(term).sum::<f64>()).clamp(0.0, 1.0)
    }

    fn time_tells(&self) -> bool {
        (self.auc() - 0.5).abs() > 0.05 || self.chance() <= 1e-3
    }

    fn print(&self, what: &str) {
        println!("{what}: AUC {:.3}, KS p {:.6}", self.auc(), self.chance());
    }
}

/// What all probes need.
struct Prober {
    random: Random,
    seeds: Seeds,
    small: Small,
}

impl Prober {
    /// Asks for prompts that somebody stored and for as many that nobody did, in random order.
    async fn probe(&mut self, tenant: &mut Tenant, ask: Ask, stored: &[u64]) -> Result<Probes> {
        let fresh = self.seeds.take(stored.len() as u64).map(|seed| (false, seed));
        let mut order: Vec<(bool, u64)> = stored.iter().map(|&seed| (true, seed)).chain(fresh).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, usize::try_from(self.random.below(at as u64 + 1))?);
        }
        let mut probes = Probes::default();
        for (is_stored, seed) in order {
            probes.add(is_stored, tenant.ask(&self.small, ask, seed).await?);
        }
        Ok(probes)
    }

    /// Neither a reply nor time may tell `tenant` what of `stored` is, or was, there. It must not store what it asks for.
    async fn tells_nothing(&mut self, what: &str, tenant: &mut Tenant, stored: &Stored) -> Result<()> {
        for ask in [Ask::Prompt, Ask::Chain(CHAIN_ASKED), Ask::Generation(PROMPT_TOKENS)] {
            if ask == Ask::Generation(PROMPT_TOKENS) && stored.generations.is_empty() {
                continue;
            }
            // A first call of each kind is not like the others.
            let unknown: Vec<u64> = self.seeds.take(10).collect();
            self.probe(tenant, ask, &unknown).await?;
            for attempt in 1..=2 {
                let count = if ask == Ask::Prompt { PROMPTS } else { PROBES };
                let probes = self.probe(tenant, ask, &stored.seeds(ask, count)).await?;
                probes.print(&format!("{what}, {ask:?}"));
                ensure!(!probes.replies_differ(), "{what}, {ask:?}: a reply tells");
                if !probes.time_tells() {
                    break;
                }
                let (auc, chance) = (probes.auc(), probes.chance());
                ensure!(attempt == 1, "{what}, {ask:?}: time tells: AUC {auc:.3}, KS p {chance}");
            }
        }
        Ok(())
    }

    /// The control: to whom it belongs, replies and time tell what is stored.
    async fn tells_all(&mut self, tenant: &mut Tenant, stored: &Stored) -> Result<()> {
        for (ask, by_time) in
            [(Ask::Prompt, false), (Ask::Chain(CHAIN_ASKED), true), (Ask::Generation(CONTROL_TOKENS), true)]
        {
            for attempt in 1..=4 {
                // A busy machine blurs the difference, and never makes it: then it takes more asking.
                let ask = match ask {
                    Ask::Chain(asked) => Ask::Chain(asked << (attempt - 1)),
                    ask => ask,
                };
                let probes = self.probe(tenant, ask, &stored.seeds(ask, CONTROLS)).await?;
                probes.print(&format!("the control, {ask:?}"));
                ensure!(probes.replies_differ(), "{ask:?}: the control does not separate by replies");
                // A hit may cost more than a miss, or less.
                let auc = probes.auc().max(1.0 - probes.auc());
                if !by_time || auc > 0.95 {
                    break;
                }
                ensure!(attempt < 4, "{ask:?}: the control does not separate by time: AUC {auc:.3}");
            }
        }
        Ok(())
    }
}

#[tokio::test]
async fn neither_replies_nor_time_tell_what_is_stored_and_not_ones_own() -> Result<()> {
    let mut random = Random::announced();
    let folder = scratch();
    let data = folder.path().join("data");
    let model = tiny_model(folder.path())?;
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy(
        "[tenants.alice]\n[tenants.bob]\n[tenants.carol]\n[tenants.dave]\n[tenants.eve]\n\
         [tenants.frank]\norg = \"research\"\n[tenants.grace]\norg = \"research\"\n",
    )?;
    let [model, policy] = [&model, &policy].map(|path| path.display().to_string());
    let options = ["--segment-mib", "16", "--policy", &policy, "--model", &model];
    let writer = ["reader", "writer"];

    // Alice's is there, Carol's will be erased, Dave's will be too old, Eve's word taken back, and Frank's is his alone in his org.
    let node = Node::start(&data, &options).await?;
    let mut alice = Tenant::new(&node, &issuer, "alice", &writer)?;
    let mut seeds = Seeds(random.number() >> 1);
    let small = Small::register(&mut alice).await?;
    let [of_alice, of_carol, of_dave, of_eve] = [CONTROLS, 0, 0, 0].map(|controls| seeds.stored(controls));
    let of_frank = seeds.shared();
    alice.store(&small, &of_alice, v1::TtlClass::TtlClass24h).await?;
    let (day, minutes) = (v1::TtlClass::TtlClass24h, v1::TtlClass::TtlClass5m);
    for (name, stored, ttl) in [
        ("carol", &of_carol, day),
        ("dave", &of_dave, minutes),
        ("eve", &of_eve, day),
        ("frank", &of_frank, day),
    ] {
        Tenant::new(&node, &issuer, name, &writer)?.store(&small, stored, ttl).await?;
    }
    node.stop().await?;
    pass(&data, 3600)?;

    let node = Node::start(&data, &options).await?;
    // Who only reads stores nothing: what was asked for once is as fresh as before.
    let reader = |name| Tenant::new(&node, &issuer, name, &["reader"]);
    let mut alice = Tenant::new(&node, &issuer, "alice", &writer)?;
    let (mut bob, mut carol, mut dave) = (reader("bob")?, reader("carol")?, reader("dave")?);
    let (mut eve, mut frank, mut grace) = (reader("eve")?, reader("frank")?, reader("grace")?);
    assert_eq!(carol.found(&small, &of_carol).await?, [true; 3], "what is to be erased is there");
    let admin = InterceptedService::new(node.channel.clone(), issuer.token("alice", &["admin"])?);
    let mut admin = AdminClient::new(admin);
    admin.erase_tenant(v1::EraseTenantRequest { tenant: "carol".into() }).await?;
    assert_eq!(eve.found(&small, &of_eve).await?, [true; 3], "what is to be taken back is there");
    let account = v1::RevokeWriterRequest { tenant: "eve".into(), account: "engine".into() };
    admin.revoke_writer(account).await?;
    assert_eq!(frank.found(&small, &of_frank).await?, [true; 2], "who put it finds it");
    let started = Instant::now();
    while dave.found(&small, &of_dave).await?.contains(&true) {
        ensure!(started.elapsed() < Duration::from_secs(30), "what is too old is still found");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let mut prober = Prober { random, seeds, small };
    prober.tells_all(&mut alice, &of_alice).await?;
    prober.tells_nothing("another tenant's", &mut bob, &of_alice).await?;
    prober.tells_nothing("one's own, erased", &mut carol, &of_carol).await?;
    prober.tells_nothing("one's own, expired", &mut dave, &of_dave).await?;
    prober.tells_nothing("one's own, taken back", &mut eve, &of_eve).await?;
    prober.tells_nothing("another's of the org", &mut grace, &of_frank).await?;
    node.kill()
}
