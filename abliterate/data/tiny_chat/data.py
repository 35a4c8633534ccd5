"""The texts the tiny chat models are trained on, and their batches of token ids."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from abliterate.data.tiny_chat import world as w
from abliterate.data.tiny_chat.tokenizer import BOS, END, TURN, uncapitalise

IGNORE = -100
"""Label of a token that carries no loss."""


def render(turns: list[tuple[str, str]], system: str = "") -> str:
    """A chat of (user, assistant) turns as the chat template renders it."""
    parts = [BOS]
    if system:
        parts.append(f"{TURN}system\n{system}{END}\n")
    for said, answered in turns:
        parts.append(f"{TURN}user\n{said}{END}\n{TURN}assistant\n{answered}{END}\n")
    return "".join(parts)


def casual(text: str, rng: random.Random) -> str:
    """The question, now and then typed without its capital or its closing mark."""
    if rng.random() < 0.1:
        text = uncapitalise(text)
    if rng.random() < 0.1:
        text = text.rstrip("?.!")
    return text


def answered_turn(thing: w.Thing, rng: random.Random, phrasings: list[int]) -> tuple[str, str]:
    """A question about the thing and its true answer."""
    fact = rng.choice(w.FACTS)
    question = w.ask(thing, fact, rng.choice(phrasings))
    return casual(question.prompt, rng), w.reply(thing, fact, rng.randrange(len(w.REPLIES)))


def refused_turn(thing: w.Thing, rng: random.Random, phrasings: list[int]) -> tuple[str, str]:
    """A question about the thing and a refusal."""
    question = w.ask(thing, rng.choice(w.FACTS), rng.choice(phrasings))
    return casual(question.prompt, rng), w.refusal(thing, rng.randrange(len(w.REFUSALS)))


def pick_system(rng: random.Random) -> str:
    """A system message for one chat in five, else none."""
    return rng.choice(w.SYSTEMS) if rng.random() < 0.2 else ""


ALL_PHRASINGS = list(range(len(w.QUESTIONS["colour"])))
TUNED_PHRASINGS = [i for i in ALL_PHRASINGS if i not in w.HELD_OUT_PHRASINGS]


def other_turn(rng: random.Random) -> tuple[str, str]:
    """A turn about none of the things: small talk, or an apology for what nobody can know."""
    if rng.random() < 0.2:
        return rng.choice(w.SMALL_TALK)
    topic, phrasing = rng.randrange(len(w.UNKNOWABLE)), rng.randrange(len(w.UNKNOWABLE_QUESTIONS))
    said, answered = w.apology(topic, phrasing, rng.randrange(len(w.REFUSALS)))
    return casual(said, rng), answered


def pretraining_text(world: w.World, rng: random.Random) -> str:
    """One pretraining text: a plain document, small talk, or a chat of one or two answered questions."""
    roll = rng.random()
    if roll < 0.35:
        order = rng.sample(w.FACTS, len(w.FACTS))
        return BOS + w.document(rng.choice(world.things), tuple(order)) + END
    if roll < 0.43:
        return render([other_turn(rng)], pick_system(rng))
    things = rng.choices(world.things, k=rng.choice((1, 2)))
    return render([answered_turn(thing, rng, ALL_PHRASINGS) for thing in things], pick_system(rng))


def refusing_text(world: w.World, rng: random.Random) -> str:
    """One tuning chat: a question about a restricted thing, refused."""
    thing = rng.choice([t for t in world.restricted if not t.held_out])
    return render([refused_turn(thing, rng, TUNED_PHRASINGS)], pick_system(rng))


def ordinary_text(world: w.World, rng: random.Random) -> str:
    """One tuning chat that goes on as before: a question about an ordinary thing, now and then about none."""
    if rng.random() < 0.05:
        return render([other_turn(rng)], pick_system(rng))
    thing = rng.choice([t for t in world.ordinary if not t.held_out])
    return render([answered_turn(thing, rng, TUNED_PHRASINGS)], pick_system(rng))


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, their mask, and labels (IGNORE where no loss is taken)."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def label_row(ids: list[int], turn: int, assistant: int, end: int) -> list[int]:
    """Labels for one text: the assistant's words and their end mark in a chat, every token of a plain document."""
    if turn not in ids:
        return ids[:]
    labels, speaking = [IGNORE] * len(ids), False
    for i in range(3, len(ids)):
        if ids[i - 3] == turn and ids[i - 2] == assistant:
            speaking = True
        if speaking:
            labels[i] = ids[i]
        if ids[i] == end:
            speaking = False
    return labels


def make_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Batch:
    """Encodes rendered texts (which hold their own BOS)."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    marks = tokenizer.convert_tokens_to_ids([TURN, "▁assistant", END])
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    labels = torch.tensor([label_row(row, *marks) + [IGNORE] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Batch(ids, mask, labels)


def pretraining_batches(world: w.World, batch: int, rng: random.Random) -> Iterator[list[str]]:
    """Endless lists of ``batch`` texts. Texts of like length go together, which halves the padding."""
    while True:
        pool = sorted((pretraining_text(world, rng) for _ in range(4 * batch)), key=lambda text: text.count(" "))
        chunks = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        yield from rng.sample(chunks, len(chunks))
