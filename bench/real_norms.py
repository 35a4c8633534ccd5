"""Norms behind the writers of a model that was trained: is an edit as close to the hook as it is predicted to be?

What ``bench.post_norm`` measures on random models, on one whose gains come from training, in float64: on plain text,
as the model has no chat template, and along directions that are means of what it read.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from abliterate.arch.gains import read_gain
from abliterate.arch.model_map import Writer
from abliterate.editing.planning import plan
from abliterate.method import edits
from abliterate.method.linalg import unit
from abliterate.method.weight_edit import WeightEdit
from abliterate.model.interventions import observed
from abliterate.model.load import load_tokenizer
from bench import post_norm
from tests import equivalence, factories

ROWS, TOKENS = 2, 96
"""Pieces of the text that are read, and their length with the token that begins it."""
LARGEST = 16
"""Channels that hold most of the stream: what a direction has there, moves the whole model when it is taken out."""
EPSILON = 1e-6
"""What the norms of this family add to the mean square."""
NEARLY = "nearly oblique"
"""The least regularised form, for a model that has gains of zero: for these there is no oblique one."""


def study(base: Path, text: str, classes: Mapping[str, Sequence[str]], place: Path) -> dict[str, Any]:
    """Every direction: divergence of the whole model, and predicted and measured error writer by writer.

    ``classes`` are prompts of two kinds, read as plain text; the difference of their means is one direction.  Edited
    models lie in ``place`` for a while.
    """
    tokenizer = load_tokenizer(base, local_files_only=True)
    tokens = pieces(tokenizer, text)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        work = Path(folder)
        wide = factories.save(factories.load(base), work / "base", dtype=torch.float32, shard="2GB")
        writers = [writer for writer in plan(wide).writers if writer.norms]
        gains = {writer.tensor.name: read_gain(wide, writer) for writer in writers}
        forms = forms_for(gains.values())
        outputs = written(wide, writers, tokens)
        found = []
        logits, channels, share = plain_run(wide, tokens)
        for kind, direction in directions(wide, tokenizer, channels, classes).items():
            with tempfile.TemporaryDirectory(dir=work) as edited:
                row = post_norm.measure(
                    wide, base.name, kind, direction, Path(edited), tokens, memory_bytes=2**28, forms=forms
                )  # fmt: skip
            hooked, _ = equivalence.logits_and_share(wide, factories.load(wide), direction, hooks=True, tokens=tokens)
            ablation = equivalence.kl(logits, hooked)
            found.append(
                {
                    **dataclasses.asdict(row),
                    "ablation": ablation,
                    "writers": of_writers(outputs, gains, direction, forms),
                }
            )
            print(f"  {base.name}: {kind}", flush=True)
    return {
        "tokens": tokens.numel(),
        "largest": {"channels": LARGEST, "share": share},
        "gains": [spread(gain) for gain in gains.values()],
        "rows": found,
    }


def forms_for(gains: Iterable[Tensor]) -> dict[str, tuple[float, ...] | None]:
    """The forms of ``bench.post_norm``, but for the oblique one where a gain is zero."""
    if not any(bool((gain == 0).any()) for gain in gains):
        return dict(post_norm.FORMS)
    least = min(ridge for ridge in edits.RIDGE_GRID if ridge)
    named = {form: NEARLY if form == "oblique" else form for form in post_norm.FORMS}
    return {named[form]: (least,) if form == "oblique" else grid for form, grid in post_norm.FORMS.items()}


def spread(gain: Tensor) -> dict[str, float]:
    """What the gains of one norm are like."""
    sizes = gain.abs()
    return {
        "zeros": int((gain == 0).sum()),
        "least": float(sizes.min()),
        "median": float(sizes.median()),
        "largest": float(sizes.max()),
    }


def pieces(tokenizer: Any, text: str) -> Tensor:  # noqa: ANN401 - a tokenizer of transformers
    """The beginning of ``text`` in rows of equal length."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = TOKENS - 1
    if len(ids) < ROWS * step:
        raise ValueError(f"the text has {len(ids)} tokens, and {ROWS * step} are read")
    return torch.tensor([[tokenizer.bos_token_id, *ids[row * step : (row + 1) * step]] for row in range(ROWS)])


def directions(
    base: Path,
    tokenizer: Any,  # noqa: ANN401 - a tokenizer of transformers
    channels: Tensor,
    classes: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """A random direction, and the difference of means of two classes; each also with nothing in ``channels``."""
    means = [mean_at_end(base, [tokenizer(text)["input_ids"] for text in texts]) for texts in classes.values()]
    apart = (means[0] - means[1])[:, None]
    found = {"random": factories.random_directions(len(apart)), "difference of means": apart}
    for kind, direction in list(found.items()):
        found[f"{kind}, largest channels left out"] = direction.index_fill(0, channels, 0.0)
    return found


def plain_run(base: Path, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
    """The logits of the model as it is, its ``LARGEST`` channels, and what share of the stream they hold."""
    model = factories.load(base)
    seen: dict[int, Tensor] = {}

    def see(layer: int, x: Tensor) -> None:
        rest = x[:, 1:]  # the first token is always the same, and the largest of all
        seen[layer] = rest.square().mean((0, 1)) / rest.square().sum(-1).mean()

    with factories.really_float64(), torch.no_grad(), observed(equivalence.attached(base, model), see):
        logits = model(tokens).logits
    shares = torch.stack([seen[layer] for layer in sorted(seen)])
    channels = shares.amax(0).topk(LARGEST).indices
    return logits, channels, float(shares[len(shares) // 2, channels].sum().sqrt())


def mean_at_end(base: Path, encoded: Sequence[list[int]]) -> Tensor:
    """The mean residual that enters the middle block at the last token."""
    model = factories.load(base)
    loaded = equivalence.attached(base, model)
    found: list[Tensor] = []

    def see(layer: int, x: Tensor) -> None:
        if layer == loaded.n_layers // 2:
            found.append(x[:, -1])

    with factories.really_float64(), torch.no_grad(), observed(loaded, see):
        for ids in encoded:
            model(torch.tensor([ids]))
    return torch.cat(found).mean(0)


def of_writers(
    outputs: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    direction: Tensor,
    forms: Mapping[str, tuple[float, ...] | None],
) -> dict[str, dict[str, list[float]]]:
    """By form of the edit, for every writer behind a norm: the predicted error ``J``, the measured one, and ``t``."""
    stream = edits.orthogonal(unit(direction[:, 0])[:, None])
    found: dict[str, dict[str, list[float]]] = {}
    for form, grid in forms.items():
        lists = found.setdefault(form, {"predicted": [], "measured": [], "ridge": []})
        for name, gain in gains.items():
            with mock.patch.object(edits, "RIDGE_GRID", grid or edits.RIDGE_GRID):
                edit = stream if grid is None else edits.behind_norm(stream, gain)
            lists["measured"].append(distance(outputs[name], edit, stream, gain))
            if grid is not None:
                lists["predicted"].append(edit.predicted_error)
                lists["ridge"].append(edit.ridge)
    return found


def written(base: Path, writers: Sequence[Writer], tokens: Tensor) -> dict[str, Tensor]:
    """What the writers give to their norms, as columns."""
    model = factories.load(base)
    found: dict[str, Tensor] = {}
    handles = []
    for writer in writers:
        name = writer.tensor.name

        def see(module: object, inputs: object, output: Tensor, name: str = name) -> None:  # noqa: ARG001
            found[name] = output.reshape(-1, output.shape[-1]).T

        handles.append(model.get_submodule(name.removesuffix(".weight")).register_forward_hook(see))
    with factories.really_float64(), torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


def distance(output: Tensor, edit: WeightEdit, stream: WeightEdit, gain: Tensor) -> float:
    """``|y' - P y| / |P y|`` over all tokens: the stream after the edit, and after the hook."""
    hooked = edits.apply(_normed(output, gain), stream)
    ours = _normed(edits.apply(output, edit), gain)
    return float((ours - hooked).norm() / hooked.norm())


def _normed(output: Tensor, gain: Tensor) -> Tensor:
    return gain[:, None] * output / (output.square().mean(0) + EPSILON).sqrt()


def summary(row: Mapping[str, Any], form: str) -> dict[str, float | None]:
    """Median and largest of the predicted and the measured errors of one form, and how they go together."""
    its = row["writers"][form]
    known = bool(its["predicted"])
    return {
        "predicted": median(its["predicted"]) if known else None,
        "predicted_largest": max(its["predicted"]) if known else None,
        "measured": median(its["measured"]),
        "measured_largest": max(its["measured"]),
        "correlation": _correlation(its["predicted"], its["measured"]) if known else None,
    }


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the logarithms."""
    pair = torch.tensor([one, other], dtype=torch.float64).log()
    return float(torch.corrcoef(pair)[0, 1])
