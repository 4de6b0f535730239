# `make demo` and `make test` set themselves up: Python, a C++ compiler, make and git are all they need
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/core/*.h csrc/core/*.cpp)
STAMP := .venv/.installed
# the oldest release of Triton that the metadata allow: kernels must compile with it too
OLDEST := .venv/triton-3.6

.PHONY: demo test gpu clean

demo: $(STAMP)
	$(BIN)/fastskel demo --out demo-run

# pytest last: its summary is the last line. Two processes take whole files in turns, so that fixtures are made once
test: export FASTSKEL_WERROR = 1
test: $(STAMP) $(OLDEST)
	$(BIN)/ruff check .
	$(BIN)/mypy --strict fastskel
	$(BIN)/python -m fastskel.bench.offline --strict
	PYTHONPATH=$(OLDEST) $(BIN)/python -m fastskel.bench.offline --sample --strict
	@$(BIN)/python -m pytest -q -rs --numprocesses 2 --dist loadfile --no-loadscope-reorder

# everything that waits for a GPU: docs/gpu-queue.md. GPU_PYTHON names an environment that already holds torch, triton, pybind11 and
# pytest: nothing is fetched and nothing installed into it, the package is put together under build/. Python 3.11 or newer: the
# folder that it is started in holds only a part of the package, and must not be searched first
GPU_PYTHON ?= $(BIN)/python
OUT ?= runs/gpu
SITE := build/gpu/$(subst /,-,$(GPU_PYTHON))
GPU_READY := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP),$(SITE)/.ready)

gpu: export PYTHONPATH := $(if $(filter $(STAMP),$(GPU_READY)),,$(CURDIR)/$(SITE):)$(PYTHONPATH)
gpu: export PYTHONSAFEPATH := $(if $(filter $(STAMP),$(GPU_READY)),,1)
gpu: $(GPU_READY)
	$(GPU_PYTHON) -m fastskel.bench.gpu --out $(OUT) $(if $(STAGE),--stage $(STAGE)) $(if $(COMMIT),--commit $(COMMIT)) $(GPU_FLAGS)

$(SITE)/.ready: CMakeLists.txt $(NATIVE)
	rm -rf $(SITE)
	mkdir -p $(SITE)/fastskel
	ln -s $(filter-out %.so %__pycache__ %/kernels %/bench,$(wildcard $(CURDIR)/fastskel/*)) $(CURDIR)/kernels $(CURDIR)/bench $(SITE)/fastskel/
	cmake -S . -B $(SITE)/native -DCMAKE_BUILD_TYPE=Release -Dpybind11_DIR=$$($(GPU_PYTHON) -m pybind11 --cmakedir) \
	  -DPython_EXECUTABLE=$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)') -DFASTSKEL_OUTPUT_DIR=$(CURDIR)/$(SITE)/fastskel
	cmake --build $(SITE)/native -j
	touch $@

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
