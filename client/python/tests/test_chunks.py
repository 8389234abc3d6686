"""Chunks under an engine's keys: whatever happens to the node, the caller sees misses and never other bytes."""

from __future__ import annotations

import os
import pathlib
import shutil
import struct
import time

import pytest

import esker
from esker.chunks import MAX_PART_BYTES, ChunkStore
from esker.connectors.identity import NoRevision, identity, weights_revision
from support import Node, within


def store(node: Node, chunk_bytes: int = 10_000, weights: str = "one", **options: object) -> ChunkStore:
    client = esker.Client(node.address)
    return ChunkStore(client, identity("test", weights, "", {}), "test", chunk_bytes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_bytes", [1, 4096, 3_000_001, MAX_PART_BYTES + 12_345])
def test_chunks_of_any_size(node: Node, chunk_bytes: int) -> None:
    chunks = store(node, chunk_bytes)
    keys = [os.urandom(32) for _ in range(4)]
    data = {at: os.urandom(chunk_bytes) for at in range(3)}
    assert chunks.exists(keys) == [False] * 4
    assert chunks.put(keys, data) == {0: True, 1: True, 2: True}
    assert chunks.exists(keys) == [True, True, True, False]
    third = chunk_bytes // 3
    memory = {at: [bytearray(third), bytearray(chunk_bytes - third)] for at in range(4)}
    assert chunks.get(keys, memory) == {0: True, 1: True, 2: True, 3: False}
    assert all(b"".join(memory[at]) == data[at] for at in range(3))
    assert chunks.counters.loaded_bytes == 3 * chunk_bytes
    # Another process with the same facts finds them; one with other weights does not.
    assert store(node, chunk_bytes).exists(keys) == [True, True, True, False]
    assert store(node, chunk_bytes, "two").exists(keys) == [False] * 4


def test_chained_chunks_are_a_leading_run(node: Node) -> None:
    chunks = store(node, 5000, chained=True)
    keys = [os.urandom(32) for _ in range(6)]
    data = {at: os.urandom(5000) for at in range(6)}
    assert chunks.put(keys, {at: data[at] for at in (0, 1, 2)}) == {0: True, 1: True, 2: True}
    # One whose predecessor is missing has no place.
    assert chunks.put(keys, {4: data[4]}) == {4: False}
    assert chunks.exists(keys) == [True, True, True, False, False, False]
    memory = {2: bytearray(5000)}
    assert chunks.get(keys, memory) == {2: True} and memory[2] == data[2]
    assert chunks.put(keys, {3: data[3], 4: data[4]}) == {3: True, 4: True}


def test_the_first_writer_wins(node: Node) -> None:
    chunks = store(node, 1000)
    key = [os.urandom(32)]
    first = os.urandom(1000)
    assert chunks.put(key, {0: first})[0]
    assert chunks.put(key, {0: os.urandom(1000)})[0], "it is there: that is what the caller wants"
    memory = bytearray(1000)
    assert chunks.get(key, {0: memory})[0] and memory == first


def test_a_node_that_is_gone_costs_no_time_and_comes_back(node: Node) -> None:
    chunks = store(node, 1000)
    keys = [os.urandom(32)]
    data = os.urandom(1000)
    assert chunks.put(keys, {0: data})[0]
    node.kill()
    started = time.monotonic()
    for _ in range(100):
        assert chunks.exists(keys) == [False]
        assert chunks.get(keys, {0: bytearray(1000)}) == {0: False}
        assert chunks.put(keys, {0: data}) == {0: False}
    assert time.monotonic() - started < 10 and not chunks.healthy and chunks.counters.errors >= 300
    node.start()
    within(10, lambda: chunks.exists(keys) == [True])
    memory = bytearray(1000)
    assert chunks.get(keys, {0: memory})[0] and memory == data
    # A node that starts with nothing does not know the namespace: it is told.
    node.kill()
    shutil.rmtree(node.data)
    node.start()
    within(10, lambda: chunks.put(keys, {0: data})[0])
    assert chunks.exists(keys) == [True]


def test_damage_is_a_miss(node: Node) -> None:
    chunks = store(node, 20_000)
    keys = [os.urandom(32) for _ in range(3)]
    data = {at: os.urandom(20_000) for at in range(3)}
    assert all(chunks.put(keys, data).values())
    node.kill()
    assert node.damage(data[1][5000:5064]) == 1
    node.start()
    memory = {at: bytearray(20_000) for at in range(3)}
    loaded = within(10, lambda: (got := chunks.get(keys, memory))[0] and got)
    assert loaded == {0: True, 1: False, 2: True}
    assert memory[0] == data[0] and memory[2] == data[2]
    # And it can be stored again.
    assert within(10, lambda: chunks.put(keys, {1: data[1]})[1])
    assert chunks.get(keys, memory) == {0: True, 1: True, 2: True} and memory[1] == data[1]


def test_a_revision_is_demanded_and_follows_the_weights(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NoRevision, match="weights_revision"):
        weights_revision("", "org/model")
    assert weights_revision("mine", "org/model") == "configured:mine"
    assert weights_revision("", "org/model", "a" * 40) == f"commit:org/model@{'a' * 40}"

    def write(middle: bytes) -> str:
        header = b'{"a":{"dtype":"U8","shape":[9000],"data_offsets":[0,9000]}}'
        body = bytearray(9000)
        body[4500 : 4500 + len(middle)] = middle
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
        return weights_revision("", tmp_path)

    assert write(b"x") == write(b"x") != write(b"y")
