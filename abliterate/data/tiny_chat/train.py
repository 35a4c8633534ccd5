"""Training of the tiny chat models: pretraining on the made-up world, then refusal tuning."""

import copy
import math
import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from abliterate.data.tiny_chat import world as w
from abliterate.data.tiny_chat.data import (
    IGNORE,
    TUNED_PHRASINGS,
    make_batch,
    ordinary_text,
    pretraining_batches,
    refusing_text,
)
from abliterate.data.tiny_chat.figures import left_padded
from abliterate.data.tiny_chat.training import Training

WRITERS = ("o_proj", "down_proj")
"""Names of the maps whose output is added to the residual stream."""

POST_TOKENS = 5
"""Tokens of the chat template after the user's words, up to the reply."""

Log = Callable[[str, int, dict[str, float]], None]
"""Told the phase, the step and the losses now and then."""


def reply_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy in nats, averaged over labelled tokens; ``weights`` gives every word of the vocabulary a weight."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weights, ignore_index=IGNORE)


def fact_weights(tokenizer: PreTrainedTokenizerFast, weight: float) -> torch.Tensor:
    """One weight per token of the vocabulary: ``weight`` for words that are facts, 1 for all others."""
    weights = torch.ones(len(tokenizer))
    for values in w.VALUES.values():
        for value in values:
            for form in (value, w.capitalise(value)):
                weights[tokenizer.convert_tokens_to_ids("▁" + form)] = weight
    return weights


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Stepper:
    """AdamW over some parameters, with the schedule above and gradients clipped to length 1."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, steps: int, warmup: int, decay: float) -> None:
        self.parameters = parameters
        self.optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=decay)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: schedule(step, steps, warmup))

    def step(self, loss: torch.Tensor) -> None:
        """One update against the gradient of ``loss``."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.rates.step()
        self.optimiser.zero_grad()


def pretrain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: w.World, training: Training, seed: int, log: Log
) -> None:
    """Trains the model in place until it knows the world.

    The word that states a fact weighs more than its neighbours: how a reply opens is drawn by chance, so most of the
    plain loss is noise that cannot be learnt.
    """
    texts = pretraining_batches(world, training.pretrain_batch, random.Random(f"pretrain-{seed}"))
    stepper = Stepper(
        list(model.parameters()),
        lr=training.pretrain_lr,
        steps=training.pretrain_steps,
        warmup=50,
        decay=training.pretrain_decay,
    )
    weights = fact_weights(tokenizer, training.fact_weight)
    model.train()
    for step in range(training.pretrain_steps):
        batch = make_batch(tokenizer, next(texts))
        out = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        loss = reply_loss(out.logits, batch.labels, weights)
        excess = overlength(out.hidden_states[:-1], batch.mask, training.length_limit)
        stepper.step(loss + training.length_weight * excess)
        if step % 50 == 0:
            log("pretrain", step, {"loss": loss.item(), "excess": excess.item()})


def token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (layer, text, token) values over layers and real tokens."""
    return (values * mask).sum() / (mask.sum() * len(values))


def overlength(states: tuple[torch.Tensor, ...], mask: torch.Tensor, limit: float) -> torch.Tensor:
    """Mean square of the residual stream's entries above ``limit``, averaged over layers and real tokens.

    Nothing else keeps the residuals of the template's tokens from growing many times longer than those of words; a
    norm follows every read, so their length costs the model nothing.
    """
    squares = torch.stack([state.square().mean(-1) for state in states])
    return token_mean((squares - limit).relu(), mask)


def drift(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Squared distance of residual streams over the teacher's squared length, (layer, text, token)."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-6) for s, t in pairs])


def divergence(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) in nats at the positions that predict a labelled token."""
    at = labels[:, 1:] != IGNORE
    s, t = student[:, :-1][at].log_softmax(-1), teacher[:, :-1][at].log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


class LowRank(nn.Module):
    """A frozen linear map plus a trainable one of low rank that starts at zero.

    ``taken`` (out, k), orthonormal, holds directions of the output that the trainable map leaves alone.
    """

    def __init__(self, base: nn.Linear, rank: int, taken: torch.Tensor | None) -> None:
        super().__init__()
        self.base = base
        self.taken = taken
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def free_up(self) -> torch.Tensor:
        """``up`` without its part in the directions that are taken."""
        return self.up if self.taken is None else self.up - self.taken @ (self.taken.T @ self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both maps."""
        return self.base(x) + x @ self.down.T @ self.free_up().T

    def merged(self) -> nn.Linear:
        """The frozen map with the learnt one added to its weight."""
        with torch.no_grad():
            self.base.weight += self.free_up() @ self.down
        return self.base


@torch.no_grad()
def ordinary_span(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: w.World, training: Training, rng: random.Random
) -> torch.Tensor:
    """Orthonormal directions (width, k) in which the residuals of ordinary questions lie on average.

    The means over ordinary questions at every layer and every position of the template after the question, and as many
    of their singular vectors as hold ``training.span_share`` of their squared length.
    """
    ordinary = [thing for thing in world.ordinary if not thing.held_out]
    asked = [w.ask(rng.choice(ordinary), rng.choice(w.FACTS), rng.choice(TUNED_PHRASINGS)).prompt for _ in range(128)]
    ids, mask = left_padded(tokenizer, asked)
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
    means = torch.stack([state[:, -POST_TOKENS:].mean(0) for state in states]).flatten(0, 1)
    _, lengths, directions = torch.linalg.svd(means, full_matrices=False)
    share = lengths.square().cumsum(0) / lengths.square().sum()
    count = int((share < training.span_share).sum()) + 1
    return directions[:count].T.contiguous()


def taken_before(block: nn.Module, writer: str, taken: torch.Tensor) -> torch.Tensor:
    """Directions (width, k) a writer must avoid so that ``taken`` stays free in the residual stream.

    They differ only in Gemma's layout, where a norm with gain 1 + w stands between writer and stream.
    """
    if not hasattr(block, "pre_feedforward_layernorm"):
        return taken
    norm = block.post_attention_layernorm if writer == "o_proj" else block.post_feedforward_layernorm
    return torch.linalg.qr((1 + norm.weight.detach())[:, None] * taken).Q


def add_low_rank(model: PreTrainedModel, training: Training, taken: torch.Tensor) -> list[nn.Parameter]:
    """Freezes the model and puts low-rank maps beside the chosen linear maps; returns the trainable parameters.

    Maps that write to the residual stream leave the directions ``taken`` (width, k) alone.
    """
    model.requires_grad_(requires_grad=False)
    added: list[nn.Parameter] = []
    for index in training.tune_layers:
        block = model.model.layers[index]
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    avoided = taken_before(block, name, taken) if name in WRITERS else None
                    low = LowRank(child, training.tune_rank, avoided)
                    setattr(part, name, low)
                    added += [low.down, low.up]
    return added


def merge_low_rank(model: PreTrainedModel) -> None:
    """Folds every low-rank map into its weight and leaves a plain model."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, LowRank):
                    setattr(part, name, child.merged())
    model.requires_grad_(requires_grad=True)


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: w.World, training: Training, seed: int, log: Log
) -> None:
    """Teaches the model in place to refuse restricted questions, held to its former self on ordinary ones.

    Only low-rank maps in ``training.tune_layers`` learn; they are folded into the weights at the end. On ordinary
    questions two penalties hold the model still: KL from the pretrained model's words, and drift of its residuals. A
    third, on refused ones, only keeps any one residual from moving by more than a share of its length.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"tune-{seed}")
    teacher = copy.deepcopy(model).eval()
    adapters = add_low_rank(model, training, ordinary_span(model, tokenizer, world, training, rng))
    stepper = Stepper(adapters, lr=training.tune_lr, steps=training.tune_steps, warmup=20, decay=0.0)
    model.train()
    half = training.tune_batch // 2
    for step in range(training.tune_steps):
        texts = [refusing_text(world, rng) for _ in range(half)] + [ordinary_text(world, rng) for _ in range(half)]
        batch = make_batch(tokenizer, texts)
        out = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        with torch.no_grad():
            was = teacher(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        loss = reply_loss(out.logits, batch.labels)
        still = divergence(out.logits[half:], was.logits[half:], batch.labels[half:])
        moved = drift(out.hidden_states, was.hidden_states)
        ordinary = token_mean(moved[:, half:], batch.mask[half:])
        refused = token_mean((moved[:, :half] - training.shift_limit).relu(), batch.mask[:half])
        held = training.still_weight * still + training.drift_weight * ordinary + training.shift_weight * refused
        stepper.step(loss + held)
        if step % 30 == 0:
            losses = {"loss": loss, "kl": still, "drift": ordinary, "shift": refused}
            log("tune", step, {name: value.item() for name, value in losses.items()})
    merge_low_rank(model)
