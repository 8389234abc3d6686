use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::bundled;
use crate::node::NodeSettings;
use crate::principal::{Role, Roles};
use crate::sessions;
use esker_decoder::KvFormat;
use esker_prefix::TokenId;
use esker_store::StoreSettings;
use tonic::Code;

const POLICY: &str = "[tenants.a]\npublic = true\nwarmups = 3\n[tenants.b]\n";

fn node(dir: &Path) -> Node {
    sealed_node(dir, None)
}

fn sealed_node(dir: &Path, root_key: Option<&Path>) -> Node {
    let policy = dir.join("policy.toml");
    std::fs::write(&policy, POLICY).unwrap();
    let store = StoreSettings { segment_bytes: 4 << 20, ..StoreSettings::default() };
    let settings = NodeSettings {
        data: dir.join("data"),
        store,
        policy: Some(policy),
        root_key: root_key.map(Path::to_owned),
        ..NodeSettings::default()
    };
    Node::open(&settings, Some(bundled::load(KvFormat::Bf16, 128).unwrap())).unwrap()
}

fn principal(tenant: &str, roles: &[Role]) -> Principal {
    let roles: Roles = roles.iter().copied().collect();
    Principal { tenant: TenantId(tenant.into()), name: "tester".into(), roles }
}

fn submission(name: &str, priority: u32) -> Submission {
    Submission {
        name: name.into(),
        prompts: vec![Prompt::Tokens((0..300).map(|id| TokenId(64 + id)).collect())],
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
    assert!(matches!(node.warmups.prompts(&job).unwrap(), Kept::All(_)));
    node.warmups.finish(&job, Turn::Ended(Stage::Done, String::new()));
    assert_eq!(node.warmups.prompts(&job).unwrap(), Kept::Nothing);
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

/// As `Admin.EraseTenant` does it; `meanwhile` once the epoch is given up.
fn erase(node: &Node, tenant: &TenantId, meanwhile: impl FnOnce()) {
    let stop = || {
        meanwhile();
        node.sessions.close_all(node, tenant).and(node.warmups.erase(tenant))
    };
    node.tenants.erase(&node.store, tenant, stop).unwrap();
}

fn rows(node: &Node, tenant: &TenantId) -> Vec<(String, Record)> {
    node.warmups.control.scan(Table::Warmups, &name_of(tenant, ""), "", usize::MAX).unwrap()
}

#[test]
fn what_is_submitted_or_opened_while_its_tenant_is_erased_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let b = principal("b", &[Role::Writer]);
    let mut refused = Vec::new();
    erase(&node, &b.tenant, || {
        let kept = || sessions::Kept {
            namespace: node.engine.as_ref().unwrap().namespace,
            tokens: Vec::new(),
            user: "",
        };
        refused.extend(submit(&node, &b, &submission("x", 0)).err());
        refused.extend(node.sessions.hold(&node, &b, "x", kept(), 60).err());
        refused.extend(node.sessions.renew(&node, &b.tenant, "x", 60).err());
    });
    assert_eq!(refused.len(), 3);
    for refused in refused {
        assert_eq!(refused.code(), Code::Aborted, "{refused}");
        assert!(refused.message().contains("the tenant is being erased; try again after"), "{refused}");
    }
    submit(&node, &b, &submission("x", 0)).unwrap();
}

#[test]
fn a_job_that_comes_beside_an_erasure_is_of_the_epoch_behind_it_or_gone() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let b = principal("b", &[Role::Writer]);
    let over = AtomicBool::new(false);
    let mut of_before = Vec::new();
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (node, b, over) = (&node, &b, &over);
            scope.spawn(move || {
                for number in (0..).take_while(|_| !over.load(Ordering::Relaxed)) {
                    let _ = submit(node, b, &submission(&format!("{thread}-{number}"), 0));
                }
            });
        }
        for _ in 0..30 {
            erase(&node, &b.tenant, || {});
            let epoch = Some(node.tenants.get(&b.tenant).epoch());
            of_before.extend(rows(&node, &b.tenant).into_iter().filter(|(_, record)| record.epoch != epoch));
            std::thread::sleep(Duration::from_millis(5));
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(of_before.is_empty(), "{of_before:?}");
}

/// Copies a folder and everything below it: what a kill at this moment leaves.
fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match from.is_dir() {
            true => copy_tree(&from, &to),
            false => std::fs::copy(&from, &to).map(drop).unwrap(),
        }
    }
}

/// Whether a text is in one of the files below a folder.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => holds(&path, text),
            false => std::fs::read(&path).unwrap().windows(text.len()).any(|part| part == text.as_bytes()),
        }
    })
}

#[test]
fn a_crash_amid_an_erasure_leaves_no_job_and_no_session_of_its_tenant() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (principal("a", &[Role::Writer]), principal("b", &[Role::Writer]));
    let marked = |name| {
        let prompts = vec![Prompt::Tokens((0..400).map(|id| TokenId(9 + 7 * id % 300)).collect())];
        Submission { prompts, ..submission(name, 0) }
    };
    let marker = "9,16,23,30,37,44,51,58,65,72";
    {
        // What a session can keep, and a job that waits, in files of an earlier process.
        let node = Arc::new(node(dir.path()));
        let runner = Runner::start(&node).unwrap();
        submit(&node, &a, &marked("stored")).unwrap();
        let started = std::time::Instant::now();
        while node.warmups.get(&a.tenant, "stored").unwrap().state() != v1::WarmupState::Done {
            assert!(started.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(runner);
        for who in [&a, &b] {
            submit(&node, who, &submission("waits", 0)).unwrap();
        }
        submit(&node, &a, &marked("marked")).unwrap();
    }
    let node = node(dir.path());
    submit(&node, &a, &marked("in the log")).unwrap();
    let namespace = node.engine.as_ref().unwrap().namespace;
    let Prompt::Tokens(tokens) = marked("").prompts.swap_remove(0) else { unreachable!() };
    node.sessions.hold(&node, &a, "chat", sessions::Kept { namespace, tokens, user: "" }, 3600).unwrap();
    assert_eq!(node.sessions.totals(&node, &a.tenant).unwrap().0, 1);
    let crashed = tempfile::tempdir().unwrap();
    erase(&node, &a.tenant, || copy_tree(dir.path(), crashed.path()));
    assert!(holds(&crashed.path().join("data"), marker), "nothing was there to be forgotten");
    for (folder, after) in [(dir.path(), "the erasure"), (crashed.path(), "the crash")] {
        let reopened;
        let node = if folder == dir.path() {
            &node
        } else {
            reopened = self::node(folder);
            &reopened
        };
        assert_eq!(node.tenants.get(&a.tenant).epoch(), 1, "after {after}");
        assert!(node.warmups.list(&a.tenant, "", 10).is_empty(), "after {after}");
        assert!(rows(node, &a.tenant).is_empty(), "after {after}");
        assert!(!holds(&folder.join("data"), marker), "prompts are on the drive after {after}");
        assert_eq!(node.warmups.control.names(Table::Sessions, "a/").unwrap(), [""; 0], "after {after}");
        assert!(node.store.leases().is_empty(), "after {after}");
        assert_eq!(take(node), "b/waits", "another tenant's stays");
    }
}

#[test]
fn a_job_of_an_epoch_that_was_given_up_is_dropped_when_it_is_met() {
    let dir = tempfile::tempdir().unwrap();
    let node = Arc::new(node(dir.path()));
    let a = principal("a", &[Role::Writer]);
    // The gate and the start let none in: this one is made.
    submit(&node, &a, &submission("x", 0)).unwrap();
    node.warmups.jobs().of(&a.tenant).for_each(|job| job.record.send_modify(|record| record.epoch = Some(7)));
    let runner = Runner::start(&node).unwrap();
    let started = std::time::Instant::now();
    while node.warmups.get(&a.tenant, "x").is_ok() {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(runner);
    assert!(rows(&node, &a.tenant).is_empty());
    assert!(node.warmups.control.names(Table::WarmupPrompts, "").unwrap().is_empty());
    assert_eq!(node.tenants.stored_bytes(&node.store, &a.tenant), 0);
}

#[test]
fn a_job_whose_key_was_destroyed_is_dropped_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let (data, root) = (dir.path().join("data"), dir.path().join("root.key"));
    std::fs::write(&root, [9; 32]).unwrap();
    let (a, b) = (principal("a", &[Role::Writer]), principal("b", &[Role::Writer]));
    {
        let node = sealed_node(dir.path(), Some(&root));
        for who in [&a, &b] {
            submit(&node, who, &submission("x", 0)).unwrap();
        }
    }
    // A crash came between this and the end of the epoch.
    assert_eq!(crate::keys::Keys::open(&data, &root).unwrap().destroy("private/a#0").unwrap(), 1);
    let node = sealed_node(dir.path(), Some(&root));
    assert_eq!(node.warmups.get(&a.tenant, "x").unwrap_err().code(), Code::NotFound);
    assert!(rows(&node, &a.tenant).is_empty());
    assert_eq!(node.warmups.control.names(Table::WarmupPrompts, "").unwrap(), ["b/x"]);
    let job = node.warmups.next().unwrap();
    assert_eq!(node.warmups.prompts(&job).unwrap(), Kept::All(submission("x", 0).prompts));
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
