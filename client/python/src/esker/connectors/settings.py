"""What every connector can be told, from the dictionary that the engine passes on."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..answers import Durability, Ttl
from ..client import Client
from ..credentials import Credentials

log = logging.getLogger("esker")

_TTLS = {"5m": Ttl.MINUTES_5, "1h": Ttl.HOUR_1, "24h": Ttl.HOURS_24, "72h": Ttl.HOURS_72, "": Ttl.DEFAULT}
MAX_TIMEOUT_S = 86_400
MAX_THREADS = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a connector. Unknown keys are warned of, not refused: engines add their own."""

    endpoint: str = "127.0.0.1:7410"
    weights_revision: str = ""
    adapter_revision: str = ""  # changes whenever an adapter (LoRA) does under its name
    model_facts: str = ""  # what else decides KV and was told to the engine by flags: rope, quantisation
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
        # An engine may hand on null for what was left out.
        settings = cls(**{key: value for key, value in given.items() if key in names and value is not None})
        settings._check()
        return settings

    def _check(self) -> None:
        """Types and ranges: JSON that is almost right must not become a setting that nobody meant."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be, is_right = _RULES.get(field.name) or _RULES_BY_TYPE[str(field.type)]
            if not is_right(value):
                got = "something else" if field.name == "token" else repr(value)
                raise ValueError(f"esker: the setting {field.name!r} is {may_be}, got {got}")

    def client(self) -> Client:
        """A client of the node."""
        for name in ("token_file", "ca", "certificate", "key"):
            if path := getattr(self, name):
                try:
                    open(path, "rb").close()
                except OSError as error:
                    raise ValueError(f"esker: the setting {name!r} names {path!r}, which cannot be read: {error}") from error
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


def _whole(value: Any, most: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_TIMEOUT_S


_Rule = tuple[str, Callable[[Any], bool]]
#: By the type of a field: what it may be, in words, and whether a value is that.
_RULES_BY_TYPE: dict[str, _Rule] = {
    "str": ("a string", lambda value: isinstance(value, str)),
    "bool": ("true or false, without quotes", lambda value: isinstance(value, bool)),
    "int": ("a whole number, 1 or more", _whole),
    "float": (f"a number of seconds above 0, at most {MAX_TIMEOUT_S}", _seconds),
}
#: Of the fields of which more is known.
_RULES: dict[str, _Rule] = {
    "endpoint": ("HOST:PORT or unix:PATH", lambda value: bool(re.fullmatch(r"unix:.+|.+:\d+", str(value)))),
    "ttl": ("one of 5m, 1h, 24h, 72h", lambda value: isinstance(value, str) and value in _TTLS),
    "threads": (f"a whole number from 1 to {MAX_THREADS}", lambda value: _whole(value, MAX_THREADS)),
}
