"""Refusal directions and cones of them, trained by gradients: losses, geometry and constants.

Wollschlaeger et al. 2025 (arXiv 2502.17420): refusal direction optimisation (RDO), refusal cones, and representational
independence (RepInd).  A direction is a unit vector ``v``; a cone is the non-negative combinations of the columns of an
orthonormal basis ``B``.  What is minimised over it, with the weights of the model frozen, is

    L(v) = l_abl CE(answers | v ablated, harmful) + l_add CE(refusals | alpha v added at l*, harmless)
           + l_ret KL(ablated || base, harmless)  [+ l_ind RepInd(v, w), where v shall be independent of w]

of a cone the mean of ``L`` over directions drawn from it, and the mean over its basis.  Constants are those of the
published code.  Running the model is ``model.direction_losses``, the optimiser ``model.direction_training``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.method.linalg import orthonormal_basis, project_out, unit

RDO, CONE = "rdo", "cone"
ABLATION, ADDITION, RETAIN, INDEPENDENCE = "ablation", "addition", "retain", "independence"
"""The parts of the loss."""
WEIGHTS: Mapping[str, float] = MappingProxyType({ABLATION: 1.0, ADDITION: 0.2, RETAIN: 1.0})
WEIGHTS_INDEPENDENT: Mapping[str, float] = MappingProxyType({**WEIGHTS, RETAIN: 0.1, INDEPENDENCE: 200.0})
"""Where independence of other directions is asked for as well."""
TARGET_TOKENS = 30
"""Length of the answers and refusals that are learned; the base's replies, for KL, have one token less."""
SAMPLES = 8
"""Directions drawn from a cone in each step."""
COMPARED_DEPTH = 0.9
"""RepInd compares the residuals of the layers below this share of the depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the optimiser goes on; published but for ``most_steps`` (74, from a random direction) and ``checked_every``.

    AdamW without weight decay, its gradients clipped to a norm of ``clip``, ``batch`` prompts of each class in a step.
    The loss of the validation prompts is looked at every ``checked_every`` steps (published: that of the training
    prompts, at each): after ``patience`` looks that are not the best yet the rate falls to a tenth, ``falls`` times at
    most, and then training ends.  The best direction that was looked at is kept, the one it began with among them.
    """

    most_steps: int = 24
    batch: int = 16
    rate: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 10.0
    checked_every: int = 4
    patience: int = 5
    falls: int = 2


def target_loss(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of the tokens of a reply: ``CE`` of the ablation and of the addition loss."""
    return torch.nn.functional.cross_entropy(logits, targets)


def retain_loss(ablated: Float[Tensor, "n vocab"], base: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """``KL(ablated || base)`` in nats, summed over the ``n`` positions of a reply, in float64, from logits.

    Published so: the other way round than the KL of the selection, and a sum where the other losses are means.
    """
    p, q = ablated.to(torch.float64).log_softmax(-1), base.to(torch.float64).log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def independence_loss(
    base: Float[Tensor, "*rows layers d"],
    without_v: Float[Tensor, "*rows layers d"],
    without_w: Float[Tensor, "*rows layers d"],
    v: Float[Tensor, " d"],
    w: Float[Tensor, " d"],
) -> Float[Tensor, "*rows"]:
    """RepInd's cosine condition of ``v`` and ``w``, 0 where they are independent under intervention.

        mean_l [cos(x_l, w | v ablated) - cos(x_l, w)]^2 + mean_l [cos(x_l, v | w ablated) - cos(x_l, v)]^2

    ``x_l`` are the residuals of a prompt's last token.  Orthogonal directions need not be independent: ablating one
    changes what later blocks write along the other.
    """
    cos = torch.nn.functional.cosine_similarity
    along_w = cos(without_v, w.to(without_v), dim=-1) - cos(base, w.to(base), dim=-1)
    along_v = cos(without_w, v.to(without_w), dim=-1) - cos(base, v.to(base), dim=-1)
    return along_w.square().mean(-1) + along_v.square().mean(-1)


def layers_compared(n_layers: int) -> range:
    """The layers ``l < 0.9 L`` of the cosine condition."""
    return range(math.ceil(COMPARED_DEPTH * n_layers))


def tangent(gradient: Float[Tensor, "d k"], basis: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """``g - v (v . g)`` of each column: the gradient along the sphere on which the unit vector ``v`` lies."""
    return gradient - basis * (basis * gradient).sum(0)


def orthonormal(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Gram-Schmidt after a step, in float64, rounded once to the dtype of ``vectors``; one vector is made a unit one.

    Raises:
        ValueError: the vectors are not finite, or do not span ``k`` dimensions.
    """
    basis = orthonormal_basis(vectors)
    if basis.shape != vectors.shape:
        raise ValueError(f"{vectors.shape[1]} vectors span {basis.shape[1]} dimensions")
    return basis.to(vectors.dtype)


def grown(basis: Float[Tensor, "d k"], generator: torch.Generator) -> Float[Tensor, "d more"]:
    """``basis`` with one more column, random and orthogonal to it: cones are trained one dimension after the other."""
    drawn = torch.randn(len(basis), generator=generator, dtype=torch.float64)
    rest = project_out(project_out(drawn, basis.double()), basis.double())
    return orthonormal(torch.cat([basis.double(), unit(rest)[:, None]], dim=1)).to(basis.dtype)


def cone_samples(k: int, count: int, generator: torch.Generator) -> Float[Tensor, "k count"]:
    """Coefficients ``s = |N(0, I)|``, normalised, of ``count`` directions ``B s`` of a cone with basis ``B [d, k]``.

    ``B`` is orthonormal, so ``B s`` has length 1: uniform over the part of the sphere between its columns.
    """
    drawn = torch.randn(k, count, generator=generator, dtype=torch.float64).abs()
    return drawn / torch.linalg.vector_norm(drawn, dim=0)
