# Everything a newcomer needs: `make demo`, `make test`. Only Python >= 3.11 and make have to be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUTS := outputs
# Processes of tests: one more than two cores, as they wait for processes of their own now and then.
JOBS ?= 3

# Where the environment forbids bytecode each of the tests' processes compiles torch and transformers again: twice as long
# as it takes to import them.
unexport PYTHONDONTWRITEBYTECODE
# uv gives up after a minute without a word of its compilers, which a crowded machine takes.
export UV_COMPILE_BYTECODE_TIMEOUT := 600

.PHONY: help demo policy test test-floor test-newest test-install test-page test-runtime test-client test-openpi test-ray test-fuzz check format bench constraints clean

help:
	@echo "make demo        the embedded policy: predictions on example frames, videos of it in simulation, in $(OUTPUTS)/"
	@echo "make policy      record, train and evaluate the policy of this folder again: hours"
	@echo "make test        the complete test suite (offline, CPU)"
	@echo "make test-floor  the same with the oldest supported libraries"
	@echo "make test-newest the same with the newest of everything, without constraints"
	@echo "make test-install  an installation without extras: files, verbs, and what they say is missing"
	@echo "make test-page   the page of openvla serve in Chromium"
	@echo "make test-runtime  openvla-runtime as its wheel gives it, without torch, acts as the model does"
	@echo "make test-client   openvla-client as its wheel gives it, without torch, against openvla serve"
	@echo "make test-openpi   the released openpi-client against openvla serve"
	@echo "make test-ray    openvla serve --ray: two replicas on this machine, one of which is killed"
	@echo "make test-fuzz   openvla serve against 10,000 bad requests, and what schemathesis makes of its description"
	@echo "make check       ruff (format and lint) and mypy"
	@echo "make format      let ruff format and fix"
	@echo "make bench       time one prediction by stage, JSON in $(OUTPUTS)/"
	@echo "make constraints pin the newest libraries in constraints/newest.txt"

# uv makes the environments; where it is missing pip fetches it into a folder of its own.
UV := $(shell command -v uv 2>/dev/null || echo $(VENV)-uv/bin/uv)

$(VENV)-uv/bin/uv:
	$(PYTHON) -m pip install --quiet --target $(VENV)-uv uv

# $(call environment,FOLDER,CONSTRAINTS,EXTRA): an editable installation pinned by a constraints file. With pip (--seed): without
# it, `pip install` in the activated environment would be another Python's, and silently install there. Compiled at once, as
# pip does it: else each process that is the first to import torch would, and tests start three at a time.
comma := ,
define environment
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, $(PYTHON) is " + sys.version)'
	test -x $(1)/bin/python || $(UV) venv --quiet --seed --python $(PYTHON) $(1)
	$(UV) pip install --quiet --compile-bytecode --python $(1)/bin/python --constraints $(2) --editable '.[$(3)]'
	touch $@
endef

$(VENV)/demo.stamp: pyproject.toml constraints/newest.txt | $(UV)
	$(call environment,$(VENV),constraints/newest.txt,demo$(comma)sim)

$(VENV)/dev.stamp: pyproject.toml constraints/newest.txt | $(UV)
	$(call environment,$(VENV),constraints/newest.txt,dev)

$(VENV)-floor/dev.stamp: pyproject.toml constraints/floor.txt | $(UV)
	$(call environment,$(VENV)-floor,constraints/floor.txt,dev)

# Where there is no OpenGL to render with (exit code 3) the prediction is the demo.
demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py --output $(OUTPUTS)
	@echo && echo "In closed loop, one episode of each task (minutes on a CPU):"
	@$(BIN)/openvla demo --output $(OUTPUTS)/demo || { test $$? -eq 3 && \
		echo "No videos: the simulator has nothing to render with, see above. All of the demo that needs none has run."; }

policy: $(VENV)/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/policy.sh $(OUTPUTS)/policy

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-floor: $(VENV)-floor/dev.stamp
	$(VENV)-floor/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Resolved again each time: what an installation without constraints takes today.
test-newest: | $(UV)
	test -x $(VENV)-newest/bin/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)-newest
	$(UV) pip install --quiet --upgrade --python $(VENV)-newest/bin/python --editable '.[dev]'
	$(VENV)-newest/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Not editable: what a wheel holds. A build/ folder of an earlier time would add what is no longer there.
test-install: | $(UV)
	rm -rf build $(VENV)-install
	$(UV) venv --quiet --python $(PYTHON) $(VENV)-install
	$(UV) pip install --quiet --python $(VENV)-install/bin/python --constraints constraints/newest.txt .
	rm -rf build
	HF_HUB_OFFLINE=1 $(VENV)-install/bin/python tests/check_install.py

# The page of `openvla serve` in a browser: Chromium has to be there (apt-get install chromium), or CHROMIUM=PATH.
test-page: $(VENV)/dev.stamp
	$(UV) pip install --quiet --python $(BIN)/python 'playwright>=1.49'
	$(BIN)/python -m pytest -m chromium tests/test_page_in_chromium.py $(ARGS)

# The wheel of packages/openvla-runtime where nothing else is installed, against what the model answers here.
test-runtime: $(VENV)/dev.stamp
	rm -rf $(VENV)-runtime
	$(UV) venv --quiet --python $(PYTHON) $(VENV)-runtime
	$(UV) pip install --quiet --python $(VENV)-runtime/bin/python packages/openvla-runtime
	$(BIN)/openvla export . $(OUTPUTS)/onnx --to onnx --overwrite
	$(BIN)/python tests/check_runtime.py --write $(OUTPUTS)/onnx
	$(VENV)-runtime/bin/python tests/check_runtime.py $(OUTPUTS)/onnx

# The wheel of packages/openvla-client where nothing else is installed, against a running server.
test-client: $(VENV)/dev.stamp
	rm -rf $(VENV)-client
	$(UV) venv --quiet --python $(PYTHON) $(VENV)-client
	$(UV) pip install --quiet --python $(VENV)-client/bin/python packages/openvla-client
	$(BIN)/python tests/check_client.py $(CURDIR)/$(VENV)-client/bin/python

# openpi-client 0.1.2 wants numpy 1, and does not name typing-extensions, which it imports.
test-openpi: $(VENV)/dev.stamp
	test -x $(VENV)-openpi/bin/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)-openpi
	$(UV) pip install --quiet --python $(VENV)-openpi/bin/python openpi-client==0.1.2 typing-extensions
	$(BIN)/python tests/check_openpi.py $(CURDIR)/$(VENV)-openpi/bin/python

# Not in the environment of everything else, which has no need of it.
test-ray: | $(UV)
	test -x $(VENV)-ray/bin/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)-ray
	$(UV) pip install --quiet --python $(VENV)-ray/bin/python --constraints constraints/newest.txt --editable '.[ray]' pytest aiohttp
	$(VENV)-ray/bin/python -m pytest -m ray tests/test_ray.py $(ARGS)

# A server of its own, bad requests over each protocol and below them; its memory before and after.
test-fuzz: $(VENV)/dev.stamp
	test -x $(VENV)-fuzz/bin/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)-fuzz
	$(UV) pip install --quiet --python $(VENV)-fuzz/bin/python 'schemathesis>=4.32,<5'
	$(BIN)/python tests/check_serving.py --schemathesis $(VENV)-fuzz/bin/schemathesis

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/openvla
	MYPYPATH=$(VENV)/types:packages/openvla-client:packages/openvla-runtime $(BIN)/mypy -p openvla_client -p openvla_runtime -m openvla -m openvla.cli -m openvla_light -p openvla.bench -p openvla.conversion -p openvla.data -p openvla.evaluation -p openvla.options -p openvla.presets -p openvla.serving -p openvla.training

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.stamp
	$(BIN)/openvla bench latency --threads 1 --output $(OUTPUTS)/latency.json

# All extras but robosuite, which would hold numpy back for everyone.
PINNED := --extra dev

constraints: | $(UV)
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 $(PINNED) --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --output-file constraints/newest.txt pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-floor $(VENV)-fuzz $(VENV)-newest $(VENV)-client $(VENV)-install $(VENV)-openpi $(VENV)-ray $(VENV)-runtime $(VENV)-uv $(OUTPUTS)
