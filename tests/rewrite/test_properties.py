"""What must hold for every release and every shape of source, searched for counterexamples."""

from __future__ import annotations

import ast
import io
import tokenize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import apply
from trlpatch.rewrite.patch import Patch
from trlpatch.rewrite.registry import patches, repairs
from trlpatch.source.releases import OLDEST_SUPPORTED, Release, parse_release
from trlpatch.source.targets import TARGETS


def around_boundaries() -> list[Release]:
    """Return every release at which some range starts or ends, with its neighbours on both sides."""
    ranges = [entry.trl for patch in patches() for entry in (*patch.variants, *patch.exemptions)]
    ranges += [location.trl for target in TARGETS.values() for location in target.locations]
    starts = {parse_release(bound.strip("<>=")) for trl in ranges for bound in trl.text.split(",")}
    found = {neighbour for a, b, c in starts for neighbour in [(a, b, c), (a, b, c + 1), (a, max(b - 1, 0), 9)]}
    return sorted(release for release in found if release >= OLDEST_SUPPORTED)


releases = st.sampled_from(around_boundaries()) | st.tuples(
    st.integers(0, 2), st.integers(0, 40), st.integers(0, 9)
).filter(lambda release: release >= OLDEST_SUPPORTED)


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.name)
@settings(max_examples=500, deadline=None)
@given(release=releases)
def test_variants_and_exemptions_cover_every_release_exactly_once(patch: Patch, release: Release):
    for name in patch.targets:
        matching = [v for v in (*patch.variants, *patch.exemptions) if v.target == name and release in v.trl]
        exists = TARGETS[name].location(release) is not None
        # A repair ends with the release that needs it no more.
        assert len(matching) == exists or (patch in repairs() and not matching), (name, release, matching)


@settings(deadline=None)
@given(release=releases)
def test_a_target_has_at_most_one_location(release: Release):
    for target in TARGETS.values():
        assert sum(release in location.trl for location in target.locations) <= 1


# Calls. Pieces are drawn separately so that separators, line breaks and comments meet every kind of argument.

atoms = st.sampled_from(
    ["prompts", "f(x)", "[p for p in ps]", "{'a': (1, 2)}", "a.b(c(d))", "'),'", "lambda q: q", "(yield)"]
)
positional = atoms | atoms.map(lambda a: f"*{a}")
named = st.tuples(st.sampled_from(["sampling_params", "use_tqdm", "lora_request"]), atoms).map(
    lambda t: f"{t[0]}={t[1]}"
)
breaks = st.sampled_from(["", " ", "\n            ", "  # why, (or not)\n            "])


@st.composite
def calls(draw: st.DrawFn) -> str:
    arguments = draw(st.lists(positional, max_size=3)) + draw(
        st.lists(named, max_size=3, unique_by=lambda text: text.partition("=")[0])
    )
    if draw(st.booleans()):
        arguments.append("**kwargs")
    text = draw(breaks)
    for index, argument in enumerate(arguments):
        last = index == len(arguments) - 1
        comma = "," if not last or draw(st.booleans()) else ""
        text += argument + comma + draw(breaks)
    engine, method = (
        draw(st.sampled_from(["self.llm", "self.vllm_engine"])),
        draw(st.sampled_from(["generate", "chat"])),
    )
    return f"{engine}.{method}({text})"


wrappers = st.sampled_from(
    ["{}", "decode({})", "[*{}, 1]", "{} if ready else None", "list(map(str, {}))", "self.f({}, b=({}))"]
)


def comments(text: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT and "trlpatch:" not in token.string]


class WithoutHooks(ast.NodeTransformer):
    """Undo the edit on the syntax tree."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        kept = []
        for word in node.keywords:
            own = {"lora_request": 2, "chat_template": 1}.get(word.arg or "")
            if own and isinstance(word.value, ast.Call) and ast.unparse(word.value.func) == f"_trlpatch.{word.arg}":
                if len(word.value.args) == own:
                    continue
                word.value = word.value.args[own]
            kept.append(word)
        node.keywords = kept
        return node


@settings(max_examples=300, deadline=None)
@given(call=calls(), wrapper=wrappers)
def test_call_edits_survive_every_shape(call: str, wrapper: str):
    expression = wrapper.format(call, call)
    text = f"class VLLMGeneration:\n    def generate(self, prompts):\n        # before\n        out = {expression}\n"
    upstream = ast.parse(text)
    sites = wrapper.count("{}")
    trl = {1: "1.16.0", 2: "0.28.0"}[sites]
    result = apply("live_adapter", "vllm_generation", trl, text)
    assert [outcome.reason for outcome in result.failed] == []
    patched = ast.parse(result.text)
    rollouts = [
        node
        for node in ast.walk(patched)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in {"self.llm", "self.vllm_engine"}
    ]
    assert len(rollouts) == sites
    for rollout in rollouts:
        assert ("_trlpatch.chat_template(self" in ast.unparse(rollout)) is (
            ast.unparse(rollout.func).endswith(".chat")
        )
        value = next(word.value for word in rollout.keywords if word.arg == "lora_request")
        assert ast.unparse(value).startswith(f"_trlpatch.lora_request(self, {ast.unparse(rollout.func.value)}")
    assert comments(result.text) == comments(text)
    undone = WithoutHooks().visit(patched)
    undone.body = [node for node in undone.body if not isinstance(node, ast.Import)]
    assert ast.dump(undone) == ast.dump(upstream)


# Whole classes.

fillers = st.sampled_from(
    [
        "x = 1  # a comment",
        "# a comment on its own",
        "text = '''\nself.llm.generate(\n  '''",
        "with profiler:\n    pass",
        "try:\n    y = 2\nexcept ValueError:\n    # ignored\n    pass\nelse:\n    y = 3",
        "if self.mode == 'server':\n    z = self.client.generate(p)\nelif other:\n    z = 2",
        "def nested(args):\n    return args",
        "a = 1; b = 2",
        "for i in range(3):\n    # loop\n    continue",
        "\f",
    ]
)
rollouts = st.sampled_from(
    [
        "out = self.llm.generate(p)",
        "with profiler:\n    out = self.llm.generate(p)",
        "if a:\n    out = None\nelif b:\n    # here\n    out = self.llm.generate(p)",
        "try:\n    pass\nfinally:\n    out = self.llm.generate(p)",
        "if self.llm.generate(p):\n    # kept\n    pass",
        "out = 1; out = self.llm.generate(p)",
        "def inner():\n    return self.llm.generate(p)",
        "match a:\n    case 1:\n        out = self.llm.generate(p)",
    ]
)


def indent(text: str, spaces: int) -> str:
    # Lines inside the triple-quoted filler may move: it is one expression either way.
    return "".join(" " * spaces + line if line.strip() else line for line in text.splitlines(keepends=True))


@settings(max_examples=300, deadline=None)
@given(before=st.lists(fillers, max_size=4), rollout=rollouts, behind=st.lists(fillers, max_size=4))
def test_nothing_outside_the_edited_statement_moves(before: list[str], rollout: str, behind: list[str]):
    body = "".join(indent(part + "\n", 8) for part in ["pass", *before, rollout, *behind])
    outside = "def helper():\n    return self.llm.generate(p)\n\n\n"
    other = "class Other:\n    llm = None  # theirs\n"
    text = f"{outside}class VLLMGeneration:\n    def generate(self, p):\n{body}\n\n{other}"
    try:
        ast.parse(text)
    except SyntaxError:
        return
    result = apply("live_adapter", "vllm_generation", "1.16.0", text)
    assert [outcome.reason for outcome in result.failed] == []
    again = apply("live_adapter", "vllm_generation", "1.16.0", result.text)
    assert [outcome.reason for outcome in again.failed] == ["rollout_call: expected 1, found 0"]
    assert comments(result.text) == comments(text)
    assert outside in result.text
    undone = WithoutHooks().visit(ast.parse(result.text))
    undone.body = [node for node in undone.body if not isinstance(node, ast.Import)]
    assert ast.dump(undone) == ast.dump(ast.parse(text))
