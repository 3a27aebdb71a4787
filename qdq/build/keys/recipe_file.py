"""The YAML file of a recipe: a mapping of plain values, not yet checked; what no memory holds is refused."""

from __future__ import annotations

from pathlib import Path

import yaml

from engines.core.files import read_file
from qdq.core.errors import InputError

MOST_BYTES, MOST_CHARACTERS = 1 << 20, 1000  # of a recipe, and of one value in it
MOST_VALUES = 10_000  # in a recipe, keys among them: PyYAML takes a tenth of a millisecond for each


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for more values than any memory holds."""

    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node; an alias is refused."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name); write the value out")
        self.values += 1
        if self.values > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES} values")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"a value has {len(node.value)} characters; at most {MOST_CHARACTERS} are taken")
        return node


def read_recipe(path: Path | str) -> dict[str, object]:
    """The keys of a recipe file, not yet checked.

    Raises:
        InputError: the file is unreadable, no YAML, or no mapping.
    """
    try:
        text = read_file(path)
        if len(text) > MOST_BYTES:
            raise InputError(f"The recipe {path} has {len(text)} bytes; a recipe has at most {MOST_BYTES}.")
        values = yaml.load(text.decode(), _PlainLoader)
    except OSError as error:
        raise InputError(f"Cannot read the recipe {path}: {error.strerror or error}. Check the path.") from error
    except RecursionError:
        raise InputError(f"The recipe {path} is nested too deeply; a recipe holds texts, numbers and lists.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        # what PyYAML's resolvers raise for a date or a number that is none has no base of its own
        raise InputError(f"The recipe {path} is not YAML: {' '.join(str(error).split())[:300]}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise InputError(f"The recipe {path} holds a {kind}; it needs lines such as 'scheme: int8', one per option.")
    return {str(key): value for key, value in values.items()}
