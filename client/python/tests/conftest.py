"""Fixtures of all tests of the package."""

from __future__ import annotations

import pathlib
import random
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from support import Node  # noqa: E402


@pytest.fixture
def node(tmp_path: pathlib.Path) -> Iterator[Node]:
    """A node without a model, that writes planes as they are so that tests can find and damage them."""
    node = Node(tmp_path / "data", "--codec", "raw", "--segment-mib", "16", "--capacity", "2GiB")
    yield node
    node.kill()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers; the seed is printed with a failure."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)
