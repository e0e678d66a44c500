"""The child process in which llama.cpp's converter runs: `python -m trlpatch.export.gguf.conversion_child FD`.

The converter maps names, transforms tensors and writes metadata; it is asked for bf16, and its NumPy quantization is
replaced by nothing, so that it leaves a list of lazy float32 tensors with the type that it gives each. Those are
computed one at a time and written, in every type that is wanted, to as many files: weights are read once, no float32
file is in between, and no more than a tensor is in memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trlpatch.export.gguf.file_types import FILE_TYPES
from trlpatch.export.gguf.mix import BLOCKS, OTHER_RULES, Architecture, mixed_types, nbytes, plain_type
from trlpatch.export.gguf.pipe import Message, Refused, RemoteWeights, receive, run_child, send
from trlpatch.export.gguf.rows import row_quantizer

Capture = tuple[str, Any, str]
"""(name in the GGUF, lazy float32 array, type that the converter gives it in a bf16 file)."""

Inputs = dict[str, Any]
"""The checkpoint's tensors that were read for the one being computed: name -> sums of its rows, None for vectors."""

BLOCK = 1 << 22
"""Weights of a tensor that are read and quantized at once, where its rows are those of the checkpoint."""


def main(pipe: Connection) -> None:
    """Prepare, say what will be written, wait for the word, write, say what was written."""
    job = receive(pipe)
    weights = RemoteWeights(pipe, job["shapes"])
    inputs: Inputs = {}
    model, captured = _converted(job, weights, inputs)
    metadata = {key: one.value for key, one in model.gguf_writer.kv_data[0].items()}
    shapes = {name: tuple(data.shape) for name, data, _ in captured}
    types = {name: _types(name, captured, metadata) for name in job["files"]}
    unknown = {kind for each in types.values() for kind in each.values()} - BLOCKS.keys()
    if unknown:
        raise Refused(f"the converter stores weights of {metadata['general.architecture']} as {', '.join(unknown)}")
    sizes = {
        name: sum(nbytes(kind, shapes[one]) + 32 for one, kind in each.items()) + (8 << 20) * bool(each)
        for name, each in types.items()
    }
    plan = {"sizes": sizes, "architecture": metadata["general.architecture"], "metadata": _shown(metadata)}
    send(pipe, {"plan": {**plan, "kinds": {name: sorted(set(each.values())) for name, each in types.items()}}})
    receive(pipe)  # go on
    files = {name: _OneFile(Path(path), name, model, captured, types[name]) for name, path in job["files"].items()}
    with contextlib.ExitStack() as stack:
        for file in files.values():
            stack.callback(file.close)
        origins = _write(pipe, captured, files, weights, inputs)
    send(pipe, {"written": {"types": types, "origins": origins}})


def _shown(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the short values of the metadata, without the vocabulary."""
    return {key: value for key, value in metadata.items() if isinstance(value, int | float | bool)} | {
        key: value for key, value in metadata.items() if isinstance(value, str) and len(value) < 200
    }


def _converted(job: Message, weights: RemoteWeights, inputs: Inputs) -> tuple[Any, list[Capture]]:
    """Run the converter up to where it would write."""
    import gguf
    import torch
    from conversion import LazyTorchTensor, ModelBase, ModelType, get_model_architecture, get_model_class

    folder = Path(job["folder"])
    captured: list[Capture] = []

    def fetch(name: str) -> torch.Tensor:
        whole = weights.whole(name)
        inputs[name] = _row_sums(whole) if whole.ndim > 1 else None
        return torch.from_numpy(whole)

    def lazy(name: str) -> Any:
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, weights.shapes[name])
        return LazyTorchTensor(meta=meta, args=(name,), func=fetch)

    hparams = ModelBase.load_hparams(folder, False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    try:
        model_class = get_model_class(architecture)
    except NotImplementedError:
        raise Refused(f"llama.cpp knows no model {architecture}") from None

    class Streamed(model_class):  # type: ignore[misc, valid-type]
        model_arch = model_class.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            indexed = {}
            for name in weights.shapes:
                item = self.filter_tensors((name, lambda name=name: lazy(name)))
                if item is not None:
                    indexed[item[0]] = item[1]
            return indexed

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            if job["tokenizer_pre"] is None:
                return str(super().get_vocab_base_pre(tokenizer))
            return _known_pre(job["tokenizer_pre"])

    with torch.inference_mode(), _unquantized():
        try:
            model = Streamed(folder, gguf.LlamaFileType.MOSTLY_BF16, folder / "unused", model_name=job["name"])
            add = model.gguf_writer.add_tensor

            def record(name: str, data: Any, raw_dtype: Any = None, **_: Any) -> None:
                captured.append((name, data, gguf.GGMLQuantizationType(raw_dtype).name))
                add(name, data, raw_dtype=gguf.GGMLQuantizationType.F32)

            model.gguf_writer.add_tensor = record
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
        except (NotImplementedError, ValueError, FileNotFoundError) as error:
            if "tokenizer.model" in str(error):
                raise Refused(
                    f"llama.cpp makes the vocabulary of {architecture} of tokenizer.model, and there is none beside "
                    "the tokenizer; copy it from the base model into the folder that is exported"
                ) from None
            if "pre-tokenizer" not in str(error):
                raise
            raise Refused(
                "llama.cpp does not know how this tokenizer splits text before its merges apply (pre-tokenizer), and "
                "tells tokenizers apart by what they make of one test text. If it is trained like a known one, name "
                f"that: tokenizer_pre='qwen2' for Qwen's pattern, 'llama-bpe' for Llama 3's, 'gpt-2'; known: "
                f"{', '.join(sorted(_known_names()))}"
            ) from None
    for info in model.gguf_writer.tensors[0].values():
        info.tensor = None
    return model, captured


@contextlib.contextmanager
def _unquantized() -> Iterator[None]:
    """Let the converter's quantization leave tensors as they are."""
    import gguf

    quantize, chunked = gguf.quants.quantize, gguf.LazyChunkedTensor.quantize
    gguf.quants.quantize = lambda data, kind: data
    gguf.LazyChunkedTensor.quantize = lambda self, kind: self
    try:
        yield
    finally:
        gguf.quants.quantize, gguf.LazyChunkedTensor.quantize = quantize, chunked


def _known_names() -> set[str]:
    import conversion.base

    return set(re.findall(r'res = "([\w.-]+)"', Path(conversion.base.__file__).read_text(encoding="utf-8")))


def _known_pre(name: str) -> str:
    import difflib

    known = _known_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise Refused(f"tokenizer_pre={name!r}: expected one of {', '.join(sorted(known))}{guess}")
    return name


def _types(name: str, captured: list[Capture], metadata: dict[str, Any]) -> dict[str, str]:
    """Return the type of each tensor in a file of the type `name`."""
    file_type = FILE_TYPES[name]
    shapes = {one: tuple(data.shape) for one, data, _ in captured}
    if file_type.by_converter:
        return {one: plain_type(kind, file_type, shapes[one]) for one, _, kind in captured}
    architecture = Architecture.of(metadata)
    if architecture.name in OTHER_RULES:
        raise Refused(
            f"llama-quantize has rules of its own for {architecture.name}, which are not in trlpatch; export 'f32', "
            f"and run: llama-quantize FILE.gguf OUT.gguf {name.upper()}"
        )
    return mixed_types(file_type, shapes, architecture)


class _OneFile:
    """A GGUF file being written: metadata and the table of tensors first, then tensors in the order of the table."""

    def __init__(self, path: Path, name: str, model: Any, captured: list[Capture], types: dict[str, str]) -> None:
        import gguf
        import numpy as np

        self._types = types
        self._quantize = row_quantizer(set(types.values()))
        writer = gguf.GGUFWriter(None, model.gguf_writer.arch)
        writer.kv_data = [dict(model.gguf_writer.kv_data[0])]
        writer.data_alignment = model.gguf_writer.data_alignment
        writer.remove_key("general.file_type")
        writer.add_file_type(FILE_TYPES[name].number)
        for one, data, _ in captured:
            kind = gguf.GGMLQuantizationType[types[one]]
            writer.add_tensor_info(one, data.shape, np.dtype(np.float32), nbytes(types[one], tuple(data.shape)), kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        self._file = writer.fout[0]
        self._align = writer.data_alignment
        self._pad()

    def block(self, name: str, rows: Any) -> None:
        """Append rows of the tensor whose turn it is."""
        kind = self._types[name]
        if kind == "F16":
            _fits_in_float16(name, rows)
        self._file.write(self._quantize(kind, rows).data)

    def end_tensor(self) -> None:
        """Align the next tensor."""
        self._pad()

    def close(self) -> None:
        """Write what is left in buffers."""
        self._file.close()

    def _pad(self) -> None:
        self._file.write(b"\0" * (-self._file.tell() % self._align))


def _write(
    pipe: Connection, captured: list[Capture], files: dict[str, _OneFile], weights: RemoteWeights, inputs: Inputs
) -> dict[str, list[str] | None]:
    """Write every tensor to every file; return what each was made of, None where rows are not the same rows."""
    import numpy as np

    total = sum(int(np.prod(data.shape)) for _, data, _ in captured)
    done, origins = 0, {}
    captured.reverse()
    while captured:
        name, data, _ = captured.pop()
        inputs.clear()
        source = _same_tensor(data)
        blocks = _blocks(source, weights) if source is not None else _computed(data)
        origins[name] = [source] if source is not None else None
        sums = []
        for rows in blocks:
            _finite(name, rows)
            for file in files.values():
                file.block(name, rows)
            if source is None:
                sums.append(_row_sums(rows))
            done += rows.size
            send(pipe, {"progress": [done, total]})
        if source is None and _same_rows(inputs, np.concatenate(sums)):
            origins[name] = list(inputs)
        for file in files.values():
            file.end_tensor()
    return origins


def _same_tensor(data: Any) -> str | None:
    """Return the checkpoint's name of a tensor that the converter passes on as it is."""
    with contextlib.suppress(AttributeError, ValueError):
        (lazy,) = data._args
        (name,) = lazy._args
        if isinstance(name, str) and len(data.shape) == 2 and data._func.__name__ == "<lambda>":
            return name
    return None


def _blocks(name: str, weights: RemoteWeights) -> Iterator[Any]:
    rows, length = weights.shapes[name]
    step = max(1, BLOCK // length)
    for start in range(0, rows, step):
        yield weights.rows(name, start, min(rows, start + step))


def _computed(data: Any) -> Iterator[Any]:
    """Yield blocks of rows of a tensor that the converter computes."""
    import gguf
    import numpy as np

    if isinstance(data, gguf.LazyChunkedTensor):
        chunks = data._chunks
        yield from (np.asarray(load(), dtype=np.float32).reshape(-1, data.shape[-1]) for load in chunks)
        return
    whole = np.ascontiguousarray(gguf.LazyNumpyTensor.to_eager(data), dtype=np.float32)
    rows = whole.reshape(-1, whole.shape[-1]) if whole.ndim else whole.reshape(1, 1)
    step = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _row_sums(tensor: Any) -> Any:
    return tensor.reshape(-1, tensor.shape[-1]).sum(axis=1)


def _same_rows(inputs: Inputs, sums: Any) -> bool:
    """Are the rows, in whatever order, those of the checkpoint's tensors? Compared by their sums."""
    import numpy as np

    if not inputs or any(one is None for one in inputs.values()):
        return False
    return bool(np.array_equal(np.sort(np.concatenate(list(inputs.values()))), np.sort(sums)))


def _finite(name: str, rows: Any) -> None:
    import numpy as np

    # The sum of finite weights is finite, and needs no array of flags beside a large one.
    if not np.isfinite(rows.sum(dtype=np.float64)):
        raise Refused(f"{name!r} has weights that are infinite or not a number; llama.cpp does not load such a file")


def _fits_in_float16(name: str, rows: Any) -> None:
    largest = float(max(rows.max(), -rows.min()))
    if largest > 65504:
        raise Refused(f"{name!r} has weights up to {largest:.3g}, and float16 ends at 65504; export 'bf16' instead")


if __name__ == "__main__":
    run_child(main)
