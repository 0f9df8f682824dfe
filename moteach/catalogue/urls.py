"""Addresses of servers: what one may look like, and which hosts may be asked.

An address comes from a card, which may be somebody else's file, and prompts and completions are sent to it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from moteach.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that may be asked when nothing else is said."""

_NEVER = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})


def url_problem(url: str) -> str | None:
    """Says what is wrong with the form of an address, or None."""
    expected = "expected 'http://HOST:PORT' or 'https://HOST:PORT' for 'url'"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{expected}, got '{url}' ({error})"
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        return (
            f"{expected}, got an address with a user or password; it would be written to logs and tables: set "
            "MOTEACH_TEACHER_API_KEY in the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"{expected}, got '{url}'"
    if parts.query or parts.fragment or any(character.isspace() or ord(character) < 32 for character in url):
        return f"{expected}, got '{url}'; leave out everything after the path"
    return None


def check_host(
    url: str, allowed_hosts: Sequence[str], *, name: str, role: str = "expert", keys: str = "teachers"
) -> None:
    """Checks that the host of an address is one of those a run may talk to, compared as text and without its port.

    Link-local addresses and the names of cloud metadata services are refused even when they are allowed.

    Raises:
        ConfigError: The address is malformed or its host is not allowed.
    """
    if problem := url_problem(url):
        raise ConfigError(f"{role} '{name}': {problem}")
    host = _host(urlsplit(url))
    if _forbidden(host):
        raise ConfigError(
            f"{role} '{name}': expected the host of an inference server, got '{host}', where machines of a cloud keep their "
            "credentials; it is never asked"
        )
    if host not in {allowed.lower().strip("[]") for allowed in allowed_hosts}:
        raise ConfigError(
            f"{role} '{name}': expected a host among {', '.join(allowed_hosts) or 'none'}, got '{host}'; prompts and "
            f"completions would be sent there. If that is meant: {keys}.allowed_hosts=[{','.join([*allowed_hosts, host])}]"
        )


def _host(parts: SplitResult) -> str:
    return str(parts.hostname).lower().rstrip(".")


def _forbidden(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host in _NEVER
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_link_local or mapped.is_unspecified or mapped.is_multicast)
