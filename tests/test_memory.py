"""The memory curve, on rows that the runner could have written."""

import pytest

from benchmarks import memory
from benchmarks.memory import curves, draw, figure, table

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def rows_of(path, execution, dtype, base, per_clip, batches=BATCHES, most=float("inf"), **changes):
    for batch in batches:
        mib = base + per_clip * batch
        key = {"case": "ave", "mode": "training", "preset": "paper", "batch": batch, "setting": {}}
        key |= {"path": path, "execution": execution, "dtype": dtype, "device": "a card", "date": "2026-01-01"}
        fits = mib <= most
        yield key | {"status": "ok" if fits else "out of memory", "peak_mib": mib if fits else None} | changes


@pytest.fixture
def rows():
    return [
        *rows_of("released", "eager", "float32", 1000, 5000, most=80e3),
        *rows_of("released", "eager", "bfloat16-autocast", 1000, 3000, most=80e3),
        *rows_of("fused", "eager", "bfloat16", 1500, 1000),
        *rows_of("optimized", "own", "bfloat16", 1600, 600, batches=(2, 8, 32)),
        *rows_of("optimized", "own", "float32", 1600, 100, batches=(2,)),
        *rows_of("reference", "eager", "float32", 1, 1, mode="inference"),
        *rows_of("model", "eager", "float32", 1, 1, preset="small"),
        *rows_of("concatenated", "eager", "float32", 1, 1, status="skipped"),
        *rows_of("folded", "eager", "float32", 1, 1, case="latents"),
    ]


def test_a_curve_a_path_by_its_fullest_then_leanest_way(rows):
    found = curves(reversed(rows), "paper", "training")
    assert [curve.label for curve in found] == [
        "released eager bfloat16-autocast",
        "fused eager bfloat16",
        "optimized own bfloat16",
    ]
    released, fused, optimized = found
    assert list(released.mib) == [1, 2, 4, 8, 16]
    assert released.too_large == [32, 64]
    assert fused.mib == {batch: 1500 + 1000 * batch for batch in BATCHES}
    assert (fused.too_large, list(optimized.mib)) == ([], [2, 8, 32])
    assert optimized.per_clip() == {2: 1400, 8: 800, 32: 650}
    assert [curve.label for curve in curves(rows, "paper", "inference")] == ["reference eager float32"]


def test_of_two_runs_the_later_counts(rows):
    again = list(rows_of("fused", "eager", "bfloat16", 1500, 900, date="2026-01-02"))
    (fused,) = (curve for curve in curves(again + rows, "paper", "training") if curve.label.startswith("fused"))
    assert fused.mib[1] == 2400


def test_the_table_has_a_cell_a_batch(rows):
    made = table(curves(rows, "paper", "training"))
    assert [column.header for column in made.columns] == ["MiB a clip", *map(str, BATCHES)]
    cells = list(zip(*(column.cells for column in made.columns)))
    assert cells[0] == (
        "released eager bfloat16-autocast",
        "4,000",
        "3,500",
        "3,250",
        "3,125",
        "3,062",
        *["too large"] * 2,
    )
    assert cells[2] == ("optimized own bfloat16", "", "1,400", "", "800", "", "650", "")


def test_two_panels_with_a_line_a_path(rows):
    found = curves(rows, "paper", "training")
    chart = figure(found, "a title")
    chart.draw_without_rendering()
    whole, per_clip = chart.axes
    assert [axes.get_title(loc="left") for axes in chart.axes] == ["peak memory, GiB", "MiB a clip"]
    for axes, scale in ((whole, lambda batch: 1024), (per_clip, lambda batch: batch)):
        assert len(axes.lines) == len(found)
        for line, curve in zip(axes.lines, found):
            assert list(line.get_xdata()) == list(curve.mib)
            expected = [mib / scale(batch) for batch, mib in curve.mib.items()]
            assert list(line.get_ydata()) == pytest.approx(expected)
        assert axes.get_ylim()[0] == 0
        assert [text.get_text() for text in axes.get_xticklabels()] == list(map(str, BATCHES))
    (legend,) = chart.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "released eager bfloat16-autocast (out of memory at 32, 64)"
    assert texts[1:] == [curve.label for curve in found[1:]]
    # Nothing is cut off, and the legend is below the panels.
    width, height = chart.canvas.get_width_height()
    boxes = [text.get_window_extent() for text in (*chart.texts, *legend.get_texts(), whole.xaxis.label, whole.title)]
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y0 >= 0
        assert box.y1 <= height
    assert legend.get_window_extent().y1 <= whole.xaxis.label.get_window_extent().y0


def test_many_paths_have_room(rows):
    found = [memory.Curve(f"path{i} eager bfloat16-autocast", {1: 10.0 + i, 2: 15.0}, [4, 8]) for i in range(7)]
    chart = figure(found, "a title")
    chart.draw_without_rendering()
    (legend,) = chart.legends
    assert legend.get_window_extent().x1 <= chart.canvas.get_width_height()[0]
    assert legend.get_window_extent().y1 <= chart.axes[0].xaxis.label.get_window_extent().y0


def test_pictures_are_written_and_the_svg_is_the_same_each_time(rows, tmp_path):
    found = curves(rows, "paper", "training")
    paths = draw(found, "a title", tmp_path / "a" / "memory-training")
    assert paths == [tmp_path / "a" / "memory-training.svg", tmp_path / "a" / "memory-training.png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = paths[0].read_text()
    assert all(curve.label in svg for curve in found)
    assert draw(found, "a title", tmp_path / "b" / "memory-training")[0].read_text() == svg
    assert "dc:date" not in svg
