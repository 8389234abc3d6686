use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, PlaneSpec};
use esker_store::{PutObject, PutPlane, StoreSettings, TtlClass};
use tonic::Code;

use super::*;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn control(&self) -> Arc<Control> {
        Arc::new(Control::open(&self.0.path().join("control")).unwrap())
    }

    fn open(&self) -> Tenants {
        let settings = StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() };
        let store = Store::open_sealed(&self.0.path().join("store"), settings, None).unwrap();
        let policy = Arc::new(PolicyFile::open(None).unwrap());
        let store = Arc::new(store);
        let audit = Arc::new(Audit::open(&self.0.path().join("audit.jsonl")).unwrap());
        let root = RootSecret::new([7; 32]);
        let budget = Budget::new(1 << 30);
        let tenants = Tenants::open(root, policy, self.control(), None, &store, &budget, audit).unwrap();
        tenants.finish_erasures().unwrap();
        tenants
    }
}

fn write(tenants: &Tenants, user: &str) -> Result<Place, Status> {
    tenants.writable(&Principal::local(), user, v1::Scope::Private)
}

fn local() -> TenantId {
    Principal::local().tenant
}

/// Users that have a row, in any epoch.
fn rows(tenants: &Tenants) -> usize {
    tenants.control.scan::<()>(Table::Users, "", "", usize::MAX).unwrap().len()
}

#[test]
fn a_new_user_is_one_row_and_is_there_after_a_restart() {
    let folder = Folder::new();
    let tenants = folder.open();
    for number in 0..10 {
        write(&tenants, &format!("user{number}")).unwrap();
        write(&tenants, "user0").unwrap();
    }
    assert_eq!(rows(&tenants), 10);
    // What is written with one user does not grow with the others.
    assert_eq!(tenants.control.get::<serde_json::Value>(Table::Tenants, &local().0).unwrap(), None);
    let mut scopes = tenants.scopes(&local());
    scopes.sort();
    drop(tenants);
    let tenants = folder.open();
    let mut again = tenants.scopes(&local());
    again.sort();
    assert_eq!((again.len(), again), (11, scopes));
    assert_eq!(tenants.names(), BTreeSet::from([local()]));
}

#[test]
fn users_that_an_earlier_build_wrote_down_stay_and_are_erased() {
    let folder = Folder::new();
    let earlier =
        serde_json::json!({"epoch": 2, "users": ["anne", "bert"], "erasing": [[1, ["anne", "carl"]]]});
    folder.control().put(Table::Tenants, &local().0, &earlier).unwrap();
    let tenants = folder.open();
    assert_eq!((tenants.scopes(&local()).len(), rows(&tenants)), (3, 2));
    write(&tenants, "anne").unwrap();
    write(&tenants, "dora").unwrap();
    assert_eq!(rows(&tenants), 3);
    let (_, epochs) = tenants.erase(&tenants.store, &local(), || Ok(())).unwrap();
    assert_eq!((epochs, rows(&tenants), tenants.scopes(&local()).len()), (vec![2], 0, 1));
    write(&tenants, "anne").unwrap();
    drop(tenants);
    let tenants = folder.open();
    assert_eq!((tenants.scopes(&local()).len(), tenants.get(&local()).epoch()), (2, 3));
    let now = tenants.control.get::<serde_json::Value>(Table::Tenants, &local().0).unwrap().unwrap();
    assert_eq!(now, serde_json::json!({"epoch": 3, "erasing": []}));
}

#[test]
fn users_of_whom_nothing_is_stored_make_room_for_others() {
    let folder = Folder::new();
    let tenants = folder.open();
    (0..MAX_USERS).for_each(|number| drop(write(&tenants, &format!("user{number}")).unwrap()));
    // Something of them may still be under way.
    assert_eq!(write(&tenants, "one more").err().unwrap().code(), Code::InvalidArgument);
    assert_eq!(write(&tenants, "one-more").err().unwrap().code(), Code::ResourceExhausted);
    write(&tenants, "user3").unwrap();
    write(&tenants, "").unwrap();
    drop(tenants);
    let tenants = folder.open();
    let busy = write(&tenants, "user7").unwrap();
    write(&tenants, "one-more").unwrap();
    drop(busy);
    assert_eq!(rows(&tenants), 2, "user7 and the new one");
    assert_eq!(tenants.scopes(&local()).len(), 3);
}

/// Something of a place.
fn object(place: &Place, byte: u8) -> PutObject {
    let spec = PlaneSpec { group: 0, first_layer: 0, layers: 1, len_bytes: 4 };
    PutObject {
        id: ObjectId { kind: ObjectKind::Block, hash: BlockHash([byte; 32]) },
        parent: None,
        namespace: NamespaceId([0; 32]),
        scope: place.key.tag(),
        writer: place.writer,
        class: TtlClass::default(),
        tokens: 1,
        planes: vec![PutPlane { spec, shape: None, bytes: vec![byte; 4].into() }],
    }
}

#[test]
fn an_erasure_reaches_what_a_forgotten_user_had_and_lets_in_nothing_that_began_before() {
    let folder = Folder::new();
    let tenants = folder.open();
    let (anne, org) = (write(&tenants, "anne").unwrap(), write(&tenants, "").unwrap());
    let (of_anne, of_all) = (object(&anne, 1), object(&org, 2));
    let ids = [of_anne.id, of_all.id];
    assert!(tenants.store.put(vec![of_anne, of_all]).iter().all(Result::is_ok));
    assert!(tenants.stored_bytes(&tenants.store, &local()) > 0);
    // As one who was forgotten while a record of hers was hidden, for a read had failed.
    tenants.get(&local()).state().users.remove("anne").unwrap();
    tenants.control.delete(Table::Users, &users::row(&local(), 0, "anne")).unwrap();
    assert!(anne.pass.enter().is_ok());
    tenants.erase(&tenants.store, &local(), || Ok(())).unwrap();
    assert_eq!(tenants.store.get(&ids), [None, None]);
    assert_eq!(tenants.stored_bytes(&tenants.store, &local()), 0);
    assert!(anne.pass.enter().is_err() && org.pass.enter().is_err());
    assert!(write(&tenants, "anne").unwrap().pass.enter().is_ok());
}

#[test]
fn what_is_in_flight_counts_for_the_tenant_and_for_the_node() {
    let folder = Folder::new();
    let tenants = folder.open();
    let tenant = tenants.get(&local());
    let mut in_flight = tenants.fly(&tenant, Use::Fetch, 700 << 20).unwrap();
    assert_eq!(tenants.fly(&tenant, Use::Body, 400 << 20).err().unwrap().code(), Code::ResourceExhausted);
    assert_eq!(tenant.in_flight.load(Ordering::Relaxed), 700 << 20, "what was refused was taken");
    in_flight.grow(300 << 20).unwrap();
    assert!(tenants.fly(&tenants.get(&TenantId("other".into())), Use::Body, 100 << 20).is_err());
    drop(in_flight);
    assert_eq!(tenant.in_flight.load(Ordering::Relaxed), 0);
    tenants.fly(&tenant, Use::Body, 1 << 30).unwrap();
}
