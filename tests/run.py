"""`make test`: the suite in two processes side by side, those tests that start Ray and the rest.

    python tests/run.py [pytest's options]

Either half waits for processes half of the time. What Ray's half says is shown as it comes, the other's at the end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

_PYTEST = [sys.executable, "-m", "pytest"]
_NO_TESTS = 5
"""pytest's exit code when nothing was selected: then the other half has it."""


def main(options: list[str]) -> int:
    with tempfile.TemporaryFile("w+") as output:
        rest = subprocess.Popen([*_PYTEST, "-m", "not cluster and not slow", *options], stdout=output, stderr=output)
        try:
            codes = [subprocess.run([*_PYTEST, "-m", "cluster and not slow", *options]).returncode, rest.wait()]
        finally:
            rest.kill()
            rest.wait()
        output.seek(0)
        print(output.read(), flush=True)
    worst = [code for code in codes if code != _NO_TESTS]
    return max(worst, default=_NO_TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
