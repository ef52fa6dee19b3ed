"""The interactive heatmap: its data against the profile, its bytes, and what a reader does with it in a browser."""

import json
import math
import re
import shutil
import struct
import zlib
from dataclasses import replace

import pytest
import torch
from support.profiles import SIZES, make_profile, with_intervals

from headprof.errors import HeadprofError, ProfileError
from headprof.models.shape import HeadShape
from headprof.plots.heads import heatmap
from headprof.plots.heads_page import color_table, embed_json, page_data, render_page
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS

HOSTILE = "a</script><script>alert(1)</script>&amp;\"quoted\" 'too' <!-- %%data%% \u2028 é"


def measured(layers: int = 30, heads: int = 9, kv_heads: int = 3, name: str = "org/Model") -> HeadProfile:
    profile = with_intervals(make_profile(layers, heads, kv_heads, name=name))
    return replace(profile, metadata={**profile.metadata, "date": "2026-11-22"})


def inlined(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="profile">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
@pytest.mark.parametrize("has_intervals", [False, True])
def test_the_data_are_those_of_the_profile(layers, heads, kv_heads, has_intervals):
    profile = (measured if has_intervals else make_profile)(layers, heads, kv_heads)
    data = page_data(profile, PROBE_KINDS, 7)
    assert (data["layers"], data["heads"], data["kvHeads"]) == (layers, heads, kv_heads)
    assert [shown["name"] for shown in data["kinds"]] == list(PROBE_KINDS)
    for kind, shown in zip(PROBE_KINDS, data["kinds"], strict=True):
        assert (shown["errors"] is None) == has_intervals
        for layer in range(layers):
            for head in range(heads):
                index = layer * heads + head
                score = float(profile.scores[kind][layer, head])
                error = float(profile.standard_errors[kind][layer, head])
                low, high = max(0.0, score - 1.96 * error), score + 1.96 * error
                width = 1.96 * error
                if has_intervals:
                    low, high = (float(end[layer, head]) for end in profile.intervals[kind])
                    width = (high - low) / 2
                else:
                    assert shown["errors"][index] == pytest.approx(error, rel=1e-4)
                assert shown["scores"][index] == pytest.approx(score, rel=1e-4)
                assert shown["low"][index] == pytest.approx(low, rel=1e-4, abs=1e-7)
                assert shown["high"][index] == pytest.approx(high, rel=1e-4)
                assert shown["uncertainty"][index] == pytest.approx(width, rel=1e-4, abs=1e-7)
        best = [layer * heads + head for layer, head, _ in profile.top_heads(kind, 7)]
        assert shown["top"] == best
        assert [shown["ranks"][index] for index in best] == list(range(1, len(best) + 1))
        assert len(shown["unsure"]) == len(best)
        assert shown["highest"] >= max(shown["scores"])
        assert shown["widest"] >= max(shown["uncertainty"])


def test_ranks_count_the_heads_before_and_ties_go_by_layer_then_head():
    scores = torch.tensor([[0.25, 0.5, 0.0], [0.5, 0.25, 0.5]])
    profile = HeadProfile("m", HeadShape("M", 2, 3, 3, 8, 10), {"retrieval": scores})
    (shown,) = page_data(profile, ("retrieval",), 2)["kinds"]
    flat = scores.flatten().tolist()
    expected = [
        1 + sum(other > mine or (other == mine and j < i) for j, other in enumerate(flat))
        for i, mine in enumerate(flat)
    ]
    assert shown["ranks"] == expected
    assert expected == [4, 1, 6, 2, 5, 3]
    assert shown["top"] == [1, 3]
    assert shown["low"] is shown["high"] is shown["errors"] is shown["uncertainty"] is None


def test_numbers_have_five_significant_digits():
    for shown in page_data(measured(), PROBE_KINDS, 10)["kinds"]:
        for key in ("scores", "low", "high", "uncertainty"):
            assert all(value == float(f"{value:.5g}") for value in shown[key])
        assert shown["highest"] == float(f"{shown['highest']:.5g}")


@pytest.mark.parametrize(("highest", "decimals"), [(0.95, 3), (1.0, 2), (0.05, 4), (3e-6, 8), (1234.0, 0), (0.0, 2)])
def test_decimals_show_three_digits_of_the_best_score(highest, decimals):
    profile = HeadProfile("m", HeadShape("M", 1, 1, 1, 8, 10), {"retrieval": torch.tensor([[highest]])})
    (shown,) = page_data(profile, ("retrieval",), 1)["kinds"]
    assert shown["decimals"] == decimals


def test_the_provenance_is_told_in_phrases():
    assert page_data(measured(), PROBE_KINDS, 10)["facts"] == [
        "30 layers × 9 query heads on 3 KV heads",
        "60 retrieval + 60 reasoning probes",
        "contexts of 500, 1k, 4k tokens",
        "2026-11-22",
    ]


@pytest.mark.parametrize("colormap", ["magma", "cividis"])
def test_the_color_table_is_the_color_map(colormap):
    from matplotlib import colormaps

    table = color_table(colormap)
    assert len(table) == 256 * 6
    for i in range(256):
        channels = [int(table[start : start + 2], 16) for start in range(6 * i, 6 * i + 6, 2)]
        assert channels == pytest.approx([255 * part for part in colormaps[colormap](i)[:3]], abs=0.51)


def test_a_hostile_name_stays_text(tmp_path):
    page = heatmap(measured(name=HOSTILE), tmp_path / "heads.html").read_text(encoding="utf-8")
    assert inlined(page)["model"] == HOSTILE
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page)) == 2
    (title,) = re.findall("<title>(.*?)</title>", page)
    assert "<" not in title and "%%data%%" in title
    assert "alert(1)" in title


def test_embedded_json_cannot_end_its_element():
    value = {"<!--": [HOSTILE, "]]>", math.pi, None]}
    text = embed_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set(text) & set("<>&")


def test_nothing_is_fetched_and_no_placeholder_is_left(tmp_path):
    page = heatmap(measured(), tmp_path / "heads.html").read_text(encoding="utf-8")
    rest = page.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in rest and "https://" not in rest
    assert not re.search(
        r"""\b(src|url\(|@import|fetch\(|XMLHttpRequest|href="(?!data:,"))""", rest.split("<title>")[1]
    )
    assert "default-src 'none'" in page
    assert "%%" not in page


def test_the_same_profile_gives_the_same_page(tmp_path):
    pages = [heatmap(measured(), tmp_path / f"{i}.HTML").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]
    assert heatmap(measured(), tmp_path / "2.html", uncertainty=True).read_bytes() != pages[0]


def test_the_page_holds_the_kinds_asked_for(tmp_path):
    page = heatmap(measured(), tmp_path / "heads.html", which="reasoning", top=3).read_text(encoding="utf-8")
    (kind,) = inlined(page)["kinds"]
    assert (kind["name"], len(kind["top"])) == ("reasoning", 3)
    with pytest.raises(ProfileError, match="holds no retrieval scores"):
        heatmap(make_profile(kinds=("reasoning",)), tmp_path / "other.html", which="retrieval")
    assert not (tmp_path / "other.html").exists()


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "heads.html"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HeadprofError, match="no space left"):
        heatmap(make_profile(), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["heads.html"]


def test_a_profile_of_zeros_has_a_page():
    shape = HeadShape("M", 4, 6, 2, 64, 100)
    profile = HeadProfile("m", shape, {"retrieval": torch.zeros(4, 6)}, {"retrieval": torch.zeros(4, 6)})
    (kind,) = inlined(render_page(page_data(profile, ("retrieval",), 5)))["kinds"]
    assert kind["highest"] == kind["widest"] == 1
    assert kind["unsure"] == [True] * 5


# In a browser.


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is on the PATH")
    with api.sync_playwright() as playwright:
        # Without a sandbox, as containers seldom allow one; the page is our own.
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of a profile; after the test, nothing may have been complained of or fetched."""
    complaints, requests, pages = [], [], []

    def load(profile, width: int = 1360, height: int = 900, scheme: str = "light", **options):
        path = heatmap(profile, tmp_path / "heads.html", **options)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(120_000)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield load
    for page in pages:
        page.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert sum(url.startswith("file:") for url in requests) == len(pages)


def cell(page, layer: int, head: int):
    return page.locator(f'.cell[data-layer="{layer}"][data-head="{head}"]')


def told(page) -> str:
    return " ".join(page.locator("#tip").inner_text().split())


def described(profile, layer: int, head: int) -> list[str]:
    """What the box about a head must hold, found by loops over the profile."""
    parts = [f"Layer {layer} · head {head}", f"KV head {head // profile.shape.group_size}"]
    for kind in profile.kinds:
        low, high = (float(end[layer, head]) for end in profile.intervals[kind])
        score = float(profile.scores[kind][layer, head])
        rank = 1 + int((profile.scores[kind] > score).sum())
        interval = f"[{low:.3f}, {high:.3f}]"
        parts.append(f"{kind.capitalize()} {score:.3f} {interval} rank {rank} of {profile.scores[kind].numel()}")
    return parts


def png_pixels(content: bytes) -> set[bytes]:
    """The distinct rows of a PNG's unpacked pixels."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    offset, packed = 8, b""
    while offset < len(content):
        (length,) = struct.unpack(">I", content[offset : offset + 4])
        if content[offset + 4 : offset + 8] == b"IDAT":
            packed += content[offset + 8 : offset + 8 + length]
        offset += 12 + length
    (height,) = struct.unpack(">I", content[20:24])
    raw = zlib.decompress(packed)
    row = len(raw) // height
    return {raw[i * row : (i + 1) * row] for i in range(height)}


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
def test_every_head_has_a_cell_of_its_color(open_page, layers, heads, kv_heads):
    profile = measured(layers, heads, kv_heads)
    page = open_page(profile)
    assert page.locator(".cell").count() == layers * heads
    assert page.locator(".gap").count() == (kv_heads - 1 if heads > kv_heads else 0)
    assert page.locator(".cell.top").count() == min(10, layers * heads)
    table = color_table("magma")
    colors = page.eval_on_selector_all(".cell", "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)")
    scores = profile.scores["retrieval"]
    for index, color in enumerate(colors):
        score = float(scores.flatten()[index])
        step = min(255, int(256 * math.sqrt(score / float(scores.max()))))
        # A score shortened to five digits may fall on the other side of a step.
        near = [table[6 * i : 6 * i + 6] for i in (max(0, step - 1), step, min(255, step + 1))]
        assert "".join(f"{int(part):02x}" for part in re.findall(r"\d+", color)) in near


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (17, 3), (29, 8)])
def test_pointing_at_a_cell_tells_about_its_head(open_page, layer, head):
    profile = measured()
    page = open_page(profile)
    assert page.locator("#tip").is_hidden()
    cell(page, layer, head).hover()
    for part in described(profile, layer, head):
        assert part in told(page)
    assert page.locator(".label.lit").all_inner_texts() == [str(head // 3), str(head), str(layer)]
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()
    assert page.locator(".label.lit").count() == 0


@pytest.mark.parametrize(("width", "height"), [(1360, 900), (390, 760)])
def test_the_box_about_a_head_stays_in_the_window_and_off_its_cell(open_page, width, height):
    page = open_page(measured(32, 32, 8), width, height)
    for layer, head in ((0, 0), (0, 31), (15, 16), (31, 0), (31, 31)):
        cell(page, layer, head).hover()
        tip, box = page.locator("#tip").bounding_box(), cell(page, layer, head).bounding_box()
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= width
        assert tip["y"] >= 0 and tip["y"] + tip["height"] <= height
        across = min(tip["x"] + tip["width"], box["x"] + box["width"]) - max(tip["x"], box["x"])
        along = min(tip["y"] + tip["height"], box["y"] + box["height"]) - max(tip["y"], box["y"])
        assert min(across, along) < 0


def test_standard_errors_are_told_where_there_are_no_intervals(open_page):
    profile = make_profile(30, 9, 3)
    page = open_page(profile)
    cell(page, 17, 3).hover()
    score, error = (float(table["retrieval"][17, 3]) for table in (profile.scores, profile.standard_errors))
    assert f"Retrieval {score:.3f} ± {error:.3f} rank" in told(page)


def test_a_profile_without_errors_offers_no_uncertainty(open_page):
    page = open_page(replace(make_profile(kinds=("reasoning",)), standard_errors={}))
    assert page.locator(".controls button").count() == 0
    assert page.locator("#heading").inner_text() == "Reasoning"
    assert page.locator(".cell.unsure").count() == 0
    assert page.locator("#key li").count() == 1


def test_buttons_switch_kind_and_uncertainty(open_page):
    profile = measured()
    page = open_page(profile)

    def state():
        numbered = page.eval_on_selector_all(
            ".cell.top",
            "cells => cells.map(c => [Number(c.innerText), Number(c.dataset.layer), Number(c.dataset.head)])",
        )
        pressed = page.locator('.controls [aria-pressed="true"]').all_inner_texts()
        return page.locator("#heading").inner_text(), pressed, sorted(numbered)

    def ranked(kind):
        return [[rank, layer, head] for rank, (layer, head, _) in enumerate(profile.top_heads(kind, 10), 1)]

    def colors():
        return page.eval_on_selector_all(".cell", "cells => cells.map(c => c.style.backgroundColor)")

    assert state() == ("Retrieval", ["Retrieval", "Score"], ranked("retrieval"))
    first = colors()
    page.get_by_role("button", name="Reasoning", exact=True).click()
    assert state() == ("Reasoning", ["Reasoning", "Score"], ranked("reasoning"))
    second = colors()
    page.get_by_role("button", name="Uncertainty", exact=True).click()
    assert state() == ("Reasoning: uncertainty", ["Reasoning", "Uncertainty"], ranked("reasoning"))
    third = colors()
    assert "half width of the 95 % interval" in page.locator("#scale").inner_text()
    page.get_by_role("button", name="Retrieval", exact=True).click()
    page.get_by_role("button", name="Score", exact=True).click()
    assert state() == ("Retrieval", ["Retrieval", "Score"], ranked("retrieval"))
    assert colors() == first
    assert len({tuple(each) for each in (first, second, third)}) == 3


def test_the_page_can_begin_with_uncertainty_and_a_kind_without_it_shows_scores(open_page):
    profile = measured()
    profile = replace(profile, intervals={"retrieval": profile.intervals["retrieval"]}, standard_errors={})
    page = open_page(profile, which="retrieval", uncertainty=True)
    assert page.locator("#heading").inner_text() == "Retrieval: uncertainty"
    page = open_page(profile)
    page.get_by_role("button", name="Uncertainty", exact=True).click()
    page.get_by_role("button", name="Reasoning", exact=True).click()
    assert page.locator("#heading").inner_text() == "Reasoning"
    assert page.get_by_role("button", name="Uncertainty", exact=True).is_disabled()


def focused(page) -> tuple[int, int]:
    return tuple(
        page.evaluate("[document.activeElement.dataset.layer, document.activeElement.dataset.head].map(Number)")
    )


def test_the_keyboard_moves_from_head_to_head(open_page):
    profile = measured()
    page = open_page(profile)
    assert page.locator('.cell[tabindex="0"]').count() == 1
    cell(page, 5, 4).focus()
    visited = []
    moves = "ArrowRight ArrowDown ArrowLeft ArrowUp End ArrowRight Home ArrowLeft"
    for key in [*moves.split(), "Control+End", "ArrowDown", "Control+Home", "ArrowUp"]:
        page.keyboard.press(key)
        visited.append(focused(page))
    assert visited == [
        *((5, 5), (6, 5), (6, 4), (5, 4), (5, 8), (5, 8), (5, 0), (5, 0)),
        *((29, 8), (29, 8), (0, 0), (0, 0)),
    ]
    for part in described(profile, 0, 0):
        assert part in told(page)
    assert page.locator('.cell[tabindex="0"]').count() == 1
    page.keyboard.press("PageDown")
    assert focused(page) == (8, 0)


def test_tab_enters_at_the_best_head_and_the_label_says_it_all(open_page):
    profile = measured()
    page = open_page(profile)
    layer, head, score = profile.top_heads("retrieval", 1)[0]
    for _ in range(5):
        page.keyboard.press("Tab")
    assert focused(page) == (layer, head)
    low, high = (float(end[layer, head]) for end in profile.intervals["retrieval"])
    label = cell(page, layer, head).get_attribute("aria-label")
    assert label.startswith(f"Layer {layer}, head {head}, KV head {head // 3}.")
    assert f"Retrieval {score:.3f}, 95 % interval {low:.3f} to {high:.3f}, rank 1 of 270." in label
    assert page.get_by_role("grid").get_attribute("aria-colcount") == "9"
    assert page.get_by_role("gridcell").count() == 270


def test_a_click_marks_the_head_in_map_and_table(open_page):
    profile = measured()
    page = open_page(profile)
    layer, head, _ = profile.top_heads("retrieval", 3)[2]
    row = page.locator("tbody tr").nth(2)
    cell(page, layer, head).click()
    assert "picked" in row.get_attribute("class") and row.get_attribute("aria-current") == "true"
    assert page.get_by_role("gridcell", selected=True).count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".picked").count() == 0
    row.click()
    assert "picked" in cell(page, layer, head).get_attribute("class")
    page.get_by_role("button", name="Reasoning", exact=True).click()
    assert "picked" in cell(page, layer, head).get_attribute("class")
    cell(page, layer, head).focus()
    page.keyboard.press("Enter")
    assert page.locator(".picked").count() == 0


def test_the_table_lists_the_top_heads_and_sorts(open_page):
    profile = measured()
    page = open_page(profile)
    best = profile.top_heads("retrieval", 10)

    def column(name):
        return [text.strip() for text in page.locator(f"tbody td.{name}").all_inner_texts()]

    assert column("rank") == [str(rank) for rank in range(1, 11)]
    assert column("score") == [f"{score:.3f}" for _, _, score in best]
    assert column("kv") == [str(head // 3) for _, head, _ in best]
    others = [1 + int((profile.reasoning > profile.reasoning[layer, head]).sum()) for layer, head, _ in best]
    assert column("other") == [str(rank) for rank in others]
    for name, values in (("layer", [layer for layer, _, _ in best]), ("head", [head for _, head, _ in best])):
        page.locator(f'[data-sort="{name}"]').click()
        assert column(name) == [str(value) for value in sorted(values)]
        assert page.locator(f"th.{name}").get_attribute("aria-sort") == "ascending"
        page.locator(f'[data-sort="{name}"]').click()
        assert column(name) == [str(value) for value in sorted(values, reverse=True)]
        assert page.locator(f"th.{name}").get_attribute("aria-sort") == "descending"


def test_without_top_heads_there_is_no_table(open_page):
    page = open_page(measured(), top=0)
    assert page.locator("#side").is_hidden()
    assert page.locator(".cell.top").count() == 0


@pytest.mark.parametrize("width", [390, 820, 1360])
@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(30, 9, 3), (32, 32, 8), (80, 64, 8)])
def test_the_page_is_never_wider_than_its_window(open_page, width, layers, heads, kv_heads):
    page = open_page(measured(layers, heads, kv_heads), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.eval_on_selector_all(".cell", "cells => cells.map(c => [c.offsetWidth, c.offsetHeight])")
    assert all(across >= 9 and down >= 9 for across, down in sizes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_in_the_readers_colors(open_page, scheme):
    page = open_page(measured(), scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", background)) / 3
    assert (brightness > 200) == (scheme == "light")
    assert len(png_pixels(page.screenshot())) > 100


def test_a_hostile_name_is_shown_as_it_is(open_page):
    page = open_page(measured(name=HOSTILE))
    assert page.locator("h1").text_content() == HOSTILE
    assert page.title() == f"Heads of {HOSTILE}"
