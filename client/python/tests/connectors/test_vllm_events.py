"""A node's KV events, as a follower of vLLM takes them: by ZeroMQ's own library and vLLM's own types."""

from __future__ import annotations

import pathlib
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import msgspec  # noqa: E402
import zmq  # noqa: E402
from vllm.distributed.kv_events import (  # noqa: E402
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

import esker  # noqa: E402
from layouts import DSA, blocks  # noqa: E402
from support import Node, binary  # noqa: E402

TOPIC = b"kv@one@model"
DECODER = msgspec.msgpack.Decoder(type=KVEventBatch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Followed(Node):
    """A node that publishes, and where."""

    def __init__(self, data: pathlib.Path) -> None:
        self.events = f"tcp://127.0.0.1:{free_port()}"
        self.replay = f"tcp://127.0.0.1:{free_port()}"
        flags = ["--kv-events", self.events, "--kv-events-replay", self.replay, "--kv-events-topic", TOPIC.decode()]
        super().__init__(data, "--segment-mib", "16", "--capacity", "2GiB", *flags)


@pytest.fixture
def followed(tmp_path: pathlib.Path) -> Iterator[Followed]:
    node = Followed(tmp_path / "data")
    yield node
    node.kill()


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def subscribe(context: zmq.Context, node: Followed) -> zmq.Socket:
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVTIMEO, 20_000)
    subscriber.setsockopt(zmq.HEARTBEAT_IVL, 200)
    subscriber.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1000)
    seen = subscriber.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    subscriber.connect(node.events)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
    assert seen.poll(20_000), "no handshake"
    subscriber.disable_monitor()
    # The subscription follows the handshake; nothing tells when it was heard.
    assert subscriber.poll(500) == 0
    return subscriber


def take(subscriber: zmq.Socket) -> tuple[int, Any]:
    topic, number, payload = subscriber.recv_multipart()
    assert topic == TOPIC
    batch = DECODER.decode(payload)
    assert batch.ts > 1.6e9 and batch.data_parallel_rank == 0
    (event,) = batch.events
    return int.from_bytes(number, "big"), event


def test_a_follower_of_vllm_follows_a_node(followed: Followed, context: zmq.Context) -> None:
    subscriber = subscribe(context, followed)
    tokens = list(range(3, 3 + 1000))
    with esker.Client(followed.address) as client:
        namespace = client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
        client.put(namespace, blocks(DSA, 7), tokens=tokens)
        hashes = client.lookup(namespace, tokens, want_hashes=True).hashes
        parent = None
        for at in range(7):
            number, event = take(subscriber)
            assert number == at and isinstance(event, BlockStored)
            assert event.block_hashes == [hashes[at]] and event.parent_block_hash == parent
            assert event.token_ids == tokens[at * 128 : (at + 1) * 128] and event.block_size == 128
            assert event.medium == "STORAGE" and event.locality == "LOCAL"
            parent = hashes[at]
        # A quiet connection stays: heartbeats are answered.
        assert subscriber.poll(2500) == 0
        client.put(namespace, blocks(DSA, 1), tokens=[9] * 128)
        number, event = take(subscriber)
        assert number == 7 and event.parent_block_hash is None


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.REQ])
def test_what_was_missed_is_asked_for(followed: Followed, context: zmq.Context, kind: int) -> None:
    with esker.Client(followed.address) as client:
        namespace = client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
        client.put(namespace, blocks(DSA, 7), tokens=list(range(1000)))
    asking = context.socket(kind)
    asking.setsockopt(zmq.RCVTIMEO, 20_000)
    asking.connect(followed.replay)
    start = (5).to_bytes(8, "big")
    if kind == zmq.REQ:
        # Which hears the first answer only, and does so without the empty frame.
        asking.send(start)
        topic, number, payload = asking.recv_multipart()
        assert (topic, int.from_bytes(number, "big")) == (TOPIC, 5)
        return
    asking.send_multipart((b"", start))
    numbers = []
    while True:
        empty, _, number, payload = asking.recv_multipart()
        assert empty == b""
        if number == ZmqEventPublisher.END_SEQ:
            break
        assert isinstance(DECODER.decode(payload).events[0], BlockStored)
        numbers.append(int.from_bytes(number, "big"))
    assert numbers == [5, 6]


def test_what_goes_is_told(followed: Followed, context: zmq.Context) -> None:
    subscriber = subscribe(context, followed)
    with esker.Client(followed.address) as client:
        namespace = client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
        client.put(namespace, blocks(DSA, 2), tokens=list(range(256)))
        stored = [take(subscriber)[1] for _ in range(2)]
        command = [str(binary()), "tenants", "--erase", "default", "--node", followed.address]
        subprocess.run(command, check=True, timeout=60)
        removed = [take(subscriber) for _ in range(2)]
        assert [number for number, _ in removed] == [2, 3]
        assert all(isinstance(event, BlockRemoved) and event.medium == "STORAGE" for _, event in removed)
        gone = {event.block_hashes[0] for _, event in removed}
        assert gone == {event.block_hashes[0] for event in stored}
        assert take(subscriber) == (4, AllBlocksCleared())
