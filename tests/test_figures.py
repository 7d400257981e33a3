"""What the figures of a report show: each step against its own floor, nothing lost, no NaN drawn."""

from __future__ import annotations

import re

import pytest

from parity.report import curves, figures
from tests.test_aggregate import curve, record
from tests.test_page import floored, off_by_a_module


def test_a_heat_map_shows_each_step_against_its_own_floor():
    heat = figures.heat_map([floored(0, 0.2), floored(1)], "dloss")
    assert [zone for zone, _ in heat.zones] == ["zero", "low", "floor", "over3"]
    worst = heat.lines[0]
    assert (worst.seed, worst.largest, worst.at, worst.first) == (0, 0.2, 2, 2)
    assert (worst.floor, worst.allowed) == (1e-5, pytest.approx(9e-5))
    assert heat.lines[1].first is None
    exact = figures.heat_map([curve(0, [0.0, 0.1, 0.0, 0.0], step=2)], "dgrad")
    assert exact is not None and figures.heat_map([record(7, 0)], "dloss") is None


def test_a_nan_is_a_zone_of_its_own_and_the_worst():
    one = floored(0, float("nan"))
    heat = figures.heat_map([one], "dloss")
    assert heat.zones[-1][0] == "none"
    assert heat.lines[0].at == 2 and heat.lines[0].largest != heat.lines[0].largest
    assert "nan" not in heat.svg.lower() and "nan" not in curves.losses([one]).lower()


def test_a_difference_without_a_floor_is_shown_as_such():
    one = curve(0, [0.0, 0.1, 0.0, 0.0], step=2).model_copy(update={"metrics": []})
    assert [zone for zone, _ in figures.heat_map([one], "dloss").zones] == ["zero", "bare"]
    assert 'class="band"' not in curves.differences([one], "dloss")


def test_many_steps_are_drawn_as_the_worst_of_each_group():
    long = [0.0] * 1000
    long[777] = 1.0
    one = floored(0)
    one.series |= {"dloss": long, "dloss floor": [1e-6] * 1000}
    heat = figures.heat_map([one], "dloss")
    assert "the worst of 9" in heat.caption and len(heat.svg) < 8_000
    assert heat.lines[0].at == 778 and {zone for zone, _ in heat.zones} == {"zero", "over3"}


def test_the_noise_floor_is_drawn_into_the_differences():
    drawing = curves.differences([floored(0, 0.2), floored(1)], "dloss")
    assert drawing.count('class="line subject"') == 2
    assert 'class="band"' in drawing and 'class="limit"' in drawing
    lines = re.findall(r'class="line subject" d="M([^"]*)"', drawing)
    (limit,) = re.findall(r'class="limit" d="M([^"]*)"', drawing)
    heights = [[float(p.split()[1]) for p in line.split("L")] for line in (*lines, limit)]
    over, under, allowed = heights
    assert over[1] < allowed[1] and all(a > b for a, b in zip(under, allowed, strict=True))
    assert curves.differences([curve(0, [0.0] * 4)], "dgrad") == ""


def test_the_first_bad_module_and_its_neighbours():
    found = figures.profile(off_by_a_module())
    assert found.first == "layers.7.mlp.up_proj"
    assert [name for name, _, _ in found.near] == [
        "layers.6.mlp", "layers.7.attn", "layers.7.mlp.up_proj", "layers.7.mlp", "layers.8.attn",
    ]  # fmt: skip
    assert "14 of 36 modules are over it" in found.caption
    assert figures.profile(record(2, 0)) is None


def test_modules_that_had_to_be_equal_show_their_differences():
    one = off_by_a_module()
    one.series = {name: [0.0 if v < 0.1 else v, 0.0] for name, (v, _) in one.series.items()}
    found = figures.profile(one)
    assert found.first == "layers.7.mlp.up_proj" and 'class="limit"' not in found.svg
    assert "bits had to be equal: 14 of 36 modules differ" in found.caption
