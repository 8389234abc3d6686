"""Who wrote which bytes: the facts that connectors bind into their namespaces.

The keys of an engine name tokens; none of them names the *revision* of the weights. A fleet that rolls new weights under an old
name would be served KV of the old ones. So every connector needs a revision: the operator's own string, or a digest of the
weights' files, which reads the headers and three samples of every tensor; without either it refuses to start.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, Union

from ..chunks import Identity

#: Raise it when a connector's bytes change under the same facts.
FORMAT = 1

_SAMPLE_BYTES = 1024
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


class NoRevision(ValueError):
    """Nothing says which weights these are."""


def identity(engine: str, weights_revision: str, tokenizer: str, facts: Mapping[str, Any]) -> Identity:
    """The identity of these facts, as canonical JSON."""
    text = json.dumps({"engine": engine, "format": FORMAT, **facts}, sort_keys=True, separators=(",", ":"), default=str)
    return Identity(_digest("weights", weights_revision), _digest("tokenizer", tokenizer), text)


def weights_revision(configured: str | None, model: Union[str, pathlib.Path, None], revision: str | None = None) -> str:
    """The operator's word for the weights, or else a digest of the files in ``model``."""
    if configured:
        return f"configured:{configured}"
    if revision and _COMMIT.fullmatch(revision):
        return f"commit:{model}@{revision}"
    folder = pathlib.Path(model) if model else None
    if folder is not None and folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return "files:" + files_digest(files)
    raise NoRevision(
        f"esker: nothing says which revision of the weights of {str(model)!r} this is, and KV of other weights must never be "
        "loaded. Set `weights_revision` in the connector's configuration to a string that changes whenever the weights do, or "
        "name a folder with *.safetensors or a commit as the revision"
    )


def config_digest(model: Union[str, pathlib.Path, None]) -> str:
    """Digest of the model's own configuration, which says rope, quantisation and what else decides KV; empty without a folder."""
    file = pathlib.Path(model) / "config.json" if model else None
    return hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest() if file is not None and file.is_file() else ""


def tokenizer_digest(model: Union[str, pathlib.Path, None], fallback: str = "") -> str:
    """Digest of the tokenizer's files, or the fallback where there are none. Keys are made of tokens, so this is a second guard."""
    folder = pathlib.Path(model) if model else None
    hasher = hashlib.blake2b(digest_size=32)
    found = False
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if folder is not None and (folder / name).is_file():
            found = True
            hasher.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return hasher.hexdigest() if found else f"none:{fallback}"


def adapter_files(folder: str) -> list[pathlib.Path]:
    """The files of an adapter that decide KV. ``ValueError`` if this is no folder with weights that can be digested."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"there is no folder {folder!r} with *.safetensors")
    return [*files, *pathlib.Path(folder).glob("adapter_config.json")]


def files_digest(files: list[pathlib.Path]) -> str:
    """Digest of weights: headers and three samples of every tensor; other files as a whole."""
    hasher = hashlib.blake2b(digest_size=32)
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name}\0{size}\0".encode())
        if file.suffix != ".safetensors":
            hasher.update(file.read_bytes())
            continue
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = handle.read(min(length, size))
            hasher.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                first, end = tensor["data_offsets"]
                for start in (first, (first + end) // 2, max(first, end - _SAMPLE_BYTES)):
                    handle.seek(8 + length + start)
                    hasher.update(handle.read(min(_SAMPLE_BYTES, end - start)))
    return hasher.hexdigest()


def _digest(what: str, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=32, person=what.encode()[:16]).digest()
