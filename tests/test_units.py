"""Lengths and sizes as people write them."""

import pytest

from headprof.errors import UsageError
from headprof.utils.units import human_bytes, parse_lengths


@pytest.mark.parametrize(("text", "lengths"), [("1k,4k", (1024, 4096)), ("300", (300,)), (" 2K , 5", (2048, 5))])
def test_parse_lengths(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "k", "1.5k", "1k,,2k", "-3"])
def test_lengths_that_make_no_sense(text):
    with pytest.raises(UsageError, match="cannot be read"):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (58_700_000, "58.7 MB"), (2.5e12, "2.5e+03 GB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text
