"""`headprof serve` as a process: it starts, is asked by real programs, is killed, and ends well."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from support.commands import headprof, headprof_process
from support.servers import server_process

pytestmark = pytest.mark.processes

SNAPKV = ("--method", "snapkv", "--budget", "40", "--memory", "1GB")
TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 30


@pytest.fixture(scope="module")
def serving(tiny_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("serving")
    with server_process(place, "--model", str(tiny_folder), *SNAPKV) as (process, url):
        yield place, process, url


def test_answers_are_those_of_the_command_line(serving, tiny_folder):
    place, _, url = serving
    (place / "report.txt").write_text(TEXT)
    made = headprof_process(
        place, "compress", "--model", str(tiny_folder), "-f", "report.txt", *SNAPKV[:4], "-o", "own.kv.safetensors"
    )
    assert made.returncode == 0, made.stderr
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        posted = client.post("/documents", body={"id": "report", "text": TEXT}, cast_to=object)
        assert posted["tokens"] > 100
        (model,) = client.models.list().data
        for arguments, extra in (([], {}), (["--cache", "own.kv.safetensors"], {"document": "report"})):
            options = [] if arguments else SNAPKV[:4]
            command = ["--prompt", "Who counted?", "--max-new-tokens", "12", "--json", *options, *arguments]
            shown = headprof_process(place, "generate", "--model", str(tiny_folder), *command)
            assert shown.returncode == 0, shown.stderr
            (run,) = json.loads(shown.stdout)["runs"].values()
            said = client.chat.completions.create(
                model=model.id,
                messages=[{"role": "user", "content": "Who counted?"}],
                max_tokens=12,
                extra_body=extra,
            )
            assert said.choices[0].message.content == run["text"]


def test_the_program_llm(serving, tmp_path):
    _, _, url = serving
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: {model}\n  api_base: {url}/v1\n", encoding="utf-8"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    texts = []
    for stream in ([], ["--no-stream"]):
        said = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "tiny", "-o", "max_tokens", "8", *stream, "Hello"],
            env=environment,
            capture_output=True,
            timeout=120,
        )
        assert said.returncode == 0, said.stderr
        texts.append(said.stdout)
    assert texts[0] == texts[1] != b"\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_well_and_lets_what_is_under_way_finish(tiny_folder, tmp_path, number):
    with server_process(tmp_path, "--model", str(tiny_folder), *SNAPKV, "--grace", "20") as (process, url):
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "Hello", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines)
            process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert not list(tmp_path.glob("documents/.*"))


def test_it_cuts_off_what_does_not_finish(tiny_folder, tmp_path):
    with server_process(tmp_path, "--model", str(tiny_folder), *SNAPKV, "--grace", "0.1") as (process, url):
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "What", "max_tokens": 4000, "stream": True}  # the answer has 856 tokens
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines)
            process.terminate()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(30) == 0


def test_killed_while_a_document_is_posted(tiny_folder, tmp_path):
    """Killed at random moments; what is served afterwards is whole, and nothing half-written is left."""
    draw = random.Random(5)
    for attempt in range(3):
        with server_process(tmp_path, "--model", str(tiny_folder), *SNAPKV) as (process, url):
            for kept in httpx.get(f"{url}/v1/documents").json()["data"]:
                body = {"model": kept["model"], "prompt": "Who?", "document": kept["id"], "max_tokens": 2}
                assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
            assert not list(tmp_path.glob("documents/.*.partial"))
            post = threading.Thread(target=_post, args=(f"{url}/v1/documents", f"report{attempt}"))
            post.start()
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            post.join()


def _post(url: str, name: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, json={"id": name, "text": TEXT}, timeout=60)


def test_mistakes_show_before_the_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (("--port", port), "cannot listen"),
            (("--memory", "64"), "--memory"[2:]),
            (("--memory", "lots"), "cannot be read"),
            (("--cache-dir", "/dev/null/x", "--port", "0"), "--cache-dir"),
            (("--api-key", " ", "--port", "0"), "key is empty"),
            (("--host", "no.such.host.invalid", "--port", "0"), "cannot listen"),
            (("--method", "nothing"), "nothing"),
            (("--method", "clusterkv", "--port", "0"), "second tier"),
        ):
            refused = headprof(tmp_path, "serve", "--model", "no/such-model", *arguments)
            assert refused.returncode == 2 and said in refused.stderr, (arguments, refused.stderr)
            assert refused.stderr.count("\n") == 1
