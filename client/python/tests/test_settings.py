"""What a connector is told is what was meant, or it says at once what is wrong."""

from __future__ import annotations

import pathlib

import pytest

from esker.connectors.settings import Settings


def test_settings_are_read_as_they_were_written(tmp_path: pathlib.Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    given = {
        "endpoint": "unix:/run/esker.sock",
        "weights_revision": "r1",
        "ttl": "24h",
        "durable": False,
        "lookup_timeout_s": 2,
        "transfer_timeout_s": 0.5,
        "max_pending_bytes": 1 << 40,
        "threads": 256,
        "weights_fixed": True,
        "token_file": str(token),
        "ca": None,
        "of_the_engine": object(),
    }
    settings = Settings.read(given, frozenset({"of_the_engine"}))
    assert (settings.durable, settings.threads, settings.lookup_timeout_s, settings.ca) == (False, 256, 2, "")
    with settings.client() as client:
        assert client._credentials.token == "secret"
    assert Settings.read({}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "may_be"),
    [
        ("threads", "4", "a whole number from 1 to 256"),
        ("threads", 0, "a whole number from 1 to 256"),
        ("threads", 257, "a whole number from 1 to 256"),
        ("threads", 2.0, "a whole number from 1 to 256"),
        ("threads", True, "a whole number from 1 to 256"),
        ("max_pending_bytes", -1, "a whole number, 1 or more"),
        ("max_pending_bytes", "1 GiB", "a whole number, 1 or more"),
        ("lookup_timeout_s", "1", "a number of seconds"),
        ("lookup_timeout_s", 0, "a number of seconds"),
        ("transfer_timeout_s", float("nan"), "a number of seconds"),
        ("transfer_timeout_s", float("inf"), "a number of seconds"),
        ("transfer_timeout_s", True, "a number of seconds"),
        ("durable", "false", "true or false"),
        ("durable", 1, "true or false"),
        ("weights_fixed", "yes", "true or false"),
        ("weights_revision", 7, "a string"),
        ("token", ["t"], "a string"),
        ("endpoint", "localhost", "HOST:PORT or unix:PATH"),
        ("endpoint", "", "HOST:PORT or unix:PATH"),
        ("endpoint", 7410, "HOST:PORT or unix:PATH"),
        ("ttl", "1d", "one of 5m, 1h, 24h, 72h"),
        ("ttl", ["1h"], "one of 5m, 1h, 24h, 72h"),
    ],
)
def test_a_setting_that_is_not_what_it_may_be_is_named(name: str, value: object, may_be: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is {may_be}.*got"):
        Settings.read({name: value})


@pytest.mark.parametrize("name", ["token_file", "ca", "certificate", "key"])
def test_a_file_that_cannot_be_read_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' names '/nowhere/file', which cannot be read"):
        Settings.read({name: "/nowhere/file"}).client()
