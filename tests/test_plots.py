"""The heatmap: valid pictures of every size, the right heads marked, the same bytes twice."""

import itertools
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from support.profiles import SIZES, make_profile, with_intervals

from headprof.errors import HeadprofError, ProfileError, UsageError
from headprof.models.shape import HeadShape
from headprof.plots.certainty import half_width, interval_of, is_unsure
from headprof.plots.heads import _draw, heatmap
from headprof.plots.heads_layout import tick_step
from headprof.plots.heads_list import decimals_of
from headprof.plots.style import bar_ticks, even_ticks
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS

SVG = "{http://www.w3.org/2000/svg}"


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
    assert sorted(marked(path)) == sorted(f"top-{kind}-{rank}" for kind in PROBE_KINDS for rank in range(1, count + 1))


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES[:3])
def test_png_is_valid_and_large_enough_to_read(tmp_path, layers, heads, kv_heads):
    path = heatmap(make_profile(layers, heads, kv_heads), tmp_path / "heads.png")
    width, height = png_size(path.read_bytes())
    assert width >= 800
    assert height >= layers * 0.11 * 180


@pytest.mark.parametrize(("which", "top"), [("retrieval", 3), ("reasoning", 24), ("both", 0), ("both", 999)])
def test_which_and_top_choose_what_is_marked(tmp_path, which, top):
    path = heatmap(make_profile(), tmp_path / "heads.svg", which=which, top=top)
    kinds = PROBE_KINDS if which == "both" else (which,)
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
    figure = _draw(profile, {kind: profile.top_heads(kind, 10) for kind in PROBE_KINDS})
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
    for kinds in (PROBE_KINDS, PROBE_KINDS[:1]):
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
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.html"):
        heatmap(make_profile(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_unknown_words_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="choose retrieval, reasoning, write or reconstruction"):
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
    ticks = bar_ticks(highest, height)
    assert ticks[0] == 0
    assert all(f"{tick:.0e}"[0] in "125" and float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks[1:])
    places = [height * (tick / highest) ** 0.5 for tick in ticks]
    assert all(after - before >= 0.27 for before, after in itertools.pairwise(places))
    assert places[-1] <= height
    if height > 1:
        assert len(ticks) >= 4


def test_small_helpers():
    assert [tick_step(cell) for cell in (0.45, 0.19, 0.11, 0.05, 0.001)] == [1, 1, 2, 4, 32]
    assert [decimals_of(values) for values in ([0.3], [0.02], [0.004, 0.3], [0.0, 0.05], [1e-9], [0.0])] == [
        2,
        2,
        3,
        2,
        4,
        2,
    ]


def drawn_with_uncertainty(profile: HeadProfile, kinds=PROBE_KINDS, top: int = 10):
    figure = _draw(profile, {kind: profile.top_heads(kind, top) for kind in kinds}, uncertainty=True)
    figure.canvas.draw()
    return figure


@pytest.mark.long
def test_the_picture_without_uncertainty_does_not_depend_on_intervals(tmp_path):
    for suffix in ("png", "svg"):
        bare = heatmap(make_profile(), tmp_path / f"a.{suffix}").read_bytes()
        assert heatmap(with_intervals(make_profile()), tmp_path / f"b.{suffix}").read_bytes() == bare
        shown = heatmap(make_profile(), tmp_path / f"c.{suffix}", uncertainty=True).read_bytes()
        assert shown != bare
        assert heatmap(make_profile(), tmp_path / f"d.{suffix}", uncertainty=True).read_bytes() == shown


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
@pytest.mark.parametrize("has_intervals", [False, True])
def test_the_panel_of_uncertainty_shows_half_the_width_of_each_interval(layers, heads, kv_heads, has_intervals):
    profile = make_profile(layers, heads, kv_heads)
    profile = with_intervals(profile) if has_intervals else profile
    figure = drawn_with_uncertainty(profile)
    for kind, scores, shown in zip(PROBE_KINDS, figure.axes[0::4], figure.axes[2::4], strict=True):
        box, other = scores.get_window_extent(), shown.get_window_extent()
        assert (box.width, box.height) == pytest.approx((other.width, other.height))
        values = shown.collections[0].get_array().reshape(layers, heads)
        for layer in range(layers):
            for head in range(heads):
                if has_intervals:
                    low, high = (float(end[layer, head]) for end in profile.intervals[kind])
                    expected = (high - low) / 2
                else:
                    expected = 1.96 * float(profile.standard_errors[kind][layer, head])
                assert values[layer, head] == pytest.approx(expected, abs=1e-7)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12), st.integers(0, 13))
def test_a_place_is_uncertain_when_the_interval_meets_one_outside(parts, top):
    scores, below, above = torch.tensor(parts, dtype=torch.float32).div(8).T
    count = len(parts)
    profile = HeadProfile(
        "m",
        HeadShape("M", 1, count, count, 8, 10),
        {"retrieval": scores[None]},
        intervals={"retrieval": ((scores - below).clamp(min=0)[None], (scores + above)[None])},
    )
    low, high = (end.flatten().tolist() for end in profile.intervals["retrieval"])
    order = sorted(range(count), key=lambda i: (-float(scores[i]), i))
    inside, outside = order[:top], order[top:]
    expected = [any(low[i] <= high[j] for j in outside) for i in inside]
    assert is_unsure(profile, "retrieval", top) == expected


def test_intervals_from_standard_errors_are_cut_off_at_zero_and_widths_are_not():
    scores = {"retrieval": torch.tensor([[0.5, 0.1]])}
    profile = HeadProfile("m", HeadShape("M", 1, 2, 2, 8, 10), scores, {"retrieval": torch.tensor([[0.1, 0.1]])})
    low, high = interval_of(profile, "retrieval")
    assert low.tolist() == [pytest.approx([0.304, 0.0])]
    assert high.tolist() == [pytest.approx([0.696, 0.296])]
    assert half_width(profile, "retrieval").tolist() == [pytest.approx([0.196, 0.196])]
    bare = HeadProfile("m", profile.shape, scores)
    assert interval_of(bare, "retrieval") is None and half_width(bare, "retrieval") is None
    assert is_unsure(bare, "retrieval", 1) == [False]


def test_dashes_mark_the_uncertain_heads_in_both_panels():
    profile = with_intervals(make_profile(30, 9, 3))
    unsure = is_unsure(profile, "retrieval", 10)
    assert {True, False} == set(unsure)
    figure = drawn_with_uncertainty(profile, ("retrieval",))
    for axes, name in ((figure.axes[0], "top"), (figure.axes[2], "uncertainty")):
        outlines = {patch.get_gid(): patch for patch in axes.patches if patch.get_gid()}
        styles = [outlines[f"{name}-retrieval-{rank}"].get_linestyle() for rank in range(1, 11)]
        assert [style not in ("-", "solid") for style in styles] == unsure
    plain = _draw(profile, {"retrieval": profile.top_heads("retrieval", 10)})
    assert {patch.get_linestyle() for patch in plain.axes[0].patches} <= {"-", "solid"}


def test_the_words_of_a_picture_with_uncertainty():
    profile = with_intervals(make_profile(30, 9, 3))
    texts = [text.get_text() for text in drawn_with_uncertainty(profile).texts]
    assert texts.count("in the top 10") == 2
    assert texts.count("perhaps not: its 95 % interval meets one outside") == 2
    assert "Top 10 retrieval heads (score, 95 % interval)" in texts
    layer, head, score = profile.top_heads("retrieval", 1)[0]
    low, high = (float(end[layer, head]) for end in profile.intervals["retrieval"])
    assert texts[texts.index(f"L{layer} H{head}") + 1] == f"{score:.2f}  [{low:.2f}, {high:.2f}]"
    assert not any("perhaps" in text.get_text() for text in drawn_with_uncertainty(profile, top=0).texts)


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
@pytest.mark.parametrize("kinds", [PROBE_KINDS, PROBE_KINDS[:1]])
def test_with_uncertainty_no_text_leaves_the_picture_or_touches_another(layers, heads, kv_heads, kinds):
    profile = with_intervals(make_profile(layers, heads, kv_heads, name="organization/A-Model-With-A-Long-Name-70B"))
    figure = drawn_with_uncertainty(profile, kinds)
    width, height = figure.get_size_inches() * figure.dpi
    texts = list(figure.texts)
    for axes in figure.axes:
        ranks = {text for text in axes.texts if text.get_text().isdigit()}
        texts += [text for text in axes.texts if text not in ranks]
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, box), (other, another) in itertools.combinations(boxes, 2):
        across = min(box.x1, another.x1) - max(box.x0, another.x0)
        along = min(box.y1, another.y1) - max(box.y0, another.y0)
        assert min(across, along) <= 0.5, (one, other)


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_uncertainty_that_is_not_known_is_a_usage_error(tmp_path, suffix):
    profile = replace(make_profile(), standard_errors={"retrieval": torch.ones(4, 6)})
    with pytest.raises(UsageError, match="neither intervals nor standard errors of its reasoning scores"):
        heatmap(profile, tmp_path / f"heads.{suffix}", uncertainty=True)
    assert list(tmp_path.iterdir()) == []
    heatmap(profile, tmp_path / f"heads.{suffix}", which="retrieval", uncertainty=True)


def test_uncertainty_of_zero_is_drawn(tmp_path):
    profile = replace(make_profile(), standard_errors={kind: torch.zeros(4, 6) for kind in PROBE_KINDS})
    png_size(heatmap(profile, tmp_path / "heads.png", uncertainty=True).read_bytes())


@given(st.floats(1e-6, 1e4), st.floats(0.3, 9))
def test_even_ticks_are_even_round_and_apart(highest, length):
    ticks = even_ticks(highest, length)
    assert ticks[0] == 0 and ticks[-1] <= highest
    assert len(ticks) <= 7
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    for step in steps:
        assert step == pytest.approx(steps[0])
        assert step / highest * length >= 0.4 * (1 - 1e-9)
    if steps:
        assert f"{steps[0]:.0e}"[0] in "125" and float(f"{steps[0]:.0e}") == pytest.approx(steps[0])
    if length >= 2:
        assert len(ticks) >= 3
