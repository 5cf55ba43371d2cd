"""Training: `step.py` is pure, `loop.py` is the run, `optimizer.py` and `metrics.py` serve them."""
