"""Which weights an adapter (LoRA) had when KV was computed with it.

An engine's keys name an adapter by its name and path, and neither changes when its weights do. So what an adapter computed has names
of its own, made from the engine's and the adapter's revision: the operator's word, or else a digest of its files.

Invariants:
- Nobody waits for a digest: until it is there, nothing of this adapter is looked up or stored.
- Files that change after the digest was begun leave the revision unknown until the engine is started again: nothing says which of
  the two the engine has loaded. So does an adapter that is loaded in place, or that is no folder of this host.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .identity import adapter_files, files_digest

log = logging.getLogger("esker")

#: Name, size and time of change of each file.
_Seen = list[tuple[str, int, int]]


class Adapters:
    """Revisions of the adapters of one engine."""

    def __init__(self, configured: str) -> None:
        self._configured = configured
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._known: dict[tuple[str, str], tuple[_Seen, Future[str]]] = {}
        self._warned: set[tuple[str, str]] = set()

    def names(self, adapter: Any, keys: Sequence[bytes]) -> list[bytes]:
        """The names of what this adapter (an engine's ``LoRARequest``, or None) computed under these keys; none if its revision is
        not known."""
        if adapter is None:
            return list(keys)
        revision = self._configured or self._of_files(adapter)
        if not revision:
            return []
        secret = hashlib.blake2b(f"{adapter.lora_name}\0{revision}".encode(), digest_size=32).digest()
        return [hashlib.blake2b(key, key=secret, digest_size=32).digest() for key in keys]

    def _of_files(self, adapter: Any) -> str:
        which = (adapter.lora_name, adapter.lora_path)
        try:
            if getattr(adapter, "load_inplace", False):
                raise ValueError("it is loaded in place")
            files = adapter_files(adapter.lora_path)
            seen = _seen(files)
            first_seen, digest = self._begin(which, seen, files)
            if seen != first_seen:
                raise ValueError("its files have changed since it was first used")
            return digest.result() if digest.done() else ""
        except Exception as error:  # noqa: BLE001: the engine's scheduler must never see one
            self._warn(which, error)
            return ""

    def _begin(self, which: tuple[str, str], seen: _Seen, files: list[pathlib.Path]) -> tuple[_Seen, Future[str]]:
        with self._lock:
            if which not in self._known:
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="esker-adapter")
                self._known[which] = (seen, self._thread.submit(files_digest, files))
            return self._known[which]

    def _warn(self, which: tuple[str, str], error: Exception) -> None:
        if which not in self._warned:
            self._warned.add(which)
            log.warning(
                "esker: nothing says which revision of adapter %r in %r this is (%s), so what it computes is neither loaded nor "
                "stored. Set `adapter_revision` to a string that changes whenever an adapter does",
                *which,
                error,
            )


def _seen(files: list[pathlib.Path]) -> _Seen:
    return [(file.name, about.st_size, about.st_mtime_ns) for file in files for about in [file.stat()]]
