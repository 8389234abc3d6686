//! Promise: a tenant learns nothing of what another one stored: not from a reply, not from the time that it takes. The same
//! measurement within one tenant must tell stored from not stored, or it would prove nothing.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use esker_client::v1;
use esker_prefix::{Dtype, Family, Field, Group, KvLayout, Namespace, TokenId};
use esker_tests::identity::{Bearer, Issuer};
use esker_tests::{Node, Prompt, Random, put_steps, scratch, tokens};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::decoder_client::DecoderClient;
use v1::prefix_cache_client::PrefixCacheClient;

/// Prompts of each kind, asked for with a lookup and with a generation: chance alone moves an AUC by 0.05 once in thousands
/// of runs with the former, once in hundreds with the latter.
const LOOKUPS: u64 = 1_000;
const GENERATIONS: u64 = 600;
/// Generations of the control, where the difference is great.
const CONTROLS: u64 = 40;
/// Tokens of a prompt: a block and one token.
const PROMPT_TOKENS: usize = 128 + 1;
/// Of a prompt of that control: so many that computing them takes longer than reading them back.
const CONTROL_TOKENS: usize = 16 * 128 + 1;

struct Tenant {
    cache: PrefixCacheClient<InterceptedService<Channel, Bearer>>,
    decoder: DecoderClient<InterceptedService<Channel, Bearer>>,
}

impl Tenant {
    fn new(node: &Node, issuer: &Issuer, name: &str) -> Result<Self> {
        let bearer = issuer.token(name, &["reader", "writer"])?;
        let channel = || InterceptedService::new(node.channel.clone(), bearer.clone());
        Ok(Self { cache: PrefixCacheClient::new(channel()), decoder: DecoderClient::new(channel()) })
    }

    /// Stores a block of each of these prompts, in a namespace of small rows, whose id it gives.
    async fn store_small(&mut self, seeds: std::ops::Range<u64>) -> Result<bytes::Bytes> {
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
        };
        let layout = Arc::new(KvLayout::new("small", 128, vec![group])?);
        let about =
            Namespace { weights: [1; 32], tokenizer: [2; 32], layout: layout.id(), adapter: String::new() };
        let request = v1::RegisterNamespaceRequest {
            weights_fingerprint: bytes::Bytes::copy_from_slice(&about.weights),
            tokenizer_digest: bytes::Bytes::copy_from_slice(&about.tokenizer),
            layout_json: layout.to_json(),
            adapter: String::new(),
        };
        let namespace = self.cache.register_namespace(request).await?.into_inner().namespace;
        let mut puts = tokio::task::JoinSet::new();
        for seed in seeds {
            let prompt =
                Prompt { tokens: tokens(seed, PROMPT_TOKENS), ..Prompt::new(about.id(), &layout, seed, 1) };
            let mut cache = self.cache.clone();
            puts.spawn(async move {
                let steps = put_steps(&prompt, prompt.blocks([1]));
                let steps = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) });
                let steps = tokio_stream::iter(steps.collect::<Vec<_>>());
                let mut replies = cache.put(steps).await?.into_inner();
                let reply = replies.message().await?.context("a put is answered")?;
                ensure!(reply.outcome() == v1::Outcome::Stored, "{reply:?}");
                Ok(())
            });
            if puts.len() >= 8 {
                puts.join_next().await.context("some are there")???;
            }
        }
        puts.join_all().await.into_iter().collect::<Result<()>>()?;
        Ok(namespace)
    }

    /// Every field of the reply but the ids, and the microseconds that it took.
    async fn lookup(&mut self, namespace: &bytes::Bytes, prompt: &[TokenId]) -> Result<(String, f64)> {
        let tokens = prompt.iter().map(|token| token.0).collect();
        let request = v1::LookupRequest { namespace: namespace.clone(), tokens, ..Default::default() };
        let started = Instant::now();
        let mut reply = self.cache.lookup(request).await?.into_inner();
        let took = started.elapsed().as_secs_f64();
        if !reply.grant.is_empty() {
            self.cache.release(v1::ReleaseRequest { grant: std::mem::take(&mut reply.grant) }).await?;
        }
        Ok((format!("{reply:?}"), took))
    }

    /// The account of a generation of one token, and the time to that token.
    async fn generate(&mut self, prompt: &[TokenId]) -> Result<(String, f64)> {
        let ids = prompt.iter().map(|token| token.0).collect();
        let prompt = v1::generate_request::Prompt::Tokens(v1::Tokens { ids });
        let request = v1::GenerateRequest { prompt: Some(prompt), max_new_tokens: 1, ..Default::default() };
        let started = Instant::now();
        let mut events = self.decoder.generate(request).await?.into_inner();
        let (mut took, mut account) = (0.0, String::new());
        while let Some(reply) = events.message().await? {
            match reply.event.context("an event")? {
                v1::generate_reply::Event::Token(_) => took = started.elapsed().as_secs_f64(),
                v1::generate_reply::Event::Usage(usage) => {
                    account = format!("{} {}", usage.prompt_cache_hit_tokens, usage.bytes_read);
                }
                v1::generate_reply::Event::Progress(_) | v1::generate_reply::Event::Prompt(_) => {}
            }
        }
        Ok((account, took))
    }
}

/// What one kind of probe gave for prompts that were stored and for those that were not.
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
        let all: std::collections::BTreeSet<&String> = self.replies.iter().flatten().collect();
        all.len() > 1
    }

    /// Area under the ROC curve of «stored is faster»: 0.5 where time says nothing, 1 where it says all.
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
}

/// Asks for prompts of the first half of `seeds`, which are stored by somebody, and of the second, which nobody stored, in
/// random order: with a lookup, or with a generation from a prompt of so many tokens.
async fn probe(
    tenant: &mut Tenant,
    namespace: &bytes::Bytes,
    random: &mut Random,
    (stored, fresh, count): (u64, u64, u64),
    generate: Option<usize>,
) -> Result<Probes> {
    let mut order: Vec<(bool, u64)> =
        (0..count).flat_map(|at| [(true, stored + at), (false, fresh + at)]).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, usize::try_from(random.below(at as u64 + 1))?);
    }
    let mut probes = Probes::default();
    for (is_stored, seed) in order {
        let seen = match generate {
            Some(length) => tenant.generate(&tokens(seed, length)).await?,
            None => tenant.lookup(namespace, &tokens(seed, PROMPT_TOKENS)).await?,
        };
        probes.add(is_stored, seen);
    }
    Ok(probes)
}

#[tokio::test]
async fn neither_replies_nor_time_tell_what_another_tenant_stored() -> Result<()> {
    let mut random = Random::announced();
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy("[tenants.alice]\n[tenants.bob]\n")?;
    let policy = policy.to_str().context("a path")?;
    let node = Node::start(&folder.path().join("data"), &["--segment-mib", "16", "--policy", policy]).await?;
    let mut alice = Tenant::new(&node, &issuer, "alice")?;
    let mut bob = Tenant::new(&node, &issuer, "bob")?;
    let namespace = alice.decoder.describe(v1::DescribeRequest {}).await?.into_inner().namespace;

    // Alice stores: what lookups are to find by puts of small blocks, the rest by generating.
    let base = random.number() >> 1;
    let (small, generated) = (2 * LOOKUPS, GENERATIONS + CONTROLS);
    let stored = small + generated;
    let small_namespace = alice.store_small(base..base + small).await?;
    for seed in base + small..base + stored {
        let control = seed >= base + small + GENERATIONS;
        alice.generate(&tokens(seed, if control { CONTROL_TOKENS } else { PROMPT_TOKENS })).await?;
    }
    let last = tokens(base + stored - 1, CONTROL_TOKENS);
    let started = Instant::now();
    while !alice.lookup(&namespace, &last).await?.0.contains("history_tokens: 2048") {
        ensure!(started.elapsed().as_secs() < 60, "the last prompt was not stored");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let mut from = [base, base + stored];
    let mut next = |count: u64| {
        let given = (from[0], from[1], count);
        from = from.map(|seed| seed + count);
        given
    };

    // A first call of each kind is not like the others.
    for tenant in [&mut alice, &mut bob] {
        probe(tenant, &small_namespace, &mut random, (base + 2 * stored, base + 3 * stored, 20), None)
            .await?;
    }
    for (count, control, generate, what) in
        [(LOOKUPS, LOOKUPS, false, "lookup"), (GENERATIONS, CONTROLS, true, "time to first token")]
    {
        let across =
            probe(&mut bob, &small_namespace, &mut random, next(count), generate.then_some(PROMPT_TOKENS))
                .await?;
        let within = probe(
            &mut alice,
            &small_namespace,
            &mut random,
            next(control),
            generate.then_some(CONTROL_TOKENS),
        )
        .await?;
        println!(
            "{what}: across tenants AUC {:.3}, KS p {:.4}; within one AUC {:.3}, KS p {:.6}",
            across.auc(),
            across.chance(),
            within.auc(),
            within.chance(),
        );
        ensure!(!across.replies_differ(), "{what}: a reply tells what another tenant stored");
        ensure!((across.auc() - 0.5).abs() <= 0.05, "{what}: time tells: AUC {:.3}", across.auc());
        ensure!(across.chance() > 1e-3, "{what}: time tells: KS p {}", across.chance());
        // The control: within the tenant everything tells.
        ensure!(within.replies_differ(), "{what}: the control does not separate");
        if generate {
            ensure!(within.auc() > 0.95, "{what}: the control does not separate: AUC {:.3}", within.auc());
        }
    }
    node.kill()
}
