"""The paper's tables from rows whose numbers are known."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import results, tables
from benchmarks.cases import LATENTS, PRESETS
from benchmarks.roofline import model_ops
from lavish_fast import Config, Model


def row(case="ave", speed=1.0, **changes):
    ms = changes.get("batch", 1) / speed * 1e3
    values = {
        "date": "2030-01-01T00:00:00+00:00",
        "commit": "abc1234",
        "device": "a card",
        "threads": 1,
        "case": case,
        "mode": "inference",
        "preset": "paper",
        "batch": 1,
        "setting": {},
        "path": "reference",
        "execution": "eager",
        "dtype": "float32",
        "status": "ok",
        "reason": None,
        "error": 1e-7,
        "median_ms": ms,
        "q20_ms": 0.9 * ms,
        "q80_ms": 1.2 * ms,
        "samples_per_s": speed,
    }
    return values | changes


def failed(status, **changes):
    values = row(status=status, reason="why", **changes)
    return {name: value for name, value in values.items() if not name.endswith("_ms") and name != "samples_per_s"}


def swin(path, speed, **changes):
    return row("backbone", speed, setting={"backbone": "swin"}, path=path, **changes)


def lines(table):
    return [list(cells) for cells in zip(*(column.cells for column in table.columns))]


def header(table):
    return [column.header for column in table.columns]


def printed(table, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("change", [{"commit": "abc1235"}, {"date": "2030-01-02T00:00:00+00:00"}])
def test_a_ratio_of_rows_of_two_commits_or_days_says_so(change):
    said = "Ratios with an asterisk are of rows of two commits or days."
    cmbs = row("cmbs", 2, dtype="float64")
    network = {"network": "ave-vit-tiny"}
    slow, timm = row("networks", 2, setting=network), swin("timm", 2, execution="compile")
    latents = [row("latents", 2, setting={"latents": n}) for n in (1, 2)]
    fast = row("networks", 3, setting=network, path="optimized", execution="own")
    for rows, table in (
        ([cmbs, row(path="released", speed=3)], tables.table_4),
        ([slow, fast], tables.networks),
        ([timm, row(speed=3)], tables.headline),
        (latents, tables.figure_1),
    ):
        alike, apart = (table([*rows[:-1], rows[-1] | changes], "paper") for changes in ({}, change))
        assert said not in str(alike.caption)
        assert str(apart.caption).endswith(said)
        assert "x*" in printed(apart, 300)
        assert "x*" not in printed(alike, 300)


# Rows


def test_the_latest_run_counts_wherever_it_stands():
    old, new = row(speed=9), row(speed=2, date="2030-01-02T00:00:00+00:00")
    for rows in ([old, new], [new, old]):
        assert tables.latest(rows, "paper", "ave") == [new]
    # Of two runs within a second it is the one that was appended last.
    assert tables.latest([row(speed=3), row(speed=4)], "paper", "ave")[0]["samples_per_s"] == 4
    wrong = failed("wrong", date="2030-01-03T00:00:00+00:00")
    assert tables.latest([old, wrong, new], "paper", "ave") == [wrong]
    assert tables.best(tables.latest([old, wrong, new], "paper", "ave")) is None


def test_a_skipped_run_hides_no_measurement():
    skipped = failed("skipped", date="2030-01-03T00:00:00+00:00")
    assert tables.latest([row(), skipped], "paper", "ave") == [row()]
    assert tables.latest([skipped], "paper", "ave") == [skipped]


@pytest.mark.parametrize("change", [{"path": "fused"}, {"execution": "blocks"}, {"dtype": "tf32"}, {"batch": 2}])
def test_what_differs_in_the_key_is_another_measurement(change):
    assert len(tables.latest([row(), row(**change)], "paper", "ave")) == 2


@pytest.mark.parametrize("change", [{"preset": "small"}, {"mode": "training"}, {"case": "ave-vit"}])
def test_other_cases_modes_and_presets_are_left_out(change):
    assert tables.latest([row() | change], "paper", "ave") == []


def test_rows_of_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"expected those of one device, got a card; another"):
        tables.latest([row(), row(device="another", preset="small")], "paper", "ave")


def test_the_best_row_is_the_fastest_that_is_right():
    fastest = row(speed=7, batch=4, dtype="bfloat16")
    assert tables.best([row(speed=6), fastest, row(speed=5)]) is fastest
    assert tables.best([row(speed=99, status="wrong"), fastest]) is fastest
    assert tables.best([failed("skipped")]) is None


def test_load_reads_benchmarks_and_ladders_alone(tmp_path):
    files = {"bench.jsonl": "a", "bench-2.jsonl": "b", "ladder.jsonl": "c", "ladder-b32.jsonl": "d"}
    for name, path in files.items():
        results.append(tmp_path / name, [row(path=path), failed("skipped", path=path)])
    (tmp_path / "demo.jsonl").write_text('{"case": "demo"}\n')
    (tmp_path / "goldens.jsonl").write_text("no JSON\n")
    assert sorted({r["path"] for r in tables.load(tmp_path)}) == ["a", "b", "c", "d"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tables.load(tmp_path / "nowhere")
    (tmp_path / "bench-3.jsonl").write_text('{"case": "ave"}\n')
    with pytest.raises(ValueError, match=r"bench-3\.jsonl, line 1"):
        tables.load(tmp_path)


# Parameters


def test_parameters_of_the_papers_networks():
    sizes = tables.table_2_sizes()
    assert {case: size.trainable for case, size in sizes.items() if case != "ave-vit"} == {
        "xdc": 44_439_404,
        "avts": 44_439_404,
        "gdt": 38_905_964,
        "mbt": 174_616_079,
    }
    # By hand, of 12 blocks with 4 adapters each: two weights of 768 * 192 / 2, two latents, three norms, two gates.
    inner = 2 * 192 + 2 * 768 + 2 * 2 * 768
    assert sizes["ave-vit"].adapters == 48 * (2 * 768 * 192 // 2 + 2 * 768 + inner + 2)
    assert round(sizes["ave-vit"].adapters / 1e6, 2) == 7.39
    assert sizes["ave-vit"].head == 512 * (2 * 768 + 1) + 29 * (512 + 1)


@pytest.mark.parametrize(
    ("preset", "adapters", "head"),
    [
        ("ave-swinv2-large", 8_447_808, 1_588_253),
        ("action-videomae-base", 7_391_328, 101 * (2 * 768 + 1)),
        # By hand, beside four stages: two weights of C * C / 8 / 2, two latents, three norms, two gates.
        (
            "ave-resnet152",
            sum(2 * (c * c // 8 + 2 * c + 2 * c // 8 + 2 * c + 4 * c + 2) for c in (256, 512, 1024, 2048)),
            512 * (2 * 2048 + 1) + 29 * (512 + 1),
        ),
    ],
)
def test_sizes_of_the_presets(preset, adapters, head):
    size = tables.size_of(Config.from_preset(preset))
    assert (size.adapters, size.head, size.trainable) == (adapters, head, adapters + head)


def test_parameters_of_the_presets():
    size = tables.size_of(Config.from_preset("ave-swinv2-large"))
    cells = dict(zip(header(tables.parameters()), lines(tables.parameters())[0]))
    expected = {"adapters": "8,447,808", "head": "1,588,253", "trainable": "10,036,061"}
    assert cells.items() >= (expected | {"M": "10.04", "paper's M": "10.1"}).items()
    assert cells["frozen"] == f"{size.frozen:,}"
    assert [line[0] for line in lines(tables.parameters())] == list(Config.presets())
    assert [line[5] for line in lines(tables.parameters())][1:] == [""] * (len(Config.presets()) - 1)


def test_speeds_of_the_presets():
    of = {"setting": {"network": "avs-swinv2-tiny"}}
    rows = [row("networks", 2, **of), row("networks", 9, dtype="bfloat16", **of)]
    rows += [row("networks", speed, path="optimized", execution="own", **of) for speed in (3, 5)]
    rows += [failed("wrong", case="networks", path="optimized", setting={"network": "ave-vit-tiny"})]
    found = {line[1]: line for line in lines(tables.networks(rows, "paper"))}
    assert sorted(found) == sorted(Config.presets())
    assert [line[0] for line in found.values() if line[0]] == ["ave", "avs", "avqa", "action"]
    assert found["avs-swinv2-tiny"][3:] == ["2.00", "5.00", "2.50x", "optimized own float32", "1.0e-07"]
    assert found["ave-vit-tiny"][3:] == ["not measured", "not measured", "", "1 wrong", ""]
    assert found["ave-swinv2-large"][:3] == ["ave", "ave-swinv2-large", "10.04"]


def test_counts_agree_with_a_network_that_has_memory():
    config = PRESETS["small"].swin
    model = Model(config)
    size = tables.size_of(config)
    assert size.frozen == sum(p.numel() for p in model.backbone.parameters())
    assert size.trainable == sum(p.numel() for p in model.parameters()) - size.frozen == size.adapters + size.head


def test_frozen_parameters_are_not_called_trainable():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5).requires_grad_(False))
    assert tables.count(network) == tables.Size(trainable=9, frozen=20)


# Table 2


def test_table_2_has_the_fastest_row_and_says_which():
    rows = [
        row("mbt", 3),
        row("mbt", 5, batch=4, dtype="bfloat16", execution="blocks", error=2e-3),
        row("mbt", 50, batch=8, status="wrong"),
        row("mbt", 2, mode="training", batch=2),
        row("mbt", 70, preset="small"),
        row("ave-vit", 1234.6),
    ]
    table = tables.table_2(rows, "paper")
    assert header(table)[1:6] == ["trainable M", "paper's", "mode", "samples/s", "paper's"]
    none = [tables._NONE, "-", "", "", ""]
    assert lines(table) == [
        ["XDC", "44.4", "45", "inference", *none],
        ["", "", "", "training", *none],
        ["AVTS", "44.4", "45", "inference", *none],
        ["", "", "", "training", *none],
        ["GDT", "38.9", "39.2", "inference", *none],
        ["", "", "", "training", *none],
        ["MBT", "174.6", "172", "inference", "5.00", "4.42", "4", "reference blocks bfloat16", "2.0e-03"],
        ["", "", "", "training", "2.00", "4.42", "2", "reference eager float32", "1.0e-07"],
        [
            "LAVISH, ViT-B",
            "7.39 + 0.80",
            "7.4",
            "inference",
            "1,235",
            "6.36",
            "1",
            *["reference eager float32", "1.0e-07"],
        ],
        ["", "", "", "training", "not measured", "6.36", "", "", ""],
    ]


def test_what_was_tried_without_success_is_told():
    rows = [failed("wrong", case="xdc"), failed("skipped", case="xdc", batch=2), failed("skipped", case="xdc", batch=4)]
    assert lines(tables.table_2(rows, "paper"))[0][4:] == ["not measured", "-", "", "1 wrong, 2 skipped", ""]


def test_speeds_of_a_small_preset_are_named_as_such():
    rows = [row("mbt", 70, preset="small")]
    for function in (tables.table_2, tables.table_4):
        assert "small preset" in str(function(rows, "small").caption)
        assert "preset," not in str(function(rows, "paper").caption)
    small = lines(tables.table_2(rows, "small"))[6]
    assert small[:5] == ["MBT", "174.6", "172", "inference", "70.0"]


# Table 4

TABLE_4_ROWS = [
    row("cmbs", 2, dtype="float64"),
    row("cmbs", 3, dtype="float64", batch=2),
    row("cmbs", 10, dtype="bfloat16"),
    row("cmbs", 8),
    row("ave", 6, path="released"),
    row("ave", 40, path="released", dtype="bfloat16"),
    row("ave", 30, path="released", execution="blocks"),
    row("ave", 44, path="released-bmm", execution="blocks+graph", dtype="bfloat16"),
    row("ave", 55, path="folded"),
    row("ave", 54, path="reference"),
    row("cmbs", 4, mode="training", dtype="float64"),
    row("ave", 5, mode="training", path="released"),
]


def test_table_4_compares_like_with_like():
    chosen = tables.table_4_rows(TABLE_4_ROWS, "paper", "inference")
    assert {name: best["samples_per_s"] for name, (best, _) in chosen.items()} == {
        "CMBS, float64 as published": 3,
        "CMBS, other precisions": 10,
        "LAVISH, released, as published": 6,
        "LAVISH, released order": 44,
        "LAVISH, ours": 55,
    }
    assert tables.table_4_ratios(TABLE_4_ROWS, "paper", "inference") == {"as published": "2.00x", "fastest": "5.50x"}
    assert tables.table_4_ratios(TABLE_4_ROWS, "paper", "training") == {"as published": "1.25x", "fastest": "1.25x"}
    assert tables.table_4_ratios([], "paper", "training") == {"as published": "", "fastest": ""}


def test_table_4_has_the_papers_numbers_beside_ours():
    found = [[line[i] for i in (0, 1, 2, 3)] for line in lines(tables.table_4(TABLE_4_ROWS, "paper"))]
    assert found == [
        ["inference", "CMBS, float64 as published", "3.00", "0.72"],
        ["", "CMBS, other precisions", "10.0", ""],
        ["", "LAVISH, released, as published", "6.00", "1.40"],
        ["", "LAVISH, released order", "44.0", ""],
        ["", "LAVISH, ours", "55.0", ""],
        ["", "LAVISH / CMBS, as published", "2.00x", "1.94x"],
        ["", "LAVISH / CMBS, fastest", "5.50x", ""],
        ["training", "CMBS, float64 as published", "4.00", "0.72"],
        ["", "CMBS, other precisions", "not measured", ""],
        ["", "LAVISH, released, as published", "5.00", "1.40"],
        ["", "LAVISH, released order", "5.00", ""],
        ["", "LAVISH, ours", "not measured", ""],
        ["", "LAVISH / CMBS, as published", "1.25x", "1.94x"],
        ["", "LAVISH / CMBS, fastest", "1.25x", ""],
    ]
    assert {line[2] for line in lines(tables.table_4([], "paper"))} == {"not measured"}


# Figure 1


def latents_rows(scale=1.0, **changes):
    return [row("latents", 100 / (m + 8) / scale, setting={"latents": m}, **changes) for m in LATENTS]


def test_gflops_are_the_papers_and_linear():
    found = tables.gflops("paper")
    assert tuple(found) == LATENTS == (1, 2, 4, 8, 16, 32, 64)
    assert round(found[2], 2) == 1060.83
    slope, offset = np.polyfit(LATENTS, [*found.values()], 1)
    np.testing.assert_allclose([slope * m + offset for m in LATENTS], [*found.values()], rtol=1e-9)
    # By hand: per stage, two products in each gather and read, in two places, both ways, of 10 frames.
    grids = {stage: (48 // 2**stage) ** 2 * 192 * 2**stage * depth for stage, depth in enumerate((2, 2, 18, 2))}
    assert slope * 1e9 == pytest.approx(2 * 4 * 4 * 10 * sum(grids.values()), rel=1e-9)
    small = model_ops(PRESETS["small"].swin, 3, itemsize=2, fused=True)
    assert tables.gflops("small")[2] * 3e9 == pytest.approx(sum(op.total_flops for op in small))


def test_the_curve_is_the_fastest_way_that_has_all_points():
    slow, fast = latents_rows(), latents_rows(0.5, dtype="bfloat16")
    partial = latents_rows(0.1, dtype="tf32")[:-1]
    curve = tables.latents_curve(slow + fast + partial, "paper")
    assert list(curve.values()) == fast
    # Per clip: a batch of two takes longer, and is faster.
    batch = latents_rows(0.4, batch=2)
    assert batch[0]["median_ms"] > fast[0]["median_ms"]
    assert list(tables.latents_curve([*fast, *batch], "paper").values()) == batch
    assert list(tables.latents_curve([*slow, *partial, fast[0]], "paper").values()) == slow
    assert tables.latents_curve([failed("failed", case="latents", setting={"latents": 2})], "paper") == {}


def test_figure_1_as_a_table():
    table = tables.figure_1(latents_rows(), "paper")
    assert lines(table)[1] == ["2", "1,060.83", "1.000x", "100", "90.0-120", "1.00x"]
    assert lines(table)[-1] == ["64", "1,128.85", "1.064x", "720", "648-864", "7.20x"]
    assert "reference eager float32, batch 1" in str(table.caption)
    assert "1,097 MFLOPs" in str(table.caption)
    absent = tables.figure_1([], "paper")
    assert [line[3:] for line in lines(absent)] == [["not measured", "", ""]] * len(LATENTS)
    assert "Measured" not in str(absent.caption)
    # Without the point that times are relative to.
    partial = lines(tables.figure_1([r for r in latents_rows() if r["setting"]["latents"] != 2], "paper"))
    assert [partial[0][5], partial[1][3]] == ["", "not measured"]


def test_the_picture_has_both_curves_and_the_range(tmp_path):
    rows = latents_rows()
    work, times = tables.figure_1_chart(rows, "paper").axes
    assert "+6.5%" in work.get_title("left")
    np.testing.assert_allclose(work.lines[0].get_xydata(), list(tables.gflops("paper").items()))
    np.testing.assert_allclose(times.lines[0].get_xydata(), [[m, (m + 8) * 10] for m in LATENTS])
    corners = {tuple(np.round(corner, 6)) for corner in times.collections[0].get_paths()[0].vertices}
    assert {(m, round((m + 8) * factor, 6)) for m in LATENTS for factor in (9, 12)} <= corners
    assert "reference eager float32" in times.get_xlabel()
    assert "a batch of 4" in tables.figure_1_chart(latents_rows(batch=4), "paper").axes[1].get_title("left")
    empty = tables.figure_1_chart([], "paper").axes[1]
    assert [text.get_text() for text in empty.texts] == ["not measured"]


# The headline


def test_the_headline_answers_by_batch():
    rows = [
        row(speed=30, path="fused", execution="blocks+graph", dtype="bfloat16", batch=2),
        row(speed=12, path="folded", batch=2),
        row(speed=5, path="released", batch=2),
        row(speed=11, path="released", dtype="bfloat16", batch=2),
        row(speed=10, path="released-bmm", execution="blocks", batch=2),
        swin("timm", 15, batch=2),
        swin("timm", 20, execution="blocks", batch=2),
        swin("timm", 24, execution="blocks+graph", batch=2),
        swin("timm", 16, execution="graph", batch=2),
        swin("reference", 99, batch=2),
        row("backbone", 98, setting={"backbone": "vit"}, path="timm", execution="blocks", batch=2),
        row(speed=8, path="folded", batch=1),
        swin("timm", 10, execution="blocks", batch=1),
        row(speed=70, path="folded", batch=16),
    ]
    chosen = tables.contenders(rows, "paper")
    speeds = {batch: [r and r["samples_per_s"] for r in group.values()] for batch, group in chosen.items()}
    assert speeds == {1: [8, None, 10, None, None], 2: [30, 16, 24, 5, 10], 16: [70, None, None, None, None]}
    table = tables.headline(rows, "paper")
    assert [line[:4] for line in lines(table)][5:10] == [
        ["2", "LAVISH, ours", "30.0", ""],
        ["", "timm's bare backbone, eager", "16.0", "1.88x"],
        ["", "timm's bare backbone, compiled", "24.0", "1.25x"],
        ["", "LAVISH, released, as published", "5.00", "6.00x"],
        ["", "LAVISH, released, compiled", "10.0", "3.00x"],
    ]
    assert lines(table)[5][4] == "fused blocks+graph bfloat16"
    answer = "No, 0.80x at batch 1; yes, 1.25x at batch 2; not measured at batch 16."
    assert answer in str(table.caption)


def test_a_headline_without_rows_says_so():
    table = tables.headline([], "paper")
    assert [line[2] for line in lines(table)] == ["not measured"] * 5
    assert "images? Not measured." in str(table.caption)


# All of it


def test_the_report_is_in_order_and_fits_a_terminal():
    made = tables.report([*TABLE_4_ROWS, *latents_rows(), row("mbt", 5)], "paper")
    starts = ["LAVISH with all", "Table 2", "Table 4", "Figure 1", "Parameters", "Inference of the presets"]
    assert [str(table.title)[: len(start)] for table, start in zip(made, starts, strict=True)] == starts
    for table in made:
        text = printed(table)
        assert max(map(len, text.splitlines())) <= 120
        assert "…" not in text


def test_a_device_name_with_brackets_is_printed_as_it_is():
    rows = [row("mbt", device="CPU [bold] x|y")]
    table = tables.table_2(rows, "paper")
    assert "CPU [bold] x|y" in printed(table)


def test_write_leaves_markdown_and_pictures(tmp_path):
    results.append(tmp_path / "rows" / "bench.jsonl", [*TABLE_4_ROWS, *latents_rows(path="a|b")])
    out = tmp_path / "new" / "folder"
    paths = tables.write(tmp_path / "rows", "paper", out)
    assert paths == [out / name for name in ("tables.md", "figure_1.svg", "figure_1.png")]
    text = paths[0].read_text()
    assert text.count("### ") == 6
    assert "| inference | CMBS, float64 as published | 3.00 | 0.72 | 2 | reference eager float64 | 1.0e-07 |" in text
    assert "|  | LAVISH / CMBS, as published | 2.00x | 1.94x |  |  |  |" in text
    assert "| :--- | :--- | ---: | ---: | ---: | :--- | ---: |" in text
    assert "| 64 | 1,128.85 | 1.064x | 720 |" in text
    assert str(tables.table_2(TABLE_4_ROWS, "paper").caption) in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    svg = paths[1].read_text()
    assert "GFLOPs a clip" in svg
    tables.draw_figure_1(tables.load(tmp_path / "rows"), "paper", out / "again")
    assert (out / "again.svg").read_text() == svg


def test_markdown_keeps_bars_out_of_the_columns():
    table = tables._table("t", ("a", "b"), left=("a",))
    table.add_row("x|y", "1")
    assert tables.markdown(table).splitlines() == ["### t", "", "| a | b |", "| :--- | ---: |", "| x\\|y | 1 |"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.0, "1.00"), (9.999, "10.00"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value, text):
    assert tables._number(value) == text
