"""Which contexts share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from headprof.probes.build import ProbeBuilder
from headprof.scoring.prober import Prober, ProbeResult
from headprof.utils.team import Team


@dataclass(frozen=True)
class Passes:
    """How the contexts of a run are asked about.

    Attributes:
        builder: makes them.
        prober: asks.
        most: of each length, how many contexts share a pass at most.
        processes: that share the work.
    """

    builder: ProbeBuilder
    prober: Prober
    most: dict[int, int]
    processes: int

    @classmethod
    def settled(cls, builder: ProbeBuilder, prober: Prober, team: Team, together: int | None) -> Passes:
        """As many contexts together as every process of the team has room for, or as many as are asked for."""
        most = {
            length: min(team.gather(together or prober.most_together(length))) for length in builder.settings.lengths
        }
        return cls(builder, prober, most, team.size)

    @property
    def enough(self) -> int:
        """Groups of contexts that give every process a full pass of each length; one where passes are not shared."""
        largest = max(self.most.values())
        shared = largest > 1 and self.builder.group_size == 1
        return largest * len(self.most) * self.processes if shared else 1

    def of(self, groups: Sequence[range]) -> list[Sequence[int]]:
        """Contexts that are asked about together: some of one length, or a group whose members begin alike.

        No process is left without any that there are enough for.
        """
        if self.builder.group_size > 1:
            return list(groups)
        by_length: dict[int, list[int]] = {}
        for context in chain.from_iterable(groups):
            by_length.setdefault(self.builder.length(context), []).append(context)
        parts: list[Sequence[int]] = []
        for length, contexts in by_length.items():
            size = min(self.most[length], -(-len(contexts) // self.processes))
            parts += [contexts[start : start + size] for start in range(0, len(contexts), size)]
        return sorted(parts, key=lambda part: part[0])

    def ask(self, contexts: Sequence[int]) -> dict[int, list[ProbeResult]]:
        """The results of each context."""
        built = map(self.builder.context, contexts)
        if self.builder.group_size > 1:
            return {each.index: self.prober.run(each, anew=each.index == contexts[0]) for each in built}
        return dict(zip(contexts, self.prober.run_together(list(built)), strict=True))
