"""Esker beside LMCache's own L2 adapters and beside SGLang's file backend, in one run on one disk.

    .ci/bench-clients [--mib 512] [--batch 32] [--in-flight 1] [--repeat 1] [--folder DIR]

Each rival is driven through the engine's own interface: LMCache's adapters as its benchmark drives them (submit, eventfd, bitmap;
`--in-flight` batches at a time), SGLang's backends by `batch_set` and `batch_get`. Values are 1 MiB of random bytes. The clock runs
while a backend works, not while memory is filled before or compared after it.

- store: until the engine is told that it is done. Esker's is on the drive then, and is found again after a power cut; for the others
  that is the page cache or the device's own word.
- durable: the same promise from all: what is stored is found again after a power cut before the next is given. The others are made
  to keep it: their files are flushed after each round, and the raw block adapter writes the index that it otherwise writes every
  minute.
- cold: loaded after the page cache was dropped, which needs root; every byte is compared with what was stored.

Only Esker verifies what it loads; the others hand out what they read. First the drive itself: direct writes of 1 MiB side by side,
flushed after each round, and direct reads.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import mmap
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client" / "python" / "tests"))
from support import Node, offers  # noqa: E402

MIB = 1 << 20


def drop_page_cache() -> bool:
    """Whether it was dropped."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def sync_folder(folder: pathlib.Path) -> None:
    """Everything of its file system is on the drive."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)


def measure(
    name: str,
    store: Callable[[int], float],
    durable: Callable[[], None],
    load: Callable[[int], float],
    rounds: int,
    round_bytes: int,
) -> dict:
    """Gigabytes a second of storing and of loading `rounds`. Both say how many seconds one took; `durable` makes it last."""
    size = rounds * round_bytes / 1e9
    os.sync()
    stored = lasting = 0.0
    for at in range(rounds):
        took = store(at)
        started = time.perf_counter()
        durable()
        stored += took
        lasting += took + time.perf_counter() - started
    cold = drop_page_cache()
    loaded = sum(load(at) for at in range(rounds))
    return {
        "name": name,
        "store_gb_per_s": round(size / stored, 3),
        "durable_store_gb_per_s": round(size / lasting, 3),
        ("cold" if cold else "warm") + "_load_gb_per_s": round(size / loaded, 3),
    }


def drive(folder: pathlib.Path, rounds: int, values: int) -> dict:
    """What the drive gives: `values` of 1 MiB at a time, and a flush after each round of writes."""
    path = folder / "floor.img"
    memory = mmap.mmap(-1, values * MIB)
    memory.write(os.urandom(values * MIB))
    view = memoryview(memory)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(descriptor, 0, rounds * values * MIB)
        os.fsync(descriptor)
        with ThreadPoolExecutor(16) as threads:

            def each(move: Callable[..., int], at: int) -> float:
                places = [(view[one * MIB : (one + 1) * MIB], (at * values + one) * MIB) for one in range(values)]
                started = time.perf_counter()
                moved = list(threads.map(lambda place: move(descriptor, [place[0]], place[1]), places))
                assert moved == [MIB] * values
                return time.perf_counter() - started

            result = measure(
                "the drive itself",
                lambda at: each(os.pwritev, at),
                lambda: os.fdatasync(descriptor),
                lambda at: each(os.preadv, at),
                rounds,
                values * MIB,
            )
    finally:
        os.close(descriptor)
        path.unlink()
    return result


def data(count: int) -> torch.Tensor:
    """Random bytes that no codec makes smaller."""
    return torch.frombuffer(bytearray(os.urandom(count * MIB)), dtype=torch.uint8).view(count, MIB)


def lmcache(folder: pathlib.Path, rounds: int, batch: int, in_flight: int, endpoint: str, local: str) -> list[dict]:
    """LMCache's adapters and ours, made by its own factory."""
    from lmcache.cli.commands.bench.l2_adapter_bench.data import create_l1_memory_desc, make_memory_objects, wait_eventfd
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
    from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry

    wave = batch * in_flight
    count = rounds * wave
    stored = data(count)
    # Aligned, as LMCache's own memory is, so that rivals may read and write directly.
    backing = torch.empty(2 * wave * MIB + 4096, dtype=torch.uint8)
    start = -backing.data_ptr() % 4096
    arena = backing[start : start + 2 * wave * MIB]
    image = folder / "raw_block.img"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (count + 16) * 2 * MIB + (300 << 20))
    raw_block = {"device_path": str(image), "slot_bytes": MIB + 4096, "io_engine": "io_uring"}
    ours = {
        "type": "plugin",
        "module_path": "esker.connectors.lmcache",
        "class_name": "EskerL2Adapter",
        "adapter_params": {"endpoint": endpoint, "weights_revision": "bench"},
    }
    by_memory = {**ours, "adapter_params": {"endpoint": local, "weights_revision": "bench, local"}}
    adapters = {
        "lmcache fs (O_DIRECT)": {"type": "fs", "base_path": str(folder / "fs"), "use_odirect": True},
        "lmcache raw_block (io_uring)": {"type": "raw_block", **raw_block},
        "lmcache raw_block (posix)": {"type": "raw_block", **raw_block, "io_engine": "posix"},
        "esker under lmcache, by gRPC": ours,
        **({"esker under lmcache, by shared memory": by_memory} if local else {}),
    }
    results = []
    for name, spec in adapters.items():
        try:
            config = get_l2_adapter_config_class(spec["type"]).from_dict(spec)
            adapter = create_l2_adapter_from_registry(config, l1_memory_desc=create_l1_memory_desc(arena, 4096))
        except Exception as error:  # noqa: BLE001: a rival that does not run here is said, not hidden
            results.append({"name": name, "not_run": f"{type(error).__name__}: {error}"})
            continue
        objects = make_memory_objects(arena, wave, MIB, 0)
        targets = make_memory_objects(arena, wave, MIB, wave * MIB)
        # A name of its own for each adapter and run: what is stored already would not be stored again.
        prefix = os.urandom(12)
        keys = [ObjectKey(prefix + at.to_bytes(4, "big"), "org/model", 0) for at in range(count)]
        rows = arena.view(2 * wave, MIB)
        batches = [slice(at * batch, (at + 1) * batch) for at in range(in_flight)]

        def submit(task: Callable[..., int], memory: list, at: int) -> list[int]:
            wanted = keys[at * wave : (at + 1) * wave]
            return [task(wanted[some], memory[some]) for some in batches]

        def store(at: int) -> float:
            rows[:wave] = stored[at * wave : (at + 1) * wave]
            started = time.perf_counter()
            tasks = submit(adapter.submit_store_task, objects, at)
            done: dict = {}
            while len(done) < len(tasks):
                assert wait_eventfd(adapter.get_store_event_fd(), 120)
                done.update(adapter.pop_completed_store_tasks())
            took = time.perf_counter() - started
            assert all(done[task].is_successful() for task in tasks), f"{name}: a store failed"
            return took

        def durable() -> None:
            if spec["type"] == "raw_block":
                adapter._core.checkpoint_now()
                with image.open("rb+") as file:
                    os.fdatasync(file.fileno())
            elif spec["type"] == "fs":
                sync_folder(folder)

        def load(at: int) -> float:
            rows[wave:].zero_()
            started = time.perf_counter()
            tasks = submit(adapter.submit_load_task, targets, at)
            done: dict = {}
            while len(done) < len(tasks):
                assert wait_eventfd(adapter.get_load_event_fd(), 120)
                answers = ((task, adapter.query_load_result(task)) for task in tasks if task not in done)
                done.update({task: bitmap for task, bitmap in answers if bitmap is not None})
            took = time.perf_counter() - started
            assert all(done[task].popcount() == batch for task in tasks), f"{name}: a load failed"
            assert torch.equal(rows[wave:], stored[at * wave : (at + 1) * wave]), f"{name}: other bytes"
            return took

        results.append(measure(name, store, durable, load, rounds, wave * MIB))
        adapter.close()
        shutil.rmtree(folder / "fs", ignore_errors=True)
    image.unlink()
    return results


def sglang(folder: pathlib.Path, rounds: int, batch: int, in_flight: int, endpoint: str, local: str) -> list[dict]:
    """SGLang's file backend and ours, by the calls that both have: it gives one batch at a time."""
    import types

    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    from esker.connectors.sglang import EskerHiCache

    def config(extra: dict) -> HiCacheStorageConfig:
        places = dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank"), 0)
        sizes = dict.fromkeys(("tp_size", "pp_size", "attn_cp_size"), 1)
        return HiCacheStorageConfig(
            **places,
            **sizes,
            is_mla_model=True,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name="org/model",
            extra_config=extra,
        )

    rounds *= in_flight
    count = rounds * batch
    stored = data(count)
    page = types.SimpleNamespace(get_dummy_flat_data_page=lambda: torch.empty(MIB, dtype=torch.uint8), page_size=64)
    ours = {}
    for way, address in {"gRPC": endpoint, **({"shared memory": local} if local else {})}.items():
        ours[way] = EskerHiCache(config({"endpoint": address, "weights_revision": f"bench {way}"}), {})
        ours[way].register_mem_pool_host(page)
    backends = {
        "sglang file": HiCacheFile(config({"file_storage_path": str(folder / "hicache")})),
        **{f"esker under sglang, by {way}": backend for way, backend in ours.items()},
    }
    targets = torch.empty(batch, MIB, dtype=torch.uint8)
    results = []
    for name, backend in backends.items():
        keys = [os.urandom(32).hex() for _ in range(count)]

        def store(at: int) -> float:
            some = range(at * batch, (at + 1) * batch)
            started = time.perf_counter()
            assert backend.batch_set([keys[one] for one in some], [stored[one] for one in some]), f"{name}: a store failed"
            return time.perf_counter() - started

        def durable() -> None:
            if isinstance(backend, HiCacheFile):
                sync_folder(folder)

        def load(at: int) -> float:
            some = keys[at * batch : (at + 1) * batch]
            targets.zero_()
            started = time.perf_counter()
            loaded = backend.batch_get(some, list(targets))
            took = time.perf_counter() - started
            assert all(one is not None for one in loaded), f"{name}: a load failed"
            assert torch.equal(targets, stored[at * batch : (at + 1) * batch]), f"{name}: other bytes"
            return took

        results.append(measure(name, store, durable, load, rounds, batch * MIB))
    shutil.rmtree(folder / "hicache", ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=1, help="batches that LMCache gives at a time")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.folder / f"esker-bench-{os.getpid()}"
    folder.mkdir(parents=True)
    in_flight = arguments.in_flight
    rounds = max(1, arguments.mib // (arguments.batch * in_flight))
    facts = {"values": rounds * in_flight * arguments.batch, "mib": 1, "batch": arguments.batch, "in_flight": in_flight}
    suites = {"lmcache": lmcache, "sglang": sglang}
    socket = str(folder / "s")
    # A node without the local fast path is measured over gRPC alone.
    memory = ["--local", socket] if offers("--local") else []
    node = Node(folder / "data", "--codec", "raw", "--scrub-mb-per-s", "0", *memory)
    try:
        local = f"unix:{socket}" if memory else ""
        for engine, suite in suites.items():
            for _ in range(arguments.repeat if importlib.util.find_spec(engine) is not None else 0):
                results = [drive(folder, rounds, arguments.batch * in_flight)]
                results += suite(folder, rounds, arguments.batch, in_flight, node.address, local)
                for result in results:
                    print(json.dumps({**result, **facts}), flush=True)
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
