"""`deepseek-ray serve`: a model behind the OpenAI API, until a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig, SpeculativeConfig
from deepseek_ray.config.serving import IngressConfig

if TYPE_CHECKING:
    from deepseek_ray.serving.server import ModelServer

_CHECK_SECONDS = 2.0


def _default(name: str) -> Any:
    fields = {**DeploymentConfig.model_fields, **IngressConfig.model_fields}
    return fields[name].default


def serve(
    model_dir: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="Checkpoint in the Hugging Face layout, with its tokenizer files."),
    ],
    attention_workers: Annotated[int, typer.Option(help="Processes that own attention and KV cache.")] = _default(
        "attention_workers"
    ),
    expert_shards: Annotated[int, typer.Option(help="Processes that share the routed experts.")] = _default(
        "expert_shards"
    ),
    expert_replicas: Annotated[int, typer.Option(help="Expert shards that hold each expert.")] = _default(
        "expert_replicas"
    ),
    standby_shards: Annotated[
        int, typer.Option(help="Processes that wait to take the place of an expert shard that is lost.")
    ] = _default("standby_shards"),
    kv_copies: Annotated[
        bool, typer.Option("--kv-copies", help="Attention workers keep copies of each other's KV cache.")
    ] = _default("kv_copies"),
    prefix_caching: Annotated[
        bool, typer.Option(help="Compute what several prompts begin with only once.")
    ] = EngineConfig.model_fields["prefix_caching"].default,
    deterministic: Annotated[
        bool, typer.Option(help="The same output whatever the batch and the failures; off takes torch's operators.")
    ] = EngineConfig.model_fields["deterministic"].default,
    speculative: Annotated[
        str | None,
        typer.Option(
            help="Draft tokens and check several in one step: mtp (the model's multi-token-prediction layer) or ngram "
            "(what followed before). The output stays the same.",
            show_default="none",
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option(help="Most tokens drafted at once; 1 for mtp.")
    ] = SpeculativeConfig.model_fields["num_tokens"].default,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = _default("dtype"),
    quantization: Annotated[
        str | None,
        typer.Option(help="int8: experts and linear layers in half of bfloat16's memory.", show_default="none"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name clients use.", show_default="the directory's name")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the deployment on its cluster.")] = _default("name"),
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join.", show_default="RAY_ADDRESS, else a new local cluster")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Cores the whole engine may use.", show_default="all of them")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt + output in tokens.", show_default="the model's own")
    ] = None,
    kv_cache_bytes: Annotated[
        int | None, typer.Option(help="Bytes of KV cache of each attention worker.", show_default="as needed, <= 1 GiB")
    ] = None,
    max_replicas: Annotated[
        int, typer.Option(help="Most processes that answer HTTP; one runs, others follow the load.", min=1)
    ] = _default("max_replicas"),
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; repeat it for several. Others see it in `ps`: rather set "
            "DEEPSEEK_RAY_API_KEY or give a file.",
            show_default="none asked for",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the keys that clients may use, one a line.", show_default=False)
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="How long running requests may finish after a signal.", min=0)
    ] = 30.0,
) -> None:
    """Serve a model behind the OpenAI API.

    Prints [bold]ready http://HOST:PORT/v1[/bold] when it can generate. SIGTERM or Ctrl-C lets running requests finish
    and ends every process; a second one does not wait.

    [bold]Examples[/bold]

      deepseek-ray serve runs/quickstart/model\n
      deepseek-ray serve ./DeepSeek-V2-Lite-Chat --expert-shards 4 --served-model-name v2-lite\n
      deepseek-ray serve ./model --address 10.0.0.1:6379 --host 0.0.0.0 --name second --port 8001
    """
    config = DeploymentConfig.parse(
        {
            "name": name,
            "model_dir": str(model_dir.absolute()),
            "served_model_name": served_model_name,
            "dtype": dtype,
            "quantization": quantization,
            "attention_workers": attention_workers,
            "expert_shards": expert_shards,
            "expert_replicas": expert_replicas,
            "standby_shards": standby_shards,
            "kv_copies": kv_copies,
            "threads": threads,
            "engine": EngineConfig.parse(
                {
                    "max_model_len": max_model_len,
                    "kv_cache_bytes": kv_cache_bytes,
                    "prefix_caching": prefix_caching,
                    "deterministic": deterministic,
                    "speculative": speculative
                    and SpeculativeConfig.parse({"method": speculative, "num_tokens": num_speculative_tokens}, "serve"),
                },
                "serve",
            ),
        },
        "serve",
    )
    api = IngressConfig.parse({"max_replicas": max_replicas}, "serve")
    # What can be wrong is found before Ray is even imported.
    from deepseek_ray.serving.auth import ENVIRONMENT_VARIABLE, ApiKeys
    from deepseek_ray.serving.claim import ServerClaim
    from deepseek_ray.serving.model_dir import check_model_dir
    from deepseek_ray.serving.port import is_loopback

    keys = ApiKeys.of(api_key or (), api_key_file, os.environ)
    os.environ.pop(ENVIRONMENT_VARIABLE, None)  # every process of the cluster would inherit it
    check_model_dir(model_dir)
    claim = ServerClaim(name, host, port, address)
    if not keys and not is_loopback(host):
        _say(f"warning: {host} is reachable from other machines and the API asks for no key; set --api-key-file")
    from deepseek_ray.serving.server import ModelServer

    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout
        _run(ModelServer(config, claim, api, keys), drain_seconds, stdout)


def _run(server: ModelServer, drain_seconds: float, stdout: TextIO) -> None:
    signals = _Signals()
    signals.catch()
    try:
        _say("connecting to Ray")
        try:
            server.connect()
        except SystemExit:  # how ray.init's own handler answers SIGTERM
            raise _StopNowError from None
        signals.catch()  # once more: ray.init has installed handlers of its own
        server.start(_say)
        signals.may_wait = True
        print(f"ready {server.url}", file=stdout, flush=True)
        while not signals.received.wait(_CHECK_SECONDS):
            server.check()
        _say(f"stopping; running requests have {drain_seconds:g} s")
        server.stop(drain_seconds)
    except _StopNowError:
        _say("stopping at once")
    finally:
        server.stop()


class _StopNowError(BaseException):
    """A signal came while there was nothing to drain, or the second one came."""


class _Signals:
    """SIGTERM and SIGINT: the first one asks for an orderly end, the second one insists."""

    def __init__(self) -> None:
        self.received = threading.Event()
        self.may_wait = False
        """True once there are requests to drain."""

    def catch(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = not self.received.is_set()
        self.received.set()
        if not (is_first and self.may_wait):
            raise _StopNowError


def _say(text: str) -> None:
    """Progress goes to stderr: stdout holds the ready line alone."""
    print(f"deepseek-ray: {text}", file=sys.stderr, flush=True)
