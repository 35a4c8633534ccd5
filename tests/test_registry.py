"""The registry as data: no rule is idle, none can be deleted unnoticed, no pattern swallows what it does not know."""

import re
from functools import cache

import pytest

from abliterate.arch.model_map import map_model
from abliterate.arch.registry import families
from abliterate.arch.spec import Family, WriterSpec
from abliterate.checkpoint.source import open_folder
from abliterate.errors import PlanRefusedError
from tests import factories, zoo

HUB_NAMES = {
    "deepseek": ("model.layers.3.eh_proj.weight", "model.layers.61.embed_tokens.weight"),
    "qwen3_next": (
        "mtp.fc.weight", "mtp.fc_embedding.weight", "mtp.layers.0.self_attn.o_proj.weight",
        "mtp.layers.0.mlp.down_proj.weight", "mtp.layers.0.mlp.experts.7.down_proj.weight",
        "mtp.layers.0.mlp.experts.down_proj", "mtp.layers.0.mlp.shared_expert.down_proj.weight",
        "model.language_model.layers.1.mlp.experts.down_proj",
    ),
    "kimi_linear": ("model.layers.0.mlp.down_proj.weight",),
    "gemma3n": ("model.embed_audio.embedding_projection.weight",),
}  # fmt: skip
"""Writers of released files that transformers does not write, or only with options that no tiny model here has."""
MAY_HAVE_BIAS = re.compile(r"\.bias$")


def families_of_zoo(cases):
    return {name: next(f for f in families() if zoo.model_type(name) in f.model_types) for name in cases}


@pytest.fixture(scope="session")
def zoo_headers(tmp_path_factory):
    """The checkpoint of every case, as headers only."""
    root = tmp_path_factory.mktemp("headers")

    @cache
    def made(name):
        model = {**zoo.BUILDERS, **zoo.CLASS_C}[name]()
        return open_folder(factories.save(model, root / name, dtype=None), name=name)

    return made


def match(family: Family, name: str):
    return next((matcher for matcher in family.matchers if matcher.regex.fullmatch(name)), None)


def without(family: Family, spec: WriterSpec) -> Family:
    return family.with_writers(other for other in family.writer if other is not spec)


def evidence(family: Family, zoo_headers) -> dict[WriterSpec, list[str]]:
    """Names of real tensors, by the rule that claims them."""
    found: dict[WriterSpec, list[str]] = {spec: [] for spec in family.writer}
    cases = [name for name, its in families_of_zoo((*zoo.BUILDERS, *zoo.CLASS_C)).items() if its is family]
    names = [name for case in cases for name in zoo_headers(case).tensors] + list(HUB_NAMES.get(family.family, ()))
    for name in names:
        matcher = match(family, name)
        if matcher is not None and matcher.writer is not None:
            found[matcher.writer].append(name)
    return found


@pytest.mark.parametrize("family", families(), ids=lambda family: family.family)
def test_deleting_any_rule_is_noticed(family, zoo_headers):
    """Each rule claims a real tensor, which has no role at all once the rule is gone: the plan would be refused."""
    for spec, names in evidence(family, zoo_headers).items():
        if not names and MAY_HAVE_BIAS.search(spec.name):
            continue  # an option of the configuration: test_biases_are_known covers the patterns
        assert names, f"no test has a tensor for {spec.name}"
        for name in names:
            assert match(without(family, spec), name) is None, name


@pytest.mark.parametrize("family", families(), ids=lambda family: family.family)
def test_biases_are_known(family):
    """The bias of every writer that may have one is a writer, and nothing at all without its rule."""
    for spec in family.writer:
        if spec.name.endswith(".bias"):
            name = ("" if spec.absolute else family.prefixes[0]) + re.sub(r"\{(?:layer|expert|n|mtp)\}", "0", spec.name)
            name = re.sub(r"\{([^|}]*)[^}]*\}", r"\1", name)
            matcher = match(family, name)
            assert matcher is not None, name
            assert matcher.writer == spec
            assert match(without(family, spec), name) is None


@pytest.mark.parametrize("name", [*zoo.BUILDERS])
def test_a_plan_without_any_one_rule_is_refused(name, zoo_headers, monkeypatch):
    """The same on whole checkpoints."""
    family = families_of_zoo([name])[name]
    checkpoint = zoo_headers(name)
    assert map_model(checkpoint).complete
    used = [spec for spec in family.writer if any(_claims(family, spec, tensor) for tensor in checkpoint.tensors)]
    assert len(used) >= 2
    for spec in used:
        monkeypatch.setattr("abliterate.arch.model_map.family_of", lambda *_, **__: without(family, spec))  # noqa: B023
        with pytest.raises(PlanRefusedError):
            map_model(checkpoint)


def _claims(family: Family, spec: WriterSpec, name: str) -> bool:
    matcher = match(family, name)
    return matcher is not None and matcher.writer is spec


@pytest.mark.parametrize("family", families(), ids=lambda family: family.family)
def test_only_towers_are_taken_whole(family):
    """A pattern for anything could swallow a writer that nobody has thought of."""
    for name in (*family.readers.names, *family.readers.absolute, *(spec.name for spec in family.writer)):
        assert "**" not in name
    for tower in family.readers.towers:
        assert re.search(r"vision|audio|visual", tower)


def test_every_model_type_stands_in_one_family():
    types = [model_type for family in families() for model_type in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("family", families(), ids=lambda family: family.family)
def test_an_entry_is_readable(family):
    """One screen: at most 80 lines, class C with its reason."""
    from importlib.resources import files

    text = (files("abliterate.arch") / "families" / f"{family.family}.toml").read_text("utf-8")
    assert len(text.splitlines()) <= 80
    assert text.startswith("# ")
    assert "Source: " in text
    assert (family.exactness == "C") == bool(family.reason)
