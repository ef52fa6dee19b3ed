"""The one way from texts to token ids: the frame that goes around a document and a question, and exact token spans.

A tokenizer's chat template is the frame where there is one. Without, an instruction stands before the document, and
"Question: ..." and "Answer:" after it. What comes after a document is encoded apart from it, so that a document is read
once and asked about many times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from headprof.errors import ProbeError, UsageError
from headprof.models.chat_template import between_turns, parts_with_system, template_parts, turn_parts
from headprof.models.encoded import EncodedContext, EncodedQuestion, located
from headprof.models.text_encoder import Characters, TextEncoder

GAP = "\n\n"
"""Between a document and a question about it."""

INSTRUCTION = "Read this text and answer the question that follows it."

OBSERVATION = (
    "Who, what, where, when, which, how many, how much? Give the name, the place, the number, the code, the date."
)
"""What stands in for the question while a document is compressed, when the question is not known yet."""

REPETITION = "Repeat the previous context exactly."
"""What a document's own repetition follows."""

RESUMPTION = "Repeat the part of the previous context that begins with:"
"""What a later part of the repetition follows, after the tokens before it."""

_CUE = 8
"""How many of these there are."""

_QUESTION, _ANSWER = "Question: ", "\nAnswer:"
_COLONS = (":", "：")


class PromptEncoder:
    """Turns contexts, documents, questions and whole prompts into token ids.

    The context of probes comes with `encode_context` and `encode_question`, a user's document with `document_ids` and
    `question_ids`; a chat model is given an instruction before the former only. A prompt that is whole by itself comes
    with `prompt_ids`, or in two parts with `start_ids` and `encode_end`, a conversation with `chat_ids`. Only the chat
    template's own control tokens become such: one that stands in a text is encoded as the characters it is written
    with.

    Args:
        tokenizer: the model's.
        raw: put nothing around texts, neither a chat template nor what else takes its place.
        spans: whether contexts and questions of probes are to be encoded, with exact spans.
        system: a system message, in the place of the chat template's own if it has one; `None` to leave that.

    Attributes:
        texts: encodes single texts.

    Raises:
        ModelError: the chat template does not repeat the user's text.
        UsageError: there is no place for a system message.
        ProbeError: spans are wanted, but the tokenizer is not a fast one, so that it gives no character offsets.
    """

    def __init__(self, tokenizer: Any, *, raw: bool = False, spans: bool = False, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        if spans and not getattr(tokenizer, "is_fast", False):
            raise ProbeError(
                "Probes need a fast tokenizer, since exact spans come from its character offsets; "
                "load this one with use_fast=True or convert it to tokenizer.json."
            )
        self._templated = not raw and bool(getattr(tokenizer, "chat_template", None))
        self._plain = not raw and not self._templated
        self._before, self._after = template_parts(tokenizer) if self._templated else ("", "")
        self._system: Characters | None = None  # where it stands in what is before the user's text
        if system is not None:
            first, between, self._after = parts_with_system(tokenizer, self._templated)
            self._before, self._system = f"{first}{system}{between}", (len(first), len(first) + len(system))
        source = str(tokenizer.chat_template) if self._templated else ""  # which may name tokens of other turns
        written = "".join(self._before[start:stop] for start, stop in self._template_in(self._before))
        self.texts = TextEncoder(tokenizer, written + self._after + source)
        self._first = [] if self._templated else _first_ids(tokenizer)

    def encode_context(self, body: str) -> EncodedContext:
        """Token ids of everything before the question of a probe."""
        return self._started(f"{INSTRUCTION}{GAP}", f"{body}{GAP}")

    def encode_question(self, question: str, reply: str, answer: str) -> EncodedQuestion:
        """Token ids that follow the context of a probe; every question about one context continues the same ids.

        A blank before the answer belongs to the answer if the tokenizer makes one token of it and the first word.
        """
        return self._encode_together(GAP, question, reply, answer)

    def document_ids(self, document: str) -> list[int]:
        """Token ids of everything before the question about a document."""
        instruction = f"{INSTRUCTION}{GAP}" if self._plain else ""
        return self.start_ids(f"{instruction}{document}{GAP}")

    def encode_document(self, document: str) -> EncodedContext:
        """As `document_ids`, and where each token stands.

        Raises:
            UsageError: the tokenizer does not say.
        """
        self.texts.require_offsets()
        return self._started(f"{INSTRUCTION}{GAP}" if self._plain else "", f"{document}{GAP}")

    def encode_prompt(self, prompt: str) -> EncodedContext:
        """As `prompt_ids`, and where each token stands.

        Raises:
            UsageError: the tokenizer does not say.
        """
        self.texts.require_offsets()
        return self._started("", prompt, self._after)

    def encode_asked(self, question: str) -> EncodedContext:
        """As `question_ids`, and where in the question each token stands.

        Raises:
            UsageError: the tokenizer does not say.
        """
        self.texts.require_offsets()
        before, question, after = self._asked(question)
        return self._located(GAP if self._plain else "", before, f"{question}{after}", template=len(after))

    def question_ids(self, question: str) -> list[int]:
        """Token ids that follow a document, up to where the model answers."""
        if self._plain and self.texts.gives_offsets:
            return [*self._encode_together(GAP, question, "", "").asked]
        return self._framed(*self._asked(question))

    def reply_ids(self) -> list[int]:
        """Token ids between the user's text and the model's reply; none if the template has but white space there."""
        return self._framed("", "", self._after) if self._after.strip() else []

    def next_turn_ids(self) -> list[int]:
        """Token ids between what the model has said and the user's next question, which `question_ids` encodes.

        Raises:
            ModelError: the chat template does not repeat the texts of several turns.
        """
        between = between_turns(self._tokenizer) if self._templated else GAP
        return self._framed(between, "")

    def repetition_ids(self, document_ids: Sequence[int]) -> list[int]:
        """Token ids that follow a document when the model repeats it: the demand, then the document without its frame.

        Args:
            document_ids: of the document, as `document_ids` or `encode_context` gives them.
        """
        return [*self.question_ids(REPETITION), *self.repeated_ids(document_ids)]

    def repetition_parts(self, document_ids: Sequence[int], longest: int) -> list[list[int]]:
        """Token ids of a document's repetition in parts of about one length, each with a demand of its own before it.

        The first is demanded as the whole is; a later one by the tokens before it, which are no part of it.

        Args:
            document_ids: as for `repetition_ids`, which this gives where one part will do.
            longest: most tokens of a part, the demand not counted.
        """
        repeated = self.repeated_ids(document_ids)
        count = max(1, -(-len(repeated) // longest))
        ends = [len(repeated) * number // count for number in range(count + 1)]
        parts = [[*self.question_ids(REPETITION), *repeated[: ends[1]]]]
        for start, stop in pairwise(ends[1:]):
            demand = self._resumption_ids(repeated[max(0, start - _CUE) : start])
            parts.append([*demand, *repeated[start:stop]])
        return parts

    def demand_lengths(self) -> tuple[int, int]:
        """Most tokens of the demand before the first part of a repetition, and of those before later ones."""
        return len(self.question_ids(REPETITION)), len(self._resumption_ids([])) + _CUE

    def _resumption_ids(self, cue: Sequence[int]) -> list[int]:
        before, _, after = self._asked("")
        return [*self._framed(f"{before}{RESUMPTION}", ""), *cue, *self._framed("", "", after)]

    def repeated_ids(self, document_ids: Sequence[int]) -> Sequence[int]:
        """What of a document is not the beginning of the chat template, or the instruction."""
        frame = self.start_ids(f"{INSTRUCTION}{GAP}" if self._plain else "")
        pairs = zip(frame, document_ids, strict=False)
        return document_ids[next((number for number, (own, its) in enumerate(pairs) if own != its), len(frame)) :]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt without a document: in the chat template, or as it was written."""
        return self._first + self._framed(self._before, prompt, self._after)

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model answers.

        Args:
            messages: the role and the text of each turn.

        Raises:
            UsageError: the chat template takes no such conversation; without one, it is not a single user's text.
            ModelError: the template does not repeat the texts exactly once.
        """
        roles = [role for role, _ in messages]
        if not self._templated:
            if roles != ["user"]:
                raise UsageError(
                    "The model has no chat template, and so no turns: give one user's message, or pass --chat-template."
                )
            return self.prompt_ids(messages[0][1])
        first, *later = turn_parts(self._tokenizer, roles)
        whole, template = first, [(0, len(first))]
        for (_, text), part in zip(messages, later, strict=True):
            start = len(whole) + len(text)
            whole += f"{text}{part}"
            template.append((start, len(whole)))
        return self.texts.ids(whole, template)

    def start_ids(self, text: str) -> list[int]:
        """Token ids of the beginning of a prompt, of which `encode_end` encodes the rest."""
        return self._first + self._framed(self._before, text)

    def encode_start(self, text: str) -> EncodedContext:
        """As `start_ids`, and where in the text each token stands.

        Raises:
            UsageError: the tokenizer does not say.
        """
        self.texts.require_offsets()
        return self._started("", text)

    def encode_end(self, text: str, reply: str, answer: str) -> EncodedQuestion:
        """Token ids of the end of a prompt, the given beginning of the reply, and an answer after a blank.

        Args:
            text, reply: as `cued` returns them.
            answer: what the model should say then.
        """
        if self._plain and self.texts.gives_offsets:
            return self._encode_together("", text, reply, f" {answer}", frame=("", ""))
        last = reply or ("" if self._templated else text)
        blank = " " if last and not last[-1].isspace() else ""
        later = tuple(self._framed("", reply)), tuple(self._framed("", f"{blank}{answer}"))
        if not self.texts.gives_offsets:
            return EncodedQuestion(tuple(self._framed("", text, self._after)), *later)
        asked = self._located("", "", f"{text}{self._after}", template=len(self._after))
        return EncodedQuestion(asked.ids, *later, tuple(zip(asked.starts, asked.stops, strict=True)))

    def cued(self, text: str, reply: str) -> tuple[str, str]:
        """The end of a prompt and the given beginning of the reply, such that a model without a chat format answers.

        For such a model the prompt ends with "Answer:", unless it ends with a colon of its own, and no blank is left
        after it: the reply begins with one.
        """
        if not self._plain:
            return text, reply
        text = text.rstrip()
        return text if text.endswith(_COLONS) else f"{text}{_ANSWER}", f" {reply.lstrip()}" if reply else ""

    @property
    def overhead(self) -> int:
        """Tokens of a prompt that are not its text: the chat template, or the token that every text begins with."""
        return len(self.start_ids("")) + len(self._framed("", "", self._after))

    def count(self, sentences: list[str]) -> list[int]:
        """Tokens that each sentence adds to a running text (to a token or so): its first word follows a blank, unless
        the sentence before it ends a paragraph."""
        previous = ["", *sentences[:-1]]
        texts = [s if p.endswith("\n") else f" {s}" for p, s in zip(previous, sentences, strict=True)]
        return [len(ids) for ids in self.texts.ids_of_each(texts)]

    def _asked(self, question: str) -> tuple[str, str, str]:
        """A question, and what stands before and after it."""
        return (_QUESTION, question, _ANSWER) if self._plain else ("", question, self._after)

    def _encode_together(
        self, lead: str, question: str, reply: str, answer: str, frame: tuple[str, str] | None = None
    ) -> EncodedQuestion:
        """Encode one text, which follows `lead`, and cut it: a token belongs to the part in which it ends."""
        before, question, after = self._asked(question) if frame is None else (frame[0], question, frame[1])
        asked = f"{before}{question}{after}"
        text = _append(_append(asked, reply), answer)
        ends = [len(lead), len(lead) + len(asked), len(lead) + len(text) - len(answer), len(lead) + len(text)]
        template = [(ends[1] - len(after), ends[1])]
        parts: list[list[int]] = [[] for _ in ends]
        places, first = [], len(lead) + len(before)
        for token, (start, stop) in zip(*self.texts.with_offsets(f"{lead}{text}", template), strict=True):
            part = bisect_left(ends, stop)
            parts[part].append(token)
            if part == 1:
                places.append((start - first, stop - first))
        _, own, given, wanted = map(tuple, parts)
        return EncodedQuestion(own, given, wanted, tuple(places))

    def _framed(self, before: str, text: str, after: str = "") -> list[int]:
        """Token ids of a text between parts of the template."""
        whole = f"{before}{text}{after}"
        return self.texts.ids(whole, [*self._template_in(before), (len(whole) - len(after), len(whole))])

    def _template_in(self, before: str) -> list[Characters]:
        """What comes from the template of what stands before a text: all but the user's own system message."""
        if not before or self._system is None:
            return [(0, len(before))]
        return [(0, self._system[0]), (self._system[1], len(before))]

    def _started(self, instruction: str, body: str, after: str = "") -> EncodedContext:
        """The beginning of a prompt, of which the template's end comes `after`, if it is the whole prompt."""
        found = self._located(
            "", f"{self._before}{instruction}", f"{body}{after}", self._template_in(self._before), len(after)
        )
        head = len(self._before) + len(instruction)
        outside = (-head,) * len(self._first)
        system = None if self._system is None else (self._system[0] - head, self._system[1] - head)
        return EncodedContext((*self._first, *found.ids), (*outside, *found.starts), (*outside, *found.stops), system)

    def _located(
        self, lead: str, head: str, body: str, of_head: Sequence[Characters] = (), template: int = 0
    ) -> EncodedContext:
        """Encode one text and cut off `lead`, a token of which belongs to the part in which it ends.

        Args:
            lead, head, body: the text.
            of_head: characters of `head` that come from the template.
            template: as many of the last characters of `body` do, too.
        """
        whole, start = f"{lead}{head}{body}", len(lead) + len(head)
        own = [(len(lead) + first, len(lead) + stop) for first, stop in of_head]
        ids, offsets = self.texts.with_offsets(whole, [*own, (len(whole) - template, len(whole))])
        kept = [pair for pair in zip(ids, offsets, strict=True) if not lead or pair[1][1] > len(lead)]
        return located(
            tuple(token for token, _ in kept), tuple((first - start, stop - start) for _, (first, stop) in kept)
        )


def _first_ids(tokenizer: Any) -> list[int]:
    """The token that a text without a chat template begins with, if the tokenizer puts one there."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _append(text: str, more: str) -> str:
    """Join with a blank, unless there is white space already or nothing to add."""
    return text + more if not more or text[-1:].isspace() or more[0].isspace() else f"{text} {more}"
