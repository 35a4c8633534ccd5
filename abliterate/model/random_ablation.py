"""Directions that are ablated at random while a model is trained, measured again now and then, because they move."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.estimators import Need
from abliterate.method.hardening import Hardening
from abliterate.method.linalg import orthonormal_basis, project_out
from abliterate.method.random_ablation import Separating
from abliterate.model.chat import ChatFormat
from abliterate.model.interventions import everywhere
from abliterate.model.load import LoadedModel
from abliterate.model.measuring import measure_class

Around = AbstractContextManager[None]
NEEDS: tuple[Need, ...] = ("means", "samples")


class RandomAblation:
    """The hooks of each training step of ``loaded``: in a share of them, directions are out of the residual stream.

    Out of that of harmful prompts, the first half of a batch: refusing without them is learned, and answering is not.

    They are differences of means between ``harmful`` and ``harmless`` prompts, as those of a run, or principal
    directions, at random places (``method.random_ablation``), and are taken out everywhere
    (``interventions.ablated``).  Gradients flow through that: the weights learn to refuse by what is left.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        chat: ChatFormat,
        harmful: Sequence[str],
        harmless: Sequence[str],
        options: Hardening,
        *,
        batch_size: int,
    ) -> None:
        self.loaded, self.chat, self.options = loaded, chat, options
        self.batch_size = batch_size
        self.steps_ablated = 0
        self._prompts = harmful, harmless
        self._generator = torch.Generator().manual_seed(options.seed)
        self._separating: Separating | None = None

    def around(self, step: int) -> Around:
        """The context of ``step``, counted from 0.

        Raises:
            NonFiniteError: an activation is NaN or infinite.
        """
        if self._separating is None or step % self.options.every == 0:
            self._separating = self._measured()
        if float(torch.rand((), generator=self._generator)) >= self.options.share:
            return nullcontext()
        self.steps_ablated += 1
        return half_ablated(self.loaded, self._separating.drawn(self.options.most, self._generator))

    def _measured(self) -> Separating:
        """What separates the prompts in the model as it is now."""
        self.loaded.model.eval()
        found = [
            measure_class(self.loaded, self.chat, its, NEEDS, batch_size=self.batch_size, task="measure")
            for its in self._prompts
        ]
        self.loaded.model.train()
        means, samples = ([its[what] for its in found] for what in ("mean", "samples"))
        return Separating.of(means, samples, self.options.most)


@contextmanager
def half_ablated(loaded: LoadedModel, directions: Float[Tensor, "d k"]) -> Iterator[None]:
    """As ``interventions.ablated``, of the first half of the rows of each batch alone.

    Every place must give ``[rows, tokens, d]`` or ``[rows * tokens, d]``; see ``rows_apart``.
    """
    basis = orthonormal_basis(directions)

    def change(x: Tensor) -> Tensor:
        first, second = x.reshape(2, -1, x.shape[-1])
        wide = first.to(torch.promote_types(x.dtype, torch.float32))
        return torch.stack([project_out(wide, basis).to(x.dtype), second]).view(x.shape)

    with everywhere(loaded, change):
        yield
