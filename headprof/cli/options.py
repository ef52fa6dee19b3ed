"""Options that several commands share, each declared once. Those that go together are a group (see `command`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprof.compression.methods.names import method_names
from headprof.errors import UsageError

if TYPE_CHECKING:
    from headprof.compression.keeping import Keeping
    from headprof.compression.request import CompressionRequest

MOST = 2**31 - 1
"""Of whatever is counted in tokens or heads: more than any model has."""
KIND = "A kind of score: retrieval, reasoning, write or reconstruction"
MOST_PROBES = 1_000_000
MOST_SEED = 2**63 - 1
BOTH = "A compression ratio is a budget too: leave --compression-ratio or {} away."

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id, local folder or .gguf file. Default: SmolLM2-135M-Instruct."),
]
Profile = Annotated[
    Path | None,
    typer.Option("--profile", "-p", help="Head profile. Default: the one for the model, in ./profiles or shipped."),
]
Surrogate = Annotated[
    Path | None,
    typer.Option(
        "--surrogate",
        help="Surrogate, for the kvzap methods. Default: the one for the model, beside its profile.",
        rich_help_panel="Method",
    ),
]
ProfileFile = Annotated[Path | None, typer.Argument(help="Head profile. Default: the one for the model.")]
ProfileOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Head profile to write. Default: ./profiles/MODEL.safetensors."),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=MOST_SEED)]
Families = Annotated[
    str | None,
    typer.Option(help="Only these needle families, with commas; nonliteral: those that share no word with questions."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Most tokens to write.")]
Questions = Annotated[
    Path | None,
    typer.Option(
        help='File of questions, one a line, or .jsonl with {"question": ...}; - for standard input. Each is answered '
        "from a copy of the document.",
    ),
]
Batch = Annotated[
    int, typer.Option(min=1, max=1024, help="Questions that are answered at a time; answers are the same.")
]
Tp = Annotated[
    int,
    typer.Option(
        "--tp",
        min=1,
        max=1024,
        help="Processes that hold the model together, each its own heads: torchrun --nproc-per-node N ... --tp N.",
        rich_help_panel="Model",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel="Model")
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST, help="Read the prompt in chunks of this many tokens, to save memory.", rich_help_panel="Model"
    ),
]
Eager = Annotated[
    bool,
    typer.Option(
        "--eager",
        help="Issue each decode step anew. Default on a GPU: it is captured once and replayed, with the same numbers.",
        rich_help_panel="Model",
    ),
]
Observe = Annotated[
    str | None,
    typer.Option(
        help="Text that judges a document while the question is not known; empty: its own end. Default: general "
        "questions, or the document's own repetition for methods that judge by reconstruction (the kvzip ones).",
        rich_help_panel="Method",
    ),
]


Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        help="Text that every head keeps wherever it stands, or a regular expression between slashes; may be repeated.",
    ),
]


def listed(text: str | None) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(word.strip() for word in text.split(",")) if text else ()


def _method_help() -> str:
    *names, last = method_names()
    return f"{', '.join(names)} or {last}: what is kept. Parameters may follow: ems:mass=false."


@dataclass(frozen=True)
class LoadOptions:
    """How the model is loaded."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel="Model")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel="Model")] = "auto"
    attn: Annotated[
        str,
        typer.Option(
            help="auto, sdpa, eager, flash_attention_2: the attention used for the prompt.", rich_help_panel="Model"
        ),
    ] = "auto"
    trust_remote_code: TrustRemoteCode = False
    chat_template: Annotated[
        str | None,
        typer.Option(help="File with a chat template, or none. Default: the tokenizer's own.", rich_help_panel="Model"),
    ] = None


@dataclass(frozen=True)
class ReadOptions:
    """How the prompt is read, and its compressed cache attended to."""

    backend: Annotated[
        str,
        typer.Option(
            help="Attention over the compressed cache: auto, torch, triton, flash-attn, varlen.",
            rich_help_panel="Model",
        ),
    ] = "auto"
    prefill_chunk: PrefillChunk = None
    eager: Eager = False
    compiles: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile decode steps, which takes a minute and rounds otherwise.",
            rich_help_panel="Model",
        ),
    ] = False

    def how(self) -> dict[str, Any]:
        """The same as arguments of `headprof.compressed`."""
        return {
            "backend": self.backend,
            "prefill_chunk": self.prefill_chunk,
            "step": step_of(self.eager, self.compiles),
        }


def step_of(eager: bool, compiles: bool = False) -> str:
    """How decode steps are run, as `headprof.compressed` takes it.

    Raises:
        UsageError: both ways are asked for.
    """
    if eager and compiles:
        raise UsageError("Steps are either compiled or issued one by one: leave --eager or --compile away.")
    return "eager" if eager else "compiled" if compiles else "auto"


@dataclass(frozen=True)
class CompressOptions:
    """What of the cache is kept, and how much."""

    profile: Profile = None
    method: Annotated[str, typer.Option(help=_method_help())] = "headkv-r2"
    surrogate: Surrogate = None
    budget: Annotated[
        str,
        typer.Option("--budget", "-b", help="Tokens per KV head (64), share of the prompt (1.5%) or bytes (512MB)."),
    ] = "64"
    compression_ratio: Annotated[
        str | None,
        typer.Option("--compression-ratio", help="Instead: the share of the prompt's cache to remove, 0.75."),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep what is looked at more than this (0.01), for the kvzip methods: what the text holds decides "
            "how much. A --budget is then the most that is kept.",
        ),
    ] = None
    recovery: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep what recovers this share of each head's attention (0.85), for fastgen: what the text holds "
            "decides how much. A --budget is then the most that is kept.",
        ),
    ] = None

    def asked(self, given: Sequence[str]) -> dict[str, Any]:
        """The same as attributes of a `CompressionRequest`; ratio and threshold as the budget that they come to.

        A method that spends what it needs is bound by no budget but one that is given.

        Args:
            given: those of these options that were given on the command line.

        Raises:
            UsageError: budget and ratio are both given, or a recovery for a method that spends a budget.
        """
        from headprof.compression.methods.given_budget import ratio_budget
        from headprof.compression.request import spends_what_it_needs

        values = asdict(self)
        ratio, threshold = values.pop("compression_ratio"), values.pop("threshold")
        if spends_what_it_needs(self.method, values.pop("recovery")) and "--budget" not in given:
            values["budget"] = "100%"
        if ratio is not None:
            if "--budget" in given:
                raise UsageError(BOTH.format("--budget"))
            values["budget"] = ratio_budget(ratio)
        if threshold is not None:
            most = f"/{values['budget']}" if ratio is not None or "--budget" in given else ""
            values["budget"] = f">{threshold!r}{most}"
        return values


@dataclass(frozen=True)
class MethodOptions:
    """Parameters of a method's parts."""

    window: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Prompt tokens whose queries judge the others.", rich_help_panel="Method"),
    ] = None
    keep_last: Annotated[
        int | None,
        typer.Option(min=0, max=MOST, help="Last prompt tokens that every head keeps.", rich_help_panel="Method"),
    ] = None
    kernel: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="Width of the pooling over neighboring tokens, odd.", rich_help_panel="Method"
        ),
    ] = None
    pooling: Annotated[
        str | None, typer.Option(help="What a token takes from its neighbors: max or mean.", rich_help_panel="Method")
    ] = None
    pool_factor: Annotated[
        float | None,
        typer.Option(
            min=1, max=1e6, help="HeadKV's beta: near 1 follows the profile closely.", rich_help_panel="Method"
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any parameter of the method, such as temperature=0.8 or ramp=true; may be repeated.",
            rich_help_panel="Method",
        ),
    ] = None

    def chosen(self) -> dict[str, Any]:
        """Parameters by name; `None` leaves one at its default.

        Raises:
            UsageError: --set cannot be read, or names one that is given already.
        """
        from headprof.compression.methods.table import parse_settings

        named = asdict(self)
        settings = parse_settings(named.pop("settings") or [])
        for name in settings:
            if named.get(name) is not None:
                raise UsageError(
                    f"The parameter {name!r} is given by --set and by --{name.replace('_', '-')}: leave one of them "
                    "away."
                )
        return named | settings


@dataclass(frozen=True)
class DecodingOptions:
    """How a cache is compressed while generating."""

    decode_budget: Annotated[
        str | None,
        typer.Option(
            "--decode-budget",
            help="Average rows per KV head while generating, as --budget. Default: that of the prompt.",
            rich_help_panel="Method",
        ),
    ] = None
    buffer: Annotated[
        int | None,
        typer.Option(
            "--buffer",
            min=0,
            max=MOST,
            help="New tokens that a head takes beyond its budget before it is compressed again (64); 0 keeps them all.",
            rich_help_panel="Method",
        ),
    ] = None

    def chosen(self) -> dict[str, Any]:
        """What was given; the rest keeps its default. A buffer of 0 is `None`, without bound."""
        from headprof.compression.methods.given_budget import Budget

        budget = {} if self.decode_budget is None else {"decode_budget": Budget.parse(self.decode_budget)}
        return budget if self.buffer is None else budget | {"buffer": self.buffer or None}


@dataclass(frozen=True)
class KeepOptions:
    """What no method may evict, and the system message."""

    keep: Keep = None
    system: Annotated[
        str | None,
        typer.Option("--system", help="System message, kept by every head. Default: the template's own."),
    ] = None
    keep_system: Annotated[
        bool, typer.Option("--keep-system/--no-keep-system", help="Whether every head keeps the system message.")
    ] = True

    def keeping(self, given: Sequence[str]) -> Keeping:
        """The same, to be looked for.

        Args:
            given: those of these options that were given on the command line.

        Raises:
            UsageError: a system message is to be kept, or not, where there is none.
        """
        from headprof.compression.keeping import Keeping

        if self.system is None and {"--keep-system", "--no-keep-system"} & set(given):
            raise UsageError(
                "There is no system message to be kept or not: add --system, or leave --keep-system and "
                "--no-keep-system away."
            )
        return Keeping(tuple(self.keep or ()), self.system, self.keep_system)


def compression_request(
    compress: CompressOptions,
    method: MethodOptions,
    decoding: DecodingOptions,
    read: ReadOptions,
    given: Sequence[str],
    tp: int = 1,
) -> CompressionRequest:
    """What these groups ask for together, checked; `given` are the options that were given, as `--name`."""
    from headprof.compression.request import CompressionRequest

    options = {"recovery": compress.recovery} | method.chosen()
    request = CompressionRequest(**compress.asked(given), **read.how(), options=options, decoding=decoding.chosen())
    request.check(tp)
    return request
