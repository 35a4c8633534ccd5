"""Remove, add or measure a linear direction in an open-weight model, and prove what was written.

Every command of the ``abliterate`` command line is a function of the same name here: ``abliterate.plan(...)``,
``abliterate.run(...)`` and so on (``import`` is ``import_gguf``), returning values and printing
nothing.  They are loaded when first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

from abliterate.version import __version__ as __version__

if TYPE_CHECKING:
    from abliterate.api import HealingOptions as HealingOptions
    from abliterate.api import Recipe as Recipe
    from abliterate.api import apply_patch as apply_patch
    from abliterate.api import ask_words as ask_words
    from abliterate.api import audit as audit
    from abliterate.api import categories as categories
    from abliterate.api import chat as chat
    from abliterate.api import compare as compare
    from abliterate.api import dequantize as dequantize
    from abliterate.api import diff as diff
    from abliterate.api import edit as edit
    from abliterate.api import eval as eval
    from abliterate.api import export_control_vector as export_control_vector
    from abliterate.api import export_lora as export_lora
    from abliterate.api import export_patch as export_patch
    from abliterate.api import export_projection as export_projection
    from abliterate.api import harden as harden
    from abliterate.api import heal as heal
    from abliterate.api import import_gguf as import_gguf
    from abliterate.api import inspect as inspect
    from abliterate.api import load_recipe as load_recipe
    from abliterate.api import measure as measure
    from abliterate.api import open_session as open_session
    from abliterate.api import plan as plan
    from abliterate.api import push as push
    from abliterate.api import reply as reply
    from abliterate.api import reproduce as reproduce
    from abliterate.api import revert_patch as revert_patch
    from abliterate.api import run as run
    from abliterate.api import select as select
    from abliterate.api import stream as stream
    from abliterate.api import verify as verify

_API = (
    "HealingOptions",
    "Recipe",
    "apply_patch",
    "ask_words",
    "audit",
    "categories",
    "chat",
    "compare",
    "dequantize",
    "diff",
    "edit",
    "eval",
    "export_control_vector",
    "export_lora",
    "export_patch",
    "export_projection",
    "harden",
    "heal",
    "import_gguf",
    "inspect",
    "load_recipe",
    "measure",
    "open_session",
    "plan",
    "push",
    "reply",
    "reproduce",
    "revert_patch",
    "run",
    "select",
    "stream",
    "verify",
)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the interface offers
    if name not in _API:
        raise AttributeError(f"module 'abliterate' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("abliterate.api"), name)
