"""The command `lavish-fast`: what people type. Exit codes: 0 done, 1 failed work, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from lavish_fast.commands import answer, classify, info, localize, prepare, segment, sweep, terminal, train
from lavish_fast.commands.options import Task
from lavish_fast.commands.terminal import console as _console

app = typer.Typer(
    name="lavish-fast",
    help="LAVISH: audio-visual events, masks, answers and actions, by a frozen vision transformer that also listens.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command and exits. Errors are one line on stderr, unless --debug asks for the traceback."""
    options = SimpleNamespace(debug=False)
    with warnings.catch_warnings():
        warnings.showwarning = terminal.show_warning
        try:
            code = app(args, standalone_mode=False, obj=options, prog_name="lavish-fast")
        except Exception as error:
            if options.debug:
                raise
            # Typer makes an Abort of an EOFError.
            cause = (isinstance(error, typer.Abort) and error.__cause__) or error
            code = getattr(cause, "exit_code", 1)
            terminal.say_error(terminal.one_line(cause))
    if code == 130:
        terminal.say_error("interrupted")
    sys.exit(code or 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lavish_fast import __version__

        print(f"lavish_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj.debug = debug


@app.command()
def demo(
    task: Task = "ave",
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder for clips, models and report.html.", show_default="demo, or demo-TASK"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the clips and of the training.")] = 0,
) -> None:
    """Learn a task from small generated clips on this machine in minutes, and report how well."""
    from lavish_fast import demos

    demos.run(task, out or Path("demo" if task == "ave" else f"demo-{task}"), seed=seed, console=_console())


for _command in (
    localize.localize,
    segment.segment,
    answer.answer,
    classify.classify,
    prepare.prepare,
    train.train,
    train.evaluate,
):
    app.command()(_command)
app.add_typer(sweep.app, name="sweep")
app.command()(info.info)


if __name__ == "__main__":
    main()
