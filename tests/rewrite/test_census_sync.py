"""Weight pushes: handing the adapter over prevents only those behind the early return of the sync method."""

from __future__ import annotations

import pytest

from tests.rewrite.small_engine import ENGINE, edited, reasons, rewritten, with_method

MODEL = "self.llm.llm_engine.model_executor.driver_worker.model_runner.model"
SYNC = "        self._push_all()\n        self.llm.reset_prefix_cache()\n"
WAKE = '        if self.mode == "colocate":\n            self.llm.wake_up(tags=["weights"])\n'


@pytest.mark.parametrize(
    "body",
    [
        f"{MODEL}.load_weights(names)",
        f"model = {MODEL}\nmodel.load_weights(names)",
        f"model = {MODEL}\npush(model)",
        f"push = {MODEL}.load_weights\npush(names)",
        "self._push_all()",
        "self._push(*names)",
        "push = self._push_all\npush()",
        "getattr(self, '_push_all')()",
        "self.model.merge_adapter()\nself.sync_weights()\nself.model.unmerge_adapter()",
    ],
)
def test_a_push_past_the_sync_method_is_refused(body: str):
    assert any("prevent" in reason or "engine is" in reason for reason in reasons(with_method(body)))


def test_the_old_name_as_a_wrapper_while_callers_use_a_new_one_is_refused():
    head = "    def sync_weights(self):\n"
    text = edited(head, head + "        self.push_policy()\n\n    def push_policy(self):\n")
    assert any("does not prevent" in reason for reason in reasons(text))


def test_an_inner_method_that_only_the_sync_method_calls_is_known():
    text = edited(SYNC, "        self._sync_inner()\n\n    def _sync_inner(self):\n" + SYNC)
    assert reasons(text) == []
    called = with_method("self._sync_inner()").replace(ENGINE, text)
    assert any("does not prevent" in reason for reason in reasons(called))


@pytest.mark.parametrize(
    "text",
    [
        edited(WAKE + SYNC, SYNC + WAKE),
        edited(WAKE + SYNC, "        self._push_all()\n" + WAKE),
        edited(WAKE + SYNC, "        self.prepare()\n" + WAKE + SYNC),
        edited(WAKE + SYNC, '        if self.mode == "server":\n            self.prepare()\n' + WAKE + SYNC),
        edited(WAKE + SYNC, WAKE + "        else:\n            self.prepare()\n" + SYNC),
        edited(WAKE + SYNC, '        self.llm.wake_up(tags=["weights"])\n' + SYNC),
    ],
)
def test_a_wake_that_does_not_lead_the_sync_method_is_refused(text: str):
    found = reasons(text)
    assert any("wake_behind_push: expected 0, found 1" in reason for reason in found), found


def test_the_early_return_stands_behind_a_leading_wake():
    lines = rewritten(ENGINE).text.splitlines()
    returned = lines.index("        if _trlpatch.hand_over(self):")
    assert "_trlpatch.wake_up(self, self.llm" in lines[returned - 2]
    assert lines[returned + 2 :][0] == "        self._push_all()"


@pytest.mark.parametrize(
    "first",
    [
        "        if self.zero:\n            import zero as g\n        else:\n            g = None\n",
        "        import deepspeed\n        gather: object = deepspeed\n",
    ],
)
def test_what_only_binds_names_may_precede_the_leading_wake(first: str):
    text = edited(WAKE, first + WAKE)
    assert reasons(text) == []
    lines = rewritten(text).text.splitlines()
    assert "wake_up" in lines[lines.index("        if _trlpatch.hand_over(self):") - 2]


@pytest.mark.parametrize(
    "inside",
    [
        "            self._push_all()\n",
        "            pushed = self._push_all()\n",
        f"            {MODEL}.load_weights([])\n",
    ],
)
def test_a_push_inside_the_leading_wake_is_refused(inside: str):
    found = reasons(edited(WAKE, WAKE + inside))
    assert any("does not prevent" in reason for reason in found), found


def test_a_push_in_a_binding_before_the_return_is_refused():
    found = reasons(edited("        accelerator = self.accelerator\n", "        accelerator = self._push_all()\n"))
    assert any("does not prevent" in reason for reason in found), found


def test_a_sync_method_of_another_class_is_not_reached():
    text = ENGINE + "\n\nclass Other:\n    def sync_weights(self):\n        pass\n"
    assert any("adapter_sync does not reach this sync method" in reason for reason in reasons(text))
