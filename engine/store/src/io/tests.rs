//! The suite that every disk passes.

use std::sync::Arc;
use std::sync::mpsc;

use super::faulty::FaultyDisk;
use super::sim::{Image, SimDisk};
use super::*;

/// Runs `test` on every disk, each in a folder of its own.
fn on_every_disk(test: impl Fn(&dyn Disk, &std::path::Path)) {
    for engine in [IoEngine::UringDirect, IoEngine::PositionalDirect, IoEngine::PositionalBuffered] {
        for wrapped in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut disk = match probe::open(dir.path(), engine) {
                Ok(disk) => disk,
                Err(error) => {
                    eprintln!("left out: {engine}: {error}");
                    continue;
                }
            };
            if wrapped {
                disk = FaultyDisk::new(disk);
            }
            assert_eq!(disk.engine(), engine);
            test(disk.as_ref(), dir.path());
            assert_eq!(disk.unknown_completions(), 0);
        }
    }
    let nowhere = std::path::Path::new("/nonexistent");
    test(SimDisk::open(Image::default(), 1 << 30).as_ref(), nowhere);
    test(SimDisk::late(Image::default(), 1 << 30, 1).as_ref(), nowhere);
    test(FaultyDisk::new(SimDisk::open(Image::default(), 1 << 30)).as_ref(), nowhere);
}

fn filled(pool: &Arc<BufferPool>, pages: usize, seed: u8) -> AlignedBuf {
    let mut buf = pool.take(pages * PAGE);
    buf.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 7) as u8 ^ seed);
    buf
}

#[test]
fn what_is_written_is_read_back_with_many_ops_in_flight() {
    on_every_disk(|disk, _| {
        let pool = BufferPool::new(1 << 20);
        let file = disk.create("a", 1 << 20).unwrap();
        let (reply, completions) = mpsc::channel();
        for page in 0..256_u64 {
            disk.submit(Op::write(file, page * PAGE as u64, filled(&pool, 1, page as u8), page, &reply));
        }
        for _ in 0..256 {
            assert!(completions.recv().unwrap().full().unwrap().is_some());
        }
        wait(disk, |reply| Op::sync(file, 0, reply)).unwrap();
        let mut seen = [false; 256];
        for page in 0..256_u64 {
            disk.submit(Op::read(file, page * PAGE as u64, pool.take(PAGE), page, &reply));
        }
        for _ in 0..256 {
            let completion = completions.recv().unwrap();
            let page = completion.tag as usize;
            let buf = completion.full().unwrap().unwrap();
            assert!(buf[..] == filled(&pool, 1, page as u8)[..], "page {page}");
            assert!(!std::mem::replace(&mut seen[page], true), "completed once");
        }
    });
}

#[test]
fn a_read_across_the_end_is_short_and_never_a_success() {
    on_every_disk(|disk, _| {
        let pool = BufferPool::new(1 << 20);
        let file = disk.create("a", 3 * PAGE as u64).unwrap();
        let (reply, completions) = mpsc::channel();
        disk.submit(Op::read(file, PAGE as u64, pool.take(8 * PAGE), 5, &reply));
        let completion = completions.recv().unwrap();
        assert_eq!((completion.tag, *completion.result.as_ref().unwrap()), (5, 2 * PAGE));
        assert_eq!(completion.full().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        disk.submit(Op::read(file, 1 << 20, pool.take(PAGE), 6, &reply));
        assert_eq!(completions.recv().unwrap().result.unwrap(), 0);
    });
}

#[test]
fn files_are_made_whole_found_again_and_removed() {
    on_every_disk(|disk, dir| {
        disk.create("b", 5 * PAGE as u64).unwrap();
        // The simulated disk has no folder.
        if dir.exists() {
            let metadata = std::fs::metadata(dir.join("b")).unwrap();
            assert_eq!(metadata.len(), 5 * PAGE as u64);
            let blocks = std::os::unix::fs::MetadataExt::blocks(&metadata);
            assert!(blocks * 512 >= 5 * PAGE as u64, "space is reserved");
        }
        assert_eq!(disk.create("b", PAGE as u64).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(disk.list().unwrap(), ["b"]);
        assert_eq!(disk.open("b").unwrap().1, 5 * PAGE as u64);
        assert_eq!(disk.open("c").unwrap_err().kind(), io::ErrorKind::NotFound);
        disk.remove("b").unwrap();
        assert!(disk.list().unwrap().is_empty());
    });
}

#[test]
fn holes_are_told_where_space_was_given_back() {
    on_every_disk(|disk, _| {
        let (pool, page) = (BufferPool::new(0), PAGE as u64);
        let file = disk.create("a", 8 * page).unwrap();
        wait(disk, |reply| Op::write(file, 0, filled(&pool, 8, 7), 0, reply)).unwrap();
        wait(disk, |reply| Op::sync(file, 0, reply)).unwrap();
        assert_eq!((disk.next_hole(file, 0), disk.next_data(file, 0)), (u64::MAX, 0));
        match disk.punch(file, 3 * page, 2 * page) {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return,
            other => other.unwrap(),
        }
        let holes = [0, 3, 4, 5].map(|at| disk.next_hole(file, at * page));
        assert_eq!(holes, [3 * page, 3 * page, 4 * page, u64::MAX]);
        let data = [0, 3, 4, 5].map(|at| disk.next_data(file, at * page));
        assert_eq!(data, [0, 5 * page, 5 * page, 5 * page]);
    });
}

#[test]
fn a_file_that_does_not_fit_leaves_nothing_behind() {
    on_every_disk(|disk, _| {
        let error = disk.create("huge", 1 << 50).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge), "{error}");
        assert!(disk.list().unwrap().is_empty());
    });
}

#[test]
fn an_op_on_a_removed_file_completes_with_an_error() {
    on_every_disk(|disk, _| {
        let file = disk.create("a", PAGE as u64).unwrap();
        disk.remove("a").unwrap();
        let error = read_exact(disk, &BufferPool::new(0), file, 0, PAGE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    });
}

#[test]
fn a_requester_that_goes_away_gives_its_permits_back() {
    on_every_disk(|disk, _| {
        let pool = BufferPool::new(1 << 20);
        let gate = ByteGate::new(1 << 20);
        let file = disk.create("a", 1 << 20).unwrap();
        let (reply, completions) = mpsc::channel();
        for page in 0..200 {
            let mut op = Op::read(file, page * PAGE as u64, pool.take(PAGE), page, &reply);
            op.permit = Some(gate.force(PAGE));
            disk.submit(op);
        }
        drop(completions);
        // An op submitted now completes after or beside the others; wait until all are through.
        wait(disk, |reply| Op::sync(file, 0, reply)).unwrap();
        for _ in 0..1000 {
            if gate.used_bytes() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("{} bytes still held", gate.used_bytes());
    });
}

#[test]
fn an_op_that_is_lost_completes_all_the_same() {
    let (reply, completions) = mpsc::channel();
    drop(Op::read(FileId(0), 0, BufferPool::new(0).take(PAGE), 9, &reply));
    let completion = completions.recv().unwrap();
    assert_eq!(completion.tag, 9);
    assert!(completion.full().is_err());
}

#[test]
fn the_first_engine_that_passes_the_probe_is_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let engines = [IoEngine::PositionalBuffered, IoEngine::UringDirect];
    let (disk, refused) = choose(dir.path(), &engines).unwrap();
    assert_eq!(disk.engine(), IoEngine::PositionalBuffered);
    assert!(refused.is_empty());
    assert!(disk.list().unwrap().is_empty(), "the probe cleans up");
    assert!(choose(dir.path(), &[]).is_err());
    assert!(choose(&dir.path().join("missing"), &engines).is_err());
}

#[test]
fn a_gate_lets_an_oversized_request_through_alone() {
    let gate = ByteGate::new(10);
    let large = gate.acquire(100);
    assert!(gate.try_acquire(1).is_none());
    let waiter = std::thread::spawn({
        let gate = Arc::clone(&gate);
        move || drop(gate.acquire(5))
    });
    drop(large);
    waiter.join().unwrap();
    assert_eq!(gate.used_bytes(), 0);
}

#[test]
#[should_panic(expected = "not page-aligned")]
fn an_unaligned_transfer_is_an_assertion() {
    let (reply, _completions) = mpsc::channel();
    let _ = Op::read(FileId(0), 512, BufferPool::new(0).take(PAGE), 0, &reply);
}
