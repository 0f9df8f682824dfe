from __future__ import annotations

import pytest

from moteach.tracking.base import redact

HIDDEN = "<redacted>"


@pytest.mark.parametrize(
    "key",
    [
        "token", "hf_token", "HF_TOKEN", "auth.token", "api_key", "apikey", "openai-api-key", "api_keys", "secret",
        "client_secret", "secret_name", "password", "db_password", "passwd", "credentials", "access_key",
        "aws_access_key_id", "private_key", "auth", "key",
    ],
)  # fmt: skip
def test_values_under_a_secret_key_are_hidden(key: str) -> None:
    assert redact({key: "hunter2", "seed": 3}) == {key: HIDDEN, "seed": 3}


@pytest.mark.parametrize(
    "key",
    [
        "max_new_tokens", "token_weights", "num_tokens", "tokenizer", "chunk_size", "normalise", "prompt_tokens",
        "max_tokens_per_forward", "keys", "keyboard", "author", "monkey", "secretary", "token_mean",
    ],
)  # fmt: skip
def test_values_under_ordinary_keys_stay(key: str) -> None:
    for value in ("token_mean", 16, 0.5, None, True, {"entropy": 2.0}, ["a"]):
        assert redact({key: value}) == {key: value}


def test_numbers_are_hidden_too_but_switches_are_not() -> None:
    assert redact({"password": 123456, "token": None, "auth": True}) == {
        "password": HIDDEN,
        "token": None,
        "auth": True,
    }


def test_nested_secrets_are_hidden_wherever_they_are() -> None:
    config = {
        "teachers": [{"name": "math", "api_key": "sk-1"}, {"name": "code", "api_key": "sk-2"}],
        "credentials": {"user": "me", "more": ["x", {"deep": "y"}]},
        "tuple": ("plain", {"token": "t"}),
    }
    assert redact(config) == {
        "teachers": [{"name": "math", "api_key": HIDDEN}, {"name": "code", "api_key": HIDDEN}],
        "credentials": {"user": HIDDEN, "more": [HIDDEN, {"deep": HIDDEN}]},
        "tuple": ["plain", {"token": HIDDEN}],
    }


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host:8000/v1/models", "https://host:8000/v1/models"),
        ("https://me:pa,ss@host:8000/v1", "https://<redacted>@host:8000/v1"),
        ("http://token@host", "http://<redacted>@host"),
        ("https://host/v1?key=abc&x=1", "https://host/v1?<redacted>"),
        ("https://host/v1#access=abc", "https://host/v1?<redacted>"),
        ("http://a:b@one,http://c:d@two/x", "http://<redacted>@one,http://<redacted>@two/x"),
        ("see https://u:p@host/x for more", "see https://<redacted>@host/x for more"),
        ("hf://datasets/a/b@main", "hf://datasets/a/b@main"),
        ("me@example.org?", "me@example.org?"),
    ],
)
def test_urls_lose_their_user_and_their_query(url: str, shown: str) -> None:
    assert redact({"base_url": url}) == {"base_url": shown}
    assert redact({"urls": [url, url]}) == {"urls": [shown, shown]}


def test_the_original_is_not_touched() -> None:
    config = {"a": {"api_key": "sk"}, "b": ["https://u:p@h"]}
    redact(config)
    assert config == {"a": {"api_key": "sk"}, "b": ["https://u:p@h"]}
