"""Asking models that are not ours: clients, a journal that survives a kill, limits, prices."""
