"""The verb `emollama serve`."""

import dataclasses
import os
from typing import Annotated

import tyro

from emollama_jax.cli_words import FLAT, new_console
from emollama_jax.errors import UserError
from emollama_jax.preflight import at_least
from emollama_jax.runs import PACKAGE, find
from emollama_jax.serve.limits import Limits

KEY = "EMOLLAMA_API_KEY"
LIMITS = Limits()
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Where to serve, and for whom."""

    host: str = "127.0.0.1"
    """address to bind to; 0.0.0.0 for all of this machine."""
    port: int = 8000
    """port; 0 for any free one."""
    slots: int = 8
    """requests that are answered at one time."""
    name: str | None = None
    """name of the model for clients; the run's by default."""
    media_hosts: tuple[str, ...] = ()
    """hosts that media may be fetched from, e.g. images.example.org; by default none: requests
    bring their media along."""
    hosts: tuple[str, ...] = ()
    """names in the header Host that are answered; by default any, and on 127.0.0.1 only this
    machine's own."""


OPTIONS = ServeOptions()


def serve(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = PACKAGE,
    options: Annotated[ServeOptions, FLAT] = OPTIONS,
    limits: Annotated[Limits, FLAT] = LIMITS,
) -> None:
    """Serves a page for people and an OpenAI-compatible endpoint for programs (docs/serving.md).

    Every program is compiled before the port opens; then no request compiles. SIGTERM and Ctrl-C
    let running requests finish. With EMOLLAMA_API_KEY in the environment, requests must bring that
    key.

    Args:
        run: trained run; the run that ships with the package by default.
        options: address, slots, name.
        limits: bounds on requests and media.
    """
    at_least(0, port=options.port)
    at_least(1, slots=options.slots)
    limits.check()
    if options.port > 65_535:
        raise UserError(f"--port is {options.port}, wanted at most 65535")
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise UserError(f"{KEY} is empty: unset it, or set it to a key")
    find(run)
    from emollama_jax.serve import command
    from emollama_jax.tiny.actionfaces.examples import drawn_faces

    hosts = options.hosts or (LOOPBACK if options.host in LOOPBACK else ())
    command.serve(
        command.Wish(
            run=run,
            host=options.host,
            port=options.port,
            slots=options.slots,
            name=options.name,
            media_hosts=options.media_hosts,
            hosts=tuple(name.lower() for name in hosts),
            key=key,
            limits=limits,
        ),
        draw_examples=drawn_faces,
        console=new_console(),
    )
