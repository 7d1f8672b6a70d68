"""`deepseek-ray`: the commands, and what becomes of their errors."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer

from deepseek_ray import __version__
from deepseek_ray.cli.admin import admin
from deepseek_ray.cli.batch import batch
from deepseek_ray.cli.chaos import chaos
from deepseek_ray.cli.chat import chat
from deepseek_ray.cli.complete import complete
from deepseek_ray.cli.config import config
from deepseek_ray.cli.doctor import doctor
from deepseek_ray.cli.evaluate import evaluate
from deepseek_ray.cli.experts import experts
from deepseek_ray.cli.from_config import SeveralValuesCommand
from deepseek_ray.cli.quickstart import quickstart
from deepseek_ray.cli.scale import drain, move, rebalance, replicate, scale
from deepseek_ray.cli.serve import serve
from deepseek_ray.cli.status import status
from deepseek_ray.cli.tune import tune
from deepseek_ray.errors import DeepSeekRayError

_NAME = "deepseek-ray"
_HELP = """Train, search and serve DeepSeek-style mixture-of-experts models on Ray.

[bold]Examples[/bold]

  deepseek-ray quickstart\n
  deepseek-ray doctor\n
  deepseek-ray serve runs/quickstart/model --port 8000\n
  deepseek-ray chat http://127.0.0.1:8000\n
  deepseek-ray config show configs/tiny.yaml --origin
"""

app = typer.Typer(
    name=_NAME,
    help=_HELP,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(quickstart)
app.command()(serve)
app.command()(status)
app.command()(scale)
app.command()(drain)
app.command()(rebalance)
app.command()(replicate)
app.command()(move)
app.command()(experts)
app.command()(admin)
app.command()(chat)
app.command()(complete)
app.command()(doctor)
app.command()(chaos)
app.command()(tune)
app.command(cls=SeveralValuesCommand)(evaluate)
app.command(cls=SeveralValuesCommand)(batch)
app.add_typer(config, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{_NAME} {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None, told_by: str = _NAME) -> None:
    """Exit codes: 0 done, 1 an error of ours in one line on stderr, 2 wrong usage, 130 interrupted, 143 terminated.

    `arguments` None takes those of the process. `told_by` stands before an error's line. SIGTERM ends a command as
    Ctrl-C does: what it has started is cleared away first.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app(arguments, prog_name=_NAME)
    except DeepSeekRayError as error:
        print(f"{told_by}: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `deepseek-ray complete ... | head`
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
