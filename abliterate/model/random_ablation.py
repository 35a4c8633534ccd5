"""Directions that are ablated at random while a model is trained, measured again now and then, because they move."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from abliterate.method.hardening import Hardening
from abliterate.method.random_ablation import drawn
from abliterate.model.chat import ChatFormat
from abliterate.model.interventions import ablated
from abliterate.model.load import LoadedModel
from abliterate.model.measuring import measure_class

Around = AbstractContextManager[None]


class RandomAblation:
    """The hooks of each training step of ``loaded``: in a share of them, directions are out of the residual stream.

    They are differences of means between ``harmful`` and ``harmless`` prompts, as those of a run, at random positions
    and layers (``method.random_ablation``), and are taken out everywhere (``interventions.ablated``).  Gradients flow through
    that: the weights learn to refuse by what is left.
    """

    def __init__(
        self, loaded: LoadedModel, chat: ChatFormat, harmful: Sequence[str], harmless: Sequence[str], options: Hardening,
        *, batch_size: int,
    ) -> None:  # fmt: skip
        self.loaded, self.chat, self.options = loaded, chat, options
        self.batch_size = batch_size
        self.steps_ablated = 0
        self._prompts = harmful, harmless
        self._generator = torch.Generator().manual_seed(options.seed)
        self._differences: Tensor | None = None

    def around(self, step: int) -> Around:
        """The context of ``step``, counted from 0.

        Raises:
            NonFiniteError: an activation is NaN or infinite.
        """
        if self._differences is None or step % self.options.every == 0:
            self._differences = self._measured()
        if float(torch.rand((), generator=self._generator)) >= self.options.share:
            return nullcontext()
        self.steps_ablated += 1
        return ablated(self.loaded, drawn(self._differences, self.options.most, self._generator))

    def _measured(self) -> Tensor:
        """The differences of means ``[positions, layers, d]`` of the model as it is now."""
        self.loaded.model.eval()
        harmful, harmless = (
            measure_class(self.loaded, self.chat, its, batch_size=self.batch_size, task="measure")["mean"]
            for its in self._prompts
        )
        self.loaded.model.train()
        return harmful - harmless
