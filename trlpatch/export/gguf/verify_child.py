"""The child process that runs a file: `python -m trlpatch.export.gguf.verify_child FD`.

Asked for a reference it computes logits with transformers, in float32, from weights rounded as the tensors of a file
are; asked for a file it computes them with llama.cpp. In separate processes: a crash of either is a message here.
"""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trlpatch.export.gguf.llama_api import Llama, UnknownBuild
from trlpatch.export.gguf.pipe import Message, RemoteWeights, receive, run_child, send
from trlpatch.export.gguf.rows import row_quantizer


def main(pipe: Connection) -> None:
    """Write the logits of each job to the file that it names, until there are no more jobs."""
    import numpy as np

    while True:
        job = receive(pipe)
        try:
            logits = _of_file(job) if "library" in job else _reference(job, RemoteWeights(pipe, job["shapes"]))
        except UnknownBuild as unknown:
            send(pipe, {"logits": None, "unknown": str(unknown)})
            continue
        np.save(job["out"], logits)
        send(pipe, {"logits": job["out"]})


def _of_file(job: Message) -> Any:
    adapter = Path(job["adapter"]) if "adapter" in job else None
    with Llama(Path(job["library"]), Path(job["file"]), context=len(job["tokens"]), adapter=adapter) as llama:
        return llama.logits(job["tokens"])


def _reference(job: Message, weights: RemoteWeights) -> Any:
    import torch
    from transformers import AutoConfig

    from trlpatch.export.skeleton import model_class

    config = AutoConfig.from_pretrained(job["folder"])
    # Two of transformers' attention implementations are exact enough for a bound of 1e-3; this one always exists.
    config._attn_implementation = "eager"
    state = {name: torch.from_numpy(one) for name, one in _rounded(weights, job["rounding"])}
    model = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    del state
    with torch.inference_mode():
        tokens = torch.tensor([job["tokens"]])
        return model.eval()(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0].float().numpy()


def _rounded(weights: RemoteWeights, rounding: Mapping[str, str]) -> Any:
    """Yield the tensors of the checkpoint, each rounded to the type that it has in the file."""
    import gguf

    quantize = row_quantizer(set(rounding.values()))
    for name in weights.shapes:
        whole = weights.whole(name)
        kind = rounding.get(name, "F32")
        if kind != "F32":
            rows = whole.reshape(-1, whole.shape[-1])
            number = gguf.GGMLQuantizationType[kind]
            packed = quantize(kind, rows)
            if kind == "F16":
                packed = packed.view("float16")
            whole = gguf.quants.dequantize(packed, number).reshape(whole.shape)
        yield name, whole


if __name__ == "__main__":
    run_child(main)
