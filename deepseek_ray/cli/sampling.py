"""The sampling options that `chat` and `complete` share."""

from __future__ import annotations

from typing import Annotated

import typer

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.messages import SamplingParams

Target = Annotated[str, typer.Argument(metavar="MODEL_DIR|URL", help="A checkpoint directory, or a server's address.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Most tokens to generate.", show_default="as many as the context holds")
]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens that hold this much probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32, for a model directory.")]
Threads = Annotated[int | None, typer.Option(help="Cores to use, for a model directory.", show_default="all of them")]

DEFAULT_DTYPE: str = DeploymentConfig.model_fields["dtype"].default


def read_params(
    max_tokens: int | None, temperature: float, top_p: float, seed: int | None, stop: list[str] | None
) -> SamplingParams:
    """RequestError names what is out of range."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=list(stop) if stop else None
    )
    params.validate()
    return params
