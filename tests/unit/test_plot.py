"""A plot is well-formed SVG whose points lie where logarithmic axes say."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from benchmarks import plot

SVG = "{http://www.w3.org/2000/svg}"


def draw(*series: plot.Series) -> ElementTree.Element:
    return ElementTree.fromstring(plot.render("a < b", "keys", "us", series))


def test_points_lie_on_logarithmic_axes() -> None:
    root = draw(plot.Series("time", [(1, 10.0), (2, 100.0), (16, 1000.0)]))
    circles = root.findall(f"{SVG}circle")
    xs, ys = ([float(circle.attrib[name]) for circle in circles] for name in ("cx", "cy"))
    assert xs[0] == plot.LEFT
    assert xs[2] == plot.WIDTH - plot.RIGHT
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) / 4, abs=0.1)
    assert ys == pytest.approx([plot.HEIGHT - plot.BOTTOM, (plot.HEIGHT - plot.BOTTOM + plot.TOP) / 2, plot.TOP])
    assert [title.text for title in root.iter(f"{SVG}title")] == [
        "time: 1: 10.0",
        "time: 2: 100.0",
        "time: 16: 1,000.0",
    ]


def test_texts_name_axes_ticks_and_lines() -> None:
    root = draw(
        plot.Series("time", [(128, 3.0), (512, 90.0)]), plot.Series("floor", [(128, 2.0), (512, 8.0)], floor=True)
    )
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b", "keys", "us", "time", "floor", "128", "256", "512", "1", "10", "100"} == set(texts)
    time, floor = root.findall(f"{SVG}polyline")
    assert "stroke-dasharray" not in time.attrib
    assert floor.attrib["stroke-dasharray"]
    assert time.attrib["stroke"] != floor.attrib["stroke"]


def test_one_point_is_enough() -> None:
    root = draw(plot.Series("time", [(64, 100.0)]))
    [circle] = root.findall(f"{SVG}circle")
    assert all(math.isfinite(float(circle.attrib[name])) for name in ("cx", "cy"))


def test_a_long_axis_has_few_ticks() -> None:
    ticks = plot.Axis(1, 2.0**20, 0, 1).ticks(2)
    assert 6 <= len(ticks) <= 13
    assert ticks[0] == 1
