//! Promise: in the scope of an org nobody finds, learns of or is hindered by what one other tenant alone has put, until a second one
//! or a publisher has said the same; and all that an account ever put can be taken back at once, for good.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use esker_client::{Object, v1};
use esker_prefix::KvLayout;
use esker_tests::identity::{Bearer, Claims, Issuer};
use esker_tests::{Fetched, Node, Prompt, flat_layout, put_steps, scratch};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::admin_client::AdminClient;
use v1::events_client::EventsClient;
use v1::prefix_cache_client::PrefixCacheClient;

type Authed = InterceptedService<Channel, Bearer>;

/// An account of a tenant.
struct Account {
    channel: Authed,
    cache: PrefixCacheClient<Authed>,
}

impl Account {
    fn new(node: &Node, issuer: &Issuer, tenant: &str, account: &str, roles: &[&str]) -> Result<Self> {
        let claims = Claims { sub: account.into(), ..Claims::new(tenant, roles) };
        let bearer = Bearer::new(&issuer.sign(&claims)?)?;
        let channel = InterceptedService::new(node.channel.clone(), bearer);
        Ok(Self { cache: PrefixCacheClient::new(channel.clone()), channel })
    }

    async fn register(&mut self, layout: &KvLayout) -> Result<esker_prefix::NamespaceId> {
        let request = v1::RegisterNamespaceRequest {
            weights_fingerprint: vec![1; 32].into(),
            tokenizer_digest: vec![2; 32].into(),
            layout_json: layout.to_json(),
            adapter: String::new(),
        };
        let namespace = self.cache.register_namespace(request).await?.into_inner().namespace;
        Ok(esker_prefix::NamespaceId(namespace[..].try_into()?))
    }

    /// What became of each object.
    async fn put(
        &mut self,
        prompt: &Prompt,
        scope: v1::Scope,
        objects: Vec<Object>,
    ) -> Result<Vec<v1::Outcome>> {
        let mut steps = put_steps(prompt, objects);
        if let Some(v1::put_request::Step::Prefix(prefix)) = steps.first_mut() {
            prefix.scope = scope.into();
        }
        let steps = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) }).collect::<Vec<_>>();
        let mut replies = self.cache.put(tokio_stream::iter(steps)).await?.into_inner();
        let mut outcomes = Vec::new();
        while let Some(reply) = replies.message().await? {
            outcomes.push(reply.outcome());
        }
        Ok(outcomes)
    }

    async fn lookup(&mut self, prompt: &Prompt) -> Result<v1::LookupReply> {
        let request = v1::LookupRequest {
            namespace: bytes::Bytes::copy_from_slice(prompt.namespace.as_bytes()),
            tokens: prompt.tokens.iter().map(|token| token.0).collect(),
            no_grant: true,
            ..Default::default()
        };
        Ok(self.cache.lookup(request).await?.into_inner())
    }

    /// Planes of the whole prompt that are not those of this one, fetched by what the account finds.
    async fn wrong_planes(&mut self, prompt: &Prompt) -> Result<usize> {
        let request = v1::LookupRequest {
            namespace: bytes::Bytes::copy_from_slice(prompt.namespace.as_bytes()),
            tokens: prompt.tokens.iter().map(|token| token.0).collect(),
            ..Default::default()
        };
        let grant = self.cache.lookup(request).await?.into_inner().grant;
        let request = v1::FetchRequest { grant, ..Default::default() };
        let mut replies = self.cache.fetch(request).await?.into_inner();
        let mut fetched = Fetched::default();
        while let Some(reply) = replies.message().await? {
            match reply.event.context("an event")? {
                v1::fetch_reply::Event::Chunk(chunk) => fetched.add(&chunk)?,
                v1::fetch_reply::Event::Missing(missing) => anyhow::bail!("{missing:?}"),
                v1::fetch_reply::Event::Done(done) => fetched.done = done,
            }
        }
        ensure!(fetched.done.usable_tokens + 1 == prompt.tokens.len() as u64, "{:?}", fetched.done);
        Ok(fetched.wrong_planes(prompt))
    }

    async fn found_blocks(&mut self, prompt: &Prompt) -> Result<u64> {
        Ok(self.lookup(prompt).await?.history_tokens / u64::from(prompt.layout.block_tokens()))
    }

    async fn revoke(&self, tenant: &str, account: &str) -> Result<u64, tonic::Status> {
        let request = v1::RevokeWriterRequest { tenant: tenant.into(), account: account.into() };
        let mut admin = AdminClient::new(self.channel.clone());
        Ok(admin.revoke_writer(request).await?.into_inner().objects)
    }
}

const WRITER: &[&str] = &["reader", "writer"];
const TENANTS: &str = "[tenants.alice]\norg = \"research\"\n[tenants.bob]\norg = \"research\"\n\
                       [tenants.carol]\norg = \"research\"\n[tenants.erin]\norg = \"research\"\n[tenants.dave]\n";

async fn start(data: &Path, policy: &Path) -> Result<Node> {
    let policy = policy.to_str().context("a path of text")?;
    Node::start(data, &["--no-model", "--segment-mib", "4", "--policy", policy]).await
}

#[tokio::test]
async fn an_orgs_tenants_find_what_two_of_them_or_a_publisher_have_put() -> Result<()> {
    use v1::Outcome::{Present, Refused, Stored};
    let folder = scratch();
    let data = folder.path().join("data");
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy(TENANTS)?;
    let node = start(&data, &policy).await?;
    let account = |node: &Node, tenant: &str| Account::new(node, &issuer, tenant, "engine", WRITER);
    let (mut alice, mut bob) = (account(&node, "alice")?, account(&node, "bob")?);
    let (mut carol, mut dave) = (account(&node, "carol")?, account(&node, "dave")?);
    let mut erin = account(&node, "erin")?;
    let layout = flat_layout();
    let namespace = alice.register(&layout).await?;
    let prompt = Prompt::new(namespace, &layout, 5, 4);
    let fresh = Prompt::new(namespace, &layout, 6, 4);
    let org = v1::Scope::Org;
    assert_eq!(alice.put(&prompt, org, prompt.blocks(1..=4)).await?, [Stored; 4]);
    assert_eq!(alice.found_blocks(&prompt).await?, 4);
    // Another account of the same tenant.
    let mut second = Account::new(&node, &issuer, "alice", "other-engine", WRITER)?;
    assert_eq!(second.put(&prompt, org, prompt.blocks([1])).await?, [Present]);
    assert_eq!(second.found_blocks(&prompt).await?, 4);

    // For all others it is as if it were not there: in lookups, whatever is asked,
    let told = |reply: v1::LookupReply| format!("{reply:?}");
    assert_eq!(told(bob.lookup(&prompt).await?), told(bob.lookup(&fresh).await?));
    // in what can be continued,
    assert_eq!(bob.put(&prompt, org, prompt.blocks([3])).await?, [Refused]);
    assert_eq!(bob.put(&fresh, org, fresh.blocks([3])).await?, [Refused]);
    // and in what is stored already: other bytes under its name are stored as well, and found by whoever put them.
    let forged = Prompt { seed: 99, ..prompt.clone() };
    assert_eq!(bob.put(&forged, org, forged.blocks(1..=4)).await?, [Stored; 4]);
    assert_eq!((bob.found_blocks(&prompt).await?, carol.found_blocks(&prompt).await?), (4, 0));
    assert_eq!(alice.put(&forged, org, forged.blocks([1])).await?, [Refused], "it has put others");
    assert_eq!(bob.put(&prompt, org, prompt.blocks([1])).await?, [Refused]);
    for (account, seed) in [(&mut alice, prompt.seed), (&mut bob, forged.seed)] {
        let own = Prompt { seed, ..prompt.clone() };
        ensure!(account.wrong_planes(&own).await? == 0, "the bytes of another's");
    }
    // Nobody's word is in the way of what two others say.
    assert_eq!(carol.put(&prompt, org, prompt.blocks(1..=2)).await?, [Stored; 2]);
    assert_eq!(erin.found_blocks(&prompt).await?, 2);
    assert_eq!(alice.found_blocks(&prompt).await?, 4, "two of all, and two of its own behind them");
    ensure!(alice.wrong_planes(&prompt).await? == 0, "the bytes of another's");
    assert_eq!(dave.found_blocks(&prompt).await?, 0, "dave is of no org");
    assert_eq!(carol.put(&prompt, org, prompt.blocks([1])).await?, [Present]);
    // It goes on from there, and does not learn from an answer that another has put the same meanwhile.
    assert_eq!(alice.put(&prompt, org, prompt.blocks(1..=4)).await?, [Present; 4]);
    assert_eq!(carol.put(&prompt, org, prompt.blocks([3])).await?, [Stored]);
    assert_eq!(alice.put(&prompt, org, prompt.blocks([3])).await?, [Present]);
    assert_eq!(erin.found_blocks(&prompt).await?, 3);

    // Two have said the same of a block whose parent only one of them has: it is for all once its parent is.
    let late = Prompt::new(namespace, &layout, 7, 2);
    let forged_parent = Prompt { seed: 98, ..late.clone() };
    assert_eq!(alice.put(&late, org, late.blocks(1..=2)).await?, [Stored; 2]);
    assert_eq!(bob.put(&late, org, forged_parent.blocks([1])).await?, [Stored]);
    assert_eq!(bob.put(&late, org, late.blocks([2])).await?, [Stored]);
    assert_eq!(erin.found_blocks(&late).await?, 0);
    assert_eq!(carol.put(&late, org, late.blocks([1])).await?, [Stored]);
    assert_eq!(erin.found_blocks(&late).await?, 1);
    assert_eq!(alice.put(&late, org, late.blocks([2])).await?, [Present], "what others have put is not told");
    assert_eq!(erin.found_blocks(&late).await?, 2);

    // A publisher's word is enough.
    let mut publisher = Account::new(&node, &issuer, "bob", "press", &["reader", "writer", "publisher"])?;
    assert_eq!(publisher.put(&fresh, org, fresh.blocks(1..=4)).await?, [Stored; 4]);
    assert_eq!(carol.found_blocks(&fresh).await?, 4);

    // Who follows the scope's events would learn whether another has put what it puts.
    let follow = |account: &Account| {
        let mut events = EventsClient::new(account.channel.clone());
        let request = v1::SubscribeRequest { scope: org.into(), ..Default::default() };
        async move { events.subscribe(request).await.map(drop).map_err(|status| status.code()) }
    };
    assert_eq!(follow(&bob).await, Err(Code::PermissionDenied));
    assert_eq!(follow(&publisher).await, Ok(()));

    node.kill()?;
    let node = start(&data, &policy).await?;
    let (mut alice, mut carol) = (account(&node, "alice")?, account(&node, "carol")?);
    let mut bob = account(&node, "bob")?;
    assert_eq!((carol.found_blocks(&prompt).await?, alice.found_blocks(&prompt).await?), (3, 4));
    let own = forged.layout.planes(esker_prefix::ObjectKind::Block).len();
    ensure!(
        bob.wrong_planes(&forged).await? == 3 * own,
        "three blocks of all, and one of its own behind them"
    );
    node.kill()
}

#[tokio::test]
async fn what_an_account_has_put_is_taken_back_at_once_and_for_good() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy(TENANTS)?;
    let node = start(&data, &policy).await?;
    let account = |node: &Node, name: &str| Account::new(node, &issuer, "alice", name, WRITER);
    let (mut good, mut bad) = (account(&node, "good")?, account(&node, "bad")?);
    let mut bob = Account::new(&node, &issuer, "bob", "engine", WRITER)?;
    let admin = Account::new(&node, &issuer, "dave", "operator", &["admin"])?;
    let layout = flat_layout();
    let namespace = good.register(&layout).await?;
    let prompts: Vec<Prompt> = (0..4).map(|seed| Prompt::new(namespace, &layout, seed, 4)).collect();
    let [ours, theirs, mixed, shared] = &prompts[..] else { unreachable!() };
    let (private, org) = (v1::Scope::Private, v1::Scope::Org);
    good.put(ours, private, ours.blocks(1..=4)).await?;
    bad.put(theirs, private, theirs.blocks(1..=4)).await?;
    good.put(mixed, private, mixed.blocks(1..=2)).await?;
    bad.put(mixed, private, mixed.blocks(3..=4)).await?;
    // What others have said as well is its bytes all the same.
    bad.put(shared, org, shared.blocks(1..=4)).await?;
    bob.put(shared, org, shared.blocks(1..=4)).await?;
    let mut found = Vec::new();
    for prompt in &prompts {
        found.push(good.found_blocks(prompt).await?);
    }
    assert_eq!(found, [4; 4]);

    let refused = |result: Result<u64, tonic::Status>| result.map_err(|status| status.code());
    assert_eq!(refused(good.revoke("alice", "bad").await), Err(Code::PermissionDenied));
    assert_eq!(refused(admin.revoke("alice", "nobody").await), Err(Code::NotFound));
    assert_eq!(refused(admin.revoke("bob", "bad").await), Err(Code::NotFound));
    // Whoever issues tokens names accounts as it likes.
    assert_eq!(refused(admin.revoke("alice", "auth0|x").await), Err(Code::NotFound));
    assert_eq!(refused(admin.revoke("alice", "x\ny").await), Err(Code::InvalidArgument));
    assert_eq!(refused(admin.revoke("../x", "bad").await), Err(Code::InvalidArgument));
    assert_eq!(admin.revoke("alice", "bad").await?, 10);
    let after = [4, 0, 2, 4];
    for (prompt, blocks) in prompts.iter().zip(after) {
        assert_eq!(good.found_blocks(prompt).await?, blocks);
    }
    assert_eq!(bob.found_blocks(shared).await?, 4, "what bob put is bob's word");
    let audit = std::fs::read_to_string(data.join("audit.jsonl"))?;
    let line = audit.lines().find(|line| line.contains("revoke-writer") && line.contains("alice/bad"));
    ensure!(line.is_some_and(|line| line.contains("dave/operator") && line.contains("10")), "{audit}");

    // Nothing comes back with a crash and an index built anew; what is put since is new.
    assert_eq!(bad.put(theirs, private, theirs.blocks([1])).await?, [v1::Outcome::Stored]);
    node.kill()?;
    std::fs::remove_dir_all(data.join("store").join("index"))?;
    let node = start(&data, &policy).await?;
    let mut good = account(&node, "good")?;
    for (prompt, blocks) in prompts.iter().zip([4, 1, 2, 4]) {
        assert_eq!(good.found_blocks(prompt).await?, blocks);
    }
    node.kill()
}

#[tokio::test]
async fn who_puts_again_what_was_taken_back_finds_it_again() -> Result<()> {
    use v1::Outcome::{Present, Stored};
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let node = start(&folder.path().join("data"), &issuer.policy(TENANTS)?).await?;
    let account = |tenant: &str, roles: &[&str]| Account::new(&node, &issuer, tenant, "engine", roles);
    let (mut alice, mut carol) = (account("alice", WRITER)?, account("carol", WRITER)?);
    let (mut erin, admin) = (account("erin", WRITER)?, account("dave", &["admin"])?);
    let mut publisher = Account::new(&node, &issuer, "bob", "press", &["reader", "writer", "publisher"])?;
    let layout = flat_layout();
    let namespace = alice.register(&layout).await?;
    let prompt = Prompt::new(namespace, &layout, 5, 4);
    let org = v1::Scope::Org;
    assert_eq!(publisher.put(&prompt, org, prompt.blocks(1..=2)).await?, [Stored; 2]);
    assert_eq!(alice.put(&prompt, org, prompt.blocks(3..=4)).await?, [Stored; 2]);
    assert_eq!(carol.put(&prompt, org, prompt.blocks(3..=4)).await?, [Stored; 2]);
    assert_eq!(erin.found_blocks(&prompt).await?, 4);
    assert_eq!(admin.revoke("bob", "press").await?, 2);
    assert_eq!((alice.found_blocks(&prompt).await?, carol.found_blocks(&prompt).await?), (0, 0));
    assert_eq!(carol.put(&prompt, org, prompt.blocks(1..=4)).await?, [Stored; 4]);
    assert_eq!((carol.found_blocks(&prompt).await?, erin.found_blocks(&prompt).await?), (4, 0));
    ensure!(carol.wrong_planes(&prompt).await? == 0);
    assert_eq!(alice.put(&prompt, org, prompt.blocks(1..=4)).await?, [Stored, Stored, Present, Present]);
    assert_eq!((alice.found_blocks(&prompt).await?, erin.found_blocks(&prompt).await?), (4, 4));
    node.kill()
}

#[tokio::test]
async fn the_public_scope_is_for_those_to_whom_the_policy_opens_it() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let tenants = "[tenants.alice]\npublic = true\n[tenants.bob]\npublic = true\n[tenants.carol]\n";
    let node = start(&folder.path().join("data"), &issuer.policy(tenants)?).await?;
    let press = &["reader", "writer", "publisher"];
    let mut alice = Account::new(&node, &issuer, "alice", "press", press)?;
    let mut writer = Account::new(&node, &issuer, "alice", "engine", WRITER)?;
    let mut bob = Account::new(&node, &issuer, "bob", "engine", WRITER)?;
    let mut carol = Account::new(&node, &issuer, "carol", "press", press)?;
    let layout = flat_layout();
    let namespace = alice.register(&layout).await?;
    let prompt = Prompt::new(namespace, &layout, 5, 4);
    let public = v1::Scope::Public;
    for account in [&mut writer, &mut carol] {
        let refused = account.put(&prompt, public, prompt.blocks(1..=4)).await.err().context("it was put")?;
        let code = refused.downcast_ref::<tonic::Status>().map(tonic::Status::code);
        ensure!(code == Some(Code::PermissionDenied), "{refused}");
    }
    assert_eq!(alice.put(&prompt, public, prompt.blocks(1..=4)).await?, [v1::Outcome::Stored; 4]);
    let mut found = Vec::new();
    for account in [&mut writer, &mut bob, &mut carol] {
        found.push(account.found_blocks(&prompt).await?);
    }
    assert_eq!(found, [4, 4, 0]);
    node.kill()
}

#[tokio::test]
async fn what_is_put_into_an_orgs_scope_counts_for_who_put_it() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let tenants = "[tenants.alice]\norg = \"research\"\nstored_bytes = 300_000\n\
                   [tenants.bob]\npublic = true\nstored_bytes = 300_000\n";
    let node = start(&data, &issuer.policy(tenants)?).await?;
    let roles = &["reader", "writer", "publisher"];
    let mut alice = Account::new(&node, &issuer, "alice", "engine", roles)?;
    let mut bob = Account::new(&node, &issuer, "bob", "engine", roles)?;
    let layout = flat_layout();
    let namespace = alice.register(&layout).await?;
    for (account, scope) in [(&mut alice, v1::Scope::Org), (&mut bob, v1::Scope::Public)] {
        let mut refused = false;
        for seed in 0..20 {
            let prompt = Prompt::new(namespace, &layout, 100 + seed, 4);
            let put = account.put(&prompt, scope, prompt.blocks(1..=4)).await;
            refused |= put.is_err_and(|error| error.to_string().contains("stored_bytes"));
        }
        ensure!(refused, "{scope:?} counts for nobody");
    }
    node.kill()
}

#[tokio::test]
async fn a_put_that_is_under_way_leaves_nothing_behind_an_erasure() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let node = start(&data, &issuer.policy(TENANTS)?).await?;
    let mut alice = Account::new(&node, &issuer, "alice", "engine", WRITER)?;
    let admin = Account::new(&node, &issuer, "dave", "operator", &["admin"])?;
    let mut admin = AdminClient::new(admin.channel.clone());
    let layout = flat_layout();
    let namespace = alice.register(&layout).await?;
    let prompt = Prompt::new(namespace, &layout, 5, 4);
    for scope in [v1::Scope::Private, v1::Scope::Org] {
        let (steps, received) = tokio::sync::mpsc::channel(64);
        let received = tokio_stream::wrappers::ReceiverStream::new(received);
        let mut first = put_steps(&prompt, prompt.blocks(1..=2));
        if let Some(v1::put_request::Step::Prefix(prefix)) = first.first_mut() {
            prefix.scope = scope.into();
        }
        // The first block once more: it continues nothing that the erasure took away.
        let rest = put_steps(&prompt, prompt.blocks([1])).split_off(1);
        for step in first {
            steps.send(v1::PutRequest { step: Some(step) }).await?;
        }
        let mut replies = alice.cache.put(received).await?.into_inner();
        for _ in 0..2 {
            let reply = replies.message().await?.context("a reply")?;
            ensure!(reply.outcome() == v1::Outcome::Stored, "{reply:?}");
        }
        let erased = admin.erase_tenant(v1::EraseTenantRequest { tenant: "alice".into() }).await?;
        ensure!(erased.into_inner().objects == 2);
        for step in rest {
            steps.send(v1::PutRequest { step: Some(step) }).await?;
        }
        drop(steps);
        let answer = replies.message().await;
        let tenants = admin.list_tenants(v1::ListTenantsRequest {}).await?.into_inner().tenants;
        let stored = tenants.iter().find(|tenant| tenant.tenant == "alice").map(|tenant| tenant.stored_bytes);
        ensure!(stored == Some(0), "{scope:?}: {stored:?} after {answer:?}");
        let refused = answer.err().context("it went on behind the erasure")?;
        ensure!(refused.code() == Code::Aborted && refused.message().contains("erased"), "{refused}");
    }
    // What begins behind it is stored as ever.
    ensure!(alice.put(&prompt, v1::Scope::Private, prompt.blocks([1])).await? == [v1::Outcome::Stored]);
    node.kill()
}

#[tokio::test]
async fn what_waited_for_its_turn_is_the_word_of_its_tenant_too() -> Result<()> {
    use v1::Outcome::{Stored, Waiting};
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let node = start(&folder.path().join("data"), &issuer.policy(TENANTS)?).await?;
    let account = |tenant: &str| Account::new(&node, &issuer, tenant, "engine", WRITER);
    let (mut alice, mut bob, mut carol) = (account("alice")?, account("bob")?, account("carol")?);
    let layout = esker_tests::staged_layout();
    let namespace = alice.register(&layout).await?;
    let prompt = Prompt::new(namespace, &layout, 5, 2);
    let org = v1::Scope::Org;
    let all = || prompt.blocks(1..=2).into_iter().chain([prompt.state(2)]).collect::<Vec<_>>();
    alice.put(&prompt, org, all()).await?;
    // Its state comes before its blocks.
    assert_eq!(bob.put(&prompt, org, vec![prompt.state(2)]).await?, [Waiting]);
    assert_eq!(bob.put(&prompt, org, prompt.blocks(1..=2)).await?, [Stored; 2]);
    let found = carol.lookup(&prompt).await?;
    ensure!(!found.resume_points.is_empty(), "the state stays hidden though two have put it: {found:?}");
    node.kill()
}
