"""The explorer on the site and in JupyterLab: its numbers are Python's; no mouse is needed."""

import contextlib
import json

import pytest
from conftest import ROOT
from playwright.sync_api import TimeoutError as PlaywrightTimeout

CHOICES = json.loads((ROOT / "build/choices.json").read_text())
NAMES = {"N": "N, images", "C": "C, channels", "H": "H, height", "W": "W, width"}
# Makes a choice as a user does, then reads what is shown.
CHOOSE = """(el, { norm, at, G, ...choice }) => {
  el.querySelector(`[type=radio][value=${norm}]`).click();
  for (const slider of el.querySelectorAll("[type=range]")) {
    slider.value = choice[slider.ariaLabel[0]];
    slider.dispatchEvent(new Event("input"));
  }
  const groups = el.querySelector("select");
  groups.value = G;
  groups.dispatchEvent(new Event("change"));
  const name = `n ${at[0]}, c ${at[1]}, h ${at[2]}, w ${at[3]}:`;
  el.querySelector(`button[aria-label^="${name}"]`).click();
  const inside = el.querySelectorAll("button.inside").length;
  return { ...el.dataset, inside, words: el.querySelector("[aria-live]").textContent };
}"""


@pytest.fixture
def explorer(look):
    explorer = look("site/explorer.html", 900).locator("#explorer")
    explorer.get_by_role("radio").first.wait_for()
    return explorer


def compare(explorer):
    """Make each choice, and hold what is shown against Python's numbers."""
    assert len(CHOICES) == 200
    for choice in CHOICES:
        shown = explorer.evaluate(CHOOSE, choice)
        assert int(shown["count"]) == shown["inside"] == choice["count"], choice
        for name in ("mean", "deviation", "result"):
            assert float(shown[name]) == pytest.approx(choice[name], abs=1e-9), choice
        assert f"{choice['count']} entr" in shown["words"]


def test_its_numbers_are_pythons(explorer):
    compare(explorer)


def test_its_numbers_are_pythons_in_jupyterlab(jupyter, look):
    lab = look()
    lab.goto(f"{jupyter}/lab/tree/explorer.ipynb")
    explorer = lab.locator(".explorer")
    for _ in range(6):  # before the kernel is ready, a cell that is run may be forgotten
        lab.locator(".jp-CodeCell .cm-content").first.click(timeout=90_000)
        lab.keyboard.press("Control+Enter")
        with contextlib.suppress(PlaywrightTimeout):
            explorer.first.wait_for(timeout=15_000)
            break
    compare(explorer)


def test_its_parts_have_names(explorer):
    for name in ("Batch Norm", "Layer Norm", "Instance Norm", "Group Norm"):
        assert explorer.get_by_role("radio", name=name).is_enabled()
    for name in NAMES.values():
        assert explorer.get_by_role("slider", name=name).bounding_box()["width"] >= 120
    assert explorer.get_by_role("group", name="entries").is_visible()
    assert explorer.get_by_role(
        "button", name="n 0, c 0, h 0, w 0: 0, shares the mean"
    ).is_visible()
    assert "Batch Norm" in explorer.get_by_role("img").get_attribute("aria-label")


def test_the_lesson_shows_it_without_a_kernel(look):
    explorer = look("notebooks/00_fundamentals.html").locator("#explorer")
    explorer.get_by_role("radio", name="Layer Norm").check()
    assert explorer.locator("button.inside").count() == 24


def test_groups_can_be_chosen_where_they_are_used(explorer):
    groups = explorer.get_by_role("combobox", name="G, groups")
    assert groups.is_disabled()
    explorer.get_by_role("radio", name="Group Norm").check()
    assert groups.is_enabled() and groups.locator("option").all_inner_texts() == [
        "1",
        "2",
        "3",
        "6",
    ]


def test_a_keyboard_is_enough(explorer):
    page = explorer.page
    explorer.get_by_role("radio", name="Batch Norm").focus()
    page.keyboard.press("ArrowRight")
    assert explorer.get_by_role("radio", name="Layer Norm").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert explorer.locator("output").first.inner_text() == "4"
    explorer.locator("[aria-pressed=true]").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert explorer.get_attribute("data-at") == "0,0,1,1"
    assert explorer.locator(":focus").get_attribute("aria-pressed") == "true"


def test_cells_keep_their_size(explorer):
    def sizes():
        cell, face = explorer.locator("button").first, explorer.locator("polygon").first
        boxes = cell.bounding_box(), face.bounding_box()
        return [round(box["width"]) for box in boxes]

    before = sizes()
    for name, length in (("N, images", "1"), ("C, channels", "8"), ("H, height", "1")):
        explorer.get_by_role("slider", name=name).fill(length)
    assert sizes() == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_colours_follow_the_page(look, scheme):
    cell = look("site/explorer.html", color_scheme=scheme).locator("#explorer button").first
    color = cell.evaluate("cell => getComputedStyle(cell).color")
    bright = sum(map(int, color.removeprefix("rgb(").rstrip(")").split(",")[:3])) > 3 * 128
    assert bright == (scheme == "dark")
