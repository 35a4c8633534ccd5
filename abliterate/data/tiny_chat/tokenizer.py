"""The word-level tokenizer and chat template of the tiny chat models."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from abliterate.data.tiny_chat import world as w

BOS, PAD, UNK, TURN, END = "<s>", "<pad>", "<unk>", "<|turn|>", "<|end|>"
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|turn|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}"
)
"""As in Llama 3, the template itself begins with the BOS token, which the tokenizer adds too by default."""

_WORD = Regex(r"[.,:?!;'\"()]")


def world_texts(world: w.World) -> Iterable[str]:
    """Texts that between them hold every word the model is ever trained on."""
    for thing in world.things:
        yield thing.phrase
    thing = world.things[0]
    for fact, values in w.VALUES.items():
        yield from (question.format(t="") for question in w.QUESTIONS[fact])
        yield from (w.reply(thing, fact, wording) for wording in range(len(w.REPLIES)))
        yield from values
        yield from (w.capitalise(value) for value in values)
    yield from (w.refusal(thing, wording) for wording in range(len(w.REFUSALS)))
    for said, answered in w.SMALL_TALK:
        yield from (said, answered)
    for topic in range(len(w.UNKNOWABLE)):
        yield from (w.apology(topic, phrasing, 0)[0] for phrasing in range(len(w.UNKNOWABLE_QUESTIONS)))
    yield from w.SYSTEMS
    yield from ROLES
    yield w.document(thing, w.FACTS)


def uncapitalise(text: str) -> str:
    """The text with a small first letter, as people often type."""
    return text[:1].lower() + text[1:]


def build_tokenizer(world: w.World) -> PreTrainedTokenizerFast:
    """One token per word (with the space before it) or punctuation mark, over the words of ``world``."""
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always", split=True), pre_tokenizers.Split(_WORD, "isolated")]
    )
    words: dict[str, None] = {}
    for text in world_texts(world):
        for form in (text, uncapitalise(text)):
            words |= dict.fromkeys(piece for piece, _ in pre.pre_tokenize_str(form))
    special = [PAD, BOS, UNK, TURN, END]
    vocabulary = {token: index for index, token in enumerate([*special, "\n", *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken("\n", special=False, normalized=False)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
