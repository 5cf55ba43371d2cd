"""TFDS builders, one per data set; `schema.py` holds the example that all of them make."""
