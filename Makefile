# make demo | test | test-all | lab : each sets up .venv first if need be.
#   PYTHON=python3.12        the interpreter (3.11 or 3.12)
#   TORCH_INDEX=<address>    where torch and torchvision come from, e.g. the CPU index that pytorch.org names
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do if $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3,11),(3,12)))' 2>/dev/null; then echo $$p; exit; fi; done)
PIP := .venv/bin/python -m pip
PRESET ?= demo
# Tests run in JOBS processes of one thread each.
JOBS ?= 2
# Threads that wait sleep instead of spinning: where other work shares the cores, spinning makes training several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all lab check readme clean
demo: .venv/.ready
	@.venv/bin/adam_nb run $(PRESET)

test: .venv/.ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What is marked slow has the machine for itself, and then the explorers, which must be quick there.
test-all: .venv/.ready
	@status=0; $(MAKE) test || status=1; ADAM_NB_TEST_FLAGS="slow data" .venv/bin/python -m pytest -m slow || status=1; ADAM_NB_SLACK=1 .venv/bin/python -m pytest -q tests/test_browser.py || status=1; exit $$status

# Root is the usual user of a container, and Jupyter wants that said.
lab: .venv/.ready
	.venv/bin/jupyter lab --notebook-dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root)

# Notebooks clean, and adam_nb/ what they export: fails with the difference.
check: .venv/.ready
	.venv/bin/nbdev_clean
	.venv/bin/nbdev_export
	git diff --exit-code -- nbs adam_nb

.venv/.ready: constraints.txt settings.ini setup.py pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "adam_nb needs Python 3.11 or 3.12, and none was found: install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"adam_nb needs Python 3.11 or 3.12, but $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@echo "Setting up .venv: about 3 GB to download with CUDA builds of torch, 0.6 GB with TORCH_INDEX=<the CPU index that pytorch.org names>."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment; install its venv package (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	$(if $(TORCH_INDEX),$(PIP) install --progress-bar on -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) install --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	find outputs -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .snakemake

# README.md from nbs/index.ipynb
readme: .venv/.ready
	.venv/bin/jupyter nbconvert --to markdown --RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns="^\s*(\#\|\s*hide|<!-- in the notebook only)" --output-dir . --output README nbs/index.ipynb
	sed -i.bak "s|](images/|](nbs/images/|" README.md && rm README.md.bak
