"""Files of our own formats that say what they should not: each is refused in a sentence, before it costs anything."""

import json
import os
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.crafted_files import (
    NESTED,
    NUMBERS,
    craft,
    drop,
    flipped,
    forget,
    note,
    parts_of,
    poke,
    put,
    sparse,
    turn,
)
from support.profiles import SHAPE, random_profile, small_profile
from support.tiny_models import load_tiny

from headprof.compression.document import load_document, save_document
from headprof.compression.generation import compress_document
from headprof.compression.session import make_plan
from headprof.errors import CacheError, HeadprofError, ProbeError, ProfileError, UsageError
from headprof.evaluation.journal import Journal
from headprof.evaluation.perplexity import Loss
from headprof.evaluation.results import Answer
from headprof.probes.needles import load_needles
from headprof.profile.csv_table import import_csv
from headprof.profile.finding import list_profiles
from headprof.profile.head_profile import HeadProfile
from headprof.profile.papers_json import import_papers_json
from headprof.scoring.probe_results import ProbesFile
from headprof.scoring.prober import ProbeResult

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 6
GIGABYTES = 12 * 10**9
in_a_few_examples = partial(
    settings, max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_one_sentence(error: HeadprofError) -> None:
    assert len(str(error)) < 600 and str(error).isprintable() and str(error).endswith(".")


def wide(dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full((1, 2), 2**31 - 1, dtype=dtype)


# Compressed documents


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


@pytest.fixture(scope="module")
def document(loaded, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("document") / "doc.kv.safetensors"
    plan = make_plan(loaded.model, random_profile(loaded.model), method="headkv-ems", budget=12, buffer=4)
    save_document(compress_document(loaded, TEXT, plan), path, loaded)
    return path


FIRST = "layers.0."
SOUND_LOGITS = {"scaling": 0.25, "softcap": None, "sliding_window": None}
DOCUMENTS = {
    "negative length": poke(f"{FIRST}lengths", -1),
    "huge length": put(f"{FIRST}lengths", wide()),
    "lengths of three dimensions": turn(f"{FIRST}lengths", lambda each: each[None]),
    "lengths of one dimension": turn(f"{FIRST}lengths", torch.Tensor.flatten),
    "lengths of other heads": turn(f"{FIRST}lengths", lambda each: torch.cat([each, each * 0], dim=1)),
    "lengths of no sequence": turn(f"{FIRST}lengths", lambda each: each[:0]),
    "lengths of another sequence": turn(f"{FIRST}lengths", lambda each: torch.cat([each, each * 0])),
    "lengths in int64": turn(f"{FIRST}lengths", torch.Tensor.long),
    "sum of other rows": turn(f"{FIRST}lengths", lambda each: each - 1),
    "no lengths": drop(f"{FIRST}lengths"),
    "no keys": drop(f"{FIRST}keys"),
    "no values": drop("layers.1.values"),
    "keys lack a row": turn(f"{FIRST}keys", lambda each: each[1:]),
    "keys of other width": turn(f"{FIRST}keys", lambda each: each[:, 1:]),
    "keys of whole numbers": turn(f"{FIRST}keys", torch.Tensor.int),
    "keys of one dimension": turn(f"{FIRST}keys", torch.Tensor.flatten),
    "keys of no dimension": put(f"{FIRST}keys", torch.tensor(1.0)),
    "values of another type": turn(f"{FIRST}values", torch.Tensor.half),
    "keys not a number": poke(f"{FIRST}keys", float("nan")),
    "values infinite": poke("layers.1.values", float("inf")),
    "keys whose products overflow": poke("layers.1.keys", 3e38),
    "values whose sums overflow": poke(f"{FIRST}values", -3e38),
    "position beyond what was seen": poke(f"{FIRST}positions", 100_000),
    "negative position": poke(f"{FIRST}positions", -1),
    "positions in int64": turn(f"{FIRST}positions", torch.Tensor.long),
    "bias beyond all": poke(f"{FIRST}bias", 3e38),
    "bias not a number": turn(f"{FIRST}bias", lambda each: each * float("nan")),
    "received infinite": turn(f"{FIRST}received", lambda each: each + float("inf")),
    "queries of other heads": put(f"{FIRST}queries", torch.ones(1, 2, 3, 16)),
    "queries of two dimensions": put(f"{FIRST}queries", torch.ones(3, 16)),
    "judges of nothing": lambda tensors, metadata: (
        tensors.pop(f"{FIRST}queries", None),
        tensors.update({f"{FIRST}judges": torch.ones(1, 3, dtype=torch.bool)}),
    ),
    "no scores": drop("scores"),
    "short scores": turn("scores", lambda each: each[:1]),
    "scores not a number": poke("scores", float("nan")),
    "scores infinite": poke("scores", float("inf")),
    "negative scores": poke("scores", -1.0),
    "scores whose sum overflows": poke("scores", 3e38),
    "stranger": put("more", torch.ones(3)),
    "layer too many": put("layers.2.keys", torch.ones(3, 16)),
    "unknown method": note("method", "nonsense"),
    "method of a megabyte": note("method", "x" * 10**6),
    "no method": forget("method"),
    "options no object": note("options", "[1]"),
    "options nested": note("options", NESTED),
    "unknown option": note("options", '{"self": 1}'),
    "option infinite": note("options", '{"power": 1e400}'),
    "option of another kind": note("options", '{"kernel": "wide"}'),
    "unit": note("budget", '{"amount": 8.0, "unit": "nonsense"}'),
    "share of more than all": note("budget", '{"amount": 8.0, "unit": "share"}'),
    "budget no object": note("budget", "8"),
    "budget of no amount": note("budget", '{"unit": "tokens"}'),
    "budget of more": note("budget", '{"amount": 8.0, "unit": "tokens", "more": 1}'),
    "decode budget": note("decode_budget", '{"amount": 0, "unit": "tokens"}'),
    **{f"budget {text[:9]}": note("budget", f'{{"amount": {text}, "unit": "tokens"}}') for text in (*NUMBERS, "0")},
    **{f"buffer {text[:9]}": note("buffer", text) for text in (*NUMBERS, "2.5", "0", "{", NESTED) if text != "null"},
    **{f"seen {text[:9]!r}": note("tokens_seen", text) for text in ("", "-1", "0", "2.5", "²", "9" * 5000, "1e3", "3")},
    "no tokens seen": forget("tokens_seen"),
    **{f"padding {text}": note("padding", text) for text in ("1", "{}", "[-1]", "[0.5]", "[true]", "[9999]", "[1, 1]")},
    "logits of other layers": note("logits", json.dumps([SOUND_LOGITS])),
    "logits no list": note("logits", "{}"),
    "logits no objects": note("logits", "[1, 2]"),
    "logits of more": note("logits", json.dumps([SOUND_LOGITS | {"module": 1}] * 2)),
    "logits without scaling": note("logits", "[{}, {}]"),
    "window of nothing": note("logits", json.dumps([SOUND_LOGITS | {"sliding_window": 0}] * 2)),
    **{f"scaling {text[:9]}": note("logits", f'[{{"scaling": {text}}}, {{"scaling": {text}}}]') for text in NUMBERS},
    **{f"layers {text[:9]}": note("fingerprint", f'{{"num_layers": {text}}}') for text in NUMBERS},
    "fingerprint nested": note("fingerprint", NESTED),
    "no fingerprint": forget("fingerprint"),
    "version of a megabyte": note("format_version", "\x1b" * 10**6),
    "no profile": forget("profile"),
}


@pytest.mark.parametrize("change", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_a_crafted_document_is_refused(change, document, loaded, tmp_path):
    path = craft(document, tmp_path / "doc.safetensors", change)
    with pytest.raises((CacheError, UsageError)) as caught:
        load_document(path, loaded)
    assert_one_sentence(caught.value)


@pytest.fixture(scope="module")
def packed(loaded, tmp_path_factory) -> dict[str, Path]:
    paths = {}
    for method in ("headkv-r2-int4", "think", LOW, LATENT):
        paths[method] = tmp_path_factory.mktemp("packed") / "doc.kv.safetensors"
        plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=12)
        save_document(compress_document(loaded, TEXT, plan), paths[method], loaded)
    return paths


LOW = "lowrank:key_rank=0.2:value_rank=0.2:heads=1"
LATENT = "latent:rank=0.13:heads=1"
HELD = {"first": 1, "bits": 4, "group_size": 32}
QUANTISED = {
    **{f"no {part}": drop(f"{FIRST}{part}") for part in ("packed", "key_codes", "key_scales", "value_scales")},
    "negative packed": poke(f"{FIRST}packed", -1),
    "huge packed": put(f"{FIRST}packed", wide()),
    "more packed than rows": turn(f"{FIRST}packed", lambda each: each + torch.tensor([[3, -3]])),
    "packed in int64": turn(f"{FIRST}packed", torch.Tensor.long),
    "packed of one dimension": turn(f"{FIRST}packed", torch.Tensor.flatten),
    "codes lack a row": turn(f"{FIRST}key_codes", lambda each: each[1:]),
    "codes of other width": turn(f"{FIRST}value_codes", lambda each: each[:, 1:]),
    "codes of whole numbers": turn(f"{FIRST}key_codes", torch.Tensor.int),
    "scales of another type": turn(f"{FIRST}key_scales", torch.Tensor.float),
    "scales of no dimension": put(f"{FIRST}key_scales", torch.tensor(1.0).half()),
    "scales lack a group": turn(f"{FIRST}key_scales", lambda each: each[1:]),
    "scales not a number": poke(f"{FIRST}key_scales", float("nan")),
    "scales infinite": poke(f"{FIRST}value_scales", float("inf")),
    "positions of no dimension": put(f"{FIRST}positions", torch.tensor(1, dtype=torch.int32)),
    "not said how": forget("packed"),
    "said of other layers": note("packed", json.dumps([HELD])),
    "said of one layer": note("packed", json.dumps([HELD, None])),
    "said no list": note("packed", json.dumps(HELD)),
    "said of more": note("packed", json.dumps([HELD | {"more": 1}] * 2)),
    "said of less": note("packed", json.dumps([{"first": 1, "bits": 4}] * 2)),
    "other bits": note("packed", json.dumps([HELD | {"bits": 8}] * 2)),
    "five bits": note("packed", json.dumps([HELD | {"bits": 5}] * 2)),
    "other groups": note("packed", json.dumps([HELD | {"group_size": 3}] * 2)),
    "groups of none": note("packed", json.dumps([HELD | {"group_size": 0}] * 2)),
    "first beyond all": note("packed", json.dumps([HELD | {"first": 50}] * 2)),
    "negative first": note("packed", json.dumps([HELD | {"first": -1}] * 2)),
    "unknown representation": note("options", '{"representation": "int5"}'),
    "thinner keys that are not there": note("packed", json.dumps([{"first": 1}] * 2)),
}
THINNED = {
    **{f"no {part}": drop(f"{FIRST}{part}") for part in ("packed", "thin_keys", "thin_values", "key_channels")},
    "a channel beyond all": poke(f"{FIRST}key_channels", 16),
    "a negative channel": poke(f"{FIRST}key_channels", -1),
    "channels in int32": turn(f"{FIRST}key_channels", torch.Tensor.int),
    "channels of other heads": turn(f"{FIRST}key_channels", lambda each: each[:1]),
    "more channels than there are": lambda tensors, metadata: tensors.update(
        {f"{FIRST}{part}": tensors[f"{FIRST}{part}"].repeat(1, 3) for part in ("thin_keys", "key_channels")}
    ),
    "keys of no dimension": put(f"{FIRST}thin_keys", torch.tensor(1.0)),
    "keys lack a row": turn(f"{FIRST}thin_keys", lambda each: each[1:]),
    "values of other width": turn(f"{FIRST}thin_values", lambda each: each[:, 1:]),
    "values not a number": poke(f"{FIRST}thin_values", float("nan")),
    "codes that are not there": note("packed", json.dumps([HELD] * 2)),
}
LOW_PARTS = ("low_keys", "low_values", "key_basis", "value_basis", "basis_of_head", "key_frequencies", "key_partners")
LOW_RANK = {
    **{f"no {part}": drop(f"{FIRST}{part}") for part in ("packed", *LOW_PARTS)},
    "a basis beyond all": poke(f"{FIRST}basis_of_head", 2),
    "a negative basis": poke(f"{FIRST}basis_of_head", -1),
    "a partner beyond all": poke(f"{FIRST}key_partners", 16),
    "a frequency that is no number": poke(f"{FIRST}key_frequencies", float("nan")),
    "partners alone": turn(f"{FIRST}key_frequencies", lambda each: each[:0]),
    "frequencies of some": turn(f"{FIRST}key_frequencies", lambda each: each[:3]),
    "heads of fewer": turn(f"{FIRST}basis_of_head", lambda each: each[:1]),
    "a basis of another rank": turn(f"{FIRST}key_basis", lambda each: each[:, 1:]),
    "rows of another rank": turn(f"{FIRST}low_values", lambda each: each[:, 1:]),
    "a basis of more than all": lambda tensors, metadata: tensors.update(
        {
            f"{FIRST}low_keys": tensors[f"{FIRST}low_keys"].repeat(1, 9),
            f"{FIRST}key_basis": tensors[f"{FIRST}key_basis"].repeat(1, 9, 1),
        }
    ),
    "rows of no dimension": put(f"{FIRST}low_keys", torch.tensor(1.0)),
    "rows lack one": turn(f"{FIRST}low_keys", lambda each: each[1:]),
    "more bases": note("packed", json.dumps([{"first": 1, "bases": 3}] * 2)),
    "no bases": note("packed", json.dumps([{"first": 1, "bases": 0}] * 2)),
    "bases and bits": note("packed", json.dumps([{"first": 1, "bases": 2, "bits": 4}] * 2)),
}
LATENT_FACTS = {"first": 1, "bases": 2, "bits": 4, "group_size": 32}
LATENTS = {
    **{f"no {part}": drop(f"{FIRST}{part}") for part in ("latent_codes", "latent_scales", "latent_basis")},
    "a basis beyond all": poke(f"{FIRST}basis_of_head", 2),
    "codes of other width": turn(f"{FIRST}latent_codes", lambda each: each[:, 1:]),
    "scales lack a group": turn(f"{FIRST}latent_scales", lambda each: each[1:]),
    "scales of fewer channels": turn(f"{FIRST}latent_scales", lambda each: each[..., 1:]),
    "a basis of keys alone": turn(f"{FIRST}latent_basis", lambda each: each[..., :16]),
    "an odd rank": lambda tensors, metadata: tensors.update(
        {
            f"{FIRST}latent_basis": tensors[f"{FIRST}latent_basis"][:, 1:],
            f"{FIRST}latent_scales": tensors[f"{FIRST}latent_scales"][..., 1:],
        }
    ),
    "other bits": note("packed", json.dumps([LATENT_FACTS | {"bits": 8}] * 2)),
    "other groups": note("packed", json.dumps([LATENT_FACTS | {"group_size": 2}] * 2)),
    "more bases": note("packed", json.dumps([LATENT_FACTS | {"bases": 3}] * 2)),
}


PACKED = {
    **{f"quantised: {what}": ("headkv-r2-int4", change) for what, change in QUANTISED.items()},
    **{f"thinned: {what}": ("think", change) for what, change in THINNED.items()},
    **{f"latents: {what}": (LATENT, change) for what, change in LATENTS.items()},
    **{f"low rank: {what}": (LOW, change) for what, change in LOW_RANK.items()},
}


@pytest.mark.parametrize(("method", "change"), PACKED.values(), ids=PACKED.keys())
def test_a_crafted_document_of_packed_rows_is_refused(method, change, packed, loaded, tmp_path):
    load_document(packed[method], loaded)
    path = craft(packed[method], tmp_path / "doc.safetensors", change)
    with pytest.raises((CacheError, UsageError)) as caught:
        load_document(path, loaded)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {f"{FIRST}keys": (GIGABYTES // 64, 16)},
        {
            f"{FIRST}{name}": (GIGABYTES // 136, *more)
            for name, more in {"keys": (16,), "values": (16,), "positions": ()}.items()
        },
        {f"{FIRST}lengths": (GIGABYTES // 8, 2)},
        {f"{FIRST}queries": (1, 4, GIGABYTES // 256, 16)},
        {"scores": (GIGABYTES // 8, 2)},
    ],
)
def test_a_huge_document_is_refused_at_once(sizes, document, loaded, tmp_path):
    path = sparse(document, tmp_path / "doc.safetensors", sizes)
    begun = time.monotonic()
    with pytest.raises(CacheError, match="is damaged"):
        load_document(path, loaded)
    assert time.monotonic() - begun < 2


def test_a_header_of_gigabytes_is_refused_at_once(loaded, tmp_path):
    path = tmp_path / "doc.safetensors"
    path.write_bytes(GIGABYTES.to_bytes(8, "little"))
    os.truncate(path, GIGABYTES)
    with pytest.raises(CacheError, match="is not a safetensors file"):
        load_document(path, loaded)


def test_a_buffer_takes_no_more_than_the_model_can_read(document, loaded, tmp_path):
    path = craft(document, tmp_path / "doc.safetensors", note("buffer", str(10**15)))
    cache, _ = load_document(path, loaded)
    assert cache.plan.buffer == loaded.max_positions


# Head profiles


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    small_profile().save(path)
    return path


def fingerprint(**fields: str) -> object:
    """With JSON in the place of some fields."""
    known = {name: json.dumps(value) for name, value in SHAPE.to_dict().items()} | fields
    return note("fingerprint", "{" + ", ".join(f'"{name}": {text}' for name, text in known.items()) + "}")


PROFILES = {
    **{f"layers {text[:9]}": fingerprint(num_layers=text) for text in (*NUMBERS, "5.5", "0")},
    **{f"width {text[:9]}": fingerprint(head_dim=text) for text in (*NUMBERS, "64.5")},
    "more fields": fingerprint(more="1"),
    "architecture no text": fingerprint(architecture="[]"),
    "architecture of controls": fingerprint(architecture='"\\u001b[2J"'),
    "architecture of two lines": fingerprint(architecture='"a\\nb"'),
    "architecture of a megabyte": fingerprint(architecture=json.dumps("x" * 10**6)),
    "architecture of half a character": fingerprint(architecture='"\\ud800"'),
    "nested fingerprint": note("fingerprint", NESTED),
    "no fingerprint": forget("fingerprint"),
    "name of a megabyte": note("model", "x" * 10**6),
    "note of a megabyte": note("date", "x" * 10**6),
    "note with a name of a megabyte": note("x" * 10**6, "x"),
    "very many notes": lambda tensors, metadata: metadata.update({str(number): "" for number in range(2000)}),
    "version of a megabyte": note("format_version", "\x1b[2J" * 10**6),
    "scores of no dimension": put("retrieval", torch.tensor(1.0)),
    "scores of three dimensions": turn("retrieval", lambda each: each[None]),
    "empty scores": turn("retrieval", lambda each: each[:0]),
    "whole numbers": turn("retrieval", torch.Tensor.long),
    "not a number": poke("retrieval", float("nan")),
    "infinite": poke("reasoning_high", float("inf")),
    "negative": poke("retrieval_se", -1.0),
    "sums that overflow": turn("retrieval", lambda each: each * 0 + 3e38),
    "one end": drop("retrieval_low"),
    "huge counts": put("probes_used", torch.tensor([2**62, 2**62])),
    "stranger": put("\x1b[31m" * 100, torch.ones(1)),
}


@pytest.mark.parametrize("change", PROFILES.values(), ids=PROFILES.keys())
def test_a_crafted_profile_is_refused(change, profile, tmp_path):
    path = craft(profile, tmp_path / "p.safetensors", change)
    with pytest.raises(ProfileError) as caught:
        HeadProfile.load(path)
    assert_one_sentence(caught.value)


def test_a_huge_profile_is_refused_at_once(profile, tmp_path):
    path = sparse(profile, tmp_path / "p.safetensors", {"retrieval": (GIGABYTES // 24, 6)})
    begun = time.monotonic()
    with pytest.raises(ProfileError, match="where a profile has at most"):
        HeadProfile.load(path)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("text", [*NUMBERS, NESTED, '{"boats": [3, 2]}', '{"boats": [1e400, 2]}', '{"boats": 1}', "{"])
def test_numbers_that_are_none_are_not_shown(text, tmp_path):
    path = tmp_path / "p.safetensors"
    replace(small_profile(), metadata={"accuracy": text, "settings": f'{{"lengths": {text}}}'}).save(path)
    found = HeadProfile.load(path)
    json.dumps([found.settings, found.accuracy], allow_nan=False)
    assert found.accuracy == {}
    assert headprof(tmp_path, "profile", "show", "p.safetensors", "--json").returncode == 0
    assert headprof(tmp_path, "profile", "show", "p.safetensors").returncode == 0


def test_hostile_profiles_do_not_hide_the_others(profile, tmp_path):
    folder = tmp_path / "profiles"
    folder.mkdir()
    for number, change in enumerate(PROFILES.values()):
        craft(profile, folder / f"{number}.safetensors", change)
    (folder / "good.safetensors").write_bytes(profile.read_bytes())
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "nothing.safetensors").touch()
    os.mkfifo(folder / "pipe.safetensors")
    sparse(profile, folder / "huge.safetensors", {"retrieval": (GIGABYTES // 24, 6)})
    begun = time.monotonic()
    ended = headprof(tmp_path, "profile", "list", "--json")
    assert time.monotonic() - begun < 30 and ended.returncode == 0, ended.stderr
    found = {Path(each["file"]).stem: each for each in json.loads(ended.stdout)}
    assert found["good"]["model"] == "org/Small-Model" and "fault" in found["huge"]
    assert sum("fault" in each for each in found.values()) == len(PROFILES) + 2
    shown = headprof(tmp_path, "profile", "list")
    assert shown.returncode == 0 and "org/Small-Model" in shown.stdout


def test_a_profile_from_before_there_were_checksums_is_read(profile, tmp_path):
    path = craft(
        profile,
        tmp_path / "p.safetensors",
        lambda tensors, metadata: [forget(n)(0, metadata) for n in ("checksum", "checksum_by")],
    )
    assert HeadProfile.load(path).digest() == HeadProfile.load(profile).digest()


# Results of probes

KEY = {
    "version": "1",
    "fingerprint": SHAPE.to_dict(),
    "settings": {"kinds": ["retrieval"], "families": ["code", "boat"]},
}


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "p.probes.safetensors"
    file = ProbesFile(path)
    file.begin(KEY, {})
    shape = (SHAPE.num_layers, SHAPE.num_heads)
    families = ["code", "boat"]
    file.add({3: [ProbeResult("retrieval", family, True, torch.full(shape, 0.5)) for family in families]})
    file.save()
    return path


PROBES = {
    "scores not a number": poke("scores", float("nan")),
    "scores infinite": poke("scores", float("inf")),
    "negative scores": poke("scores", -1.0),
    "scores whose sum overflows": turn("scores", lambda each: each * 0 + 3e38),
    "scores of other heads": turn("scores", lambda each: each[:, :, 1:]),
    "scores of two dimensions": turn("scores", lambda each: each.flatten(1)),
    "scores of no dimension": put("scores", torch.tensor(1.0)),
    "scores of whole numbers": turn("scores", torch.Tensor.long),
    "a probe too few": turn("scores", lambda each: each[1:]),
    "no scores": drop("scores"),
    "no families": drop("family"),
    "answers of numbers": turn("answered", torch.Tensor.long),
    "contexts of fractions": turn("context", torch.Tensor.double),
    "negative context": poke("context", -1),
    "kind without a name": poke("kind", 100),
    "negative family": poke("family", -1),
    "kind that is none": note("names", "boat\ncode\nmagic"),
    "family that was not asked": note("names", "boat\ndoor\nretrieval"),
    "a name twice": note("names", "boat\nboat\nretrieval"),
    "no names": forget("names"),
    "name of a megabyte": note("names", "boat\ncode\n" + "x" * 10**6),
    "very many names": note("names", "\n".join(map(str, range(10**5)))),
    "fingerprint no object": note("key", '{"fingerprint": 1}'),
    "stranger": put("more", torch.ones(1)),
}


@pytest.mark.parametrize("change", PROBES.values(), ids=PROBES.keys())
def test_crafted_results_of_probes_are_refused(change, probes, tmp_path):
    path = craft(probes, tmp_path / "p.probes.safetensors", change)
    with pytest.raises(UsageError) as caught:
        ProbesFile(path).read()
    assert str(caught.value) == f"The results in {path} cannot be read: delete that file, or run without --resume."


@pytest.mark.parametrize("text", ["", "{", "[]", "null", NESTED, '{"seed": 1e400}', '{"seed": NaN}'])
def test_results_of_an_unreadable_run_are_of_another_one(text, probes, tmp_path):
    path = craft(probes, tmp_path / "p.probes.safetensors", note("key", text))
    assert ProbesFile(path).read().key == {}


def test_huge_results_of_probes_are_refused_at_once(probes, tmp_path):
    count = GIGABYTES // 120
    columns = dict.fromkeys(("answered", "context", "kind", "family"), (count,))
    path = sparse(probes, tmp_path / "p.probes.safetensors", {"scores": (count, 5, 6), **columns})
    begun = time.monotonic()
    with pytest.raises(UsageError, match="cannot be read"):
        ProbesFile(path).read()
    assert time.monotonic() - begun < 1


def test_results_from_before_there_were_checksums_are_read(probes, tmp_path):
    path = craft(
        probes, tmp_path / "p", lambda tensors, metadata: [forget(n)(0, metadata) for n in ("checksum", "checksum_by")]
    )
    assert ProbesFile(path).read().key == KEY


# Answers of an evaluation

ANSWER = asdict(Answer("niah", "0", "1k", "full", "", 1.0, 0.5, 1.0, "said", 9, 99, 0.5, "boat"))
LOSS = asdict(Loss(0, "a.txt", "full", "", 64, 100.5, 99))


def answers(text: str) -> str:
    """A row of one answer."""
    return f'{{"task": "niah", "number": 0, "data": "", "answers": [{text}]}}'


def losses(text: str) -> str:
    return f'{{"task": "perplexity", "number": 0, "data": "", "losses": [{text}]}}'


def with_field(values: dict, name: str, text: str) -> str:
    """An answer or loss with JSON in the place of one field."""
    return ", ".join(["{" + f'"{name}": {text}', json.dumps({n: v for n, v in values.items() if n != name})[1:]])


NO_TEXTS = ["1", "null", "[]", '"\\ud800"', json.dumps("x" * 10**6)]
ROWS = {
    **{
        f"{name} {text[:9]}": answers(with_field(ANSWER, name, text))
        for name in ("score", "prompt_tokens", "cache_bytes")
        for text in NUMBERS
    },
    **{
        f"{name} {text[:9]}": answers(with_field(ANSWER, name, text))
        for name in ("agreement", "depth")
        for text in NUMBERS
        if text != "null"
    },
    **{
        f"divergence {text[:9]}": answers(with_field(ANSWER, "divergence", text))
        for text in NUMBERS
        if text not in ("null", "-1")
    },
    **{
        f"{name} {text[:9]}": answers(with_field(ANSWER, name, text))
        for name in ("task", "group", "method", "budget", "family")
        for text in NO_TEXTS
    },
    **{
        f"{name} {text}": answers(with_field(ANSWER, name, text))
        for name in ("question", "text")
        for text in ("1", "null", "{}")
    },
    **{
        f"{name} of losses {text[:9]}": losses(with_field(LOSS, name, text))
        for name in ("tokens", "nll", "cache_bytes", "document")
        for text in NUMBERS
    },
    "score of more than 1": answers(with_field(ANSWER, "score", "1.5")),
    "half a token": answers(with_field(ANSWER, "prompt_tokens", "1.5")),
    "no tokens": losses(with_field(LOSS, "tokens", "0")),
    "more": answers(with_field(ANSWER, "more", "1")),
    "answer of another task": answers(with_field(ANSWER, "task", '"reasoning"')),
    "loss of another document": losses(with_field(LOSS, "document", "7")),
    "losses of another task": losses(json.dumps(LOSS)).replace("perplexity", "niah"),
    "answers of perplexity": answers(json.dumps(ANSWER)).replace("niah", "perplexity"),
    "no answers": answers(""),
    "answers no list": '{"task": "niah", "number": 0, "answers": {}}',
    "answer no object": answers("1"),
    "number no number": answers(json.dumps(ANSWER)).replace('"number": 0', '"number": true'),
    "negative number": answers(json.dumps(ANSWER)).replace('"number": 0', '"number": -1'),
    "task no text": answers(json.dumps(ANSWER)).replace('"task": "niah", "number"', '"task": ["niah"], "number"'),
    "data no text": answers(json.dumps(ANSWER)).replace('"data": ""', '"data": 1'),
    "more in the row": answers(json.dumps(ANSWER)).replace('"data": ""', '"data": "", "more": 1'),
    "nested": answers(NESTED),
    "nothing": "",
    "bytes": "\x00\x00",
}


def journal(path: Path, *rows: str) -> Journal:
    path.write_text("".join(f"{row}\n" for row in ('{"run": {"seed": 1}}', *rows)), encoding="utf-8")
    return Journal(path)


def test_sound_answers_are_read(tmp_path):
    rows = answers(json.dumps(ANSWER)), losses(json.dumps(LOSS))
    found = journal(tmp_path / "answers.jsonl", *rows).read().results
    assert found == {("niah", 0): [Answer(**ANSWER)], ("perplexity", 0): [Loss(**LOSS)]}
    half = journal(tmp_path / "answers.jsonl", answers(json.dumps(ANSWER | {"text": "half \ud800"}))).read()
    assert half.results["niah", 0][0].text == "half \ud800"  # texts that models write are kept as they are


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_crafted_answers_are_refused(row, tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(UsageError) as caught:
        journal(path, row).read()
    assert str(caught.value) == f"The answers in {path} are damaged: delete that file, or run without --resume."


def test_a_question_answered_twice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="are damaged"):
        journal(tmp_path / "answers.jsonl", *[answers(json.dumps(ANSWER))] * 2).read()


@pytest.mark.parametrize("first", ["", "{}", "[]", '{"run": 1}', f'{{"run": {NESTED}}}', '{"run": {"seed": 1e400}}'])
def test_a_crafted_first_line_is_refused(first, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{first}\n")
    with pytest.raises(UsageError, match="are damaged"):
        Journal(path).read()


def test_answers_that_are_no_file_or_have_no_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.truncate(os.open(tmp_path / "zeros", os.O_CREAT | os.O_WRONLY), GIGABYTES)
    for path in (tmp_path / "pipe", tmp_path / "zeros", Path("/dev/zero")):
        begun = time.monotonic()
        with pytest.raises(UsageError, match="are damaged"):
            Journal(path).read()
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("changes", [{"method": "snapkv"}, {"budget": "300"}, {"task": "magic"}])
def test_answers_of_no_candidate_are_refused(changes, tmp_path):
    path = tmp_path / "answers.jsonl"
    task = changes.get("task", "niah")
    file = journal(path, answers(json.dumps(ANSWER | changes)).replace('"task": "niah"', f'"task": "{task}"'))
    file.candidates = [("full", "")]
    with pytest.raises(UsageError) as caught:
        file.accept(file.read())
    assert str(caught.value) == (
        f"The answers to question 0 of {task} in {path} are not of this run's tasks, methods and budgets: choose "
        "another folder with -o, or run without --resume to start anew."
    )


# Needles

NEEDLE = {"needle": "The key is red.", "real_needle": "red", "answer": "red", "question": "What is the key?"}
NEEDLES = {
    **{
        f"{name} {text[:9]}": with_field(NEEDLE, name, text)
        for name in NEEDLE
        for text in ("1", "null", "[]", '"\\ud800"', '" "')
    },
    **{
        f"{name} {text[:9]}": with_field(NEEDLE, name, text)
        for name in ("kind", "family")
        for text in (*NUMBERS, *NO_TEXTS)
    },
    **{
        f"prefix {text[:9]}": with_field(NEEDLE, "answer_prefix", text)
        for text in (*NUMBERS, *NO_TEXTS[:-1])
        if text != '"1"'
    },
    "family of two lines": with_field(NEEDLE, "family", '"a\\nb"'),
    "nested": NESTED,
    "nested field": with_field(NEEDLE, "more", NESTED),
    "many digits": with_field(NEEDLE, "more", "9" * 5000),
    "no object": "1e400",
    "bytes": "\x00",
}
NEEDLES.pop('family "1"')


@pytest.mark.parametrize("line", NEEDLES.values(), ids=NEEDLES.keys())
def test_crafted_needles_are_refused(line, tmp_path):
    path = tmp_path / "needles.jsonl"
    path.write_text(f"{json.dumps(NEEDLE)}\n{line}\n", encoding="utf-8")
    with pytest.raises(ProbeError, match=r"^Line 2 of ") as caught:
        load_needles(path)
    assert_one_sentence(caught.value)


def test_needles_that_are_no_file_or_have_no_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.truncate(os.open(tmp_path / "zeros", os.O_CREAT | os.O_WRONLY), GIGABYTES)
    for path in (tmp_path / "pipe", tmp_path / "zeros", Path("/dev/zero"), tmp_path):
        with pytest.raises(UsageError):
            load_needles(path)


# Imports

PAPERS = {
    **{f"score {text[:9]}": f'{{"0-0": [{text}]}}' for text in NUMBERS},
    "score beyond all": '{"0-0": [3e38]}',
    "no list": '{"0-0": 1}',
    "empty list": '{"0-0": []}',
    "head of a megabyte": json.dumps({"x" * 10**6: [1]}),
    "head far away": '{"0-0": [1], "99999-99999": [1]}',
    "half a character": '{"\\ud800": [1]}',
    "nested": NESTED,
    "nested score": f'{{"0-0": {NESTED}}}',
    "nothing": "",
    "bytes": "\x00",
}
TABLES = {
    "score beyond all": "layer,head,retrieval\n0,0,3e38\n",
    **{f"score {text[:9]}": f"layer,head,retrieval\n0,0,{text}\n" for text in (*NUMBERS, "x" * 10**5) if text != '"1"'},
    "head far away": "layer,head,retrieval\n0,0,1\n99999,99999,1\n",
    "many digits": f"layer,head,retrieval\n{'9' * 5000},0,1\n",
    "long field": f"layer,head,retrieval\n0,0,{'1' * 10**6}\n",
    "bytes": "layer,head,retrieval\n\x00,0,1\n",
    "too few fields": "layer,head,retrieval\n0\n",
    "nothing": "",
}


@pytest.mark.parametrize("text", PAPERS.values(), ids=PAPERS.keys())
def test_crafted_papers_json_is_refused(text, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        import_papers_json({"retrieval": path}, "m", replace(SHAPE, num_layers=1, num_heads=1, num_kv_heads=1))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES.keys())
def test_a_crafted_table_is_refused(text, tmp_path):
    path = tmp_path / "heads.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        import_csv(path, "m", replace(SHAPE, num_layers=1, num_heads=1, num_kv_heads=1))
    assert_one_sentence(caught.value)


def test_imports_that_are_no_file_or_have_no_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.truncate(os.open(tmp_path / "zeros", os.O_CREAT | os.O_WRONLY), GIGABYTES)
    for path in (tmp_path / "pipe", tmp_path / "zeros", Path("/dev/zero")):
        for arguments in (["--retrieval", str(path)], [str(path)]):
            ended = headprof(tmp_path, "profile", "import", "--model", "m", "--shape", "llama-3-8b", *arguments)
            assert ended.returncode == 1 and len(ended.stderr.strip().splitlines()) == 1


# Damage


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("kind", ["profile", "probes", "document"])
@in_a_few_examples()
@given(data=st.data())
def test_a_flipped_bit_is_noticed(data, kind, request, loaded, tmp_path):
    """The file is refused, or the bit means nothing, as blanks do."""
    source: Path = request.getfixturevalue(kind)
    content = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(flipped(content, data.draw(st.integers(0, 8 * len(content) - 1))))
    read = {
        "profile": lambda: HeadProfile.load(path),
        "probes": lambda: ProbesFile(path).read(),
        "document": lambda: load_document(path, loaded),
    }[kind]
    try:
        read()
    except (ProfileError, CacheError, UsageError) as error:
        assert_one_sentence(error)
        return
    (tensors, metadata), (kept, kept_metadata) = parts_of(path), parts_of(source)
    assert metadata == kept_metadata and tensors.keys() == kept.keys()
    assert all(same(tensors[name], kept[name]) for name in kept)


@in_a_few_examples()
@given(name=st.sampled_from(["checksum", "checksum_by"]), bit=st.integers(0, 7), at=st.integers(0, 7))
def test_a_checksum_is_not_lost_by_damage_to_its_name(name, bit, at, profile, probes, tmp_path):
    for source, read in ((profile, HeadProfile.load), (probes, lambda path: ProbesFile(path).read())):
        content = source.read_bytes()
        path = tmp_path / source.name
        path.write_bytes(flipped(content, 8 * (content.index(f'"{name}"'.encode()) + 1 + at) + bit))
        with pytest.raises(HeadprofError):
            read(path)


def test_altered_files_say_so(profile, probes, tmp_path):
    for source in (profile, probes):
        tensors, _ = parts_of(source)
        name = "retrieval" if source is profile else "scores"
        place = source.read_bytes().index(tensors[name].numpy().tobytes())
        (tmp_path / source.name).write_bytes(flipped(source.read_bytes(), 8 * place))
    with pytest.raises(ProfileError, match=r"has been altered since it was made: restore it, or run `headprof score"):
        HeadProfile.load(tmp_path / profile.name)
    with pytest.raises(UsageError, match=r"have been altered since they were written: delete that file, or run"):
        ProbesFile(tmp_path / probes.name).read()


def test_lists_of_profiles_take_what_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADPROF_DATA", str(tmp_path / "none"))
    Path("profiles").mkdir()
    Path("profiles", "x.safetensors").write_bytes(b"\xff" * 100)
    found = [each for each in list_profiles() if each.path.parent == Path("profiles")]
    assert [each.profile for each in found] == [None]
