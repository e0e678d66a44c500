"""What several commands share: exit statuses, options, JSON."""

from __future__ import annotations

import json
from typing import Any

import click

DRIFT = 1
BAD_INPUT = 2
KNOWN_BAD = 3
INTERRUPTED = 130

GREY = "bright_black"

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
skip_option = click.option("--skip", multiple=True, metavar="PATCH", help="Leave this patch out; repeatable.")


def print_json(value: Any) -> None:
    """Print `value` as JSON, indented."""
    click.echo(json.dumps(value, indent=2))
