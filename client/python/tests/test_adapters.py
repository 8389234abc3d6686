"""What an adapter computed is found by the same adapter alone, and nothing is named of one whose revision nobody knows."""

from __future__ import annotations

import pathlib
import struct
import types
from concurrent.futures import Future

import pytest

from esker.connectors.adapters import Adapters
from support import within

KEYS = [bytes([at]) * 32 for at in range(3)]


def lora(path: pathlib.Path | str, name: str = "poet", **more: object) -> types.SimpleNamespace:
    """What vLLM says of an adapter with each request."""
    return types.SimpleNamespace(lora_name=name, lora_path=str(path), **more)


def write(folder: pathlib.Path, weights: bytes = b"w", alpha: int = 16) -> pathlib.Path:
    """An adapter's files."""
    folder.mkdir(exist_ok=True)
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(weights), len(weights))
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights)
    (folder / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
    return folder


def names(adapter: types.SimpleNamespace | None, configured: str = "") -> list[bytes]:
    """As a new engine names them, once it knows how."""
    adapters = Adapters(configured)
    return within(10, lambda: adapters.names(adapter, KEYS))


def test_each_fact_of_an_adapter_gives_other_names(tmp_path: pathlib.Path) -> None:
    first = write(tmp_path / "a")
    different = [
        names(None),
        names(lora(first)),
        names(lora(first, name="other")),
        names(lora(first), "r1"),
        names(lora(first), "r2"),
        names(lora(write(tmp_path / "b", weights=b"v"))),
        names(lora(write(tmp_path / "c", alpha=32))),
    ]
    assert different[0] == KEYS
    assert all(len({tuple(named), *map(tuple, different)}) == len(different) for named in different)
    # Another engine, and the same files elsewhere: the same KV.
    assert names(lora(first)) == names(lora(write(tmp_path / "d"))) == different[1]


def test_nobody_waits_for_a_digest(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on: Future[str] = Future()
    monkeypatch.setattr("esker.connectors.adapters.files_digest", lambda files: goes_on.result(10))
    adapters = Adapters("")
    adapter = lora(write(tmp_path / "a"))
    assert adapters.names(adapter, KEYS) == [] and adapters.names(None, KEYS) == KEYS
    goes_on.set_result("digest")
    assert len(within(10, lambda: adapters.names(adapter, KEYS))) == 3


def test_of_an_unknown_revision_nothing_is_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "a")
    adapters = Adapters("")
    assert len(within(10, lambda: adapters.names(lora(folder), KEYS))) == 3
    # Whether the engine has loaded the new files or has the old ones is not known, also not when they are as before.
    before = (folder / "adapter_model.safetensors").read_bytes()
    write(folder, weights=b"vv")
    assert adapters.names(lora(folder), KEYS) == []
    (folder / "adapter_model.safetensors").write_bytes(before)
    assert adapters.names(lora(folder), KEYS) == []
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    for adapter in (lora("org/on-a-hub"), lora(tmp_path), lora(folder, load_inplace=True), lora(tmp_path / "broken")):
        other = Adapters("")
        for _ in range(2):
            assert other.names(adapter, KEYS) == []
        if str(tmp_path / "broken") == adapter.lora_path:
            within(10, lambda: other.names(adapter, KEYS) or "broken" in caplog.text)
        assert len(Adapters("r1").names(adapter, KEYS)) == 3, "the operator's word"
    assert caplog.text.count("adapter_revision") == 5, "once for each"
