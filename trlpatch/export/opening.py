"""Open an ExportSource: find the base, the adapter and what stands beside them, and refuse what cannot be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.export import places, settings, skeleton
from trlpatch.export.assemble import Assembly, assemble
from trlpatch.export.base import BaseTensor, CheckpointFiles, clean_path, has_weights, live_tensor, live_tensors, walk
from trlpatch.export.changes import sites
from trlpatch.export.source import ExportSource
from trlpatch.policy.adapter import base_of, lora_view

if TYPE_CHECKING:
    from torch import Tensor

_NO_PROCESSOR = (
    "the model reads images and no processor was found beside it: what loads the export needs one; give the processor "
    "as tokenizer="
)


@dataclass(frozen=True)
class Opening:
    """The arguments of `open_source`."""

    tokenizer: Any
    base: Any
    adapter: str | None
    token: str | bool | None
    revision: str | None
    trust_remote_code: bool

    def open(self, model: Any) -> ExportSource:
        """The source."""
        if not isinstance(model, (str, os.PathLike)):
            return self._live(model)
        directory = self._place(model, revision=self.revision if self.base is None else None)
        if places.is_adapter(directory):
            return self._saved_adapter(directory)
        if has_weights(directory):
            return self._files(directory, None, {}, where=f"{os.fspath(model)!r}", tokenizers=[directory])
        raise CannotExport(places.nothing_in(directory))

    def _place(self, name: Any, *, revision: str | None) -> Path:
        return places.directory_of(name, token=self.token, revision=revision, code=self.trust_remote_code)

    def _saved_adapter(self, directory: Path) -> ExportSource:
        config, tensors = places.read_adapter(directory)
        where = f"{str(directory)!r}"
        skeleton.refuse_kind(config, where=where, saved=True)
        name = self.base or config.base_model_name_or_path
        if not name:
            raise CannotExport(
                f"exporting the adapter in {where}: its adapter_config.json names no base model; name it with base="
            )
        try:
            base = self._place(name, revision=self.revision or getattr(config, "revision", None))
        except CannotExport as error:
            if self.base is not None:
                raise
            raise CannotExport(
                f"exporting the adapter in {where}: {str(name)!r}, which its adapter_config.json names as base model "
                f"(a relative path counts from {str(Path.cwd())!r}): {error}"
            ) from error
        return self._files(base, config, tensors, where=where, tokenizers=[directory, base])

    def _files(
        self,
        base: Path,
        adapter_config: Any,
        tensors: Mapping[str, Tensor],
        *,
        where: str,
        tokenizers: list[Path],
        overlay: Mapping[str, BaseTensor] | None = None,
    ) -> ExportSource:
        """Base weights from files; an adapter on a model on the meta device."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(base, trust_remote_code=self.trust_remote_code)
        places.refuse_quantized(config, base)
        files = dict(CheckpointFiles(base).tensors)
        if adapter_config is None:
            return self._source(Assembly.of_files(files), where, config, base, tokenizers, model=None, adapter=None)
        rows = skeleton.rows_of_saved_embeddings(tensors)
        if rows is not None and rows != config.get_text_config().vocab_size:
            config.get_text_config().vocab_size = rows
        empty = skeleton.empty_model(config, trust_remote_code=self.trust_remote_code)
        groups = _tied(empty)
        adapted = skeleton.inject(empty, adapter_config, tensors, where=where)
        changes = list(sites(adapted, skeleton.ADAPTER))
        replaced = _not_on_meta(adapted) | dict(overlay or {})
        missing = [
            f"{site.path}.{leaf}"
            for site in changes
            for leaf in site.leaves
            if not {f"{site.path}.{leaf}", *groups.get(f"{site.path}.{leaf}", ())} & {*files, *replaced}
        ]
        if missing:  # names that transformers changes while it loads
            return self._loaded(base, config, adapter_config, tensors, where=where, tokenizers=tokenizers)
        assembly = assemble(files, changes, groups=groups, replaced=replaced, embeddings=None)
        return self._source(assembly, where, config, base, tokenizers, model=adapted, adapter=skeleton.ADAPTER)

    def _loaded(
        self, base: Path, config: Any, adapter_config: Any, tensors: Mapping[str, Tensor], *, where: str,
        tokenizers: list[Path],
    ) -> ExportSource:  # fmt: skip
        """Load the base with transformers, where its files have other names than the model that PEFT adapted."""
        model = skeleton.model_class(config).from_pretrained(
            base, config=config, dtype="auto", trust_remote_code=self.trust_remote_code
        )
        adapted = skeleton.inject(model, adapter_config, tensors, where=where)
        source = self._of_live(adapted, skeleton.ADAPTER, where, tokenizers)
        note = "the base was loaded as a whole: transformers changes the names of its files' tensors"
        return replace(source, base_name=str(base), notes=(*source.notes, note))

    def _live(self, model: Any) -> ExportSource:
        view, base = lora_view(model), base_of(model)
        if not callable(getattr(base, "named_modules", None)) or not hasattr(base, "config"):
            raise CannotExport(
                f"exporting a {type(model).__name__}: expected a transformers or PEFT model, a directory or a model id"
            )
        where = f"the live {type(base).__name__}"
        name = None
        if view is not None:
            name = places.one_adapter(view, self.adapter, where)
            skeleton.refuse_kind(view.configs[name], where=where, saved=False)
        near = [Path(str(base.name_or_path))] if getattr(base, "name_or_path", "") else []
        if not places.is_quantized(base):
            if self.base is not None:
                raise CannotExport(
                    f"exporting {where}: it has its base weights itself, in {next(base.parameters()).dtype}; base= is "
                    "for adapter directories and for models in 4 bits; leave it out"
                )
            return self._of_live(model, name, where, near)
        return self._of_quantized(model, view, base, name, where, near)

    def _of_live(self, model: Any, adapter: str | None, where: str, tokenizers: list[Path]) -> ExportSource:
        base = base_of(model)
        tensors = live_tensors(model)
        changes = list(sites(model, adapter)) if adapter is not None else []
        assembly = assemble(tensors, changes, groups=None, replaced={}, embeddings=_embeddings(base))
        assembly = assembly.renamed(base)
        return self._source(assembly, where, base.config, None, tokenizers, model=model, adapter=adapter, live=base)

    def _of_quantized(
        self, model: Any, view: Any, base: Any, adapter: str | None, where: str, near: list[Path]
    ) -> ExportSource:
        """The base is the checkpoint that was quantized; what is trained beside the adapter comes from the model."""
        if view is None or adapter is None:
            raise CannotExport(
                f"exporting {where}: it is quantized and has no adapter; export the checkpoint it was loaded from "
                f"({base.name_or_path!r})"
            )
        name = self.base or base.name_or_path
        directory = self._place(name, revision=self.revision)
        tensors = places.adapter_tensors(model, adapter)
        skeleton.refuse_kind(view.configs[adapter], where=f"{where}, whose base weights are quantized", saved=True)
        trained = {path for path, one in _trained(base)}
        overlay = {path: one for path, one in live_tensors(base).items() if path in trained}
        source = self._files(
            directory, view.configs[adapter], tensors, where=where, tokenizers=[*near, directory], overlay=overlay
        )
        generation = settings.sanitised_generation_config(getattr(base, "generation_config", None))
        note = f"base weights from {str(name)!r}, in 16 bits or more: the model in training has them quantized"
        return replace(source, generation_config=generation, notes=(*source.notes, note))

    def _source(
        self, assembly: Assembly, where: str, config: Any, base: Path | None, tokenizers: list[Path], *, model: Any,
        adapter: str | None, live: Any = None,
    ) -> ExportSource:  # fmt: skip
        found = settings.sanitised_config(config)
        if assembly.untied and found.get_text_config().tie_word_embeddings:
            settings.untie(found)
        generation = getattr(live, "generation_config", None) if live is not None else places.generation_config(base)
        processor = places.processor_files(self.tokenizer, tokenizers)
        notes = assembly.notes
        if places.reads_images(config) and not processor and not hasattr(self.tokenizer, "image_processor"):
            notes += (_NO_PROCESSOR,)
        kinds: dict[str, int] = {}
        for site in assembly.changes:
            kinds[site.kind] = kinds.get(site.kind, 0) + 1
        return ExportSource(
            where=where,
            tensors=assembly.tensors,
            config=found,
            generation_config=settings.sanitised_generation_config(generation),
            tokenizer=places.tokenizer(self.tokenizer, tokenizers),
            adapter=adapter,
            kinds=kinds,
            base_name=str(getattr(config, "_name_or_path", "") or base or ""),
            notes=notes,
            model=model,
            base_directory=base,
            base=assembly.base,
            trust_remote_code=self.trust_remote_code,
            # A whole model in training may be saved to where it was loaded from: nothing else belongs to that.
            inputs=() if live is not None and adapter is None else tuple(tokenizers),
            processor=processor,
        )


def _tied(model: Any) -> dict[str, tuple[str, ...]]:
    """Name of a tied parameter -> all names that it has, those of the source first."""
    groups: dict[int, list[str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(one), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def _embeddings(base: Any) -> tuple[str, str] | None:
    """The names of the input and output embeddings of a model whose config ties them."""
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return None
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    if None in modules:
        return None
    paths = {id(module): path for path, module in base.named_modules()}
    names = [paths.get(id(module)) for module in modules]
    if None in names:
        return None
    first, second = (clean_path(f"{name}".split(".base_layer")[0].split(".original_module")[0]) for name in names)
    return f"{first}.weight", f"{second}.weight"


def _not_on_meta(adapted: Any) -> dict[str, BaseTensor]:
    """Base parameters that the adapter's files brought: biases, resized embeddings."""
    return {path: live_tensor(path, one) for path, one in walk(base_of(adapted), "") if not one.is_meta}


def _trained(base: Any) -> list[tuple[str, Any]]:
    return [(path, one) for path, one in walk(base, "") if one.requires_grad]


def open_source(
    model: Any,
    *,
    tokenizer: Any = None,
    base: Any = None,
    adapter: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ExportSource:
    """Look at what is to be exported; reads no weights yet.

    Args:
        model: a PEFT or transformers model (in training, wrapped, with an engine: any), a directory (a trainer's
            checkpoint, a saved adapter, a saved model), or a model id on the hub.
        tokenizer: None takes the directory's, else the base model's.
        base: the 16-bit base model, a directory or a model id; None takes what the adapter or the model names.
        adapter: the name of the adapter of a live model; None takes the active one.
        token: for private models on the hub.
        revision: of a base on the hub.
        trust_remote_code: run the model's own code from the hub.

    Raises:
        CannotExport: nothing that can be exported, or an adapter that cannot be merged rightly, with the reason.
    """
    return Opening(tokenizer, base, adapter, token, revision, trust_remote_code).open(model)
