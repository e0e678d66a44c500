"""Define `vLLMSamplingParams`: sampling parameters that remember which values were given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from trlpatch.errors import MissingPackage
from trlpatch.versions import vllm_missing

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

GIVEN = "_set_kwargs"


def vLLMSamplingParams(**kwargs: Any) -> SamplingParams:
    """A `vllm.SamplingParams` that remembers which values were given explicitly (attribute `_set_kwargs`).

    For `GRPOConfig(vllm_importance_sampling_correction=False, vllm_sampling_params=vLLMSamplingParams(min_p=0.1))`:
    only the given values replace TRL's. Copies and pickles remember them too. What changes the distribution (min_p,
    top_k, penalties, ...) needs that correction off, or an engine with raw log-probabilities: docs/sampling.md.

    Raises:
        TypeError: vLLM has no parameter of that name.
        MissingPackage: vLLM is not installed.
    """
    try:
        return _remembering(kwargs)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise MissingPackage(
            f"{vllm_missing('trlpatch: vLLMSamplingParams(...) makes a vllm.SamplingParams')}, or give "
            "vllm_sampling_params a dict, which needs no vLLM"
        ) from error


def _remembering(given: Mapping[str, Any]) -> Any:
    params = _remembering_class()(**given)
    setattr(params, GIVEN, dict(given))
    return params


@cache
def _remembering_class() -> type[Any]:
    """A subclass made when vLLM is first needed; msgspec structs allow no `__init__` to remember in."""
    from vllm.sampling_params import SamplingParams

    class RememberingSamplingParams(SamplingParams, dict=True):  # type: ignore[call-arg,misc]
        def __reduce__(self) -> tuple[object, ...]:
            return _remembering, (getattr(self, GIVEN),)

        def __copy__(self) -> Any:
            twin = super().__copy__()
            setattr(twin, GIVEN, dict(getattr(self, GIVEN)))
            return twin

        def __deepcopy__(self, memo: dict[int, object]) -> Any:
            # vLLM clones parameters after it has written derived values into them: keep every field.
            twin = _remembering(copy.deepcopy(getattr(self, GIVEN), memo))
            for name in self.__struct_fields__:
                value = getattr(self, name)
                setattr(twin, name, value if callable(value) else copy.deepcopy(value, memo))
            return twin

    return RememberingSamplingParams


def explicit_values(params: object) -> dict[str, Any] | None:
    """The given values of a (vLLM)SamplingParams; None when `params` is not one.

    A plain `SamplingParams` does not say which values were given: those that differ from vLLM's defaults are
    taken.
    """
    remembered = getattr(params, GIVEN, None)
    if isinstance(remembered, Mapping):
        return dict(remembered)
    fields = getattr(type(params), "__struct_fields__", None)
    if fields is None or not hasattr(params, "temperature"):
        return None
    # `__post_init__` derives values: compare with an instance that went through it as well.
    base = next(cls for cls in type(params).__mro__ if cls.__name__ == "SamplingParams")
    defaults = base()
    derived = {"output_text_buffer_length", "output_kind"}
    return {
        name: getattr(params, name)
        for name in fields
        if not name.startswith("_") and name not in derived and getattr(params, name) != getattr(defaults, name)
    }
