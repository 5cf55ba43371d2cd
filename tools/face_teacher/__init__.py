"""Labels of real faces from face-api's networks: where each begins.

`package` reads the npm package, `networks` is its two networks in JAX, `label` runs them over a
prepared set and writes what `emollama_jax.data.taught` reads.
"""
