"""Compressed caches in EleutherAI's lm-evaluation-harness: the model type `headprof`, registered on import.

    headprof lm-eval --model headprof --model_args pretrained=DIR,method=headkv-r2,budget=64 --tasks hellaswag

What is measured differs by the kind of request:

- `generate_until`: the prompt is compressed right after its prefill, and the answer is generated over what is left.
- `loglikelihood` (multiple choice too): the harness's own models read context and continuation in one forward pass, in
  which no cache is ever used, compressed or not. Here the context without its last token is read and compressed first;
  that token and the continuation are then fed over what is left, so that each token of the continuation depends on it.
  A context that fits the budget is scored as the harness does it.
- `loglikelihood_rolling`: the harness cuts a text into windows of the model's length, and all but the last of a long
  text have a context of a single token. There is hardly anything to compress in them, so the figures are almost the
  full cache's: `headprof eval --tasks perplexity` measures what these would be expected to.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.decode_steps import check_step
from headprof.compression.kernels.backends import check_backend
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.table import METHODS, find_method
from headprof.compression.plan import BUFFER
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import ModelError, UsageError
from headprof.models.checkpoint import no_progress
from headprof.models.embedded import EMBEDDED
from headprof.models.finding import find_model, model_name
from headprof.models.shape import HeadShape
from headprof.profile.finding import find_profile
from headprof.profile.finding_surrogate import find_surrogate
from headprof.profile.head_profile import HeadProfile
from headprof.profile.surrogate import Surrogate

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lm_eval":
        raise
    raise UsageError("The lm-evaluation-harness is not here: run `pip install 'headprof[lm-eval]'`.") from error

logger = logging.getLogger(__name__)

Request = tuple["tuple[str, str] | None", list[int], list[int]]
"""What the harness caches the answer by, if at all; the context's tokens, and the continuation's."""
Answer = tuple[float, bool]
"""Log-probability of a continuation, in nats, and whether greedy decoding would have written it."""

# All parameters of any method: one that the chosen method lacks is an error, not an argument for `HFLM`.
_SETTINGS = {name for method in METHODS.values() for name in method.options()}


@register_model("headprof")
class HeadprofLM(HFLM):
    """The harness's Hugging Face model, with a compressed cache.

    Args:
        pretrained: hub id or folder, by default the embedded model; or a model in memory.
        method: a name in `METHODS`; parameters may follow (`ems:mass=false`) or be given as arguments of their own.
        budget, decode_budget, buffer: as for `headprof.make_plan`; a buffer of 0 is none.
        profile: the head profile or its file; by default the one that is found for the model.
        surrogate: the surrogate or its file, for methods that judge rows by one; by default the one that is found.
        attention_backend, prefill_chunk, step: the `backend`, `prefill_chunk` and `step` of `headprof.compressed`.
        options: parameters of the method's parts, such as `window` or `pool_factor`; all others are `HFLM`'s.

    Raises:
        UsageError: no such method, parameter or attention backend, or the budget cannot be read or met.
        ProfileError: the method needs a profile, and there is none or it is for another model.
        ModelError: the model is no decoder.
    """

    def __init__(
        self,
        pretrained: Any = EMBEDDED,
        *,
        method: str = "headkv-r2",
        budget: int | str | Budget = 64,
        profile: str | Path | HeadProfile | None = None,
        surrogate: str | Path | Surrogate | None = None,
        decode_budget: int | str | Budget | None = None,
        buffer: int | None = BUFFER,
        attention_backend: str = "auto",
        prefill_chunk: int | None = None,
        step: str = "auto",
        **options: Any,
    ):
        settings = {name: options.pop(name) for name in _SETTINGS & options.keys()}
        check_backend(attention_backend)
        check_step(step)
        given = pretrained if isinstance(pretrained, str) else pretrained.name_or_path
        name = model_name(given)
        chosen = find_method(method, **settings)  # complaints come before the weights
        if not isinstance(profile, HeadProfile):
            needed = chosen.budget.profile_scores is not None
            profile = find_profile(name, Path(profile) if profile else None, given) if needed else None
        if not isinstance(surrogate, Surrogate):
            needed = chosen.importance.needs_surrogate
            beside = profile if isinstance(profile, Path) else None
            file = find_surrogate(name, Path(surrogate) if surrogate else None, given, beside) if needed else None
            surrogate = None if file is None else Surrogate.load(file, given)
        if isinstance(pretrained, str) and name == EMBEDDED:
            pretrained = find_model(pretrained, no_progress).location

        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ModelError(
                f"{name} is no decoder, so its cache cannot be compressed: choose a causal language model."
            )
        if isinstance(profile, Path):
            profile = HeadProfile.load(profile, HeadShape.from_config(self.model.config), model_name=given)
        self.plan = make_plan(
            self.model,
            profile,
            method=method,
            budget=budget,
            decode_budget=decode_budget,
            buffer=buffer or None,
            surrogate=surrogate,
            tokenizer=self.tokenizer,
            **settings,
        )
        self.plan.check(self.max_length)
        reading = {"backend": attention_backend, "prefill_chunk": prefill_chunk, "step": step}
        self._attention_options: dict[str, Any] = reading

    def get_model_info(self) -> dict:
        """What the harness writes beside the results, with the profile that the budgets came from."""
        return super().get_model_info() | {"headprof_profile_digest": self.plan.profile_digest}

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """As the harness's, over compressed prompts; a budget that is too small for one is an error before any work."""
        for request in requests:
            self.plan.check(max(1, len(self.tok_encode(request.args[0]))))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any):
        if not self.plan.method.keeps_everything:
            generation_kwargs["past_key_values"] = HeadCache(self.plan)
        with self._attending():
            return super()._model_generate(context, max_length=max_length, stop=stop, **generation_kwargs)

    def _attending(self) -> AbstractContextManager[None]:
        return attending_ragged(self.model, **self._attention_options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        plain: list[int] = []  # numbers of requests, as in the groups of those that share a context
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        num_cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            # What the harness cuts off, so that context and continuation fit but for the last token, which is not fed.
            cut = max(0, len(context) + len(continuation) - (self.max_length + 1))
            prefix = tuple(context[cut:-1])
            (groups[prefix] if self._loses(len(prefix)) else plain).append(number)
            num_cut += cut > 0
        if num_cut:
            logger.warning("%d contexts lose their beginnings: the model takes %d tokens.", num_cut, self.max_length)
        answers: dict[int, Answer] = {}
        if plain:
            own = super()._loglikelihood_tokens([requests[n] for n in plain], disable_tqdm, override_bs)
            answers.update(zip(plain, own, strict=True))
        answers.update(self._compressed_loglikelihoods(requests, groups, disable_tqdm))
        return [answers[number] for number in range(len(requests))]

    def _loses(self, prompt_length: int) -> bool:
        """Whether some head cannot keep all of a prompt of so many tokens."""
        return prompt_length > 0 and self.plan.loses(prompt_length)

    def _compressed_loglikelihoods(
        self, requests: Sequence[Request], groups: dict[tuple[int, ...], list[int]], disable_tqdm: bool
    ) -> dict[int, Answer]:
        """Answers by the request's number.

        Args:
            requests: all of them.
            groups: numbers of those that share what is to be compressed, by that: their contexts but the last token.
            disable_tqdm: show no progress.
        """
        answers: dict[int, Answer] = {}
        total = sum(len(numbers) for numbers in groups.values())
        hidden = disable_tqdm or self.rank != 0 or not total
        with tqdm(total=total, disable=hidden, desc="Running loglikelihood requests") as bar, self._attending():
            for prefix in sorted(groups, key=len, reverse=True):  # what does not fit in memory shows at once
                numbers = groups[prefix]
                found = self._score(prefix, [(requests[n][1][-1], requests[n][2]) for n in numbers])
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
                    if requests[number][0] is not None:  # rolling windows, which the harness puts together, have no key
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update()
        return answers

    @torch.no_grad()
    def _score(self, prefix: Sequence[int], endings: Sequence[tuple[int, list[int]]]) -> list[Answer]:
        """Read and compress `prefix` once, then feed each context's last token and its continuation over a copy."""
        size = int(self.batch_size) if str(self.batch_size).isdecimal() else self.max_batch_size or 1
        # A continuation is kept whole, however long, as the tokens of one forward pass see each other.
        cache = HeadCache(replace(self.plan, buffer=None))
        answers = []
        autocast = {"dtype": self.mixed_precision_dtype, "enabled": self.mixed_precision_dtype is not None}
        with torch.autocast(self.device.type, **autocast):
            prefill(self.model, torch.tensor([prefix], device=self.device), cache)
            for start in range(0, len(endings), size):
                batch = endings[start : start + size]
                fed = [torch.tensor([last, *continuation[:-1]]) for last, continuation in batch]
                ids = pad_sequence(fed, batch_first=True).to(self.device)  # on the right, which no token before sees
                copies = stack_caches([cache] * len(batch))
                logits = self.model(ids, past_key_values=copies, use_cache=True).logits
                answers += [self._answer(own, ending[1]) for own, ending in zip(logits, batch, strict=True)]
        return answers

    def _answer(self, logits: torch.Tensor, continuation: Sequence[int]) -> Answer:
        """How likely a continuation of `N` tokens is under logits `[N or more, vocabulary]`."""
        tokens = torch.tensor(continuation, device=logits.device)
        log_probs = log_softmax(logits[: len(tokens)], dim=-1, dtype=self.softmax_dtype)
        chosen = log_probs.gather(1, tokens[:, None])
        return float(chosen.sum()), bool((log_probs.argmax(dim=-1) == tokens).all())


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness's own command line on these arguments; it knows the model type `headprof`."""
    from lm_eval.__main__ import cli_evaluate

    given, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = given
