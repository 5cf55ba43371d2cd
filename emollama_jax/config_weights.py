"""What `weights` of a config names: the package's tiny towers, or folders of imported weights.

A list may hold one of the package's towers beside folders: `tiny:face` is its FaceXFormer.
"""

TOWERS = ("vision", "face", "llama")  # that the package carries
ONE = "tiny:"  # before the name of one of them

Weights = str | tuple[str, ...]


def checked(value: Weights) -> Weights:
    """The setting as it is.

    Raises:
        ValueError: neither a known word nor a list, or a list with an unknown tower.
    """
    if isinstance(value, str) and value not in ("tiny", "none"):
        raise ValueError(f"{value!r} is neither 'tiny' nor 'none' nor a list of folders")
    for entry in () if isinstance(value, str) else value:
        if entry.startswith(ONE) and entry.removeprefix(ONE) not in TOWERS:
            known = ", ".join(ONE + name for name in TOWERS)
            raise ValueError(f"{entry!r}: the package has no such tower (known: {known})")
    return value


def folders(value: Weights) -> tuple[str, ...]:
    """The folders of imported weights."""
    if isinstance(value, str):
        return ()
    return tuple(entry for entry in value if not entry.startswith(ONE))


def towers(value: Weights) -> tuple[str, ...]:
    """The towers that come with the package."""
    if isinstance(value, str):
        return TOWERS if value == "tiny" else ()
    return tuple(entry.removeprefix(ONE) for entry in value if entry.startswith(ONE))
