use super::*;
use crate::bundled;
use crate::node::NodeSettings;
use crate::principal::{Role, Roles};
use esker_decoder::KvFormat;
use esker_prefix::TokenId;
use esker_store::StoreSettings;
use tonic::Code;

const POLICY: &str = "[tenants.a]\nwarmups = 3\n[tenants.b]\n";

fn node(dir: &std::path::Path) -> Node {
    let policy = dir.join("policy.toml");
    std::fs::write(&policy, POLICY).unwrap();
    let store = StoreSettings { segment_bytes: 4 << 20, ..StoreSettings::default() };
    let settings =
        NodeSettings { data: dir.join("data"), store, policy: Some(policy), ..NodeSettings::default() };
    Node::open(&settings, Some(bundled::load(KvFormat::Bf16, 128).unwrap())).unwrap()
}

fn principal(tenant: &str, roles: &[Role]) -> Principal {
    let roles: Roles = roles.iter().copied().collect();
    Principal { tenant: TenantId(tenant.into()), name: "tester".into(), roles }
}

fn submission(name: &str, priority: u32) -> Submission {
    Submission {
        name: name.into(),
        prompts: vec![(0..300).map(|id| TokenId(64 + id)).collect()],
        scope: v1::Scope::Private,
        ttl: v1::TtlClass::Unspecified,
        user: String::new(),
        max_tokens: 0,
        max_bytes: 0,
        deadline_s: 0,
        priority,
        resume: false,
    }
}

fn submit(node: &Node, who: &Principal, what: &Submission) -> Result<v1::WarmupJob, Status> {
    node.warmups.submit(node, node.engine.as_ref().unwrap(), who, what)
}

fn take(node: &Node) -> String {
    let job = node.warmups.next().unwrap();
    node.warmups.finish(&job, Turn::Ended(Stage::Done, String::new()));
    format!("{}/{}", job.tenant, job.name)
}

#[test]
fn priority_goes_first_and_among_equals_tenants_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let (a, b) = (principal("a", &[Role::Writer]), principal("b", &[Role::Writer]));
    for (who, name, priority) in
        [(&a, "one", 0), (&a, "two", 0), (&b, "one", 0), (&b, "two", 0), (&a, "urgent", 5)]
    {
        submit(&node, who, &submission(name, priority)).unwrap();
    }
    let order: Vec<String> = (0..5).map(|_| take(&node)).collect();
    assert_eq!(order, ["a/urgent", "b/one", "a/one", "b/two", "a/two"]);
    // Something more urgent takes a running job's place.
    submit(&node, &b, &submission("slow", 1)).unwrap();
    let slow = node.warmups.next().unwrap();
    assert!(!node.warmups.leaves(&slow));
    submit(&node, &a, &submission("first", 2)).unwrap();
    assert!(node.warmups.leaves(&slow));
    node.warmups.finish(&slow, Turn::Left);
    assert_eq!([take(&node), take(&node)], ["a/first", "b/slow"]);
}

#[test]
fn roles_and_quotas_are_kept_and_no_tenant_sees_another() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let (a, b) = (principal("a", &[Role::Writer]), principal("b", &[Role::Writer]));
    let public = Submission { scope: v1::Scope::Public, ..submission("p", 0) };
    assert_eq!(submit(&node, &a, &public).unwrap_err().code(), Code::PermissionDenied);
    let reader = principal("a", &[Role::Reader]);
    assert_eq!(submit(&node, &reader, &submission("r", 0)).unwrap_err().code(), Code::PermissionDenied);
    submit(&node, &principal("a", &[Role::Publisher]), &public).unwrap();
    for name in ["x", "y"] {
        submit(&node, &a, &submission(name, 0)).unwrap();
    }
    let error = submit(&node, &a, &submission("z", 0)).unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(error.message().contains("quota warmups: limit 3, used 3"), "{error}");
    // One more submission of a known job is no new one.
    submit(&node, &a, &submission("x", 0)).unwrap();
    assert_eq!(node.warmups.get(&b.tenant, "x").unwrap_err().code(), Code::NotFound);
    assert_eq!(node.warmups.cancel(&b.tenant, "x").unwrap_err().code(), Code::NotFound);
    assert!(node.warmups.list(&b.tenant, "", 10).is_empty());
    assert_eq!(node.warmups.list(&a.tenant, "p", 10).len(), 2);
    // What has ended counts no longer.
    node.warmups.cancel(&a.tenant, "x").unwrap();
    submit(&node, &a, &submission("z", 0)).unwrap();
}

#[test]
fn another_payload_is_refused_and_an_ended_job_goes_on_only_if_asked() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let a = principal("a", &[Role::Writer]);
    submit(&node, &a, &submission("x", 0)).unwrap();
    assert_eq!(submit(&node, &a, &submission("x", 1)).unwrap_err().code(), Code::AlreadyExists);
    node.warmups.cancel(&a.tenant, "x").unwrap();
    let again = submit(&node, &a, &submission("x", 0)).unwrap();
    assert_eq!(again.state(), v1::WarmupState::Cancelled);
    let resumed = submit(&node, &a, &Submission { resume: true, ..submission("x", 0) }).unwrap();
    assert_eq!(resumed.state(), v1::WarmupState::Queued);
    // The prompts of an ended job are kept nowhere, those of a waiting one are.
    let job = node.warmups.next().unwrap();
    assert!(node.warmups.prompts(&job).unwrap().is_some());
    node.warmups.finish(&job, Turn::Ended(Stage::Done, String::new()));
    assert!(node.warmups.prompts(&job).unwrap().is_none());
}

#[test]
fn jobs_survive_the_process_and_an_erasure_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (principal("a", &[Role::Writer]), principal("b", &[Role::Writer]));
    {
        let node = node(dir.path());
        for who in [&a, &b] {
            submit(&node, who, &submission("x", 0)).unwrap();
        }
    }
    let node = node(dir.path());
    assert_eq!(node.warmups.get(&a.tenant, "x").unwrap().state(), v1::WarmupState::Queued);
    node.warmups.erase(&a.tenant).unwrap();
    assert_eq!(node.warmups.get(&a.tenant, "x").unwrap_err().code(), Code::NotFound);
    assert_eq!(node.warmups.control.get::<Vec<Vec<u32>>>(Table::WarmupPrompts, "a/x").unwrap(), None);
    assert_eq!(take(&node), "b/x");
}

#[test]
fn of_ended_jobs_the_oldest_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let b = principal("b", &[Role::Writer]);
    {
        let mut jobs = node.warmups.jobs();
        submit_ended(&node, &mut jobs, &b.tenant);
    }
    assert_eq!(node.warmups.list(&b.tenant, "", 10_000).len(), MAX_JOBS);
    submit(&node, &b, &submission("new", 0)).unwrap();
    assert_eq!(node.warmups.list(&b.tenant, "", 10_000).len(), MAX_JOBS);
    assert_eq!(node.warmups.get(&b.tenant, "old-0").unwrap_err().code(), Code::NotFound);
}

/// As many as are remembered, without writing each down.
fn submit_ended(node: &Node, jobs: &mut Jobs, tenant: &TenantId) {
    let engine = node.engine.as_ref().unwrap();
    for number in 0..MAX_JOBS as u64 {
        let record = Record {
            stage: Stage::Done,
            number: number + 1,
            ..Record::new(engine, &submission("old", 0), &Principal::local(), 0)
        };
        let name = format!("old-{number}");
        jobs.all.insert((tenant.clone(), name.clone()), Arc::new(Job::new(tenant.clone(), name, record)));
    }
}
