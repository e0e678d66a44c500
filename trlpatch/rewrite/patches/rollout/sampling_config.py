"""Give every vLLM trainer's config the field `vllm_sampling_params`.

The field goes into TRL's own dataclass, after its last field, so that names, `isinstance` checks, pickles and the
command line keep working. `__post_init__` turns whatever was given into a plain dict of the explicitly given values,
which is what JSON logging and `training_args.bin` see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import Insertion, before, calls_hook
from trlpatch.rewrite.outline import Outline
from trlpatch.rewrite.patch import Patch, variants

FIELDS = Anchor("last_field", hint=r"= field\(")
POST_INIT = Anchor("post_init", hint=r"def __\w+__\(")

_NAME = "vllm_sampling_params"
# HfArgumentParser takes a union with str as str: the command line gives JSON text.
_FIELD = f"""{_NAME}: dict | str | None = field(
    default=None,
    metadata={{
        "help": "Sampling parameters of rollouts on an in-process vLLM engine: a trlpatch.vLLMSamplingParams, dict or "
        "JSON text. A value given here wins over this config's own; what is not given stays as it is."
    }},
)
"""


def insertions(file: Outline, expected: Collection[Anchor]) -> Iterator[Insertion]:
    """Append the field and normalise its value at the head of `__post_init__`."""
    for listing in file.fields:
        if listing.last_name != _NAME:
            yield Insertion(FIELDS, listing.qualname, listing.last + 1, listing.indent, _FIELD)
    for function in file.functions:
        if function.name == "__post_init__" and not calls_hook(function.body[0], "normalize_sampling"):
            yield before(file, function, function.body[0], POST_INIT, "_trlpatch.normalize_sampling(self)")


_ONCE = {FIELDS: 1, POST_INIT: 1}

PATCH = Patch(
    name="sampling_config",
    summary="every vLLM trainer's config has the field vllm_sampling_params",
    hooks=("normalize_sampling",),
    inserter=insertions,
    after=("sampling",),
    variants=variants(
        {
            "grpo_config": {">=0.18": _ONCE},
            "rloo_config": {">=0.22": _ONCE},
            "online_dpo_config": {">=0.18": _ONCE},
            "gold_config": {">=0.25": _ONCE},
            "distillation_config": {">=1.1": _ONCE},
            "self_distillation_config": {">=1.0,<1.6": _ONCE},
            "sdpo_config": {">=1.6": _ONCE},
            "sdft_config": {">=1.6": _ONCE},
            "ssd_config": {">=1.2,<1.16": _ONCE},
            "iw_opd_config": {">=1.9": _ONCE},
        }
    ),
)
