"""The face through a clip, its crop, and what the face networks know of it before training."""
