"""Whose config is it? A dataset may be code (`module:function`), and a config may come from a stranger.

Code runs only when the command line names it, or a config of the user's own. The config of a checkpoint, and a config
that comes from a URI, are not the user's own, and neither are their bases.
"""

from collections.abc import Sequence
from typing import Any

from hrm_lm.config import Layer, flatten, set_dotted
from hrm_lm.data.registry import is_function
from hrm_lm.errors import UserError


def refuse_strangers_code(used: dict[str, Any], layers: Sequence[Layer], overrides: dict[str, Any]) -> None:
    """Raises UserError where a dataset of the config `used` is code that neither `overrides` (dotted path -> value, from
    the command line) nor any of the user's own `layers` names."""
    given: dict[str, Any] = {}
    for dotted, value in overrides.items():
        set_dotted(given, dotted, value)
    named = [given, *(layer.values for layer in layers if layer.own)]
    allowed = {name for values in named for name in functions(values).values()}
    for dotted, name in functions(used).items():
        if name not in allowed:
            source = next(layer.source for layer in reversed(layers) if name in functions(layer.values).values())
            flag = f"--dataset {name}" if dotted == "data.dataset" else f"--set {dotted}={name}"
            raise UserError(
                f"{source}: {dotted} is code, {name}, and the config of a checkpoint or from a URI runs no code: "
                f"give {flag} to run it"
            )


def functions(values: dict[str, Any]) -> dict[str, str]:
    """The datasets of a config that are code: dotted path -> `module:function`."""
    return {
        dotted: name
        for dotted, name in flatten(values).items()
        if dotted.startswith("data.") and dotted.endswith("dataset") and isinstance(name, str) and is_function(name)
    }
