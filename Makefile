# bench, test and check make what they need on their first call; a second call finds it and is quick.
#   PYTHON   makes .venv (3.10 or later); `gpu` runs on it directly and installs nothing
#   RESULTS  where `gpu` writes
PYTHON ?= python3
RESULTS ?= bench/results

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Besides the installed Triton, tests compile the kernels with the oldest supported and with the newest.
TRITONS := 3.6.0 3.9.0

.PHONY: bench test check gpu

bench: $(VENV)/runtime $(VENV)/trained.safetensors
	$(BIN)/mxkernels bench --fmt e2m1 --block 4x4
	@for tensor in weight activation gradient; do echo; echo "A real $$tensor, of a small model trained here:"; \
		$(BIN)/mxkernels bench --fmt e2m1 --block 4x4 --input $(VENV)/trained.safetensors:$$tensor; done

test: $(VENV)/development $(TRITONS:%=.triton/%/installed)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	$(PYTHON) bench/gpu.py --results "$(RESULTS)"

$(VENV)/runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[plot]'
	@touch $@

$(VENV)/trained.safetensors: bench/trained.py | $(VENV)/runtime
	$(BIN)/python bench/trained.py $@

$(VENV)/development: $(VENV)/runtime
	$(PIP) --constraint constraints.txt --editable '.[plot,test,dev]'
	@touch $@

# About 200 MB to fetch and up to 1 GB on disk each, which is why they outlive .venv.
.triton/%/installed: | $(VENV)/runtime
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) triton==$*
	@touch $@
