"""What the vLLM connector reports to vLLM's own logger."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats


@dataclasses.dataclass
class EskerStats(KVConnectorStats):
    """Sums since the last report."""

    def _add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.data[name] = self.data.get(name, 0) + amount

    def record_load(self, pages: int, size: int, seconds: float, failed: int) -> None:
        """A load ended."""
        self._add(loaded_pages=pages, loaded_bytes=size, load_seconds=seconds, failed_pages=failed)

    def record_save(self, pages: int, size: int, seconds: float) -> None:
        """A save ended."""
        self._add(saved_pages=pages, saved_bytes=size, save_seconds=seconds)

    def record_dropped(self, pages: int) -> None:
        """Pages for which there was no room."""
        self._add(dropped_pages=pages)

    def reset(self) -> None:
        """Starts over."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Takes another's sums in."""
        self._add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line."""
        names: dict[str, Any] = {f"esker {name.replace('_', ' ')}": round(value, 3) for name, value in self.data.items()}
        return names

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())
