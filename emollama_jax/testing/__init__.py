"""For tests of code that uses this package: a model and data that take milliseconds.

    from emollama_jax import fit
    from emollama_jax.testing.toy_model import Toy, ToyData, toy_config

    def test_my_callback(tmp_path):
        result = fit(toy_config(steps=4), tmp_path, build=Toy, data=ToyData)
        assert result.step == 4

- `toy_model`: a model of EmoLlama's shape, its batches, and a config for both.
- `toy_sets`: pictures and clips with face priors in memory, which the real pipeline reads.

The package's own tests use them.
"""
