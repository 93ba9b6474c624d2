"""`lavish-fast prepare`: what a download lacks, and its frames and sound extracted."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish_fast.commands import options, terminal
from lavish_fast.config import Config

if TYPE_CHECKING:
    from rich.console import Console

_SOURCES = {
    "ave": "AVE: github.com/YapengTian/AVE-ECCV18",
    "avs": "AVSBench, its single-source part S4: github.com/OpenNLPLab/AVSBench",
    "avqa": "MUSIC-AVQA: gewu-lab.github.io/MUSIC-AVQA",
    "action": "UCF101 and its train/test splits for recognition: www.crcv.ucf.edu/data/UCF101.php",
}


def prepare(
    dataset: Annotated[options.TaskName, typer.Argument(metavar="DATASET", help="ave, avs, avqa or action.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="Where it was downloaded to.")],
    decode: Annotated[bool, typer.Option("--decode", help="Also try every file, and count silent ones.")] = False,
    extract: Annotated[
        bool, typer.Option("--extract", help="First extract frames and sound of its videos; goes on where it stopped.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode.", show_default="one a CPU core")
    ] = None,
    fold: options.Fold = 1,
) -> None:
    """Say what a downloaded data set lacks; the exit code is 1 when training would not see all of it.

    Nothing is fetched. Where to get them, and how they are to lie in DIR:

    - **ave**: AVE, github.com/YapengTian/AVE-ECCV18. Annotations.txt, split lists, AVE/ID.mp4.

    - **avs**: AVSBench, github.com/OpenNLPLab/AVSBench. s4_meta_data.csv, and in s4_data/ visual_frames/, gt_masks/
      and audio_wav/.

    - **avqa**: MUSIC-AVQA, gewu-lab.github.io/MUSIC-AVQA. json/avqa-SPLIT.json, videos/ID.mp4.

    - **action**: UCF101, www.crcv.ucf.edu/data/UCF101.php. UCF-101/CLASS/NAME.avi, and ucfTrainTestlist/.

    --extract writes what is read faster than videos. ave and avqa: frames/ID/, at 3 and 1 frames a second, and
    audio/ID.wav. avs: from raw_videos/SPLIT/CATEGORY/NAME.mp4, the visual_frames/ and audio_wav/ above. action needs
    none.
    """
    from lavish_fast import tasks

    if not folder.is_dir():
        raise typer.BadParameter(f"expected a folder, got none: {folder} ({_get(dataset)})", param_hint="DIR")
    if extract and dataset == "action":
        raise typer.BadParameter(
            "expected ave, avs or avqa, got action, whose videos are read as they are", param_hint="--extract"
        )
    of_data = options.of_data(dataset, fold)
    module, config = tasks.load(dataset), Config.from_preset(options.PRESETS[dataset])
    with suppress(OSError, ValueError):  # the report says it
        config = module.settle(config, folder)
    console = terminal.console()
    bad = extract and _extract(console, dataset, folder, config, workers)
    with terminal.progress(console) as bar:
        task = bar.add_task("decode", total=None, visible=decode)
        tried = 0

        def progress(done: int, total: int) -> None:
            nonlocal tried
            tried = done
            bar.update(task, completed=done, total=total)

        report = module.verify(folder, config, decode=decode, workers=workers, progress=progress, **of_data)
    columns = ("questions", "videos without media") if dataset == "avqa" else ("clips", "without media")
    _print_report(console, report, columns)
    if decode:
        console.print(f"{tried} clips tried, {len(report.undecodable)} cannot be read")
    if not report.ok:
        console.print(_get(dataset), markup=False, soft_wrap=True)
    if bad or not report.ok:
        raise typer.Exit(1)
    # A part of a data set, or another one, has all that its lists name and not all that is published.
    found = "nothing is missing" if report.published else "every listed file is there"
    console.print(found + ("" if decode else "; --decode would also try every file"))


def _get(dataset: str) -> str:
    return f"to be had from {_SOURCES[dataset]}"


def _print_report(console: Console, report: Any, columns: tuple[str, str]) -> None:
    from rich.table import Table

    if report.splits:
        if report.heading:
            console.print(report.heading, markup=False, soft_wrap=True)
        table = Table("split")
        for name in columns:
            table.add_column(name, justify="right")
        for split, count in report.splits.items():
            missing = len(report.missing[split])
            table.add_row(split, str(count), str(missing), style="red" if missing else "")
        console.print(table)
    for kind, lines in (("problem", report.problems), ("note", report.notes)):
        for line in lines:
            console.print(f"{kind}: {terminal.printable(line)}", markup=False, soft_wrap=True)


def _extract(console: Console, dataset: str, folder: Path, config: Config, workers: int | None) -> bool:
    """Extracts what is not extracted yet. Returns whether a file could not be read, or was not there."""
    from lavish_fast import extraction, media

    try:
        plan = extraction.plan(dataset, folder, config)
    except (OSError, ValueError):  # the report says it
        return True
    failed = 0
    with terminal.progress(console) as bar:
        task = bar.add_task("extract", total=len(plan.videos))
        for _, result in media.load_clips(plan.videos, workers=workers, load=plan.load, **plan.options):
            if isinstance(result, media.MediaError):
                failed += 1
                terminal.say_error(str(result))
            else:
                for message in result:
                    terminal.show_warning(message)
            bar.advance(task)
    done = f"{len(plan.videos) - failed} videos extracted, {plan.done} were already"
    console.print(done + (f", {failed} cannot be read" if failed else ""))
    if plan.missing:
        from lavish_fast.tasks import some

        terminal.say_error(f"{len(plan.missing)} clips have no video in {extraction.RAW_VIDEOS}/: {some(plan.missing)}")
    return bool(failed or plan.missing)
