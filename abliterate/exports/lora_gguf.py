"""The adapter as a GGUF file, for ``llama-cli --lora`` and ``llama-export-lora`` of llama.cpp.

Keys: ``general.type`` "adapter", ``adapter.type`` "lora", ``general.architecture`` that of the model (another one is
refused there) and ``adapter.lora.alpha``.  Tensors come in pairs, ``NAME.lora_a`` ``[k, n]`` and ``NAME.lora_b`` ``[d,
k]`` in torch's order, NAME being that of the weight; llama.cpp adds ``alpha / k`` times ``b a``, ``k`` being the last
axis of ``lora_b``.  ``alpha`` is one number for the whole file, so where ranks differ ``b`` takes up the rest.  Of
``token_embd.weight`` alone ``lora_a`` is transposed, ``[n, k]``: there rows are looked up.

A tied head is the same tensor there, under the same name, and would be multiplied by factors that are laid out to be
looked up, which do not fit: with a tied head the embedding is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.errors import PlanRefusedError
from abliterate.exports.factors import Factors
from abliterate.exports.gguf_file import check_writable, write_gguf
from abliterate.exports.llama_cpp import ARCHITECTURES, BY_CONFIG, changed, plain_name, tensor_names

WHAT = "an adapter of llama.cpp"
TOKENS = "token_embd.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufAdapter:
    """An adapter for llama.cpp.

    ``names`` are those of its weights, by ours; ``left_out`` says why of what PEFT can hold and this cannot.
    """

    file: Path
    architecture: str
    names: Mapping[str, str]
    left_out: Mapping[str, str]


def planned(plan: EditPlan, writers: Sequence[Writer], file: Path) -> GgufAdapter:
    """What a file will hold of ``writers``; nothing is written.

    Raises:
        UsageError: the ``gguf`` library is missing.
        OutputError: ``file`` exists.
        PlanRefusedError: llama.cpp has no such model, or nothing can be expressed.
    """
    check_writable(file, WHAT)
    model_type = plan.model_map.model_type
    architecture = ARCHITECTURES.get(model_type, "")
    known = tensor_names(architecture, plan.model_map.n_layers)
    if known is None or model_type in BY_CONFIG:
        why = "depends on its blocks" if model_type in BY_CONFIG else "is not known"
        raise PlanRefusedError(
            f"{plan.checkpoint.name}: what llama.cpp calls the architecture of a model of type '{model_type}' {why}",
            "leave --gguf out: the adapter itself can still be converted by llama.cpp's convert_lora_to_gguf.py",
        )
    names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for writer in writers:
        name = known.get_name(plain_name(writer.name), try_suffixes=(".weight",))
        why = "llama.cpp has no name for it" if name is None else changed(model_type, writer)
        if writer.role == "projector":
            why = "llama.cpp keeps the projector in a file of its own, which takes no adapter"
        if plan.model_map.tied and writer.role == "embedding":
            why = "llama.cpp would use the adapter of the embedding on its tied head as well, where it does not fit"
        if why or name is None:
            left_out[writer.name] = why
        else:
            names[writer.name] = name
    if not names:
        raise PlanRefusedError(
            f"{plan.checkpoint.name}: nothing can be expressed for llama.cpp ({next(iter(left_out.values()))})",
            "convert the edited checkpoint itself (convert_hf_to_gguf.py)",
        )
    return GgufAdapter(file=file, architecture=architecture, names=names, left_out=left_out)


def write(made: GgufAdapter, factors: Sequence[Factors], *, name: str) -> None:
    """Write what was planned.

    Raises:
        OutputError: the file exists by now, or cannot be written.
    """
    of_file = [one for one in factors if one.writer.name in made.names]
    alpha = max(one.rank for one in of_file)
    tensors: dict[str, Tensor] = {}
    for one in of_file:
        its = made.names[one.writer.name]
        tensors[f"{its}.lora_a"] = one.a.T if its == TOKENS else one.a
        tensors[f"{its}.lora_b"] = one.b * (one.rank / alpha)
    values = {
        "general.type": "adapter",
        "general.name": f"{name}, abliterated, as an adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_gguf(made.file, made.architecture, values, tensors, what=WHAT)
