# make demo    train the embedded demo, from nothing to the table of results          make demo-vision    the same with pictures
# make test    run all tests          make check   formatting, lint, types          make test-faults   200 kills and more
# make lock    pin every package to its newest release that pyproject.toml allows   make test-oldest, make test-newest
PYTHON ?= python3
# constraints.txt pins what was tested. Its torch also exists as a CPU build; on a machine with a GPU pip takes the CUDA build.
INSTALL = .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-vision test test-gpu test-faults test-distributed test-oldest test-newest lock check docs bench bench-gpu gpu-first clean
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/installed

demo: .venv/installed
	.venv/bin/python scripts/dpo.py --output_dir out/demo

demo-vision: .venv/installed
	.venv/bin/python scripts/dpo_vlm.py --output_dir out/demo-vision

test: .venv/installed-dev
	.venv/bin/python -m pytest -n auto --dist loadfile

test-gpu: .venv/installed-dev
	DPO_TRAINER_TEST_GPU=1 .venv/bin/python -m pytest tests/gpu

test-faults: .venv/installed-dev
	.venv/bin/python tests/faults/kill_test.py

# every run of tests/distributed under every engine, and the table of largest differences
test-distributed: .venv/installed-dev
	DPO_TRAINER_TEST_DISTRIBUTED=1 .venv/bin/python -m pytest tests/distributed

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt uv

# for Python 3.10 and later, Linux with and without CUDA, macOS; never edited by hand
lock: .venv-uv/bin/uv
	.venv-uv/bin/uv pip compile --quiet --universal --python-version 3.10 --all-extras --upgrade --no-annotate \
	  --custom-compile-command 'make lock' pyproject.toml -o constraints.txt

# a quarter of the tests, in .venv-oldest and .venv-newest; the results go to docs/versions.md
test-oldest test-newest: test-%: .venv/installed .venv-uv/bin/uv
	.venv/bin/python tests/version_ranges.py $*

check: .venv/installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python docs/generate.py --check

docs: .venv/installed-dev
	.venv/bin/python docs/generate.py

# TRL in an environment of its own, then both trainers in turns on the data in ../shared/data, tables and plots
.venv-trl/bin/python:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements-trl.txt

bench: .venv/installed .venv-trl/bin/python
	.venv/bin/python benchmarks/suite.py
	.venv/bin/python benchmarks/report.py
	.venv/bin/python docs/generate.py

# the same on a CUDA device, with models of the shapes of Qwen2-0.5B and 7B in bfloat16; has never run
bench-gpu: .venv/installed .venv-trl/bin/python
	.venv/bin/python benchmarks/suite.py 'gpu-*'
	.venv/bin/python benchmarks/report.py

# all that only a card can tell, in at most 12 minutes of one; the results go to benchmarks/results/gpu-first-DEVICE.md; has never run
gpu-first: .venv/installed-dev
	-$(MAKE) .venv-trl/bin/python
	.venv/bin/python benchmarks/gpu_first.py

clean:
	rm -rf .venv .venv-uv .venv-oldest .venv-newest build dist *.egg-info
