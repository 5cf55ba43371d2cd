"""PyTorch weights to ours and back: one table per source, one engine."""
