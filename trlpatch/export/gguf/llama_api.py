"""Logits of llama.cpp through the C API that xllamacpp's library exports: ctypes, no compiler, no server.

Structures are passed by value, and their layout changes between builds. They are held in larger blocks of memory: what
a caller reserves beyond the structure is never looked at. The few fields that are set lie at the offsets of llama.h as
of build 11549, and before they are written they must hold the values that llama.cpp's defaults have there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_F32 = 0
_ROOM = 1024


class UnknownBuild(Exception):
    """The library is not laid out as expected, so nothing can be said about a file."""


class _Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_int32 * (_ROOM // 4))]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


# llama_context_params of build 11549, in 4-byte words: (offset, default).
_N_CTX, _N_BATCH, _N_UBATCH = (0, 512), (1, 2048), (2, 512)
_FLASH_ATTENTION = (13, -1)
_TYPE_K, _TYPE_V = (26, 1), (27, 1)
_THREADS, _THREADS_BATCH = 7, 8
_N_SEQ_MAX = (3, 1)
_KNOWN = (_N_CTX, _N_BATCH, _N_UBATCH, _N_SEQ_MAX, _FLASH_ATTENTION, _TYPE_K, _TYPE_V)
_OFF = 0


class Llama:
    """One GGUF file, loaded by llama.cpp on the CPU; a context manager."""

    def __init__(self, library: Path, file: Path, *, context: int, adapter: Path | None = None) -> None:
        self._file, self._context_length, self._adapter = file, context, adapter
        self._api = ctypes.CDLL(str(library))
        self._declare()

    def __enter__(self) -> Llama:
        api = self._api
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        # The number of layers on a GPU is behind two pointers; a build for the CPU has none to put them on.
        self._model = api.llama_model_load_from_file(os.fsencode(self._file), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {self._file.name}")
        self._context = api.llama_init_from_model(self._model, self._context_parameters())
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {self._context_length} tokens for {self._file.name}")
        if self._adapter is not None:
            self._add_adapter(self._adapter)
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int]) -> Any:
        """Return float32 logits, (tokens, vocabulary), of one prompt."""
        import numpy as np

        vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for position, token in enumerate(tokens):
            batch.token[position] = token
            batch.pos[position] = position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = 1
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise ValueError(f"llama.cpp does not decode {self._file.name}: status {status}")
        rows = [
            np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, at), (vocabulary,)).copy()
            for at in range(len(tokens))
        ]
        self._api.llama_batch_free(batch)
        return np.stack(rows)

    def _declare(self) -> None:
        pointer, api = ctypes.c_void_p, self._api
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "llama_backend_init": (None, []),
            "llama_model_default_params": (_Parameters, []),
            "llama_context_default_params": (_Parameters, []),
            "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Parameters]),
            "llama_init_from_model": (pointer, [pointer, _Parameters]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
            "llama_batch_init": (_Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
            "llama_batch_free": (None, [_Batch]),
            "llama_decode": (ctypes.c_int32, [pointer, _Batch]),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
            "llama_free": (None, [pointer]),
            "llama_model_free": (None, [pointer]),
            "llama_adapter_lora_init": (pointer, [pointer, ctypes.c_char_p]),
            "llama_set_adapters_lora": (ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
        }
        missing = [name for name in signatures if not hasattr(api, name)]
        if missing:
            raise UnknownBuild(f"it has no {', '.join(missing)}")
        for name, (result, arguments) in signatures.items():
            function = getattr(api, name)
            function.restype, function.argtypes = result, arguments

    def _context_parameters(self) -> _Parameters:
        parameters: _Parameters = self._api.llama_context_default_params()
        words = parameters.words
        found = [words[offset] for offset, _ in _KNOWN]
        if found != [default for _, default in _KNOWN]:
            raise UnknownBuild(
                f"its default parameters are {found} where build 11549 has {[one for _, one in _KNOWN]}"
            )
        length = self._context_length
        for (offset, _), value in ((_N_CTX, length), (_N_BATCH, length), (_N_UBATCH, length)):
            words[offset] = value
        words[_FLASH_ATTENTION[0]] = _OFF
        words[_TYPE_K[0]] = words[_TYPE_V[0]] = _F32
        words[_THREADS] = words[_THREADS_BATCH] = len(os.sched_getaffinity(0))
        return parameters

    def _add_adapter(self, file: Path) -> None:
        adapter = self._api.llama_adapter_lora_init(self._model, os.fsencode(file))
        if not adapter:
            raise ValueError(f"llama.cpp does not load the adapter {file.name}")
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
        status = self._api.llama_set_adapters_lora(self._context, adapters, 1, scales)
        if status:
            raise ValueError(f"llama.cpp does not take the adapter {file.name}: status {status}")
