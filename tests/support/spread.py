"""Of tests with many cases some that are spread over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from zlib import crc32

SPREAD = 6
"""Cases of a test that are a spread of them."""


def spread(nodeids: Sequence[str]) -> set[int]:
    """Which of some cases are asked for: at most `SPREAD` of each test, always the same, in no order of its parameters.

    Args:
        nodeids: as pytest names them, `file::test[parameters]`.
    """
    cases: dict[str, list[int]] = defaultdict(list)
    for at, nodeid in enumerate(nodeids):
        cases[nodeid.partition("[")[0]].append(at)
    mixed = (sorted(each, key=lambda at: crc32(nodeids[at].encode())) for each in cases.values())
    return {at for each in mixed for at in each[:SPREAD]}
