"""Loading models of every kind, the choices made on the way, and what is said when it cannot be done."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import headprof
from support.tiny_models import ARCHITECTURES, PAD, TEXT, save_tiny, save_tiny_gguf, tiny_model, tiny_tokenizer
from transformers import AutoConfig

from headprof.errors import HeadprofError, ModelError, UsageError
from headprof.models import converted, placement
from headprof.models.checkpoint import Source, read_tokenizer
from headprof.models.embedded import EMBEDDED
from headprof.models.finding import looks_like_path, model_name
from headprof.models.loading import LoadedModel, load_model
from headprof.models.placement import attention_order, choose_device, choose_dtype

GB = 10**9


def failure(model: Path | str | None, **options: object) -> str:
    """The message of a load that must fail, checked to be one sentence on one line."""
    with pytest.raises(HeadprofError) as caught:
        load_model(None if model is None else str(model), **{"device": "cpu"} | options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    assert message.endswith(".") and len(message) < 450
    return message


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


# Loading


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_every_architecture_from_a_folder(arch: str, tmp_path: Path) -> None:
    original = tiny_model(arch, num_heads=4, num_kv_heads=2, layers=3)
    loaded = load_model(str(save_tiny(tmp_path / arch, arch, num_heads=4, num_kv_heads=2, layers=3)), device="cpu")

    ids = torch.arange(3, 40)[None]
    assert torch.allclose(loaded.model(ids).logits, original(ids).logits, atol=1e-4)
    assert (loaded.shape.num_layers, loaded.shape.num_heads, loaded.shape.num_kv_heads) == (3, 4, 2)
    assert loaded.shape.architecture == type(original).__name__
    assert loaded.name == arch
    assert loaded.max_positions == 4096


def test_a_loaded_model_is_ready_to_run(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder))

    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.is_fast and loaded.tokenizer.pad_token == PAD
    assert loaded.tokenizer.decode(loaded.tokenizer(TEXT).input_ids) == TEXT
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id


def test_sdpa_is_preferred_and_eager_stands_in_where_it_is_missing(tmp_path: Path) -> None:
    def implementation(arch: str, attn: str = "auto") -> str:
        folder = save_tiny(tmp_path / f"{arch}-{attn}", arch)
        return load_model(str(folder), device="cpu", attn=attn).model.config._attn_implementation

    assert implementation("llama") == "sdpa"
    assert implementation("llama", "eager") == "eager"
    assert implementation("gemma2") in ("sdpa", "eager")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_honored(tiny_folder: Path, dtype: str) -> None:
    loaded = load_model(str(tiny_folder), device="cpu", dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.device == torch.device("cpu")


def test_a_16_bit_checkpoint_is_widened_on_the_cpu(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "half", "llama", dtype=torch.bfloat16)
    assert load_model(str(folder), device="cpu").dtype == torch.float32


def test_little_memory_means_bfloat16_and_none_an_error(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_parameters = tiny_model("llama").num_parameters()
    monkeypatch.setattr(placement, "free_bytes", lambda device: 3 * num_parameters)
    assert load_model(str(tiny_folder), device="cpu").dtype == torch.bfloat16
    monkeypatch.setattr(placement, "free_bytes", lambda device: num_parameters)
    assert "are free" in failure(tiny_folder)


def test_gguf_equals_the_model_it_was_written_from(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    original = save_tiny_gguf(path)
    loaded = load_model(str(path), device="cpu")

    ids = torch.arange(3, 60)[None]
    assert torch.allclose(loaded.model(ids).logits, original(ids).logits, atol=1e-4)
    assert loaded.tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert loaded.tokenizer.chat_template == tiny_tokenizer(chat=True).chat_template
    assert (loaded.name, loaded.shape.architecture) == ("tiny", "LlamaForCausalLM")
    loaded.model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_smollm_gguf_splits_digits_from_the_space_before_them(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, pre_tokenizer="smollm")
    tokenizer = load_model(str(path), device="cpu").tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n42")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "4", "2"]


def test_loading_prints_nothing(tiny_folder: Path, tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(tiny_folder), device="cpu")
    load_model(str(tiny_gguf), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_model_without_padding_token_gets_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = load_model(str(folder), device="cpu")
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert loaded.tokenizer(["a", "the code of the door"], padding=True).input_ids[0][-1] == 1


# Names


def test_names(tmp_path: Path, tiny_folder: Path) -> None:
    assert model_name(None) == model_name("smollm2-135m-instruct") == EMBEDDED
    assert model_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert model_name(f"{tiny_folder}/") == "tiny-llama"
    assert model_name("somewhere/Qwen3-4B.Q4_1.gguf") == "Qwen3-4B.Q4_1"
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert model_name(str(snapshot)) == "org/some-model"


def test_the_name_of_a_relative_folder_is_that_of_the_folder(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder)
    assert model_name(".") == load_model(".", device="cpu").name == "tiny-llama"


@pytest.mark.parametrize(
    "name", ["./model", "/no/model", "~/model", "a/b/c", "x.gguf", "org/x.safetensors", "C:\\m", ""]
)
def test_looks_like_a_path(name: str) -> None:
    assert looks_like_path(name)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "org/model.v2"])
def test_looks_like_a_hub_id(name: str) -> None:
    assert not looks_like_path(name)


# Choices


@pytest.mark.parametrize(
    ("requested", "num_cuda", "has_mps", "expected"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 0, True, "cpu"),
        ("auto", 2, False, "cuda:0"),
        ("cpu", 2, True, "cpu"),
        ("cuda", 1, False, "cuda:0"),
        ("cuda:1", 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
    ],
)
def test_choose_device(requested: str, num_cuda: int, has_mps: bool, expected: str) -> None:
    assert choose_device(requested, num_cuda=num_cuda, has_mps=has_mps) == expected


@pytest.mark.parametrize(
    ("requested", "error", "says"),
    [
        ("gpu", UsageError, "Unknown device 'gpu'"),
        ("cuda:", UsageError, "Unknown device"),
        ("cuda:x", UsageError, "Unknown device"),
        ("cuda:2", ModelError, "the last one is cuda:1"),
        ("mps", ModelError, "no MPS device"),
    ],
)
def test_choose_device_refuses(requested: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        choose_device(requested, num_cuda=2, has_mps=False)


def test_cuda_without_a_gpu() -> None:
    with pytest.raises(ModelError, match="sees no CUDA device"):
        choose_device("cuda", num_cuda=0, has_mps=True)


@pytest.mark.parametrize(
    ("requested", "device", "stored", "free_gb", "has_bfloat16", "expected"),
    [
        ("auto", "cpu", "bfloat16", 24, True, "float32"),
        ("auto", "cpu", "bfloat16", 5.1, True, "float32"),
        ("auto", "cpu", "bfloat16", 4.9, True, "bfloat16"),
        ("float32", "cpu", None, 0.1, True, "float32"),
        ("float16", "cpu", None, 24, True, "float16"),
        ("auto", "cuda:0", "float16", 80, True, "float16"),
        ("auto", "cuda:0", "bfloat16", 80, True, "bfloat16"),
        ("auto", "cuda:0", "float32", 80, True, "bfloat16"),
        ("auto", "cuda:0", None, 80, True, "bfloat16"),
        ("auto", "cuda:0", "bfloat16", 80, False, "float16"),
        ("float32", "cuda:0", "bfloat16", 80, True, "float32"),
    ],
)
def test_choose_dtype(
    requested: str, device: str, stored: str | None, free_gb: float, has_bfloat16: bool, expected: str
) -> None:
    chosen = choose_dtype(
        requested,
        device=device,
        stored=stored,
        num_parameters=GB,
        free_bytes=int(free_gb * GB),
        has_bfloat16=has_bfloat16,
    )
    assert chosen == expected


def test_attention_order() -> None:
    assert attention_order("auto", flash=True) == ["flash_attention_2", "sdpa", "eager"]
    assert attention_order("auto", flash=False) == ["sdpa", "eager"]
    assert attention_order("eager", flash=True) == ["eager"]


# Failures


def test_unknown_options_are_usage_errors(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="Unknown dtype 'int3'"):
        load_model(str(tiny_folder), dtype="int3")
    with pytest.raises(UsageError, match="Unknown attention implementation 'magic'"):
        load_model(str(tiny_folder), attn="magic")
    with pytest.raises(UsageError, match="Unknown device 'tpu'"):
        load_model(str(tiny_folder), device="tpu")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('A system message is needed.') }}", "A system message is needed"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ({"tool_use": "{{ messages[0]['content'] }}"}, "one of its names (tool_use)"),
        ("{{ messages[7]['content'].strip() }}", "has no element 7"),
    ],
)
def test_chat_templates_that_fail(template: str | dict[str, str], reason: str, broken: Path) -> None:
    (broken / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((broken / "tokenizer_config.json").read_text())
    written = [{"name": n, "template": t} for n, t in template.items()] if isinstance(template, dict) else template
    (broken / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": written}))
    (broken.parent / "plain.jinja").write_text("{{ messages[0]['content'] }}")
    commands = [
        ("generate", "--method", "snapkv", "--prompt", "Hi"),
        ("score", "--probes", "2", "--lengths", "400", "--no-tune"),
    ]
    for command in commands:
        ended = headprof(broken.parent, *command, "-m", "broken")
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert "Error: The tokenizer's chat template cannot be used" in ended.stderr and reason in ended.stderr
        assert "--chat-template none" in ended.stderr
    choices = ["none", "plain.jinja", *(template if isinstance(template, dict) else ())]
    for choice in choices:
        ended = headprof(broken.parent, *commands[0], "-m", "broken", "--chat-template", choice)
        assert ended.returncode == 0, ended.stderr


def test_a_chosen_chat_template(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text("<{{ messages[0]['content'] }}>")

    def template(choice: str | None) -> str | None:
        return load_model(str(tiny_folder), device="cpu", chat_template=choice).tokenizer.chat_template

    assert template(None) == tiny_tokenizer(chat=True).chat_template
    assert template("none") is None
    assert template(str(tmp_path / "other.jinja")) == "<{{ messages[0]['content'] }}>"
    assert "There is no chat template tool" in failure(tiny_folder, chat_template="tool")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    assert "cannot be read" in failure(tiny_folder, chat_template=str(tmp_path / "latin.jinja"))


@pytest.mark.parametrize(("arch", "pre_tokenizer"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_a_gguf_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, pre_tokenizer: str
) -> None:
    monkeypatch.setattr(converted, "cache_dir", lambda: tmp_path / "cache")
    path = tmp_path / "tiny.gguf"
    original = save_tiny_gguf(path, arch=arch, pre_tokenizer=pre_tokenizer)
    direct = read_tokenizer(Source(str(tmp_path), "tiny", {"gguf_file": path.name}), trust_remote_code=False)
    told: list[str] = []

    def load() -> LoadedModel:
        told.clear()
        return load_model(str(path), device="cpu", progress=lambda what, *_: told.append(what))

    ids = torch.arange(3, 60)[None]
    for expected in (["Converting tiny once"], []):
        loaded = load()
        assert told == expected
        assert loaded.name == "tiny"
        assert torch.allclose(loaded.model(ids).logits, original(ids).logits, atol=1e-4)
        assert loaded.tokenizer(TEXT).input_ids == direct(TEXT).input_ids
        assert loaded.tokenizer.chat_template == direct.chat_template
    other = save_tiny_gguf(path, arch=arch, seed=1)
    assert torch.allclose(load().model(ids).logits, other(ids).logits, atol=1e-4)
    assert told == ["Converting tiny once"]
    assert len([each for each in (tmp_path / "cache" / "gguf").iterdir() if each.is_dir()]) == 1


def test_a_gguf_is_read_as_it_is_where_no_copy_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    original = save_tiny_gguf(path)
    ids = torch.arange(3, 60)[None]
    (tmp_path / "file").touch()
    for folder, most in ((tmp_path / "file", 10**9), (tmp_path / "cache", 10)):
        monkeypatch.setattr(converted, "cache_dir", lambda folder=folder: folder)
        monkeypatch.setattr(converted, "_MOST_BYTES", most)
        assert torch.allclose(load_model(str(path), device="cpu").model(ids).logits, original(ids).logits, atol=1e-4)
    assert not (tmp_path / "cache").exists()


def test_a_part_of_a_split_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    part = Path(shutil.copy(tiny_gguf, tmp_path / "tiny-00001-of-00003.gguf"))
    assert "is part 1 of 3 of a model: merge them" in failure(part)

    save_tiny_gguf(tmp_path / "whole.gguf")
    renamed = tmp_path / "renamed.gguf"
    pre = struct.pack("<Q", 18) + b"tokenizer.ggml.pre" + struct.pack("<IQ", 8, 7) + b"default"
    short = b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, number)
        for key, number in ((b"split.no", 1), (b"split.count", 2))
    )
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert pre in whole
    renamed.write_bytes(whole.replace(pre, short))
    assert "is part 2 of 2 of a model: merge them" in failure(renamed)


def test_a_gguf_that_splits_text_in_an_unknown_way(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "new.gguf", pre_tokenizer="quite-new")
    assert "splits text in a way that Transformers does not know (quite-new)" in failure(tmp_path / "new.gguf")
    for known in ("llama-bpe", "qwen2", "gpt-2"):
        save_tiny_gguf(tmp_path / f"{known}.gguf", pre_tokenizer=known)
        assert load_model(str(tmp_path / f"{known}.gguf"), device="cpu").tokenizer(TEXT).input_ids


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantized_checkpoints_say_what_helps(method: str, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True}
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    message = failure(broken)
    assert f"is quantized with {method}, which cannot be read here" in message
    assert "pass the model without quantization" in message and "complete files" not in message


def test_no_such_path() -> None:
    assert "There is no file or folder ./nowhere" in failure("./nowhere")
    assert "There is no file or folder models/x.gguf" in failure("models/x.gguf")


def test_an_impossible_hub_id() -> None:
    assert "neither a file or folder nor a hub id" in failure("what is this")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in failure(tmp_path)


def test_damaged_config(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    assert "configuration of broken cannot be read" in failure(broken)


def test_truncated_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "weights of broken cannot be read" in failure(broken)


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert "weights of broken cannot be read" in failure(broken)


def test_missing_weights_are_not_made_up(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "lacks 9 of the model's weights (the first is model.layers.2." in failure(broken)


def test_weights_of_another_shape(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert "have another shape than its config.json says" in failure(broken)


def add_weights(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: torch.zeros(2) for name in names}, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_have_no_place_are_named(broken: Path) -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj.bias" for layer in range(2) for part in ("up", "down")]
    add_weights(broken, *names)
    with pytest.warns(UserWarning, match="4 weights in .* left out"):
        loaded = load_model(str(broken), device="cpu")
    [note] = loaded.notes
    assert ", ".join(sorted(names)[:3]) + " and 1 more." in note

    printed = headprof(broken.parent, "generate", "-m", str(broken), "--method", "snapkv", "--prompt", "Hi")
    assert printed.returncode == 0 and printed.stderr.count(f"Warning: {note}") == 1


def test_what_the_model_makes_anew_is_not_missed(broken: Path) -> None:
    add_weights(broken, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert load_model(str(broken), device="cpu").notes == ()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora_A.default.weight", "lm_head.base_layer.lora_B"])
def test_unmerged_adapter_weights_are_refused(name: str, broken: Path) -> None:
    add_weights(broken, f"base_model.{name}")
    assert "merge it into its base model first" in failure(broken)


def test_adapter_folders_are_refused(tmp_path: Path, broken: Path) -> None:
    for folder in (tmp_path, broken):
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
        assert "holds an adapter, not a whole model: merge it" in failure(folder)


def test_folder_without_tokenizer(broken: Path) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    assert "put the model's complete tokenizer.json there" in failure(broken)


def test_slow_tokenizer(broken: Path) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    (broken / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b": 2, "ab": 3}))
    (broken / "merges.txt").write_text("#version: 0.2\na b\n")
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    assert "needs a fast one" in failure(broken)


def test_tokenizer_of_another_model(broken: Path) -> None:
    tiny_tokenizer().save_pretrained(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert "has token ids up to" in failure(broken)


@pytest.mark.parametrize("model_type", ["bert", "t5", "vit"])
def test_not_a_decoder(model_type: str, broken: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(broken)
    assert "is not a decoder language model" in failure(broken)


def test_a_decoder_without_attention_heads(broken: Path) -> None:
    AutoConfig.for_model("mamba").save_pretrained(broken)
    assert "has no attention heads" in failure(broken)


def test_unknown_architecture(broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    assert "upgrade transformers" in failure(broken)


def test_remote_code_is_not_run_unasked(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text(f"open({str(broken / 'ran')!r}, 'w')\n")
    assert "--trust-remote-code" in failure(broken)
    assert not (broken / "ran").exists()


def test_attention_that_the_architecture_lacks(tmp_path: Path) -> None:
    if load_model(str(save_tiny(tmp_path / "g", "gemma2")), device="cpu").model.config._attn_implementation == "sdpa":
        pytest.skip("this Transformers runs Gemma 2 with sdpa")
    assert "cannot run with the attention implementation sdpa" in failure(tmp_path / "g", attn="sdpa")


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    assert "is not a GGUF file" in failure(path)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.9])
def test_truncated_gguf(share: float, tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    assert "short.gguf is damaged, incomplete" in failure(path)


# The hub


def test_offline_says_so_at_once() -> None:
    start = time.monotonic()
    message = failure("some-org/some-model")
    assert "HF_HUB_OFFLINE keeps it" in message and "pass a local folder" in message
    assert time.monotonic() - start < 5


def test_no_network_fails_within_seconds(tmp_path: Path) -> None:
    """In a process of its own, because the hub client reads its settings once."""
    script = (
        "import time; from headprof.errors import ModelError; from headprof.models.finding import find_model\n"
        "import huggingface_hub; start = time.monotonic()\n"
        "try: find_model('some-org/some-model', print)\n"
        "except ModelError as error: print(f'{time.monotonic() - start:.1f}|{error}')\n"
    )
    # Nothing listens on port 9, so every request is refused.
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, timeout=60
    )
    seconds, message = run.stdout.strip().split("|")
    assert float(seconds) < 15
    assert "the hub cannot be reached" in message and "--model" in message
    assert run.stderr == ""


class FakeHub(BaseHTTPRequestHandler):
    """Serves one model as the hub does, and refuses two others."""

    folder: Path
    commit = "0" * 39 + "1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        refused = {"org/gated": (403, "GatedRepo"), "org/absent": (404, "RepoNotFound"), "org/busy": (503, "")}
        found = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/(\w+)/(.+)", self.path)
        if found is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        repo, _, name = found.groups()
        if repo in refused:
            status, code = refused[repo]
            return self._send(status, {"X-Error-Code": code} if code else {}, b"")
        path = self.folder / name
        if not path.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b"")
        return self._send(200, {"ETag": f'"{name}"', "X-Repo-Commit": self.commit}, path.read_bytes(), body)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake_hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine that has `org/tiny`, and an empty hub cache."""
    from huggingface_hub import constants

    handler = type("Handler", (FakeHub,), {"folder": tiny_folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_downloaded_with_progress_and_then_needs_no_hub(
    fake_hub: type[FakeHub], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    reports: list[tuple[str, int, int]] = []
    loaded = load_model("org/tiny", device="cpu", progress=lambda *report: reports.append(report))
    size = (tiny_folder / "model.safetensors").stat().st_size
    assert loaded.name == "org/tiny"
    assert reports[-1] == ("Downloading org/tiny", size, size)
    assert capfd.readouterr() == ("", "")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load_model("org/tiny", device="cpu")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        ("org/gated", "is gated: accept its license"),
        ("org/absent", "The hub has no model org/absent, or it is private"),
        ("org/busy", "The hub refused org/busy"),
    ],
)
def test_what_the_hub_refuses(fake_hub: type[FakeHub], repo: str, says: str) -> None:
    start = time.monotonic()
    assert says in failure(repo)
    assert time.monotonic() - start < 5


def test_a_hub_model_without_config(fake_hub: type[FakeHub], tmp_path: Path) -> None:
    fake_hub.folder = tmp_path
    assert "org/tiny has no config.json" in failure("org/tiny")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder))
    assert loaded.device == torch.device("cuda:0")
    assert loaded.dtype == torch.bfloat16
    assert load_model(str(tiny_folder), dtype="float32").dtype == torch.float32
