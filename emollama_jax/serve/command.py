"""`emollama serve`: the run's engine, its application, and the log of a server."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from emollama_jax import compile_cache
from emollama_jax.runs import PACKAGE
from emollama_jax.serve.limits import Limits
from emollama_jax.status import Bars

if TYPE_CHECKING:  # they import JAX
    from emollama_jax.config import Config
    from emollama_jax.serve.app import Settings

Drawn = Iterable[tuple[str, bytes]]  # titles and JPEG files


@dataclasses.dataclass(frozen=True)
class Wish:
    """The request of the command line, checked."""

    run: str
    host: str
    port: int
    slots: int
    name: str | None  # of the model; None: the run's
    media_hosts: tuple[str, ...]
    hosts: tuple[str, ...]
    key: str | None
    limits: Limits


def serve(wish: Wish, *, draw_examples: Callable[[], Drawn], console: Console) -> None:
    """Loads, compiles, opens the port, and serves until a signal.

    Args:
        wish: request of the user.
        draw_examples: pictures to try on the page.
        console: terminal for progress.

    Raises:
        UserError: a run that cannot be loaded, a port that cannot be opened.
    """
    from emollama_jax.serve import server
    from emollama_jax.serve.app import App
    from emollama_jax.serve.engine import load_engine
    from emollama_jax.serve.requests import EngineSizes

    bound = server.bind(wish.host, wish.port)  # before the model is loaded, which takes a while
    compile_cache.start()
    server.log_lines()
    with Bars(console) as bars:
        engine = load_engine(wish.run, EngineSizes(slots=wish.slots, waiting=wish.limits.queue))
        move = bars.bar("compiling")
        engine.open(lambda what, done, total: move(done, total))
    try:
        app = App(engine, settings_of(wish, engine.cfg, draw_examples()))
        server.run(app, bound, ready=_say_ready)
    finally:
        engine.close()


def settings_of(wish: Wish, cfg: "Config", drawn: Drawn) -> "Settings":
    """What the application is started with.

    Args:
        wish: request of the user.
        cfg: config of the run.
        drawn: pictures to try on the page.
    """
    from emollama_jax.data.split import space_of
    from emollama_jax.serve.app import Settings
    from emollama_jax.serve.page import Example

    sources = [source.name for source in cfg.data.sources]
    return Settings(
        name=wish.name or ("emollama" if wish.run == PACKAGE else cfg.name),
        classes=tuple(space_of(cfg.data.dir, sources[0]).classes),
        limits=wish.limits,
        key=wish.key,
        media_hosts=wish.media_hosts,
        hosts=wish.hosts,
        examples=tuple(Example(title, jpeg) for title, jpeg in drawn),
        trained_on=tuple(dict.fromkeys(sources)),
        measured=wish.run == PACKAGE,
    )


def _say_ready(address: str) -> None:
    print(f"serving on {address}", flush=True)
