"""Every exception and warning of trlpatch.

Each message names what was being done, where, what was expected, what was found and the next command to run.
"""

from __future__ import annotations


class TrlpatchError(Exception):
    """Base class of everything trlpatch raises on purpose."""


class TrlNotFound(TrlpatchError):
    """No TRL package can be found where it was looked for."""


class UnparsableVersion(TrlpatchError):
    """TRL says a version that is not a PEP 440 version."""


class UnsupportedTrl(TrlpatchError):
    """TRL is older than 0.18.0, the first release with an in-process engine for GRPO."""


class UnknownAlgorithm(TrlpatchError, ValueError):
    """`algorithm=` names no trainer that can use vLLM in this TRL release."""


class UnknownPatch(TrlpatchError, ValueError):
    """`skip=` names a patch that does not exist."""


class InvalidOption(TrlpatchError, ValueError):
    """An option of `PatchFastRL` has a value outside its list."""


class PatchError(TrlpatchError):
    """Some patches do not fit; nothing was patched."""


class AnchorDrift(PatchError):
    """A required anchor matched another number of times than the patch declares for this release."""


class OutputCheckError(PatchError):
    """The patched text failed one of the checks that must hold before it may run."""


class UnknownTarget(TrlpatchError, ValueError):
    """A target named on the command line is not in the table, or not in this TRL release."""


class TrainerAlreadyBuilt(PatchError):
    """A trainer was built from stock TRL before patching; it would be half patched."""


class OptionsConflict(TrlpatchError, ValueError):
    """A second `PatchFastRL` call asks for another patched text than the one that runs."""


class TrlpatchWarning(UserWarning):
    """Base class of every warning of trlpatch."""


class AlreadyImported(TrlpatchWarning):
    """TRL modules were imported before patching and were patched in place."""


class CacheUnavailable(TrlpatchWarning):
    """The cache directory cannot be used; patched text is kept in memory for this run."""


class DumpUnavailable(TrlpatchWarning):
    """`TRLPATCH_DUMP` names a directory that cannot be written."""


class LeftStock(TrlpatchWarning):
    """Patches do not fit, and `on_drift="stock"` left their targets as TRL wrote them."""


class UntestedRelease(TrlpatchWarning):
    """TRL is newer than every release trlpatch was tested with; its anchors all matched."""


class PatchedTrainersAlive(TrlpatchWarning):
    """`unpatch()` was called while trainers built from patched TRL still exist."""


class EngineError(TrlpatchError):
    """Something about an in-process vLLM engine makes the request impossible."""


class NotAnEngine(EngineError, TypeError):
    """`attach_engine` was given something that is not an in-process `vllm.LLM`."""


class EngineMismatch(EngineError, ValueError):
    """The attached engine was built with settings that contradict the trainer's arguments."""


class EngineWithoutSleep(EngineError, ValueError):
    """Sleep was asked for, but the attached engine was built without `enable_sleep_mode=True`."""


class ArgsRequired(EngineError, ValueError):
    """The model carries an engine but the trainer got no `args`, so vLLM cannot be switched on for it."""


class AdapterNotExpressible(EngineError, ValueError):
    """vLLM cannot serve this adapter as a LoRA request, and `adapter="request"` forbids TRL's own full-weight sync."""


class StaleAdapter(EngineError, RuntimeError):
    """A rollout would have used weights that are not the policy's current ones."""


class ProtectedSamplingParam(TrlpatchError, ValueError):
    """`vllm_sampling_params` sets a value that TRL's own code relies on (`n`, `logprobs`, ...)."""


class UnusableSamplingParam(TrlpatchError, ValueError):
    """`vllm_sampling_params` holds something that is not a mapping of JSON-able sampling values."""


class ServerModeSamplingParams(TrlpatchError, ValueError):
    """`vllm_sampling_params` was given while TRL rolls out on a vLLM server, which never sees it."""


class CannotWrite(TrlpatchError):
    """A file that the command line was asked to write cannot be written."""


class DemoNeedsPackages(TrlpatchError):
    """`trlpatch demo` lacks packages of the `demo` extra."""
