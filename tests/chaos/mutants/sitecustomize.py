"""Mistakes that the checker must notice, and misfortunes that a deployment must stand. With this folder on PYTHONPATH,
processes have the one that MUTANT names."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def retry_without_deduplication(module: ModuleType) -> None:
    """A request that goes to another worker begins anew, and what it had is sent again."""
    replace = module.msgspec.structs.replace

    def forgetful(struct: Any, **changes: Any) -> Any:
        if "output_token_ids" in changes:
            changes["output_token_ids"] = []
        return replace(struct, **changes)

    class Structs:
        replace = staticmethod(forgetful)

    class Msgspec:
        structs = Structs

        def __getattr__(self, name: str) -> Any:
            import msgspec

            return getattr(msgspec, name)

    module.msgspec = Msgspec()


def combine_in_arrival_order(module: ModuleType) -> None:
    """The slots of a token are summed in the order in which the shards answered."""
    take, dispatch = module.RemoteExperts._take, module.RemoteExperts.dispatch
    arrived: list[Any] = []

    def remember(self: Any, frame: Any) -> None:
        (ticket,) = self._open
        pending = ticket.pending.get(frame.sequence)
        take(self, frame)
        if pending is not None and frame.sequence not in ticket.pending:
            arrived.append(pending.call.places)

    def begin(self: Any, *arguments: Any) -> Any:
        arrived.clear()
        return dispatch(self, *arguments)

    def combine(rows: Any, weights: Any) -> Any:
        import torch

        place = torch.cat(arrived)
        when = torch.empty_like(place).scatter_(0, place, torch.arange(len(place)))
        order = when.view(weights.shape).argsort(dim=1)
        return original(rows.gather(1, order.unsqueeze(-1).expand_as(rows)), weights.gather(1, order))

    module.RemoteExperts._take, module.RemoteExperts.dispatch = remember, begin
    import deepseek_ray.models.paged_layer as paged_layer
    from deepseek_ray.kernels.native import NativeKernels

    original = paged_layer.combine_slots
    paged_layer.combine_slots = combine
    NativeKernels.combine_slots = lambda *_: None  # then it is `combine` that does it


def answer_for_an_expert_that_is_not_held(module: ModuleType) -> None:
    """A shard says it holds what it was told to load later, and computes with another expert's weights."""
    load_all, first_experts = module.ExpertStore.load_all, 4  # of 8, with two shards

    def pretend(self: Any, wanted: Any) -> Any:
        for layer, expert in wanted:
            here = self._layers[layer].experts if layer in self._layers else {}
            if len(here) < first_experts:
                yield from load_all(self, [(layer, expert)])
            else:
                self._hold(layer, {expert: next(iter(here.values())), **here})
                yield

    module.ExpertStore.load_all = pretend


def crash_over_one_row(module: ModuleType) -> None:
    """A shard ends when it is to compute with the activations whose bytes POISON has in hexadecimal."""
    run, poison = module.ExpertStore.run, bytes.fromhex(os.environ["POISON"])

    def run_or_crash(self: Any, layer: int, hidden: Any, *pairs: Any) -> Any:
        if any(row.numpy().tobytes() == poison for row in hidden):
            os._exit(1)
        return run(self, layer, hidden, *pairs)

    module.ExpertStore.run = run_or_crash


def weights_go_bad(module: ModuleType) -> None:
    """From a shard's 20th call on, the first expert it computes gives values that are no numbers, until reloaded."""
    run, reload = module.ExpertStore.run, module.ExpertStore.reload
    calls, bad = 0, set[tuple[int, int]]()

    def run_with_bad(self: Any, layer: int, hidden: Any, pair_rows: Any, pair_experts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            bad.add((layer, int(pair_experts[0])))
        rows = run(self, layer, hidden, pair_rows, pair_experts)
        for bad_layer, expert in bad:
            if bad_layer == layer:
                rows[pair_experts == expert] = float("nan")
        return rows

    def mend(self: Any, layer: int, expert: int) -> None:
        bad.discard((layer, expert))
        reload(self, layer, expert)

    module.ExpertStore.run, module.ExpertStore.reload = run_with_bad, mend


def answers_late_twice_and_overtaken(module: ModuleType) -> None:
    """Some answers of a shard come twice, some late, after those to later calls or after a hedged call's; what was done
    is a line each in the file DISORDER."""
    import random
    import threading

    serve, chance = module.ExpertService._serve, random.Random(os.getpid())
    log = os.open(os.environ["DISORDER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Disorderly:
        """A link to which answers are given in no good order."""

        def __init__(self, link: Any) -> None:
            self._link = link

        def __getattr__(self, name: str) -> Any:
            return getattr(self._link, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self._link.close()

        def send(self, frame: Any) -> None:
            kind = chance.choices(["in order", "twice", "late", "very late"], [80, 10, 9, 1])[0]
            os.write(log, f"{kind}\n".encode())
            if kind in ("in order", "twice"):
                for _ in range(1 + (kind == "twice")):
                    self._link.send(frame)
                return
            frame.payload = bytes(frame.payload)
            delay = chance.uniform(0, 0.05) if kind == "late" else chance.uniform(0.3, 1)
            threading.Timer(delay, self._send_late, [frame]).start()

        def _send_late(self, frame: Any) -> None:
            try:
                self._link.send(frame)
            except module.LinkError:
                os.write(log, b"too late\n")

    module.ExpertService._serve = lambda self, link: serve(self, Disorderly(link))


_MUTANTS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "retry": ("deepseek_ray.actors.request_session", retry_without_deduplication),
    "combine": ("deepseek_ray.actors.expert_client", combine_in_arrival_order),
    "poison": ("deepseek_ray.models.expert_store", crash_over_one_row),
    "disorder": ("deepseek_ray.actors.expert_service", answers_late_twice_and_overtaken),
    "bad": ("deepseek_ray.models.expert_store", weights_go_bad),
    "shard": ("deepseek_ray.models.expert_store", answer_for_an_expert_that_is_not_held),
}


class _Mutating(importlib.abc.MetaPathFinder):
    """Changes one module right after it was imported."""

    def __init__(self, name: str, mutate: Callable[[ModuleType], None]) -> None:
        self._name, self._mutate = name, mutate

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_mutate(module: ModuleType) -> None:
            execute(module)
            self._mutate(module)

        spec.loader.exec_module = execute_and_mutate  # type: ignore[method-assign]
        return spec


if chosen := os.environ.get("MUTANT"):
    sys.meta_path.insert(0, _Mutating(*_MUTANTS[chosen]))
