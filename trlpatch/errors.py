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


class UnreadableSource(TrlpatchError):
    """A file of TRL cannot be read, or is not UTF-8: the installation is damaged."""


class NotOfTrlpatch(TrlpatchError, ImportError):
    """A name of Unsloth's that is imported from trlpatch and is not here; the message says what to do without it."""


class NoSuchAttribute(TrlpatchError, AttributeError):
    """As `NotOfTrlpatch`, where `trlpatch.NAME` is read and nothing imported; `hasattr` is False."""


class UnknownAlgorithm(TrlpatchError, ValueError):
    """`algorithm=` names no trainer that can use vLLM in this TRL, or one that is not where trlpatch knows it."""


class UnknownPatch(TrlpatchError, ValueError):
    """`skip=` names a patch that does not exist."""


class InvalidOption(TrlpatchError, ValueError):
    """An option of `PatchFastRL`, or an argument, has a value that it cannot have."""


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


class UnknownEngineUse(TrlpatchWarning):
    """A module of TRL's that trlpatch does not know uses an engine in a way that no patch knows."""


class UntestedRelease(TrlpatchWarning):
    """TRL is newer than every release trlpatch was tested with; the text says whether every patch fits."""


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
    """The model carries an engine, but the trainer got no `args`, or some without `use_vllm`."""


class AdapterNotExpressible(EngineError, ValueError):
    """The engine cannot get this adapter in the way that `adapter="request"` or `"merge"` asks for."""


class StaleAdapter(EngineError, RuntimeError):
    """A rollout would have used weights that are not the policy's current ones."""


class StaleOldLogps(TrlpatchError, RuntimeError):
    """`old_logps="reuse"` left out a pass, and the weights changed before its batch was trained on."""


class CannotShare(EngineError):
    """Trainer and engine cannot have these base weights in common, with the reason."""


class SharedWeights(EngineError, RuntimeError):
    """An operation would change or move base weights that trainer and engine have in common."""


class EngineAsleep(EngineError, RuntimeError):
    """A request was given to an engine whose memory is unmapped."""


class EngineBusy(EngineError, RuntimeError):
    """The engine was to sleep, or to get another adapter or other weights, while it works on requests."""


class ProtectedSamplingParam(TrlpatchError, ValueError):
    """`vllm_sampling_params` sets a value that TRL's own code relies on (`n`, `logprobs`, ...)."""


class PromptTooLong(TrlpatchError, ValueError):
    """With `compat="on"`: a prompt with images is longer than `max_prompt_length`, and cannot be cut."""


class UnusableSamplingParam(TrlpatchError, ValueError):
    """`vllm_sampling_params` holds something that is not a mapping of JSON-able sampling values."""


class ServerModeSamplingParams(TrlpatchError, ValueError):
    """`vllm_sampling_params` was given while TRL rolls out on a vLLM server, which never sees it."""


class CannotWrite(TrlpatchError):
    """A file that the command line was asked to write cannot be written."""


class DemoNeedsPackages(TrlpatchError):
    """`trlpatch demo` lacks packages of the `demo` extra."""


class NotEnoughMemory(EngineError, MemoryError):
    """The engine, or the model beside it, needs more device memory than is free."""


class EngineBuildFailed(EngineError, RuntimeError):
    """vLLM could not build the engine; what it had begun was taken down again."""


class LoraNotSupported(EngineError, ValueError):
    """vLLM has no LoRA for this architecture."""


class RankAboveEngine(EngineError, ValueError):
    """The adapter's rank is above the rank that the engine's LoRA buffers were built for."""


class UnknownArgument(TrlpatchError, TypeError):
    """An argument that neither trlpatch nor the installed vLLM and transformers know."""


class ConflictingArguments(TrlpatchError, ValueError):
    """Two arguments of `FastLanguageModel` that exclude each other, or a value that this machine cannot follow."""


class MissingPackage(TrlpatchError, ImportError):
    """`FastLanguageModel`, an export or a server needs a package that is not installed (vLLM, bitsandbytes, ...)."""


class CudaRequired(TrlpatchError, RuntimeError):
    """What was asked for needs a CUDA device, and there is none."""


class Fp8NeedsEngine(TrlpatchError, NotImplementedError):
    """`load_in_fp8` quantizes the engine's weights, and `fast_inference=False` builds no engine."""


class ModelNotFound(TrlpatchError, OSError):
    """`model_name` is neither a directory with a model nor a model that the hub or its cache can give."""


class VllmStyleArguments(TrlpatchError, TypeError):
    """`fast_generate` of a model without an engine was called in the way of vLLM's `generate`."""


class RolloutFuncIgnored(EngineError, ValueError):
    """TRL 0.25 would not call this `rollout_func`: it does so in server mode only, and an engine is attached."""


class CannotExport(TrlpatchError, ValueError):
    """The model, checkpoint or adapter cannot be exported as asked, with the reason; nothing was written."""


class ExportMismatch(TrlpatchError, RuntimeError):
    """What was written is not what was to be written; it was removed again."""


class NotServable(TrlpatchError, ValueError):
    """What `trlpatch serve` was given is nothing, or several things, or nothing that a server here can load."""


class PortTaken(TrlpatchError, OSError):
    """The server was to listen on a port that it cannot have."""


class ServerFailed(TrlpatchError, RuntimeError):
    """A server ended, did not answer in time, or answered with an error."""


class RayError(EngineError):
    """Something about rollout engines on Ray actors makes the request impossible."""


class RayNotInstalled(RayError, ImportError):
    """Engines on Ray actors were asked for, and Ray is not installed."""


class NotEnoughResources(RayError, RuntimeError):
    """The Ray cluster has not the GPUs or CPUs that the engines need."""


class ClusterTimeout(RayError, TimeoutError):
    """Ray did not start, answer or end in the time that it had: its GCS hangs, or cannot be reached."""


class EngineInitFailed(RayError, RuntimeError):
    """A rollout engine did not come up in its Ray actor, or not in time."""


class EngineLost(RayError, RuntimeError):
    """A rollout engine answers no request any more: it died, or an update of its weights failed half-way."""


class RolloutTimeout(RayError, TimeoutError):
    """A Ray actor did not answer in the time that it had."""


class WrongVersion(RayError, RuntimeError):
    """A response was sampled with another version of adapter or weights than was asked for."""


class EngineHung(EngineLost):
    """A rollout engine has requests and ends no step, or its actor answers nothing; it was killed."""


class EngineRaised(RayError):
    """An engine's actor raised an exception that cannot be pickled; the text is what is left of it."""


class NoEngineLeft(RayError, RuntimeError):
    """Every rollout engine is lost, and none could be replaced."""


class RolloutFailed(RayError, RuntimeError):
    """Prompts were given to two rollout engines, one after the other, and both were lost.

    Attributes:
        first: the error of the engine that was asked first.
        second: the error of the engine that was asked again; it also is the `__cause__`.
    """

    def __init__(self, message: str, first: BaseException, second: BaseException) -> None:
        super().__init__(message)
        self.first = first
        self.second = second
        self.__cause__ = second

    def __reduce__(self) -> tuple[type[RolloutFailed], tuple[str, BaseException, BaseException]]:
        return type(self), (str(self), self.first, self.second)


class AsyncNotSupported(RayError, ValueError):
    """AsyncGRPOTrainer cannot roll out on Ray engines as asked, with the reason; nothing was set up."""


class RolloutWorkerFailed(RayError, RuntimeError):
    """The worker that makes rollouts beside training ended with an error, or makes no progress."""


class PrefetchNotSupported(RayError, ValueError):
    """Rollouts cannot be made one batch ahead for this trainer, with the reason."""


class InvalidSetting(TrlpatchError, ValueError):
    """`trlpatch scale` or a calibration is asked about a setting that cannot be."""

    def __init__(self, name: str, found: object, expected: str) -> None:
        self.name, self.found, self.expected = name, found, expected
        super().__init__(f"{name}: expected {expected}; found {found!r}")

    def __reduce__(self) -> tuple[type[InvalidSetting], tuple[str, object, str]]:
        return type(self), (self.name, self.found, self.expected)


class CalibrationError(TrlpatchError, ValueError):
    """A calibration file cannot be read, or is not of the form of trlpatch/scale/calibration.json."""

    def __init__(self, path: object, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"calibration {path} {reason}; its form is that of trlpatch/scale/calibration.json")

    def __reduce__(self) -> tuple[type[CalibrationError], tuple[object, str]]:
        return type(self), (self.path, self.reason)


class WeightsRefused(RayError, ValueError):
    """A rollout engine can take no full weights, with the reason; it has those that it had."""
