"""Where arrays live: `mesh.py` makes the mesh, `rules.py` lays parameters over it, `points.py`
activations."""
