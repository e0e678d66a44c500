"""F: config dataclasses edited. C: a field renamed everywhere."""

from __future__ import annotations

import ast
import re

from tests.mutation.hosts import Host, config_hosts, indented, read, tree_of
from tests.mutation.mutants import kind


def _fields(host: Host) -> list[ast.AnnAssign]:
    assert host.class_node is not None
    return [node for node in host.class_node.body if isinstance(node, ast.AnnAssign)]


def _post_init(host: Host) -> ast.FunctionDef | None:
    return host.method("__post_init__")


def _edited(name: str, why: str, code: str, *, first: bool = False) -> None:
    def edit(host: Host) -> str:
        place = _fields(host)[0] if first else _fields(host)[-1]
        return host.before(place, code) if first else host.after(place, code)

    edit.__doc__ = why
    kind("F", config_hosts, name=name)(edit)


_edited("field_at_the_end", "A field at the end.", 'new: int = field(default=0, metadata={"help": "New."})')
_edited("plain_field_at_the_end", "A field without field().", "new: int = 0")
_edited("field_with_a_factory", "A field with a factory.", "new: list = field(default_factory=list)")
_edited(
    "multiline_field",
    "A field over many lines.",
    "new: int = field(\n    default=0,\n    metadata={\n        'help': 'x'\n    },\n)",
)
_edited("field_in_front", "A field in front.", "new: int = 0", first=True)
_edited("class_variable", "A class variable after the fields.", 'NAMES = ("a", "b")')
_edited("method_after_fields", "A method between the fields and `__post_init__`.", "\ndef new(self):\n    return 0\n")
_edited("property_after_fields", "A property.", "\n@property\ndef new(self):\n    return 0\n")
_edited("comment_after_fields", "A comment.", "# deprecated: nothing")
_edited("field_under_if", "A field under a condition.", "if True:\n    new: int = 0")
_edited(
    "same_field_of_trls_own",
    "TRL brings a field of this name.",
    "vllm_sampling_params: dict | None = field(default=None)",
)


@kind("F", config_hosts)
def decorator_with_arguments(host: Host) -> str:
    """The dataclass becomes keyword-only."""
    return host.text.replace("@dataclass\n", "@dataclass(kw_only=True)\n")


@kind("F", config_hosts)
def last_field_removed(host: Host) -> str:
    """The last field is gone."""
    return host.edit((host.lines(_fields(host)[-1]), ""))


@kind("F", config_hosts)
def fields_sorted(host: Host) -> str:
    """The last field moves to the front."""
    fields = _fields(host)
    span, (first, _) = host.lines(fields[-1]), host.lines(fields[0])
    return host.edit((span, ""), ((first, first), host.text[span[0] : span[1]]))


@kind("F", config_hosts)
def class_renamed(host: Host) -> str:
    """The config class gets another name."""
    return re.sub(rf"\b{host.cls}\b", f"{host.cls}V2", host.text)


@kind("F", config_hosts)
def shared_base_class(host: Host) -> str:
    """The fields move to a base class of the same file."""
    assert host.class_node is not None
    return host.text.rstrip().replace(f"class {host.cls}(", f"class _{host.cls}Base(", 1) + (
        f"\n\n\n@dataclass\nclass {host.cls}(_{host.cls}Base):\n    pass\n"
    )


@kind("F", config_hosts)
def post_init_removed(host: Host) -> str | None:
    """There is no `__post_init__` any more."""
    method = _post_init(host)
    return None if method is None else host.edit((host.lines(method), ""))


@kind("F", config_hosts)
def post_init_decorated(host: Host) -> str | None:
    """`__post_init__` gets a decorator."""
    method = _post_init(host)
    return None if method is None else host.before(method, "@(lambda function: function)")


@kind("F", config_hosts)
def post_init_with_docstring(host: Host) -> str | None:
    """`__post_init__` gets a docstring."""
    method = _post_init(host)
    return None if method is None else host.before(method.body[0], '"""Check the arguments."""')


@kind("F", config_hosts)
def post_init_in_a_condition(host: Host) -> str | None:
    """`__post_init__` stands under a condition."""
    method = _post_init(host)
    if method is None:
        return None
    start, end = host.lines(method)
    return host.edit(((start, end), indented("if True:", 4) + indented(host.text[start:end], 8)))


@kind("F", config_hosts)
def post_init_split(host: Host) -> str | None:
    """`__post_init__` calls a method that checks."""
    method = _post_init(host)
    if method is None:
        return None
    return host.before(method.body[0], "self._check()") + indented("\n\ndef _check(self):\n    return None", 4)


@kind("F", config_hosts)
def default_changed(host: Host) -> str:
    """`vllm_mode` has another default."""
    return host.text.replace('default="server"', 'default="colocate"').replace(
        "use_vllm: bool = field(\n        default=False", "use_vllm: bool = field(\n        default=True"
    )


def _renamed(old: str, new: str) -> None:
    def rename(host: Host) -> dict[str, str | None] | None:
        if not any(isinstance(f.target, ast.Name) and f.target.id == old for f in _fields(host)):
            return None
        touched = [host.path, host.path.replace("_config.py", "_trainer.py")]
        texts = {path: read(host.release, path) for path in touched if (tree_of(host.release) / path).is_file()}
        return {path: re.sub(rf"\b{old}\b", new, text) for path, text in texts.items()}

    rename.__doc__ = f"`{old}` becomes `{new}` in the config and its trainer."
    kind("C", config_hosts, former_survivor=True, name=f"{old}_renamed")(rename)


_renamed("use_vllm", "use_fast_generation")
_renamed("vllm_mode", "vllm_placement")
_renamed("vllm_enable_sleep_mode", "vllm_sleep")
