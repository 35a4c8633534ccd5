"""What every attention and MLP adds to the residual stream after prompts: the outputs of writers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abliterate.events import OnEvent, ignore, working
from abliterate.method.places import IN_BLOCKS, Place
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import Tell, check_finite, each_batch, run_batch
from abliterate.model.interventions import Change, at_writers
from abliterate.model.load import LoadedModel


def outputs_of(
    loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[str], *, batch_size: int, on_event: OnEvent = ignore
) -> dict[str, Tensor]:
    """What each place in a block adds at the post-instruction positions of ``prompts``, by ``named`` places.

    Each is ``[prompts, n, d]`` in float32; ``n`` counts the positions, once for each writer of the place.

    Raises:
        NonFiniteError: an output is NaN or infinite; names the block and the prompt.
    """
    positions = len(chat.positions)
    found: dict[str, list[list[Tensor]]] = {}

    def run(batch: Batch, tell: Tell) -> Tensor:
        def change_at(place: Place, _: nn.Module) -> Change | None:
            if place[1] not in IN_BLOCKS:
                return None

            def see(x: Tensor) -> Tensor:
                values = x.reshape(len(batch.rows), -1, loaded.d_model)[:, -positions:]
                values = values.detach().to(device="cpu", dtype=torch.float32, copy=True)
                texts = [prompts[row] for row in batch.rows]
                check_finite(values, texts, f"what the {place[1]} of block {place[0]} adds")
                tell(named(place), values)
                return x

            return see

        with at_writers(loaded, change_at):
            run_batch(loaded, batch, keep=positions)
        return torch.empty(0)

    def told(batch: Batch, name: str, values: Tensor) -> None:
        for row, its in zip(batch.rows, values, strict=True):
            found.setdefault(name, [[] for _ in prompts])[row].append(its)

    with working(on_event, "measure what writers add", len(prompts), "prompts") as advance:
        for _ in each_batch(loaded, chat.batches(prompts, batch_size), run, told=told, advance=advance):
            pass
    return {name: torch.stack([torch.cat(its) for its in found[name]]) for name in sorted(found)}


def named(place: Place) -> str:
    """A place as the name of a tensor."""
    return f"{place[0]}.{place[1]}"


def place_of(name: str) -> Place:
    """The place of such a name."""
    layer, _, kind = name.partition(".")
    return int(layer), next(one for one in IN_BLOCKS if one == kind)
