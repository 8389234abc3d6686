//! The ledger against what it promises: exactly one record a request, nothing lost that was acknowledged, nothing damaged passed on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering as Relaxed};

use super::hooks::tests::{POINTS, Wrong};
use super::time::tests::ManualClocks;
use super::*;
use crate::control::{Control, Table};
use crate::usage::sink::{Exporter, Sink, Stepped};
use serde_json::Value;

const NOON_MS: u64 = 1_795_003_200_000;

struct Random(u64);

impl Random {
    fn seeded(seed: u64) -> Self {
        println!("SEED={seed:#x}");
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn pick<T: Copy>(of: &[T], at: u64) -> T {
    of[usize::try_from(at).unwrap() % of.len()]
}

fn small() -> LedgerSettings {
    LedgerSettings { segment_bytes: 4096, max_bytes: u64::MAX }
}

fn open_hooked(dir: &Path, settings: LedgerSettings, hooks: Hooks) -> Ledger {
    let clocks = ManualClocks::new(NOON_MS);
    Ledger::open_with(dir, settings, "fleet", hooks, clocks.clone(), clocks).unwrap()
}

fn open(dir: &Path, settings: LedgerSettings) -> Ledger {
    open_hooked(dir, settings, Hooks::default())
}

/// A request of some tenant that hit `hit` of `prompt` tokens.
fn request(tenant: &str, name: &str, prompt: u64, hit: u64) -> v1::UsageRecord {
    v1::UsageRecord {
        tenant: tenant.into(),
        request_id: name.into(),
        op: "fetch".into(),
        namespace: vec![7; 32].into(),
        scope: "private".into(),
        prompt_tokens: prompt,
        hit_tokens: hit,
        miss_tokens: prompt - hit,
        status: "ok".into(),
        complete: true,
        content: content(format!("{prompt} {hit}").as_bytes()).to_vec().into(),
        ..Default::default()
    }
}

/// Everything up to the end or the first gap.
fn read_all(ledger: &Ledger) -> (Vec<v1::UsageRecord>, Option<Gap>) {
    let bound = ledger.end().borrow().clone();
    let mut reader = ledger.read(None);
    let mut records = Vec::new();
    loop {
        match reader.next(&bound).unwrap() {
            Step::Record(record) => records.push(*record),
            Step::Gap(gap) => return (records, Some(gap)),
            Step::End => return (records, None),
        }
    }
}

fn sum(records: &[v1::UsageRecord]) -> v1::UsageSums {
    let mut sums = v1::UsageSums::default();
    records.iter().for_each(|record| sums::count(&mut sums, record));
    sums
}

#[test]
fn one_record_a_request_and_the_same_answer_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = {
        let ledger = open(dir.path(), small());
        let first = ledger.close_blocking(request("a", "r1", 100, 60)).unwrap();
        assert!(!first.replayed);
        let again = ledger.close_blocking(request("a", "r1", 100, 60)).unwrap();
        assert!(again.replayed);
        assert_eq!(again.record, first.record);
        let other = ledger.close_blocking(request("a", "r1", 100, 61)).unwrap_err();
        assert_eq!(other, LedgerError::Conflict { request_id: "r1".into() });
        // Another tenant's request of that name is another request.
        let others = ledger.close_blocking(request("b", "r1", 100, 61)).unwrap();
        assert_ne!(others.record.usage_id, first.record.usage_id);
        first.record
    };
    assert_eq!(first.usage_id, usage_id("fleet", "a", "r1", "fetch"));
    assert_eq!((first.sequence, first.time_unix_ms, first.clock_skewed), (1, NOON_MS, false));
    let ledger = open(dir.path(), small());
    assert_eq!(ledger.close_blocking(request("a", "r1", 100, 60)).unwrap().record, first);
    let (records, gap) = read_all(&ledger);
    assert_eq!((records.len(), gap), (2, None));
    assert_eq!(ledger.counters().conflicts.load(Ordering::Relaxed), 0);
}

#[test]
fn segments_follow_each_other_and_an_index_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let before = {
        let ledger = open(dir.path(), small());
        for n in 0..100 {
            ledger.close_blocking(request("a", &format!("r{n}"), 100 + n, n)).unwrap();
        }
        ledger.query(0, u64::MAX).unwrap()
    };
    assert!(segment::numbers(dir.path()).unwrap().len() > 5);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let ledger = open(dir.path(), small());
    assert_eq!(ledger.query(0, u64::MAX).unwrap(), before);
    assert!(ledger.close_blocking(request("a", "r7", 107, 7)).unwrap().replayed);
    let (records, gap) = read_all(&ledger);
    assert_eq!((records.len(), gap), (100, None));
    assert_eq!(verify::verify(dir.path()).unwrap().records, 100);
}

/// Invariant 2. Every request is sent 1 to 10 times, by many at once, with restarts in between; some come with other content.
#[test]
fn a_hundred_thousand_requests_sent_again_and_again_count_once() {
    let (cases, replays, conflicts) = idempotence(100_000, Hooks::default(), 0x1de3_7073_0000_0001);
    println!("{cases} requests, {replays} replays, {conflicts} conflicts");
    assert!(replays > cases && conflicts > cases / 40);
}

/// The control: without the check for repeats, the same test finds double bills.
#[test]
#[should_panic(expected = "billed more than once")]
fn without_the_check_requests_are_billed_twice() {
    idempotence(500, Hooks::without_dedupe(), 0x1de3_7073_0000_0002);
}

fn idempotence(cases: u64, hooks: Hooks, seed: u64) -> (u64, u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    let settings = LedgerSettings { segment_bytes: 4 << 20, ..small() };
    let mut random = Random::seeded(seed);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let (mut replays, mut conflicts) = (0, 0);
    let rounds = 10;
    let mut old: Vec<v1::UsageRecord> = Vec::new();
    for round in 0..rounds {
        let ledger = Arc::new(open_hooked(dir.path(), settings, hooks.clone()));
        let mut sent = Vec::new();
        for case in 0..cases / rounds {
            let name = format!("r{round}-{case}");
            let prompt = 1 + random.below(10_000);
            let asked = request(pick(&["a", "b"], case), &name, prompt, random.below(prompt));
            let times = 1 + random.below(10);
            sent.extend((0..times).map(|_| (asked.clone(), true)));
            if times > 5 && random.below(10) == 0 {
                sent.push((request(&asked.tenant, &name, prompt + 1, asked.hit_tokens), false));
            }
            // Some come again after a restart.
            if random.below(4) == 0 {
                old.push(asked);
            }
        }
        if round % 3 == 2 {
            sent.extend(old.drain(..).map(|asked| (asked, true)));
        }
        for batch in sent.chunks(2048) {
            let closing: Vec<_> = batch
                .iter()
                .cloned()
                .map(|(asked, same)| {
                    let ledger = Arc::clone(&ledger);
                    runtime.spawn(async move { (ledger.close(asked).await, same) })
                })
                .collect();
            for closing in closing {
                match runtime.block_on(closing).unwrap() {
                    (Ok(closed), true) => replays += u64::from(closed.replayed),
                    // It may have come before the one that it contradicts: then that one is refused.
                    (Ok(_), false) => conflicts += 1,
                    (Err(LedgerError::Conflict { .. }), _) => conflicts += 1,
                    (Err(error), _) => panic!("{error}"),
                }
            }
        }
    }
    let ledger = open(dir.path(), settings);
    let (records, gap) = read_all(&ledger);
    assert_eq!(gap, None);
    let names: HashSet<(String, String)> =
        records.iter().map(|record| (record.tenant.clone(), record.request_id.clone())).collect();
    assert!(names.len() == records.len(), "{} were billed more than once", records.len() - names.len());
    assert_eq!(names.len() as u64, cases / rounds * rounds, "every request has its record");
    (cases, replays, conflicts)
}

/// What is taken by a sink that is reached over a bad line: it may take and not say so, take a part, or be down.
#[derive(Default)]
struct FlakySink {
    /// When an id was seen first, as metering systems remember it: for 24 hours.
    seen: HashMap<String, u64>,
    hit_tokens: u64,
    events: u64,
    now_ms: u64,
    repeats_outside: u64,
    random: u64,
    /// Of ten deliveries, how many go wrong.
    bad_of_ten: u64,
}

impl FlakySink {
    fn take(&mut self, event: &Value) {
        let id = event["id"].as_str().unwrap().to_owned();
        const DAY_MS: u64 = 24 * 3600 * 1000;
        match self.seen.get(&id) {
            Some(&at) if self.now_ms - at < DAY_MS => return,
            Some(_) => self.repeats_outside += 1,
            None => {}
        }
        self.seen.insert(id, self.now_ms);
        self.hit_tokens += event["data"]["hit_tokens"].as_u64().unwrap();
        self.events += 1;
    }
}

impl Sink for Arc<Mutex<FlakySink>> {
    fn deliver(&mut self, events: &[Value]) -> Result<(), String> {
        let mut sink = self.lock().unwrap();
        let mut random = Random(sink.random);
        let bad = random.below(10) < sink.bad_of_ten;
        let part = usize::try_from(random.below(events.len() as u64 + 1)).unwrap();
        let kind = random.below(4);
        sink.random = random.0;
        let taken = match (bad, kind) {
            (false, _) | (true, 0) => events.len(),
            (true, 1) => part,
            _ => 0,
        };
        events[..taken].iter().for_each(|event| sink.take(event));
        if bad { Err(pick(&["timed out", "cut off", "500", "503"], kind).into()) } else { Ok(()) }
    }
}

/// Invariant 4.
#[test]
fn ten_thousand_cycles_with_a_bad_sink_and_the_sum_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let control = Arc::new(Control::open(&dir.path().join("control")).unwrap());
    let ledger =
        Arc::new(open(&dir.path().join("ledger"), LedgerSettings { segment_bytes: 1 << 20, ..small() }));
    let seed = 0x0bad_5141_0000_0003;
    let mut random = Random::seeded(seed);
    let sink = Arc::new(Mutex::new(FlakySink { random: seed, bad_of_ten: 6, ..Default::default() }));
    let new_exporter = || {
        Exporter::open(Arc::clone(&ledger), Arc::clone(&control), "sink", Arc::clone(&sink), false).unwrap()
    };
    let mut exporter = new_exporter();
    let (mut now_ms, mut truth, mut requests, mut cycles) = (NOON_MS, 0, 0, 0);
    while cycles < 10_000 {
        cycles += 1;
        if random.below(3) == 0 {
            let hit = random.below(1000);
            ledger.close_blocking(request("a", &format!("r{requests}"), 1000, hit)).unwrap();
            requests += 1;
            truth += hit;
        }
        if random.below(50) == 0 {
            // The process is started again, with nothing but what it wrote down.
            exporter = new_exporter();
        }
        sink.lock().unwrap().now_ms = now_ms;
        match exporter.step(now_ms).unwrap() {
            Stepped::Halted(reason) => panic!("{reason}"),
            Stepped::Retry(pause) => now_ms += u64::try_from(pause.as_millis()).unwrap(),
            Stepped::Delivered(_) | Stepped::Idle => now_ms += random.below(2 * 3600 * 1000),
        }
    }
    sink.lock().unwrap().bad_of_ten = 0;
    while exporter.step(now_ms).unwrap() != Stepped::Idle {}
    let sink = sink.lock().unwrap();
    assert_eq!((sink.events, sink.hit_tokens, sink.repeats_outside), (requests, truth, 0));
    println!("{cycles} cycles, {requests} requests, {truth} hit tokens");
}

/// A sink that was down for longer than it remembers: nothing is sent again without an operator.
#[test]
fn after_a_day_an_operator_decides() {
    let dir = tempfile::tempdir().unwrap();
    let control = Arc::new(Control::open(&dir.path().join("control")).unwrap());
    let ledger = Arc::new(open(&dir.path().join("ledger"), small()));
    ledger.close_blocking(request("a", "r", 10, 5)).unwrap();
    let sink = Arc::new(Mutex::new(FlakySink { random: 5, bad_of_ten: 10, ..Default::default() }));
    let exporter = |resend| {
        Exporter::open(Arc::clone(&ledger), Arc::clone(&control), "sink", Arc::clone(&sink), resend).unwrap()
    };
    let mut first = exporter(false);
    assert!(matches!(first.step(NOON_MS).unwrap(), Stepped::Retry(_)));
    let late = NOON_MS + 24 * 3600 * 1000;
    assert!(matches!(first.step(late).unwrap(), Stepped::Halted(_)));
    assert!(matches!(exporter(false).step(late).unwrap(), Stepped::Halted(_)));
    sink.lock().unwrap().bad_of_ten = 0;
    assert_eq!(exporter(true).step(late).unwrap(), Stepped::Delivered(1));
    assert_eq!(exporter(false).step(late).unwrap(), Stepped::Idle);
}

/// Invariant 5: bits and ends.
#[test]
fn every_changed_bit_and_every_cut_shows_and_nothing_behind_it_is_given_out() {
    let dir = tempfile::tempdir().unwrap();
    let truth = {
        let ledger = open(dir.path(), small());
        for n in 0..24 {
            ledger.close_blocking(request("a", &format!("r{n}"), 100 + n, n)).unwrap();
        }
        read_all(&ledger).0
    };
    let numbers = segment::numbers(dir.path()).unwrap();
    assert!(numbers.len() >= 2, "{numbers:?}");
    let mut random = Random::seeded(0xb17f_11b5_0000_0004);
    let (mut flips, mut cuts) = (0_u32, 0_u32);
    let check = |what: &str| {
        let found = verify::verify(dir.path()).unwrap();
        assert!(!found.gaps.is_empty(), "{what} was not noticed");
        let head = head::peek(dir.path()).unwrap().unwrap();
        let bound = Position {
            segment: head.segment,
            offset: head.end,
            sequence: head.sequence,
            chain: Some(head.chain),
        };
        let mut reader = Reader::new(dir.path(), Position::start("fleet"));
        let mut read = 0;
        loop {
            match reader.next(&bound).unwrap() {
                Step::Record(record) => {
                    assert_eq!(*record, truth[read], "{what}");
                    read += 1;
                }
                Step::Gap(_) => break,
                Step::End => panic!("{what} was passed over"),
            }
        }
        assert!(read < truth.len(), "{what}");
    };
    for &number in &numbers {
        let path = segment::path(dir.path(), number);
        let sound = std::fs::read(&path).unwrap();
        let used = if Some(&number) == numbers.last() {
            usize::try_from(head::peek(dir.path()).unwrap().unwrap().end).unwrap()
        } else {
            sound.len()
        };
        // Every bit of the header and the first record, and every tenth or so of the rest.
        let bits = (0..used * 8).filter(|bit| *bit < 600 * 8 || random.below(10) == 0).collect::<Vec<_>>();
        for bit in bits {
            let mut flipped = sound.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, flipped).unwrap();
            check(&format!("bit {bit} of segment {number}"));
            flips += 1;
        }
        for cut in (0..used).step_by(7) {
            std::fs::write(&path, &sound[..cut]).unwrap();
            check(&format!("segment {number} cut at {cut}"));
            cuts += 1;
        }
        std::fs::remove_file(&path).unwrap();
        check(&format!("segment {number} gone"));
        std::fs::write(&path, sound).unwrap();
    }
    println!("{flips} flipped bits, {cuts} cuts, all noticed");
    assert!(flips > 5000 && cuts > 500);
    assert_eq!(verify::verify(dir.path()).unwrap().gaps, [], "the ledger itself is sound");
}

#[test]
fn a_node_that_finds_its_end_damaged_says_so_and_goes_on_behind() {
    for (what, damage) in [
        ("flipped", (|bytes: &mut Vec<u8>, end: usize| bytes[end - 3] ^= 4) as fn(&mut Vec<u8>, usize)),
        ("cut", |bytes, end| bytes.truncate(end - 5)),
        ("blanked", |bytes, end| bytes[end - 300..end].fill(0)),
    ] {
        for with_index in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let big = LedgerSettings { segment_bytes: 1 << 20, ..small() };
            {
                let ledger = open(dir.path(), big);
                for n in 0..10 {
                    ledger.close_blocking(request("a", &format!("r{n}"), 100, n)).unwrap();
                }
            }
            let end = usize::try_from(head::peek(dir.path()).unwrap().unwrap().end).unwrap();
            let path = segment::path(dir.path(), 1);
            let mut bytes = std::fs::read(&path).unwrap();
            damage(&mut bytes, end);
            std::fs::write(&path, bytes).unwrap();
            if !with_index {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
            let ledger = open(dir.path(), big);
            let gap = ledger.gap().unwrap_or_else(|| panic!("{what} was not noticed"));
            assert!(gap.next_sequence > 10, "{gap}");
            let new = ledger.close_blocking(request("a", "new", 100, 1)).unwrap();
            assert_eq!(new.record.sequence, 11, "a sequence is never used again");
            let (before, found) = read_all(&ledger);
            assert!(before.len() < 10 && found.is_some(), "{what}: the reader halts");
            drop(ledger);
            // The gap stays: time and restarts do not heal it.
            let ledger = open(dir.path(), big);
            assert!(read_all(&ledger).1.is_some());
            assert_eq!(verify::verify(dir.path()).unwrap().gaps.len(), 1, "{what}");
        }
    }
}

#[test]
fn an_unacknowledged_end_is_taken_off_without_an_alarm() {
    let dir = tempfile::tempdir().unwrap();
    let big = LedgerSettings { segment_bytes: 1 << 20, ..small() };
    {
        let ledger = open(dir.path(), big);
        (0..5).for_each(|n| drop(ledger.close_blocking(request("a", &format!("r{n}"), 100, n)).unwrap()));
    }
    let head = head::peek(dir.path()).unwrap().unwrap();
    let mut torn = Vec::new();
    let chain = frame::write(&mut torn, 6, 5, &head.chain, b"half of this");
    frame::write(&mut torn, 7, 5, &chain, b"and this whole");
    torn[70] ^= 1;
    let path = segment::path(dir.path(), 1);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &torn, head.end).unwrap();
    let ledger = open(dir.path(), big);
    assert_eq!(ledger.gap(), None);
    assert_eq!(ledger.close_blocking(request("a", "r9", 100, 9)).unwrap().record.sequence, 6);
    let (records, gap) = read_all(&ledger);
    assert_eq!((records.len(), gap), (6, None));
}

/// Invariant 6: events, counters, segments, index and a full scan say the same.
#[test]
fn after_a_thousand_workloads_everything_adds_up_to_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let settings = LedgerSettings { segment_bytes: 64 << 10, ..small() };
    let mut random = Random::seeded(0xc0_5e4e_0000_0005);
    let mut truth = v1::UsageSums::default();
    let mut of_process = v1::UsageSums::default();
    let mut ledger = open(dir.path(), settings);
    let mut name = 0;
    for workload in 1..=1000 {
        for _ in 0..1 + random.below(20) {
            name += 1;
            let prompt = 1 + random.below(5000);
            let mut record = request(
                pick(&["a", "b", "c"], random.below(3)),
                &name.to_string(),
                prompt,
                random.below(prompt),
            );
            record.complete = random.below(10) > 0;
            record.bytes_served = random.below(1 << 30);
            record.namespace = vec![u8::try_from(random.below(3)).unwrap(); 32].into();
            record.write_tokens = Some(v1::WriteTokens { ttl_24h: random.below(100), ..Default::default() });
            let closed = ledger.close_blocking(record).unwrap().record;
            sums::count(&mut truth, &closed);
            sums::count(&mut of_process, &closed);
        }
        if workload % 50 == 0 {
            let (records, gap) = read_all(&ledger);
            assert_eq!((sum(&records), gap), (truth, None), "a full scan");
            let events: u64 = records
                .iter()
                .map(|record| crate::usage::event::cloud_event("fleet", record))
                .filter(|event| event["data"]["complete"] == true)
                .map(|event| event["data"]["hit_tokens"].as_u64().unwrap())
                .sum();
            assert_eq!(events, truth.hit_tokens, "events");
            let mut indexed = v1::UsageSums::default();
            ledger.query(0, u64::MAX).unwrap().0.iter().for_each(|(_, row)| sums::add(&mut indexed, row));
            assert_eq!(indexed, truth, "the index");
            let mut counted = v1::UsageSums::default();
            ledger.counters().tenants().iter().for_each(|(_, row)| sums::add(&mut counted, row));
            assert_eq!(counted, of_process, "counters of this process");
            let found = verify::verify(dir.path()).unwrap();
            assert_eq!((found.records, found.gaps.len()), (records.len() as u64, 0), "segment by segment");
        }
        if workload % 250 == 0 {
            drop(ledger);
            if workload % 500 == 0 {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
            ledger = open(dir.path(), settings);
            of_process = v1::UsageSums::default();
        }
    }
    assert!(truth.requests > 5000 && truth.incomplete_requests > 500);
}

/// Invariant 7: no number of a ledger is a float, by the messages' own descriptors.
#[test]
fn ledger_types_are_integers() {
    use prost::Message as _;
    use prost_types::field_descriptor_proto::Type;
    let set = prost_types::FileDescriptorSet::decode(esker_proto::v1::FILE_DESCRIPTOR_SET).unwrap();
    let ledger =
        ["UsageRecord", "UsageSums", "UsageRow", "WriteTokens", "CacheUsage", "SettleRequest", "SettleReply"];
    let messages = set.file.iter().flat_map(|file| &file.message_type);
    let mut checked = 0;
    for message in messages.filter(|message| ledger.contains(&message.name())) {
        checked += 1;
        for field in &message.field {
            assert!(
                !matches!(field.r#type(), Type::Float | Type::Double),
                "{}.{}",
                message.name(),
                field.name()
            );
        }
    }
    assert_eq!(checked, ledger.len());
    // And by the compiler: what is added up, rated and charged is u64 and nothing else.
    let v1::WriteTokens { ttl_5m, ttl_1h, ttl_24h, ttl_72h, lease } = v1::WriteTokens::default();
    let _: [u64; 5] = [ttl_5m, ttl_1h, ttl_24h, ttl_72h, lease];
    let crate::price::Amounts { hit, miss, write, completion, stored, pinned, without_cache } =
        crate::price::Amounts::default();
    let _: [u64; 7] = [hit, miss, write, completion, stored, pinned, without_cache];
}

/// Invariants 9 and 10: who writes a record says nothing about when; hours are closed once, and again without adding.
#[test]
fn time_is_the_ledgers_and_hours_close_once() {
    let dir = tempfile::tempdir().unwrap();
    let clocks = ManualClocks::new(NOON_MS);
    let new = || {
        Ledger::open_with(dir.path(), small(), "fleet", Hooks::default(), clocks.clone(), clocks.clone())
            .unwrap()
    };
    let hour = NOON_MS / 1000;
    let account = |hour_unix_s| Account {
        hour_unix_s,
        tenant: "a".into(),
        namespace: vec![7; 32],
        scope: "private".into(),
    };
    let ledger = new();
    let claimed = v1::UsageRecord {
        time_unix_ms: 5,
        usage_id: "mine".into(),
        clock_skewed: true,
        ..request("a", "r", 10, 5)
    };
    let closed = ledger.close_blocking(claimed).unwrap().record;
    assert_eq!((closed.time_unix_ms, closed.clock_skewed), (NOON_MS, false));
    assert_eq!(closed.usage_id, usage_id("fleet", "a", "r", "fetch"));
    clocks.jump(NOON_MS + 6 * 60_000);
    clocks.pass(std::time::Duration::from_secs(1));
    let skewed = ledger.close_blocking(request("a", "r2", 10, 5)).unwrap().record;
    assert_eq!((skewed.time_unix_ms, skewed.clock_skewed), (NOON_MS + 1000, true));

    // One request before the hour ends, one at its very end, which is the next hour's.
    clocks.jump(NOON_MS + 1000);
    clocks.pass(std::time::Duration::from_millis(3_598_999));
    ledger.close_blocking(request("a", "r3", 10, 5)).unwrap();
    clocks.pass(std::time::Duration::from_millis(1));
    ledger.close_blocking(request("a", "r4", 10, 5)).unwrap();
    let requests = |ledger: &Ledger, hour: u64| -> u64 {
        ledger.query(hour, hour + 3600).unwrap().0.iter().map(|(_, sums)| sums.requests).sum()
    };
    assert_eq!((requests(&ledger, hour), requests(&ledger, hour + 3600)), (3, 1));

    let held = ByteSeconds { stored: 1000, pinned: 10 };
    ledger.add_byte_seconds(&[(account(hour), held), (account(hour + 3600), held)]);
    ledger.add_byte_seconds(&[(account(hour), held)]);
    let stored = |ledger: &Ledger, hour: u64| -> u64 {
        ledger.query(hour, hour + 3600).unwrap().0.iter().map(|(_, sums)| sums.stored_byte_seconds).sum()
    };
    assert_eq!(
        (stored(&ledger, hour), stored(&ledger, hour + 3600)),
        (2000, 1000),
        "open hours are seen too"
    );
    for _ in 0..3 {
        storage::close_hours(&ledger, hour + 3600);
        assert_eq!((stored(&ledger, hour), stored(&ledger, hour + 3600)), (2000, 1000));
    }
    drop(ledger);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let ledger = new();
    // The open hour was not a fact yet; the closed one is.
    assert_eq!((stored(&ledger, hour), stored(&ledger, hour + 3600)), (2000, 0));
    let (records, _) = read_all(&ledger);
    assert_eq!(records.iter().filter(|record| sums::is_storage(record)).count(), 1);
}

/// F8: a ledger without room stops what is billable before it loses anything, and goes on when there is room.
#[test]
fn a_full_ledger_stops_billable_work_and_closes_what_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let settings = LedgerSettings { segment_bytes: 16 << 10, max_bytes: 64 << 10 };
    let ledger = open(dir.path(), settings);
    let mut admitted = 0;
    while ledger.admit().is_ok() {
        ledger.close_blocking(request("a", &format!("r{admitted}"), 100, 1)).unwrap();
        admitted += 1;
        assert!(admitted < 1000, "it never became full");
    }
    assert!(ledger.admit().unwrap_err().to_string().contains("nothing billable"));
    // What was begun before can still be closed.
    let mut after = 0;
    let full = loop {
        match ledger.close_blocking(request("a", &format!("s{after}"), 100, 1)) {
            Ok(_) => after += 1,
            Err(error) => break error,
        }
        assert!(after < 1000, "the limit is none");
    };
    assert!(after > 3, "the reserve held {after}");
    assert!(matches!(full, LedgerError::Full { .. }), "{full}");
    // A replay needs no room.
    assert!(ledger.close_blocking(request("a", "r0", 100, 1)).unwrap().replayed);
    drop(ledger);
    let ledger = open(dir.path(), LedgerSettings { max_bytes: 1 << 20, ..settings });
    assert!(ledger.admit().is_ok());
    ledger.close_blocking(request("a", "more", 100, 1)).unwrap();
    let (records, gap) = read_all(&ledger);
    assert_eq!((records.len(), gap), (admitted + after + 1, None));
}

#[test]
fn after_a_failed_write_nothing_more_is_taken_until_a_restart() {
    for point in ["log.write", "log.sync", "log.synced"] {
        let dir = tempfile::tempdir().unwrap();
        let hooks = Hooks::default();
        let ledger = open_hooked(dir.path(), small(), hooks.clone());
        ledger.close_blocking(request("a", "r1", 100, 1)).unwrap();
        hooks.plan(point, 0, Wrong::Fail);
        assert_eq!(ledger.close_blocking(request("a", "r2", 100, 1)).unwrap_err(), LedgerError::Failed);
        assert_eq!(ledger.close_blocking(request("a", "r3", 100, 1)).unwrap_err(), LedgerError::Failed);
        assert_eq!(ledger.admit(), Err(LedgerError::Failed));
        assert!(ledger.close_blocking(request("a", "r1", 100, 1)).unwrap().replayed);
        drop(ledger);
        let ledger = open(dir.path(), small());
        ledger.close_blocking(request("a", "r2", 100, 1)).unwrap();
        let (records, gap) = read_all(&ledger);
        assert_eq!((records.len(), gap), (2, None), "{point}");
    }
}

const CHILD_DIR: &str = "ESKER_LEDGER_CHILD";

/// The life of one process in [`killed_anywhere`]: it serves, bills, exports, and dies somewhere. Does nothing on its own.
#[test]
fn child_of_the_kills() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let dir = PathBuf::from(dir);
    let plan = std::env::var("ESKER_LEDGER_PLAN").unwrap();
    let (point, nth) = plan.split_once('@').unwrap();
    let life: u64 = std::env::var("ESKER_LEDGER_LIFE").unwrap().parse().unwrap();
    let hooks = Hooks::default();
    hooks.plan(point, nth.parse().unwrap(), Wrong::Die);
    let ledger = Arc::new(open_hooked(&dir.join("ledger"), small(), hooks));
    let control = Arc::new(Control::open(&dir.join("control")).unwrap());
    let sink = Lines(dir.join("sink"));
    let mut exporter = Exporter::open(Arc::clone(&ledger), control, "sink", sink, false).unwrap();
    let acknowledged = std::fs::OpenOptions::new().append(true).create(true).open(dir.join("acked")).unwrap();
    let served = std::fs::OpenOptions::new().append(true).create(true).open(dir.join("served")).unwrap();
    let say = |mut file: &std::fs::File, name: &str| {
        std::io::Write::write_all(&mut file, format!("{name}\n").as_bytes()).unwrap();
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for turn in 0..40 {
        let names: Vec<String> = (0..3).map(|n| format!("r{life}-{turn}-{n}")).collect();
        let closing = names.iter().map(|name| {
            // The bytes are out before the account is closed.
            say(&served, name);
            ledger.close(request("a", name, 100, 1 + life % 50))
        });
        for (closing, name) in closing.collect::<Vec<_>>().into_iter().zip(&names) {
            runtime.block_on(closing).unwrap();
            say(&acknowledged, name);
        }
        exporter.step(NOON_MS).unwrap();
    }
    while exporter.step(NOON_MS).unwrap() != Stepped::Idle {}
}

/// A sink of lines in a file; whoever reads it tells repeats by id.
struct Lines(PathBuf);

impl Sink for Lines {
    fn deliver(&mut self, events: &[Value]) -> Result<(), String> {
        let lines: String = events
            .iter()
            .map(|event| {
                format!("{} {} {}\n", event["id"], event["data"]["request_id"], event["data"]["hit_tokens"])
            })
            .collect();
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&self.0);
        file.and_then(|mut file| std::io::Write::write_all(&mut file, lines.as_bytes()))
            .map_err(|e| e.to_string())
    }
}

/// Invariant 3. `ESKER_LEDGER_KILLS` says how many; 500 without it.
#[test]
fn killed_anywhere_the_bill_is_never_too_high() {
    let kills: usize = std::env::var("ESKER_LEDGER_KILLS").map_or(500, |text| text.parse().unwrap());
    let seed = std::env::var("ESKER_LEDGER_SEED").ok().and_then(|text| text.parse().ok());
    let mut random = Random::seeded(seed.unwrap_or(0x0dea_d000_0000_0006));
    let died = AtomicUsize::new(0);
    let mut by_point: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut under, mut over, mut lost) = (0_u64, 0_u64, 0_u64);
    let mut lives = 0;
    // A new folder now and then, so that each end is looked at soon.
    while died.load(Relaxed::Relaxed) < kills {
        let dir = tempfile::tempdir().unwrap();
        let rounds = 25.min(kills - died.load(Relaxed::Relaxed));
        for life in 0..=rounds {
            // The last one lives, and delivers everything.
            let point = if life == rounds { "never" } else { POINTS[lives % POINTS.len()] };
            let nth = match point {
                "log.roll" | "log.rolled" => random.below(3),
                _ => random.below(20),
            };
            lives += 1;
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "ledger::tests::child_of_the_kills", "--nocapture", "--test-threads=1"])
                .env(CHILD_DIR, dir.path())
                .env("ESKER_LEDGER_PLAN", format!("{point}@{nth}"))
                .env("ESKER_LEDGER_LIFE", life.to_string())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .status()
                .unwrap();
            if status.success() {
                continue;
            }
            let signal = std::os::unix::process::ExitStatusExt::signal(&status);
            assert_eq!(signal, Some(6), "life {life} failed on its own, at {point}@{nth}: {status}");
            died.fetch_add(1, Relaxed::Relaxed);
            *by_point.entry(point).or_default() += 1;
        }
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
        let names = |name: &str| text(name).lines().map(str::to_owned).collect::<HashSet<_>>();
        let (served, acked) = (names("served"), names("acked"));
        let mut sink: BTreeMap<String, (String, u64)> = BTreeMap::new();
        for line in text("sink").lines() {
            let mut words = line.split_whitespace().map(|word| word.trim_matches('"'));
            let (id, name) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
            sink.insert(id, (name, words.next().unwrap().parse().unwrap()));
        }
        let life_of = |name: &str| name[1..].split('-').next().unwrap().parse::<u64>().unwrap();
        let truth = |names: &HashSet<String>| names.iter().map(|name| 1 + life_of(name) % 50).sum::<u64>();
        let billed: HashSet<String> = sink.values().map(|(name, _)| name.clone()).collect();
        let sum: u64 = sink.values().map(|(_, hit)| hit).sum();
        assert_eq!(billed.len(), sink.len(), "a request was billed under two ids");
        over += sum.saturating_sub(truth(&served)) + billed.difference(&served).count() as u64;
        lost += acked.difference(&billed).count() as u64;
        under += served.difference(&billed).count() as u64;
        let unanswered = served.len() - acked.len();
        assert!(served.difference(&billed).count() <= unanswered, "more unbilled than unanswered");
        assert_eq!(verify::verify(&dir.path().join("ledger")).unwrap().gaps, [], "a kill left damage");
    }
    println!(
        "{} kills, {by_point:?}: {under} requests unbilled, {over} over, {lost} acknowledged and lost",
        died.load(Relaxed::Relaxed)
    );
    if let Some(folder) = std::env::var_os("ESKER_FIGURES") {
        // Rounds of one long run add up.
        let path = PathBuf::from(folder).join("ledger_kills.json");
        let before = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        let before = before.unwrap_or_default();
        let add = |name: &str, more: u64| before[name].as_u64().unwrap_or(0) + more;
        let at = |point: &&str| {
            before["at"][*point].as_u64().unwrap_or(0) + by_point.get(point).map_or(0, |&n| n as u64)
        };
        let at: serde_json::Map<_, _> =
            POINTS.iter().map(|point| ((*point).to_owned(), at(point).into())).collect();
        let figures = serde_json::json!({
            "kills": add("kills", died.load(Relaxed::Relaxed) as u64), "unbilled": add("unbilled", under),
            "over": add("over", over), "lost": add("lost", lost), "at": at,
        });
        std::fs::write(path, figures.to_string()).unwrap();
    }
    assert_eq!((over, lost), (0, 0));
    assert!(kills < 200 || by_point.len() == POINTS.len(), "some point was never reached: {by_point:?}");
}

/// How fast accounts are closed, durably, with so many waiting at a time. Not a bound: the bench has one.
#[test]
fn sixty_four_clients_share_flushes() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Arc::new(open(dir.path(), LedgerSettings::default()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let started = std::time::Instant::now();
    let clients: Vec<_> = (0..64)
        .map(|client| {
            let ledger = Arc::clone(&ledger);
            runtime.spawn(async move {
                for n in 0..200 {
                    ledger.close(request("a", &format!("{client}-{n}"), 100, 1)).await.unwrap();
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| runtime.block_on(client).unwrap());
    let took = started.elapsed();
    let flushes = ledger.counters().flushes.load(Ordering::Relaxed);
    println!("12800 accounts in {took:?}, {flushes} flushes");
    assert!(flushes < 12_800 / 2, "{flushes} flushes for 12800 accounts: they were not grouped");
}

#[test]
fn a_cursor_table_is_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::open(dir.path()).unwrap();
    control.put(Table::UsageCursors, "default/x", &"1.2.3.-").unwrap();
    assert_eq!(control.get::<String>(Table::UsageSinks, "default/x").unwrap(), None);
}
