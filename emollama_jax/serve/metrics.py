"""What the server counts, for Prometheus, by the names that vLLM gave them where they fit.

`vllm:num_requests_running` is `emollama:num_requests_running` here, and so on: a dashboard needs
one replacement. Each server has a registry of its own.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from emollama_jax.serve.requests import Figures

PREFIX = "emollama:"
CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """The counters of one server."""

    def __init__(self, model: str, figures: Callable[[], Figures], restarts: Callable[[], int]):
        """Makes them.

        Args:
            model: value of the label `model_name`.
            figures: the engine's counts.
            restarts: decoding workers that were replaced.
        """
        self.registry = CollectorRegistry()
        self.registry.register(_Figures(model, figures, restarts))
        self._model = model
        self._finished = self._counter("request_success", "Answers", "finished_reason")
        self._refused = self._counter("request_refused", "Requests refused or failed", "status")
        self._first = self._histogram("time_to_first_token_seconds", _SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", _SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", _BETWEEN)
        self._prompt = self._histogram("request_prompt_tokens", _TOKENS)
        self._generated = self._histogram("request_generation_tokens", _TOKENS)
        self._decoding = self._histogram("media_decode_seconds", _SECONDS)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", label], registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ")
        family = Histogram(
            PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return family.labels(self._model)

    def finished(self, reason: str, *, prompt: int, generated: int) -> None:
        """Counts an answer and its tokens."""
        self._finished.labels(self._model, reason).inc()
        self._prompt.observe(prompt)
        self._generated.observe(generated)

    def refused(self, status: int) -> None:
        """Counts a request that ended with an error."""
        self._refused.labels(self._model, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """Counts the time from a request's arrival to its answer's first piece."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Counts the time between two pieces of an answer."""
        self._between.observe(seconds)

    def whole(self, seconds: float) -> None:
        """Counts the time from a request's arrival to its end."""
        self._whole.observe(seconds)

    def decode(self, seconds: float) -> None:
        """Counts the time for one medium, waiting for a worker included."""
        self._decoding.observe(seconds)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _Figures:
    """The engine's counts, read when Prometheus asks."""

    def __init__(self, model: str, figures: Callable[[], Figures], restarts: Callable[[], int]):
        self._model, self._figures, self._restarts = model, figures, restarts

    def collect(self) -> Iterator[Metric]:
        """The families; prometheus_client's interface."""
        now = self._figures()
        gauges = {
            "num_requests_running": ("Requests in a slot", now.running),
            "num_requests_waiting": ("Requests in the queue", now.waiting),
            "slots": ("Slots of the cache", now.slots),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts", now.prompt_tokens),
            "prompt_tokens_cached": (
                "Tokens of prompts kept from a turn before",
                now.cached_tokens,
            ),
            "generation_tokens": ("Tokens of answers", now.generation_tokens),
            "mm_cache_hits": ("Media whose towers' output was kept", now.tower_hits),
            "mm_cache_queries": ("Media looked up there", now.tower_hits + now.tower_misses),
            "compilations": ("Programs compiled since the port opened", now.compilations),
            "decoder_restarts": ("Decoding workers replaced", self._restarts()),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
