# Everything from nothing: needs python3 with venv and pip, a C++ compiler and make.
#   make train     train digits by FDFA and by backpropagation, side by side
#   make test      the fast Python tests
#   make test-all  all Python tests
#   make test-zoo  models of torchvision, timm and transformers, and loops of Lightning, transformers
#                  and Accelerate, which it installs
#   make coverage  all Python tests, and the lines of the package that they reach
#   make cpp-test  the C++ tests of the kernels
#   make fuzz      random operator calls, nets and files, MINUTES=3 of each; SEED=0
#   make fuzz-kernels  random parameters for the CPU kernels under sanitizers
#   make lint      formatting, linting and types
#   make docs      the documentation with the API reference, into build/docs
#   make release   the source distribution and wheels of all supported Pythons and torches, tried
#   make clean     remove what was built, and .venv

PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 3
SEED ?= 0
PYTEST := pytest -q -n auto --dist worksteal
# The extension is built in place: only what is compiled or declared asks for a new build.
BUILD_INPUTS := $(shell find csrc -type f) setup.py pyproject.toml
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: train test test-all test-zoo coverage cpp-test fuzz fuzz-kernels lint docs release clean

train: .venv/built
	$(BIN)/python -m fdfa_ext train --dataset digits --method fdfa,bp

test: .venv/built
	$(BIN)/python -m $(PYTEST) -m "not slow" python_tests

test-all: .venv/built
	$(BIN)/python -m $(PYTEST) python_tests

test-zoo: .venv/built
	$(BIN)/pip install --quiet -r requirements-zoo.txt
	$(BIN)/python -m $(PYTEST) python_tests/test_zoo.py python_tests/test_zoo_loops.py

coverage: .venv/built
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST) python_tests
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

cpp-test: .venv/installed
	cmake -S . -B build/cpp
	cmake --build build/cpp --parallel
	ctest --test-dir build/cpp --output-on-failure --parallel 2

fuzz: .venv/built
	PYTHONPATH=$(CURDIR):$(CURDIR)/python_tests $(BIN)/python -m fuzz --minutes $(MINUTES) --seed $(SEED)

fuzz-kernels: .venv/installed
	cmake -S . -B build/cpp
	cmake --build build/cpp --parallel --target kernels_fuzz kernels_fuzz_tsan
	build/cpp/kernels_fuzz $$((60 * $(MINUTES))) $(SEED)
	TSAN_OPTIONS=halt_on_error=1 build/cpp/kernels_fuzz_tsan $$((60 * $(MINUTES))) $(SEED)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# The variable silences a notice of the theme on a later version of MkDocs.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What the wheels need is in environments of their own.
release: .venv/installed
	$(BIN)/python scripts/release.py

clean:
	rm -rf .venv build dist *.egg-info fdfa_ext/_built_for.txt fdfa_ext/*.so

.venv/installed: requirements-dev.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

.venv/docs-installed: requirements-docs.txt requirements-dev.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -r requirements-docs.txt
	touch $@

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/built: .venv/installed $(BUILD_INPUTS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
