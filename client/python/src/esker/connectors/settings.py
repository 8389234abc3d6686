"""What every connector can be told, from the dictionary that the engine passes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ..answers import Durability, Ttl
from ..client import Client
from ..credentials import Credentials

log = logging.getLogger("esker")

_TTLS = {"5m": Ttl.MINUTES_5, "1h": Ttl.HOUR_1, "24h": Ttl.HOURS_24, "72h": Ttl.HOURS_72, "": Ttl.DEFAULT}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a connector. Unknown keys are warned of, not refused: engines add their own."""

    endpoint: str = "127.0.0.1:7410"
    weights_revision: str = ""
    token: str = ""
    token_file: str = ""  # its content, where the token should not be in a command line
    ca: str = ""
    certificate: str = ""
    key: str = ""
    ttl: str = ""  # 5m, 1h, 24h, 72h; empty for the node's default
    durable: bool = True  # a chunk counts as stored when it is flushed
    lookup_timeout_s: float = 1.0
    transfer_timeout_s: float = 60.0
    max_pending_bytes: int = 1 << 30  # copies of chunks that wait to be stored; beyond it chunks are dropped
    threads: int = 4
    weights_fixed: bool = False  # the operator's word that weights never change in place: a reset of the cache is only that

    @classmethod
    def read(cls, given: Mapping[str, Any], engine_keys: frozenset[str] = frozenset()) -> "Settings":
        """Settings from the engine's dictionary; keys of the engine itself are passed over."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(key for key in given if key not in names and key not in engine_keys)
        if unknown:
            log.warning("esker: unknown settings %s; known are %s", unknown, sorted(names))
        settings = cls(**{key: value for key, value in given.items() if key in names})
        if settings.ttl not in _TTLS:
            raise ValueError(f"esker: ttl is one of 5m, 1h, 24h, 72h, got {settings.ttl!r}")
        return settings

    def client(self) -> Client:
        """A client of the node."""
        token = self.token
        if self.token_file:
            with open(self.token_file, encoding="utf-8") as file:
                token = file.read().strip()
        credentials = Credentials(token, self.ca or None, self.certificate or None, self.key or None)
        return Client(self.endpoint, credentials=credentials)

    def store_options(self) -> dict[str, Any]:
        """How chunks are kept."""
        return {
            "ttl": _TTLS[self.ttl],
            "durability": Durability.DURABLE if self.durable else Durability.BUFFERED,
            "lookup_timeout_s": self.lookup_timeout_s,
            "transfer_timeout_s": self.transfer_timeout_s,
        }
