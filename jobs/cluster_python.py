"""Makes an entry point run in the Python of the cluster's environment, whatever `python` means in the job's shell.

Ray runs a job's command in a shell on the head node with the PATH that `ray start` had. When that was not the PATH of
the environment (its `ray` was started by its full path, say), `python` is another interpreter, without this project's
packages. The raylet above us knows the right one: it is the one that it starts workers with. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys

_NEEDED = ("ray", "torch", "pydantic", "deepseek_ray")
_MARK = "DEEPSEEK_RAY_REEXECUTED"
_FLAG = "--python_worker_command="


def use_cluster_python() -> None:
    """Return if this interpreter has what the project needs; else start again in the cluster's, or exit with advice."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    python = None if _MARK in os.environ else _python_of_the_raylet_above()
    if python is None:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}. Give the environment's own Python, for example "
            "`ray job submit --working-dir . -- /path/to/.venv/bin/python jobs/pretrain.py ...`, or start the cluster "
            "with the environment first on the PATH (`source .venv/bin/activate; ray start --head`)."
        )
    print(f"{sys.executable} lacks {', '.join(missing)}; starting again in the cluster's {python}", flush=True)
    os.environ[_MARK] = "1"
    os.execv(python, [python, *sys.argv])


def _python_of_the_raylet_above() -> str | None:
    """The interpreter in the command line of the nearest raylet among our ancestors; None without one, or off Linux."""
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                arguments = file.read().decode(errors="replace").split("\0")
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None
        for argument in arguments:
            if argument.startswith(_FLAG):
                python = shlex.split(argument.removeprefix(_FLAG))[0]
                return python if os.access(python, os.X_OK) else None
    return None
