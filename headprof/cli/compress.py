"""`headprof compress`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from headprof.cli.command import command, given_options
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


@command
def compress(
    *,
    context: typer.Context,
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
    observe: Observe = None,
    tuning: MethodOptions,
    decoding: DecodingOptions,
    reading: ReadOptions,
    loading: LoadOptions,
) -> None:
    """Compress a document's cache to a file that answers questions in later processes.

    The answers to --question go to stdout, one a line; without questions, the path of the file. The questions do not
    change the file: any other can be asked of it.

    [dim]headprof compress --file report.txt --budget 128 -o report.kv.safetensors
    headprof compress --file report.txt --method kvzip --threshold 0.01
    headprof compress --file report.txt --question "Who signed it?" --question "When?"[/]
    """
    from headprof.compression.document import FORMAT, save_document
    from headprof.compression.generation import compress_document
    from headprof.compression.inputs import checked_prompt, read_document
    from headprof.compression.prompts import answer_questions, document_figures

    given = given_options(context, CompressOptions)
    request = compression_request(compressing, tuning, decoding, reading, given)
    document = read_document(file)
    questions = [checked_prompt(each, "--question") for each in question or []]
    target = output or Path(f"{file.stem}.kv.safetensors")
    check_outputs({target: FORMAT}, chain([file], model_inputs(model, loading), profile_input(model, request.profile)))
    loaded = load(model, loading)
    plan = request.plan(loaded)
    with terminal.progress() as report:
        cache = compress_document(
            loaded,
            document,
            plan,
            observe=observe,
            backend=reading.backend,
            prefill_chunk=reading.prefill_chunk,
            on_layer=lambda done, total: report(f"Compressing {file.name}, layer", done, total),
        )
    save_document(cache, target, loaded, {"document": file.name})
    answers = answer_questions(loaded, cache, questions, max_new_tokens, reading.backend, request.step)
    answered = [(each, answer.strip()) for each, answer in zip(questions, answers, strict=True)]
    _show(document_figures(loaded, cache, target), answered, json)


def _show(figures: dict[str, Any], answered: list[tuple[str, str]], json: bool) -> None:
    """Show what was written and answered; in JSON by question, and in the order of the questions too."""
    if json:
        in_order = [{"question": question, "answer": answer} for question, answer in answered]
        terminal.json(figures | {"answers": dict(answered), "questions": in_order})
        return
    for _, answer in answered:
        terminal.write(" ".join(answer.split()) + "\n")
    if answered:
        terminal.remark(f"\nThe compressed document is {figures['file']}.")
    else:
        terminal.result(figures["file"])
    terminal.table(*document_table(figures))
