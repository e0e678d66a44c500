"""llama.cpp's own server in this process, through xllamacpp.

Run as a file: `python xllamacpp_server.py MODEL HOST PORT NAME [--n_ctx 4096] [--sampling.temp 0.7] ...`. An option is
a field of `xllamacpp.CommonParams`, in its names or with dashes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any


def main(model: str, host: str, port: str, name: str, options: Sequence[str]) -> int:
    """Serve until a signal ends the process; return 2 where an option is none of xllamacpp's."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.hostnames = [host]
    parameters.port = int(port)
    parameters.model_alias = {name}
    parameters.use_jinja = True  # the model's own chat template, as transformers renders it
    try:
        for option, value in pairs(options):
            assign(parameters, option, value)
    except ValueError as error:
        sys.stderr.write(f"xllamacpp_server: error: {error}\n")
        return 2
    server = xllamacpp.Server(parameters)
    sys.stderr.write(f"listening on {server.listening_address}\n")
    signal.pause()
    return 0


def pairs(options: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, value) of `--name value`, `--name=value` and `--name`, which means "true".

    Raises:
        ValueError: a value without an option before it.
    """
    found: list[tuple[str, str]] = []
    waiting: str | None = None
    for word in options:
        if word.startswith("--"):
            if waiting is not None:
                found.append((waiting, "true"))
            name, equals, value = word[2:].partition("=")
            waiting = None if equals else name
            if equals:
                found.append((name, value))
        elif waiting is None:
            raise ValueError(f"{word!r} follows no option")
        else:
            found.append((waiting, word))
            waiting = None
    return [*found, (waiting, "true")] if waiting is not None else found


def assign(parameters: Any, option: str, value: str) -> None:
    """Set a field of `CommonParams`, `sampling.temp` for one of a part of it, to `value` in the type that it has.

    Raises:
        ValueError: there is no such field, or `value` is not of its type.
    """
    *parts, field = option.replace("-", "_").split(".")
    if field in ("api_key", "api_keys"):
        parameters.api_keys = value.split(",")
        return
    holder = parameters
    for part in parts:
        holder = getattr(holder, part, None)
    old = getattr(holder, field, None)
    if isinstance(old, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--{option} {value}: expected true or false")
        setattr(holder, field, value.lower() == "true")
    elif isinstance(old, (int, float, str)):
        try:
            setattr(holder, field, type(old)(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--{option} {value}: expected {type(old).__name__}") from error
    else:
        raise ValueError(f"--{option}: xllamacpp.CommonParams has no number, text or switch of that name")


if __name__ == "__main__":
    _model, _host, _port, _name, *_options = sys.argv[1:]
    sys.exit(main(_model, _host, _port, _name, _options))
