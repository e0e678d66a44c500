from __future__ import annotations

from trlpatch.exception_chain import exception_chain


def test_causes_and_contexts_are_followed_each_once() -> None:
    cause, context, deep = ValueError("cause"), KeyError("context"), OSError("deep")
    outer = RuntimeError("outer")
    outer.__cause__, outer.__context__ = cause, context
    cause.__context__ = context.__context__ = deep
    deep.__context__ = outer
    chain = exception_chain(outer)
    assert chain[:2] == [outer, cause]
    assert sorted(map(str, chain)) == sorted(map(str, (outer, cause, context, deep)))


def test_exceptions_that_are_equal_are_not_the_same() -> None:
    class Equal(Exception):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    inner, outer = Equal(), Equal()
    outer.__cause__ = inner
    assert len(exception_chain(outer)) == 2
