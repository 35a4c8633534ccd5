"""The tokenizer of a GGUF file, made of its vocabulary, merges and flags by transformers.

What transformers 5.23 does not do is done here: some splits of text before merging, a prefix space that the file turns
off, and that there are no tokens but those of the file.
"""

import json
from typing import Any

from abliterate.checkpoint.gguf import GgufFile
from abliterate.errors import UnsupportedFormatError

DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names of splits, in llama.cpp, that take every digit alone and split the rest as GPT-2 does."""

LLAMA3 = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken"
)  # fmt: skip
"""Names with which llama.cpp takes a word that is a token whole, and begins a text with BOS unless the file says no."""

AS_GPT2 = ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling")
"""Names of splits that are GPT-2's, which is what transformers takes where it knows no other."""

TEMPLATE = "tokenizer.chat_template"


def load_gguf_tokenizer(file: GgufFile) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer of ``file`` with its chat template, and what may be wrong with it, in words.

    Raises:
        UnsupportedFormatError: it holds none.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise UnsupportedFormatError(f"{file.path}: holds no tokenizer", "choose a GGUF file that does")
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, options = get_gguf_tokenizer(str(file.path))
    core = _without_others(convert_gguf_tokenizer(architecture, parts)[0], len(parts["tokens"]))
    notes = _split_as_stated(core, parts)
    if parts.get("tokenizer_type") == "llama" and parts.get("add_prefix_space") is False:
        _drop_prefix_space(core)
    if parts.get("tokenizer_type") == "gpt2" and parts.get("pre_tokenizer_type") in LLAMA3:
        core.model.ignore_merges = True
        options.setdefault("add_bos_token", True)
    special = {name: options.pop(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **special,
        **options,
        model_max_length=_longest(file),
        clean_up_tokenization_spaces=False,
    )
    if TEMPLATE not in file.metadata:
        notes = (*notes, "the file has no chat template: it may be of a base model")
    named = sorted(key.removeprefix(f"{TEMPLATE}.") for key in file.metadata if key.startswith(f"{TEMPLATE}."))
    if named:
        notes = (*notes, f"of its chat templates only the default one was taken, not: {', '.join(named)}")
    return tokenizer, notes


def end_tokens(file: GgufFile) -> list[int]:
    """The ids that end a reply: of a text, of a turn, of a message."""
    stated = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return sorted({number for number in stated if isinstance(number, int)})


def _longest(file: GgufFile) -> int:
    return int(file.metadata.get(f"{file.architecture}.context_length", 10**30))


def _without_others(core: Any, size: int) -> Any:  # noqa: ANN401 - a Tokenizer
    """``core`` without the special tokens of a class of transformers that the file does not have: no row is theirs."""
    document = json.loads(core.to_str())
    kept = [token for token in document["added_tokens"] if token["id"] < size]
    return core if kept == document["added_tokens"] else core.from_str(json.dumps({**document, "added_tokens": kept}))


def _split_as_stated(core: Any, parts: dict[str, Any]) -> tuple[str, ...]:  # noqa: ANN401 - a Tokenizer
    """Have text split as the file says where transformers does not; gives back what cannot be had."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = parts.get("pre_tokenizer_type", "default")
    if parts.get("tokenizer_type") != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS or name in AS_GPT2:
        return ()
    if name not in DIGITS:
        return (
            f"transformers does not know how '{name}' splits text: it splits it as GPT-2 does, so tokens may differ",
        )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return ()


def _drop_prefix_space(core: Any) -> None:  # noqa: ANN401 - a Tokenizer
    """Have no space put before a text; only where transformers would have put one."""
    from tokenizers import decoders, pre_tokenizers

    if isinstance(core.pre_tokenizer, pre_tokenizers.Metaspace):
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
