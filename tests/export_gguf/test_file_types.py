from __future__ import annotations

import pytest

from trlpatch.errors import CannotExport
from trlpatch.export.gguf.file_types import file_types


def names(methods: object, dtype: str = "bfloat16") -> list[str]:
    return [one.name for one in file_types(methods, dtype=dtype)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("q8_0", "q8_0"),
        ("Q4_K_M", "q4_k_m"),
        ("fast_quantized", "q8_0"),
        ("quantized", "q4_k_m"),
        ("not_quantized", "bf16"),
        ("q4_k", "q4_k_m"),
        ("q5_k", "q5_k_m"),
        (" q4-k-m ", "q4_k_m"),
        (None, "q8_0"),
    ],
)
def test_names_and_aliases(method: str | None, wanted: str) -> None:
    assert names(method) == [wanted]


def test_not_quantized_is_the_sixteen_bits_of_the_checkpoint() -> None:
    assert names("not_quantized", "float16") == ["f16"]
    assert names("not_quantized", "float32") == ["f16"]


def test_several_types_each_once_in_order() -> None:
    assert names(["q4_k_m", "f16", "quantized"]) == ["q4_k_m", "f16"]
    assert names("Q4_K_M, f16") == ["q4_k_m", "f16"]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("q4km", "did you mean 'q4_k_m'"),
        ("fast", "expected one of f32, f16"),
        ("iq2_xxs", "importance matrix"),
        ("q2_k_s", "importance matrix"),
        (4, "quantization_method=4"),
        ([], "quantization_method is empty"),
        ("q8_0,", "quantization_method=''"),
    ],
)
def test_what_is_no_type_is_an_error_with_the_list(method: object, says: str) -> None:
    with pytest.raises(CannotExport, match="quantization_method") as caught:
        names(method if isinstance(method, str | list) else [method])
    assert says in str(caught.value)


def test_what_is_no_list_is_an_error() -> None:
    with pytest.raises(CannotExport, match="quantization_method=8"):
        names(8)
