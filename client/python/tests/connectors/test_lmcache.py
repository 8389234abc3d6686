"""The L2 adapter as LMCache makes and drives it: its factory, its contract tests, its benchmark, its fault injector."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("lmcache")

import torch  # noqa: E402
from lmcache.cli.commands.bench.l2_adapter_bench.data import (  # noqa: E402
    create_l1_memory_desc,
    make_memory_objects,
    make_object_keys,
    wait_eventfd,
)
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry  # noqa: E402
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig  # noqa: E402

from esker.chunks import Identity  # noqa: E402
from esker.connectors.lmcache import Form, Objects  # noqa: E402
from esker.connectors.settings import Settings  # noqa: E402
from support import Node, documented, usage, within  # noqa: E402

SIZE = 65_536
NO_LAYOUT = {0: MemoryLayoutDesc(shapes=[], dtypes=[])}


def configuration(address: str, **more: object) -> dict:
    """What docs/lmcache.md says, with the node of the test."""
    config = documented("lmcache.md")
    config["adapter_params"] |= {"endpoint": address, **more}
    return config


class Driver:
    """An adapter and the waiting that LMCache's controllers do."""

    def __init__(self, node: Node, count: int = 8, **more: object) -> None:
        self.stored = torch.empty(count * SIZE, dtype=torch.uint8)
        self.loaded = torch.zeros(count * SIZE, dtype=torch.uint8)
        config = PluginL2AdapterConfig.from_dict(configuration(node.address, **more))
        self.adapter = create_l2_adapter_from_registry(config, l1_memory_desc=create_l1_memory_desc(self.loaded))
        self.keys = make_object_keys(count)
        self.objects = make_memory_objects(self.stored, count, SIZE, 0)
        self.targets = make_memory_objects(self.loaded, count, SIZE, 0)
        self.stored.copy_(torch.frombuffer(bytearray(os.urandom(count * SIZE)), dtype=torch.uint8))
        self.loaded.zero_()

    def store(self, first: int = 0, end: int | None = None):  # type: ignore[no-untyped-def]
        task = self.adapter.submit_store_task(self.keys[first:end], self.objects[first:end])
        assert wait_eventfd(self.adapter.get_store_event_fd(), 60)
        return self.adapter.pop_completed_store_tasks()[task]

    def lookup(self, layouts=NO_LAYOUT) -> list[int]:  # type: ignore[no-untyped-def]
        task = self.adapter.submit_lookup_and_lock_task(self.keys, layouts)
        assert wait_eventfd(self.adapter.get_lookup_and_lock_event_fd(), 60)
        found = self.adapter.query_lookup_and_lock_result(task)
        assert self.adapter.query_lookup_and_lock_result(task) is None
        return list(found.get_indices_list())

    def load(self) -> list[int]:
        self.loaded.zero_()
        task = self.adapter.submit_load_task(self.keys, self.targets)
        assert wait_eventfd(self.adapter.get_load_event_fd(), 60)
        found = self.adapter.query_load_result(task)
        assert self.adapter.query_load_result(task) is None
        return list(found.get_indices_list())

    def right(self, positions: list[int]) -> bool:
        rows = lambda tensor: tensor.view(-1, SIZE)  # noqa: E731
        return all(torch.equal(rows(self.stored)[at], rows(self.loaded)[at]) for at in positions)


@pytest.fixture
def drivers(node: Node) -> Iterator[list[Driver]]:
    made: list[Driver] = []
    yield made
    for driver in made:
        driver.adapter.close()


def test_store_lookup_load_and_unlock(node: Node, drivers: list[Driver]) -> None:
    first = Driver(node)
    drivers.append(first)
    assert first.lookup() == []
    result = first.store(0, 6)
    assert result.is_successful() and result.bytes_transferred() == 6 * SIZE
    assert first.lookup() == [0, 1, 2, 3, 4, 5]
    assert first.load() == [0, 1, 2, 3, 4, 5] and first.right([0, 1, 2, 3, 4, 5])
    first.adapter.submit_unlock(first.keys)
    first.adapter.submit_unlock(first.keys)
    usage = first.adapter.get_usage()
    assert usage.total_bytes_used == 6 * SIZE and first.adapter.report_status()["is_healthy"]
    # A second process knows neither sizes nor keys: it finds them, with a layout and without.
    second = Driver(node)
    drivers.append(second)
    second.stored.copy_(first.stored)
    assert second.lookup() == [0, 1, 2, 3, 4, 5]
    layout = {0: MemoryLayoutDesc(shapes=[torch.Size([SIZE])], dtypes=[torch.uint8])}
    assert second.lookup(layout) == [0, 1, 2, 3, 4, 5]
    assert second.load() == [0, 1, 2, 3, 4, 5] and second.right([0, 1, 2, 3, 4, 5])
    # Other weights are other names.
    other = Driver(node, weights_revision="r2")
    drivers.append(other)
    assert other.lookup() == [] and other.lookup(layout) == [] and other.load() == []


def test_each_fact_alone_gives_another_namespace(tmp_path: pathlib.Path) -> None:
    def of(
        rope: str = "yarn", model: str = "org/model", size: int = SIZE, dtype: torch.dtype = torch.bfloat16, **told: str
    ) -> Identity:
        (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
        settings = Settings(**{"weights_revision": "r1", **told})
        layout = MemoryLayoutDesc(shapes=[torch.Size([size // dtype.itemsize])], dtypes=[dtype])
        objects = Objects(None, settings, str(tmp_path))
        return objects.store(ObjectKey(b"c" * 32, model, 0), Form.of_layout(layout))._identity

    others = [
        of("linear"),
        of(model="org/other"),
        of(size=2 * SIZE),
        of(dtype=torch.float16),
        of(weights_revision="r2"),
        of(model_facts="--quantization fp8"),
        of(adapter_revision="a1"),
    ]
    assert of() == of() and of() not in others
    assert all(one not in others[:at] for at, one in enumerate(others))


def test_objects_of_another_type_are_not_found(node: Node, drivers: list[Driver]) -> None:
    driver = Driver(node)
    drivers.append(driver)
    assert driver.store(0, 6).is_successful()
    layouts = [
        {0: MemoryLayoutDesc(shapes=[torch.Size([SIZE // dtype.itemsize])], dtypes=[dtype])}
        for dtype in (torch.uint8, torch.bfloat16)
    ]
    assert [driver.lookup(one) for one in layouts] == [[0, 1, 2, 3, 4, 5], []]
    for target in driver.targets:
        target.metadata.dtype = torch.bfloat16
    assert driver.load() == []


def test_what_was_loaded_is_on_the_bill_and_each_chunk_once(node: Node, drivers: list[Driver]) -> None:
    driver = Driver(node)
    drivers.append(driver)
    assert driver.store(0, 6).is_successful() and driver.lookup() == [0, 1, 2, 3, 4, 5]
    assert usage(node) == (0, 0, 0), "stores and lookups use nothing"
    driver.adapter.submit_unlock(driver.keys)
    assert driver.load() == [0, 1, 2, 3, 4, 5]
    # A load says nothing of its prompt: what was used, and one token more.
    assert within(10, lambda: usage(node) == (1, 6 * 256 + 1, 6 * 256)), usage(node)
    assert driver.load() == [0, 1, 2, 3, 4, 5]
    assert within(10, lambda: usage(node) == (2, 12 * 256 + 2, 12 * 256)), usage(node)
    # Objects of two ranks and of two groups hold parts of the same tokens.
    chunks = [os.urandom(32) for _ in range(2)]
    driver.keys = [ObjectKey(chunk, "org/model", rank, group) for chunk in chunks for rank in (0, 1) for group in (0, 1)]
    assert driver.store().is_successful() and driver.load() == list(range(8))
    assert within(10, lambda: usage(node) == (3, 14 * 256 + 3, 14 * 256)), usage(node)
    # Nothing is there: nothing is settled.
    driver.keys = [ObjectKey(os.urandom(32), "org/model", 0) for _ in range(8)]
    assert driver.load() == []
    driver.adapter.close()
    assert usage(node)[0] == 3


def test_the_same_through_shared_memory(tmp_path: pathlib.Path, drivers: list[Driver]) -> None:
    path = str(tmp_path / "s")
    node = Node(tmp_path / "local", "--codec", "raw", "--segment-mib", "16", "--local", path)
    try:
        driver = Driver(node, endpoint=f"unix:{path}")
        drivers.append(driver)
        assert driver.store().is_successful()
        assert driver.lookup() == driver.load() == list(range(8)) and driver.right(list(range(8)))
        assert driver.adapter._client._arena is not None
        node.restart()
        assert within(20, lambda: driver.load() == list(range(8))) and driver.right(list(range(8)))
    finally:
        node.kill()


def test_a_node_that_is_gone_gives_misses_and_is_reported(node: Node, drivers: list[Driver]) -> None:
    driver = Driver(node)
    drivers.append(driver)
    assert driver.store().is_successful()
    node.kill()
    assert driver.lookup() == [] and driver.load() == []
    assert not driver.store(0, 2).is_successful()
    assert not driver.adapter.report_status()["is_healthy"]
    node.start()
    assert within(20, lambda: len(driver.lookup()) == 8)
    assert driver.load() == list(range(8)) and driver.right(list(range(8)))
    assert driver.store(0, 2).is_successful() and driver.adapter.report_status()["is_healthy"]


def test_what_is_damaged_is_not_loaded(node: Node, drivers: list[Driver]) -> None:
    driver = Driver(node)
    drivers.append(driver)
    assert driver.store().is_successful()
    node.kill()
    needle = driver.stored.view(-1, SIZE)[3][1000:1064].numpy().tobytes()
    assert node.damage(needle) == 1
    node.start()
    within(20, lambda: len(driver.lookup()) >= 7)
    loaded = driver.load()
    assert loaded == [0, 1, 2, 4, 5, 6, 7] and driver.right(loaded)


#: LMCache's contract tests are written against its mock. These ask for what this adapter has not by intent: a mock's bandwidth,
#: and eviction by LMCache (the node evicts by itself: no capacity is announced and nothing is deleted by key).
NOT_OURS = "bandwidth or delete or TestEvictionInterface"

SWAP = '''
import itertools, os
from lmcache.v1.distributed.l2_adapters import mock_l2_adapter
from esker.connectors.lmcache import EskerL2Adapter

count = itertools.count()

class Swapped(EskerL2Adapter):
    """In the place of the mock: each with names of its own, since a mock begins empty."""

    def __init__(self, config, *rest, **more):
        super().__init__({"endpoint": os.environ["ESKER_ENDPOINT"], "weights_revision": f"test {next(count)}"})

mock_l2_adapter.MockL2Adapter = Swapped
'''


def test_under_lmcaches_own_contract_tests(node: Node, tmp_path: pathlib.Path) -> None:
    sources = pathlib.Path(os.environ.get("LMCACHE_SOURCES", ""))
    module = sources / "tests" / "v1" / "distributed" / "test_mock_l2_adapter.py"
    if not module.is_file():
        pytest.skip("LMCache's source distribution, which carries its tests, is not there (LMCACHE_SOURCES)")
    (tmp_path / "esker_swap.py").write_text(SWAP)
    copied = tmp_path / "test_contract.py"
    copied.write_text(module.read_text())
    environment = {**os.environ, "ESKER_ENDPOINT": node.address, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "esker_swap", "-k", f"not ({NOT_OURS})", str(copied)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    passed = int(run.stdout.rsplit(" passed", 1)[0].rsplit(" ", 1)[-1].split("\n")[-1])
    assert passed >= 29, "most of LMCache's contract tests ran"


def test_the_configuration_of_the_page_is_what_the_benchmark_runs(node: Node) -> None:
    command = [
        str(pathlib.Path(sys.executable).with_name("lmcache")),
        *("bench", "l2", "--l2-adapter", json.dumps(configuration(node.address))),
        *("--data-size-kb", "64", "--num-keys", "8", "--rounds", "2", "--no-skip-verify"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "All 8 keys data verified OK." in run.stdout + run.stderr, run.stdout[-2000:]
    assert "16/16" in run.stdout or "8/8" in run.stdout, run.stdout[-2000:]
