"""What a call can end with. A cache miss is not here: it is an answer.

Every exception is an :class:`EskerError` and says what to do. :attr:`EskerError.retry` tells whether the same call can succeed
later without a change of the request.
"""

from __future__ import annotations

from typing import Any

import grpc


class EskerError(Exception):
    """Base of all errors of this package."""

    #: Whether the same call may succeed later as it is.
    retry: bool = False


class ProtocolError(EskerError):
    """The node sent something that breaks the protocol: client and node are of versions that do not fit."""


class Unreachable(EskerError):
    """No node answers at the address, or it went away during the call."""

    retry = True


class DeadlineExceeded(EskerError):
    """The node did not answer in the time that the caller gave."""

    retry = True


class LimitReached(EskerError):
    """The node or the tenant is at a limit that the message names. Wait and try again, or have the limit raised."""

    retry = True


class InvalidRequest(EskerError):
    """The request breaks a rule that the message names."""


class NotFound(EskerError):
    """The namespace, grant, session or job that the request names is not known (any more)."""


class Unauthenticated(EskerError):
    """The node asks who calls: give ``token=`` or a client certificate."""


class ClientClosed(EskerError):
    """The client was closed before the call: open another one."""

    def __init__(self, address: str) -> None:
        super().__init__(f"{address}: this client is closed: open another one")


class Denied(EskerError):
    """The caller is known and may not do this."""


class Conflict(EskerError):
    """What the call builds on is not as it expects: other bytes are stored under the same name, a parent is missing, or the
    tenant was erased meanwhile. Look the prefix up again, put what is missing, and begin the call anew."""


class NotSupported(EskerError):
    """The node does not offer this call: it is older than this package, or runs without that part."""


class NodeFailed(EskerError):
    """The node failed at its side; its log says why."""


_BY_CODE: dict[Any, tuple[type[EskerError], str]] = {
    grpc.StatusCode.UNAVAILABLE: (Unreachable, "is `esker serve` running there, and is the address right?"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlineExceeded, "give a longer timeout, or ask for less at a time"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (LimitReached, "wait a moment and try again, or have the limit raised"),
    grpc.StatusCode.INVALID_ARGUMENT: (InvalidRequest, ""),
    grpc.StatusCode.OUT_OF_RANGE: (InvalidRequest, ""),
    grpc.StatusCode.NOT_FOUND: (NotFound, ""),
    grpc.StatusCode.UNAUTHENTICATED: (Unauthenticated, "give token=..., or a client certificate"),
    grpc.StatusCode.PERMISSION_DENIED: (Denied, "ask the operator for the role"),
    grpc.StatusCode.ABORTED: (Conflict, "look the prefix up again, put what is missing, and begin anew"),
    grpc.StatusCode.FAILED_PRECONDITION: (Conflict, ""),
    grpc.StatusCode.ALREADY_EXISTS: (Conflict, ""),
    grpc.StatusCode.UNIMPLEMENTED: (NotSupported, "upgrade the node, or start it with the part that offers this"),
}


def from_rpc(error: grpc.RpcError, address: str) -> EskerError:
    """The exception for what gRPC reports."""
    code = error.code() if callable(getattr(error, "code", None)) else None
    details = (error.details() if callable(getattr(error, "details", None)) else None) or str(error)
    kind, advice = _BY_CODE.get(code, (NodeFailed, "the node's log says why"))
    text = f"{address}: {details}"
    return kind(f"{text} ({advice})" if advice else text)
