# `make demo` and `make test` set themselves up: Python, a C++ compiler, make and git are all they need
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/core/*.h csrc/core/*.cpp)
STAMP := .venv/.installed
# the oldest release of Triton that the metadata allow: kernels must compile with it too
OLDEST := .venv/triton-3.6

.PHONY: demo test clean

demo: $(STAMP)
	$(BIN)/fastskel demo --out demo-run

# pytest last: its summary is the last line
test: export FASTSKEL_WERROR = 1
test: $(STAMP) $(OLDEST)
	$(BIN)/ruff check .
	$(BIN)/mypy --strict fastskel
	$(BIN)/python -m fastskel.bench.offline --strict
	PYTHONPATH=$(OLDEST) $(BIN)/python -m fastskel.bench.offline --sample --strict
	@$(BIN)/python -m pytest -q -rs

# torch first: the release that the constraints name, before anything else asks for one
$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

# beside the environment: the tests run on the newest
$(OLDEST): $(STAMP)
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

clean:
	rm -rf .venv build *.egg-info fastskel/_native*.so
