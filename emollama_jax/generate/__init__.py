"""Answering: a key-value cache, sampling, the decode loop with streaming, label scoring."""
