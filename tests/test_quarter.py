"""A whole run on a quarter of the memory that its weights take, each in a process of its own."""

import filecmp
import json
import sys

import pytest

from bench.quarter import enlarged, rounded, run, weight_bytes

RECIPE = """
[find]
harmful = "bundled:tiny-chat"
harmless = "bundled:tiny-chat"
n_train = 6
n_val = 1
n_test = 4
reply_tokens = 5
estimators = ["difference-of-means"]
refusal_tokens = ["I"]
[model]
batch_size = 4
[evaluate]
max_new_tokens = 5
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_on_a_quarter_of_its_weights_gives_the_same(tmp_path, record_property):
    """Direction, bytes and evaluation are those of the resident run; the memory is within the budget.

    The memory of the program is that of a run of the bundled model, which takes 6 MB itself.
    """
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    base = enlarged(tmp_path / "base")
    budget = weight_bytes(base) // 4
    program = run("tiny-chat", recipe, tmp_path / "program", budget)
    whole = run(base, recipe, tmp_path / "whole", 2**34)
    quarter = run(base, recipe, tmp_path / "quarter", budget)
    record_property("peak_bytes", quarter.peak_bytes - program.peak_bytes)
    assert quarter.peak_bytes - program.peak_bytes <= budget
    assert whole.peak_bytes - program.peak_bytes > 3 * budget
    one, other = (json.loads((its.out / "abliterate.json").read_text()) for its in (whole, quarter))
    assert one["direction"]["sha256"] == other["direction"]["sha256"]
    assert filecmp.cmp(whole.out / "model.safetensors", quarter.out / "model.safetensors", shallow=False)
    assert rounded(one["evaluation"], 4) == rounded(
        other["evaluation"], 4
    )  # edited replies are checked in one pass there
    assert one["direction"]["choice"] == other["direction"]["choice"]
    scores = [{its["candidate"]: its for its in of["direction"]["scores"]} for of in (one, other)]
    for key in ("bypass", "induce", "kl_nats"):  # out of core they are asked for in other parts: not all are known here
        pairs = [(mine[key], scores[1][name][key]) for name, mine in scores[0].items() if name in scores[1]]
        known = [pair for pair in pairs if None not in pair]
        assert known
        assert all(abs(mine - its) < 1e-5 for mine, its in known)
