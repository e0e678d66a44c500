"""Requests to the server: JSON over http on this machine, past every proxy that the environment names."""

from __future__ import annotations

import json
import random
import socket
import urllib.error
import urllib.request
from typing import Any

from trlpatch.errors import PortTaken, ServerFailed

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Addresses that a server listens on, with those at which it is reached from here."""


def address(host: str, port: int) -> str:
    """Return the URL at which a server that listens on `host` is reached from this machine, without a path."""
    host = ANYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


_UNASSIGNED = range(10_000, 20_000)
"""Ports that the kernel gives nobody: it has time to, vLLM's server listens a minute after its port was chosen.

Sockets that ask for any port, and outgoing connections, get theirs from 32768 up on Linux, 49152 elsewhere.
"""


def choose_port(host: str, port: int | None) -> int:
    """Return `port` if nobody listens there, a free one for None.

    Raises:
        PortTaken: somebody listens on the port, or this user may not, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = [port] if port else random.SystemRandom().sample(_UNASSIGNED, 50)
    for candidate in tried:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: a port whose last connections are still in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                probe.listen(1)
            except OSError as error:
                reason = error
            else:
                return candidate
    raise PortTaken(
        f"--host {host} --port {port}: cannot listen there: {reason.strerror or reason}. Give another --port, "
        "or none: a free one is chosen then"
    ) from reason


def status_of(url: str, *, timeout: float = 2.0) -> int | None:
    """Return the status that a GET of `url` is answered with, None without an answer."""
    try:
        with _opener.open(url, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def ask(url: str, body: dict[str, Any] | None = None, *, key: str | None = None, timeout: float = 300.0) -> Any:
    """Return the JSON that `url` answers to a GET, or with `body` to a POST.

    Raises:
        ServerFailed: no answer, another status than 200, or something that is not JSON.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with _opener.open(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        told = error.read(2000).decode(errors="replace")
        raise ServerFailed(f"{url} answered with status {error.code}: {told}") from error
    except (OSError, ValueError) as error:
        raise ServerFailed(f"{url} gave no answer: {error}") from error
