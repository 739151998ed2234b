# make bench, make test: everything from a fresh clone, in a virtual environment of their own.
# make bench VENV= : the same in the environment that is active, with the torch that it has.
# make cuda-build-check : builds against a CUDA torch (several GB) where nvcc is; needs no GPU.
# make test-matrix ARGS="--session torch-2.6.0-py3.12 -- --discard" : one of the versions of
#   docs/versions.md, in an environment of its own (5 GB); without ARGS all of them, --list shows which.
# make test-oldest : the command line with the lower bounds of its packages (5 GB, deleted afterwards).
# make sanitize : the compiled module under sanitizers; ARGS=--quick the CPU kernels alone.
# make coverage ARGS="-k gradients" : lines and branches that tests run, of Python and of C++.
# make mutants : faults that are put into sources one by one, and whether tests find them.
# make fuzz CASES=10000 : random cases, as many for each property.
# make audit : known weaknesses of what the package and its extras take, in this environment; fails
#   where they cannot be looked up.
# make wheel : builds one and tries it in a fresh environment.
# make docs : builds the site of the documentation into build/site, and takes no warning.
# make wheels : an sdist, a pure wheel and one for each of TORCHES, into dist/; docs/install.md.
# make gpu-check VENV= OUT=folder : all checks of a machine with a GPU; installs nothing.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
JOBS ?= 2
OUT ?= benchmarks/out/gpu
CASES ?= 10000
TORCHES ?= 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0

ifeq ($(strip $(VENV)),)
BIN :=
PY := $(PYTHON)
else
BIN := $(VENV)/bin/
PY := $(BIN)python
endif
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := build/stamps/$(subst /,_,$(or $(strip $(VENV)),active))
CPP := $(shell find csrc tests/simt tests/cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build bench test test-matrix test-oldest sanitize coverage mutants fuzz audit wheel wheels \
  gpu-check cuda-build-check docs lint format clean

# torch first: the compiled module is built against the one that is there. Of the models that tests
# build, two come from packages whose dependencies they do not need, torchaudio among them.
$(STAMP): pyproject.toml
	@mkdir -p $(@D)
	$(if $(BIN),$(PYTHON) -m venv $(VENV))
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install -q $(TORCH)
	$(PIP) install -q 'setuptools>=77' ninja pybind11
	WNKERNEL_BUILD=none $(PIP) install -q --no-build-isolation \
	  -e '.[audit,bench,coverage,docs,lint,matrix,release,test]'
	$(PIP) install -q --no-deps encodec einops ChatTTS
	@touch $@

# Incremental: compiles what changed, or everything when torch did.
build: $(STAMP)
	$(PY) setup.py -q build_ext --inplace

bench: build
	$(PY) -m benchmarks $(ARGS)

# Threads that spin while they wait for each other keep the other processes from running.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) $(ARGS)

# Each builds the module in a copy of this folder, below build/.
sanitize: $(STAMP)
	$(PY) -m tests.instrumented $(ARGS)

coverage: $(STAMP)
	$(PY) -m tests.measured $(ARGS)

mutants: build
	WNKERNEL_MUTANTS=1 $(PY) -m pytest -q -n $(JOBS) tests/core/test_cpu_mutants.py
	$(PY) -m tests.mutation $(ARGS)

fuzz: build
	OMP_WAIT_POLICY=passive WNKERNEL_FUZZ_CASES=$(CASES) $(PY) -m pytest -n $(JOBS) tests/fuzz $(ARGS)

audit: $(STAMP)
	$(PY) -m tests.audit $(ARGS)

wheel: $(STAMP)
	rm -rf dist
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	$(PY) -m tests.wheel dist/*.whl

wheels: $(STAMP)
	rm -rf dist
	$(PY) -m buildtools.wheels dist --torch $(TORCHES)

# A leg whose Python is not there is skipped. The table is of all legs that were ever run.
test-matrix: $(STAMP)
	$(PY) -m nox $(ARGS); status=$$?; $(PY) -m tests.matrix table; exit $$status

test-oldest: $(STAMP)
	$(PY) -m nox --error-on-missing-interpreters --session oldest -- --discard

# Builds by itself, so that a failed build does not stop the rest.
gpu-check: $(if $(BIN),$(STAMP))
	$(PY) -m tools.gpu_check --out '$(OUT)' $(ARGS)

cuda-build-check:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -c 'import torch, setuptools, ninja, pybind11, numpy' 2>/dev/null || \
	  $(CUDA_VENV)/bin/pip install -q $(CUDA_TORCH) 'setuptools>=77' ninja pybind11 numpy
	WNKERNEL_BUILD=cuda $(CUDA_VENV)/bin/python setup.py -q build --build-base build/cuda \
	  --build-lib build/cuda/lib
	cd build/cuda/lib && $(abspath $(CUDA_VENV))/bin/python - < $(CURDIR)/tests/cuda/build_check.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)lint-imports --no-logo --no-cache
	$(BIN)clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info wnkernel/_C*.so wnkernel/_build_info.py
