from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.fakes.engine import RecordingEngineStub  # noqa: E402
from tests.fakes.models import lora_model  # noqa: E402
from trlpatch.engine.lora_limits import unsupported_reason  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402
from trlpatch.policy.lora_support import rank_of  # noqa: E402

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("engine", "holds", "says"),
    [
        (RecordingEngineStub(), "checkpoint", None),
        (RecordingEngineStub(lora_rank=None), "checkpoint", "built without enable_lora=True"),
        (RecordingEngineStub(lora_rank=8), "checkpoint", "its rank 12 is above the engine's max_lora_rank=8"),
        (RecordingEngineStub(), "policy", "replaced by a full-weight sync"),
    ],
)
def test_what_one_engine_cannot_take(engine: RecordingEngineStub, holds: Any, says: str | None) -> None:
    view = lora_view(lora_model(rank_pattern={"o_proj": 12}))
    assert view is not None
    assert rank_of(view) == 12
    state_of(engine).policy_location = holds
    found = unsupported_reason(view, engine)
    assert found is says is None or (says is not None and says in str(found))
