"""This project's own wording of the benchmarks' prompts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from headprof.utils.assets import asset_dir


@cache
def own_prompts(benchmark: str) -> dict[str, Any]:
    """What `data/benchmarks/NAME.json` holds, by task."""
    return json.loads((asset_dir("data") / "benchmarks" / f"{benchmark}.json").read_text(encoding="utf-8"))
