"""Training: against transformers, its strategies, and searches."""

from __future__ import annotations

from typing import Any

from benchmarks.results_file import measured_on


def training_section(result: dict[str, Any]) -> str:
    speeds = {row["system"]: row["tokens_per_second"] for row in result["rows"]}
    ratio = speeds["deepseek_ray"] / speeds["transformers"]
    lines = [
        "## Training against transformers",
        "",
        f"A model of {result['parameters'] / 1e6:.0f} M parameters ({result['active_parameters'] / 1e6:.0f} M active), "
        f"float32, {result['tokens_per_step']:,} tokens a step, one worker; the same trainer, weights and batches, the "
        f"two models in turns. {measured_on(result)}, {result['threads']} threads (`{result['file']}`). Over "
        f"{result['steps']} steps the losses differ by at most {result['max_loss_difference']:.1g} nats.",
        "",
        "| model code | tokens/s | against transformers |",
        "|---|---|---|",
        f"| transformers | {speeds['transformers']:.0f} | 1.00x |",
        f"| deepseek_ray | {speeds['deepseek_ray']:.0f} | {ratio:.2f}x |",
        "",
        *_profile(result),
        "",
    ]
    return "\n".join(lines)


def _profile(result: dict[str, Any]) -> list[str]:
    """Where the time of a step goes, and the least that its matrix products take."""
    by_system = {row["system"]: row["profile"] for row in result["rows"]}
    own, peer = by_system["deepseek_ray"], by_system["transformers"]
    flop, rate = result["product_flop_per_step"], result["product_flop_per_second"]
    return [
        "Where one step's time goes, milliseconds under torch's profiler, which slows many small operators the most. "
        f"The weights take part in {flop / 1e9:.0f} GFLOP of products a step, at least {flop / rate:.1f} s at the "
        f"{rate / 1e9:.0f} GFLOP/s of torch's best large product, measured in the same run: that bounds both.",
        "",
        "| part of the step | deepseek_ray | transformers |",
        "|---|---|---|",
        *(f"| {kind} | {own[kind]:.0f} | {peer[kind]:.0f} |" for kind in own),
    ]


def strategies_section(result: dict[str, Any]) -> str:
    """Loss, bytes and speed of each training strategy against one worker, or against ddp."""
    lines = [
        "## Training strategies on two gloo workers",
        "",
        f"{measured_on(result)}, one thread per worker, {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['steps']} steps in float32 (`{result['file']}`). One worker holds "
        f"{result['bytes_of_one_worker'] / 1e6:.1f} MB of weights, gradients and optimiser state. "
        "Losses differ by the order of sums alone. Bytes are those of the "
        "fuller worker.",
        "",
        "| strategy | largest loss difference, nats | MB per worker | tokens/s against ddp |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['max_loss_difference']:.1e} | {row['bytes_per_rank'] / 1e6:.1f} | "
        f"{row['tokens_per_second_to_ddp']:.2f}x |"
        for name, row in result["strategies"].items()
    ]
    return "\n".join([*lines, ""])


def tuning_section(result: dict[str, Any]) -> str:
    """The best trial of each sweep against the run file as it is, at equal training tokens."""
    lines = [
        "## What a sweep finds",
        "",
        f"`{result['config']}` as it is against the best of {result['trials']} trials of `{result['space']}`, "
        f"{result['tokens_per_trial']:,} training tokens each (`{result['file']}`). Validation loss in nats; the last "
        "two columns train both again from other weights on another order of the data, because the best of many trials "
        "owes a part of its lead to luck.",
        "",
        "| seed | default | best | default again | best again | trials finished / stopped early / failed |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['seed']} | {row['default']:.3f} | {row['best']:.3f} | {row['retrained_default']:.3f} | "
        f"{row['retrained_best']:.3f} | {row['finished']} / {row['stopped']} / {row['failed']} |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, ""])
