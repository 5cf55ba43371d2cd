"""A Ray Serve application: replicas of `emollama serve` behind Ray's router (docs/serving.md).

    serve run deploy.ray_serve:app

Ray's ASGI integration (`serve.ingress`, Ray 2.60) runs our application as it is in each replica:
routes, streams, limits and metrics are the same as on one machine. Ray routes to the replica with
fewer requests in flight, starts replicas when many are, asks each for its health, and stops
replicas by letting their requests finish. A replica that was killed loses the requests that it had;
the others do not notice, and Ray starts another.

Environment: EMOLLAMA_RUN (the package's run by default), EMOLLAMA_SLOTS, EMOLLAMA_REPLICAS (the
largest number), EMOLLAMA_API_KEY, and EMOLLAMA_ENGINE, `module:function` of another engine.
"""

import importlib
import os

from ray import serve
from starlette.types import ASGIApp

from emollama_jax.runs import PACKAGE
from emollama_jax.serve.app import App
from emollama_jax.serve.command import Wish, settings_of
from emollama_jax.serve.limits import Limits
from emollama_jax.serve.requests import Engine, EngineSizes

SLOTS = int(os.environ.get("EMOLLAMA_SLOTS", "8"))
LIMITS = Limits()
AUTOSCALING = {
    "min_replicas": int(os.environ.get("EMOLLAMA_MIN_REPLICAS", "1")),
    "max_replicas": int(os.environ.get("EMOLLAMA_REPLICAS", "2")),
    # Running and waiting requests of a replica; above it another one starts.
    "target_ongoing_requests": SLOTS,
}


def load_engine() -> Engine:
    """The run's engine, with all programs compiled."""
    from emollama_jax import compile_cache
    from emollama_jax.serve import engine

    compile_cache.start()
    sizes = EngineSizes(slots=SLOTS, waiting=LIMITS.queue)
    loaded = engine.load_engine(os.environ.get("EMOLLAMA_RUN", PACKAGE), sizes)
    loaded.open(lambda what, done, total: None)
    return loaded


def new_engine() -> Engine:
    """The run's engine, or the one that EMOLLAMA_ENGINE names."""
    module, _, function = os.environ.get("EMOLLAMA_ENGINE", "").partition(":")
    return getattr(importlib.import_module(module), function)() if module else load_engine()


@serve.deployment(
    autoscaling_config=AUTOSCALING,
    max_ongoing_requests=SLOTS + LIMITS.queue,
    graceful_shutdown_timeout_s=LIMITS.grace,
    health_check_period_s=5,
    health_check_timeout_s=10,
)
@serve.ingress()
class Replica:
    """One engine and its decoding workers in a process of Ray's."""

    def __init__(self):
        """Loads the engine; Ray then asks for the application."""
        self.engine = new_engine()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray runs, its lifespan included."""
        wish = Wish(
            run=os.environ.get("EMOLLAMA_RUN", PACKAGE),
            host="",
            port=0,
            slots=SLOTS,
            name=None,
            media_hosts=(),
            hosts=(),
            key=os.environ.get("EMOLLAMA_API_KEY"),
            limits=LIMITS,
        )
        return App(self.engine, settings_of(wish, self.engine.cfg, ())).asgi

    def check_health(self) -> None:
        """What `/health` says; Ray replaces a replica that raises here."""
        if failure := self.engine.figures().failure:
            raise RuntimeError(failure)

    def __del__(self):
        """Ends the engine's threads."""
        if hasattr(self, "engine"):
            self.engine.close()


app = Replica.bind()
