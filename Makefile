# Needs make and Python 3.11 or newer (with its venv module), nothing else: each target makes the environment it uses.
# Another interpreter: make test PYTHON=python3.12. pip reads its own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...).

PYTHON ?= python3
# One torch thread per worker: the models under test are too small to gain from more.
WORKERS ?= 2
PYTEST_ARGS ?=
# pip says what goes wrong and nothing else; what it installs into which environment is said before.
INSTALL = @echo 'Installing .[$(1)] into $(@D) ...'; $(@D)/bin/python -m pip install -q --disable-pip-version-check -e '.[$(1)]'
# What pip fetches for the pins of constraints.txt: of 2.8 GB on Linux, 2.7 are torch's build for CUDA and its libraries.
DOWNLOAD = up to 2.8 GB on Linux, where PyTorch comes with CUDA, and up to 0.3 GB elsewhere
# With HF_HUB_OFFLINE a test that reaches for the Hub fails at once, whether or not there is a network.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -q $(PYTEST_ARGS)
# Triton's interpreter is chosen before Triton is imported, and its compiler does not work under it: two more processes.
# numpy, in which it computes, makes small products more slowly with threads.
define TRITON
	@.venv/bin/python -c 'import triton' 2>/dev/null || echo 'Triton is not installed: its kernels are not tested here.'
	@! .venv/bin/python -c 'import triton' 2>/dev/null || { set -ex; \
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(call PYTEST,.venv) -n $(WORKERS) tests/interpreter; \
	.venv/bin/python examples/benchmarks/kernels_aot.py --check; }
endef

CONTRACT = $(wildcard tests/modeling/test_modeling.py tests/modeling/test_generate.py tests/hub/test_hub*.py \
	tests/caches/test_recycled_generate.py tests/caches/test_adore_cache.py)
# What peft, accelerate and trl do; their releases are new as well.
TRAINING = tests/training/test_peft.py tests/training/test_peft_training.py

.DEFAULT_GOAL := help
.PHONY: help demo about-demo test test-oldest test-newest record-newest test-kernels gpu style quality types clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: about-demo .venv/.demo ## what a small cache does, on any CPU
	@.venv/bin/scrubjay demo

# The first words of the first minute. Where .venv is there already, the command's own are enough.
about-demo:
	@[ -e .venv/.demo ] || printf '%s\n' \
	'Installs into .venv first: a download of $(DOWNLOAD).' \
	'That takes some minutes, in which pip is silent. Then it trains a model of 0.6M parameters for two minutes on this' \
	'machine, with baselines and measurements 3 to 5 minutes on two idle cores.'

test: .venv/.dev ## the whole test-suite, on CPU, offline
	$(call PYTEST,.venv) -n $(WORKERS)
	$(TRITON)

# a folder that one version saved, under the other
define ACROSS
	@set -e; for way in ".venv-oldest .venv" ".venv .venv-oldest"; do set -- $$way; folder=$$(mktemp -d); \
	OMP_NUM_THREADS=1 $$1/bin/python tests/hub/across_versions.py save $$folder; \
	OMP_NUM_THREADS=1 HF_MODULES_CACHE=$$folder $$2/bin/python tests/hub/across_versions.py check $$folder; rm -rf $$folder; done
endef

test-oldest: .venv-oldest/.test .venv/.dev ## the model contract on the oldest supported transformers, and its folders on the pinned one
	$(if $(CONTRACT),,$(error no contract test found: tests/modeling/test_modeling.py, tests/modeling/test_generate.py, tests/hub/test_hub*.py))
	$(call PYTEST,.venv-oldest) -n $(WORKERS) $(CONTRACT)
	$(ACROSS)

# Nothing is pinned but torch. A warning that transformers is newer than what is tested (configuration/tested_versions.py)
# is no failure here.
test-newest: .venv-newest/bin/pip ## the model contract on the newest releases that pip finds
	@.venv-newest/bin/python .ci/newest.py test env $(call PYTEST,.venv-newest) -n $(WORKERS) \
	-W 'ignore:scrubjay is tested on' $(CONTRACT) $(TRAINING)

record-newest: .venv-newest/bin/pip ## write down the releases on which test-newest has passed
	@.venv-newest/bin/python .ci/newest.py record

test-kernels: .venv/.dev ## the kernels alone: PyTorch's, Triton's in its interpreter, Triton's compiled without a GPU
	$(call PYTEST,.venv) -n $(WORKERS) tests/kernels
	$(TRITON)

gpu: .venv/.dev ## the tests that need a CUDA device, then the benchmark, which writes examples/results/gpu_<name>.json
	$(call PYTEST,.venv) -m gpu
	.venv/bin/python examples/benchmarks/benchmark_gpu.py

style: .venv/.dev ## format and repair
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

quality: .venv/.dev ## what style would change, and the types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(MAKE) --no-print-directory types

types: .venv/.dev .mypy_path/scrubjay ## mypy on configuration, kernels, modeling, conversion
	.venv/bin/mypy

clean: ## remove builds and caches; the environments stay (.venv*)
	rm -rf build dist *.egg-info command/*.egg-info .mypy_path .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

# One environment is a folder; what is installed in it, a stamp beside its bin. pip is the last thing venv puts there.
.venv/bin/pip .venv-oldest/bin/pip .venv-newest/bin/pip: %/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	"scrubjay needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -m venv $*

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/pip
	$(call INSTALL,demo) -c constraints.txt
	@touch $@

# dev holds everything that demo does
.venv/.dev: pyproject.toml constraints.txt | .venv/bin/pip
	$(call INSTALL,dev) -c constraints.txt
	@touch .venv/.demo $@

.venv-oldest/.test: pyproject.toml constraints-oldest.txt | .venv-oldest/bin/pip
	$(call INSTALL,test) -c constraints-oldest.txt
	@touch $@

.mypy_path/scrubjay:
	mkdir -p .mypy_path
	ln -sfn .. $@
