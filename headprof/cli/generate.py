"""`headprof generate`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprof.cli.asking import converse, show_answers, show_conversation
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
    Questions,
    ReadOptions,
    Seed,
    Tp,
    compression_request,
)
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.cli.tables.generate import runs
from headprof.errors import UsageError

if TYPE_CHECKING:
    from headprof.compression.generation import Generation
    from headprof.compression.prompts import Prompt
    from headprof.compression.request import CompressionRequest
    from headprof.models.loading import LoadedModel
    from headprof.utils.team import Team


@command
def generate(
    *,
    context: typer.Context,
    model: Model = None,
    compressing: CompressOptions = CompressOptions(method="auto"),
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Text file: the context of the question.")] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Compressed document (.kv.safetensors), instead of --file.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question, or the whole prompt. Default: standard input.")
    ] = None,
    questions: Questions = None,
    batch: Batch = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer standard input line by line; each turn sees those before it.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="With --chat: file to keep the conversation in, as a compressed document.")
    ] = None,
    keeping: KeepOptions,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[
        float, typer.Option(min=0, max=1000, help="0 for greedy decoding, else 0.0001 or more.")
    ] = 0.0,
    seed: Seed = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    json: JsonFlag = False,
    tuning: MethodOptions,
    decoding: DecodingOptions,
    reading: ReadOptions,
    loading: LoadOptions,
    tp: Tp = 1,
) -> None:
    """Answer a prompt under a key/value-cache budget.

    The text goes to stdout, a table of what it took to stderr. Without a prompt, a built-in question about a built-in
    document is asked. The method auto is headkv-refined or headkv-tuned if the profile holds what headprof tune found,
    else headkv-r2.

    [dim]headprof generate --budget 64
    headprof generate --file report.txt --prompt "Who signed it?" --budget 1.5% --compare
    headprof generate --file report.txt --prompt "Who signed it?" --keep "Note 3: names are in full."
    headprof generate --cache report.kv.safetensors --prompt "Who signed it?"
    headprof generate --cache report.kv.safetensors --questions questions.txt
    headprof generate --cache report.kv.safetensors --chat
    torchrun --nproc-per-node 2 -m headprof generate --model meta-llama/Meta-Llama-3-70B-Instruct --tp 2[/]
    """
    from headprof.compression.generation import check_temperature
    from headprof.compression.inputs import check_asking, check_sources, what_to_ask
    from headprof.compression.prompts import full_cache_bytes, new_prompt, prompt_about
    from headprof.compression.request import AUTO, question_method

    team = join_ranks(tp)
    given = given_options(context, CompressOptions, KeepOptions, MethodOptions)
    check_sources(file, cache, compare, given)
    check_asking(prompt, questions, chat, cache, save)
    if chat and tp > 1:
        raise UsageError("A conversation is held by one process: leave --chat or --tp away.")
    if questions is None and given_options(context, "batch"):
        raise UsageError("A single question is no batch: leave --batch away, or give a file of --questions.")
    check_temperature(temperature)
    if compressing.method == AUTO:
        method = "headkv-r2" if cache is not None else question_method(model, compressing.profile)
        compressing = replace(compressing, method=method)
    request = compression_request(compressing, tuning, decoding, reading, given, tp)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if cache is not None and questions is not None:
        _answer_all(cache, questions, request, options | {"batch": batch} | reading.how(), json, model, loading, team)
        return
    if cache is not None and chat:
        _converse(cache, save, request, options, reading, json, model, loading)
        return
    document, question, built_in = what_to_ask(
        file, prompt, standard_input(team) if prompt is None else None, about=cache
    )
    if built_in:
        terminal.remark(f"No prompt given; asking a built-in question about a built-in document: {question}\n")
    wanted = keeping.keeping(given)
    wanted.check(document, question)
    loaded = _load_for(cache, model, loading, tp)
    if cache is not None:
        asked = prompt_about(loaded, cache, question, request.decoding, max_new_tokens)
    else:
        asked = new_prompt(loaded, document, question, request, max_new_tokens, wanted)
    options |= reading.how()
    beside = {}
    compares = compare and asked.plan is not None
    asked.warm_up(loaded, **reading.how(), full=compares)
    if compares:
        beside["full"] = _answer(loaded, asked.with_full_cache(), options)
    made = _answer(loaded, asked, options, (lambda _: None) if json else terminal.write)
    full_bytes = full_cache_bytes(loaded, made, beside.get("full"))
    _show(question, {asked.label: made} | beside, full_bytes, json)
    team.leave()


def _load_for(cache: Path | None, model: str | None, loading: LoadOptions, tp: int = 1) -> LoadedModel:
    """The model, once it is known that a document, if there is one, is such a file, and one for so many processes."""
    from headprof.compression.document_origin import document_facts
    from headprof.compression.ranks_check import check_ranks

    if cache is not None:
        check_ranks(document_facts(cache).method, f"The document {cache}", tp, is_made=True)
    return load(model, loading, tp)


def _answer_all(
    cache: Path,
    questions: Path,
    request: CompressionRequest,
    options: dict[str, Any],
    json: bool,
    model: str | None,
    loading: LoadOptions,
    team: Team,
) -> None:
    """Answer a file of questions, each from a copy of the document."""
    from headprof.compression.batches import answer_each
    from headprof.compression.inputs import read_questions
    from headprof.compression.prompts import document_cache

    asked = read_questions(questions, standard_input(team) if str(questions) == "-" else None)
    loaded = _load_for(cache, model, loading, team.ranks)
    document, label = document_cache(loaded, cache, request.decoding)
    show_answers(label, asked, answer_each(loaded, document, asked, **options), json)
    team.leave()


def _converse(
    cache: Path,
    save: Path | None,
    request: CompressionRequest,
    options: dict[str, Any],
    reading: ReadOptions,
    json: bool,
    model: str | None,
    loading: LoadOptions,
) -> None:
    """Answer standard input line by line, and keep the conversation where that is asked for."""
    from headprof.compression.conversation import Conversation
    from headprof.compression.document import save_document
    from headprof.compression.document_origin import FORMAT
    from headprof.compression.prompts import document_cache

    if save is not None:
        check_outputs({save: FORMAT}, chain([cache], model_inputs(model, loading)))
    loaded = _load_for(cache, model, loading)
    document, label = document_cache(loaded, cache, request.decoding)
    conversation = Conversation(loaded, document, **reading.how())
    turns = converse(conversation, options, json)
    if save is not None:
        save_document(conversation.document(), save, loaded, {"document": cache.name})
    show_conversation(label, turns, save, json)


def _answer(
    loaded: LoadedModel, prompt: Prompt, options: dict[str, Any], on_text: Callable[[str], None] = lambda _: None
) -> Generation:
    """The answer to a prompt, its text handed on as it comes; while the prompt is read, there is a progress bar."""
    with ExitStack() as reading:
        report = reading.enter_context(terminal.progress())

        def begin(text: str) -> None:
            reading.close()  # no bar beside the text
            on_text(text)

        def on_layer(done: int, total: int) -> None:
            report("Reading the prompt, layer", done, total)

        return prompt.answer(loaded, **options, on_text=begin, on_layer=on_layer)


def _show(question: str, made: dict[str, Generation], full_bytes: int, json: bool) -> None:
    """Show what answers took, by the caches they came from; without JSON, the first one's text is on stdout already."""
    if json:
        answers = {label: asdict(each) for label, each in made.items()}
        terminal.json({"prompt": question, "full_cache_bytes": full_bytes, "runs": answers})
        return
    terminal.write("\n")
    if len(made) > 1:
        terminal.remark(f"\nWith the full cache: {made['full'].text.strip()}")
    terminal.table(*runs(made, full_bytes))
