from __future__ import annotations

from pathlib import Path

import pytest

from moteach.catalogue.cards import read_card
from moteach.catalogue.spec import ExpertSpec
from moteach.catalogue.urls import LOOPBACK, check_host, url_problem
from moteach.errors import ConfigError, ExpertCardError


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000", "http://localhost:8000/math", "https://teachers.example.org", "http://[::1]:8000"],
)
def test_addresses_of_servers_are_accepted(url: str) -> None:
    assert url_problem(url) is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("127.0.0.1:8000", "expected 'http://HOST:PORT'"),
        ("file:///etc/passwd", "expected 'http://HOST:PORT'"),
        ("http://", "expected 'http://HOST:PORT'"),
        ("http://host:99999", "out of range"),
        ("http://host:0", "expected 'http://HOST:PORT'"),
        ("http://user:secret@host:8000", "would be written to logs"),
        ("http://host:8000/?key=1", "leave out everything after the path"),
        ("http://host:8000#x", "leave out everything after the path"),
        ("http://ho st:8000", "expected 'http://HOST:PORT'"),
    ],
)
def test_other_addresses_are_refused_and_a_password_is_not_repeated(url: str, problem: str) -> None:
    said = url_problem(url)
    assert said is not None
    assert problem in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "url", ["http://example.org", "http://127.0.0.2:8000", "http://2130706433:8000", "http://localhost.example.org"]
)
def test_only_hosts_on_the_list_are_asked(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"expert 'math': expected a host among 127\.0\.0\.1.*teachers\.allowed_hosts="
    ):
        check_host(url, LOOPBACK, name="math")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://127.0.0.1:1", LOOPBACK),
        ("http://LOCALHOST:1", LOOPBACK),
        ("http://[::1]:1", LOOPBACK),
        ("https://teachers.example.org:8443/math", ("Teachers.example.org",)),
        ("http://[fd00::1]:1", ("[fd00::1]",)),
    ],
)
def test_hosts_on_the_list_are_asked_whatever_their_port(url: str, allowed: tuple[str, ...]) -> None:
    check_host(url, allowed, name="math")


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "metadata.google.internal", "0.0.0.0"]
)
def test_where_clouds_keep_credentials_is_never_asked(host: str) -> None:
    with pytest.raises(ConfigError, match="never asked"):
        check_host(f"http://{host}:80", (host,), name="math")


def card(folder: Path, text: str) -> Path:
    path = folder / "law.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_card_names_a_server_and_may_name_a_copy_of_what_it_serves(tmp_path: Path) -> None:
    spec = read_card(card(tmp_path, "url: http://127.0.0.1:8000\nserved_name: law-7b\ndomains: [law]\n"))
    assert spec == ExpertSpec(name="law", url="http://127.0.0.1:8000", served_name="law-7b", domains=["law"])
    assert spec.weights == "http://127.0.0.1:8000"
    (tmp_path / "weights").mkdir()
    both = read_card(card(tmp_path, "url: http://127.0.0.1:8000\nmodel: ./weights\n"))
    assert both.weights == str(tmp_path / "weights")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("served_name: x\n", r"law\.yaml:1: expected 'url:' beside 'served_name'"),
        ("model: o/m\nserved_name: x\n", r"law\.yaml:2: expected 'url:' beside 'served_name'"),
        ("url: ftp://host\n", r"law\.yaml:1: expected 'http://HOST:PORT'"),
        ("url: http://h:1\nadapter: o/a\nbase: o/b\n", r"law\.yaml:2: .*the server alone decides"),
        ("url: http://h:1\nrecipe: {output: out}\n", r"law\.yaml:2: .*the server alone decides"),
        ("url: http://h:1\nserved_name: ' '\n", r"law\.yaml:2: expected the name the server knows"),
        ("domains: [law]\n", r"or the 'url:' of a server, got none"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExpertCardError, match=message):
        read_card(card(tmp_path, text))
