"""Commands that messages name call a model what the user called it, so that they can be copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.commands import headprof
from support.profiles import random_profile, small_profile
from support.tiny_models import save_tiny, tiny_model

from headprof.profile import finding
from headprof.profile.finding import learning_command
from headprof.profile.head_profile import HeadProfile

PROFILE = "profiles/tiny.safetensors"


@pytest.fixture
def place(tmp_path):
    """A model in a folder, its profile where it is looked for, and a text."""
    save_tiny(tmp_path / "my/tiny", chat=True)
    (tmp_path / "doc.txt").write_text("The keeper counted nine grey boats. " * 8)
    profile = replace(random_profile(tiny_model()), kept_shares=None)
    profile.save(tmp_path / PROFILE)
    small_profile().save(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    return tmp_path


READING = ("--file", "doc.txt", "--prompt", "Who?", "--budget", "16")


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (("generate", *READING, "--method", "headkv-r2:scores=write"), ""),
        (("generate", *READING, "--method", "learned-kvzip"), " --reconstruction --add-to PROFILE"),
        (("generate", *READING, "--profile", "other.safetensors"), ""),
        (("generate", *READING, "--profile", "broken.safetensors"), ""),
        (("generate", *READING, "--method", "kvzap"), " --surrogate"),
        (("generate", *READING, "--method", "kvzap", "--surrogate", "broken.safetensors"), " --surrogate"),
        (("heatmap", "--which", "write"), ""),
        (("heatmap", "--uncertainty"), ""),
        (("heatmap", "broken.safetensors"), ""),
        (("eval", "--methods", "headkv:scores=write", "--probes", "2", "--lengths", "400"), ""),
        (("score", "--reconstruction", "--add-to", "other.safetensors", "--texts", "1", "--text-lengths", "64"), ""),
        (("score", "--reconstruction", "--add-to", "broken.safetensors", "--texts", "1"), ""),
    ],
)
def test_a_command_names_the_model_as_the_user_did(place, arguments, more):
    done = headprof(place, *arguments, "--model", "my/tiny")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"`headprof score --model my/tiny{more}`" in " ".join(done.stderr.split())


@pytest.mark.parametrize("arguments", [("show", "my/tiny", "--which", "write"), ("export", "my/tiny", "x.json")])
def test_so_do_the_commands_for_profiles(place, arguments):
    if arguments[0] == "export":
        arguments = (*arguments, "--which", "write")
    done = headprof(place, "profile", *arguments)
    assert done.returncode == 1 and "`headprof score --model my/tiny`" in " ".join(done.stderr.split())
    named = headprof(place, "profile", arguments[0], PROFILE, *arguments[2:])
    assert named.returncode == 1 and "`headprof score --model tiny`" in " ".join(named.stderr.split())


def test_the_hint_for_learned_budgets_can_be_copied(place):
    done = headprof(place, "compress", "--file", "doc.txt", "--budget", "16", "--model", "my/tiny")
    command = f"headprof score --model my/tiny --reconstruction --add-to {PROFILE}"
    assert done.returncode == 0 and f"`{command}` learns them." in " ".join(done.stderr.split())
    few = ("--texts", "1", "--text-lengths", "64", "--no-refine")
    assert headprof(place, *command.split()[1:], *few).returncode == 0
    assert HeadProfile.load(place / PROFILE).kept_shares is not None


def test_a_profile_that_ships_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "site/profiles"
    shipped.mkdir(parents=True)
    small_profile().save(shipped / "Small-Model.safetensors")
    monkeypatch.setattr(finding, "asset_dir", lambda name: tmp_path / "site" / name)
    command = learning_command("org/Small-Model")
    assert command == (
        f"headprof score --model org/Small-Model --reconstruction --add-to {shipped / 'Small-Model.safetensors'} "
        "-o profiles/Small-Model.safetensors"
    )
    monkeypatch.chdir(tmp_path / "site")  # as in a checkout
    assert learning_command("org/Small-Model").endswith("--add-to profiles/Small-Model.safetensors")


def test_how_a_model_was_named_is_in_no_file(tmp_path):
    profile = small_profile()
    replace(profile, given="here/it/is").save(tmp_path / "a.safetensors")
    profile.save(tmp_path / "b.safetensors")
    assert b"here/it/is" not in (tmp_path / "a.safetensors").read_bytes()
    one, other = (HeadProfile.load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.digest() == other.digest() and one.metadata == other.metadata
    assert HeadProfile.load(tmp_path / "a.safetensors").called == "org/Small-Model"
    assert HeadProfile.load(tmp_path / "a.safetensors", model_name="my/model").called == "my/model"
