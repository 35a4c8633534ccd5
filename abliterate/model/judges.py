"""Guard models as judges of (prompt, reply) pairs.  What is known of each is data, in ``judges.toml``."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch

from abliterate.errors import CheckpointError, UsageError
from abliterate.model.devices import Device, resolve_device
from abliterate.model.load import first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSpec:
    """How a guard model is asked and what its answers mean.

    ``kind``: a *generative* model answers in words, of which the first counts; a *classifier* has labels.  ``format``
    is a text with ``{prompt}`` and ``{reply}``; None: the model's own chat template.
    """

    repo: str
    kind: Literal["generative", "classifier"]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    about: str = ""
    max_new_tokens: int = 16
    needs_format: bool = False
    format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge said, and whether that means yes; None when it is neither of the answers it should give."""

    answer: str
    positive: bool | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judge:
    """A loaded guard model.  One pair at a time: no padding, so no answer depends on its neighbours."""

    spec: JudgeSpec
    model: Any
    tokenizer: Any

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (prompt, reply)."""
        answer = self._label if self.spec.kind == "classifier" else self._words
        verdicts = []
        with torch.inference_mode():
            for prompt, reply in pairs:
                said = answer(prompt, reply)
                verdicts.append(Verdict(answer=said, positive=meaning(said, self.spec)))
        return verdicts

    def _label(self, prompt: str, reply: str) -> str:
        ids = self.tokenizer(prompt, reply, truncation="longest_first", return_tensors="pt").to(self.model.device)
        return str(self.model.config.id2label[int(self.model(**ids).logits[0].argmax())])

    def _words(self, prompt: str, reply: str) -> str:
        if self.spec.format is None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            ids = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        else:
            # not str.format: prompts and replies may hold braces
            pieces = {"{prompt}": prompt, "{reply}": reply}
            text = re.sub(r"\{prompt\}|\{reply\}", lambda found: pieces[found[0]], self.spec.format)
            ids = self.tokenizer(text, return_tensors="pt")
        asked = ids["input_ids"].to(self.model.device)
        out = self.model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=self.spec.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        return str(self.tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True)).strip()


def meaning(answer: str, spec: JudgeSpec) -> bool | None:
    """Whether the first word of a generated answer, or a label, means yes or no; None: neither."""
    said = answer.casefold()
    if spec.kind == "generative":
        words = re.findall(r"\w+", said)
        said = words[0] if words else ""
    if said in {word.casefold() for word in spec.positive}:
        return True
    return False if said in {word.casefold() for word in spec.negative} else None


@cache
def judges() -> Mapping[str, JudgeSpec]:
    """The table, by name."""
    document = tomllib.loads((files("abliterate.model") / "judges.toml").read_text("utf-8"))
    return {
        name: JudgeSpec(**{**entry, "positive": tuple(entry["positive"]), "negative": tuple(entry["negative"])})
        for name, entry in document.items()
    }


def load_judge(
    judge: str | JudgeSpec,
    *,
    place: str | None = None,
    format: str | None = None,
    device: Device = "auto",
    dtype: str = "auto",
) -> Judge:
    """Load a judge of the table by name, or one of your own; ``place`` is a folder or Hub name instead of its own.

    Raises:
        UsageError: there is no such judge, or it needs a format and none is given, or the format lacks a place.
        CheckpointError: transformers cannot load the model.
    """
    spec = judges().get(judge) if isinstance(judge, str) else judge
    if spec is None:
        raise UsageError(f"{judge}: no such judge", f"there are: {', '.join(judges())}")
    spec = replace(spec, format=format or spec.format)
    if spec.needs_format and spec.format is None:
        raise UsageError(f"{spec.repo}: needs the text it was trained with", "give it, with {prompt} and {reply}")
    if spec.format is not None and not ("{prompt}" in spec.format and "{reply}" in spec.format):
        raise UsageError(f"{spec.repo}: the format has no {{prompt}} or no {{reply}}", "put both where they belong")
    import transformers

    kinds = {
        "generative": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }
    where = place or spec.repo
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        model = kinds[spec.kind].from_pretrained(where, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: transformers cannot load it ({first_line(error)})", "check the name, your rights and the network"
        ) from error
    return Judge(spec=spec, model=model.to(resolve_device(device)).eval(), tokenizer=tokenizer)
