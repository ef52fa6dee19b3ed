"""The heatmap: valid pictures of every size, the right heads marked, the same bytes twice."""

import itertools
import json
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from headprof.errors import HeadprofError, ProfileError, UsageError
from headprof.plots.heads import _bar_ticks, _decimals, _draw, _tick_step, heatmap
from headprof.profile import KINDS, HeadProfile
from headprof.shape import HeadShape

SVG = "{http://www.w3.org/2000/svg}"
SIZES = [(30, 9, 3), (32, 32, 8), (80, 64, 8), (12, 12, 12), (4, 4, 1), (1, 1, 1)]


def make_profile(layers: int = 4, heads: int = 6, kv_heads: int = 2, kinds=KINDS, name="org/Model") -> HeadProfile:
    generator = torch.Generator().manual_seed(layers * heads)
    # Like measured scores: most near zero and a few far above.
    scores = {kind: torch.rand(layers, heads, generator=generator) ** 12 * 0.6 for kind in kinds}
    return HeadProfile(
        model_name=name,
        shape=HeadShape("M", layers, heads, kv_heads, 64, 100),
        scores=scores,
        standard_errors={kind: table * 0.05 for kind, table in scores.items()},
        probes_used=dict.fromkeys(kinds, 60),
        metadata={"settings": json.dumps({"lengths": [500, 1024, 4096]})},
    )


def marked(path: Path) -> list[str]:
    return [name for element in ET.parse(path).iter() if (name := element.get("id", "")).startswith("top-")]


def words(profile: HeadProfile, top: int = 10, kinds=None) -> list[str]:
    """Every text of the drawn figure."""
    figure = _draw(profile, {kind: profile.top_heads(kind, top) for kind in kinds or profile.kinds})
    texts = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        texts += [text.get_text() for text in axes.texts]
        texts += [axes.get_xlabel(), axes.get_ylabel()]
    return texts


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum and whose last one is the end."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place, kinds = 8, []
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, body = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        assert struct.unpack(">I", content[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        place += 12 + length
    assert kinds[-1] == b"IEND"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
def test_svg_marks_the_top_heads_of_each_kind(tmp_path, layers, heads, kv_heads):
    path = heatmap(make_profile(layers, heads, kv_heads), tmp_path / "heads.svg")
    count = min(10, layers * heads)
    assert ET.parse(path).getroot().tag == f"{SVG}svg"
    assert sorted(marked(path)) == sorted(f"top-{kind}-{rank}" for kind in KINDS for rank in range(1, count + 1))


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES[:3])
def test_png_is_valid_and_large_enough_to_read(tmp_path, layers, heads, kv_heads):
    path = heatmap(make_profile(layers, heads, kv_heads), tmp_path / "heads.png")
    width, height = png_size(path.read_bytes())
    assert width >= 800
    assert height >= layers * 0.11 * 180


@pytest.mark.parametrize(("which", "top"), [("retrieval", 3), ("reasoning", 24), ("both", 0), ("both", 999)])
def test_which_and_top_choose_what_is_marked(tmp_path, which, top):
    path = heatmap(make_profile(), tmp_path / "heads.svg", which=which, top=top)
    kinds = KINDS if which == "both" else (which,)
    assert len(marked(path)) == len(kinds) * min(top, 24)
    assert {name.split("-")[1] for name in marked(path)} == (set(kinds) if top else set())


def test_outlines_stand_on_the_best_cells():
    profile = make_profile(30, 9, 3)
    figure = _draw(profile, {"retrieval": profile.top_heads("retrieval", 5)})
    outlines = {patch.get_gid(): patch for patch in figure.axes[0].patches if patch.get_gid()}
    for rank, (layer, head, _) in enumerate(profile.top_heads("retrieval", 5), 1):
        outline = outlines[f"top-retrieval-{rank}"]
        assert isinstance(outline, Rectangle)
        box = outline.get_bbox()
        center = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        assert center == pytest.approx((head + 0.5, layer + 0.5))


def test_layer_0_is_on_top_and_the_panel_ends_at_its_cells():
    profile = make_profile(30, 9, 3)
    axes = _draw(profile, {"retrieval": profile.top_heads("retrieval", 270)}).axes[0]
    assert axes.get_xlim() == (0, 9)
    assert axes.get_ylim() == (30, 0)


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
def test_cells_are_roughly_square_and_labels_stay_apart(layers, heads, kv_heads):
    profile = make_profile(layers, heads, kv_heads)
    figure = _draw(profile, {kind: profile.top_heads(kind, 10) for kind in KINDS})
    panel = figure.axes[0]
    box = panel.get_window_extent()
    assert 0.95 <= (box.width / heads) / (box.height / layers) <= 1.45
    figure.canvas.draw()
    for axis, low, high in ((panel.xaxis, "x0", "x1"), (panel.yaxis, "y0", "y1")):
        extents = [label.get_window_extent() for label in axis.get_ticklabels()]
        extents.sort(key=lambda extent: getattr(extent, low))
        for before, after in itertools.pairwise(extents):
            assert getattr(before, high) <= getattr(after, low)


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
def test_no_text_leaves_the_picture(layers, heads, kv_heads):
    profile = make_profile(
        layers, heads, kv_heads, name="organization/A-Model-With-A-Very-Long-Name-Indeed-70B-Instruct"
    )
    for kinds in (KINDS, KINDS[:1]):
        figure = _draw(profile, {kind: profile.top_heads(kind, 10) for kind in kinds})
        figure.canvas.draw()
        width, height = figure.get_size_inches() * figure.dpi
        texts = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.yaxis.label))]
        for text in texts:
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()


def test_groups_are_separated_and_numbered_only_where_heads_share():
    shared = _draw(make_profile(4, 6, 2), {"retrieval": []}).axes[0]
    (lines,) = [collection for collection in shared.collections if isinstance(collection, LineCollection)]
    assert [segment[0][0] for segment in lines.get_segments()] == [3]
    assert [label.get_text() for label in shared.child_axes[0].get_xticklabels()] == ["0", "1"]
    alone = _draw(make_profile(4, 6, 6), {"retrieval": []}).axes[0]
    assert not any(isinstance(collection, LineCollection) for collection in alone.collections)
    assert not alone.child_axes


def test_the_words_say_what_was_measured():
    text = "\n".join(words(make_profile(30, 9, 3)))
    assert "org/Model" in text
    assert "30 layers × 9 query heads on 3 KV heads" in text
    assert "60 retrieval + 60 reasoning probes" in text
    assert "contexts of 500, 1k, 4k tokens" in text
    assert "retrieval score (square-root color scale)" in text
    assert "1 KV head\n" in "\n".join(words(make_profile(4, 4, 1)))


def test_the_list_gives_rank_head_score_and_error():
    profile = HeadProfile(
        "m",
        HeadShape("M", 20, 4, 2, 8, 10),
        {"retrieval": torch.zeros(20, 4).index_put((torch.tensor(17), torch.tensor(3)), torch.tensor(0.614))},
        {"retrieval": torch.full((20, 4), 0.021)},
    )
    texts = words(profile, top=2)
    assert "Top 2 retrieval heads (score ± standard error)" in texts
    assert texts[texts.index("L17 H3") + 1] == "0.61 ± 0.02"
    bare = words(HeadProfile("m", profile.shape, profile.scores), top=2)
    assert "Top 2 retrieval heads" in bare
    assert bare[bare.index("L17 H3") + 1] == "0.61"


def test_a_profile_without_provenance_is_drawn(tmp_path):
    full = make_profile()
    bare = HeadProfile("m", full.shape, full.scores, metadata={"settings": '{"lengths": "long"}'})
    assert "4 layers × 6 query heads on 2 KV heads" in words(bare)
    heatmap(bare, tmp_path / "heads.png")


def test_a_profile_of_zeros_is_drawn(tmp_path):
    shape = HeadShape("M", 4, 6, 2, 64, 100)
    path = heatmap(HeadProfile("m", shape, {"retrieval": torch.zeros(4, 6)}), tmp_path / "heads.svg")
    assert len(marked(path)) == 10


def test_both_of_a_profile_of_one_kind_draws_that_kind(tmp_path):
    profile = make_profile(kinds=("reasoning",))
    assert {name.split("-")[1] for name in marked(heatmap(profile, tmp_path / "heads.svg"))} == {"reasoning"}
    with pytest.raises(ProfileError, match="holds no retrieval scores"):
        heatmap(profile, tmp_path / "heads.svg", which="retrieval")


def test_a_dollar_sign_in_a_name_is_no_formula():
    assert "a$\\frac$b" in words(make_profile(name="a$\\frac$b"))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_profile_gives_the_same_bytes_whatever_the_users_settings(tmp_path, suffix):
    first = heatmap(make_profile(), tmp_path / f"a.{suffix}").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": "x", "savefig.dpi": 30}):
        second = heatmap(make_profile(), tmp_path / f"b.{suffix}").read_bytes()
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second
    assert not re.search(rb"20\d\d-\d\d-\d\d", first)
    assert matplotlib.__version__.encode() not in first


def test_suffix_in_capitals_and_missing_folders(tmp_path):
    path = heatmap(make_profile(), str(tmp_path / "new" / "HEADS.PNG"))
    png_size(path.read_bytes())


@pytest.mark.parametrize("name", ["heads.pdf", "heads", "heads.png.txt"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        heatmap(make_profile(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_unknown_words_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="choose retrieval or reasoning"):
        heatmap(make_profile(), tmp_path / "heads.png", which="speed")
    with pytest.raises(UsageError, match="0 or more"):
        heatmap(make_profile(), tmp_path / "heads.png", top=-1)


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "heads.png"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HeadprofError, match="no space left"):
        heatmap(make_profile(), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["heads.png"]


@pytest.mark.parametrize("highest", [1.0, 1.0087, 0.62, 0.05, 3e-6, 1234.0])
@pytest.mark.parametrize("height", [0.45, 1.8, 6.2])
def test_bar_ticks_are_round_rising_and_apart(highest, height):
    ticks = _bar_ticks(highest, height)
    assert ticks[0] == 0
    assert all(f"{tick:.0e}"[0] in "125" and float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks[1:])
    places = [height * (tick / highest) ** 0.5 for tick in ticks]
    assert all(after - before >= 0.27 for before, after in itertools.pairwise(places))
    assert places[-1] <= height
    if height > 1:
        assert len(ticks) >= 4


def test_small_helpers():
    assert [_tick_step(cell) for cell in (0.45, 0.19, 0.11, 0.05, 0.001)] == [1, 1, 2, 4, 32]
    assert [_decimals(values) for values in ([0.3], [0.02], [0.004, 0.3], [0.0, 0.05], [1e-9], [0.0])] == [
        2,
        2,
        3,
        2,
        4,
        2,
    ]
