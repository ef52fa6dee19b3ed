"""`headprof compress`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from headprof.cli.command import command
from headprof.cli.context import load, terminal
from headprof.cli.options import (
    CompressOptions,
    DecodingOptions,
    JsonFlag,
    LoadOptions,
    MaxNewTokens,
    MethodOptions,
    Model,
    Observe,
    ReadOptions,
    compression_request,
)
from headprof.cli.outputs import check_outputs, model_inputs, profile_input
from headprof.cli.tables.compress import document_table
from headprof.models.prompt_encoder import OBSERVATION


@command
def compress(
    *,
    file: Annotated[Path, typer.Option("--file", "-f", help="Text file to compress.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Compressed document to write. Default: ./NAME.kv.safetensors."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this at once; may be repeated.")
    ] = None,
    model: Model = None,
    compressing: CompressOptions = CompressOptions(budget="256"),
    max_new_tokens: MaxNewTokens = 128,
    json: JsonFlag = False,
    observe: Observe = OBSERVATION,
    tuning: MethodOptions,
    decoding: DecodingOptions,
    reading: ReadOptions,
    loading: LoadOptions,
) -> None:
    """Compress a document's cache to a file that answers questions in later processes.

    The answers to --question go to stdout, one a line; without questions, the path of the file. The questions do not
    change the file: any other can be asked of it.

    [dim]headprof compress --file report.txt --budget 128 -o report.kv.safetensors
    headprof compress --file report.txt --question "Who signed it?" --question "When?"[/]
    """
    from headprof.compression.document import FORMAT, save_document
    from headprof.compression.generation import compress_document
    from headprof.compression.inputs import read_document
    from headprof.compression.prompts import answer_questions, document_figures

    request = compression_request(compressing, tuning, decoding, reading)
    document = read_document(file)
    target = output or Path(f"{file.stem}.kv.safetensors")
    check_outputs({target: FORMAT}, chain([file], model_inputs(model), profile_input(model, request.profile)))
    loaded = load(model, loading)
    plan = request.plan(loaded)
    with terminal.progress() as report:
        cache = compress_document(
            loaded,
            document,
            plan,
            observe=observe,
            **asdict(reading),
            on_layer=lambda done, total: report(f"Compressing {file.name}, layer", done, total),
        )
    save_document(cache, target, loaded, {"document": file.name})
    answers = answer_questions(loaded, cache, question or [], max_new_tokens, reading.backend)
    _show(document_figures(loaded, cache, target), answers, json)


def _show(figures: dict[str, Any], answers: dict[str, str], json: bool) -> None:
    if json:
        terminal.json(figures | {"answers": {question: answer.strip() for question, answer in answers.items()}})
        return
    for answer in answers.values():
        terminal.result(" ".join(answer.split()))
    if answers:
        terminal.remark(f"\nThe compressed document is {figures['file']}.")
    else:
        terminal.result(figures["file"])
    terminal.table(*document_table(figures))
