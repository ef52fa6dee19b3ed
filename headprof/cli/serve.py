"""`headprof serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from headprof.cli.command import command, given_options
from headprof.cli.context import load, terminal
from headprof.cli.options import (
    MOST,
    CompressOptions,
    DecodingOptions,
    LoadOptions,
    MethodOptions,
    Model,
    ReadOptions,
    compression_request,
)
from headprof.utils.units import human_bytes


@command
def serve(
    *,
    context: typer.Context,
    model: Model = None,
    compressing: CompressOptions = CompressOptions(method="auto", budget="256"),
    cache_dir: Annotated[Path, typer.Option("--cache-dir", help="Folder of saved documents.")] = Path("documents"),
    match_documents: Annotated[
        bool, typer.Option(help="Start prompts that begin with a saved document from its cache, named or not.")
    ] = True,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine reach 0.0.0.0.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="HEADPROF_API_KEY", help="Key that requests must carry. Default: none."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Most bytes of key/value caches (8GB). Default: half of what the device has free."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers that are generated together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=1, max=MOST, help="Requests that may wait; more get a 429.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Most tokens of a chat answer whose request does not say.")
    ] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, max=1e6, help="Seconds that a request may take.")] = 600.0,
    max_request_bytes: Annotated[int, typer.Option(min=1, max=MOST, help="Most bytes of a request's body.")] = 16
    * 10**6,
    grace: Annotated[
        float, typer.Option(min=0, max=1e5, help="Seconds that requests under way have when the server is to end.")
    ] = 10.0,
    decoding: DecodingOptions,
    reading: ReadOptions,
    loading: LoadOptions,
) -> None:
    """Serve the model to clients of OpenAI's interface, from compressed caches.

    Chats and completions are at /v1, saved documents at /v1/documents, metrics at /metrics. Requests that arrive
    together are answered together, and each gets the answer that it gets alone. The method auto is that of headprof
    generate for prompts, and that of headprof compress for documents.

    [dim]headprof serve --model meta-llama/Meta-Llama-3-8B-Instruct --budget 256 --memory 8GB
    HEADPROF_API_KEY=secret headprof serve --host 0.0.0.0 --port 8080[/]
    """
    from headprof.compression.request import AUTO, document_method, question_method
    from headprof.integrations.server.start import Limits, ServeRequest, reserved

    given = given_options(context, CompressOptions)
    method, profile = compressing.method, compressing.profile
    methods = [method, method]
    if method == AUTO:
        methods = [question_method(model, profile), document_method(model, profile, None)]
    for_prompts, for_documents = (
        compression_request(replace(compressing, method=each), MethodOptions(), decoding, reading, given)
        for each in methods
    )
    limits = Limits(timeout, max_request_bytes, max_new_tokens, api_key)
    request = ServeRequest(
        for_prompts, for_documents, cache_dir, host, port, memory, max_batch, max_queue, grace, limits, match_documents
    )
    with reserved(request) as place:
        with place.not_yet():
            loaded = load(model, loading)

        def on_start(memory_bytes: int) -> None:
            if place.is_open:
                terminal.remark("Warning: other machines can reach this server, and it asks for no key: see --api-key.")
            terminal.remark(
                f"{loaded.name}, prompts by {for_prompts.label}, documents by {for_documents.label}, at most "
                f"{human_bytes(memory_bytes)} of key/value caches; end it with Ctrl-C."
            )
            terminal.result(f"{place.url}/v1")

        place.serve(loaded, on_start)
