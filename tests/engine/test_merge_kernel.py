"""The Triton kernels behind weights in place, merge and sums, in Triton's interpreter; tests/gpu has them compiled."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.engine.interpreted import INTERPRETED, inside, outside, run_interpreted  # noqa: E402
from trlpatch.engine.weights_in_place import fused_merge, merge  # noqa: E402
from trlpatch.engine.weights_in_place.plan import Plan, structure_of  # noqa: E402
from trlpatch.engine.weights_in_place.writer import WeightsWriter  # noqa: E402
from trlpatch.options import MERGE_KERNEL  # noqa: E402
from trlpatch.policy import bit_sums  # noqa: E402
from trlpatch.policy.content_mark import ContentMark  # noqa: E402
from trlpatch.policy.policy_weights import PolicyWeight, Term  # noqa: E402

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


@outside
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="would be possible")
def test_it_is_on_where_a_gpu_is_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MERGE_KERNEL, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fused_merge, "kernel_module", lambda: object())
    assert fused_merge.wanted(torch.device("cuda"))
    assert not fused_merge.wanted(CPU)
    monkeypatch.setenv(MERGE_KERNEL, "0")
    assert not fused_merge.wanted(torch.device("cuda"))


def weight(shape: tuple[int, int], rank: int, *, base: Any, factor: Any, seed: int = 0) -> PolicyWeight:
    """Integers and halves: every sum is exact, and what is left to round is known."""
    generator = torch.Generator().manual_seed(seed)
    one, left, right = (
        torch.randint(-8, 9, size, generator=generator) / 2 for size in (shape, (shape[0], rank), (rank, shape[1]))
    )
    return PolicyWeight(f"w{seed}", one.to(base), (Term(left.to(factor), right.to(factor), 0.5),))


@inside
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 64])
@pytest.mark.parametrize(("base", "factor"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_it_computes_what_torch_does(rank: int, base: Any, factor: Any) -> None:
    """Into float32: the interpreter cuts off where a device rounds to bfloat16."""
    shapes = [(64, 128), (70, 130), (1, 1), (130, 40), (130, 144)]
    weights = [weight(shape, rank, base=base, factor=factor, seed=seed) for seed, shape in enumerate(shapes)]
    fused = [torch.full(one.base.shape, float("nan")) for one in weights]
    plain = [torch.empty(one.base.shape) for one in weights]
    pairs = list(zip(weights, fused, strict=True))
    assert all(fused_merge.mergeable(*pair) for pair in pairs)
    fused_merge.write(pairs)
    for one, right in zip(weights, plain, strict=True):
        merge.write(one, right)
    assert all(torch.equal(found, right) for found, right in zip(fused, plain, strict=True))


@inside
def test_it_writes_rows_of_a_fused_parameter_and_nothing_beside_them() -> None:
    weights = [weight((40, 50), 16, base=torch.bfloat16, factor=torch.float32, seed=seed) for seed in range(2)]
    whole = torch.full((120, 50), -1.0, dtype=torch.float16)
    fused_merge.write([(weights[0], whole[:40]), (weights[1], whole[40:80])])
    for one, found in zip(weights, whole.split(40), strict=False):
        assert torch.equal(found, merge.merged(one, slice(None), CPU).half())
    assert (whole[80:] == -1).all()


@pytest.mark.parametrize(
    ("change", "rank"),
    [
        (lambda one: one, fused_merge.LARGEST_RANK + 1),
        (lambda one: PolicyWeight("w", one.base, one.terms * 2), 8),
        (lambda one: PolicyWeight("w", one.base, one.terms, torch.ones(16)), 8),
        (lambda one: PolicyWeight("w", one.base, (Term(one.terms[0].left.half(), one.terms[0].right, 1.0),)), 8),
        (lambda one: PolicyWeight("w", one.base.T.contiguous().T, one.terms), 8),
        (lambda one: PolicyWeight("w", one.base), 8),
    ],
    ids=["rank", "two adapters", "DoRA", "dtypes", "strides", "no adapter"],
)
def test_what_it_does_not_do_is_left_to_torch(change: Any, rank: int) -> None:
    one = change(weight((16, 24), rank, base=torch.float32, factor=torch.float32))
    assert not fused_merge.mergeable(one, torch.empty(16, 24))


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_see_a_change_anywhere_and_changes_that_cancel_out(dtype: Any) -> None:
    module = bit_sums.kernel_module()
    a_program = module.BLOCK * module.ROUNDS
    sizes = [8, a_program * 2, a_program * 3 + 24]
    tensors = [torch.arange(1, size + 1, dtype=torch.float32).to(dtype) for size in sizes]
    assert bit_sums.wanted(CPU)
    assert all(bit_sums.readable_by_kernel(tensor) for tensor in tensors)
    before = bit_sums.bit_sums(tensors)
    assert before == bit_sums.bit_sums(tensors)
    for tensor in tensors:
        for place in (0, 7, tensor.numel() // 2, tensor.numel() - 1):
            kept = tensor[place].clone()
            tensor[place] = -kept
            assert before != bit_sums.bit_sums(tensors), (tensor.numel(), place)
            tensor[place] = kept
        for one, two in ((0, 2), (0, tensor.numel() - 2)):
            tensor[[one, two]] = tensor[[two, one]]
            assert before != bit_sums.bit_sums(tensors), "elements that changed places"
            tensor[[one, two]] = tensor[[two, one]]
    assert before == bit_sums.bit_sums(tensors)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_summed_is_copied_on_the_way(dtype: Any) -> None:
    module = bit_sums.kernel_module()
    sizes = [8, module.BLOCK * module.ROUNDS * 2, module.BLOCK + 24]
    tensors = [torch.arange(1, size + 1, dtype=torch.float32).to(dtype) for size in sizes]
    whole = torch.full((sizes[0] + 16,), -1.0, dtype=dtype)
    places = [whole[: sizes[0]], torch.empty(sizes[1], dtype=torch.float64), torch.empty(sizes[2], dtype=dtype)]
    copies = bit_sums.copies_of(list(zip(tensors, places, strict=True)))
    assert set(copies) == {id(tensors[0]), id(tensors[2])}, "one place is of another dtype"
    assert bit_sums.bit_sums(tensors, [copies.get(id(one)) for one in tensors]) == bit_sums.bit_sums(tensors)
    assert torch.equal(places[0], tensors[0])
    assert torch.equal(places[2], tensors[2])
    assert (whole[sizes[0] :] == -1).all(), "beside its place"


@inside
def test_what_was_promised_to_be_copied_is_copied_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, place = torch.arange(8.0), torch.zeros(8)
    copies = bit_sums.copies_of([(tensor, place)])
    assert set(copies) == {id(tensor)}
    monkeypatch.setenv(MERGE_KERNEL, "0")
    bit_sums.bit_sums([tensor], [place])
    assert torch.equal(place, tensor)


@inside
def test_tied_weights_are_written_into_both_of_an_engines_places() -> None:
    tied, alone = torch.nn.Parameter(torch.arange(1.0, 9.0)), torch.nn.Parameter(torch.arange(8.0))
    weights = [PolicyWeight("embed", tied), PolicyWeight("alone", alone), PolicyWeight("head", tied)]
    places = [torch.zeros(8) for _ in weights]
    plan = Plan(structure_of(weights), list(places), [])
    copies = WeightsWriter.copies(weights, plan)
    assert {key: id(place) for key, place in copies.items()} == {id(tied): id(places[0]), id(alone): id(places[1])}
    mark = ContentMark(weights, copies=copies)
    writer = WeightsWriter(None)  # type: ignore[arg-type]  # which is asked only of plans that are not proven
    writer.write(torch.nn.Linear(1, 1), weights, plan, unproven=False, copied=copies)
    assert all(torch.equal(place, one.base) for place, one in zip(places, weights, strict=True))
    assert mark == ContentMark(weights)


@inside
def test_a_model_that_is_trained_whole_is_written_while_it_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from tests.fakes.fused import LoadingStub, assert_holds, idle_engine_over
    from tests.fakes.models import base_model
    from trlpatch.engine.weights_publisher import holds_policy, write_policy

    model = base_model()
    module = LoadingStub(model, lora=False)
    engine = idle_engine_over(module)
    assert write_policy(model, engine) is None
    by_torch: list[int] = []
    monkeypatch.setattr(merge, "copy_all", lambda pairs: by_torch.append(len(pairs)))
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5).add_(step)
        assert not holds_policy(model, engine)
        assert write_policy(model, engine) is None
        assert_holds(module, model)
        assert holds_policy(model, engine)
    assert by_torch == [0, 0]


@inside
def test_sums_leave_to_torch_what_no_vector_reads() -> None:
    odd = torch.rand(1001)
    assert not any(bit_sums.readable_by_kernel(one) for one in (odd, odd[1:1001], odd[:1000:2]))
    before = bit_sums.bit_sums([odd, torch.zeros(16)])
    odd[-1] += 1
    assert before != bit_sums.bit_sums([odd, torch.zeros(16)])
