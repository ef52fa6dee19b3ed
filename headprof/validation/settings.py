"""What a causal check asks, and which heads are silent meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from headprof.errors import UsageError

FAMILIES = ("top", "random", "bottom")
SILENT_IN = ("prompt", "question")
ABLATIONS = ("zero", "mean")
MIN_CONTEXTS = 4
"""Fewest contexts from which an interval is made."""


@dataclass(frozen=True)
class ValidationSettings:
    """What is asked, and which heads are silent meanwhile.

    Attributes:
        top: number of heads that the verdict is about.
        counts: other numbers of heads for the curve; those above half of the model's heads are left out.
        probes: number of probes, of all kinds together.
        length: tokens of a prompt.
        pack: probes that share a context; `None` to choose it from the length.
        draws: how often heads are picked at random.
        seed: of the probes, the picks and the intervals.
        where: `"prompt"`: heads are silent in the whole forward pass; `"question"`: from the end of the context on.
        ablate: what a silent head puts out: `"zero"`, or `"mean"`, its own mean over the context (`MeanOutputs`).
        probe_families: names of the needle families to ask, as for `ProbeSettings`; `None` for the usual ones.
    """

    top: int = 10
    counts: tuple[int, ...] = (1, 2, 5, 10, 20)
    probes: int = 120
    length: int = 1024
    pack: int | None = None
    draws: int = 3
    seed: int = 2000
    where: str = "prompt"
    ablate: str = "zero"
    probe_families: tuple[str, ...] | None = None

    def check(self, num_heads: int | None = None) -> None:
        """Complain about what cannot be done, before anything is loaded or run; `num_heads` counts all layers.

        Raises:
            UsageError: with the mend.
        """
        if self.where not in SILENT_IN:
            raise UsageError(f"Heads cannot be silent in the {self.where!r}: choose {' or '.join(SILENT_IN)}.")
        if self.ablate not in ABLATIONS:
            raise UsageError(f"Heads cannot be ablated by {self.ablate!r}: choose {' or '.join(ABLATIONS)}.")
        for name, value in (("top heads", self.top), ("draws", self.draws), *(("heads", k) for k in self.counts)):
            if value < 1:
                raise UsageError(f"A profile cannot be checked with {value} {name}: give at least 1.")
        if num_heads is not None and self.top > num_heads // 2:
            raise UsageError(
                f"Silencing {self.top} of {num_heads} heads leaves too few others to compare them with: give a --top "
                f"of at most {num_heads // 2}."
            )
        if self.pack:
            self.check_contexts(-(-self.probes // self.pack))

    def check_contexts(self, contexts: int) -> None:
        """
        Raises:
            UsageError: there are too few contexts for an interval.
        """
        if contexts < MIN_CONTEXTS:
            raise UsageError(
                f"{self.probes} probes in fewer than {MIN_CONTEXTS} contexts say too little: ask for more --probes, "
                "or a smaller --pack."
            )

    def all_counts(self, num_heads: int) -> list[int]:
        """Numbers of heads to silence, ascending, `top` among them."""
        return sorted({count for count in self.counts if count <= num_heads // 2} | {self.top})
