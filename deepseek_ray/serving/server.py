"""A served model from start to end, owned by this process: what `deepseek-ray serve` runs."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator

import httpx
import ray
from ray import serve
from ray.serve.context import _get_global_client

from deepseek_ray.actors.cluster import Cluster, join_or_start
from deepseek_ray.actors.deployment import Deployment, start_deployment
from deepseek_ray.actors.record import read_record
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.config.serving import IngressConfig
from deepseek_ray.errors import DeploymentError
from deepseek_ray.serving.app import build_api_app
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.claim import ServerClaim
from deepseek_ray.serving.port import is_loopback, url_host

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_READY_TIMEOUT_SECONDS = 120.0
_ROUTE = "/"


class ModelServer:
    """Cluster, deployment and HTTP API of one model. Every step undoes itself when a later one fails."""

    def __init__(
        self,
        config: DeploymentConfig,
        claim: ServerClaim,
        api: IngressConfig = IngressConfig(),
        keys: ApiKeys = ApiKeys(),
    ) -> None:
        """Starts nothing yet. `claim` is released by `stop` or when a step fails."""
        self._config = config
        self._api = api
        self._keys = keys
        self._claim = claim
        self._host, self._port = claim.host, claim.port
        self._application = f"deepseek-ray-{config.name}"
        self._deployment: Deployment | None = None
        self._undo = contextlib.ExitStack()
        self._undo.callback(claim.release)

    @property
    def url(self) -> str:
        return f"http://{url_host(self._host)}:{self._port}/v1"

    def connect(self) -> Cluster:
        """Join the cluster or start one. Ray sets its signal handlers here: the caller's own go in afterwards."""
        with self._undo_on_error():
            try:
                cluster = join_or_start(self._claim.address)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise DeploymentError(f"cannot join the Ray cluster at {self._claim.address}: {error}") from None
            self._undo.callback(cluster.leave)
            self._claim.publish(cluster.address, os.environ.get("RAY_AUTH_MODE", "disabled"))
        return cluster

    def start(self, say: Callable[[str], None]) -> None:
        """Start everything and return when an HTTP request would be answered with tokens. `say` is told of progress."""
        with self._undo_on_error():
            starts_serve = self._check_serve()
            if starts_serve:
                self._claim.reserve_port()
            say(f"starting {self._config.attention_workers} attention worker(s), {self._config.expert_shards} shard(s)")
            self._deployment = start_deployment(self._config, self._application, starts_serve)
            self._undo.callback(self._deployment.stop)
            say("starting the HTTP API")
            self._start_api(starts_serve)
            self._wait_ready()

    def check(self) -> None:
        """DeploymentError when the deployment is gone: somebody else ended it, or the cluster."""
        try:
            record = read_record(self._config.name)
        except Exception as error:
            raise DeploymentError(f"the Ray cluster does not answer any more ({error}); start again") from None
        if record is None:
            raise DeploymentError(f"the deployment {self._config.name!r} was ended by somebody else; start again")

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for at most `drain_seconds`, and end everything."""
        if self._deployment is not None and drain_seconds > 0:
            try:
                handle = serve.get_app_handle(self._application)
                handle.broadcast("drain", drain_seconds).results(timeout_s=drain_seconds + 5)
            except Exception as error:  # whatever is the matter with the ingress, the rest still has to go
                logger.warning("requests were not drained: %s", error)
        self._undo.close()

    def _check_serve(self) -> bool:
        """True when Ray Serve is not running here. DeploymentError when it runs in a way that excludes this server."""
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            return True
        running = client.http_config
        if (running.host, running.port) != (self._host, self._port):
            raise DeploymentError(
                f"Ray Serve already runs on this cluster at {running.host}:{running.port}, and its address is one for "
                f"the whole cluster; use --host {running.host} --port {running.port}, not {self._host}:{self._port}, "
                "or another cluster"
            )
        for name, details in client.get_serve_details()["applications"].items():
            if details.get("route_prefix") == _ROUTE and name != self._application:
                raise DeploymentError(
                    f"the Serve application {name!r} already answers at {running.host}:{running.port}; delete it, or "
                    "serve this model on another cluster"
                )
        return False

    def _start_api(self, starts_serve: bool) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it reports its own steps, which are ours here
        node_id = ray.get_runtime_context().get_node_id() if is_loopback(self._host) else None
        try:
            if starts_serve:
                serve.start(proxy_location="EveryNode", http_options={"host": self._host, "port": self._port})
            app = build_api_app(self._config, self._api, self._keys, node_id)
            serve.run(app, name=self._application, route_prefix=_ROUTE)
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise DeploymentError(f"the HTTP API cannot start: {error}") from None

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_SECONDS
        ready = self.url.removesuffix("/v1") + "/ready"
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(ready, timeout=5).status_code == 200:
                    return
            time.sleep(_POLL_SECONDS)
        raise DeploymentError(
            f"{ready} did not answer within {_READY_TIMEOUT_SECONDS:g} s; is {self._host} an address of this node?"
        )

    @contextlib.contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._undo.close()
            raise
