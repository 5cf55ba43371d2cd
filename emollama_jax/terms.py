"""Words and numbers that every part of the package shares, in one place and without imports."""

from typing import Literal

Kind = Literal["image", "clip"]  # of an example
LANDMARKS = 68  # points of a face, in iBUG's order
