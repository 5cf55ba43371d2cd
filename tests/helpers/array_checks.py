"""Checks array annotations while tests run: every jaxtyping annotation of the package holds.

Other annotations are left to the type checker, which reads them without running anything.
"""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np


def is_array(annotation: Any) -> bool:
    """Whether an annotation, or a part of it, is jaxtyping's; what is called is not looked into."""
    if typing.get_origin(annotation) is Callable:
        return False
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(is_array, typing.get_args(annotation)))


def any_array(annotation: Any) -> Any:
    """The annotation for NumPy's and JAX's arrays alike: tests give both."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return annotation.dtype[jax.Array | np.ndarray | np.generic, annotation.dim_str]
    if not is_array(annotation):
        return Any
    args = tuple(map(any_array, typing.get_args(annotation)))
    origin = typing.get_origin(annotation)
    return (
        functools.reduce(operator.or_, args)
        if origin in (typing.Union, types.UnionType)
        else origin[args]
    )


def check(function: Callable) -> Callable:
    """A function that checks its arrays' shapes and dtypes; without arrays, or a class, itself."""
    if inspect.isclass(function):
        return function
    named = getattr(function, "__annotations__", {})
    arrays = {name: any_array(type_) for name, type_ in named.items() if is_array(type_)}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return beartype.beartype(function)
