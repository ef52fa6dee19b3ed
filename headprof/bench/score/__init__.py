"""Scoring as headprof does it beside the papers' procedure, in one run."""

from headprof.bench.score.agreement import Agreement
from headprof.bench.score.memory_fit import MemoryLine, limit_length, memory_slope
from headprof.bench.score.request import PACKED, PREFILLS, SIDES, TOGETHER, UNPACKED, ScoreBenchRequest
from headprof.bench.score.run import ScoreBenchResult, run_score_bench
from headprof.bench.score.sides import SideResult

__all__ = [
    "PACKED",
    "PREFILLS",
    "SIDES",
    "TOGETHER",
    "UNPACKED",
    "Agreement",
    "MemoryLine",
    "ScoreBenchRequest",
    "ScoreBenchResult",
    "SideResult",
    "limit_length",
    "memory_slope",
    "run_score_bench",
]
