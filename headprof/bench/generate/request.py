"""What `bench generate` is asked to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headprof.bench.generate.full_cache import FULL_STEPS
from headprof.bench.measure import require_at_least
from headprof.compression.decode_steps import check_step
from headprof.compression.kernels.backends import check_backend
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.table import deal_options, find_method
from headprof.errors import UsageError
from headprof.profile.surrogate import Surrogate


@dataclass(frozen=True)
class BenchRequest:
    """Methods times budgets times backends times steps times prompt lengths, and the full caches at each length.

    Attributes:
        methods: names in the table of methods; `full` adds nothing, since `full` below says which full caches are run.
        budgets: as the command line takes them.
        lengths: prompt lengths in tokens.
        new_tokens: tokens to decode after the prompt.
        repeats: timed runs of each case.
        batch: sequences decoded together.
        backends: attentions over the compressed cache, names in `BACKENDS` or `auto`.
        steps: how a decode step over the compressed cache is run, as for `headprof.compressed`.
        prefill_chunk: as for `headprof.compressed`; the full cache's prompt is read as Transformers does.
        full: which full caches are run too, with the better of which the others are compared, names in `FULL_STEPS`;
            `()` for none, `None` for both on a CUDA device and the eager one elsewhere.
        warm_up: whether each case runs once before its time is taken; what is compiled does in any case.
        seed: of the random prompts.
        options: parameters of the methods, `None` for their defaults; a method without a parameter ignores it.
        decoding: `decode_budget` and `buffer`, as for `headprof.make_plan`; what is missing keeps its default.
        surrogate: of the model, for methods that judge rows by one.
        tokenizer: the model's, for methods that judge rows by what tokens they are.
    """

    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    new_tokens: int = 32
    repeats: int = 3
    batch: int = 1
    backends: tuple[str, ...] = ("auto",)
    steps: tuple[str, ...] = ("auto",)
    prefill_chunk: int | None = None
    full: tuple[str, ...] | None = None
    warm_up: bool = True
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    surrogate: Surrogate | None = None
    tokenizer: Any = None

    def check(self) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: an unknown method, backend or step, a budget that cannot be read, or a number that is too small.
        """
        deal_options(self.methods, self.options)
        for budget in self.budgets:
            Budget.parse(budget)
        for backend in self.backends:
            check_backend(backend)
        for step in self.steps:
            check_step(step)
        if unknown := [step for step in self.full or () if step not in FULL_STEPS]:
            raise UsageError(f"There is no {unknown[0]!r} for --full: choose one of {', '.join(FULL_STEPS)}.")
        for what in ("budgets", "backends", "steps"):
            if not getattr(self, what):
                raise UsageError(f"There is nothing to run without {what}: name at least one with --{what}.")
        require_at_least(1, lengths=self.lengths, repeats=self.repeats, batch=self.batch)
        require_at_least(2, new_tokens=self.new_tokens)
        if self.prefill_chunk is not None:
            require_at_least(1, prefill_chunk=self.prefill_chunk)

    @property
    def needs_surrogate(self) -> bool:
        """Whether one of the methods judges rows by a surrogate."""
        return any(find_method(name).importance.needs_surrogate for name in self.methods)

    @property
    def needs_profile(self) -> bool:
        """Whether one of the methods spends its budget by a head profile."""
        return any(find_method(name).budget.profile_scores is not None for name in self.methods)
