"""A Serve application that streams without a model: `python -m benchmarks.trivial_stream PORT`, until a signal.

Annotations are evaluated here: Serve ships this module's classes by value, and FastAPI must find what they name.
"""

import json
import sys
import threading
from collections.abc import Iterator

import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Trivial:
    """As many chunks as tokens are asked for, at once."""

    @app.get("/health")
    def health(self) -> str:
        return "ok"

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        wanted = (await request.json())["max_tokens"]

        def chunks() -> Iterator[str]:
            for _ in range(wanted):
                yield f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")


def main() -> None:
    ray.init(include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Trivial.bind())
    threading.Event().wait()


if __name__ == "__main__":
    main()
