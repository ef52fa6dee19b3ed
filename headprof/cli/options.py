"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id, local folder or .gguf file. Default: SmolLM2-135M-Instruct."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel="Model")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel="Model")]
Attn = Annotated[
    str,
    typer.Option(
        help="auto, sdpa, eager, flash_attention_2: the attention used for the prompt.", rich_help_panel="Model"
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel="Model")
]
Profile = Annotated[
    Path | None,
    typer.Option("--profile", "-p", help="Head profile. Default: the one for the model, in ./profiles or shipped."),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Window = Annotated[
    int | None, typer.Option(min=1, help="Prompt tokens whose queries judge the others.", rich_help_panel="Method")
]
KeepLast = Annotated[
    int | None, typer.Option(min=0, help="Last prompt tokens that every head keeps.", rich_help_panel="Method")
]
Kernel = Annotated[
    int | None, typer.Option(min=1, help="Width of the pooling over neighboring tokens, odd.", rich_help_panel="Method")
]
Pooling = Annotated[
    str | None, typer.Option(help="What a token takes from its neighbors: max or mean.", rich_help_panel="Method")
]
PoolFactor = Annotated[
    float | None,
    typer.Option(min=1, help="HeadKV's beta: near 1 follows the profile closely.", rich_help_panel="Method"),
]
Method = Annotated[
    str,
    typer.Option(
        help="full, headkv-r2, headkv, headkv-ems, ems, snapkv, tova, pyramidkv, adakv, h2o, streamingllm or knorm: "
        "what is kept. Parameters may follow: ems:mass=false."
    ),
]
BudgetText = Annotated[
    str,
    typer.Option("--budget", "-b", help="Tokens per KV head (64), share of the prompt (1.5%) or bytes (512MB)."),
]
DecodeBudget = Annotated[
    str | None,
    typer.Option(
        "--decode-budget",
        help="Average rows per KV head while generating, as --budget. Default: that of the prompt.",
        rich_help_panel="Method",
    ),
]
Buffer = Annotated[
    int | None,
    typer.Option(
        "--buffer",
        min=0,
        help="New tokens that a head takes beyond its budget before it is compressed again (64); 0 keeps them all.",
        rich_help_panel="Method",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to write.")]
Backend = Annotated[
    str,
    typer.Option(
        help="Attention over the compressed cache: auto, torch, triton, flash-attn, varlen.", rich_help_panel="Model"
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(min=1, help="Read the prompt in chunks of this many tokens, to save memory.", rich_help_panel="Model"),
]
Observe = Annotated[
    str,
    typer.Option(
        help="Text that judges a document while the question is not known; empty: its own end.",
        rich_help_panel="Method",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any parameter of the method, such as temperature=0.8 or ramp=true; may be repeated.",
        rich_help_panel="Method",
    ),
]
