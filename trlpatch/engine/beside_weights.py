"""Compare weights beside the adapter: are the engine's norms, embeddings, head and other layers the trainer's?

TRL builds its engine from `model.name_or_path`, and a model that was changed since bears that name. `base_weights`
compares layers that the adapter stands on; these are the others. An engine that a user attaches is compared by its
log-probabilities then (`same_model`).
"""

from __future__ import annotations

from trlpatch.engine import probes
from trlpatch.engine.backend import backend_of
from trlpatch.engine.base_weights import differs
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.same_model import vocabulary_of
from trlpatch.engine.sharing.names import EngineNames
from trlpatch.errors import CannotShare
from trlpatch.policy.adapter import LoraView
from trlpatch.policy.base_parameters import base_parameters
from trlpatch.policy.sharding import shape_of

_LEAVES = ("weight", "bias")
"""Others vLLM may keep as a function of what the checkpoint has (Mamba's A is -exp(A_log))."""


def beside_mismatch(view: LoraView, engine: RolloutEngine) -> str | None:
    """Compare each base parameter that no adapter stands on; the first that differs is the reason, None without one.

    What the engine has in another form (quantized, tensor-parallel, repacked by vLLM's CPU backend) is passed over,
    and all where its worker is in another process; the size of the vocabulary is known everywhere.
    """
    own, inside = vocabulary_of(view.base), probes.vocabulary_size(engine)
    if None not in (own, inside) and own != inside:
        return f"the model has a vocabulary of {own} tokens, the engine of {inside}"
    try:
        names = EngineNames(backend_of(engine).worker_model())
    except CannotShare:
        return None
    adapted = {path for path, _ in view.layers}
    for path, _, parameter in base_parameters(view.base):
        layer, _, leaf = path.rpartition(".")
        if layer in adapted or leaf not in _LEAVES or parameter.is_meta:
            continue
        try:
            weight = names.view(path, shape_of(parameter))
        except CannotShare:
            continue
        if differs(weight, [parameter]):
            return f"the engine's base weights are not the trainer's: {path!r} differs, which has no adapter"
    return None
