"""Overrides `key=value` of a config's plain tree; values are read as YAML."""

from typing import Any

from emollama_jax import config_fields, yaml_file
from emollama_jax.errors import UserError


def brief(text: str) -> str:
    """What a message shows of a text."""
    return text if len(text) <= 120 else f"{text[:60]}…"


def apply(tree: dict[str, Any], override: str, root: Any) -> None:
    """Puts the value of one override where its key says.

    Args:
        tree: tree of the whole config; changed in place.
        override: "key=value".
        root: the class of the whole config.

    Raises:
        UserError: not of that form, or in no section.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override}: an override is key=value, e.g. train.steps=200")
    name = brief(override)
    *parents, leaf = names = key.split(".")
    if "" in names:
        raise UserError(f"{name}: an override is key=value, e.g. train.steps=200")
    node: Any = tree
    for place, part in enumerate(parents):
        if part not in node:
            hint = config_fields.did_you_mean(parents[: place + 1], root)
            raise UserError(f"{name}: no section {part!r} in the config{hint}")
        node = node[part]
        if not isinstance(node, dict):
            section = ".".join(parents[: place + 1])
            raise UserError(f"{name}: {section} is not a section; set the whole value")
    node[leaf] = yaml_file.parse(value, name=name)
