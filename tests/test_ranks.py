"""Several processes that do the work of one: the same values, whoever made them, and a clear end when one is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import psutil
import pytest
import torch
from torch.distributed import HashStore

from abliterate.checkpoint import direction_file
from abliterate.checkpoint.source import open_folder
from abliterate.data.bundled import open_model
from abliterate.errors import InterruptedRunError, UsageError, VerificationError
from abliterate.model import parallel
from abliterate.model import ranks as ranks_module
from abliterate.model.ranks import PLAIN, Ranks, spread
from abliterate.recipe import load_recipe
from abliterate.workflow import pipeline
from tests.quantising import quantised_llama

DIRECTION = "abliterate/direction.safetensors"

RECIPE = """
[find]
n_train = 12
n_val = 4
n_test = 8
reply_tokens = 12
estimators = ["difference-of-means"]
[evaluate]
max_new_tokens = 12
[model]
batch_size = 4
"""


def of_each(count, work):
    """What ``work(ranks)`` gives on each of ``count`` ranks, which are threads here."""
    store = HashStore()
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Ranks(store, rank, count)), range(count))), store


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_rank_gets_all_results_in_order_and_works_on_its_share(count):
    items = list(range(5))

    def work(ranks):
        worked, told = [], []

        def run(mine):
            for item in mine:
                worked.append(item)
                time.sleep(0.01 * (ranks.rank == 0))  # others are ahead of the first
                yield {"values": torch.full((2,), item / 3, dtype=torch.float64), "flag": torch.tensor([item > 2])}

        found = list(spread(items, run, by_others=told.append, ranks=ranks))
        again = list(spread(["a", "b"], lambda mine: [[ranks.rank, its] for its in mine], PLAIN, ranks=ranks))
        return found, worked, told, again

    found, store = of_each(count, work)
    for rank, (values, worked, told, again) in enumerate(found):
        assert [its["values"].tolist() for its in values] == [[item / 3] * 2 for item in items]
        assert [bool(its["flag"]) for its in values] == [item > 2 for item in items]
        assert worked == items[rank::count]
        assert sorted(worked + told) == items
        assert again == [[0, "a"], [1 % count, "b"]]
    assert store.num_keys() == 0 or count == 1  # what all have taken is gone


def test_a_value_larger_than_the_store_takes_at_once(monkeypatch):
    monkeypatch.setattr(ranks_module, "PIECE_BYTES", 1000)
    values = torch.arange(3000.0)

    def work(ranks):
        return next(spread([0], lambda mine: [{"": values} for _ in mine], ranks=ranks))[""]

    found, store = of_each(2, work)
    assert all(torch.equal(its, values) for its in found)
    assert store.num_keys() == 0


def test_a_rank_that_fails_or_is_silent_stops_the_others(monkeypatch):
    monkeypatch.setattr(ranks_module, "SILENT_S", 0.05)
    store = HashStore()
    one, other, third = (Ranks(store, rank, 3) for rank in range(3))
    one.listen()
    other.listen()
    third.listen()
    one.listen()
    assert one.lost is None
    other.fail(VerificationError("what is wrong", "what to do"))
    one.listen()
    assert isinstance(one.lost, VerificationError)  # with the exit code of the one that failed
    assert "process 2 of 3 has stopped: what is wrong" in str(one.lost)
    with pytest.raises(KeyboardInterrupt):  # so that what is kept stays; ``together`` raises the error
        one.take("never given")
    store.delete_key("failed/1")
    time.sleep(0.1)
    store.add("alive/0", 1)
    store.add("alive/1", 1)
    third.listen()  # has heard of both
    assert third.lost is None
    time.sleep(0.1)
    store.add("alive/1", 1)
    third.listen()
    assert isinstance(third.lost, InterruptedRunError)
    assert "process 1 of 3 has not been heard of" in str(third.lost)


def test_a_rank_that_has_ended_is_not_missed(monkeypatch):
    monkeypatch.setattr(ranks_module, "SILENT_S", 0.0)
    store = HashStore()
    one, other = Ranks(store, 0, 2), Ranks(store, 1, 2)
    other.listen()
    other.end()
    one.listen()
    time.sleep(0.01)
    one.listen()
    assert one.lost is None
    one.end()


def launched(count, *arguments, among=()):
    """The command under torchrun; ``among`` are options for a machine among several."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, *among, "-m", "abliterate"]
    return subprocess.Popen(
        [*map(str, [*command, *arguments])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def workers(folder):
    """The processes that write ``folder``, by their rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in (process.info["cmdline"] or ()) and "RANK" in (variables := process.environ()):
            found[int(variables["RANK"])] = process
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_of_several_processes_is_that_of_one(tmp_path):
    """One of two is killed; three of two launchers, as on two machines, end with direction and bytes of one alone."""
    recipe = tmp_path / "few.toml"
    recipe.write_text(RECIPE)
    one, several = tmp_path / "one", tmp_path / "several"
    options = ["run", "tiny-chat", "--recipe", recipe, "--out"]
    killed = launched(2, *options, several)
    wait_for = several.with_name("several.partial") / "abliterate" / "steps" / "asked-train-means.safetensors"
    until = time.monotonic() + 120
    while not wait_for.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    workers(several)[1].kill()
    begun = time.monotonic()
    killed.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert killed.returncode != 0
    assert not several.exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ["--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", free.getsockname()[1], "--node-rank"]
    machines = [
        launched(count, *options, several, "--memory", "36MiB", among=[*place, number])
        for number, count in enumerate((2, 1))
    ]
    said, others = (its.communicate(timeout=300)[0] for its in machines)
    assert [its.returncode for its in machines] == [0, 0], said + others
    assert "done and verified" not in others
    assert said.count("done and verified") == 1  # one of them tells
    assert "3 processes share" in said
    alone = subprocess.run(
        [sys.executable, "-m", "abliterate", *map(str, options), str(one), "--memory", "36MiB"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "processes share" not in alone.stderr
    documents = [json.loads((folder / "abliterate.json").read_text()) for folder in (one, several)]
    for key in ("sha256", "choice"):
        assert documents[0]["direction"][key] == documents[1]["direction"][key]
    assert [its.get("processes") for its in documents] == [None, 3]
    for path in sorted(one.glob("*.safetensors")):
        assert path.read_bytes() == (several / path.name).read_bytes()
    shown = [[model["prompts"] for model in its["evaluation"]["models"]] for its in documents]
    assert shown[0] == shown[1]


@pytest.mark.skipif(sys.platform != "linux", reason="as the test above")
def test_processes_that_hold_one_model_together_find_what_one_finds(tmp_path):
    """Hooks see whole residuals: of parts the direction would be another, and the proof against hooks would fail."""
    recipe = tmp_path / "few.toml"
    recipe.write_text(RECIPE)
    out = tmp_path / "two"
    two = launched(2, "run", "tiny-chat", "--recipe", recipe, "--no-eval", "--tensor-parallel", "--out", out)
    alone = pipeline.run(None, tmp_path / "one", load_recipe(str(recipe)), with_evaluation=False)
    said, _ = two.communicate(timeout=300)
    assert two.returncode == 0, said
    assert "2 processes share one model" in said
    document = json.loads((out / "abliterate.json").read_text())
    assert document["processes"] == 2
    assert document["verification"]["ok"]
    assert document["direction"]["choice"]["candidate"] == alone.directions.choice.candidate
    ours, theirs = (its.chosen.vector for its in (direction_file.load(out / DIRECTION), alone.directions))
    assert float(ours @ theirs) > 1 - 1e-9


def test_what_cannot_be_held_together_is_said(tmp_path, monkeypatch):
    place, plain = "cpu", open_model(None)
    monkeypatch.setattr(parallel, "here", lambda: None)
    with pytest.raises(UsageError, match="one process holds the whole model"):
        parallel.check_parallel(plain, place)
    ranks = Ranks(HashStore(), 0, 2)
    monkeypatch.setattr(parallel, "here", lambda: ranks)
    with pytest.raises(UsageError, match="one process holds the whole model"):  # they were not told to hold one
        parallel.check_parallel(plain, place)
    ranks.one_model = True
    monkeypatch.setattr(parallel, "on_this_machine", lambda: (0, 1))
    with pytest.raises(UsageError, match="2 processes, of which 1 are on this machine"):
        parallel.check_parallel(plain, place)
    monkeypatch.setattr(parallel, "on_this_machine", lambda: (0, 2))
    parallel.check_parallel(plain, place)
    base, _ = quantised_llama(tmp_path / "fp8", "blocks")
    with pytest.raises(UsageError, match="is quantised"):
        parallel.check_parallel(open_folder(base, name="fp8"), place)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UsageError, match="not on cpu"):
        parallel.check_parallel(plain, place)
    monkeypatch.setattr(parallel, "resolve_device", lambda its: torch.device("cuda" if its == "auto" else its))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes, and 1 cards"):
        parallel.check_parallel(plain, "auto")
    with pytest.raises(UsageError, match="each process takes its own"):
        parallel.check_parallel(plain, "cuda:1")
    ranks.count = 3
    monkeypatch.setattr(parallel, "on_this_machine", lambda: (0, 3))
    with pytest.raises(UsageError, match="cannot be divided among 3 processes"):
        parallel.check_parallel(plain, "auto")


def test_a_model_that_is_not_divided_is_refused(monkeypatch):
    class Whole:
        @staticmethod
        def from_pretrained(*_, **__):
            return torch.nn.Linear(2, 2)

    monkeypatch.setattr(parallel, "check_parallel", lambda *_: None)
    with pytest.raises(UsageError, match="transformers has no plan"):
        parallel.load_parallel(open_model(None), "cpu", Whole, torch.float32)
    monkeypatch.setitem(sys.modules, "transformers.distributed.configuration_utils", None)
    with pytest.raises(UsageError, match="does not know it"):
        parallel.load_parallel(open_model(None), "cpu", Whole, torch.float32)


def test_what_decides_a_pass_is_agreed_on_where_it_is_run_together(monkeypatch):
    """And only there: processes with a model each come to it at different times."""

    def work(ranks):
        ranks.one_model = True
        of_thread[get_ident()] = ranks
        together = ranks_module.agreed(10 - ranks.rank), ranks_module.count(), ranks_module.processes()
        ranks.one_model = False
        return together, ranks_module.agreed(10 - ranks.rank), ranks_module.count()

    of_thread = {}
    monkeypatch.setattr(ranks_module, "here", lambda: of_thread[get_ident()])
    found, _ = of_each(3, work)
    assert [its[0] for its in found] == [(8, 1, 3)] * 3
    assert [its[1:] for its in found] == [(10, 3), (9, 3), (8, 3)]


def test_other_commands_are_for_one_process(tmp_path):
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "abliterate", "plan"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "only `run` shares its work" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "abliterate", "run", "tiny-chat", "--out", str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "MASTER_ADDR" in done.stderr
