"""Compare an export with what it was made from, before it takes its name.

Every tensor is read back from the files: of a plain LoRA layer some rows are computed again, in float64 from the
weights of base and adapter; what PEFT merged is merged again and compared as a whole; of the others some rows. Small
models are loaded with transformers as well, and log-probabilities compared with those of base and adapter in float32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import ExportMismatch
from trlpatch.export.base import BaseTensor, CheckpointFiles
from trlpatch.export.places import adapter_tensors
from trlpatch.export.skeleton import empty_model, inject, model_class
from trlpatch.export.source import ExportSource, ExportTensor
from trlpatch.policy.adapter import base_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOGPS_BYTES = 1 << 30
"""Models of up to this many bytes in float32 are loaded and compared by their log-probabilities."""
_ROWS = 8
_PROMPT = 24
LOGPS_BOUND = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""Of the spread of the log-probabilities. On small random models f16 is off by 0.001 of it and bf16 by 0.004."""


def verify_export(
    source: ExportSource,
    directory: Path,
    dtype: torch.dtype,
    *,
    logps: bool | None,
    progress: Callable[[str, int, int], Any] = lambda what, done, of: None,
) -> str:
    """Compare, and say what was compared. `logps`: None where the model is small.

    Raises:
        ExportMismatch: the first difference beyond the rounding.
    """
    written = CheckpointFiles(directory).tensors
    _compare_names(source, written, directory)
    total = sum(one.elements for one in source.tensors)
    done = 0
    for one in source.tensors:
        _compare_tensor(one, written[one.name], dtype)
        done += one.elements
        progress("comparing tensors", done, total)
    said = f"{len(source.tensors)} tensors, read back"
    if logps or (logps is None and source.parameters * 4 <= LOGPS_BYTES):
        progress("comparing log-probabilities", 0, 1)
        worst, spread = _compare_logps(source, directory, dtype)
        said += f"; log-probabilities of {_PROMPT} tokens differ by {worst:.2g} of {spread:.3g} from float32"
    return said


def _compare_names(source: ExportSource, written: dict[str, BaseTensor], directory: Path) -> None:
    names = {one.name for one in source.tensors}
    if names != set(written):
        odd = sorted(names ^ set(written))[0]
        raise ExportMismatch(
            f"exporting {source.where}: {odd!r} is {'not ' if odd in names else ''}in the files that were written"
        )
    if source.adapter is None:  # the checkpoint's own names, whatever they are
        return
    model = empty_model(source.config, trust_remote_code=source.trust_remote_code)
    groups: dict[int, list[str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(one), []).append(name)
    expected = {name for group in groups.values() for name in group}
    if any(one.part is not None for one in source.tensors) or not names & expected:
        return  # transformers changes the names while it loads
    missing = next((group for group in groups.values() if not names & set(group)), None)
    if missing is not None and names <= expected | {name for name, _ in model.named_buffers()}:
        raise ExportMismatch(
            f"exporting {source.where}: {type(model).__name__} of the written config.json needs {missing[0]!r}, which "
            "is not in the files that were written"
        )


def _compare_tensor(one: ExportTensor, written: BaseTensor, dtype: torch.dtype) -> None:
    if (written.shape, written.dtype) != (one.shape, one.dtype_in(dtype)):
        raise ExportMismatch(
            f"{one.name!r}: expected {one.shape} in {one.dtype_in(dtype)}, found {written.shape} in {written.dtype}"
        )
    if not one.elements:
        return
    rows = one.shape[0] if one.shape else 1
    if one.part is not None or (one.site is not None and one.site.kind != "lora"):
        _require_close(one.name, written.whole(), one.read(), 0)
        return
    step = max(1, rows // _ROWS)
    start = max(0, min(rows - 1, rows - (rows // step) * step))
    for row in dict.fromkeys((0, start, rows // 2, rows - 1)):
        expected = one.base.rows(row, row + 1)
        if one.site is not None:
            expected = _lora_rows(one, row, expected)
        _require_close(one.name, written.rows(row, row + 1), expected, row)


def _lora_rows(one: ExportTensor, row: int, base: Tensor) -> Tensor:
    import torch

    assert one.site is not None
    layer: Any = one.site.wrapper
    adapter = one.site.adapter
    a = layer.lora_A[adapter].weight.detach().to("cpu", torch.float64)
    b = layer.lora_B[adapter].weight.detach()[row : row + 1].to("cpu", torch.float64)
    return base.to(torch.float64) + layer.scaling[adapter] * (b @ a)


def _require_close(name: str, written: Tensor, expected: Tensor, row: int) -> None:
    import torch

    if not written.is_floating_point():
        if not torch.equal(written, expected.to(written.dtype)):
            raise ExportMismatch(f"{name!r}: what was written is not what the base has")
        return
    info = torch.finfo(written.dtype)
    left, right = written.to(torch.float64), expected.to(torch.float64)
    scale = right.abs()
    bound = 0.51 * info.eps * scale + info.smallest_normal * info.eps + 1e-6 * scale.max()
    error = (left - right).abs()
    if not bool((error <= bound).all()):
        worst = int(torch.nan_to_num(error - bound, nan=torch.inf).argmax())
        found, wanted = left.reshape(-1)[worst].item(), right.reshape(-1)[worst].item()
        raise ExportMismatch(
            f"{name!r}, element {worst} of rows from {row}: expected {wanted:.9g} within the rounding of "
            f"{written.dtype}, found {found:.9g}; the export was removed; run it again, and report this if it stays"
        )


def _compare_logps(source: ExportSource, directory: Path, dtype: torch.dtype) -> tuple[float, float]:
    """(largest difference, spread) of log-probabilities between the export and base with adapter in float32."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = _logps(_reference(source))
        model = model_class(source.config).from_pretrained(
            directory, trust_remote_code=source.trust_remote_code, **_as_dtype(torch.float32)
        )
    found = _logps(model)
    if wanted.shape != found.shape:
        raise ExportMismatch(f"the export has {found.shape[-1]} tokens, expected {wanted.shape[-1]}; it was removed")
    spread = float(wanted.max() - wanted.min())
    worst = float((wanted - found).abs().max())
    bound = LOGPS_BOUND[str(dtype).removeprefix("torch.")] * spread + 1e-4
    if not worst <= bound:  # also where one is not a number
        raise ExportMismatch(
            f"the export of {source.where}: log-probabilities of a prompt differ by {worst:.3g} from the base and its "
            f"adapter in float32; expected at most {bound:.3g} in {dtype}; the export was removed"
        )
    return worst, spread


def _as_dtype(dtype: torch.dtype) -> dict[str, Any]:
    import transformers
    from packaging.version import Version

    return {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": dtype}


def _reference(source: ExportSource) -> Any:
    """Base and adapter as PEFT computes them, in float32 on the CPU, in modules of their own."""
    import torch

    cls = model_class(source.config)
    with torch.random.fork_rng(devices=[]):  # what is not loaded is drawn
        if source.base_directory is not None:
            model = cls.from_pretrained(
                source.base_directory, config=copy.deepcopy(source.config), ignore_mismatched_sizes=True,
                trust_remote_code=source.trust_remote_code, **_as_dtype(torch.float32),
            )  # fmt: skip
        else:
            make = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
            model = make(copy.deepcopy(source.config), **_as_dtype(torch.float32))
        model = model.float()
        if source.adapter is None and source.base_directory is not None:
            return model
        # Tied ones under each name, and what is not the files' own: resized embeddings, biases.
        places_in = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        places_in |= {name for name, _ in model.named_buffers()}
        values = {name: one.whole() for name, one in source.base.items() if name in places_in}
        model.load_state_dict(values, strict=False)
        if source.adapter is None:
            return model
        tensors = {
            name: one.to(torch.float32) if one.is_floating_point() else one
            for name, one in adapter_tensors(source.model, source.adapter).items()
        }
        config = base_of(source.model).peft_config[source.adapter]
        return inject(model, config, tensors, where=source.where, saved=False)


def _logps(model: Any) -> Tensor:
    import torch

    model.eval()
    words = model.config.get_text_config().vocab_size
    ids = torch.tensor([[(number * 7919 + 11) % words for number in range(_PROMPT)]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found: Tensor = torch.log_softmax(logits.float(), dim=-1)
    return found
