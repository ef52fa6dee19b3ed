"""`headprof compress`."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from headprof.cli.asking import one_line
from headprof.cli.command import command, given_options
from headprof.cli.context import join_ranks, load, standard_input, terminal
from headprof.cli.options import (
    Batch,
    CompressOptions,
    DecodingOptions,
    JsonFlag,
    KeepOptions,
    LoadOptions,
    MaxNewTokens,
    MethodOptions,
    Model,
    Observe,
    Questions,
    ReadOptions,
    Tp,
    compression_request,
)
from headprof.cli.outputs import check_outputs, model_inputs, profile_input
from headprof.cli.tables.compress import document_table
from headprof.errors import UsageError


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
    questions: Questions = None,
    batch: Batch = 8,
    model: Model = None,
    compressing: CompressOptions = CompressOptions(method="auto", budget="256"),
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss", max=1000, help="Nats a token that may be lost; finds the smallest --budget that does."
        ),
    ] = None,
    keeping: KeepOptions,
    max_new_tokens: MaxNewTokens = 128,
    json: JsonFlag = False,
    observe: Observe = None,
    tuning: MethodOptions,
    decoding: DecodingOptions,
    reading: ReadOptions,
    loading: LoadOptions,
    tp: Tp = 1,
) -> None:
    """Compress a document's cache to a file that answers questions in later processes.

    The answers to --question and --questions go to stdout, one a line; without questions, the path of the file. The
    questions do not change the file: any other can be asked of it. The method auto is learned-kvzip, headkv-kvzip if
    the profile has no budgets for that, or headkv-r2 if a text judges (--observe).

    [dim]headprof compress --file report.txt --budget 128 -o report.kv.safetensors
    headprof compress --file report.txt --max-loss 0.05
    headprof compress --file report.txt --method kvzip --threshold 0.01
    headprof compress --file report.txt --question "Who signed it?" --question "When?"
    headprof compress --file report.txt --questions questions.txt
    headprof compress --file report.txt --keep "Note 3: names are in full." --system "Answer in one word."[/]
    """
    from headprof.compression.batches import answer_each, question_tokens
    from headprof.compression.document import save_document
    from headprof.compression.document_origin import FORMAT
    from headprof.compression.encoding import encoded_document
    from headprof.compression.generation import compress_document
    from headprof.compression.inputs import check_answering, checked_prompt, read_document, read_questions
    from headprof.compression.promise import check_promise, compress_to_promise
    from headprof.compression.prompts import document_figures
    from headprof.compression.request import AUTO, document_method
    from headprof.profile.finding import learning_command

    team = join_ranks(tp)
    given = given_options(context, CompressOptions, KeepOptions)
    answering = ("batch", "max_new_tokens", *(() if max_loss is not None else ("backend", "eager", "compiles")))
    check_answering(given_options(context, *answering), question is not None or questions is not None)
    check_promise(max_loss, given)
    if compressing.method.startswith(f"{AUTO}:"):
        raise UsageError("Parameters of the method that is chosen for you go with --set, such as --set segment=1024.")
    chosen = compressing.method == AUTO
    if chosen:
        compressing = replace(compressing, method=document_method(model, compressing.profile, observe))
    request = compression_request(compressing, tuning, decoding, reading, given, tp)
    document = read_document(file)
    asked = [checked_prompt(each, "--question") for each in question or []]
    if questions is not None:
        asked += read_questions(questions, standard_input(team) if str(questions) == "-" else None)
    wanted = keeping.keeping(given)
    wanted.check(document)
    target = output or Path(f"{file.stem}.kv.safetensors")
    read = chain(
        [file] if questions is None else [file, questions],
        model_inputs(model, loading),
        profile_input(model, request.profile, request.surrogate),
    )
    check_outputs({target: FORMAT}, read)
    loaded = load(model, loading, tp)
    if asked:
        question_tokens(loaded, len(encoded_document(loaded, document, wanted)[0]), asked, max_new_tokens)
    plan = request.plan(loaded)
    how: dict[str, Any] = {"observe": observe, "backend": reading.backend, "prefill_chunk": reading.prefill_chunk}
    how |= asdict(wanted)
    promise = None
    with terminal.progress() as report:
        if max_loss is None:
            on_layer = partial(report, f"Compressing {file.name}, layer")
            cache = compress_document(loaded, document, plan, **how, on_layer=on_layer)
        else:
            how |= {"step": request.step, "report": report}
            cache, promise = compress_to_promise(loaded, document, plan, max_loss, **how)
    save_document(cache, target, loaded, {"document": file.name} | (promise.notes() if promise else {}))
    answers = answer_each(loaded, cache, asked, max_new_tokens=max_new_tokens, batch=batch, **reading.how())
    answered = [(each, answer.text.strip()) for each, answer in zip(asked, answers, strict=True)]
    figures = document_figures(loaded, cache, target)
    _show(figures | (promise.figures() if promise else {}), answered, json)
    for remark in promise.remarks() if promise else ():
        terminal.remark(remark)
    if chosen and request.method == "headkv-kvzip":
        command = learning_command(loaded.name, request.profile, loaded.given)
        terminal.remark(f"The profile has no budgets for learned-kvzip: `{command}` learns them.")
    team.leave()


def _show(figures: dict[str, Any], answered: list[tuple[str, str]], json: bool) -> None:
    """Show what was written and answered; in JSON by question, and in the order of the questions too."""
    if json:
        in_order = [{"question": question, "answer": answer} for question, answer in answered]
        terminal.json(figures | {"answers": dict(answered), "questions": in_order})
        return
    for _, answer in answered:
        terminal.write(one_line(answer) + "\n")
    if answered:
        terminal.remark(f"\nThe compressed document is {figures['file']}.")
    else:
        terminal.result(figures["file"])
    terminal.table(*document_table(figures))
