"""Many questions on the command line, and conversations about a saved document."""

from __future__ import annotations

import io
import json

import pytest
import torch
from support.commands import headprof
from support.json_lines import write_jsonl
from support.tiny_models import CHAT_TEMPLATE, EOS, load_tiny, save_tiny
from test_batches import TEXT, document

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.conversation import Conversation
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask
from headprof.compression.inputs import typed_lines
from headprof.compression.session import attending_ragged, prefill
from headprof.errors import ModelError, UsageError
from headprof.models.prompt_encoder import PromptEncoder

QUESTIONS = ("Who sold rope?", "How many boats, and of which colour, were counted before breakfast?", "Where?")
SILENT = ("compress", "--model", "tiny", "--file", "document.txt", "--method", "snapkv", "--budget", "24", "-o", "d.kv")
COMPRESS = (*SILENT, "--max-new-tokens", "12")
GENERATE = ("generate", "--model", "tiny", "--cache", "d.kv", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asking")
    save_tiny(folder / "tiny", "llama", chat=True)
    (folder / "document.txt").write_text(TEXT)
    (folder / "questions.txt").write_text(f"{QUESTIONS[0]}\n\n  {QUESTIONS[1]}\n{QUESTIONS[2]}\r\n", newline="")
    write_jsonl(folder / "questions.jsonl", [{"question": each, "id": n} for n, each in enumerate(QUESTIONS)])
    done = headprof(folder, *SILENT)
    assert done.returncode == 0, done.stderr
    return folder


def test_files_of_questions_are_answered_as_each_is_alone(place):
    each = ["".join(f"{' '.join(asked(place, question).split())}\n") for question in QUESTIONS]
    by_option = headprof(place, *COMPRESS, *(part for question in QUESTIONS for part in ("--question", question)))
    assert by_option.stdout == "".join(each)
    for name, stdin in (("questions.txt", ""), ("questions.jsonl", ""), ("-", "\n".join(QUESTIONS))):
        for batch in ("1", "2"):
            for command in (COMPRESS, GENERATE):
                done = headprof(place, *command, "--questions", name, "--batch", batch, stdin=stdin)
                assert (done.returncode, done.stdout) == (0, "".join(each)), done.stderr
    both = headprof(place, *COMPRESS, "--question", QUESTIONS[2], "--questions", "questions.txt")
    assert both.stdout == "".join([each[2], *each])


def asked(place, question):
    return headprof(place, *GENERATE, "--prompt", question).stdout.rstrip("\n")


def test_as_json(place):
    done = headprof(place, *GENERATE, "--questions", "questions.txt", "--json")
    found = json.loads(done.stdout)
    assert [each["question"] for each in found["questions"]] == list(QUESTIONS)
    assert found["questions"][1]["answer"] == asked(place, QUESTIONS[1]).strip()
    assert found["questions"][0]["new_tokens"] == 12 and found["cache"] == "d.kv (snapkv)"
    done = headprof(place, *COMPRESS, "--questions", "questions.jsonl", "--json")
    assert [each["question"] for each in json.loads(done.stdout)["questions"]] == list(QUESTIONS)


def test_sampled_answers_are_those_of_one_question(place):
    options = ("--temperature", "1.5", "--seed", "3")
    each = [headprof(place, *GENERATE, *options, "--prompt", question).stdout for question in QUESTIONS]
    done = headprof(place, *GENERATE, *options, "--questions", "questions.txt")
    assert done.stdout.splitlines() == [" ".join(text.split()) for text in each]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "absent.txt", "There is no file absent.txt: check the path given with --questions."),
        (b"\n  \n", "blank.txt", "blank.txt has no question in it: write one a line."),
        (b"caf\xe9?\n", "latin.txt", "latin.txt is not UTF-8 text"),
        (b'{"question": "Who?"}\n{"query": 3}\n', "bad.jsonl", "Line 2 of bad.jsonl has no question"),
        (b'{"question": " "}\n', "empty.jsonl", "Line 1 of empty.jsonl has no question"),
        (b"Who?\n" + b"word " * 5000, "long.txt", "Question 2 is too long: "),
    ],
)
@pytest.mark.parametrize("command", [COMPRESS, GENERATE])
def test_files_that_cannot_be_asked(place, content, name, message, command):
    if content is not None:
        (place / name).write_bytes(content)
    before = (place / "d.kv").stat().st_mtime_ns
    done = headprof(place, *command, "--questions", name)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("Error") == 1
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert (place / "d.kv").stat().st_mtime_ns == before  # nothing was compressed first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--questions", "questions.txt", "--prompt", "Who?"), "Questions come from one place"),
        (("--chat", "--prompt", "Who?"), "Questions come from one place"),
        (("--save", "c.kv"), "Only a conversation can be saved"),
        (("--chat", "--save", "d.kv"), "d.kv"),
    ],
)
def test_options_that_do_not_go_together(place, options, message):
    done = headprof(place, *GENERATE, *options, stdin="Who?\n")
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    without = ("generate", "--model", "tiny", "--chat")
    assert "give it with --cache" in headprof(place, *without, stdin="Who?").stderr


# Conversations.


def fed_turn_by_turn(loaded, cache, questions, count):
    """A conversation, token by token: what each turn's greedy answer is, and all ids the model has read."""
    encoder, end = PromptEncoder(loaded.tokenizer), loaded.tokenizer.convert_tokens_to_ids(EOS)
    answers, between = [], []
    with attending_ragged(loaded.model), torch.no_grad():
        for number, question in enumerate(questions):
            if number:
                prefill(loaded.model, torch.tensor([between]), cache)
            logits = prefill(loaded.model, torch.tensor([encoder.question_ids(question)]), cache)
            said = []
            while len(said) < count and end not in said:
                said.append(int(logits.argmax()))
                if len(said) < count and end not in said:
                    logits = prefill(loaded.model, torch.tensor([said[-1:]]), cache)
            answers.append(loaded.tokenizer.decode(said, skip_special_tokens=True))
            rest = loaded.tokenizer("<|end|>\n<|start|>user\n", add_special_tokens=False).input_ids
            between = [*([] if said[-1] == end else said[-1:]), *rest]
        prefill(loaded.model, torch.tensor([between]), cache)
    return answers


@pytest.mark.parametrize("method", ["full", "snapkv", "h2o", "kvzip"])
def test_turns_go_on_from_those_before(tiny, method):
    cache = document(tiny, method)
    apart = stack_caches([cache])
    conversation = Conversation(tiny, stack_caches([cache]))
    made = [conversation.ask(question, max_new_tokens=20) for question in QUESTIONS]
    expected = fed_turn_by_turn(tiny, apart, QUESTIONS, 20)
    assert [each.text for each in made] == expected
    kept = conversation.document()
    assert torch.equal(kept.token_ids, apart.token_ids) and conversation.document() is kept
    assert made[0].text == ask(tiny, cache, QUESTIONS[0], max_new_tokens=20).text
    assert made[2].text != ask(tiny, cache, QUESTIONS[2], max_new_tokens=20).text, "it has not seen the others"


def test_a_turn_that_the_model_ends(tiny):
    """The end token is not read twice: as the model's own, and as what the template writes."""
    cache = document(tiny, "snapkv")
    said: list[int] = []
    ask(tiny, cache, QUESTIONS[0], max_new_tokens=20, on_ids=said.extend)
    tiny.model.generation_config.eos_token_id = said[6]
    conversation = Conversation(tiny, stack_caches([cache]))
    made = conversation.ask(QUESTIONS[0], max_new_tokens=20)
    assert made.new_tokens < 20
    ids = conversation.document().token_ids[0].tolist()
    read = tiny.tokenizer.decode(ids[made.prompt_tokens :])
    assert read == tiny.tokenizer.decode(ids[made.prompt_tokens :][: made.new_tokens - 1]) + "<|end|>\n<|start|>user\n"


def test_a_model_without_a_template():
    loaded = load_tiny("llama")
    loaded.tokenizer.chat_template = None
    conversation = Conversation(loaded, document(loaded, "full"))
    conversation.ask("Who?", max_new_tokens=4)
    conversation.ask("Where?", max_new_tokens=4)
    read = loaded.tokenizer.decode(conversation.document().token_ids[0])
    assert "\n\nQuestion: Who?\nAnswer:" in read and "\n\nQuestion: Where?\nAnswer:" in read and read.endswith("\n\n")


def test_a_question_without_room_leaves_the_conversation_as_it_was(tiny):
    conversation = Conversation(tiny, document(tiny, "snapkv"))
    conversation.ask("Who?", max_new_tokens=4)
    seen = conversation.cache.get_seq_length()
    with pytest.raises(UsageError, match="ask a shorter one"):
        conversation.ask("word " * 5000)
    with pytest.raises(UsageError, match="lower --max-new-tokens"):
        conversation.ask("Who?", max_new_tokens=4096)
    assert conversation.cache.get_seq_length() == seen


def test_templates_of_one_turn(tiny):
    cache: HeadCache = document(tiny, "snapkv")
    tiny.tokenizer.chat_template = "{{ messages[0]['content'] }}" + CHAT_TEMPLATE[:0]
    with pytest.raises(ModelError, match="several turns exactly once"):
        Conversation(tiny, cache)
    tiny.tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    with pytest.raises(ModelError, match="a second turn"):
        Conversation(tiny, cache)


def test_a_saved_conversation_is_a_document(tiny, tmp_path):
    """Whoever goes on from the file says what the conversation would have said next."""
    conversation = Conversation(tiny, document(tiny, "h2o"))
    for question in QUESTIONS[:2]:
        conversation.ask(question, max_new_tokens=20)
    save_document(conversation.document(), tmp_path / "c.kv", tiny)
    later, _ = load_document(tmp_path / "c.kv", tiny)
    assert ask(tiny, later, QUESTIONS[2]).text == conversation.ask(QUESTIONS[2]).text


def test_conversations_on_the_command_line(place):
    done = headprof(place, *GENERATE, "--chat", "--save", "c.kv", stdin="\n".join([QUESTIONS[0], "", QUESTIONS[1]]))
    assert done.returncode == 0, done.stderr
    told = headprof(place, *GENERATE, "--chat", "--json", stdin="\n".join(QUESTIONS))
    turns = json.loads(told.stdout)["questions"]
    assert [turn["question"] for turn in turns] == list(QUESTIONS) and turns[0]["answer"] in done.stdout
    later = ("generate", "--model", "tiny", "--cache", "c.kv", "--max-new-tokens", "12", "--prompt", QUESTIONS[2])
    assert headprof(place, *later).stdout.strip() == turns[2]["answer"] != asked(place, QUESTIONS[2])


@pytest.mark.parametrize(
    ("stdin", "message"), [("", "No question was asked"), ("Who?\n" + "word " * 5000, "A question of 24999 characters")]
)
def test_conversations_that_cannot_be_had_are_not_kept(place, stdin, message):
    done = headprof(place, *GENERATE, "--chat", "--save", "none.kv", stdin=stdin)
    assert done.returncode == 2 and message in done.stderr and not (place / "none.kv").exists()


def test_lines_come_as_they_are_typed():
    raw = io.TextIOWrapper(io.BytesIO("Wo?\r\n\nÜber?".encode()))
    assert list(typed_lines(raw)) == ["Wo?", "Über?"] and list(typed_lines(None)) == []
    with pytest.raises(UsageError, match="not UTF-8"):
        list(typed_lines(io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"))))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--batch", "4"), "--batch"),
        (("--max-new-tokens", "9"), "--max-new-tokens"),
        (("--batch", "8", "--eager"), "--batch and --eager"),  # its default, but given
        (("--compile",), "--compile"),
        (("--backend", "torch", "--max-new-tokens", "9"), "--max-new-tokens and --backend"),
        (("--max-loss", "0.1", "--eager", "--batch", "2"), "--batch"),
    ],
)
def test_how_to_answer_is_not_said_where_nothing_is_asked(place, tmp_path, options, named):
    silent = (*SILENT[:-1], str(tmp_path / "new.kv"))
    if "--max-loss" in options:
        silent = tuple(word for word in silent if word not in ("--budget", "24"))
    done = headprof(place, *silent, *options)
    message = f"Error: Nothing is asked about the document: add --question or --questions, or leave {named} away.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert not (tmp_path / "new.kv").exists()


def test_a_promise_may_be_measured_as_the_user_says(place, tmp_path):
    silent = tuple(word for word in SILENT[:-1] if word not in ("--budget", "24"))
    done = headprof(place, *silent, str(tmp_path / "new.kv"), "--max-loss", "0.5", "--eager", "--backend", "torch")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("questions", [("--prompt", "Who?"), ("--chat",)])
def test_a_single_question_is_no_batch(place, questions):
    done = headprof(place, *GENERATE, *questions, "--batch", "4", stdin="Who?")
    assert done.returncode == 2 and "leave --batch away, or give a file of --questions" in done.stderr


@pytest.mark.parametrize("option", ["--keep-system", "--no-keep-system"])
@pytest.mark.parametrize("command", [SILENT, ("generate", "--model", "tiny", "--prompt", "Who?", "--method", "snapkv")])
def test_there_must_be_a_system_message_to_keep_or_not(place, command, option):
    done = headprof(place, *command, option)
    assert done.returncode == 2 and "There is no system message to be kept or not: add --system" in done.stderr
