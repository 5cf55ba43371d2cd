"""YAML as configs are written in it: plain data, each key once, every fault one line.

A date stays the text that it is.
"""

from collections.abc import Hashable
from typing import Any

import yaml

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path

LARGEST = 2**18  # characters of a config; the longest here has 4,000
BRACKETS = 1000


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: keys that others override
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                lines = f"{seen[key].start_mark.line + 1} and {key_node.start_mark.line + 1}"
                raise UserError(f"key {key!r} is given twice, in lines {lines}: keep one of them")
            if isinstance(key, Hashable):
                seen[key] = key_node
        return super().construct_mapping(node, deep)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if ":" in node.value:  # YAML 1.1 reads 1:30 as 90
        raise ValueError(f"{node.value} is a number in base 60: write a plain one, or quote it")
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, *, name: str) -> Any:
    """The data in a YAML text.

    Args:
        text: text of a file, or of one value.
        name: name for messages.

    Raises:
        UserError: not YAML, a tag or a nesting that configs have no use for, a key given twice.
    """
    # PyYAML takes seconds for what no config has.
    if len(text) > LARGEST:
        raise UserError(f"{name}: {len(text):,} characters, wanted a config of at most {LARGEST:,}")
    if text.count("[") + text.count("{") > BRACKETS:
        raise UserError(f"{name}: not a config: more than {BRACKETS:,} brackets")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {_short(error)}") from None
    except RecursionError:
        raise UserError(f"{name}: not a config: nested too deeply") from None
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # !!int, !!float of text
        raise UserError(f"{name}: not YAML: {_short(error)}") from None


def _short(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    words = " ".join(str(problem or error).split())[:200]
    return f"{words} (line {mark.line + 1}, column {mark.column + 1})" if mark else words


def read(path: Any) -> Any:
    """The data in a YAML file.

    Raises:
        UserError: a folder, not readable, not UTF-8, or what `parse` refuses.
    """
    path = as_path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, wanted a .yaml file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): save it "
            "as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse(text, name=str(path))
