"""What others wrote: code of a repository, tokenizers of all kinds, prompts, the card of a base, names in a report."""

import gzip
import json
import shutil
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from abliterate.checkpoint.source import open_folder
from abliterate.data.tiny_chat import model_path
from abliterate.errors import PromptError
from abliterate.evaluate.page import render
from abliterate.model import prompt_rows, sentencepiece
from abliterate.model.load import load_model, load_tokenizer
from abliterate.model.prompts import load_prompts
from abliterate.model.replying import generate
from abliterate.model.thinking import DEFAULT
from abliterate.publishing import manifest
from abliterate.publishing.card import write_card
from abliterate.recipe import Recipe, load_recipe
from abliterate.workflow.session import open_session
from tests import factories, qwen1
from tests.edge_tools import SOURCES, done, refused, rewrite
from tests.pushing import finished
from tests.test_report import directions, evaluation  # noqa: F401 - fixtures


@pytest.fixture
def model(tmp_path):
    """A copy of the bundled model, to be changed."""
    return shutil.copytree(model_path(), tmp_path / "model")


# --- code of a repository ---------------------------------------------------------------------------------------------

CODE = {
    "config.json": ("AutoConfig", "modeling_qwen.QWenConfig"),
    "tokenizer_config.json": ("AutoTokenizer", ["tokenization_qwen.QWenTokenizer", None]),
}


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    """Qwen 1 as its repositories are: each of its modules leaves a mark where it is imported."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = factories.save(factories.build("qwen"), tmp_path / "qwen", dtype=torch.float32)
    mark = f"\nfrom pathlib import Path\nPath({str(tmp_path)!r}, 'ran').touch()\n"
    (folder / "modeling_qwen.py").write_text(Path(qwen1.__file__).read_text("utf-8") + mark)
    for name in ("tokenization_qwen.py", "setup.py", "__init__.py", "conftest.py", "qwen_generation_utils.py"):
        (folder / name).write_text(mark)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(mark + "\ndef generate(**_): pass\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_path() / name, folder)
    models = {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    for name, (auto, place) in CODE.items():
        rewrite(folder / name, auto_map={auto: place, **(models if name == "config.json" else {})})
    rewrite(folder / "tokenizer_config.json", tokenizer_class="QWenTokenizer")
    return folder


ASKING = ("--harmful", "bundled:tiny-chat", "--harmless", "bundled:tiny-chat")


def test_code_of_a_repository_is_not_run_unasked(qwen, tmp_path):
    direction, out = factories.save_direction(48, tmp_path / "d.safetensors"), tmp_path / "out"
    done("plan", qwen)
    done("edit", qwen, direction, "--out", out)
    done("verify", out, "--bytes-only")
    done("diff", qwen, out)
    for command in (
        ("measure", qwen, *ASKING), ("select", qwen, direction, *ASKING), ("run", qwen, *ASKING, "--out", "o"),
        ("verify", out, *ASKING), ("eval", qwen, out, *ASKING), ("inspect", qwen, direction, *ASKING),
        ("chat", qwen, "-p", "hi"), ("compare", out, qwen, *ASKING),
    ):  # fmt: skip
        said = refused(2, "needs code from its own repository", *command)
        assert "--trust-remote-code" in said
    assert (out / "modeling_qwen.py").read_bytes() == (qwen / "modeling_qwen.py").read_bytes()
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "modules").exists()


def test_a_recipe_of_somebody_else_does_not_ask_for_it(qwen, tmp_path):
    out = tmp_path / "out"
    direction = factories.save_direction(48, tmp_path / "d.safetensors")
    done("edit", qwen, direction, "--out", out)
    document = json.loads((out / "abliterate.json").read_text())
    document["recipe"]["model"]["trust_remote_code"] = True
    (out / "abliterate.json").write_text(json.dumps(document))
    refused(2, "needs code from its own repository", "verify", out, *ASKING)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_repository_is_run_where_it_is_allowed(qwen, tmp_path):
    """Or the tests above would prove nothing."""
    rewrite(qwen / "tokenizer_config.json", tokenizer_class="TokenizersBackend", auto_map={})
    loaded = load_model(open_folder(qwen, name="qwen"), device="cpu", trust_remote_code=True)
    assert loaded.n_layers == 3
    assert (tmp_path / "ran").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece_file():
    """As the library writes it: pieces with their scores and kinds, then what kind of model it is."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    words = [*"▁abcdefghijklmnopqrstuvwxyzWGI?", "▁t", "he", "▁the", "▁a", "la", "▁la", "ke", "▁lake"]
    pieces = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + bytes(4) + b"\x18" + bytes([kind])) for text, kind in special
    )
    pieces += b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -float(place)))
        for place, text in enumerate(words)
    )
    return pieces + field(2, b"\x18\x02" + b"\x98\x02\x01") + field(3, field(1, b"identity"))


@pytest.fixture
def spm(model):
    """The bundled model with a tokenizer as that of Llama 2 was first published: tokenizer.model alone."""
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(sentencepiece_file())
    rewrite(model / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    return model


@pytest.mark.parametrize("missing", sentencepiece.NEEDED)
def test_a_tokenizer_of_sentencepiece_without_its_library(missing, spm, monkeypatch):
    monkeypatch.setattr(sentencepiece, "_is_installed", lambda name: name != missing)
    said = refused(2, "tokenizer.model: a tokenizer of SentencePiece", "measure", spm, *ASKING)
    assert "pip install sentencepiece protobuf" in said


def test_a_tokenizer_of_sentencepiece(spm):
    pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(spm)
    assert tokenizer.tokenize("the lake") == ["▁the", "▁lake"]
    session = open_session(spm, Recipe(**SOURCES))
    assert session.encoder_in(DEFAULT).encode("the lake")


@pytest.mark.parametrize("data", [b"IQ== 0\nIg== 1\n", b""], ids=["tiktoken", "empty"])
def test_another_tokenizer_of_that_name(data, spm):
    """It is refused, whether what might read it is installed or not."""
    (spm / "tokenizer.model").write_bytes(data)
    sentencepiece.check_sentencepiece(spm)
    refused(5, "", "measure", spm, *ASKING)


def test_a_tokenizer_that_drops_all_text(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    words = {**tokenizer["model"], "vocab": {"What": 0}, "unk_token": "none"}
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": words}))
    refused(2, "its tokenizer fails", "measure", model, *ASKING)
    pieces = {"type": "BPE", "vocab": {}, "merges": []}
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": pieces}))
    refused(5, "its tokenizer makes the same of every prompt", "measure", model, *ASKING)


@pytest.mark.parametrize("without", [("bos",), ("eos",), ("pad",), ("bos", "eos", "pad")], ids="+".join)
def test_a_tokenizer_without_its_special_tokens(without, model):
    rewrite(model / "tokenizer_config.json", **{f"{name}_token": None for name in without})
    session = open_session(model, Recipe(**SOURCES))
    tokenizer = session.loaded.tokenizer
    assert all(getattr(tokenizer, f"{name}_token_id") is None for name in without)
    assert 0 <= session.chat.pad_id < 623
    replies = generate(session.loaded, session.chat, ["Hi", "What is the name of the lake?"], max_new_tokens=3)
    assert len(replies) == 2


@pytest.mark.parametrize("content", [None, "{}", '{"eos_token_id": [1, 2]}', '{"temperature": NaN}', "[]", "{", ""])
def test_a_generation_config_of_any_kind(content, model):
    path = model / "generation_config.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    if content == "[]":
        refused(5, "", "measure", model, *ASKING)
        return
    session = open_session(model, Recipe(**SOURCES))
    assert generate(session.loaded, session.chat, ["Hi"], max_new_tokens=2)


# --- prompts ----------------------------------------------------------------------------------------------------------

CONTROLS = "a\x00b\x07\x1b[2J\x1b]0;t\x07\u202eright\u2028to left\x85"


@pytest.mark.parametrize("name", ["p:1.txt", "a=b.txt", "p 😀.txt", "-p.txt", "x@y.txt", "p#1.txt"])
def test_a_prompt_file_of_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("one\ntwo\n", "utf-8")
    given = f"./{name}" if "=" in name else name
    assert load_prompts(given).texts == ["one", "two"]
    assert load_prompts(str(tmp_path / name)).texts == ["one", "two"]


def test_control_characters_are_prompts_and_no_commands(model, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{CONTROLS} {n}"}) + "\n" for n in range(9)))
    found = load_prompts(str(path))
    assert found.texts[0] == f"{CONTROLS} 0"
    session = open_session(model, Recipe(**SOURCES))
    assert all(session.encoder_in(DEFAULT).encode(text) for text in found.texts)
    shown = refused(2, "", "measure", "tiny-chat", "--harmful", path, "--harmless", path)
    assert not set("\x00\x07\x1b\x85") & set(shown)


@pytest.mark.parametrize("where", ["prompt", "answer", "category"])
def test_half_a_character_in_a_prompt_is_named(where, tmp_path):
    """What JSON holds that was cut in the middle of an emoji; no tokenizer and no file takes it."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "whole"}\n' + json.dumps({"prompt": "p", where: "cut \ud83d"}) + "\n")
    with pytest.raises(PromptError, match=r"p\.jsonl: row 2 holds half a character"):
        load_prompts(str(path))
    path.write_text(json.dumps({"prompt": "p", where: "whole \U0001f600"}) + "\n")
    assert load_prompts(str(path)).sha256


def test_a_line_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "p"}\n{"prompt": ' + "[" * 20000 + "\n")
    with pytest.raises(PromptError, match="row 2 is no JSON"):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_a_small_file_that_unpacks_to_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_rows, "MOST_UNPACKED", 1000)
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"x" * 1000))
    assert load_prompts(str(tmp_path / "p.txt.gz")).texts == ["x" * 1000]
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"x" * 10**6))
    with pytest.raises(PromptError, match=r"p\.txt\.gz: unpacks to more than 1\.0 kB"):
        load_prompts(str(tmp_path / "p.txt.gz"))


def test_a_prompt_in_the_place_of_a_file():
    refused(2, "no such prompt file", "measure", "tiny-chat", "--harmful", "How do I? " * 90, "--harmless", "x.txt")


def test_a_recipe_with_any_text_is_read_back(tmp_path):
    text = '😀 \x7f \x01 " \\ \n\t \u2028 ü'
    recipe = Recipe(system=text, harmful="p 😀.txt", harmless="b", title=text)
    (tmp_path / "r.toml").write_text(recipe.to_toml(), "utf-8")
    assert load_recipe(str(tmp_path / "r.toml")) == recipe


# --- the card of a base -----------------------------------------------------------------------------------------------

BOMB = "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(12))
CARDS = {
    "norwegian": (b"---\nlanguage: no\nlicense: mit\n---\n", {"language": "no", "license": "mit"}),
    "norwegian and others": (b"---\nlanguage:\n- en\n- no\n---\n", {"language": ["en", "no"]}),
    "numbers": (b"---\nlicense: 2.0\nlanguage: 1\n---\n", {}),
    "a date": (b"---\nlicense: 2020-01-01\n---\n", {"license": "2020-01-01"}),
    "html": (b"---\nlicense: <script>alert(1)</script>\n---\n<script>", {"license": "<script>alert(1)</script>"}),
    "a block in a value": (b'---\nlicense: "x\\n---\\n# Injected\\n"\n---\n', {"license": "x\n---\n# Injected\n"}),
    "keys that are no text": (b"---\n1: x\nnull: y\n[a, b]: z\nlicense: mit\n---\n", {}),
    "of our own": (b"---\nignore_metadata_errors: 1\nself: 2\nbase_model: {}\nlicense: mit\n---\n", {"license": "mit"}),
    "no objects": (b"---\nlicense: {a: b}\nlanguage: [[en]]\nlicense_name: mine\n---\n", {"license_name": "mine"}),
    "gated": (b"---\nextra_gated_fields: {Name: text, I agree: checkbox}\n---\n",
              {"extra_gated_fields": {"Name": "text", "I agree": "checkbox"}}),
    "a bomb": (f"---\n{BOMB}extra_gated_fields: *a11\n---\n".encode(), {}),
    "a circle": (b"---\nextra_gated_fields: &a [*a]\nlicense: mit\n---\n", {}),
    "depth": (b"---\nextra_gated_fields: " + b"[" * 5000 + b"\n---\n", {}),
    "tags": (b"---\nlicense: !!python/object/apply:os.system ['touch ran']\n---\n", {}),
    "a list": (b"---\n- license\n---\n", {}),
    "no block": (b"# Base\n", {}),
    "no text": (bytes(range(256)), {}),
    "empty": (b"", {}),
    "a byte order mark": ("\ufeff---\nlicense: mit\n---\n".encode(), {"license": "mit"}),
    "carriage returns": (b"---\r\nlicense: mit\r\n---\r\n# B\r\n", {"license": "mit"}),
    "a model index": (b"---\nlicense: mit\nmodel-index:\n- name: x\n  results: nonsense\n---\n", {"license": "mit"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A finished folder: its base, and its manifest."""
    out = finished(tmp_path_factory.mktemp("card"), verified=False, shards=None)
    return out.parent / "base", manifest.read(out)


@pytest.mark.parametrize("name", CARDS)
def test_the_card_of_a_base_does_not_spoil_ours(name, edited, tmp_path):
    content, carried = CARDS[name]
    base, document = edited
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(content)
    text = write_card(tmp_path, open_folder(tmp_path / "base", name="base"), document).read_text("utf-8")
    block = REGEX_YAML_BLOCK.search(text)
    metadata = yaml.safe_load(block[2])
    ours = {"library_name": "transformers", "tags": ["abliterated", "abliterate"]}
    assert metadata == {"pipeline_tag": "text-generation", **ours, **carried}
    assert text[block.end() :].strip().startswith("# base, abliterated")
    assert "<script>" not in text[block.end() :]


def test_a_folder_in_the_place_of_the_card(edited, tmp_path):
    base, document = edited
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "README.md").unlink()
    (tmp_path / "base" / "README.md").mkdir()
    assert write_card(tmp_path, open_folder(tmp_path / "base", name="base"), document).is_file()


# --- the report -------------------------------------------------------------------------------------------------------

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>'\"><svg onload=alert(3)>{{ 7*7 }}</title></style>" + CONTROLS
)


class Seen(HTMLParser):
    """Every tag, and the attributes that could do something."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.acting = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.acting += [
            its for its in attrs if its[0].startswith("on") or (its[0] in ("href", "src") and its[1] != "data:,")
        ]


def test_nothing_that_is_quoted_in_a_report_acts(evaluation, directions, edited):  # noqa: F811
    """It is opened from file://, where a script could read what lies beside it."""
    _, document = edited
    document = json.loads(json.dumps(document))
    document["source"]["name"] = document["recipe"]["title"] = EVIL
    document["edit"]["notes"] = [EVIL]
    models = tuple(
        replace(its, name=EVIL + str(n), against=its.against and EVIL + "0") for n, its in enumerate(evaluation.models)
    )
    samples = tuple(replace(its, prompt=EVIL, replies=tuple(EVIL for _ in its.replies)) for its in evaluation.samples)
    told = replace(directions, metadata={"position_tokens": [EVIL, EVIL]})
    hostile = replace(evaluation, models=models, samples=samples, scorer=EVIL)
    seen = Seen(render(EVIL, hostile, directions=told, manifest=document))
    assert not seen.acting
    assert not seen.tags & {"script", "img", "iframe", "object", "embed", "form", "base", "a", "foreignobject"}
    plain = render("t", evaluation, directions=directions, manifest=document)
    assert seen.tags == Seen(plain).tags
    assert "default-src 'none'" in plain
