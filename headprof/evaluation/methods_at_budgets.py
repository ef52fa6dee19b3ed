"""What is compared: methods at budgets."""

from __future__ import annotations

from dataclasses import dataclass

from headprof.compression.plan import CompressionPlan


@dataclass(frozen=True)
class Candidate:
    """A method at a budget, ready to run; `budget` is the text the user gave, empty for the full cache."""

    method: str
    budget: str
    plan: CompressionPlan
