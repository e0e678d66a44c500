import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from trlpatch.errors import UnparsableVersion
from trlpatch.source.releases import NEWEST_TESTED, ReleaseRange, format_release, parse_release


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("1.16.0", (1, 16, 0)),
        ("0.18", (0, 18, 0)),
        ("1.10.0.dev0", (1, 10, 0)),
        ("1.0.0rc1", (1, 0, 0)),
        ("1.9.2+cu129", (1, 9, 2)),
    ],
)
def test_parse(version: str, release: tuple[int, ...]):
    assert parse_release(version) == release


def test_what_trl_0_22_0_says_of_itself_is_no_version():
    with pytest.raises(UnparsableVersion, match=r"'unknown'.*pip install --force-reinstall trl"):
        parse_release("unknown")


def test_a_development_build_has_the_shape_of_its_release():
    assert parse_release("1.10.0.dev0") in ReleaseRange(">=1.10")
    assert parse_release("1.10.0.dev0") not in ReleaseRange("<1.10")


def test_a_patch_release_can_be_a_boundary():
    assert (0, 29, 0) in ReleaseRange(">=0.28,<0.29.1")
    assert (0, 29, 1) not in ReleaseRange(">=0.28,<0.29.1")


def test_format():
    assert format_release(NEWEST_TESTED) == "1.16.0"


@pytest.mark.parametrize("text", ["", ">=0.18,", "==1.0", ">=0.18 ,<1", "~=1.2"])
def test_a_range_of_another_form_is_refused(text: str):
    with pytest.raises(ValueError, match="expected bounds such as"):
        assert (1, 0, 0) in ReleaseRange(text)


@pytest.mark.parametrize("text", [">=0.18", "<0.25", ">=0.28,<0.29.1"])
@given(release=st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 9)))
def test_ranges_agree_with_packaging(text: str, release: tuple[int, int, int]):
    assert (release in ReleaseRange(text)) == SpecifierSet(text).contains(format_release(release))
