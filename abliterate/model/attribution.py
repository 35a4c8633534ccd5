"""Where a direction comes from: what each attention head and MLP writes along it (Arditi et al. 2024, section 5).

The residual stream is a sum, so its component along a unit ``r`` is one as well:

    x_l . r  =  embedding . r  +  sum over blocks k < l of (attention_k . r + MLP_k . r)

and attention is a sum over heads: ``attention_k = sum_h W_O[:, h] z_h``.  A norm behind the output projection scales
every channel by ``s = y / (W_O z)``, which is taken over to its heads.  Everything is measured at the last position.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.arch.spec import Family, WriterSpec
from abliterate.method.linalg import unit
from abliterate.model.chat import Batch
from abliterate.model.forward import Tell, each_batch, run_batch
from abliterate.model.interventions import observed, watched
from abliterate.model.load import LoadedModel

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
    loaded: LoadedModel,
    family: Family,
    batches: Iterable[Batch],
    direction: Float[Tensor, " d"],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> Attribution:
    """Attribute the component along ``direction`` at the last position of every prompt of ``batches``.

    Out of core, as many batches share a weight pass as memory allows.  ``advance`` is called with the rows of each
    batch that is done.
    """
    r = unit(direction.double())
    parts = [_parts(block, family) for block in loaded.blocks]
    n_heads = _n_heads(loaded)
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def run(batch: Batch, tell: Tell) -> Tensor:
        seen = _Seen(parts, r, len(batch.rows), n_heads)
        with seen.watching(loaded):
            run_batch(loaded, batch)
        for name, values in seen.figures().items():
            tell(name, values)
        return torch.empty(0)

    def told(batch: Batch, name: str, values: Tensor) -> None:
        found[name].update(zip(batch.rows, values, strict=True))

    figures = 2 * (loaded.n_layers + 1) + loaded.n_layers * (2 + n_heads)
    options = {"result_bytes": figures * torch.float64.itemsize, "advance": advance}
    for _ in each_batch(loaded, batches, run, told=told, **options):
        pass
    whole = {name: torch.stack([its[row] for row in sorted(its)]) for name, its in found.items()}
    last = whole["stream"][:, -1]
    added = whole["stream"][:, 0] + whole["attention"].sum(1) + whole["mlp"].sum(1)
    unexplained = float(((added - last).abs() / last.abs().clamp_min(1e-12)).max())
    return Attribution(**whole, unexplained=unexplained)


def attention_to_spans(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    heads: Sequence[tuple[int, int]],
    spans: Sequence[Sequence[slice]],
) -> Float[Tensor, "prompts heads spans"]:
    """Attention of the last position of each prompt, per head (layer, head), summed over the spans of that prompt.

    The model is switched to the attention that gives its weights out, and back.  Out of core, as many batches share a
    weight pass as memory allows: each holds its weights of all layers until its end.
    """
    every = list(batches)

    def run(batch: Batch, _: Tell) -> Tensor:
        with torch.inference_mode():
            out = loaded.model(
                input_ids=batch.input_ids.to(loaded.device),
                attention_mask=batch.attention_mask.to(loaded.device),
                position_ids=batch.position_ids.to(loaded.device),
                use_cache=False,
                output_attentions=True,
            )
        found = torch.zeros(len(batch.rows), len(heads), len(spans[0]), dtype=torch.float64)
        for place, (layer, head) in enumerate(heads):
            weights = out.attentions[layer][:, head, -1].to(device="cpu", dtype=torch.float64)
            for row, prompt in enumerate(batch.rows):
                found[row, place] = torch.stack([weights[row, span].sum() for span in spans[prompt]])
        return found

    width = max((batch.input_ids.shape[1] for batch in every), default=0)
    kept = loaded.n_layers * _n_heads(loaded) * width**2 * loaded.model.dtype.itemsize
    config = loaded.model.config
    before = getattr(config, "_attn_implementation", None)
    loaded.model.set_attn_implementation("eager")
    found: dict[int, Tensor] = {}
    try:
        for batch, its in each_batch(loaded, every, run, result_bytes=kept):
            found.update(zip(batch.rows, its, strict=True))
    finally:
        if before is not None:
            loaded.model.set_attn_implementation(before)
    return torch.stack([found[row] for row in sorted(found)])


def _n_heads(loaded: LoadedModel) -> int:
    return max(1, int(getattr(loaded.model.config.get_text_config(), "num_attention_heads", 0) or 0))


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


class _Seen:
    """The figures of one batch, taken as its states pass: little is kept while it waits between two blocks.

    ``parts`` are those of each block, ``r`` the unit direction ``[d]`` in float64, ``rows`` how many the batch has.
    """

    def __init__(self, parts: Sequence[Mapping[str, _Part]], r: Tensor, rows: int, n_heads: int) -> None:
        self._parts, self._r, self._rows, self._n_heads = parts, r, rows, n_heads
        self._stream, self._cosine = (_nan(rows, len(parts) + 1) for _ in range(2))
        self._heads = _nan(rows, len(parts), n_heads)
        self._written: dict[tuple[int, str], Tensor] = {}
        self._projections: dict[int, dict[str, Tensor]] = defaultdict(dict)

    @contextmanager
    def watching(self, loaded: LoadedModel) -> Iterator[None]:
        """Run the batch meanwhile, once."""
        with ExitStack() as stack:
            for layer, found in enumerate(self._parts):
                for role, part in found.items():
                    if role == ATTENTION and part.projection is not None:
                        entering, leaving = (partial(self._see_projection, layer, side) for side in ("z", "raw"))
                        stack.enter_context(watched(part.projection, entering=entering, leaving=leaving))
                    stack.enter_context(watched(part.site, leaving=partial(self._see_written, layer, role)))
            stack.enter_context(observed(loaded, self._see_stream, leaving_last=True))
            yield

    def figures(self) -> dict[str, Tensor]:
        """What ``Attribution`` holds of these rows, by name."""
        attention, mlp = (torch.zeros(self._rows, len(self._parts), dtype=torch.float64) for _ in range(2))
        for (layer, role), along in self._written.items():
            (attention if role == ATTENTION else mlp)[:, layer] += along
        return {
            "stream": self._stream, "cosine": self._cosine, "attention": attention, "mlp": mlp, "heads": self._heads,
        }  # fmt: skip

    def _see_stream(self, layer: int, x: Tensor) -> None:
        x = _last(x, self._rows)
        self._stream[:, layer] = x @ self._r
        self._cosine[:, layer] = self._stream[:, layer] / torch.linalg.vector_norm(x, dim=-1)

    def _see_projection(self, layer: int, side: str, x: Tensor) -> None:
        self._projections[layer][side] = _last(x, self._rows)

    def _see_written(self, layer: int, role: str, x: Tensor) -> None:
        y = _last(x, self._rows)
        self._written[layer, role] = y @ self._r
        if role == ATTENTION and self._projections[layer]:
            z, raw = (self._projections[layer].pop(side) for side in ("z", "raw"))
            if z.shape[-1] % self._n_heads == 0:  # here, while the block is loaded
                scale = torch.where(raw == 0, 1.0, y / raw)
                self._heads[:, layer] = _by_head(self._parts[layer][role], z, self._r * scale, self._n_heads)


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def _last(x: Tensor, rows: int) -> Float[Tensor, "rows n"]:
    """The last position of each row, in float64; some modules see all tokens of a batch in a row."""
    return x.reshape(rows, -1, x.shape[-1])[:, -1].detach().to(device="cpu", dtype=torch.float64, copy=True)


def _by_head(
    part: _Part, z: Float[Tensor, "rows inner"], r: Float[Tensor, "rows d"], n_heads: int
) -> Float[Tensor, "rows heads"]:
    """``r^T W_O[:, h] z_h`` of every head, one after the other: the whole matrix in float64 is much memory."""
    weight = part.projection.weight.detach()  # type: ignore[union-attr]
    of_heads = (weight.T if part.transposed else weight).chunk(n_heads, dim=1)
    pulled = (r @ its.to(device="cpu", dtype=torch.float64) for its in of_heads)
    return torch.stack([(p * its).sum(-1) for p, its in zip(pulled, z.chunk(n_heads, dim=1), strict=True)], 1)
