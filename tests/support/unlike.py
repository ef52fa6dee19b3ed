"""Methods of which no two are made of the same kinds of parts."""

from headprof.compression.methods.method import Method
from headprof.compression.methods.quantisation import Int4, Int8
from headprof.compression.methods.table import METHODS


def _kinds(method: Method) -> tuple[type, ...]:
    parts = (method.importance, method.budget, method.reduction)
    held = type(method.representation)
    return (*map(type, parts), Int4 if held is Int8 else held)


_NAMES = sorted(METHODS, key=lambda name: name not in ("headkv-r2", "headkv-r2-int4"))
UNLIKE = [name for name in {_kinds(METHODS[name]): name for name in reversed(_NAMES)}.values() if name != "full"]
"""One for each combination of importance, budget policy, reduction and representation, in 8 bits as in 4."""
