"""Names of TRL's that hooks read and write: where a release has none of them, hooks would be talking to nobody.

`configure` sets fields of the config that the trainer has to have and to read; hooks find the engine and the mode at
the owner. All are asked for with `getattr`, because not every release has them all, so a renamed one would not fail.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator

from trlpatch.rewrite.census.uses import Use
from trlpatch.rewrite.outline import Outline
from trlpatch.source.releases import Release, ReleaseRange

_MODE = ("use_vllm", "vllm_mode")
_SERVER = ("vllm_server_host", "vllm_server_port", "vllm_tensor_parallel_size")
_URL = ("vllm_server_base_url",)
_SLEEP = ("vllm_enable_sleep_mode",)
_ALL = (*_MODE, *_SERVER, *_URL, *_SLEEP)

FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo_config": {
        ">=0.18": (*_MODE, *_SERVER, *_URL),
        ">=0.23": (*_SLEEP, "vllm_importance_sampling_correction"),
    },
    "rloo_config": {">=0.22": (*_MODE, *_SERVER, *_URL), ">=0.24": _SLEEP},
    "online_dpo_config": {">=0.18": ("use_vllm",), ">=0.23": (*_MODE, *_SERVER, *_URL), ">=0.28": _SLEEP},
    "gold_config": {">=0.25": (*_MODE, *_SERVER, *_SLEEP), ">=1.0": _URL},
    "distillation_config": {">=1.1": _ALL},
    "self_distillation_config": {">=1.0": _ALL},
    "sdpo_config": {">=1.6": _ALL},
    "sdft_config": {">=1.6": _ALL},
    "ssd_config": {">=1.2": _ALL},
    "iw_opd_config": {">=1.9": _ALL},
}
"""Per config: the fields that hooks read or write, and since when."""

READ: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {">=0.18": _MODE},
    "rloo": {">=0.22": _MODE},
    "online_dpo": {">=0.18": ("use_vllm",), ">=0.23": _MODE},
    "gold": {">=0.25": _MODE},
    "distillation": {">=1.1": _MODE},
    "self_distillation": {">=1.0": _MODE},
    "sdpo": {">=1.6": _MODE},
    "sdft": {">=1.6": _MODE},
    "ssd": {">=1.2": _MODE},
    "iw_opd": {">=1.9": _MODE},
}
"""Per trainer: the fields that it reads from `args`, after `configure` has set them there."""

_HELD = ("vllm_generation",)

SET: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {">=0.18,<0.28": ("llm", "vllm_mode"), ">=0.28": _HELD},
    "rloo": {">=0.22,<0.28": ("llm", "vllm_mode"), ">=0.28": _HELD},
    "online_dpo": {">=0.18": ("llm",), ">=0.23": ("vllm_mode",)},
    "gold": {">=0.25,<1.0": ("vllm_engine", "vllm_mode"), ">=1.0": _HELD},
    "distillation": {">=1.1": _HELD},
    "self_distillation": {">=1.0": _HELD},
    "sdpo": {">=1.6": _HELD},
    "sdft": {">=1.6": _HELD},
    "ssd": {">=1.2": _HELD},
    "iw_opd": {">=1.9": _HELD},
    "vllm_generation": {">=0.28": ("llm", "mode", "model")},
}
"""Per owner of an engine: the attributes that it sets on itself, and where hooks look for them."""


def lost_names(target: str, release: Release, classes: tuple[str, ...], file: Outline) -> Iterator[Use]:
    """Yield the names that hooks rely on and that the classes of a target lack in this release's text."""
    bodies = [node for node in file.tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    for table, names, what in (
        (FIELDS, _fields, "the config has no field `{}`"),
        (READ, _read, "the trainer no longer reads `args.{}`"),
        (SET, _set, "the class no longer sets `self.{}`"),
    ):
        wanted = [name for trl, some in table.get(target, {}).items() if release in ReleaseRange(trl) for name in some]
        found = names(bodies, file) if wanted else set()
        for name in dict.fromkeys(wanted):
            if name not in found:
                near = difflib.get_close_matches(name, sorted(found.difference(wanted)), n=1)
                renamed = f" (the nearest that is there: `{near[0]}`)" if near else ""
                yield Use(bodies[0].lineno if bodies else 1, f"{what.format(name)}, which hooks rely on{renamed}")


def _fields(bodies: list[ast.ClassDef], file: Outline) -> set[str]:
    annotated = (child for body in bodies for child in body.body if isinstance(child, ast.AnnAssign))
    return {child.target.id for child in annotated if isinstance(child.target, ast.Name)}


def _read(bodies: list[ast.ClassDef], file: Outline) -> set[str]:
    return {node.attr for node in _attributes(bodies, file, "args") if isinstance(node.ctx, ast.Load)}


def _set(bodies: list[ast.ClassDef], file: Outline) -> set[str]:
    return {node.attr for node in _attributes(bodies, file, "self") if isinstance(node.ctx, ast.Store)}


def _attributes(bodies: list[ast.ClassDef], file: Outline, owner: str) -> Iterator[ast.Attribute]:
    for node in file.parents.of(ast.Attribute):
        inside = any(body.lineno <= node.lineno <= (body.end_lineno or 0) for body in bodies)
        if inside and isinstance(node.value, ast.Name) and node.value.id == owner:
            yield node
