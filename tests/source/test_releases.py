import pytest

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
