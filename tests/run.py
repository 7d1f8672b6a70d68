"""`make test`: the suite in two processes side by side.

    python tests/run.py [pytest's options]

One runs what starts Ray, one test after the other; the other runs the rest, and the long tests that start a Ray of
their own in other processes (marker `apart`). Either waits for processes half of the time. What the first says is shown
as it comes, the other's at the end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

_PYTEST = [sys.executable, "-m", "pytest", "--durations=12"]
_SHARING, _REST = "cluster and not apart and not slow", "(apart or not cluster) and not slow"
_NO_TESTS = 5
"""pytest's exit code when nothing was selected: then the other half has it."""


def main(options: list[str]) -> int:
    with tempfile.TemporaryFile("w+") as output:
        rest = subprocess.Popen([*_PYTEST, "-m", _REST, *options], stdout=output, stderr=output)
        try:
            codes = [subprocess.run([*_PYTEST, "-m", _SHARING, *options]).returncode, rest.wait()]
        finally:
            rest.kill()
            rest.wait()
        output.seek(0)
        print(output.read(), flush=True)
    worst = [code for code in codes if code != _NO_TESTS]
    return max(worst, default=_NO_TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
