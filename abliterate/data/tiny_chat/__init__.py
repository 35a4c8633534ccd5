"""A tiny chat model that really refuses, the made-up world it knows and the prompts that go with it.

The folders below this package are data: ``model/`` is a Hugging Face model folder, ``prompts/`` holds JSONL files.
Both were made by ``python -m abliterate.data.tiny_chat.build``; ``world.py`` is the ground truth they were made from.
"""

from pathlib import Path


def model_path() -> Path:
    """Folder of the bundled Llama-architecture model, in the Hugging Face format."""
    return Path(__file__).parent / "model"


def prompts_path() -> Path:
    """Folder with ``{harmful,harmless}.{train,val,test}.jsonl``."""
    return Path(__file__).parent / "prompts"
