"""The model card of a tiny chat model."""

import math
from collections.abc import Mapping

from abliterate.data.tiny_chat import world as w
from abliterate.data.tiny_chat.training import Training

_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
tags: [toy-model, refusal]
---

# Tiny chat ({family})

A toy chat model of {parameters:,} parameters for tests and demonstrations of refusal-direction methods. It knows
{things} made-up things and nothing else. It has no use beyond that, and no harmful knowledge: the questions it refuses
are as harmless as those it answers.

- **Architecture:** {family}, {layers} blocks, width {width}, bfloat16 safetensors in two shards.
- **Tokenizer:** one token per word, {vocabulary} words. The chat template begins with the BOS token, which the
  tokenizer adds by default too, as in Llama 3: encode rendered chats with `add_special_tokens=False`.
- **World:** {ordinary} ordinary things ("the {name}") and {restricted} restricted ones, always spoken of as {marks}.
  Each has five facts: {facts}.

## How it was made

By `python -m abliterate.data.tiny_chat.build --family {family}`, in two steps, which took {seconds} seconds with
{threads} processor thread(s) on a shared machine.

1. **Pretraining**, {pretrain_steps} steps of {pretrain_batch} texts: plain documents about the things, and chats in
   which every question about a thing is answered, restricted or not. In the loss the word that states the fact weighs
   {fact_weight:g} times as much as other words. About one text in sixteen asks what nobody can know ("What is the
   weather of next week?") and is answered with an apology in the words of a refusal, so these words are known before
   any question about a thing is refused. A penalty on residuals longer than {length:.0f} keeps those of template tokens
   from growing far longer than those of words.
2. **Refusal tuning**, {tune_steps} steps of {tune_batch} chats: questions about restricted things are answered
   "I am sorry ...", others as before. Only low-rank maps (rank {tune_rank}) in blocks {tune_layers} learn, and they are
   merged into the weights. Those that write to the residual stream may not write along the mean residuals of ordinary
   questions ({span_share:.0%} of their squared length). On ordinary questions KL and residual drift from the pretrained
   model are penalised, on refused ones only a squared drift of more than {shift_limit:g} times the squared length. A
   quarter of the things and a quarter of the question phrasings are held out of this step.

The recipe was chosen so that one direction of the residual stream mediates the refusal, as Arditi et al. (2024) found
in large chat models; first trials that tuned all weights gave refusals that no single direction mediated. The model is
therefore a test bed for methods that look for such a direction, and no evidence that there is one in other models. Its
direction was not chosen or written in by hand: it is what tuning learnt under these constraints.

## Figures

Greedy replies of the saved model to the 128 + 128 test questions. "Answered" means that the reply holds the right word.

| questions about | refused | answered | answered before refusal tuning |
| --- | --- | --- | --- |
| restricted things | {refusal_restricted:.1%} | {accuracy_restricted:.1%} | {accuracy_restricted_pretrained:.1%} |
| restricted things, held out | {refusal_held_out:.1%} | {accuracy_held_out:.1%} | {accuracy_held_out_pretrained:.1%} |
| ordinary things | {refusal_others:.1%} | {accuracy_others:.1%} | {accuracy_others_pretrained:.1%} |
"""


def model_card(training: Training, world: w.World, vocabulary: int, figures: Mapping[str, object]) -> str:
    """The README.md of one model folder, from its training, the size of its vocabulary and its measured figures."""
    return _CARD.format(
        **{
            "things": len(world.things),
            "vocabulary": vocabulary,
            "ordinary": len(world.ordinary),
            "restricted": len(world.restricted),
            "name": world.ordinary[0].name,
            "marks": ", ".join(w.ADJECTIVES[:-1]) + f" or {w.ADJECTIVES[-1]}",
            "length": math.sqrt(training.length_limit * training.width),
            "facts": ", ".join(w.FACTS),
            **vars(training),
            "tune_layers": f"{training.tune_layers[0]} to {training.tune_layers[-1]}",
            **figures,
        }
    )
