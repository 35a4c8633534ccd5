"""The edit as a PEFT adapter of rank k, for what such an adapter can express.

``W' - W = -strength write (read^T W)`` is a product of two thin matrices: ``B = -strength write [d, k]`` and ``A =
read^T W [k, n]``, with ``alpha = k`` so that PEFT scales by 1.  It holds for linear layers, plain or behind a norm, and
for the token embedding.  Not for biases (an adapter has none), nor for experts (models keep them in one fused
parameter), nor for what is quantised or stored transposed: those are named, and while they keep writing the direction,
the adapter alone is not the whole edit.  The same factors can be written for llama.cpp beside it (``lora_gguf``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.output import fingerprint, prepare, write_json, write_text
from abliterate.errors import PlanRefusedError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.exports import lora_gguf
from abliterate.exports.factors import Factors, factors_of
from abliterate.exports.lora_gguf import GgufAdapter
from abliterate.method.weight_edit import WeightEdit
from abliterate.publishing import wording

TASK = "adapter"
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """An adapter that was written; ``left_out`` says of every writer it cannot express why.

    ``gguf`` is the same for llama.cpp, where it was asked for.
    """

    out: Path
    rank: int
    expressed: tuple[str, ...]
    left_out: Mapping[str, str]
    tied: bool
    size_bytes: int
    gguf: GgufAdapter | None = None

    @property
    def complete(self) -> bool:
        """Every writer is expressed: base and adapter together are the edit."""
        return not self.left_out


def export(plan: EditPlan, out: Path, *, gguf: Path | None = None, on_event: OnEvent = ignore) -> AdapterReport:
    """Write the adapter that the edits of ``plan`` come to, into ``out``, and for llama.cpp to the file ``gguf``.

    Raises:
        PlanRefusedError: nothing of the plan can be expressed, or llama.cpp has no such model.
        UsageError: the ``gguf`` library is missing.
        OutputError: ``out`` exists, or lies in the base; or ``gguf`` exists or cannot be written.
    """
    left_out = {
        writer.name: why for writer in plan.writers if (why := not_expressible(writer, plan.edits[writer.tensor.name]))
    }
    expressed = [writer for writer in plan.writers if writer.name not in left_out]
    if not expressed:
        raise PlanRefusedError(
            f"{plan.checkpoint.name}: no writer can be expressed by an adapter ({next(iter(left_out.values()))})",
            "edit the checkpoint itself, or export a patch",
        )
    beside = None if gguf is None else lora_gguf.planned(plan, expressed, gguf)
    known = fingerprint({"lora": plan.to_json(), **plan.checkpoint.identity()})
    output = prepare(out, source=plan.checkpoint.folder, fingerprint=known, needed_bytes=0)
    on_event(Started(task=TASK, total=sum(writer.tensor.size_bytes for writer in expressed), unit="bytes"))
    factors: list[Factors] = []
    for writer in expressed:
        factors.append(factors_of(plan.checkpoint.folder, writer, plan.edits[writer.tensor.name]))
        on_event(Advanced(task=TASK, amount=writer.tensor.size_bytes))
    on_event(Finished(task=TASK))
    save_file(_tensors(factors), output.path / ADAPTER, metadata={"format": "pt"})
    ranks = {one.writer.name: one.rank for one in factors}
    write_json(output.path / CONFIG, _config(plan, ranks))
    write_text(output.path / "README.md", _card(plan, left_out))
    size = (output.path / ADAPTER).stat().st_size
    if beside is not None:
        lora_gguf.write(beside, factors, name=plan.checkpoint.name)
    return AdapterReport(
        out=output.finish(),
        rank=max(ranks.values()),
        expressed=tuple(writer.name for writer in expressed),
        left_out=left_out,
        tied=plan.model_map.tied,
        size_bytes=size,
        gguf=beside,
    )


def not_expressible(writer: Writer, edit: WeightEdit) -> str:
    """Why an adapter cannot hold the edit of ``writer``; empty where it can."""
    if edit.scales:
        return "its columns keep their lengths, which is no change of low rank"
    if edit.keeps_rows:
        return "its rows keep their lengths, which is no change of low rank"
    if edit.constant is not None:
        return "gains a constant"
    if writer.packed is not None:
        return f"stored as {writer.format}"
    if writer.drafts:
        return "in a next-token block, which transformers does not load"
    if len(writer.tensor.shape) == 1:
        return "a bias: adapters change matrices only"
    if len(writer.tensor.shape) > 2 or ".experts." in writer.name:
        return "an expert: models keep all experts in one parameter"
    if writer.role == "embedding":
        return "" if writer.in_rows else "an embedding stored transposed"
    if writer.role.startswith("stored copy"):
        return "the head of a tied model"
    return "stored transposed" if writer.in_rows else ""


def _tensors(factors: Sequence[Factors]) -> dict[str, Tensor]:
    """``A`` and ``B`` of all writers under the names PEFT gives them."""
    found: dict[str, Tensor] = {}
    for one in factors:
        module = "base_model.model." + one.writer.tensor.name.removesuffix(".weight")
        if one.writer.role == "embedding":
            found |= {f"{module}.lora_embedding_A": one.a, f"{module}.lora_embedding_B": one.b}
        else:
            found |= {f"{module}.lora_A.weight": one.a, f"{module}.lora_B.weight": one.b}
    return found


def _config(plan: EditPlan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """``adapter_config.json``: modules by their full names, so that nothing else matches, each with its rank."""
    rank = max(ranks.values())
    modules = {name.removesuffix(".weight"): its for name, its in ranks.items()}
    others = {name: its for name, its in modules.items() if its != rank}
    patterns = {"rank_pattern": others, "alpha_pattern": others} if others else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.checkpoint.name,
        "revision": plan.checkpoint.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(modules),
        **patterns,
    }


def _card(plan: EditPlan, left_out: Mapping[str, str]) -> str:
    edit = plan.to_json()
    lines = [
        "---",
        "library_name: peft",
        "tags:",
        "- abliterated",
        "- abliterate",
        "---",
        "",
        f"# {plan.checkpoint.name}, abliterated, as an adapter",
        "",
        f"The base with {wording.summary(edit)},",
        f"as a LoRA adapter made with `abliterate lora export`: it {wording.effect(edit, complete=not left_out)}.",
        "The licence and the terms of the base apply.",
    ]
    if left_out:
        lines += ["", "Not expressed, so that these write what they write in the base:", ""]
        lines += [f"- `{name}`: {why}" for name, why in left_out.items()]
    if plan.model_map.tied:
        lines += ["", "The head is tied to the embedding: do not merge this adapter, or the head is edited as well."]
    return "\n".join(lines) + "\n"
