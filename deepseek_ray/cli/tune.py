"""`deepseek-ray tune`: a sweep over hyperparameters or architectures."""

from __future__ import annotations

import importlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepseek_ray.config.load import load_pretrain_config
from deepseek_ray.errors import ConfigError

if TYPE_CHECKING:
    from deepseek_ray.tuning.result import SearchResult


class Scheduler(StrEnum):
    ASHA = "asha"
    PBT = "pbt"
    NONE = "none"


class Searcher(StrEnum):
    OPTUNA = "optuna"
    RANDOM = "random"
    NSGA2 = "nsga2"


class Resume(StrEnum):
    AUTO = "auto"
    MUST = "must"
    NEVER = "never"


_HELP = """Search hyperparameters, or with --architecture model shapes.

Prints a line for each trial that ended. The same name again resumes a sweep, whatever killed it.

[bold]Examples[/bold]

  deepseek-ray tune configs/tiny.yaml --trials 4 --tokens 40960\n
  deepseek-ray tune configs/tiny.yaml --space tune_spaces.pretraining:changeable --scheduler pbt --trials 4\n
  deepseek-ray tune configs/tiny.yaml --architecture --max-parameters 300000 --plots plots\n
  deepseek-ray tune configs/tiny.yaml --space my_spaces.py:narrow --set data.sequence_length=128 --json
"""


def tune(
    config: Annotated[Path, typer.Argument(help="Run file (YAML) that the trials vary.")],
    space: Annotated[
        str | None,
        typer.Option(
            help="module:function or file.py:function that returns a space. "
            "Default: tune_spaces.pretraining:space, or tune_spaces.moe_architecture:space.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the sweep.")] = 16,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Training tokens of each trial. Default: as the run file.", show_default=False),
    ] = None,
    architecture: Annotated[
        bool, typer.Option("--architecture", help="Search model.* keys for all objectives.")
    ] = False,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="With --architecture, repeatable. Default: validation_loss and latency_ms.", show_default=False
        ),
    ] = None,
    max_parameters: Annotated[
        int | None, typer.Option(min=1, help="With --architecture: refuse larger models.")
    ] = None,
    max_active_parameters: Annotated[
        int | None, typer.Option(min=1, help="With --architecture: the same for parameters that one token uses.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="With --architecture: refuse models that decode slower.")
    ] = None,
    scheduler: Annotated[
        Scheduler | None, typer.Option(help="Default: asha; none with --architecture.", show_default=False)
    ] = None,
    searcher: Annotated[
        Searcher | None,
        typer.Option(help="Default: optuna (TPE); nsga2 for several objectives.", show_default=False),
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at once. Default: as many as fit.", show_default=False)
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Directory of sweeps. Default: the run file's storage_path.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep. Default: <run>-sweep.", show_default=False)
    ] = None,
    resume: Annotated[Resume, typer.Option(help="must: only resume. never: only start.")] = Resume.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures of the sweep.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, progress on stderr.")] = False,
) -> None:
    base = load_pretrain_config(config, set_ or [])
    found = load_space(
        space or ("tune_spaces.moe_architecture:space" if architecture else "tune_spaces.pretraining:space")
    )
    limits = {
        "max_parameters": max_parameters,
        "max_active_parameters": max_active_parameters,
        "max_latency_ms": max_latency_ms,
    }
    options: dict[str, Any] = {
        "num_trials": trials, "budget_tokens": tokens, "max_concurrent": max_concurrent, "storage": storage,
        "name": name, "resume": resume.value, "seed": seed, "stream": sys.stderr if as_json else sys.stdout,
        **({"scheduler": scheduler.value} if scheduler else {}), **({"searcher": searcher.value} if searcher else {}),
    }  # fmt: skip
    from deepseek_ray.tuning.search import search_architecture, search_hyperparameters

    if architecture:
        options |= limits | ({"objectives": objective} if objective else {})
        result = search_architecture(found, config=base, **options)
    else:
        given = [name for name, value in {**limits, "objective": objective}.items() if value is not None]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} is for --architecture; add that, or leave it out")
        result = search_hyperparameters(base, found, **options)
    pictures = result.plot(plots) if plots is not None else []
    print(json.dumps(as_values(result), indent=2) if as_json else result.describe())
    for picture in [] if as_json else pictures:
        print(picture)


tune.__doc__ = _HELP


def load_space(reference: str) -> Any:
    """What the function of `module:function` or `file.py:function` returns. ConfigError when there is none."""
    module_name, separator, function = reference.rpartition(":")
    if not separator or not function:
        raise ConfigError(f"--space is {reference!r}; give module:function, such as tune_spaces.pretraining:space")
    path = Path(module_name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"--space names {path}, which does not exist; give the path of a Python file")
        sys.path.insert(0, str(path.parent.absolute()))
        module_name = path.stem
    else:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--space names the module {module_name!r}, which cannot be imported ({error}); run the command in the "
            "folder that holds it, or give path/to/file.py:function"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(getattr(module, function, None)):
        offered = ", ".join(
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name
        )
        raise ConfigError(f"--space names {function!r}, which {module_name} does not have; it has {offered}")
    return getattr(module, function)()


def as_values(result: SearchResult) -> dict[str, Any]:
    """The result as plain values."""
    return {
        "directory": str(result.directory),
        "best": {
            "trial": result.best_trial.name,
            "metrics": result.best_metrics,
            "sample": result.best_trial.sample,
            "checkpoint": str(result.best_checkpoint),
        },
        "trials": [
            {
                "trial": record.name,
                "status": record.status,
                "params": record.params,
                "metrics": record.metrics,
                "tokens": record.tokens,
                "seconds": record.seconds,
                "failure": record.failure,
            }
            for record in result.trials
        ],
    }
