"""Is a constraint one that engines can work with? Tried out in a process that may take only so long and so much.

A short schema or regex can ask for any amount of work, and a compiler cannot be stopped from outside in its own
process. What passes here compiles in an engine within the same bounds. No torch: ingresses use it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import OrderedDict

import llguidance
import msgspec

from deepseek_ray.engine.grammar import compile_matcher
from deepseek_ray.errors import RequestError, UnavailableError
from deepseek_ray.messages import StructuredOutputsParams

CPU_SECONDS = 2
"""Processor time to start the process and compile; what most constraints need is a tenth of a second."""
MEMORY_BYTES = 2**30
"""Address space. Of this, a constraint may take about 800 MB while it is compiled."""
_WALL_SECONDS = 60.0
"""The bound above counts processor time, so that a busy machine refuses nothing; this is for a machine that hangs."""
_MAX_VERDICTS = 256
MAX_PROCESSES = 2
_BYTE_EOS = 256


class GrammarChecker:
    """Checks constraints, at most two at a time, and remembers the verdicts. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seats = threading.BoundedSemaphore(MAX_PROCESSES)
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    def check(self, params: StructuredOutputsParams) -> None:
        """RequestError naming the field and what is wrong with it. Takes about 0.1 s for one not seen before."""
        params.validate()
        key = msgspec.json.encode(params)
        with self._lock:
            problem = self._verdicts.get(key)
        if problem is None:
            with self._seats:
                problem = _try_out(key)
        with self._lock:
            self._verdicts[key] = problem
            self._verdicts.move_to_end(key)
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if problem:
            raise RequestError(f"{params.field} cannot be used: {problem}", params.field)


def _try_out(encoded: bytes) -> str:
    """What is wrong, empty for nothing."""
    program = "from deepseek_ray.engine.grammar_check import main; main()"
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=encoded,
            capture_output=True,
            timeout=_WALL_SECONDS,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError("the machine is too busy to check the structured output; try again later") from None
    if done.returncode == 0:
        return done.stdout.decode(errors="replace")
    return f"compiling it takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB; simplify it"


def main() -> None:
    """The process: parameters on stdin, what is wrong on stdout. Killed by the kernel beyond its limits."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    params = msgspec.json.decode(sys.stdin.buffer.read(), type=StructuredOutputsParams)
    try:
        compile_matcher(params, llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes())))
    except RequestError as error:
        sys.stdout.write(error.message.removeprefix(f"{params.field} cannot be used: "))


class _Bytes:
    """The vocabulary for trying out: one token per byte."""

    eos_token_id = _BYTE_EOS
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<eos>")
    special_token_ids = (_BYTE_EOS,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())
