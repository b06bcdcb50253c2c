# Every target works as the first command in a fresh clone: `setup` builds .venv once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Kernels with every index checked are other machine code, in a cache of their own; they need not be
# fast.
CHECKED := NUMBA_BOUNDSCHECK=1 NUMBA_OPT=1 NUMBA_CACHE_DIR=.numba_boundscheck

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all kernels bounds fuzz-some test-checked coverage soak fuzz-files fuzz-kernels kill audit mutants lint docs bench gpu matrix zoo xla dist clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## build .venv with the package and everything the other targets need

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	@touch $(STAMP)

# Of the demo alone: without the tests' packages and, where the index below answers, with torch's
# builds without CUDA, which take a tenth of the room.
DEMO_BIN := .venv-demo/bin
DEMO_STAMP := .venv-demo/.installed
TORCH_CPU ?= https://download.pytorch.org/whl/cpu

demo: $(DEMO_STAMP) ## a domain shift in photographs, every method beside ola: four minutes
	$(DEMO_BIN)/python examples/demo.py $(DEMO)

$(DEMO_STAMP): pyproject.toml
	$(PYTHON) -m venv .venv-demo
	$(DEMO_BIN)/python -m pip install --quiet --disable-pip-version-check \
		--index-url $(TORCH_CPU) --retries 0 --timeout 10 torch torchvision 2>/dev/null \
		&& $(DEMO_BIN)/python -c "import torchvision" 2>/dev/null \
		|| { echo "no pair of torch and torchvision without CUDA from $(TORCH_CPU): taking the usual index's"; \
		$(DEMO_BIN)/python -m pip uninstall --quiet --yes torch torchvision 2>/dev/null; }
	$(DEMO_BIN)/python -m pip install --disable-pip-version-check --editable '.[demo]'
	@touch $(DEMO_STAMP)

test: $(STAMP) ## lint, check types and run all tests, two at a time
	$(MAKE) --no-print-directory --jobs 2 kernels lint bounds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

kernels: $(STAMP)
	$(BIN)/python -c "import ola_augment.operations as operations; operations.compile_kernels()"

bounds: fuzz-some test-checked ## 2,000 fuzzed calls and some tests of the kernels with every index checked

fuzz-some: $(STAMP)
	$(CHECKED) OMP_NUM_THREADS=1 $(BIN)/python examples/reliability/fuzz_kernels.py --cases 2000

test-checked: $(STAMP)
	$(CHECKED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k "not every_bin" \
		tests/test_operations_exact.py tests/test_bad_values.py tests/test_bounds.py

coverage: $(STAMP) ## branch coverage of the tests: 97 % outside of compiled bodies
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --ignore tests/test_examples.py -k "not every_bin"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under 97

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation into docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python -m pytest tests/test_docs.py

BENCHMARKS := augment per_image peers depths startup kornia_operations whole_run \
	"alignment --model small_cnn --pairs 60" "alignment --look-ups --batch 32 --pairs 10"

bench: $(STAMP) ## run all benchmarks alone on the machine; fails where one is past a limit
	@failed=; for benchmark in $(BENCHMARKS); do \
		set -- $$benchmark; script=$$1; shift; echo "== $$script $$*"; \
		$(BIN)/python examples/benchmarks/$$script.py "$$@" || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "past a limit, or failed:$$failed"; exit 1; }

gpu: ## on a machine with an NVIDIA GPU: all that wants one, in eight minutes, as a table
	$(PYTHON) examples/gpu/run.py $(GPU)

test-all: test soak fuzz-files fuzz-kernels kill mutants ## all tests and the slow reliability checks (an hour)

soak: $(STAMP) ## 20,000 steps and 500 image sizes: memory, files, hooks and threads stay
	$(BIN)/python examples/reliability/soak.py

fuzz-files: $(STAMP) ## 200,000 damaged policy files
	$(BIN)/python examples/reliability/fuzz_files.py

fuzz-kernels: $(STAMP) ## 20,000 good and bad calls of what runs kernels, every index checked
	$(CHECKED) $(BIN)/python examples/reliability/fuzz_kernels.py

kill: $(STAMP) ## kill -9 a training run at 20 moments, resume, compare
	$(BIN)/python examples/reliability/kill.py --epochs 60

audit: $(STAMP) ## known vulnerabilities of what is installed
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit

mutants: $(STAMP) ## mutation testing, bounded: 90 % must be noticed
	$(BIN)/python examples/reliability/mutants.py

matrix: $(STAMP) ## the tests that would notice, with both ends of the supported versions
	$(BIN)/python examples/reliability/matrix.py

zoo: $(STAMP) ## the alignment engine on some two hundred models against their oracles (half an hour on two idle cores)
	$(BIN)/python -m pip install --quiet --editable '.[zoo]'
	$(BIN)/python examples/zoo/run.py --jobs 2 --limit 900 --table docs/_zoo_table.md

xla: ## all operations and a learner on an XLA device, in an environment of its own (.venv-xla)
	test -d .venv-xla || $(PYTHON) -m venv .venv-xla
	.venv-xla/bin/python -m pip install --quiet --editable '.[xla]'
	PJRT_DEVICE=CPU .venv-xla/bin/python examples/reliability/xla.py

dist: $(STAMP) ## build sdist and wheel into dist/, look into them, try the wheel in a fresh environment
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python examples/reliability/dist.py --out dist

clean: ## remove what the other targets made
	rm -rf .venv .venv-demo .venv-xla runs dist .numba_boundscheck .coverage* docs/_build docs/auto_examples docs/generated .hypothesis .mypy_cache .pytest_cache .ruff_cache
