"""One model of the study of selection metrics: its prompts, its candidates, and what each candidate does.

What is kept of a candidate is one JSON file of numbers and of classes of replies, so that a stopped study goes on.  No
reply is kept but the tokens of refusals and of answers to harmless prompts that the base gave.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.source import open_folder
from abliterate.evaluate.replies import classify
from abliterate.method.directions import Candidate
from abliterate.method.estimators import difference_of_means
from abliterate.method.moments import ActivationStats, Moments
from abliterate.method.selection_metrics import (
    commonest_opening,
    cosmic,
    cosmic_of_means,
    evaluation_layers,
    first_token,
    forced,
    set_mass,
    sets_by_position,
)
from abliterate.method.statistics import kl_nats
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import padding_is_harmless
from abliterate.model.interventions import added
from abliterate.model.load import LoadedModel, load_model
from abliterate.model.measuring import measure_class
from abliterate.model.prompts import ContrastSet, SplitSizes, contrast_set
from abliterate.model.rowwise import subspaces_ablated
from bench.metric_rows import Rows, run_rows

TRAIN = 64
BATCH = 160
"""Rows of a batch: decoding 160 takes little longer than decoding 32."""
ANSWERED = ("val", "test", "others", "damage")
"""To which prompts replies are written under ablation."""
OPENINGS = {"refusal": ("harmful_train", "refused"), "answer": ("harmless_train", "complied")}
K = 8
REPLY_TOKENS = 32
DAMAGE_TOKENS = 16
LATE = 0.8
LATE_CANDIDATES = 4
MIN_SHARE = 0.05
"""A first token counts as one of refusals when it begins this share of them (as in ``evaluate.refusal_tokens``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many prompts each thing is measured on, at most."""

    refused_val: int = 20
    refused_test: int = 24
    others: int = 4
    harmless_val: int = 16
    induced: int = 8
    damage: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt, the class of the base's reply to it, and the tokens of that reply (none of what a harmful one got)."""

    prompt: str
    kind: str
    tokens: tuple[int, ...]


@dataclass(kw_only=True)
class Study:
    """A model with all that its candidates are measured on.  ``folder`` keeps what is finished."""

    name: str
    loaded: LoadedModel
    chat: ChatFormat
    contrast: ContrastSet
    folder: Path
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    # --- prompts and the base's replies -------------------------------------------------------------------------------

    @cached_property
    def labelled(self) -> dict[str, list[Answered]]:
        """The prompts of every part with what the base replies.

        Half of the training prompts give the direction, and a quarter of them are added to the validation prompts.
        """
        sets = self.contrast
        train_harmful, train_harmless = sets.harmful_train.texts, sets.harmless_train.texts
        parts = {
            "harmful_train": train_harmful[:TRAIN],
            "harmful_val": [*sets.harmful_val.texts, *train_harmful[TRAIN : TRAIN + 32]],
            "harmful_test": sets.harmful_test.texts[:64],
            "harmless_train": train_harmless[:TRAIN],
            "harmless_val": sets.harmless_val.texts[:24],
            "harmless_test": sets.harmless_test.texts[:16],
        }
        found = {}
        for name, texts in parts.items():
            kept = self.kept(f"base-{name}", lambda texts=texts: self.base_replies(texts))
            found[name] = [
                Answered(prompt=prompt, kind=kind, tokens=tuple(tokens))
                for prompt, (kind, tokens) in zip(texts, kept, strict=True)
            ]
        return found

    def base_replies(self, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """The class of each reply and its tokens; no tokens of a reply that neither refuses nor answers a question."""
        harmful = set(prompts) & {
            *self.contrast.harmful_train.texts, *self.contrast.harmful_val.texts, *self.contrast.harmful_test.texts
        }  # fmt: skip
        return [
            (kind, tokens if kind == "refused" or prompt not in harmful else [])
            for prompt, (kind, tokens) in zip(prompts, self.replies(prompts), strict=True)
        ]

    def replies(self, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Greedy replies: their classes and tokens, without what follows their end."""
        found = []
        for first in range(0, len(prompts), BATCH):
            some = prompts[first : first + BATCH]
            rows = run_rows(self.loaded, [self.chat.encode(prompt) for prompt in some], self.chat.pad_id)
            replies = rows.greedy(REPLY_TOKENS, self.ends)
            found += [(self.kind(*turn), turn[1]) for turn in zip(some, replies, strict=True)]
        return found

    @cached_property
    def ends(self) -> set[int]:
        """The tokens that end a reply."""
        stops = self.loaded.model.generation_config.eos_token_id
        return {self.chat.pad_id, *(stops if isinstance(stops, list) else [stops])} - {None}

    def kind(self, prompt: str, reply: Sequence[int]) -> str:
        """The class of a reply."""
        return classify(prompt, str(self.chat.tokenizer.decode(reply, skip_special_tokens=True)).strip())

    def some(self, part: str, kind: str, most: int, tokens: int) -> list[Answered]:
        """The first prompts of ``part`` that got a reply of ``kind`` with at least so many tokens."""
        fitting = [one for one in self.labelled[part] if one.kind == kind and len(one.tokens) >= tokens]
        return fitting[:most]

    # --- openings -----------------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Tokens of an opening: eight, or as many as nine in ten replies of this model have."""
        found = {}
        for name, (part, kind) in OPENINGS.items():
            lengths = sorted(len(one.tokens) for one in self.labelled[part] if one.kind == kind)
            found[name] = min(K, lengths[len(lengths) // 10])
        return found

    @cached_property
    def openings(self) -> dict[str, list[tuple[int, ...]]]:
        """The first tokens of the refusals and of the answers to training prompts."""
        return {
            name: [one.tokens[:k] for one in self.some(*OPENINGS[name], TRAIN, k)] for name, k in self.lengths.items()
        }

    @cached_property
    def sets(self) -> tuple[tuple[frozenset[int], ...], tuple[frozenset[int], ...]]:
        """The tokens of refusals at each place, and those of answers that are not among them."""
        refusing, answering = (sets_by_position(self.openings[name], self.lengths["refusal"]) for name in OPENINGS)
        return refusing, tuple(b - a for a, b in zip(refusing, answering, strict=True))

    @cached_property
    def refusal_tokens(self) -> list[int]:
        """First tokens of refusals that begin answers less often."""
        refusals, answers = (
            [its[0] for its in self.openings["refusal"]],
            [its[0] for its in self.openings["answer"]],
        )
        return [
            token
            for token in sorted(set(refusals))
            if refusals.count(token) / len(refusals) >= MIN_SHARE
            and refusals.count(token) / len(refusals) > answers.count(token) / len(answers)
        ]

    # --- candidates ---------------------------------------------------------------------------------------------------

    @cached_property
    def measured(self) -> tuple[Candidate, ...]:
        """All candidates: differences of means over refused harmful and answered harmless training prompts."""
        prompts = {
            "harmful": [one.prompt for one in self.labelled["harmful_train"] if one.kind == "refused"],
            "harmless": [one.prompt for one in self.labelled["harmless_train"] if one.kind == "complied"],
        }
        moments = {
            kind: Moments(
                count=len(texts),
                mean=measure_class(self.loaded, self.chat, texts, batch_size=BATCH, task="measure")["mean"],
            )
            for kind, texts in prompts.items()
        }
        return difference_of_means(ActivationStats(positions=self.chat.positions, moments=moments))

    def spread(self, count: int) -> list[Candidate]:
        """``count`` candidates, evenly over layers and positions: all but four of layers below 0.8 L."""
        usable = sorted(
            (one for one in self.measured if one.everywhere.usable and one.layer > 0),
            key=lambda one: (one.layer, one.position or 0),
        )
        early = [one for one in usable if one.layer < int(LATE * self.loaded.n_layers)]
        late = [one for one in usable if one.layer >= int(LATE * self.loaded.n_layers)]
        return [*evenly(early, count - LATE_CANDIDATES), *evenly(late, LATE_CANDIDATES)]

    # --- what a candidate does ----------------------------------------------------------------------------------------

    @cached_property
    def asked(self) -> dict[str, list[Answered]]:
        """The prompts that every candidate is run on."""
        sizes, refusal, answer = self.sizes, self.lengths["refusal"], self.lengths["answer"]
        return {
            "val": self.some("harmful_val", "refused", sizes.refused_val, refusal),
            "test": self.some("harmful_test", "refused", sizes.refused_test, refusal),
            "others": self.some("harmful_test", "complied", sizes.others, 0),
            "metric": self.some("harmless_val", "complied", sizes.harmless_val, answer),
            "damage": self.some("harmless_test", "complied", sizes.damage, answer),
        }

    def missing(self, candidates: Sequence[Candidate | None]) -> list[Candidate | None]:
        """Those of which no file is kept."""
        return [one for one in candidates if not (self.folder / f"{file_name(one)}.json").exists()]

    def run(self, candidates: Sequence[Candidate | None]) -> None:
        """Work out and keep what is told of ``candidates``, all at once under their ablations."""
        began, n = time.monotonic(), len(candidates)
        count = sum(map(len, self.asked.values()))
        with taken_out(self.loaded, candidates):
            encoded = [self.chat.encode(one.prompt) for some in self.asked.values() for one in some]
            rows = run_rows(self.loaded, encoded, self.chat.pad_id, copies=n)
            # The rows of a candidate stay together: its ablation finds them by their place.
            places = {name: [c * count + place for c in range(n) for place in its] for name, its in self.places.items()}
            harmful = self.contrasted(rows.of(places["val"]), [one.tokens for one in self.asked["val"]] * n)
            kls = {name: self.kls(rows.of(places[name]), name) for name in ("metric", "damage")}
            answered = [c * count + place for c in range(n) for name in ANSWERED for place in self.places[name]]
            kinds = self.kinds(rows.of(answered).greedy(REPLY_TOKENS, self.ends))
        states = rows.states[places["val"]].view(n, -1, *rows.states.shape[1:])
        for c, one in enumerate(candidates):
            found = {
                "candidate": "none" if one is None else one.id,
                "layer": -1 if one is None else one.layer,
                "position": 0 if one is None else one.position,
                "harmful": {name: part(its, c, n) for name, its in harmful.items()},
                "kl": {name: part(its, c, n) for name, its in kls.items()},
                "replies": kinds[c],
                **self.induced(one, states[c]),
            }
            self.kept(file_name(one), lambda found=found: {**found, "seconds": (time.monotonic() - began) / n})

    def kept_of(self, candidate: Candidate | None) -> dict[str, Any]:
        """What ``run`` kept."""
        return json.loads((self.folder / f"{file_name(candidate)}.json").read_text("utf-8"))

    @cached_property
    def places(self) -> dict[str, range]:
        """Where the prompts of each kind are among all."""
        found, first = {}, 0
        for name, its in self.asked.items():
            found[name] = range(first, first + len(its))
            first += len(its)
        return found

    def kinds(self, replies: Sequence[Sequence[int]]) -> list[dict[str, list[str]]]:
        """The classes of replies, by what was asked, for each candidate."""
        asked = [(name, one.prompt) for name in ANSWERED for one in self.asked[name]]
        found = []
        for first in range(0, len(replies), len(asked)):
            kinds: dict[str, list[str]] = {name: [] for name in ANSWERED}
            for (name, prompt), reply in zip(asked, replies[first : first + len(asked)], strict=True):
                kinds[name].append(self.kind(prompt, reply))
            found.append(kinds)
        return found

    def induced(self, candidate: Candidate | None, ablated: Tensor) -> dict[str, Any]:
        """Figures on harmless validation prompts with the candidate added at its layer; COSMIC's cosines."""
        some = self.asked["metric"][: self.sizes.induced]
        refusal = commonest_opening(self.openings["refusal"], self.lengths["refusal"])
        with put_in(self.loaded, candidate):
            rows = run_rows(self.loaded, [self.chat.encode(one.prompt) for one in some], self.chat.pad_id)
            figures = self.contrasted(rows, [refusal] * len(some))
        harmful, harmless = self.means
        layers = list(evaluation_layers(harmful, harmless))
        given = ablated[:, layers], rows.states[:, layers], harmful[layers], harmless[layers]
        return {"induced": figures, "cosmic": cosmic(*given), "cosmic_of_means": cosmic_of_means(*given)}

    def contrasted(self, rows: Rows, refusals: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
        """Figures of each prompt behind which stand its refusal and the commonest answer."""
        tails = [tuple(refusal[: self.lengths["refusal"]]) for refusal in refusals]
        answer = commonest_opening(self.openings["answer"], self.lengths["answer"])
        along = rows.of(range(len(tails))).forced(tails)
        beside = rows.forced([answer] * len(tails))
        return {
            "first_token": [float(first_token(its[0], self.refusal_tokens)) for its in along],
            "refusal": [forced(*pair).tolist() for pair in zip(along, map(torch.tensor, tails), strict=True)],
            "refusing": [set_mass(its, self.sets[0]).tolist() for its in along],
            "answering": [set_mass(its, self.sets[1]).tolist() for its in along],
            "answer": [forced(its, torch.tensor(answer)).tolist() for its in beside],
        }

    def kls(self, rows: Rows, name: str) -> list[list[float]]:
        """KL to the base along the base's own answers, token by token, for each row."""
        tails = self.tails(name)
        n = len(rows.mask) // len(tails)
        pairs = zip(self.base_log_probs[name] * n, rows.forced(tails * n), strict=True)
        return [kl_nats(base, other).tolist() for base, other in pairs]

    def tails(self, name: str) -> list[tuple[int, ...]]:
        """The tokens of the base's answers along which a KL is taken."""
        tokens = {"metric": self.lengths["answer"], "damage": DAMAGE_TOKENS}[name]
        return [one.tokens[:tokens] for one in self.asked[name]]

    @cached_property
    def base_log_probs(self) -> dict[str, list[Tensor]]:
        """The base's distributions along its own answers."""
        return {
            name: run_rows(
                self.loaded, [self.chat.encode(one.prompt) for one in self.asked[name]], self.chat.pad_id
            ).forced(self.tails(name))
            for name in ("metric", "damage")
        }

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean residuals at the last token of the validation prompts: refused harmful, answered harmless."""
        first, second = (
            run_rows(self.loaded, [self.chat.encode(one.prompt) for one in self.asked[name]], self.chat.pad_id)
            for name in ("val", "metric")
        )
        return first.states.mean(0), second.states.mean(0)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - plain data
        """What ``make`` gives, from the file of an earlier call where there is one."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(make()), "utf-8")
            partial.replace(path)
        return json.loads(path.read_text("utf-8"))


def open_study(name: str, folder: Path, prompts: str, *, dtype: str, work: Path) -> Study:
    """A study of the model in ``folder``."""
    loaded = load_model(open_folder(folder, name=name), device="cpu", dtype=dtype)
    chat = ChatFormat(loaded.tokenizer, name=name)
    chat.pads = padding_is_harmless(loaded, chat.encode("What is the capital of France?"), chat.pad_id)
    sets = contrast_set(prompts, prompts, sizes=SplitSizes())
    return Study(name=name, loaded=loaded, chat=chat, contrast=sets, folder=work / name)


def file_name(candidate: Candidate | None) -> str:
    """Under which a candidate is kept."""
    return "candidate" + ("none" if candidate is None else candidate.id.replace("/", "_"))


def part(rows: Sequence[Any], place: int, count: int) -> list[Any]:
    """One of ``count`` equal stretches of ``rows``."""
    size = len(rows) // count
    return list(rows[place * size : (place + 1) * size])


def evenly(some: Sequence[Candidate], count: int) -> list[Candidate]:
    """``count`` of ``some`` at equal distances, the first and the last among them."""
    if len(some) <= count:
        return list(some)
    return [some[round(place * (len(some) - 1) / (count - 1))] for place in range(count)]


@contextmanager
def taken_out(loaded: LoadedModel, candidates: Sequence[Candidate | None]) -> Iterator[None]:
    """With each of ``candidates`` ablated in its stretch of the rows; the base stands alone."""
    if None in candidates:
        yield
        return
    with subspaces_ablated(loaded, [one.everywhere for one in candidates if one is not None]):
        yield


@contextmanager
def put_in(loaded: LoadedModel, candidate: Candidate | None) -> Iterator[None]:
    """With ``candidate`` added at its layer, if there is one."""
    if candidate is None:
        yield
        return
    with added(loaded, candidate.everywhere.added, candidate.layer):
        yield
