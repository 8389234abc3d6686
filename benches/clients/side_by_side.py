"""Esker beside LMCache's own L2 adapters and beside SGLang's file backend, in one run on one disk.

    .ci/bench-clients [--mib 512] [--batch 32] [--folder DIR]

Each rival is driven through the engine's own interface: LMCache's adapters as its benchmark drives them (submit, eventfd, bitmap),
SGLang's backends by `batch_set` and `batch_get`. Values are 1 MiB of random bytes.

- store: until the engine is told that it is done. Esker's is on the drive then; for the others that is the page cache or the device's
  own word.
- durable: the same, and everything forced to the drive (`sync`) before the clock stops.
- cold: loaded after the page cache was dropped, which needs root; every byte is compared with what was stored.

Only Esker verifies what it loads; the others hand out what they read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable

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


def measure(name: str, store: Callable[[int], None], load: Callable[[int], None], rounds: int, batch: int) -> dict:
    """Gigabytes a second of storing and of loading `rounds` batches."""
    size = rounds * batch * MIB / 1e9
    os.sync()
    started = time.perf_counter()
    for at in range(rounds):
        store(at)
    stored = time.perf_counter() - started
    os.sync()
    durable = time.perf_counter() - started
    cold = drop_page_cache()
    started = time.perf_counter()
    for at in range(rounds):
        load(at)
    loaded = time.perf_counter() - started
    return {
        "name": name,
        "store_gb_per_s": round(size / stored, 3),
        "durable_store_gb_per_s": round(size / durable, 3),
        ("cold" if cold else "warm") + "_load_gb_per_s": round(size / loaded, 3),
    }


def data(count: int) -> torch.Tensor:
    """Random bytes that no codec makes smaller."""
    return torch.frombuffer(bytearray(os.urandom(count * MIB)), dtype=torch.uint8).view(count, MIB)


def lmcache(folder: pathlib.Path, rounds: int, batch: int, endpoint: str, local: str) -> list[dict]:
    """LMCache's adapters and ours, made by its own factory."""
    from lmcache.cli.commands.bench.l2_adapter_bench.data import create_l1_memory_desc, make_memory_objects, wait_eventfd
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
    from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry

    count = rounds * batch
    stored = data(count)
    # Aligned, as LMCache's own memory is, so that rivals may read and write directly.
    backing = torch.empty(2 * batch * MIB + 4096, dtype=torch.uint8)
    start = -backing.data_ptr() % 4096
    arena = backing[start : start + 2 * batch * MIB]
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
        objects = make_memory_objects(arena, batch, MIB, 0)
        targets = make_memory_objects(arena, batch, MIB, batch * MIB)
        # A name of its own for each adapter and run: what is stored already would not be stored again.
        prefix = os.urandom(12)
        keys = [ObjectKey(prefix + at.to_bytes(4, "big"), "org/model", 0) for at in range(count)]
        rows = arena.view(2 * batch, MIB)

        def store(at: int) -> None:
            rows[:batch] = stored[at * batch : (at + 1) * batch]
            task = adapter.submit_store_task(keys[at * batch : (at + 1) * batch], objects)
            assert wait_eventfd(adapter.get_store_event_fd(), 120)
            assert adapter.pop_completed_store_tasks()[task].is_successful(), f"{name}: a store failed"

        def load(at: int) -> None:
            task = adapter.submit_load_task(keys[at * batch : (at + 1) * batch], targets)
            assert wait_eventfd(adapter.get_load_event_fd(), 120)
            assert adapter.query_load_result(task).popcount() == batch, f"{name}: a load failed"
            assert torch.equal(rows[batch:], stored[at * batch : (at + 1) * batch]), f"{name}: other bytes"

        results.append(measure(name, store, load, rounds, batch))
        adapter.close()
        shutil.rmtree(folder / "fs", ignore_errors=True)
    image.unlink()
    return results


def sglang(folder: pathlib.Path, rounds: int, batch: int, endpoint: str, local: str) -> list[dict]:
    """SGLang's file backend and ours, by the calls that both have."""
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

        def store(at: int) -> None:
            some = range(at * batch, (at + 1) * batch)
            assert backend.batch_set([keys[one] for one in some], [stored[one] for one in some]), f"{name}: a store failed"

        def load(at: int) -> None:
            some = keys[at * batch : (at + 1) * batch]
            loaded = backend.batch_get(some, list(targets))
            assert all(one is not None for one in loaded), f"{name}: a load failed"
            assert torch.equal(targets, stored[at * batch : (at + 1) * batch]), f"{name}: other bytes"

        results.append(measure(name, store, load, rounds, batch))
    shutil.rmtree(folder / "hicache", ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.folder / f"esker-bench-{os.getpid()}"
    folder.mkdir(parents=True)
    rounds = max(1, arguments.mib // arguments.batch)
    suites = {"lmcache": lmcache, "sglang": sglang}
    socket = str(folder / "s")
    # A node without the local fast path is measured over gRPC alone.
    memory = ["--local", socket] if offers("--local") else []
    node = Node(folder / "data", "--codec", "raw", "--scrub-mb-per-s", "0", *memory)
    try:
        for engine, suite in suites.items():
            if importlib.util.find_spec(engine) is not None:
                for result in suite(folder, rounds, arguments.batch, node.address, f"unix:{socket}" if memory else ""):
                    print(json.dumps({**result, "values": rounds * arguments.batch, "mib": 1, "batch": arguments.batch}))
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
