"""Every picture is drawn from its stored result, and each label can be read: none is cut, none covered."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from bench.kinds import RESULTS
from bench.pictures import drawn, headline, stored

STORED = [path for path in stored() if path.with_suffix(".png").exists()]
SLACK = 2.0  # pixels


def assert_readable(figure: Any) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    headings = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label) if text.get_text()]
    headings += figure.texts  # where it was measured, and the title above all panels
    headings += figure.legends
    for one, other in combinations([text.get_window_extent(renderer) for text in headings], 2):
        assert not one.padded(-SLACK).overlaps(other.padded(-SLACK)), "headings meet"
    for axes in figure.axes:
        assert axes.get_window_extent(renderer).width > figure.bbox.width / 10, "a panel is squeezed"
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            labels = [t.label1 for t in ticks if t.label1.get_visible() and t.label1.get_text()]
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_rotation() == 0]
            for one, other in combinations(boxes, 2):
                assert not one.padded(-SLACK).overlaps(other.padded(-SLACK)), (
                    f"{axes.get_title()}: labels meet"
                )
            for label in filter(Text.get_text, (*labels, axis.label, axes.title, *axes.texts)):
                box = label.get_window_extent(renderer)
                inside = figure.bbox.padded(SLACK)
                assert inside.x0 <= box.x0, f"{label.get_text()} is cut"
                assert box.x1 <= inside.x1, f"{label.get_text()} is cut"
                assert inside.y0 <= box.y0, f"{label.get_text()} is cut"
                assert box.y1 <= inside.y1, f"{label.get_text()} is cut"


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_picture_can_be_read(path: Path) -> None:
    assert_readable(drawn(path.stem, json.loads(path.read_text(encoding="utf-8"))))


def test_the_headline_says_how_many_times_ours(tmp_path: Path) -> None:
    figure = headline(RESULTS)
    assert figure is not None
    assert_readable(figure)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any(text.endswith(" × ours") for text in texts)
    assert headline(tmp_path) is None
