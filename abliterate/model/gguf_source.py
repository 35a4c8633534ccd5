"""A model held by a GGUF file, loaded by transformers with its weights as plain numbers, and saved as a checkpoint.

transformers dequantises in memory: all weights in the dtype asked for, the largest tensor three times in float32, and
while a header is read some kilobytes for each token of the vocabulary.  What it drops or makes up without a word (a
tensor without a place, a parameter without a tensor) is refused here.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoint.gguf import GgufFile, GgufTensor
from abliterate.errors import AbliterateError, CheckpointError, NonFiniteError, UnsupportedFormatError, UsageError
from abliterate.model.gguf_config import complete_config, readable_architectures
from abliterate.model.gguf_tokenizer import end_tokens, load_gguf_tokenizer
from abliterate.model.load import first_line, load_tokenizer, quiet_transformers

PLAIN = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64}
"""The types that are no quantisation, and their bits."""

SHARD_SIZE = "5GB"
BLOCK = re.compile(r"^blk\.(\d+)\.")
SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"
}  # fmt: skip
SAMPLE = "Hello  world, it's 12345!\n\n\tÜber 日本 ... <|x|> 'Twas\r\n"
"""Any text with what tokenizers differ in."""

INSTEAD = "start from its safetensors checkpoint, or from another GGUF of it"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedModel:
    """A model with its tokenizer, as transformers has them, and ``notes``: what was not taken over, in words."""

    model: Any
    tokenizer: Any
    notes: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write all files of a checkpoint but the card into ``folder``.

        Raises:
            CheckpointError: the tokenizer is another one when it is read again.
        """
        with _quiet():
            self.model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
            self.tokenizer.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files for their owner alone
        again = load_tokenizer(folder, local_files_only=True)
        same = again.get_vocab() == self.tokenizer.get_vocab()
        if not same or again(SAMPLE).input_ids != self.tokenizer(SAMPLE).input_ids:
            raise CheckpointError(f"{folder}: the tokenizer that was written reads text otherwise", INSTEAD)


def memory_bytes(file: GgufFile) -> int:
    """About what loading takes: all weights in 16 bits, and the largest tensor three times in float32."""
    counts = [tensor.numel for tensor in file.weights]
    return 2 * sum(counts) + 12 * max(counts)


def load_gguf(file: GgufFile, dtype: torch.dtype, *, on_tensor: Callable[[int], None]) -> ImportedModel:
    """Load ``file`` with its weights in ``dtype``; ``on_tensor`` hears the sizes in bytes of tensors that were read.

    Raises:
        UnsupportedFormatError: transformers cannot read it, or not all of it.
        CheckpointError: it holds what no model can have.
        NonFiniteError: a weight is NaN or infinite, or too large for ``dtype``.
        UsageError: it does not fit into memory.
    """
    check_architecture(file)
    blocks = file.metadata.get(f"{file.architecture}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks <= len(file.tensors):
        raise CheckpointError(f"{file.path}: states {blocks!r} blocks, with {len(file.tensors)} tensors", INSTEAD)
    with _quiet(), _explained(file):
        tokenizer, notes = load_gguf_tokenizer(file)
        config = _config(file)
        notes = (*notes, *complete_config(config, file))
        lost = _beyond(file, config)
        _check_all_there(file, config, lost)
        model = _model(file, config, dtype, on_tensor)
    _check_finite(file, model, dtype)
    _set_generation(file, model, tokenizer)
    if lost:
        blocks = len({tensor.name.split(".")[1] for tensor in lost})
        notes = (*notes, f"its {blocks} next-token blocks (MTP) were left out, as transformers leaves them out")
    return ImportedModel(model=model, tokenizer=tokenizer, notes=notes)


def check_architecture(file: GgufFile) -> None:
    """Check that transformers reads models of this kind from GGUF, with weights of these types.

    Raises:
        UnsupportedFormatError: it does not.
    """
    readable = readable_architectures()
    if file.architecture not in readable:
        raise UnsupportedFormatError(
            f"{file.path}: transformers cannot read the architecture '{file.architecture}' from GGUF",
            f"it reads {', '.join(readable)}; for others, start from the safetensors checkpoint",
        )
    known = {kind.name for kind in import_module("gguf.quants")._type_traits} | PLAIN.keys()
    unknown = sorted({tensor.kind for tensor in file.tensors} - known)
    if unknown:
        raise UnsupportedFormatError(
            f"{file.path}: the gguf library cannot dequantise {', '.join(unknown)}", "choose a file of another type"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    undo = quiet_transformers()
    try:
        yield
    finally:
        undo()


@contextmanager
def _explained(file: GgufFile) -> Iterator[None]:
    """What transformers and tokenizers (plain exceptions) raise on a file that says what no model can be."""
    try:
        yield
    except AbliterateError:
        raise
    except MemoryError as error:
        raise UsageError(f"{file.path}: does not fit into memory", "import it where there is more of it") from error
    except Exception as error:
        raise CheckpointError(f"{file.path}: transformers cannot load it ({first_line(error)})", INSTEAD) from error


def _config(file: GgufFile) -> Any:  # noqa: ANN401 - a configuration of transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.path.parent, gguf_file=str(file.path), local_files_only=True)
    vars(config).pop("_model_name_or_path", None)  # the name that the file states: no path, and no key of a config
    return config


def _model(file: GgufFile, config: Any, dtype: torch.dtype, on_tensor: Callable[[int], None]) -> Any:  # noqa: ANN401
    """Raises: UnsupportedFormatError: a parameter has no tensor, or one of another shape."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with _told(file, on_tensor):
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc] - with the loading info, a pair
            file.path.parent,
            gguf_file=str(file.path),  # whole: a file of that name in the current folder would come first
            config=config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and named below
            local_files_only=True,
        )
    made_up = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if made_up:
        raise UnsupportedFormatError(
            f"{file.path}: transformers finds nothing in it that fits '{made_up[0]}' and {len(made_up) - 1} others",
            INSTEAD,
        )
    model.hf_quantizer = None  # it is plain now, and can be saved
    model._weight_conversions = None  # with the names that its released checkpoints have, not as GGUF joins them
    for holder in (model, model.config):
        vars(holder).pop("is_quantized", None)
        vars(holder).pop("quantization_config", None)
    return model.eval()


@contextmanager
def _told(file: GgufFile, on_tensor: Callable[[int], None]) -> Iterator[None]:
    """Have our progress in place of the bar of transformers, which cannot be switched off."""
    module = import_module("transformers.modeling_gguf_pytorch_utils")
    sizes = {tensor.name: tensor.end - tensor.start for tensor in file.tensors}

    def tracked(tensors: Iterable[Any], desc: str) -> Iterator[Any]:  # noqa: ARG001 - its name for the bar
        for tensor in tensors:
            yield tensor
            on_tensor(sizes[tensor.name])

    bar, module.tqdm = module.tqdm, tracked  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.tqdm = bar  # type: ignore[attr-defined]


def _beyond(file: GgufFile, config: Any) -> list[GgufTensor]:  # noqa: ANN401 - a configuration
    """The tensors of the next-token blocks that the file says it has, behind the last decoder layer."""
    drafts = file.metadata.get(f"{file.architecture}.nextn_predict_layers", 0)
    behind = range(config.num_hidden_layers, config.num_hidden_layers + drafts)
    found = ((tensor, BLOCK.match(tensor.name)) for tensor in file.weights)
    return [tensor for tensor, block in found if block and int(block[1]) in behind]


def _check_all_there(file: GgufFile, config: Any, lost: list[GgufTensor]) -> None:  # noqa: ANN401 - a configuration
    """Check that the model of ``config`` has a place for every value of ``file`` but those of ``lost``, and no more.

    Raises:
        UnsupportedFormatError: transformers would drop some, or make some up.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    wanted = sum(tensor.numel for tensor in file.weights) - sum(tensor.numel for tensor in lost)
    if sum(held.values()) != wanted:
        raise UnsupportedFormatError(
            f"{file.path}: holds {wanted:,} values, {type(model).__name__} of transformers {sum(held.values()):,}",
            INSTEAD,
        )


def _check_finite(file: GgufFile, model: Any, dtype: torch.dtype) -> None:  # noqa: ANN401 - a model
    """Raises: NonFiniteError: a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            hint = "choose --as bfloat16" if dtype == torch.float16 else "the file is damaged: fetch it again"
            raise NonFiniteError(f"{file.path}: '{name}' holds NaN, or values too large for {dtype}", hint)


def _set_generation(file: GgufFile, model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - of transformers
    """How the model is meant to be asked: what ends a reply, and how to sample, where the file says so."""
    from transformers import GenerationConfig

    ends = end_tokens(file)
    found = {ours: file.metadata.get(f"general.sampling.{key}") for key, ours in SAMPLING.items()}
    stated = {name: value for name, value in found.items() if value is not None}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=bool(stated),
        **stated,
    )
