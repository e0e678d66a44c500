"""Names that notebooks for Unsloth import and that are not here: what to do without each."""

from __future__ import annotations

from trlpatch.errors import NoSuchAttribute, NotOfTrlpatch

_CODE = "is for rewards that run generated code: take `multiprocessing` with a timeout, in a sandbox of your own"
_OPENENV = "is for starting an OpenEnv server: start it yourself and drive the engine in a `rollout_func`"

_PREFERENCES = "patches a trainer that does not roll out, and needs no patch here: leave the call out"

INSTEAD = {
    "PatchDPOTrainer": _PREFERENCES,
    "PatchKTOTrainer": _PREFERENCES,
    "unsloth_train": "works around gradient accumulation of an old transformers: call trainer.train()",
    "UnslothVisionDataCollator": "collates images for SFTTrainer, which does so itself from TRL 0.22 on, and so do "
    "GRPOTrainer and RLOOTrainer: leave data_collator= out",
    "UnslothTrainer": "is SFTTrainer with learning rates of its own for embeddings: take trl.SFTTrainer",
    "UnslothTrainingArguments": "is SFTConfig with `embedding_learning_rate`: take trl.SFTConfig",
    "execute_with_time_limit": _CODE,
    "check_python_modules": _CODE,
    "create_locked_down_function": _CODE,
    "launch_openenv": _OPENENV,
    "is_port_open": _OPENENV,
}
"""By name, what follows "NAME of Unsloth "."""


def refusal(name: str, *, importing: bool) -> ImportError | AttributeError:
    """Return the error for a name that trlpatch has not; of one of INSTEAD it says what to do without it.

    Args:
        importing: `from trlpatch import name` asks, else getattr() or hasattr().
    """
    module = __package__
    if name not in INSTEAD:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    words = (
        f"{name} of Unsloth {INSTEAD[name]}. trlpatch has what loads, rolls out and saves; "
        "docs/coming-from-unsloth.md lists the names that are the same"
    )
    if importing:
        return NotOfTrlpatch(f"importing {name} from {module}: {words}", name=module)
    return NoSuchAttribute(f"module {module!r} has no attribute {name!r}: {words}")
