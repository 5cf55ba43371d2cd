"""Checks array annotations while tests run: every jaxtyping annotation of the package holds.

Other annotations are left to the type checker, which reads them without running anything.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping


def is_array(annotation: Any) -> bool:
    """Whether an annotation, or a part of it, is jaxtyping's."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(is_array, typing.get_args(annotation)))


def check(function: Callable) -> Callable:
    """A function that checks its arrays' shapes and dtypes; without arrays, or a class, itself."""
    if inspect.isclass(function):
        return function
    named = getattr(function, "__annotations__", {})
    arrays = {name: annotation for name, annotation in named.items() if is_array(annotation)}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return beartype.beartype(function)
