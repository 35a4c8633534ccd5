"""Where a direction comes from: what each attention head and MLP writes along it (Arditi et al. 2024, section 5).

The residual stream is a sum, so its component along a unit ``r`` is one as well:

    x_l . r  =  embedding . r  +  sum over blocks k < l of (attention_k . r + MLP_k . r)

and attention is a sum over heads: ``attention_k = sum_h W_O[:, h] z_h``.  A norm behind the output projection scales
every channel by ``s = y / (W_O z)``, which is taken over to its heads.  Everything is measured at the last position.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.arch.spec import Family, WriterSpec
from abliterate.method.linalg import unit
from abliterate.model.chat import Batch
from abliterate.model.forward import run_batch
from abliterate.model.interventions import observed
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import run_together

ATTENTION = "attention out"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attribution:
    """Components along ``r`` at the last position of each prompt, in float64.

    ``stream[p, l]`` is ``x_l . r`` entering block ``l`` (and, last, leaving the last one), ``cosine`` the same by
    ``|x_l|``.  ``attention`` and ``mlp`` are what a block adds, ``heads`` the part of each head (NaN where the output
    projection does not divide into heads).  ``unexplained`` is the largest share of the last ``stream`` that these do
    not add up to: models that scale what they add are off by that factor.
    """

    stream: Float[Tensor, "prompts states"]
    cosine: Float[Tensor, "prompts states"]
    attention: Float[Tensor, "prompts layers"]
    mlp: Float[Tensor, "prompts layers"]
    heads: Float[Tensor, "prompts layers heads"]
    unexplained: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One place of a block: the module whose output is added, and for attention its output projection."""

    site: nn.Module
    projection: nn.Module | None
    transposed: bool


def attribute(
    loaded: LoadedModel, family: Family, batches: Iterable[Batch], direction: Float[Tensor, " d"]
) -> Attribution:
    """Attribute the component along ``direction`` at the last position of every prompt of ``batches``."""
    r = unit(direction.double())
    parts = [_parts(block, family) for block in loaded.blocks]
    n_heads = int(getattr(loaded.model.config.get_text_config(), "num_attention_heads", 0) or 0)
    found = [(batch.rows, _of_batch(loaded, parts, batch, r, max(1, n_heads))) for batch in batches]
    order = torch.tensor([row for rows, _ in found for row in rows]).argsort()
    whole = {name: torch.cat([values[name] for _, values in found])[order] for name in found[0][1]}
    added = whole["embedding"] + whole["attention"].sum(1) + whole["mlp"].sum(1)
    last = whole["stream"][:, -1]
    unexplained = float(((added - last).abs() / last.abs().clamp_min(1e-12)).max())
    return Attribution(
        stream=whole["stream"],
        cosine=whole["cosine"],
        attention=whole["attention"],
        mlp=whole["mlp"],
        heads=whole["heads"],
        unexplained=unexplained,
    )


def attention_to_spans(
    loaded: LoadedModel, batch: Batch, heads: Sequence[tuple[int, int]], spans: Sequence[Sequence[slice]]
) -> Float[Tensor, "rows heads spans"]:
    """Attention of the last position of each row, per head, summed over the spans of that row.

    The model is switched to the attention that gives its weights out, and back.
    """
    config = loaded.model.config
    before = getattr(config, "_attn_implementation", None)
    loaded.model.set_attn_implementation("eager")

    def run() -> Any:  # noqa: ANN401 - what the model returns
        with torch.inference_mode():
            return loaded.model(
                input_ids=batch.input_ids.to(loaded.device),
                attention_mask=batch.attention_mask.to(loaded.device),
                position_ids=batch.position_ids.to(loaded.device),
                use_cache=False,
                output_attentions=True,
            )

    try:
        (out,) = run_together(loaded, [run])
    finally:
        if before is not None:
            loaded.model.set_attn_implementation(before)
    found = torch.zeros(len(batch.rows), len(heads), len(spans[0]), dtype=torch.float64)
    for place, (layer, head) in enumerate(heads):
        weights = out.attentions[layer][:, head, -1].to(device="cpu", dtype=torch.float64)
        for row in range(len(batch.rows)):
            found[row, place] = torch.stack([weights[row, span].sum() for span in spans[row]])
    return found


def _parts(block: nn.Module, family: Family) -> dict[str, _Part]:
    """What a block adds, by role; of a shared place (experts) once."""
    modules = dict(block.named_modules())
    found: dict[str, _Part] = {}
    for spec in family.writer:
        if not spec.per_layer or spec.name.endswith("bias"):
            continue
        site = modules.get(_within(spec.site_name))
        if site is None or any(part.site is site for part in found.values()):
            continue
        own = modules.get(_within(spec.name).removesuffix(".weight"))
        found[spec.role] = _Part(site=site, projection=own, transposed=_transposed(spec))
    return found


def _within(name: str) -> str:
    """A name of the registry relative to its block."""
    return name.partition("{layer}.")[2]


def _transposed(spec: WriterSpec) -> bool:
    return spec.layouts[0][-1] == "d_model"


def _of_batch(
    loaded: LoadedModel, parts: list[dict[str, _Part]], batch: Batch, r: Float[Tensor, " d"], n_heads: int
) -> dict[str, Tensor]:
    rows, layers = len(batch.rows), loaded.n_layers
    inputs: dict[int, Tensor] = {}
    raw: dict[int, Tensor] = {}
    outputs: dict[tuple[int, str], Tensor] = {}
    states: list[Tensor] = []
    heads = torch.full((rows, layers, n_heads), torch.nan, dtype=torch.float64)

    def see_output(layer: int, role: str, _: nn.Module, __: Any, out: Any) -> None:  # noqa: ANN401 - a module's
        y = outputs[layer, role] = _last(out, rows)
        part = parts[layer][role]
        if role == ATTENTION and layer in inputs and inputs[layer].shape[-1] % n_heads == 0:
            scale = torch.where(raw[layer] == 0, 1.0, y / raw[layer])
            heads[:, layer] = _by_head(part, inputs[layer], r * scale, n_heads)  # here, while the block is loaded

    def see_projection(layer: int, _: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:  # noqa: ANN401
        inputs[layer], raw[layer] = _last(args[0], rows), _last(out, rows)

    with ExitStack() as stack:
        for layer, found in enumerate(parts):
            for role, part in found.items():
                if role == ATTENTION and part.projection is not None:
                    stack.callback(part.projection.register_forward_hook(partial(see_projection, layer)).remove)
                stack.callback(part.site.register_forward_hook(partial(see_output, layer, role)).remove)
        stack.enter_context(observed(loaded, lambda _, x: states.append(_last(x, rows)), leaving_last=True))
        run_batch(loaded, batch)
    stream = torch.stack([x @ r for x in states], 1)
    cosine = torch.stack([x @ r / torch.linalg.vector_norm(x, dim=-1) for x in states], 1)
    attention, mlp = torch.zeros(rows, layers, dtype=torch.float64), torch.zeros(rows, layers, dtype=torch.float64)
    for (layer, role), y in outputs.items():
        (attention if role == ATTENTION else mlp)[:, layer] += y @ r
    return {
        "stream": stream, "cosine": cosine, "attention": attention, "mlp": mlp, "heads": heads,
        "embedding": stream[:, 0],
    }  # fmt: skip


def _last(x: Any, rows: int) -> Float[Tensor, "rows n"]:  # noqa: ANN401 - whatever a module takes or gives
    """The last position of each row, in float64; some modules see all tokens of a batch in a row."""
    values = x if isinstance(x, Tensor) else x[0]
    return values.reshape(rows, -1, values.shape[-1])[:, -1].detach().to(device="cpu", dtype=torch.float64)


def _by_head(
    part: _Part, z: Float[Tensor, "rows inner"], r: Float[Tensor, "rows d"], n_heads: int
) -> Float[Tensor, "rows heads"]:
    """``r^T W_O[:, h] z_h`` of every head."""
    weight = part.projection.weight.detach().to(device="cpu", dtype=torch.float64)  # type: ignore[union-attr]
    pulled = r @ (weight.T if part.transposed else weight)
    return (pulled * z).view(len(z), n_heads, -1).sum(-1)
