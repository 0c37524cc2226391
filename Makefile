# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAMILY ?= int8_gemm
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.PHONY: help demo test test-asan test-cuda-build native gpu-check bench bench-encoder check lint format clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       set up .venv, build, run the main job on real data'
	@echo 'make test       set up .venv, build, run all tests'
	@echo 'make test-asan  the tests of the kernels under address and undefined sanitizers'
	@echo 'make test-cuda-build  builds with CUDA kernels (needs nvcc, no GPU) and tries that it loads and runs on the CPU'
	@echo 'make native     the torch-free tests of the kernels: every level of this CPU, bit for bit'
	@echo 'make gpu-check  on a machine with a GPU: build, test, sanitize and time the CUDA kernels there'
	@echo 'make bench      measure a family against its peers: make bench FAMILY=int8_gemm'
	@echo 'make bench-encoder  int8 in a whole model against its peers'
	@echo 'make check      every kernel that this machine can run against its oracle'
	@echo 'make lint       ruff, mypy, clang-format, stable ABI, ISA objects, CUDA sources'
	@echo 'make format     let ruff and clang-format rewrite'
	@echo 'make clean      remove .venv and build'

demo: $(VENV)/.built
	$(BIN)/fastsparse demo

test: $(VENV)/.built
	$(BIN)/python -m pytest

test-asan: $(VENV)/.built
	tools/test_asan.sh

test-cuda-build: $(VENV)/.built
	tools/test_cuda_build.sh

native:
	tools/require.sh $(PYTHON)
	mkdir -p build
	@for source in tests/native/*.cpp; do \
	  family=$$(basename $$source .cpp); \
	  tools/native_test.sh $$family build/native-$$family && build/native-$$family 200 || exit 1; \
	done

gpu-check:
	$(PYTHON) tools/gpu_check.py

bench: $(VENV)/.built $(VENV)/.peers
	$(BIN)/python -m bench --family $(FAMILY)
ifeq ($(FAMILY),int8_gemm)  # its bars end with those of a whole model
	$(BIN)/python -m bench.encoder
endif

bench-encoder: $(VENV)/.built $(VENV)/.peers
	$(BIN)/python -m bench.encoder

# Others' kernels, only compared with; the bench runs without them and says what is missing.
$(VENV)/.peers: pyproject.toml $(VENV)/.built
	@echo 'installing what the bench compares with'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements/torch.txt -e '.[peers]'
	@touch $@

check: $(VENV)/.built
	$(BIN)/fastsparse check

lint: $(VENV)/.built
	tools/lint.sh $(BIN)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'bench/*.cpp' 'tests/native/*.cpp' 'tests/cuda_on_cpu/*.h' 'tests/cuda_on_cpu/*.cpp' 'tests/cuda_on_cpu/*.cu')

clean:
	rm -rf $(VENV) .venv-asan .venv-cuda build

# torch is pinned in one place and installed first, alone: a later open range could pull another build of it.
$(VENV)/.torch: requirements/torch.txt requirements/build.txt tools/require.sh
	@tools/require.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch and the build tools (minutes, the first time)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/build.txt
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES) tools/build.sh
	@echo 'building fastsparse'
	@tools/build.sh $(VENV)
	@touch $@
