"""More than one direction, fully removed, the same everywhere: every form of edit, on the written bytes of the zoo.

Where its class allows it an edit is held against hooks at the writers' outputs, to 1e-10 in float64; where not, by its
post-condition on the bytes.  Each is shown to fail when it is broken.
"""

import dataclasses
import shutil
from functools import cache, lru_cache

import pytest
import torch

from abliterate.arch.codecs import Plain, fp8_codec
from abliterate.checkpoint import edit_file
from abliterate.checkpoint.output import prepare
from abliterate.editing.blocks import TensorEdit, Workspace
from abliterate.editing.planning import along, plan
from abliterate.editing.writing import edit_checkpoint
from abliterate.errors import CheckpointError, PlanRefusedError, SourceError
from abliterate.method.directions import Candidate, Subspace
from abliterate.method.edits import addition, affine, apply, behind_norm, kernel_removal, oblique, orthogonal, removing
from abliterate.method.kernel import WeightKernel
from abliterate.method.linalg import orthonormal_basis
from abliterate.method.rounding import round_keeping
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit
from abliterate.model.interventions import edited as hooks
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import checkpoints, factories, zoo
from tests.equivalence import attached
from tests.quantising import to_blocks

D = 48
LOGITS = 1e-10
SEEN = 1e-6
KINDS = ("attention", "MLP")
FORMS = (
    "three directions",
    "another in every layer",
    "strength 0.6",
    "strength by layer and role",
    "oblique",
    "affine",
)
SCALED = "kept norms"


def basis(seed, k=1, d=D):
    return orthonormal_basis(factories.random_directions(d, k, seed=seed))


def at_places(n_layers, make, *, embedding):
    """``make(layer, kind)`` in every block, ``embedding`` before them."""
    places = {(layer, kind): make(layer, kind) for layer in range(n_layers) for kind in KINDS}
    return StreamEdit(everywhere=embedding, places=places)


def stream_edit(name, n_layers, d=D):
    """One of ``FORMS``, or all that can be had together."""
    q = basis(1, d=d)
    read, write = factories.random_directions(d, 2, seed=3), factories.random_directions(d, 2, seed=4) + basis(3, 2, d)
    mean = factories.random_directions(d, seed=5)[:, 0]
    if name == "three directions":
        return removing(factories.random_directions(d, 3))
    if name == "another in every layer":
        return at_places(n_layers, lambda layer, _: orthogonal(basis(10 + layer, d=d)), embedding=orthogonal(q))
    if name == "strength 0.6":
        return StreamEdit(everywhere=orthogonal(q, strength=0.6))
    if name == "strength by layer and role":

        def strength(layer, kind):
            return orthogonal(q, strength=0.3 * layer + (0.5 if kind == "MLP" else 0.9))

        return at_places(n_layers, strength, embedding=orthogonal(q, strength=0.8))
    if name == "oblique":
        return StreamEdit(everywhere=oblique(read, write, strength=1.0))
    if name == "affine":
        return StreamEdit(everywhere=orthogonal(q), places={(None, "embedding"): affine(q, mean)})
    if name == SCALED:
        return StreamEdit(everywhere=orthogonal(basis(1, 2, d), strength=0.7, column_scale="kept norms"))
    mixed = [removing(read).everywhere, orthogonal(q, strength=0.6), oblique(read, write, strength=0.5)]
    return at_places(
        n_layers,
        lambda layer, kind: None if (layer, kind) == (1, "attention") else mixed[(layer + (kind == "MLP")) % 3],
        embedding=orthogonal(basis(1, 3, d)),
    )


def write(made, out, **options):
    output = prepare(out, source=made.checkpoint.folder, fingerprint="test", needed_bytes=0)
    edit_checkpoint(made, output, **options)
    return output.finish()


def logits(folder, stream=None):
    """Of the model in ``folder``; with ``stream`` as hooks, of one that is loaded once for several."""
    tokens = factories.token_ids(batch=4, length=16)
    with factories.really_float64(), torch.no_grad():
        if stream is None:
            return factories.load(folder)(tokens).logits
        loaded = of_base(folder)
        with hooks(loaded, stream):
            return loaded.model(tokens).logits


def written_and_hooked(base, stream, out):
    """The largest distance of logits between the written checkpoint and its base under hooks, and the plan."""
    made = along(plan(base), stream)
    written = write(made, out)
    assert verify_bytes(made, written).failures == ()
    return float((logits(written) - logits(base, stream)).abs().max()), made


@lru_cache(maxsize=2)
def of_base(folder):
    return attached(folder, factories.load(folder))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a case of the zoo, made once for each dtype."""

    @cache
    def made(name, dtype=torch.float64):
        folder = tmp_path_factory.mktemp("edits") / name / str(dtype).removeprefix("torch.")
        return factories.save(factories.build(name), folder, dtype=dtype)

    return made


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_a_different_edit_at_every_place(name, base, tmp_path):
    """Several directions, partial strengths, an oblique edit and a place left alone, all in one model of every type."""
    made = plan(base(name))
    stream = stream_edit("mixed", made.model_map.n_layers)
    projects = [writer for writer in made.writers if writer.role == "projector"]
    if not projects:  # a constant in the embedding, divided by its scale
        mean = factories.random_directions(D, seed=5)[:, 0]
        stream = dataclasses.replace(stream, places={**stream.places, (None, "embedding"): affine(basis(1), mean)})
    made = along(made, stream)
    out = write(made, tmp_path / "edited", memory_bytes=1)  # the smallest blocks there are
    assert verify_bytes(made, out, memory_bytes=1).failures == ()
    assert {writer.place for writer in made.writers} == {
        writer.place for writer in made.model_map.writers if stream.at(*writer.place) is not None
    }
    if name in zoo.EXACT:
        assert made.claim == "equal to hooks"
        hooked = logits(base(name), stream)
        assert (logits(out) - hooked).abs().max() <= LOGITS
        assert (logits(base(name), StreamEdit()) - hooked).abs().max() > 1e-3
    else:
        assert made.claim == "bytes only"


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", [name for name in zoo.CORE if name in zoo.EXACT])
def test_every_edit_equals_its_hooks(name, kind, base, tmp_path):
    made = plan(base(name))
    stream = stream_edit(kind, made.model_map.n_layers)
    difference, made = written_and_hooked(base(name), stream, tmp_path / "edited")
    assert made.claim == "equal to hooks"
    assert difference <= LOGITS


@pytest.mark.parametrize("kind", [*FORMS, SCALED])
@pytest.mark.parametrize("name", [*zoo.CORE, "gemma2", "olmo2", "glm4", "gemma4-text"])
def test_every_edit_keeps_its_post_condition_in_bfloat16(name, kind, base, tmp_path):
    """After rounding, what stands along ``read`` is what the edit leaves there, to far less than the roundoff."""
    made = plan(base(name, torch.bfloat16))
    made = along(made, stream_edit(kind, made.model_map.n_layers))
    report = verify_bytes(made, write(made, tmp_path / "edited"))
    assert report.failures == ()
    assert report.worst_left < 2e-3  # nearest rounding would leave 1.7e-3 to 4e-3 of the columns' norm
    claims = {SCALED: "bytes only"} if name in zoo.EXACT else {}
    removing_ones = ("three directions", "another in every layer", "oblique")
    fallback = (
        "equal to hooks" if name in zoo.EXACT else "removes the direction" if kind in removing_ones else "bytes only"
    )
    assert made.claim == claims.get(kind, fallback)


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "gpt2", "qwen3-moe", "gpt-oss", "gemma2"])
def test_kept_norms_are_kept_and_the_direction_is_gone(name, base, tmp_path):
    """Scaling columns leaves what is zero along the direction zero; the behaviour is not that of any hook."""
    q = basis(1, 2)
    made = along(plan(base(name)), StreamEdit(everywhere=orthogonal(q, column_scale="kept norms")))
    assert made.claim == "bytes only"
    assert all(edit.removes for edit in made.distinct_edits)
    out = write(made, tmp_path / "edited")
    assert verify_bytes(made, out).failures == ()
    for writer in made.writers:
        before, after = (matrix(folder, writer) for folder in (made.checkpoint.folder, out))
        lengths = before.norm(dim=0)
        assert torch.allclose(after.norm(dim=0), lengths, rtol=1e-9)
        read = made.edits[writer.tensor.name].read
        assert (read.T @ after).abs().max() < 1e-12 * max(1.0, float(lengths.max()))


def matrix(folder, writer):
    """A writer ``[d, n]`` as it stands on disk."""
    w = checkpoints.read(folder, writer.tensor.name)
    return w.movedim(writer.axis, 0).reshape(w.shape[writer.axis], -1)


# --- each is shown to fail when it is broken ------------------------------------------------------------------------


def broken(made, name, how):
    """``made`` with the edit of one writer spoilt."""
    edit = made.edits[name]
    return dataclasses.replace(made, edits={**made.edits, name: how(edit)})


def spoilt(kind, made):
    """A name and what is wrong with that writer's edit."""
    names = {writer.place: writer.tensor.name for writer in made.writers}
    first, second = names[0, "attention"], names[1, "attention"]
    if kind == "affine":
        embedding = names[None, "embedding"]
        yield embedding, lambda edit: dataclasses.replace(edit, constant=None)
        yield embedding, lambda edit: dataclasses.replace(edit, constant=1.01 * edit.constant)
        return
    if kind in ("another in every layer", "strength by layer and role"):
        yield first, lambda _: made.edits[second]
    yield second, lambda edit: dataclasses.replace(edit, strength=1.01 * edit.strength)
    if kind == "oblique":
        yield first, lambda edit: dataclasses.replace(edit, write=edit.read)
    if kind == "three directions":
        yield first, lambda edit: dataclasses.replace(edit, read=edit.read[:, :2], write=edit.write[:, :2])
    if kind == SCALED:
        yield first, lambda edit: dataclasses.replace(edit, column_scale="none")


@pytest.mark.parametrize("kind", [*FORMS, SCALED])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_spoilt_writer_is_seen(name, kind, base, tmp_path):
    """On the bytes, and against the hooks where the edit is equal to them."""
    made = plan(base(name))
    stream = stream_edit(kind, made.model_map.n_layers)
    made = along(made, stream)
    for number, (writer, how) in enumerate(spoilt(kind, made)):
        out = write(broken(made, writer, how), tmp_path / f"broken-{number}")
        assert any(writer in failure for failure in verify_bytes(made, out).failures), number
        if made.claim == "equal to hooks" and number == 0:
            assert (logits(out) - logits(base(name), stream)).abs().max() > SEEN


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", [*FORMS, SCALED])
def test_a_plan_that_declares_something_else_is_seen(name, kind, base, tmp_path):
    """Bytes and plan agree, but the plan is not what shall happen to the stream."""
    made = plan(base(name))
    made = along(made, stream_edit(kind, made.model_map.n_layers))
    for number, (writer, how) in enumerate(spoilt(kind, made)):
        if name == "gemma2" and kind == "oblique" and number == 1:
            continue  # behind a norm which ``write`` is taken is a choice
        wrong = broken(made, writer, how)
        failures = verify_bytes(wrong, write(wrong, tmp_path / f"wrong-{number}")).failures
        assert failures == (f"the edit of '{writer}' is not what shall happen to the stream",), number


@pytest.mark.parametrize("name", ["gemma2", "glm4"])
def test_a_plan_that_ignores_a_norm_is_seen(name, base, tmp_path):
    """Each writer satisfies the equation that is declared for it, and yet the stream keeps the direction."""
    made = along(plan(base(name)), stream_edit("three directions", 3))
    plain = made.stream.everywhere
    wrong = dataclasses.replace(made, edits=dict.fromkeys(made.edits, plain))
    failures = verify_bytes(wrong, write(wrong, tmp_path / "edited")).failures
    assert len(failures) == sum(bool(writer.norms) for writer in made.writers)


@pytest.mark.parametrize("name", ["llama-biases", "gemma2"])
def test_a_constant_where_none_belongs_is_seen(name, base, tmp_path):
    """Of two writers that share an edit, each is looked at."""
    made = along(plan(base(name)), stream_edit("affine", 3))
    embedding = made.edits[made.model_map.embedding.tensor.name]
    plain = [writer.tensor.name for writer in made.writers if not writer.norms]
    wrong = dataclasses.replace(made, edits={**made.edits, **dict.fromkeys(plain, embedding)})
    failures = verify_bytes(wrong, write(wrong, tmp_path / "edited")).failures
    assert len(failures) == len({writer.role for writer in made.writers if not writer.norms}) - 1 or name == "gemma2"
    assert failures or plain == [made.model_map.embedding.tensor.name]


def test_a_plan_that_leaves_writers_out_is_seen(base, tmp_path):
    made = along(plan(base("llama")), removing(factories.random_directions(D)))
    cut = dataclasses.replace(made, writers=made.writers[:2])
    failures = verify_bytes(cut, write(cut, tmp_path / "edited")).failures
    assert len([failure for failure in failures if "is not in the plan, and should be" in failure]) == 5


def test_what_options_leave_out_is_not_missed(base, tmp_path):
    made = along(plan(base("llama-tied"), tied="keep"), removing(factories.random_directions(D)))
    assert made.exactness == "C"
    assert verify_bytes(made, write(made, tmp_path / "edited")).failures == ()


@pytest.mark.parametrize("how", ["another direction", "junk", "one leaks into the other"])
def test_what_is_written_behind_a_norm_is_held_against_the_stream(how, base, tmp_path):
    made = along(plan(base("gemma2")), removing(factories.random_directions(D, 2)))
    name = next(writer.tensor.name for writer in made.writers if writer.norms)
    edit = made.edits[name]
    across = basis(99) - edit.read @ torch.linalg.pinv(edit.read) @ basis(99)
    write_ = {
        "another direction": edit.write + 5 * across,
        "junk": edit.write + 100 * torch.cat((across, -across), dim=1),
        "one leaks into the other": edit.write @ torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64),
    }[how]
    wrong = broken(made, name, lambda edit: dataclasses.replace(edit, write=write_))
    failures = verify_bytes(wrong, write(wrong, tmp_path / "edited")).failures
    assert f"the edit of '{name}' is not what shall happen to the stream" in failures


def test_an_edit_of_layers_that_are_not_there_is_refused(base):
    edit = orthogonal(basis(1))
    with pytest.raises(PlanRefusedError, match="names layer 99, and there are 3"):
        along(plan(base("llama")), StreamEdit(everywhere=edit, places={(99, "MLP"): edit}))
    with pytest.raises(PlanRefusedError, match="changes no writer"):
        along(plan(base("llama")), StreamEdit(places={(None, "next-token block"): edit}))


@pytest.mark.parametrize("name", ["qwen3-vl", "falcon-h1"])
def test_a_constant_that_would_be_added_twice_is_refused(name, base):
    q, mean = basis(1), factories.random_directions(D, seed=5)[:, 0]
    places = {(None, "embedding") if name == "qwen3-vl" else (1, "attention"): affine(q, mean)}
    with pytest.raises(PlanRefusedError, match="has no one bias"):
        along(plan(base(name)), StreamEdit(everywhere=orthogonal(q), places=places))


def test_what_tells_two_edits_apart():
    """Which edit stands where counts, and not the order of the places."""
    a, b = orthogonal(basis(1)), orthogonal(basis(2))
    one = StreamEdit(places={(0, "MLP"): a, (1, "MLP"): b})
    assert one.sha256 != StreamEdit(places={(0, "MLP"): b, (1, "MLP"): a}).sha256
    assert one.sha256 != StreamEdit(everywhere=a, places={(1, "MLP"): b}).sha256
    assert StreamEdit(everywhere=a).sha256 != StreamEdit(everywhere=dataclasses.replace(a, strength=0.5)).sha256
    assert one.sha256 == StreamEdit(places={(0, "MLP"): orthogonal(basis(1)), (1, "MLP"): b}).sha256


# --- one matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*FORMS, SCALED])
def test_rounding_keeps_the_post_condition(kind, dtype):
    """Of partial strengths it is not zero."""
    edit = next(iter(stream_edit(kind, 2, 256).edits()))
    w = torch.randn(256, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = apply(w, edit)
    nearest, ours = exact.to(dtype).double(), round_keeping(exact, dtype, edit).double()
    off = [(edit.read.T @ (rounded - exact)).norm() for rounded in (nearest, ours)]
    assert off[1] < (1 if dtype == torch.float64 else 0.1) * off[0] + 1e-13
    assert (ours - exact).norm() < 2 * (nearest - exact).norm() + 1e-13


def test_the_post_condition_is_what_the_equation_leaves():
    w = torch.randn(D, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in FORMS:
        for edit in stream_edit(kind, 3).edits():
            expected = edit.expected(edit.read.T @ w)
            left = edit.read.T @ apply(w, edit)
            assert torch.allclose(left, torch.zeros_like(left) if expected is None else expected, atol=1e-12), kind
            assert edit.removes == (expected is None)


def test_an_oblique_edit_behind_a_norm_acts_as_it_does_in_the_stream():
    """With all gains alike a norm is a scalar, and the edit is the same; else what it leaves along ``read`` is."""
    edit = oblique(factories.random_directions(D, 2, seed=3), factories.random_directions(D, 2, seed=4), strength=0.7)
    w = torch.randn(D, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(apply(w, behind_norm(edit, torch.full((D,), 3.0))), apply(w, edit), atol=1e-10)
    gain = torch.rand(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    ours = behind_norm(edit, gain)
    stream = gain[:, None] * apply(w, ours)
    assert torch.allclose(edit.read.T @ stream, edit.kept @ (edit.read.T @ (gain[:, None] * w)), atol=1e-10)


@pytest.mark.parametrize("layout", ["rows", "columns", "columns in parts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_of_which_little_is_left_keep_their_length_or_stay(layout, dtype):
    """``|w|^2 - |r^T w|^2`` is what nearly equal numbers leave."""
    d = 1024
    q = basis(1, d=d)
    shares = torch.tensor([1.0, 0.1, 1e-2, 2e-3, 1e-4, 0.0], dtype=torch.float64)
    rest = torch.randn(d, len(shares), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = (rest - q @ (q.T @ rest)) / d**0.5
    w = (q + shares * rest).to(dtype)
    edit, work = orthogonal(q, column_scale="kept norms"), Workspace()
    stored = (w.T if layout == "rows" else w).contiguous().clone()
    ours = TensorEdit.of("here", edit, Plain(dtype, stored.shape[1]), work)
    if layout == "rows":
        ours.edit_rows(stored, 0)
    elif layout == "columns":
        ours.edit_columns(stored, 0)
    else:
        columns = ours.columns(0)
        for step in columns.passes:
            for row in range(0, d, 100):
                step(stored[row : row + 100], row)
        for row, values in columns.finish():
            stored[row] = values
    after, before = (stored.T if layout == "rows" else stored).double(), w.double()
    exact = before - q @ (q.T @ before)
    gone = exact.norm(dim=0) < 2.0**-10 * before.norm(dim=0)
    scale = torch.where(gone, 1.0, before.norm(dim=0) / exact.norm(dim=0))
    eps = torch.finfo(dtype).eps
    assert gone.tolist() == [False] * 4 + [True] * 2 or dtype != torch.float32  # coarser ones leave their rounding
    assert ((after - exact * scale).norm(dim=0) <= 2 * eps * (exact * scale).norm(dim=0) + 1e-6).all()


@pytest.mark.parametrize("cosine", [0.7, 0.95])
def test_a_coarse_grid_takes_directions_that_are_alike(cosine):
    """Pulled by ``(read^T read)^-1``: by ``read^T`` alone the pull would grow without end."""
    d, n = 256, 64
    common = basis(1, d=d)
    read = (cosine**0.5) * common + (1 - cosine) ** 0.5 * basis(2, 3, d)
    edit = oblique(read, read + 0.1 * basis(5, 3, d))
    w = torch.randn(d, n, generator=torch.Generator().manual_seed(0))
    q, scales = to_blocks(w, (16, 16))
    codec = fp8_codec(q.dtype, tuple(q.shape), scales, (16, 16))
    before = codec.decode(q, 0, torch.float64)
    ours = q.clone()
    TensorEdit.of("here", edit, codec, Workspace()).edit_columns(ours, 0)
    left = edit.read.T @ codec.decode(ours, 0, torch.float64)
    assert left.norm() < 0.02 * (edit.read.T @ before).norm()


def test_a_direction_in_a_channel_of_its_own_gets_rows_of_its_own():
    d = 512
    spike, flat = torch.zeros(d, dtype=torch.float64), basis(1, d=d)[:, 0]
    spike[7] = 1.0
    edit = removing(torch.stack((spike, flat), dim=1)).everywhere
    w = torch.randn(d, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = flat @ round_keeping(apply(w, edit), torch.bfloat16, edit).double()
    assert left.norm() < 1e-4 * (flat @ w).norm()


def test_vectors_that_are_long_remove_no_more_than_they_do():
    across = basis(1) - basis(2) @ (basis(2).T @ basis(1))
    assert not WeightEdit(read=basis(2), write=1e10 * across / across.norm()).removes


def test_behind_a_norm_nothing_is_a_traceback():
    read = torch.eye(4, dtype=torch.float64)[:, :1]
    with pytest.raises(ValueError, match="no finite"):
        behind_norm(WeightEdit(read=read, write=torch.eye(4, dtype=torch.float64)[:, 1:2]), torch.ones(4))


def test_an_edit_cannot_take_out_across_what_it_reads():
    with pytest.raises(ValueError, match="across"):
        oblique(torch.eye(4)[:, :1], torch.eye(4)[:, 1:2])


# --- what has no place to go ------------------------------------------------------------------------------------------


def test_a_constant_goes_into_the_bias_of_its_place(base, tmp_path):
    q, mean = basis(1), factories.random_directions(D, seed=5)[:, 0]
    stream = StreamEdit(everywhere=orthogonal(q), places={(1, "attention"): affine(q, mean)})
    made = along(plan(base("llama-biases")), stream)
    out = write(made, tmp_path / "edited")
    assert verify_bytes(made, out).failures == ()
    assert (logits(out) - logits(base("llama-biases"), stream)).abs().max() <= LOGITS
    holders = [name for name, edit in made.edits.items() if edit.constant is not None]
    assert holders == ["model.layers.1.self_attn.o_proj.bias"]
    with pytest.raises(PlanRefusedError, match="no one bias"):
        along(plan(base("llama")), stream)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_addition_is_written_where_there_is_a_bias(name, layer, base, tmp_path):
    """The written bias adds what the hook adds; nothing else changes, and at layer 0 it is the embedding that does."""
    one = Candidate(
        id="x", subspace=Subspace(vectors=factories.random_directions(D)), layer=layer, provenance={"estimator": "x"}
    )
    stream = addition(one)
    difference, made = written_and_hooked(base(name), stream, tmp_path / "edited")
    assert difference <= LOGITS
    assert made.claim == "equal to hooks"
    assert [name for name, edit in made.edits.items() if edit.constant is not None] == [
        writer.tensor.name for writer in made.writers if writer.role == "embedding" or writer.role == "MLP out bias"
    ]
    assert {writer.place for writer in made.writers} == {(None, "embedding") if layer == 0 else (1, "MLP")}
    assert (logits(tmp_path / "edited") - logits(base(name), StreamEdit())).abs().max() > 1e-3
    with pytest.raises(PlanRefusedError, match="no one bias"):
        along(plan(base("llama")), addition(dataclasses.replace(one, layer=1)))


@pytest.mark.parametrize("name", ["granite", "gemma", "falcon-h1"])
def test_the_constant_of_an_embedding_is_divided_by_its_scale(name, base, tmp_path):
    made = plan(base(name))
    stream = stream_edit("affine", made.model_map.n_layers)
    made = along(made, stream)
    out = write(made, tmp_path / "edited")
    assert (logits(out) - logits(base(name), stream)).abs().max() <= LOGITS
    embedding = made.edits[made.model_map.embedding.tensor.name]
    assert not torch.allclose(embedding.constant, stream.places[None, "embedding"].constant)


def test_a_constant_that_images_would_not_get_is_refused(base):
    with pytest.raises(PlanRefusedError, match="the embedding has no one bias"):
        along(plan(base("gemma3-vision")), stream_edit("affine", 3))
    assert along(plan(base("qwen2.5-vl")), stream_edit("affine", 3)).edits


def test_an_edit_of_another_width_is_refused(base):
    with pytest.raises(CheckpointError, match="the direction has 32 components"):
        along(plan(base("llama")), removing(torch.ones(32, 1)))


def test_a_head_stays_tied_to_an_embedding_that_is_left_alone(base, tmp_path):
    places = {(None, "embedding"): None, (0, "attention"): None, (0, "MLP"): None}
    stream = StreamEdit(everywhere=orthogonal(basis(1)), places=places)
    made = along(plan(base("llama-tied")), stream)
    assert not made.sets_untied
    assert made.added_head is None
    assert {writer.layer for writer in made.writers} == {1, 2}
    out = write(made, tmp_path / "edited")
    assert verify_bytes(made, out).failures == ()
    assert (logits(out) - logits(base("llama-tied"), stream)).abs().max() <= LOGITS
    assert not any("tied" in note for note in made.notes)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FORMS, SCALED, "mixed"])
def test_the_file_of_an_edit_gives_it_back(kind, tmp_path):
    stream = stream_edit(kind, 3)
    found = edit_file.load(edit_file.save(stream, tmp_path / "edit.safetensors"))
    assert found.places.keys() == stream.places.keys()
    places = [(None, "embedding"), (None, "next-token block"), *((n, k) for n in range(4) for k in KINDS)]
    for place in places:
        ours, theirs = found.at(*place), stream.at(*place)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert same(ours, theirs)
    assert len(list(found.edits())) == len(list(stream.edits()))


def same(a: WeightEdit, b: WeightEdit) -> bool:
    constants = (a.constant is None) == (b.constant is None) and (
        a.constant is None or torch.equal(a.constant, b.constant)
    )
    vectors = torch.equal(a.read, b.read) and torch.equal(a.write, b.write)
    return constants and vectors and (a.strength, a.column_scale) == (b.strength, b.column_scale)


def test_a_newer_or_damaged_file_is_refused_with_words(tmp_path, monkeypatch):
    path = edit_file.save(stream_edit("mixed", 3), tmp_path / "edit.safetensors")
    with monkeypatch.context() as newer:
        newer.setattr(edit_file, "FORMAT", 7)
        edit_file.save(stream_edit("mixed", 3), tmp_path / "newer.safetensors")
    with pytest.raises(SourceError, match="is of format 7, known is 1"):
        edit_file.load(tmp_path / "newer.safetensors")
    with pytest.raises(SourceError, match="not a readable edit file"):
        edit_file.load(tmp_path / "nowhere.safetensors")
    shutil.copy(factories.save_direction(D, tmp_path / "direction.safetensors"), path)
    with pytest.raises(SourceError, match="do not fit together"):
        edit_file.load(path)


@pytest.mark.parametrize(("name", "alone"), [("llama-biases", False), ("gpt2", True), ("qwen3-moe", True)])
def test_a_weight_kernel_is_equal_to_its_hooks_and_takes_out_too_little_or_too_much(name, alone, base, tmp_path):
    """``r^T W' = (1 - w) r^T W``: the proof of the bytes says it of every writer, here it is asked again of one."""
    n_layers = plan(base(name)).model_map.n_layers
    kernels = {
        "attention": WeightKernel(most=1.4, least=0.5, peak=1.2, reach=1.5),
        "MLP": WeightKernel(most=0.7, least=0.1, peak=1.9, reach=1.0),
    }
    spans = [Subspace(vectors=factories.random_directions(D, seed=20 + layer)) for layer in range(n_layers)]
    made_of = Candidate(
        id="search/0", subspace=dict(enumerate(spans)) if alone else spans[0], layer=0,
        provenance={"estimator": "search", "kernels": {kind: dataclasses.asdict(its) for kind, its in kernels.items()}},
    )  # fmt: skip
    stream = kernel_removal(made_of, n_layers)
    difference, made = written_and_hooked(base(name), stream, tmp_path / "edited")
    assert difference <= LOGITS
    assert made.claim == "equal to hooks"
    other = kernel_removal(dataclasses.replace(made_of, provenance={"estimator": "search"}), n_layers)
    assert (logits(tmp_path / "edited") - logits(base(name), other)).abs().max() > 1e-3
    for writer in made.writers:
        weight = kernels[writer.place[1]].weight(writer.layer)
        assert torch.allclose(made.edits[writer.tensor.name].kept, torch.tensor([[1 - weight]], dtype=torch.float64))
    assert {weight > 1 for weight in (edit.strength for edit in stream.edits())} == {False, True}
