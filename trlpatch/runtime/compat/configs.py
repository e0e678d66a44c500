"""Configs: keyword-only dataclass fields for arguments that are gone, and what becomes of their values.

They are fields, not mere keywords, so that `dataclasses.replace`, `HfArgumentParser`, `to_dict` and classes that are
made from the config later know them. Values are moved to the new fields before upstream's `__post_init__` reads those,
and the old fields are None again: what is saved or sent to other processes means the same without trlpatch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

from trlpatch.log import tell_translation
from trlpatch.options import read_launcher
from trlpatch.runtime.compat import correction
from trlpatch.runtime.compat.removed import TABLE, Removed, known
from trlpatch.runtime.compat.said import explain, say
from trlpatch.runtime.configs import generated_assignments, rebuild_on
from trlpatch.runtime.undo_journal import Assignment, UndoJournal

_FIELDS = "__dataclass_fields__"
_added: set[dataclasses.Field[Any]] = set()
"""Fields of ours; dataclasses that are made from others have the same objects."""

_GROUPED = ("GRPOConfig", "RLOOConfig")


def add_fields(journal: UndoJournal, owner: type, made_from_it: Sequence[type]) -> bool:
    """Give `owner` the fields in TABLE that it had and has no more, and all classes made from it; True if any."""
    had = [one for one in TABLE if owner.__name__ in one.owners and one.action != "explain"]
    new = [one for one in had if one.name not in vars(owner).get(_FIELDS, {}) and _has_target(owner, one)]
    if new:
        fields = _fields(new)
        journal.make(
            Assignment(cls, _FIELDS, {**fields, **vars(cls)[_FIELDS]}) for cls in made_from_it if _FIELDS in vars(cls)
        )
        annotations = {one.name: Optional[one.kind] for one in new}  # noqa: UP045 - HfArgumentParser reads it
        journal.make([Assignment(owner, "__annotations__", {**inspect.get_annotations(owner), **annotations})])
        # For objects that were made before, or are unpickled.
        journal.make(Assignment(owner, one.name, None) for one in new)
    if owner.__name__ == "TrainingArguments":
        journal.make([Assignment(owner, "__post_init__", _translating(journal, vars(owner)["__post_init__"]))])
    return bool(new)


def drop_fields(classes: Iterable[type]) -> None:
    """Generate anew what `@dataclass` generated for classes that were made while their bases had added fields."""
    for cls in classes:
        if not _added.isdisjoint(vars(cls).get(_FIELDS, {}).values()):
            for assignment in generated_assignments(cls, rebuild_on(cls, cls.__bases__)):
                assignment.make()


def wrap_init(journal: UndoJournal, cls: type, original: Any) -> None:
    """Make the `__init__` that `@dataclass` generated for `cls` take its added fields, and explain what it refuses."""
    if _FIELDS not in vars(cls):
        return
    signature = inspect.signature(original)
    table = known(cls)
    left_out = correction.remember(journal, cls, signature, original)
    added = [
        field for name, field in vars(cls)[_FIELDS].items() if field in _added and name not in signature.parameters
    ]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for field in () if journal.undone else added:
            if field.name in kwargs:
                setattr(self, field.name, kwargs.pop(field.name))
        if not journal.undone and left_out(args, kwargs):
            correction.mark(self)
        try:
            original(self, *args, **kwargs)
        except TypeError as error:
            # Raised by the call itself, not by anything inside.
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                met = [table[name] for name in kwargs if name in table and name not in signature.parameters]
                explain(error, cls.__name__, met, accepted=True)
            raise

    keywords = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=field.type)
        for field in added
    ]
    setattr(init, "__signature__", _with(signature, keywords))  # noqa: B010 - mypy: functions have none
    journal.make([Assignment(cls, "__init__", init)])


def _with(signature: inspect.Signature, keywords: Sequence[inspect.Parameter]) -> inspect.Signature:
    given = list(signature.parameters.values())
    rest = [one for one in given if one.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(one for one in given if one not in rest), *keywords, *rest])


def _has_target(owner: type, one: Removed) -> bool:
    return not one.to or one.to in vars(owner).get(_FIELDS, {})


def _fields(new: Iterable[Removed]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields as `@dataclass` makes them."""
    made = dataclasses.make_dataclass(
        "Removed",
        [
            (
                one.name,
                Optional[one.kind],  # noqa: UP045 - HfArgumentParser reads it
                dataclasses.field(
                    default=None, kw_only=True, metadata={"help": f"Gone since {one.since}; write {one.instead}."}
                ),
            )
            for one in new
        ],
    )
    fields: dict[str, dataclasses.Field[Any]] = vars(made)[_FIELDS]
    _added.update(fields.values())
    return fields


def _translating(journal: UndoJournal, post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(post_init)
    def translated_first(self: Any) -> None:
        if not journal.undone:
            translate(self)
            raise_batch_size(self)
        post_init(self)

    return translated_first


def translate(config: Any) -> None:
    """Move the values of fields that are gone to where upstream reads them now, and say so once."""
    for name, one in known(type(config)).items():
        value = getattr(config, name, None)
        if value is None or getattr(type(config), _FIELDS).get(name) not in _added:
            continue  # not given, or still upstream's own
        if one.action == "keep":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1, or None for no limit")
            say(type(config).__name__, one, "prompts are cut from the left to that many tokens")
            continue
        done = _SPECIAL[name](config, value) if one.action == "special" else _moved(config, one, value)
        setattr(config, name, None)
        say(type(config).__name__, one, done)


def _moved(config: Any, one: Removed, value: Any) -> str:
    if one.action == "drop" or (one.action == "switch" and not value):
        return "taken without effect"
    given = one.value if one.action == "switch" else value
    setattr(config, one.to, given)
    return f"{one.to}={given!r} is set"


def _warmup_ratio(config: Any, ratio: float) -> str:
    if not 0 <= ratio <= 1:
        raise ValueError(f"warmup_ratio={ratio!r}: expected a number from 0 to 1")
    if config.warmup_steps >= 1:
        return f"taken without effect, because warmup_steps={config.warmup_steps!r} wins"
    # 1.0 would be one step: below 1 it is a ratio of all steps, of which transformers takes the ceiling.
    config.warmup_steps = min(ratio, math.nextafter(1.0, 0.0))
    return f"warmup_steps={ratio!r} is set"


def _logging_dir(config: Any, directory: str) -> str:
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.fspath(directory)
    return f"TENSORBOARD_LOGGING_DIR={directory} is set in this process"


def _save_safetensors(config: Any, wanted: bool) -> str:
    if not wanted:
        raise ValueError("save_safetensors=False: transformers 5 writes safetensors only. Leave it out")
    return "taken without effect"


def _include_inputs(config: Any, wanted: bool) -> str:
    if wanted and "inputs" not in config.include_for_metrics:
        config.include_for_metrics = [*config.include_for_metrics, "inputs"]
    return f"include_for_metrics={config.include_for_metrics!r} is set"


_SPECIAL: dict[str, Callable[[Any, Any], str]] = {
    "warmup_ratio": _warmup_ratio,
    "logging_dir": _logging_dir,
    "save_safetensors": _save_safetensors,
    "include_inputs_for_metrics": _include_inputs,
}


def raise_batch_size(config: Any) -> None:
    """Set `per_device_train_batch_size` to `num_generations` where generation batches would cut groups, as Unsloth."""
    if not any(cls.__name__ in _GROUPED for cls in type(config).__mro__):
        return
    group, size = getattr(config, "num_generations", None), config.per_device_train_batch_size
    if not isinstance(group, int) or group < 2 or getattr(config, "generation_batch_size", None) is not None:
        return  # a generation batch that is given is what the user wants: upstream checks it
    steps = getattr(config, "steps_per_generation", None) or config.gradient_accumulation_steps
    # `config.world_size` initializes the device, which upstream does later.
    ranks = read_launcher("WORLD_SIZE", 1)
    if size * steps * ranks % group == 0:
        return
    config.per_device_train_batch_size = group
    tell_translation(
        f"{type(config).__name__}: per_device_train_batch_size={size} is raised to num_generations={group}, because "
        f"{size} x {steps} (gradient_accumulation_steps or steps_per_generation) x {ranks} (ranks) is no multiple of "
        "it. TRL raises an error instead; write a batch size with which it is one"
    )
