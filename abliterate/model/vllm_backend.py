"""Replies by vLLM: the same token ids in, the same greedy tokens out, faster on a GPU.

vLLM is an extra and loads the weights itself, from the folder; it computes replies and nothing else.  Written against
the signatures of vLLM 0.33.0, and tried on a stand-in with these only.
"""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from abliterate.checkpoint.hub import fetch
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import CheckpointError, UsageError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.model.chat import ChatFormat
from abliterate.model.load import first_line

GENERATION = "generation_config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_vllm(*, dtype: str, controls: bool) -> None:
    """Check, before anything is loaded, that replies can come from vLLM.

    Raises:
        UsageError: it is not installed, or asked for what it does not do.
    """
    if find_spec("vllm") is None:
        raise UsageError("--backend vllm needs vLLM, which is not installed", "pip install 'abliterate[vllm]'")
    if controls:
        raise UsageError("--backend vllm cannot try controls, which are hooks", "leave out one of the two")
    if dtype not in DTYPES:
        raise UsageError(f"--backend vllm does not run in {dtype}", f"use one of {', '.join(DTYPES)}")


def replies_of(
    checkpoint: Checkpoint,
    prompts: Mapping[Any, tuple[ChatFormat, Sequence[str]]],
    *,
    name: str,
    max_new_tokens: int,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> dict[Any, tuple[str, ...]]:
    """Greedy replies to several lists of prompts, each with its chat format, by the same keys.

    The weights are loaded once for all and released at the end.  Replies end where ``generate`` ends them, with the
    same repetition penalty if the model has one.

    Raises:
        CheckpointError: vLLM cannot run the model.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout may be for JSON
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import GenerationConfig
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports] - an extra

    folder = fetch(checkpoint).folder
    own = GenerationConfig.from_pretrained(folder) if (folder / GENERATION).is_file() else GenerationConfig()
    ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else list(own.eos_token_id or ())
    params = SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=ends, detokenize=False,
        repetition_penalty=own.repetition_penalty or 1.0,
    )  # fmt: skip
    encoded = {key: [chat.encode(prompt) for prompt in texts] for key, (chat, texts) in prompts.items()}
    longest = max((len(ids) for rows in encoded.values() for ids in rows), default=1)
    found, task = {}, f"{name}: reply by vLLM"
    options = {
        "max_model_len": longest + max_new_tokens, "dtype": dtype, "trust_remote_code": trust_remote_code,
        "tensor_parallel_size": max(1, torch.cuda.device_count()),
    }  # fmt: skip
    try:
        with _engine(str(folder), options) as engine:
            on_event(Started(task=task, total=sum(map(len, encoded.values())), unit="prompts"))
            for key, rows in encoded.items():
                outputs = engine.generate([{"prompt_token_ids": ids} for ids in rows], params, use_tqdm=False)
                decode = prompts[key][0].tokenizer.decode
                tokens = [list(output.outputs[0].token_ids) for output in outputs]
                found[key] = tuple(str(decode(ids, skip_special_tokens=True)).strip() for ids in tokens)
                on_event(Advanced(task=task, amount=len(rows)))
            on_event(Finished(task=task))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: vLLM cannot run it ({first_line(error)})", "leave out --backend vllm"
        ) from error
    return found


@contextmanager
def _engine(folder: str, options: Mapping[str, Any]) -> Iterator[Any]:
    """An engine, and its memory given back: the next model needs it."""
    from vllm import LLM  # pyright: ignore[reportMissingImports] - an extra

    _free()
    engine = LLM(model=folder, tokenizer=folder, seed=0, **options)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        _free()


def _free() -> None:
    """Give back what models that are gone still hold of the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
