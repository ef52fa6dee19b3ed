"""Compressed documents on disk: the same answers in another process, and no file that is not what it says."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import headprof
from support.profiles import random_profile
from support.prompts import left_padded, random_ids
from support.tiny_models import save_tiny

from headprof.cli import main
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.document import (
    load_document,
    save_document,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from headprof.compression.encoding import prompt_ids, question_ids
from headprof.compression.generation import ask, compress_document, generate_text
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import CacheError, HeadprofError, UsageError
from headprof.models.loading import load_model
from headprof.models.prompt_encoder import OBSERVATION, PromptEncoder
from headprof.utils.tensor_files import checksum

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 30
QUESTIONS = ["Who counted?", "How many boats were there?"]


def compressed_document(loaded, method="headkv-r2", budget=24):
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=budget)
    return compress_document(loaded, TEXT, plan)


@pytest.mark.parametrize("method", ["headkv-r2", "snapkv", "full"])
def test_a_loaded_document_answers_as_the_one_that_was_saved(tiny, tmp_path, method):
    cache = compressed_document(tiny, method)
    save_document(cache, tmp_path / "doc.kv.safetensors", tiny, {"document": "keeper.txt"})
    loaded, notes = load_document(tmp_path / "doc.kv.safetensors", tiny)
    assert (notes["method"], notes["document"], notes["model"]) == (method, "keeper.txt", "tiny-llama")
    assert json.loads(notes["budget"]) == {"amount": 24.0, "unit": "tokens"}
    assert notes["profile"] == (random_profile(tiny.model).digest() if method == "headkv-r2" else "")
    assert loaded.get_seq_length() == cache.get_seq_length() and torch.equal(loaded.lengths, cache.lengths)
    assert loaded.nbytes == cache.nbytes
    for question in QUESTIONS:
        ids = question_ids(tiny, cache.get_seq_length(), question, 16)
        answers = [generate_text(tiny, ids, cache=stack_caches([each]), max_new_tokens=16) for each in (cache, loaded)]
        assert answers[0].text == answers[1].text and answers[0].new_tokens == answers[1].new_tokens
        assert answers[0].cached_tokens == cache.get_seq_length()


def test_a_document_kept_whole_answers_as_the_full_cache(tiny):
    cache = compressed_document(tiny, "full")
    made = generate_text(
        tiny, question_ids(tiny, cache.get_seq_length(), QUESTIONS[0], 32), cache=cache, max_new_tokens=32
    )
    whole = generate_text(tiny, prompt_ids(tiny, TEXT, QUESTIONS[0], 32), max_new_tokens=32)
    assert made.text == whole.text and made.prompt_tokens == whole.prompt_tokens


@pytest.mark.parametrize(("method", "read"), [("knorm", 0), ("streamingllm", 0), ("full", 0), ("snapkv", 1)])
def test_only_who_asks_queries_has_a_document_observed(tiny, method, read):
    lengths, plan = [], make_plan(tiny.model, method=method, budget=24)
    hook = tiny.model.register_forward_pre_hook(
        lambda _, args, given: lengths.append((args[0] if args else given["input_ids"]).shape[1]), with_kwargs=True
    )
    try:
        cache = compress_document(tiny, TEXT, plan)
    finally:
        hook.remove()
    observers = len(PromptEncoder(tiny.tokenizer).question_ids(OBSERVATION))
    assert lengths == [cache.get_seq_length() + read * observers]
    if read:
        assert compress_document(tiny, TEXT, plan, observe="Who?").get_seq_length() == cache.get_seq_length()
    else:
        with pytest.raises(UsageError, match=f"^The method '{method}' asks no queries, so .* leave --observe away"):
            compress_document(tiny, TEXT, plan, observe="Who?")


def question_and_answer(loaded, cache, question, **options):
    """What the obvious call makes of a question's tokens alone."""
    ids = question_ids(loaded, cache.get_seq_length(), question, 12)
    with attending_ragged(loaded.model):
        made = loaded.model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(made[:, : ids.shape[1]], ids)
    return loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def without_ids(path):
    """The file as it was before documents held their tokens."""
    rewritten(path, lambda tensors: tensors.pop("ids"))


def rewritten(path, change):
    """Write the file again with its tensors changed and a checksum that fits."""

    def change_all(tensors, metadata):
        change(tensors)
        metadata["checksum"] = checksum(tensors, metadata)

    altered(path, change_all)


@pytest.mark.parametrize("ids_known", [True, False])
def test_the_obvious_call_asks_a_loaded_document(tiny, tmp_path, ids_known):
    path = tmp_path / "doc.kv.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    if not ids_known:
        without_ids(path)
    for question in (*QUESTIONS, "Who? " * 3):
        cache, _ = load_document(path, tiny)
        assert (cache.token_ids is not None) == ids_known
        expected = ask(tiny, cache, question, max_new_tokens=12)
        assert expected.cached_tokens == cache.get_seq_length()
        seen, ids = cache.get_seq_length(), question_ids(tiny, cache.get_seq_length(), question, 12)
        for width in (ids.shape[1], seen + ids.shape[1]):
            mask = torch.ones(1, width, dtype=torch.int64)
            assert question_and_answer(tiny, stack_caches([cache]), question, attention_mask=mask) == expected.text
        assert question_and_answer(tiny, cache, question) == expected.text


def test_more_tokens_than_were_seen_must_begin_with_those(tiny):
    """Else they may be a question longer than its document, or a text that was split otherwise."""
    cache = compressed_document(tiny)
    with attending_ragged(tiny.model):
        ids = question_ids(tiny, cache.get_seq_length(), QUESTIONS[0], 4).repeat(1, 90)
        with pytest.raises(CacheError, match="cannot be told which of these"):
            tiny.model.generate(ids, past_key_values=cache, max_new_tokens=4)
        mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.int64)
        made = tiny.model.generate(ids, past_key_values=cache, attention_mask=mask, max_new_tokens=4)
        assert torch.equal(made[:, : ids.shape[1]], ids)


def test_a_conversation_goes_on_with_new_tokens_or_with_all_of_them(tiny):
    cache = compressed_document(tiny)
    other = stack_caches([cache])
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with attending_ragged(tiny.model):
        ids = question_ids(tiny, cache.get_seq_length(), QUESTIONS[0], 5)
        first = tiny.model.generate(ids, past_key_values=cache, **greedy)
        whole = tiny.model.generate(torch.cat([other.token_ids, ids], dim=1), past_key_values=other, **greedy)
        assert torch.equal(whole[:, -first.shape[1] :], first)
        assert torch.equal(cache.token_ids, whole[:, :-1]) and torch.equal(other.token_ids, whole[:, :-1])
        following = torch.cat([first[:, -1:], question_ids(tiny, cache.get_seq_length(), QUESTIONS[1], 5)], dim=1)
        then = tiny.model.generate(following, past_key_values=cache, **greedy)
        both = tiny.model.generate(torch.cat([whole[:, :-1], following], dim=1), past_key_values=other, **greedy)
        assert torch.equal(both[:, -then.shape[1] :], then)


@pytest.mark.parametrize("option", [{"repetition_penalty": 2.5}, {"no_repeat_ngram_size": 2}])
def test_logits_processors_see_the_documents_tokens(tiny, tmp_path, option):
    """So an answer from a file is that from the text, when nothing is compressed away."""
    save_document(compressed_document(tiny, "full"), tmp_path / "doc.kv.safetensors", tiny)
    cache, _ = load_document(tmp_path / "doc.kv.safetensors", tiny)
    whole = prompt_ids(tiny, TEXT, QUESTIONS[0], 32)
    plain = ask(tiny, cache, QUESTIONS[0], max_new_tokens=32).text
    before = {name: getattr(tiny.model.generation_config, name) for name in option}
    try:
        for name, value in option.items():
            setattr(tiny.model.generation_config, name, value)
        expected = generate_text(tiny, whole, max_new_tokens=32).text
        assert ask(tiny, cache, QUESTIONS[0], max_new_tokens=32).text == expected != plain
    finally:
        for name, value in before.items():
            setattr(tiny.model.generation_config, name, value)


def test_a_streamer_and_a_processor_get_what_they_would_without_a_cache(tiny):
    cache, seen, streamed = compressed_document(tiny), [], []

    class Streamer:
        def put(self, value):
            streamed.append(value.flatten().tolist())

        def end(self):
            streamed.append("end")

    def processor(ids, scores):
        seen.append(ids.clone())
        return scores

    known, ids = cache.token_ids, question_ids(tiny, cache.get_seq_length(), QUESTIONS[0], 4)
    with attending_ragged(tiny.model):
        made = tiny.model.generate(
            ids, past_key_values=cache, max_length=ids.shape[1] + 4, streamer=Streamer(), logits_processor=[processor]
        )
    assert made.shape[1] <= ids.shape[1] + 4
    assert streamed[0] == ids[0].tolist() and streamed[-1] == "end"
    assert torch.equal(seen[0], torch.cat([known, ids], dim=1))


def test_an_older_file_refuses_what_would_look_at_its_tokens(tiny, tmp_path):
    path = tmp_path / "doc.kv.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    without_ids(path)
    cache, _ = load_document(path, tiny)
    ids = question_ids(tiny, cache.get_seq_length(), QUESTIONS[0], 4)
    with attending_ragged(tiny.model):
        for options in ({"repetition_penalty": 1.2}, {"logits_processor": [lambda ids, scores: scores]}):
            with pytest.raises(CacheError, match=f"{next(iter(options))} looks at the ids of all tokens"):
                tiny.model.generate(ids, past_key_values=cache, max_new_tokens=4, **options)
        with pytest.raises(CacheError, match=r"holds 1 sequences where 3 for each are asked for"):
            tiny.model.generate(ids, past_key_values=cache, max_new_tokens=4, num_beams=3)


@pytest.mark.parametrize(
    "change",
    [lambda ids: ids[:, :-1].contiguous(), lambda ids: ids.long(), lambda ids: ids - 10_000, lambda ids: ids + 10_000],
)
def test_token_ids_that_cannot_be_are_refused(tiny, tmp_path, change):
    path = tmp_path / "doc.kv.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    rewritten(path, lambda tensors: tensors.update(ids=change(tensors["ids"])))
    with pytest.raises(CacheError, match=r"ids (are not one for each token|that are not those of its tokens)"):
        load_document(path, tiny)


def test_a_batch_with_a_bias_survives_the_file(tiny, tmp_path):
    plan = make_plan(tiny.model, random_profile(tiny.model), budget=9)
    cache = HeadCache(plan)
    with attending_ragged(tiny.model), torch.no_grad():
        prefill(tiny.model, random_ids(2, 40), cache)
        mask = torch.ones(2, 43, dtype=torch.int64)
        mask[1, 40:42] = 0
        tiny.model(random_ids(2, 3), attention_mask=mask, past_key_values=cache)
        save_document(cache, tmp_path / "batch.safetensors", tiny)
        loaded, _ = load_document(tmp_path / "batch.safetensors", tiny)
        assert "bias" in loaded.head_layers[0].storage.rows.columns and torch.equal(loaded.lengths, cache.lengths)
        following = random_ids(2, 4, seed=8)
        expected = tiny.model(following, past_key_values=cache).logits
        torch.testing.assert_close(tiny.model(following, past_key_values=loaded).logits, expected)


def test_a_padded_batch_goes_on_from_the_file_as_it_would_have(tiny, tmp_path):
    """Its sequences are compressed again by their own lengths."""
    cache = HeadCache(make_plan(tiny.model, random_profile(tiny.model), budget=12, buffer=1))
    ids, mask = left_padded(random_ids(2, 40), (40, 9))
    with attending_ragged(tiny.model), torch.no_grad():
        tiny.model(ids, attention_mask=mask, past_key_values=cache)
        save_document(cache, tmp_path / "batch.safetensors", tiny)
        loaded, _ = load_document(tmp_path / "batch.safetensors", tiny)
        for fed in random_ids(20, 2).split(1):
            logits = [tiny.model(fed.view(2, 1), past_key_values=each).logits for each in (cache, loaded)]
            torch.testing.assert_close(*logits)
            assert torch.equal(cache.lengths, loaded.lengths)


def test_size_on_disk_is_that_of_the_cache(tmp_path):
    """With the embedded model's layers and heads."""
    folder = save_tiny(
        tmp_path / "wide", "llama", chat=True, layers=30, num_heads=6, num_kv_heads=3, head_dim=64, hidden=48
    )
    loaded = load_model(str(folder), device="cpu")
    cache = compressed_document(loaded, budget=32)
    save_document(cache, tmp_path / "doc.safetensors", loaded)
    rows = int(cache.lengths.sum())
    assert rows == 32 * 90
    held = rows * (2 * 64 * 4 + 4)
    assert cache.nbytes == held + 90 * 16 * (2 * 64 * 4 + 4)  # and the free space, which is not written
    assert held < (tmp_path / "doc.safetensors").stat().st_size < 1.02 * held


def test_a_document_too_long_for_the_model_is_refused(tiny):
    plan = make_plan(tiny.model, method="snapkv", budget=24)
    with pytest.raises(
        UsageError, match=r"The document of \d+ tokens exceeds the 4096 that tiny-llama can read: shorten"
    ):
        compress_document(tiny, TEXT * 20, plan)


@pytest.mark.parametrize("observe", ["", "Who?"])
def test_the_document_alone_is_kept(tiny, observe):
    plan = make_plan(tiny.model, method="snapkv", budget=24)
    layers = []
    cache = compress_document(
        tiny, TEXT, plan, observe=observe, on_layer=lambda done, total: layers.append((done, total))
    )
    document = PromptEncoder(tiny.tokenizer).document_ids(TEXT)
    assert cache.get_seq_length() == len(document) and (cache.lengths == 24).all()
    assert layers == [(1, 2), (2, 2)]


def altered(path, change):
    """Write the file again, with its tensors and metadata changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def edit_values(tensors, metadata):
    tensors["layers.1.values"][0, 0] += 1


def edit_budget(tensors, metadata):
    metadata["budget"] = json.dumps({"amount": 8.0, "unit": "tokens"})


def older(tensors, metadata):
    metadata["format_version"] = "0"


def no_cache(tensors, metadata):
    metadata["format"] = "something"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_values, r"doc\.safetensors has been altered since it was made: restore it, or make it again with"),
        (edit_budget, r"has been altered since it was made"),
        (older, r"has format version 0 where this headprof reads 3, 4, 5 and 6: update headprof, or make it again"),
        (no_cache, r"is a safetensors file but not a compressed document: make it again"),
    ],
)
def test_an_edited_file_is_refused(tiny, tmp_path, change, message):
    path = tmp_path / "doc.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    altered(path, change)
    with pytest.raises(CacheError, match=message):
        load_document(path, tiny)


@pytest.mark.parametrize("length", [0, 4, 300, -100, -1])
def test_a_cut_file_is_refused(tiny, tmp_path, length):
    path = tmp_path / "doc.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CacheError, match=r"The compressed document .* (is cut short or altered|is not a safetensors)"):
        load_document(path, tiny)


def test_another_models_file_is_refused(tiny, tmp_path):
    path = tmp_path / "doc.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    with pytest.raises(CacheError, match=r"There is no compressed document file at .*absent: check the path"):
        load_document(tmp_path / "absent", tiny)
    other = load_model(str(save_tiny(tmp_path / "deep", "llama", chat=True, layers=5)), device="cpu")
    with pytest.raises(CacheError, match=r"made with another model, tiny-llama \(layers 2 instead of 5\): load that"):
        load_document(path, other)
    other = load_model(str(save_tiny(tmp_path / "twin", "llama", chat=True, seed=3)), device="cpu")
    with pytest.raises(CacheError, match=r"another model, tiny-llama \(same shape, other weights\)"):
        load_document(path, other)
    tiny.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(CacheError, match=r"another tokenizer or chat template than this one of tiny-llama"):
        load_document(path, tiny)
    tiny.model.to(torch.bfloat16)
    with pytest.raises(CacheError, match=r"made in float32: load the model with --dtype float32"):
        load_document(path, tiny)


def test_fingerprints_see_what_matters(tiny):
    weights, words = weights_fingerprint(tiny.model), tokenizer_fingerprint(tiny.tokenizer)
    assert (weights, words) == (weights_fingerprint(tiny.model), tokenizer_fingerprint(tiny.tokenizer))
    tiny.tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tiny.tokenizer) != words
    with torch.no_grad():
        tiny.model.model.norm.weight[0] += 1
    assert weights_fingerprint(tiny.model) != weights


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_fails_while_writing_leaves_nothing(tiny, tmp_path, monkeypatch, error):
    path = tmp_path / "doc.safetensors"
    save_document(compressed_document(tiny), path, tiny)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises((KeyboardInterrupt, HeadprofError)) as caught:
        save_document(compressed_document(tiny), path, tiny)
    if isinstance(error, OSError):
        assert "no space left on the disk" in str(caught.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny", "llama", chat=True, layers=3)
    (place / "keeper.txt").write_text(TEXT)
    return place


COMPRESS = ("compress", "--model", "tiny", "--method", "snapkv", "--budget", "24", "--file", "keeper.txt")


def test_compress_here_and_ask_there(place):
    asked = [part for question in QUESTIONS for part in ("--question", question)]
    made = headprof(place, *COMPRESS, *asked, "--max-new-tokens", "12")
    assert made.returncode == 0, made.stderr
    answers = made.stdout.splitlines()
    assert len(answers) == 2 and "keeper.kv.safetensors" in made.stderr
    for _ in range(2):
        for question, answer in zip(QUESTIONS, answers, strict=True):
            ask = ("generate", "--model", "tiny", "--cache", "keeper.kv.safetensors", "--max-new-tokens", "12")
            there = headprof(place, *ask, "--prompt", question)
            assert there.returncode == 0, there.stderr
            assert " ".join(there.stdout.split()) == answer
    plain = headprof(place, *COMPRESS, "-o", "plain.kv.safetensors", "--prefill-chunk", "100")
    assert plain.stdout == "plain.kv.safetensors\n"
    report = headprof(place, *COMPRESS, *asked, "--json", "--max-new-tokens", "12")
    numbers = json.loads(report.stdout)
    assert list(numbers["answers"]) == QUESTIONS and numbers["tokens_per_head"] == 24.0
    assert numbers["file_bytes"] == (place / "keeper.kv.safetensors").stat().st_size


def test_a_question_that_is_asked_twice_is_answered_twice(place):
    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0], "And why?"]
    options = [part for question in asked for part in ("--question", question)]
    made = headprof(place, *COMPRESS, *options, "--max-new-tokens", "12")
    lines = made.stdout.splitlines()
    assert len(lines) == 4 and lines[0] == lines[2]
    numbers = json.loads(headprof(place, *COMPRESS, *options, "--max-new-tokens", "12", "--json").stdout)
    assert [each["question"] for each in numbers["questions"]] == asked
    assert [" ".join(each["answer"].split()) for each in numbers["questions"]] == lines
    assert numbers["answers"] == {each["question"]: each["answer"] for each in numbers["questions"]}
    empty = headprof(place, *COMPRESS, "--question", " ")
    assert empty.returncode == 2 and 'The question is empty: give one with --question "...".' in empty.stderr


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (
            1,
            ("--cache", "keeper.txt", "--prompt", "Who?"),
            "The compressed document keeper.txt is not a safetensors file",
        ),
        (1, ("--cache", "absent", "--prompt", "Who?"), "There is no compressed document file at absent"),
        (
            2,
            ("--cache", "a", "--file", "b", "--prompt", "Who?"),
            "cannot be used together: leave --file or --cache away",
        ),
        (2, ("--cache", "a", "--compare", "--prompt", "Who?"), "leave --compare away"),
        (2, ("--cache", "absent"), 'There is no question about absent: ask one with --prompt "..."'),
        (2, ("--backend", "magic", "--prompt", "Who?"), "There is no attention backend 'magic'"),
    ],
)
def test_mistakes_with_caches(place, monkeypatch, capsys, code, arguments, message):
    """They show before a model is loaded."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "no/such-model", *arguments])
    errors = capsys.readouterr().err
    assert ended.value.code == code and message in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.long
def test_a_full_disk_leaves_no_document(place):
    script = f"ulimit -f 8; exec {sys.executable} -m headprof {' '.join(COMPRESS)} -o full.kv.safetensors"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    before = set(place.iterdir())
    result = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, env=plain, check=False)
    assert result.returncode == 1 and result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1 and set(place.iterdir()) == before


@pytest.mark.long
def test_an_interrupt_while_writing_leaves_no_document(place):
    """The process interrupts itself as soon as the temporary file is there."""
    script = (
        "import os, signal, headprof.cli as cli, safetensors.torch as st\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which jobs in the background ignore
        "def save_file(tensors, file, metadata):\n"
        "    open(file, 'wb').write(b'half')\n"
        f"    os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "st.save_file = save_file\n"
        f"cli.main({[*COMPRESS, '-o', 'cut.kv.safetensors']!r})\n"
    )
    before = set(place.iterdir())
    result = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=False)
    assert result.returncode == 130 and result.stderr.strip() == "Error: Interrupted."
    assert set(place.iterdir()) == before
