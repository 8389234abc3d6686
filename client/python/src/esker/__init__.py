"""Esker: a persistent prefix cache for LLM inference. This package is its client.

    import esker

    with esker.Client("127.0.0.1:7410") as client:
        namespace = client.register_namespace(weights=..., tokenizer=..., layout=layout)
        found = client.lookup(namespace, tokens)
        if found.tokens:
            client.fetch(namespace, found.grant, into=memory)

:class:`Client` blocks, :class:`AsyncClient` is awaited; both have the same calls. Connectors for engines are in
:mod:`esker.connectors`.
"""

from .aio import AsyncClient
from .answers import (
    Completion,
    Description,
    Durability,
    Fetched,
    Found,
    GroupBy,
    Miss,
    Missing,
    Namespace,
    Order,
    Outcome,
    Put,
    ResumePoint,
    Scope,
    Session,
    Settled,
    Status,
    Ttl,
    UsageRow,
    WarmupJob,
    WarmupState,
    WriteTokens,
)
from .calls import Object, Question
from .client import Client
from .credentials import Credentials
from .errors import (
    ClientClosed,
    Conflict,
    DeadlineExceeded,
    Denied,
    EskerError,
    InvalidRequest,
    LimitReached,
    NodeFailed,
    NotFound,
    NotSupported,
    ProtocolError,
    Unauthenticated,
    Unreachable,
)
from .layout import Dtype, Field, Group, Kind, Layout, Plane

__all__ = [
    "AsyncClient",
    "Client",
    "ClientClosed",
    "Completion",
    "Conflict",
    "Credentials",
    "DeadlineExceeded",
    "Denied",
    "Description",
    "Dtype",
    "Durability",
    "EskerError",
    "Fetched",
    "Field",
    "Found",
    "Group",
    "GroupBy",
    "InvalidRequest",
    "Kind",
    "Layout",
    "LimitReached",
    "Miss",
    "Missing",
    "Namespace",
    "NodeFailed",
    "NotFound",
    "NotSupported",
    "Object",
    "Order",
    "Outcome",
    "Plane",
    "ProtocolError",
    "Put",
    "Question",
    "ResumePoint",
    "Scope",
    "Session",
    "Settled",
    "Status",
    "Ttl",
    "Unauthenticated",
    "Unreachable",
    "UsageRow",
    "WarmupJob",
    "WarmupState",
    "WriteTokens",
]
__version__ = "0.1.0"
