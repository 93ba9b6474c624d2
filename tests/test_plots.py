import io
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from lavish_fast import media, plots
from lavish_fast.config import AVE_CLASSES, AVS_SPECTROGRAM
from lavish_fast.spectrogram import spans_of, spectrograms

PNG = b"\x89PNG\r\n\x1a\n"


def make_clip(segments, size=32):
    generator = torch.Generator().manual_seed(segments)
    audio = torch.randn(segments, 48, 40, generator=generator)
    audio[:, 44:] = 0  # padding
    video = torch.randn(segments, 3, size, size, generator=generator)
    return media.Clip(audio, video, float(segments))


def one_hot(track, count, p=0.9):
    probabilities = torch.full((len(track), count), (1 - p) / (count - 1))
    probabilities[torch.arange(len(track)), torch.tensor(track)] = p
    return probabilities


def rows_of(figure):
    """The axes by the name that stands beside them."""
    return {axes.get_ylabel().split("\n")[0]: axes for axes in figure.axes}


def bars_of(axes):
    return [(round(b.get_x(), 6), round(b.get_width(), 6), to_hex(b.get_facecolor())) for b in axes.patches]


def texts_of(figure):
    figure.draw_without_rendering()
    return [text for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("segments", [1, 5, 10, 60])
def test_everything_lies_within_the_picture(segments):
    track = [28 if t % 5 < 2 else (t // 5) % 28 for t in range(segments)]
    truth = torch.tensor(track[::-1])
    figure = plots.timeline(make_clip(segments), one_hot(track, 29), AVE_CLASSES, title="x.mp4", truth=truth)
    pixels = matplotlib.image.imread(io.BytesIO(plots.png(figure)))
    assert pixels.shape[1] == figure.get_figwidth() * figure.dpi
    width, height = figure.canvas.get_width_height()
    for text in texts_of(figure):
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    rows = rows_of(figure)
    assert list(rows) == ["frames", "sound", "probability", "predicted", "true"]
    assert len(rows["frames"].images) == min(segments, 10)
    # A name stands in its bar only where there is room for it.
    for name in ("predicted", "true"):
        for text in rows[name].texts:
            middle = text.get_position()[0]
            bar = next(b for b in rows[name].patches if b.get_x() < middle < b.get_x() + b.get_width())
            inner, outer = text.get_window_extent(), bar.get_window_extent()
            assert outer.x0 <= inner.x0 <= inner.x1 <= outer.x1


def test_bars_are_the_runs_of_each_track():
    classes = ("Bell", "Drum", "Rain", "background")
    predicted, truth = [3, 1, 1, 0, 0], torch.tensor([3, 3, 1, 1, 1])
    figure = plots.timeline(make_clip(5), one_hot(predicted, 4), classes, title="clip", truth=truth, seconds=2.0)
    rows = rows_of(figure)
    bars = {name: bars_of(rows[name]) for name in ("predicted", "true")}
    assert [bar[:2] for bar in bars["predicted"]] == [(0, 2), (2, 4), (6, 4)]
    assert [bar[:2] for bar in bars["true"]] == [(0, 4), (4, 6)]
    grey, drum, bell = (colour for _, _, colour in bars["predicted"])
    assert [colour for _, _, colour in bars["true"]] == [grey, drum]
    assert len({grey, drum, bell}) == 3
    assert [text.get_text() for text in rows["predicted"].texts] == ["background", "Drum", "Bell"]
    # The line of a class has the colour of its bars, and its probabilities over the middle of each segment.
    lines = {to_hex(line.get_color()): line for line in rows["probability"].lines}
    np.testing.assert_allclose(lines[drum].get_xdata(), [1, 3, 5, 7, 9])
    np.testing.assert_allclose(lines[drum].get_ydata(), one_hot(predicted, 4)[:, 1], rtol=1e-6)
    assert rows["sound"].get_xlim() == (0, 10)


def test_a_class_has_the_same_colour_in_every_picture():
    colours = [plots._colours(shown) for shown in ([0, 1, 2], [2, 5], [1, 5])]
    assert colours[0][2] == colours[1][2]
    assert colours[1][5] == colours[2][5]
    # Classes 0 and 12 would both take the first colour.
    assert len(set(plots._colours([0, 1, 12]).values())) == 3
    assert len(plots._colours(range(28))) == 28


def test_the_thumbnails_are_the_frames():
    video = torch.zeros(2, 3, 8, 8)
    video[1] = 1.0
    figure = plots.timeline(media.Clip(torch.randn(2, 9, 9), video, 2.0), one_hot([0, 1], 2), "ab", title="x")
    first, second = (image.get_array() for image in rows_of(figure)["frames"].images)
    np.testing.assert_array_equal(first, media.denormalise(video)[0].numpy())
    np.testing.assert_array_equal(second, media.denormalise(video)[1].numpy())


def test_the_spectrogram_is_without_padding_and_has_the_low_bands_below():
    clip = make_clip(3)
    figure = plots.timeline(clip, one_hot([0, 1, 1], 2), "ab", title="x")
    image = rows_of(figure)["sound"].images[0]
    np.testing.assert_array_equal(image.get_array(), clip.audio[:, :44].reshape(132, 40).T)
    assert image.origin == "lower"


def test_mel_bands_that_no_sound_reaches_take_their_neighbour():
    clip = make_clip(2)
    clip.audio[:, :44, 7] = -1.5
    figure = plots.timeline(clip, one_hot([0, 1], 2), "ab", title="x")
    image = rows_of(figure)["sound"].images[0].get_array()
    assert any(np.array_equal(image[7], image[i]) for i in (6, 8))


def test_sound_is_drawn_where_it_is_heard():
    # Windows of 1.95 s, as the presets have: five overlap in a clip of 5 s, two leave most of 40 s out.
    for samples, frames, click in ((80000, 5, 40000), (640000, 2, 8000)):
        waveform = torch.zeros(samples)
        waveform[click : click + 320] = torch.randn(320, generator=torch.Generator().manual_seed(0))
        audio, spans = spectrograms(waveform, frames, AVS_SPECTROGRAM), spans_of(samples, frames, AVS_SPECTROGRAM)
        clip = media.Clip(audio, torch.zeros(frames, 3, 8, 8), samples / 16000, spans=spans)
        figure = plots.choice(clip, [("yes", 1.0)], title="x", what="answer")
        (picture,) = rows_of(figure)["sound"].images
        start, end, _, _ = picture.get_extent()
        assert (start, end) == pytest.approx((0, samples / 16000 - 0.1))
        column = np.ma.filled(picture.get_array(), np.nan)[100]
        times = np.linspace(start, end, 2 * len(column) + 1)[1::2]
        loud = times[column > np.nanmin(column) + 1]
        assert click / 16000 - 0.04 < loud.min() <= loud.max() < click / 16000 + 0.05
        assert np.isnan(column).mean() == pytest.approx(0 if frames == 5 else 1 - 3.9 / 39.9, abs=0.01)


@pytest.mark.parametrize("first", [0.0, 8.0])
def test_frames_stand_where_they_are_shown(first):
    # Four seconds of pictures beside twelve of sound.
    clip = make_clip(12)._replace(times=tuple(first + i / 3 for i in range(12)))
    figures = [
        plots.timeline(clip, one_hot([0] * 12, 2), "ab", title="x"),
        plots.choice(clip, [("yes", 1.0)], title="x", what="answer"),
    ]
    for figure in figures:
        images = rows_of(figure)["frames"].images
        middles = [np.mean(image.get_extent()[:2]) for image in images]
        assert middles == pytest.approx([first + 4 * (i + 0.5) / 3 for i in range(3)])
        for image, i in zip(images, (2, 6, 10)):
            np.testing.assert_array_equal(image.get_array(), media.denormalise(clip.video)[i].numpy())
    still = clip._replace(times=(first,) * 12)
    (image,) = rows_of(plots.timeline(still, one_hot([0] * 12, 2), "ab", title="x"))["frames"].images
    assert image.get_extent()[0] <= first < image.get_extent()[1]


@pytest.mark.parametrize("level", [-1.5, 0.0])
def test_silence_is_named(level):
    clip = make_clip(2)._replace(audio=torch.full((2, 48, 40), level))
    figure = plots.timeline(clip, one_hot([0, 1], 2), "ab", title="x")
    assert [text.get_text() for text in rows_of(figure)["sound"].texts] == ["silence"]
    assert plots.png(figure).startswith(PNG)


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are():
    title, classes = r"$\frac_x$ 日本.mp4", ("$x^$", "_hidden", "background")
    truth = torch.tensor([1, 2])
    figure = plots.timeline(make_clip(2), one_hot([0, 1], 3), classes, title=title, truth=truth)
    assert plots.png(figure).startswith(PNG)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(classes)
    assert title in [text.get_text() for text in figure.texts]
    rows = {"$x^$": [{"epoch": 1, "train_loss": 0.1, "val_score": 0.5}], "_hidden": []}
    assert plots.png(plots.training_curves(rows)).startswith(PNG)


def test_names_that_begin_alike_are_told_apart():
    classes = ("Playing, violin", "Playing, guitar", "Male speech, man speaking", "background")
    figure = plots.timeline(make_clip(8), one_hot([0, 1, 2, 3, 0, 1, 2, 3], 4), classes, title="x")
    shown = ["Playing, violin", "Playing, guitar", "Male speech", "background"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == shown
    assert "Playing" not in [text.get_text() for text in rows_of(figure)["predicted"].texts]
    long = ("An instrument is played, violin", "An instrument is played, guitar")
    assert plots._labels(long, (0, 1)) == {0: "An instru…ed, violin", 1: "An instru…ed, guitar"}


@pytest.mark.filterwarnings("error")
def test_long_names_lose_their_middle():
    name = "日本 " + "a long name " * 20 + "[abcDEF12345].mp4"
    figures = [
        plots.timeline(make_clip(2), one_hot([0, 1], 2), "ab", title=name),
        plots.choice(make_clip(2), [(name, 0.9), ("no", 0.1)], title=name, what="answer", below=name),
    ]
    for figure in figures:
        assert plots.png(figure).startswith(PNG)
    with plots._any_script():
        found = [text for figure in figures for text in texts_of(figure) if "日本" in text.get_text()]
        assert len(found) == 4
        for text in found:
            assert re.fullmatch(r"(0\.90  )?日本 a long .*….*\[abcDEF12345\]\.mp4", text.get_text())
            right = text.figure.canvas.get_width_height()[0]
            assert right - 60 < text.get_window_extent().x1 <= right


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"probabilities: expected \(5, 2\), got \(4, 2\)"):
        plots.timeline(make_clip(5), torch.rand(4, 2), "ab", title="x")
    with pytest.raises(ValueError, match=r"truth: expected \(5,\), got \(4,\)"):
        plots.timeline(make_clip(5), torch.rand(5, 2), "ab", title="x", truth=torch.zeros(4))


def test_masks_lie_over_the_frames_they_are_of():
    clip, truth = make_clip(3, size=8), torch.zeros(3, 8, 8)
    truth[:2, :4] = 1
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True
    figure = plots.segmentation(clip, masks, title="$x$", truth=truth.to(torch.uint8))
    rows = rows_of(figure)
    assert list(rows) == ["frames", "sound", "predicted", "true"]
    assert [text.get_text() for text in rows["predicted"].texts] == ["IoU 50%", "IoU 0%", "nothing in either"]
    for name, x in (("predicted", masks), ("true", truth.bool())):
        shown = [image.get_array() for image in rows[name].images]
        assert [image.get_extent() for image in rows[name].images] == [i.get_extent() for i in rows["frames"].images]
        for picture, frame, mask in zip(shown, media.denormalise(clip.video).numpy(), x.numpy()):
            np.testing.assert_array_equal(picture, plots.marked(frame, mask))
    assert list(rows_of(plots.segmentation(clip, masks, title="x"))) == ["frames", "sound", "predicted"]
    width, height = figure.canvas.get_width_height()
    for box in (text.get_window_extent() for text in texts_of(figure)):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    with pytest.raises(ValueError, match=r"masks: expected \(3, 8, 8\), got \(2, 8, 8\)"):
        plots.segmentation(clip, masks[:2], title="x")
    with pytest.raises(ValueError, match=r"truth: expected \(3, 8, 8\), got \(3, 4, 8\)"):
        plots.segmentation(clip, masks, title="x", truth=truth[:, :4])


def test_save_writes_a_png_and_nothing_else(tmp_path):
    figure = plots.training_curves({})
    plots.save(figure, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(PNG)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["curves.png"]


def test_curves_show_the_epochs_of_each_variant():
    rows = [{"step": 1, "loss": 9.0}]
    rows += [{"epoch": e, "train_loss": 1 / e, "val_score": 0.2 * e} for e in (1, 2, 3)]
    figure = plots.training_curves({"audio+video": rows, "video": rows[:2]})
    loss, accuracy = figure.axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3], [1]]
    assert list(loss.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(accuracy.lines[0].get_ydata()) == [0.2, 0.4, 0.2 * 3]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["audio+video", "video"]


class Page(HTMLParser):
    """The page's tags with their attributes, and the text of each cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text = [("", {})], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text += data
        if self.tags[-1][0] in ("td", "th"):
            self.cells[-1] += data.strip()


def test_report_is_one_file_with_everything_escaped(tmp_path):
    figure, name = plots.training_curves({}), '<script>alert("x")</script>'
    path = tmp_path / "report.html"
    plots.report(
        path,
        title=name,
        summary_rows=[
            {"variant": name, "accuracy": "91.3 %", "clips/s": 12.3456, "n": 3},
            {"variant": "video", "accuracy": None, "clips/s": 2.0, "chance": "43 %"},
        ],
        clips=[(name, figure, f'"{name}"'), ("plain", PNG, "")],
        notes=[name],
        curves=(figure, "loss and mIoU"),
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(name) == 6  # title, heading, cell, note, clip, caption
    assert page.cells == [
        *("variant", "accuracy", "clips/s", "n", "chance"),
        *(name, "91.3 %", "12.35", "3", ""),
        *("video", "", "2", "", "43 %"),
    ]
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "th"]
    assert classes == [None, "number", "number", "number", "number"]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image["src"].startswith("data:image/png;base64,iVBORw0KGgo") for image in images)
    assert [image["alt"] for image in images] == ["loss and mIoU", f'"{name}"', ""]
    # Nothing is fetched from anywhere.
    for _, attributes in page.tags:
        assert not {"href", "srcset", "onload"} & set(attributes)
    assert "url(" not in text
    assert "@import" not in text


def test_report_of_nothing(tmp_path):
    plots.report(tmp_path / "report.html", title="empty", summary_rows=[], clips=[])
    page = Page((tmp_path / "report.html").read_text())
    assert not {"table", "img", "h2"} & {tag for tag, _ in page.tags}


# Masks, choices and sweeps


def assert_within(figure):
    figure.draw_without_rendering()
    box = figure.get_tightbbox()  # inches, of what is drawn
    assert 0 <= box.x0 < box.x1 <= figure.get_figwidth()
    assert 0 <= box.y0 < box.y1 <= figure.get_figheight()


@pytest.mark.parametrize("frames", [1, 5, 23, 130])
def test_a_sheet_of_masks(frames):
    masks = torch.zeros(frames, 8, 8, dtype=torch.bool)
    masks[0, :4] = True
    times = [2.0 * i for i in range(frames)]
    clip = make_clip(frames)._replace(duration=2.0 * frames, times=tuple(times))
    figure = plots.masks(clip, masks, title="x.mp4")
    assert_within(figure)
    rows = rows_of(figure)
    assert list(rows) == ["frames", "sound", "marked"]
    assert len(rows["frames"].images) == min(frames, 60)
    shown = [float(text.get_text().split()[0]) for text in rows["frames"].texts]
    assert (shown[0], shown[-1]) == (times[0], times[-1])
    assert shown == sorted(shown)
    (line,) = rows["marked"].lines
    assert line.get_xdata().tolist() == times
    assert line.get_ydata().tolist() == [0.5] + [0.0] * (frames - 1)
    with pytest.raises(ValueError, match=rf"masks and times: expected {frames}, got \({frames}, 8, 8\) and 0"):
        plots.masks(clip._replace(times=()), masks, title="")


def test_a_mask_marks_what_is_in_it_and_nothing_else():
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 255, (600, 1000, 3), np.uint8)
    mask = np.zeros((12, 10), bool)
    mask[3:6, 2:7] = True  # rows 150 to 299, columns 200 to 699
    got = plots.marked(picture, mask)
    colour = np.array([int(plots.MARK[i : i + 2], 16) for i in (1, 3, 5)])
    changed = (got != picture).any(-1)
    assert not changed[:120].any()
    assert not changed[330:].any()
    assert not changed[:, :120].any()
    assert not changed[:, 780:].any()
    inside = slice(180, 270), slice(300, 600)
    assert np.abs(got[inside] - (0.6 * picture[inside] + 0.4 * colour)).max() <= 2
    # The outline is nearly of one colour, whatever is beneath.
    assert any(np.abs(got[row, 300:600].astype(int) - colour).max() < 4 for row in range(130, 180))
    assert np.array_equal(plots.marked(picture, np.zeros((12, 10), bool)), picture)
    whole = plots.marked(picture, np.ones((600, 1000), bool))
    assert np.array_equal(plots.marked(picture, plots.opacity(np.ones((600, 1000), bool), 600, 1000)), whole)


@pytest.mark.parametrize("below", [None, "x.mp4"])
def test_a_choice_shows_the_probabilities(below):
    best = [("$yes$", 0.7), ("a name that is rather long, as some are", 0.2), ("no", 0.0)]
    figure = plots.choice(
        make_clip(16)._replace(audio=torch.randn(1, 48, 40)), best, title="Is it?", what="answer", below=below
    )
    assert_within(figure)
    bars = rows_of(figure)["answer"].patches
    assert [bar.get_width() / bars[0].get_width() for bar in bars] == pytest.approx([1, 2 / 7, 0])
    texts = [text.get_text() for text in texts_of(figure)]
    assert {"0.70  $yes$", "0.20  a name that is rather long, as some are", "0.00  no", "Is it?"} <= set(texts)
    assert ("x.mp4" in texts) == (below is not None)


def test_a_sweep_shows_score_and_cost():
    figure = plots.latents([2], [0.5], [3.0], "accuracy")
    assert_within(figure)
    counts, scores, gflops = [1, 2, 8], [0.2, 0.4, 0.3], [10.0, 11.0, 17.0]
    figure = plots.latents(counts, scores, gflops, "accuracy")
    assert_within(figure)
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [list(x) for x in zip(counts, scores)]
    assert right.lines[0].get_xydata().tolist() == [list(x) for x in zip(counts, gflops)]
    assert [text.get_text() for text in left.texts] == ["40.0%"]
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "2", "8"]


def test_figures_are_saved_by_the_name_of_the_file(tmp_path):
    figure = plots.latents([1, 2], [0.5, 0.6], [3.0, 4.0], "accuracy")
    plots.save(figure, tmp_path / "a.png")
    plots.save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]
