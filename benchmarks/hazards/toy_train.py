"""Trains the toy model as `emollama train` trains: seconds instead of minutes.

python -m benchmarks.hazards.toy_train OUT STEPS
"""

import sys

from emollama_jax import compile_cache
from emollama_jax.cli_words import new_console
from emollama_jax.dispatch import boundary


def main() -> None:
    """Runs or resumes the run in OUT."""
    out, steps = sys.argv[1:]
    compile_cache.start()
    from emollama_jax.testing.toy_model import Toy, ToyData, toy_config
    from emollama_jax.train.loop import fit

    result = fit(toy_config(steps=int(steps)), out, console=new_console(), build=Toy, data=ToyData)
    sys.exit(result.exit_status)


if __name__ == "__main__":
    with boundary(sys.argv[1:], program="toy_train"):
        main()
