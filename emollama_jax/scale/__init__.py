"""Plans for hardware that is not here: real compilation for TPU topologies, and what it tells."""
