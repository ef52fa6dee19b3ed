"""Budgets learned from the one ranking of all heads' rows: what is learned, how it is kept, and what it allots."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.profiles import random_profile, random_shares, small_profile
from support.tiny_models import load_tiny, save_tiny, tiny_model
from test_reconstruction import TEXT, repeated

from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.budget import ProfileBudget
from headprof.compression.methods.global_budget import ranked_together
from headprof.compression.methods.learned_budget import LearnedBudget, kept_at
from headprof.compression.methods.reduction import ranking
from headprof.compression.session import compressed, make_plan
from headprof.errors import CacheError, ProfileError, UsageError
from headprof.models.loading import load_model
from headprof.models.prompt_encoder import PromptEncoder
from headprof.models.shape import HeadShape
from headprof.profile.csv_table import import_csv, write_csv
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.calibration import CalibrationSettings, repeated_documents
from headprof.scoring.reconstruction import head_scores, kept_shares, largest_attention, learn, of_groups
from headprof.utils.tensor_files import with_checksum

# What is learned.


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_scores_are_those_of_the_whole_matrices(arch):
    loaded, twin = load_tiny(arch), tiny_model(arch, attn="eager")
    document, observers = repeated(loaded, TEXT)
    found = largest_attention(loaded, document, observers)
    attentions = twin(torch.tensor([document + observers]), output_attentions=True, use_cache=False).attentions
    paid = torch.stack([each[0, :, len(document) :, : len(document)] for each in attentions])  # [L, H, Q, T]
    torch.testing.assert_close(found, paid.amax(dim=2), atol=1e-5, rtol=1e-4)
    grouped = paid.unflatten(1, (2, -1)).amax(dim=(2, 3))
    torch.testing.assert_close(of_groups(found, 2), grouped, atol=1e-5, rtol=1e-4)
    for layer in range(len(paid)):
        for head in range(paid.shape[1]):
            tokens = [max(row[token] for row in paid[layer, head].tolist()) for token in range(1, len(document) - 2)]
            assert float(head_scores(found)[layer, head]) == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(4, 40),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
def test_what_heads_keep_is_what_the_one_ranking_gives_them(layers, heads, tokens, share, seed):
    scores = torch.rand(layers, heads, tokens, generator=torch.Generator().manual_seed(seed))
    kept = kept_shares(scores, (share, 0.97))
    free = tokens - 3
    total = round(share * layers * heads * free)
    ranked = [ranking(each[None], torch.ones(1, tokens, dtype=torch.bool), sinks=1, keep_last=2) for each in scores]
    counts = ranked_together(ranked, [total + 3 * layers * heads], 0.0)[0]
    assert torch.equal((kept[0] * free).round().long() + 3, counts)
    assert (kept[1] >= kept[0]).all()


def test_documents_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"Sentence number {n} is about boats." for n in range(40)))
    loaded, frame = load_tiny(), len(PromptEncoder(load_tiny().tokenizer).document_ids(""))
    asked = CalibrationSettings(texts=3, lengths=(64,), folder=tmp_path)
    pairs = repeated_documents(loaded, asked, (512,)).pairs
    assert len(pairs) == 3 and all(40 < len(document) - frame <= 64 for document, _ in pairs)
    assert "is about boats" in loaded.tokenizer.decode(pairs[2][0])
    assert [again for _, again in pairs] == [repetition(loaded, document) for document, _ in pairs]
    with pytest.raises(UsageError, match=r"hold \d texts of such lengths, fewer than 4"):
        repeated_documents(loaded, replace(asked, texts=4, lengths=(512,)), (512,), fewest=4)
    with pytest.raises(UsageError, match=r"give one that holds .* files with --text-folder"):
        replace(asked, folder=tmp_path / "none").check()


def test_documents_that_the_model_cannot_repeat():
    loaded = replace(load_tiny(), max_positions=1500)
    assert repeated_documents(loaded, CalibrationSettings(2), (512, 1024)).lengths == (512,)
    with pytest.raises(
        UsageError, match=r"can repeat texts of at most [67]\d\d tokens: give --text-lengths up to that"
    ):
        repeated_documents(loaded, CalibrationSettings(2, lengths=(1024,)), (512,))
    with pytest.raises(UsageError, match="raise --text-lengths"):
        CalibrationSettings(2, lengths=(8,)).check()
    with pytest.raises(UsageError, match="ask for --texts of at least 3"):
        CalibrationSettings(2).check(3)


def test_learning_is_the_mean_over_texts():
    loaded, asked = load_tiny(), CalibrationSettings(texts=3, lengths=(320,))
    learned = learn(loaded, asked)
    kept, scores = learned.kept, learned.scores
    pairs = repeated_documents(loaded, asked, ()).pairs
    largest = [largest_attention(loaded, *pair) for pair in pairs]
    each = [kept_shares(of_groups(text, 2)) for text in largest]
    torch.testing.assert_close(kept.double(), torch.stack(each).mean(dim=0))
    of_texts = torch.stack([head_scores(text) for text in largest])
    torch.testing.assert_close(scores.scores, of_texts.mean(dim=0))
    torch.testing.assert_close(scores.error, of_texts.std(dim=0) / 3**0.5)
    assert ((scores.interval[0] <= scores.scores) & (scores.scores <= scores.interval[1])).all()
    assert learned.made["texts"] == 3 and kept.shape == (8, 2, 2)
    assert HeadProfile("tiny", loaded.shape, random_profile(loaded.model).scores, kept_shares=kept)


def test_one_text_says_nothing_of_others():
    scores = learn(load_tiny(), CalibrationSettings(texts=1, lengths=(320,))).scores
    assert scores.error is None and scores.interval is None and (scores.scores > 0).all()


def repetition(loaded, text):
    return PromptEncoder(loaded.tokenizer).repetition_ids(text)


# What is allotted.


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 6),
    heads=st.integers(1, 4),
    context=st.integers(10, 3000),
    share=st.floats(0, 1),
    mix=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_sums_are_exact_and_bounds_hold(layers, heads, context, share, mix, seed):
    shape = HeadShape("M", layers, 2 * heads, heads, 8, 100)
    learned = random_shares(shape, seed)
    scores = torch.cat([learned, torch.rand(1, layers, heads)]) if mix else learned
    budget = max(3, round(share * context))
    counts = LearnedBudget(mix).allocate(scores, budget=budget, context_length=context, always_kept=3)
    assert int(counts.sum()) == min(budget, context) * layers * heads
    assert int(counts.min()) >= 3 and int(counts.max()) <= context
    if not mix and budget < context:
        wanted = 3 + kept_at(learned, (budget - 3) / (context - 3)) * (context - 3)
        assert ((counts - wanted).abs() < 1).all()


@settings(max_examples=60, deadline=None)
@given(first=st.floats(0, 1), second=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_interpolation_grows_with_the_share_and_has_it_as_mean(first, second, seed):
    learned = random_shares(HeadShape("M", 3, 4, 2, 8, 100), seed)
    low, high = sorted((first, second))
    one, other = kept_at(learned, low), kept_at(learned, high)
    assert (other - one >= -1e-12).all() and (one >= 0).all() and (other <= 1).all()
    assert float(one.mean()) == pytest.approx(low, abs=1e-6)


def test_what_is_known_is_met_exactly():
    learned = random_shares(HeadShape("M", 3, 4, 2, 8, 100))
    for each in learned:
        torch.testing.assert_close(kept_at(learned, float(each.double().mean())), each.double(), atol=1e-6, rtol=0)
    assert kept_at(learned, 1.0).eq(1).all() and kept_at(learned, 0.0).eq(0).all()


def test_a_mix_goes_from_learned_budgets_to_those_of_headkv():
    scores = torch.cat([random_shares(HeadShape("M", 4, 4, 2, 8, 100)), torch.rand(1, 4, 2)])
    sizes = {"budget": 40, "context_length": 400, "always_kept": 3}
    allotted = [LearnedBudget(mix).allocate(scores, **sizes) for mix in (1e-9, 0.5, 1.0)]
    learned = LearnedBudget().allocate(scores[:-1], **sizes)
    headkv = ProfileBudget().allocate(scores[-1], **sizes)
    assert torch.equal(allotted[0], learned) and (allotted[2] - headkv).abs().max() <= 1
    assert not torch.equal(allotted[1], learned) and not torch.equal(allotted[1], headkv)
    with pytest.raises(UsageError, match="A mix of 2 is no weight"):
        LearnedBudget(2)


def test_a_document_has_learned_budgets_and_goes_on_by_them(tiny, tmp_path):
    profile = random_profile(tiny.model)
    for mix in (0.0, 0.5):
        plan = make_plan(tiny.model, profile, method="learned-kvzip", budget=16, buffer=6, mix=mix)
        cache = compress_document(tiny, TEXT, plan)
        seen = cache.get_seq_length()
        assert torch.equal(cache.lengths[:, 0], plan.allocation(seen))
        assert torch.equal(cache.plan.decode_allocation(3 * seen), plan.allocation(seen))
        save_document(cache, tmp_path / "doc.kv.safetensors", tiny)
        again, _ = load_document(tmp_path / "doc.kv.safetensors", tiny)
        assert torch.equal(again.plan.scores, plan.scores) and again.plan.method.options()["mix"] == mix
        answers = [ask(tiny, each, "How many boats?", max_new_tokens=20).text for each in (cache, again)]
        assert answers[0] == answers[1]


def test_a_plan_allots_by_the_length():
    """Another length is another share, also where no head has met the end of the shorter text."""
    model = tiny_model()
    plan = make_plan(model, random_profile(model), method="learned-kvzip", budget=40)
    found = [plan.allocation(length) for length in (4000, 400, 4000)]
    assert torch.equal(found[0], found[2]) and int(found[0].max()) < 400
    sizes = {"budget": 40, "context_length": 400, "always_kept": 3}
    assert torch.equal(found[1], LearnedBudget().allocate(plan.scores, **sizes))


# How it is kept.


def test_a_profile_without_says_how_to_add_it():
    model = tiny_model()
    profile = replace(random_profile(model), kept_shares=None)
    with pytest.raises(ProfileError, match=r"add them with `headprof score --model tiny --reconstruction --add-to"):
        make_plan(model, profile, method="learned-kvzip")
    with pytest.raises(ProfileError, match="needs a head profile"):
        make_plan(model, method="learned-kvzip")


def test_a_profile_keeps_it(tmp_path):
    plain = small_profile()
    profile = replace(plain, kept_shares=random_shares(plain.shape))
    profile.save(tmp_path / "p.safetensors")
    plain.save(tmp_path / "plain.safetensors")
    again = HeadProfile.load(tmp_path / "p.safetensors")
    assert torch.equal(again.kept_shares, profile.kept_shares) and again.digest() == profile.digest()
    assert HeadProfile.load(tmp_path / "plain.safetensors").digest() == plain.digest() != profile.digest()
    assert format_version(tmp_path / "p.safetensors") == "3" and format_version(tmp_path / "plain.safetensors") == "2"
    assert again.shares_together[0].endswith("%") and len(again.shares_together) == 3
    write_csv(tmp_path / "p.csv", profile)
    imported = import_csv(tmp_path / "p.csv", profile.model_name, profile.shape)
    assert torch.equal(imported.kept_shares, profile.kept_shares) and imported.digest() == profile.digest()


def format_version(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["format_version"]


def damaged(name, kept):
    bad = kept.clone()
    match name:
        case "beyond one":
            bad[2, 0, 0] = 1.5
        case "no number":
            bad[0, 0, 0] = float("nan")
        case "shrinking":
            bad = bad.flip(0)
        case "twice":
            bad[1] = bad[0]
        case "another grid":
            bad = bad[:, 1:]
        case "another type":
            bad = bad.double()
        case "none":
            bad = bad[:0]
    return bad.contiguous()


@pytest.mark.parametrize(
    "name", ["beyond one", "no number", "shrinking", "twice", "another grid", "another type", "none"]
)
def test_damaged_numbers_are_refused(tmp_path, name):
    from safetensors import safe_open
    from safetensors.torch import save_file

    profile = replace(small_profile(), kept_shares=random_shares(small_profile().shape))
    path = tmp_path / "p.safetensors"
    profile.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("checksum")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["reconstruction"] = damaged(name, tensors["reconstruction"])
    save_file(tensors, path, metadata=with_checksum(tensors, metadata))
    with pytest.raises(ProfileError, match=r"is damaged \(its shares kept in reconstruction .*restore it, or run"):
        HeadProfile.load(path)


def test_a_csv_whose_query_heads_disagree_is_refused(tmp_path):
    profile = replace(small_profile(), kept_shares=random_shares(small_profile().shape))
    write_csv(tmp_path / "p.csv", profile)
    lines = (tmp_path / "p.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index("kept_1")] = "0.001"
    (tmp_path / "p.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    with pytest.raises(ProfileError, match="differ between query heads of one KV head"):
        import_csv(tmp_path / "p.csv", profile.model_name, profile.shape)


def test_a_document_with_altered_shares_is_refused(tiny, tmp_path):
    plan = make_plan(tiny.model, random_profile(tiny.model), method="learned-kvzip", budget=16)
    cache = compress_document(tiny, TEXT, plan)
    cache.plan.scores[1, 0, 0] = 3.0
    save_document(cache, tmp_path / "doc.kv.safetensors", tiny)
    with pytest.raises(CacheError, match="its scores are not all from 0 to 1"):
        load_document(tmp_path / "doc.kv.safetensors", tiny)


# The command.


def test_the_command_adds_to_a_profile(tmp_path, monkeypatch):
    monkeypatch.setattr("headprof.tuning.mixing.PROBES", 1)
    save_tiny(tmp_path / "tiny", chat=True)
    profile = replace(random_profile(tiny_model()), kept_shares=None, model_name="tiny")
    profile.save(tmp_path / "p.safetensors")
    options = ("--model", "tiny", "--texts", "2", "--text-lengths", "320", "--add-to", "p.safetensors")
    done = headprof(tmp_path, "score", "--reconstruction", "--no-refine", *options)
    assert done.returncode == 0 and done.stdout.strip() == "p.safetensors", done.stderr
    learned = HeadProfile.load(tmp_path / "p.safetensors")
    assert learned.kept_shares.shape == (8, 2, 2) and torch.equal(learned.reasoning, profile.reasoning)
    assert json.loads(learned.metadata["reconstruction"])["lengths"] == [320]
    assert learned.kinds == ("retrieval", "reasoning", "reconstruction")
    shown = headprof(tmp_path, "profile", "show", "p.safetensors")
    assert "learned budgets" in shown.stdout and "2%" in shown.stdout
    (tmp_path / "doc.txt").write_text(TEXT)
    compress = ("compress", "--file", "doc.txt", "--method", "learned-kvzip", "--budget", "16", "--json")
    made = headprof(tmp_path, *compress, "--model", "tiny", "--profile", "p.safetensors")
    assert made.returncode == 0 and json.loads(made.stdout)["tokens_per_head"] == 16, made.stderr


def test_the_command_makes_a_profile_without_probes(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    asked = ("score", "--model", "tiny", "--reconstruction", "--no-probes", "--texts", "2", "--text-lengths", "320")
    done = headprof(tmp_path, *asked, "-o", "p.safetensors")
    assert done.returncode == 0 and done.stdout.strip() == "p.safetensors", done.stderr
    assert "Top reconstruction heads" in done.stderr
    made = HeadProfile.load(tmp_path / "p.safetensors")
    assert made.kinds == ("reconstruction",) and made.kept_shares is not None and not made.probes_used
    assert format_version(tmp_path / "p.safetensors") == "4" and not list(tmp_path.glob("*.probes.safetensors"))
    added = learn(load_model(str(tmp_path / "tiny"), device="cpu"), CalibrationSettings(2, (320,)))
    torch.testing.assert_close(made.scores["reconstruction"], added.scores.scores)
    again = headprof(tmp_path, *asked, "-o", "p.safetensors")
    assert again.returncode == 0 and HeadProfile.load(tmp_path / "p.safetensors").digest() == made.digest()
    (tmp_path / "doc.txt").write_text(TEXT)
    compress = (
        "compress",
        "--file",
        "doc.txt",
        "--budget",
        "16",
        "--json",
        "--model",
        "tiny",
        "--profile",
        "p.safetensors",
    )
    by = headprof(tmp_path, *compress, "--model", "tiny", "--method", "headkv-r2:scores=reconstruction")
    assert by.returncode == 0 and json.loads(by.stdout)["tokens_per_head"] == 16, by.stderr
    lacking = headprof(tmp_path, *compress, "--model", "tiny", "--method", "headkv-r2")
    assert lacking.returncode == 1 and "choose another kind, such as scores=reconstruction" in one_line(lacking.stderr)
    shown = headprof(tmp_path, "profile", "show", "p.safetensors")
    assert "probes used      none" in shown.stdout and "Top reconstruction heads" in shown.stdout


def test_scores_from_probes_are_not_replaced_by_none(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    small_profile().save(tmp_path / "p.safetensors")
    before = (tmp_path / "p.safetensors").read_bytes()
    done = headprof(tmp_path, "score", "--model", "tiny", "--reconstruction", "--no-probes", "-o", "p.safetensors")
    assert done.returncode == 2 and "give --add-to p.safetensors in place of --no-probes" in one_line(done.stderr)
    assert (tmp_path / "p.safetensors").read_bytes() == before


def one_line(text):
    return " ".join(text.split())


def test_the_command_refuses_in_one_sentence(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    adding = ("--reconstruction", "--add-to", "none.safetensors")
    for options, message in (
        (("--texts", "3"), "add --reconstruction or --surrogate, or leave them away"),
        (("--add-to", "p.safetensors"), "add --reconstruction or --curves, or leave it away"),
        (("--surrogate", "--add-to", "p.safetensors"), "leave --surrogate, or --add-to, away"),
        (("--reconstruction", "--add-to", "none.safetensors"), "There is no profile file at none.safetensors"),
        ((*adding, "--probes", "4"), "With --add-to no probes are asked: leave --probes away"),
        ((*adding, "--resume"), "With --add-to no probes are asked: leave --resume away"),
        ((*adding, "--preset", "standard"), "With --add-to no probes are asked: leave --preset away"),
        (("--no-probes",), "learned from repeated texts: add --reconstruction, or leave it away"),
        ((*adding, "--no-probes"), "with --add-to none are asked in any case, or leave it away"),
        (("--reconstruction", "--no-probes", "--probes", "4"), "With --no-probes no probes are asked: leave --probes"),
        (("--reconstruction", "--text-folder", "nowhere"), "There is no folder nowhere"),
        (("--reconstruction", "--text-lengths", "9k"), "tiny can repeat texts of at most"),
        (("--reconstruction", "--text-folder", "tiny"), "The .txt files in tiny hold 0 texts"),
    ):
        done = headprof(tmp_path, "score", "--model", "tiny", *options)
        assert done.returncode != 0 and message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.safetensors"))


def test_a_run_for_probes_says_that_learned_budgets_go(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    replace(random_profile(tiny_model()), model_name="tiny").save(tmp_path / "p.safetensors")
    probes = ("--probes", "4", "--lengths", "512", "--include-failed", "--no-tune", "-o", "p.safetensors")
    said = "The budgets learned for p.safetensors go with it: learn them again with --reconstruction."
    done = headprof(tmp_path, "score", "--model", "tiny", *probes)
    assert done.returncode == 0 and said in " ".join(done.stderr.split())
    assert "The influence curves of p.safetensors go with it" in " ".join(done.stderr.split())
    assert "The parameters tuned for p.safetensors go with it" in " ".join(done.stderr.split())
    again = headprof(tmp_path, "score", "--model", "tiny", *probes)
    assert again.returncode == 0 and " go with it" not in " ".join(again.stderr.split())


def test_an_interrupted_run_leaves_the_profile_as_it_was(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny", chat=True)
    replace(random_profile(tiny_model()), kept_shares=None).save(tmp_path / "p.safetensors")
    before = (tmp_path / "p.safetensors").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("headprof.scoring.reconstruction.kept_shares", interrupted)
    options = ("--model", "tiny", "--texts", "2", "--text-lengths", "320", "--add-to", "p.safetensors")
    done = headprof(tmp_path, "score", "--reconstruction", *options)
    assert done.returncode == 130 and (tmp_path / "p.safetensors").read_bytes() == before
    assert {each.name for each in tmp_path.glob("*.safetensors*")} == {"p.safetensors"}


def test_a_document_is_compressed_by_what_its_profile_has(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    (tmp_path / "doc.txt").write_text(TEXT)
    with_budgets = replace(random_profile(tiny_model()), model_name="tiny")
    compress = (
        "compress",
        "--model",
        "tiny",
        "--file",
        "doc.txt",
        "--budget",
        "16",
        "--json",
        "--profile",
        "p.safetensors",
    )
    command = "`headprof score --model tiny --reconstruction --add-to p.safetensors`"
    hint = f"The profile has no budgets for learned-kvzip: {command} learns them."
    for profile, more, method in (
        (with_budgets, (), "learned-kvzip"),
        (with_budgets, ("--set", "mix=0.5"), "learned-kvzip"),
        (with_budgets, ("--observe", "Who?"), "headkv-r2"),
        (with_budgets, ("--method", "snapkv"), "snapkv"),
        (replace(with_budgets, kept_shares=None), (), "headkv-kvzip"),
    ):
        profile.save(tmp_path / "p.safetensors")
        made = headprof(tmp_path, *compress, *more)
        assert made.returncode == 0 and json.loads(made.stdout)["method"] == method, made.stderr
        assert (hint in " ".join(made.stderr.split())) == (method == "headkv-kvzip")
    (tmp_path / "p.safetensors").unlink()
    without = headprof(tmp_path, *compress)
    assert without.returncode == 1 and "There is no profile file at p.safetensors" in " ".join(without.stderr.split())


def test_generate_with_learned_budgets():
    model = tiny_model()
    ids = torch.randint(3, 500, (1, 60), generator=torch.Generator().manual_seed(0))
    with compressed(model, random_profile(model), method="learned-kvzip", budget=12), torch.no_grad():
        assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 64)


def test_no_profile_is_hidden_by_one_without_probes(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    (tmp_path / "data-home/profiles").mkdir(parents=True)
    replace(random_profile(tiny_model()), model_name="tiny").save(tmp_path / "data-home/profiles/tiny.safetensors")
    learning = ("score", "--model", "tiny", "--reconstruction", "--no-probes", "--texts", "1", "--text-lengths", "64")
    done = headprof(tmp_path, *learning)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "which would not be found any more: give --add-to" in said
    assert not (tmp_path / "profiles").exists()
    assert headprof(tmp_path, *learning, "-o", "other.safetensors").returncode == 0


def test_texts_may_lie_beside_the_profile(tmp_path, monkeypatch):
    monkeypatch.setattr("headprof.tuning.mixing.PROBES", 1)
    save_tiny(tmp_path / "tiny", chat=True)
    replace(random_profile(tiny_model()), model_name="tiny", kept_shares=None).save(tmp_path / "p.safetensors")
    (tmp_path / "doc.txt").write_text(TEXT * 3)
    adding = (
        "score",
        "--model",
        "tiny",
        "--reconstruction",
        "--no-refine",
        "--add-to",
        "p.safetensors",
        "--texts",
        "1",
    )
    done = headprof(tmp_path, *adding, "--text-lengths", "64", "--text-folder", ".")
    assert done.returncode == 0, done.stderr
    assert HeadProfile.load(tmp_path / "p.safetensors").kept_shares is not None
    refused = headprof(tmp_path, *adding, "--text-lengths", "64", "--text-folder", ".", "-o", "doc.txt")
    assert refused.returncode != 0 and (tmp_path / "doc.txt").read_text() == TEXT * 3
