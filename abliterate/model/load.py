"""Loading a checkpoint to run it, and finding the places where writers meet the residual stream."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abliterate.arch.model_map import DRAFTS
from abliterate.arch.packed import quantisation, text_config
from abliterate.arch.registry import family_of
from abliterate.arch.spec import Family, WriterSpec, kind_of
from abliterate.checkpoint.source import Checkpoint, read_json
from abliterate.errors import CheckpointError, UnsupportedFormatError, UsageError
from abliterate.events import Finished, Noted, OnEvent, Started, ignore
from abliterate.method.places import Kind
from abliterate.model.devices import Device, resolve_device, slowness
from abliterate.model.memory import MemoryPlan, check_runs_offloaded, plan_memory, sizes_of, working_bytes
from abliterate.model.offload import Offloaded
from abliterate.model.parallel import load_parallel
from abliterate.model.rendering import settle_template
from abliterate.model.sentencepiece import check_sentencepiece
from abliterate.model.stored import is_decodable, stored_tensors, without_data
from abliterate.model.units import hold

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A model ready to run.

    ``blocks`` are the decoder layers in order.  ``embedding`` and ``sites[l]`` are the modules whose outputs are added
    to the residual stream, before and in block ``l``: the writers, or the norms behind them; ``kinds[l]`` are the kinds
    of these places.  ``other_embeddings`` are added to the embedding (positions); its output is multiplied by
    ``embedding_factor`` first.  ``offload`` is set where the weights stay on disk; where they do not, ``room_bytes`` of
    the memory allowed are left beside them.
    """

    name: str
    model: Any
    tokenizer: Any
    blocks: tuple[nn.Module, ...]
    embedding: nn.Module
    sites: tuple[tuple[nn.Module, ...], ...]
    d_model: int
    kinds: tuple[tuple[Kind, ...], ...] = ()
    other_embeddings: tuple[nn.Module, ...] = ()
    embedding_factor: float = 1.0
    offload: Offloaded | None = None
    room_bytes: int | None = None

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        return self.offload.device if self.offload else self.embedding.weight.device  # type: ignore[return-value]


def load_model(
    checkpoint: Checkpoint,
    *,
    device: Device = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_bytes: int | None = None,
    device_bytes: int | None = None,
    tensor_parallel: bool = False,
    on_event: OnEvent = ignore,
) -> LoadedModel:
    """Load ``checkpoint`` (whose files must be local) with its tokenizer.

    ``device`` "auto" takes CUDA, then MPS, then the CPU; on several GPUs, or when the model exceeds one, accelerate
    spreads it.  ``dtype`` "auto" is the stored dtype on an accelerator and float32 on the CPU, where it is both
    faster and closer to the maths.  With ``memory_bytes``, a model whose weights need more stays on disk and is read
    block by block (see ``offload`` and ``lockstep``).  On GPUs it is their memory that counts: what is free, and of
    each at most ``device_bytes``.  FP8 and MXFP4 are decoded to the dtype as they are read (see ``stored``), there and
    on the CPU; held by an accelerator, they are what transformers makes of them.  With ``tensor_parallel`` this process
    holds its part of the model (see ``parallel``), and no memory budget is looked at.

    Raises:
        CheckpointError: transformers cannot load the checkpoint.
        UsageError: the device does not exist, the memory is too small for one block, the model needs remote code and
            that is not allowed, or the processes cannot hold it together.
        UnsupportedFormatError: a model quantised in a way that is not known here does not fit into the memory, or is
            one that transformers does not know either.
    """
    family = family_of(checkpoint.config, where=checkpoint.name)
    place = resolve_device(device)
    wanted = _dtype(dtype, place)
    decoded = place.type == "cpu" and is_decodable(checkpoint)
    rooms = _rooms(device, place, device_bytes)
    where = Placement() if tensor_parallel else _placement(checkpoint, family, wanted, rooms, memory_bytes, on_event)
    budget = where.budget_bytes
    if said := slowness(place, wanted):
        on_event(Noted(text=said))
    if budget is None and not decoded:
        _check_known_method(checkpoint)
    task = f"load {checkpoint.name}"
    if budget is None:
        on_event(Started(task=task, total=checkpoint.size_bytes, unit="bytes"))
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with explained(checkpoint):
        tokenizer = load_tokenizer(checkpoint.folder, **options)
        if tensor_parallel:
            model = load_parallel(checkpoint, device, _auto_class(checkpoint), wanted, **options)
        elif budget is None and not decoded:
            model = _held(checkpoint, wanted, place, where, **options)
        else:
            model = empty_model(checkpoint, wanted, **options)
    model.eval()
    loaded = attach(model, tokenizer, family, name=checkpoint.name)
    if budget is None:
        if decoded:
            hold(model, checkpoint, loaded.blocks, device=place)
        on_event(Finished(task=task))
        return replace(loaded, room_bytes=where.room_bytes)
    weights = Offloaded(model, checkpoint, loaded.blocks, device=place, memory_bytes=budget, on_event=on_event)
    return replace(loaded, offload=weights)


def _check_known_method(checkpoint: Checkpoint) -> None:
    """Check that transformers knows how the weights are quantised: otherwise it would leave out their scales.

    Raises:
        UnsupportedFormatError: it does not.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    method = (quantisation(checkpoint.config) or {}).get("quant_method")
    if method is not None and method not in AUTO_QUANTIZER_MAPPING:
        raise UnsupportedFormatError(
            f"{checkpoint.name}: transformers does not know weights quantised by {method}",
            "run it with --device cpu, or write it as bfloat16 first: abliterate dequantize MODEL --out FOLDER",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where weights go.

    With ``budget_bytes`` they pass through so much memory, out of core.  Else the model is held where ``device_map``
    and ``max_memory`` of transformers say; ``room_bytes`` are left beside it (None: whatever is free).
    """

    device_map: str | dict[str, Any] | None = None
    max_memory: dict[int, int] | None = None
    room_bytes: int | None = None
    budget_bytes: int | None = None


def _held(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str,
    place: torch.device,
    where: Placement,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """The model as transformers loads it, held ``where`` is said."""
    widened = place.type == "cpu" and quantisation(checkpoint.config) is not None
    at = {"": place} if place.type == "mps" else where.device_map
    options |= {"device_map": at, "max_memory": where.max_memory, "use_safetensors": True}
    model = _auto_class(checkpoint).from_pretrained(checkpoint.folder, dtype="auto" if widened else dtype, **options)
    if widened and isinstance(dtype, torch.dtype):
        model.to(dtype)  # transformers dequantises to bfloat16 and leaves it at that
    return model


def _rooms(device: Device, place: torch.device, device_bytes: int | None) -> dict[int, int]:
    """Bytes that may be used of each GPU, by its number; of the one asked for or, with "auto", of all."""
    if place.type != "cuda":
        return {}
    every = device == "auto" and place.index is None  # else a process beside it takes another
    numbers = range(torch.cuda.device_count()) if every else [place.index or 0]
    free = {number: free_on_gpu(number) for number in numbers}
    return {number: size if device_bytes is None else min(size, device_bytes) for number, size in free.items()}


def free_on_gpu(number: int) -> int:
    """Bytes that can be had of a GPU, those included that torch keeps for what it will need."""
    kept = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    return torch.cuda.mem_get_info(number)[0] + kept


def _placement(
    checkpoint: Checkpoint,
    family: Family,
    dtype: torch.dtype | str,
    rooms: dict[int, int],
    memory_bytes: int | None,
    on_event: OnEvent,
) -> Placement:
    """Decide where the weights go; ``rooms`` are the bytes that may be used of each GPU, by number.

    The model is held by the host where there is no GPU, by the first GPU that it fits into, or by several.  Where it
    fits nowhere it runs out of core, and the first GPU computes.
    """
    if memory_bytes is None:
        number = next(iter(rooms), None)
        return Placement(device_map="auto" if len(rooms) > 1 else None if number is None else {"": number})

    def planned(room: int | None) -> MemoryPlan:
        return plan_memory(checkpoint, family, dtype=dtype, memory_bytes=memory_bytes, device_bytes=room)

    if not rooms and (plan := planned(None)).mode == "held":
        return Placement(room_bytes=memory_bytes - plan.held_bytes)
    for number, room in rooms.items():
        if (plan := planned(room)).mode == "held":
            return Placement(device_map={"": number}, room_bytes=room - plan.held_bytes)
    if len(rooms) > 1:
        # One GPU after the other is filled, and the last block that does not fit leaves a gap.
        gap = sizes_of(checkpoint, family, dtype=dtype)[0].passing_bytes(prefetch=False)
        usable = {number: room - working_bytes(room) for number, room in rooms.items() if room > 2 * gap}
        if planned(sum(usable.values()) - gap * len(usable)).mode == "held":
            left = min(working_bytes(rooms[number]) for number in usable)
            return Placement(device_map="sequential", max_memory=usable, room_bytes=left)
    plan = planned(next(iter(rooms.values()), None))
    check_runs_offloaded(checkpoint)
    on_event(Noted(text=plan.text))
    return Placement(budget_bytes=plan.budget_bytes)


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype | str, **options: Any) -> Any:  # noqa: ANN401
    """The model as ``from_pretrained`` makes it, with all parameters on the meta device.

    transformers is given the headers in place of the files: from these it would read part of the data even so.

    Raises:
        UnsupportedFormatError: a tensor is stored in a dtype that no parameter has, or quantised in a way not known
            here.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = checkpoint.folder
    config = AutoConfig.from_pretrained(folder, **options)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)  # what is quantised is decoded before it is a parameter
    trusted = {"trust_remote_code": options.get("trust_remote_code", False)}
    with torch.device("meta"):
        kind = type(_auto_class(checkpoint).from_config(config, **trusted))
    headers = {name: without_data(tensor) for name, tensor in stored_tensors(checkpoint).items()}
    model = kind.from_pretrained(None, config=config, state_dict=headers, dtype=dtype, device_map={"": "meta"})
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextmanager
def explained(checkpoint: Checkpoint) -> Iterator[None]:
    """What transformers raises while it loads, as our errors.

    Raises:
        UsageError: it needs code of its own.
        CheckpointError: anything else.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{checkpoint.name}: needs code from its own repository",
                "read that code, then allow it with --trust-remote-code",
            ) from error
        raise CheckpointError(
            f"{checkpoint.name}: transformers cannot load it ({first_line(error)})",
            "check the folder, and that the installed transformers knows this model",
        ) from error


def load_tokenizer(folder: Path, **options: Any) -> Any:  # noqa: ANN401 - a tokenizer of transformers
    """The tokenizer of a folder, of the class it declares, with its chat template.

    For some model types (``qwen2`` among them) transformers 5 ignores a declared ``TokenizersBackend`` and rebuilds the
    tokenizer as the released models have it, which misreads a ``tokenizer.json`` of another kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_sentencepiece(folder)
    path = folder / "tokenizer_config.json"
    declared = read_json(path).get("tokenizer_class") if path.is_file() else None
    kind = PreTrainedTokenizerFast if declared == "TokenizersBackend" else AutoTokenizer
    tokenizer = kind.from_pretrained(folder, **options)
    settle_template(tokenizer, folder)
    return tokenizer


def attach(model: Any, tokenizer: Any, family: Family, *, name: str) -> LoadedModel:  # noqa: ANN401 - transformers types
    """Find the blocks and the sites of ``model`` by the names of its registry entry.

    Raises:
        CheckpointError: the modules do not have the names of the registry entry.
    """
    per_layer = [
        spec for spec in family.writer if spec.per_layer and not spec.name.endswith("bias") and spec.role != DRAFTS
    ]
    stem = per_layer[0].name.split(".{layer}.")[0]
    embedding_spec = next(spec for spec in family.writer if spec.role == "embedding")
    positions = [spec for spec in family.writer if spec.role == "position embedding"]
    try:
        decoder = _decoder(model, stem)
        blocks = tuple(decoder.get_submodule(stem))  # type: ignore[arg-type] - a ModuleList
        found = [_sites_of(decoder, per_layer, layer) for layer in range(len(blocks))]
        embedding = decoder.get_submodule(embedding_spec.site_name)
        others = tuple(decoder.get_submodule(spec.site_name) for spec in positions)
    except AttributeError as error:
        raise CheckpointError(
            f"{name}: {error}", "the installed transformers names this model's modules differently"
        ) from error
    scale = family.scale_of_embedding(text_config(model.config.to_dict()))
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        blocks=blocks,
        embedding=embedding,
        sites=tuple(tuple(module for module, _ in sites.values()) for sites in found),
        kinds=tuple(tuple(kind for _, kind in sites.values()) for sites in found),
        other_embeddings=others,
        embedding_factor=1.0 if family.embedding_scales_itself else scale,
        d_model=int(embedding.weight.shape[1]),  # type: ignore[union-attr]
    )


def _decoder(model: Any, stem: str) -> nn.Module:  # noqa: ANN401 - transformers types
    """The module that holds the blocks; some wrappers give back themselves when asked for it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder if hasattr(decoder, stem) else decoder.get_submodule("model")


def _sites_of(decoder: nn.Module, specs: list[WriterSpec], layer: int) -> dict[str, tuple[nn.Module, Kind]]:
    """The modules of one block whose outputs are added to the stream, with the kind of the place, by their names.

    Of a slot there are those that this block has.
    """
    modules = dict(decoder.named_modules())
    found: dict[str, tuple[nn.Module, Kind]] = {}
    empty = {spec.slot for spec in specs if spec.slot}
    for spec in specs:
        name = spec.site_name.replace("{layer}", str(layer))
        if name in modules:
            if name not in found or _has(modules[name], spec):
                found[name] = (modules[name], kind_of(spec.role))
            empty.discard(spec.slot)
        elif not spec.slot and not spec.optional:
            raise AttributeError(f"has no module '{name}'")
    if empty:
        raise AttributeError(f"block {layer} has no module for its {', '.join(map(str, sorted(map(str, empty))))}")
    return found


def _has(site: nn.Module, spec: WriterSpec) -> bool:
    """Whether the writer of ``spec`` lies in ``site``: a site may be what any of several kinds of blocks add."""
    inside = spec.name.removeprefix(f"{spec.site_name}.")
    first = inside.split(".")[0]
    return inside != spec.name and first in {*dict(site.named_children()), *dict(site.named_parameters(recurse=False))}


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type when it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _dtype(dtype: str, place: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown", f"use auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _auto_class(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - an auto class of transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = "vision_config" in checkpoint.config
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def quiet_transformers() -> Callable[[], None]:
    """Silence the bars and advice of transformers, whose places our own progress takes; returns the undo."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def undo() -> None:
        logging.set_verbosity(before)
        logging.enable_progress_bar()

    return undo
