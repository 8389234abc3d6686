"""Who calls, and how the connection is protected."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Union

import grpc

Path = Union[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Credentials:
    """A bearer token, a client certificate, or both; PEM files.

    ``ca`` is the authority that signed the node's certificate; without any of the three files the connection is plain, which a
    node allows on loopback only.
    """

    token: str = ""
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def channel(self) -> grpc.ChannelCredentials | None:
        """Credentials of the connection; None for a plain one."""
        if not (self.ca or self.certificate or self.key):
            return None
        if bool(self.certificate) != bool(self.key):
            raise ValueError("a client certificate needs its key: give both certificate= and key=")
        read = [pathlib.Path(file).read_bytes() if file else None for file in (self.ca, self.key, self.certificate)]
        return grpc.ssl_channel_credentials(*read)

    def metadata(self) -> list[tuple[str, str]]:
        """Headers of each call."""
        return [("authorization", f"Bearer {self.token}")] if self.token else []
