"""Where arrays live: `mesh.py` makes the mesh, `rules.py` maps logical axes onto it."""
