# make demo   environment, embedded corpus, training, WER, and the text of a real recording: six to eight minutes on two cores
# make test   environment and all tests except the slow ones
# make slow   environment and the slow tests, each takes minutes
# make docs   the documentation as a site, in site/
# make lint   style
#
# PYTHON=python3.12 make demo   another interpreter (3.11 to 3.13)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := results/demo

.PHONY: demo test slow docs lint clean

# A marker for each set of packages; it is written last, so an interrupted installation runs again
$(VENV)/runtime: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version); try: PYTHON=python3.11 make" >&2; exit 1; }
	@echo "Setting up $(VENV) (PyTorch with CUDA is about 3 GB to download)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
	touch $@

demo: $(VENV)/runtime
	$(BIN)/python train.py hparams/hyperconformer.yaml --output_folder $(DEMO)
	@echo "A real recording, with the English model of the package:"
	$(BIN)/python -m speechbrain_ext transcribe examples/speech.flac

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# The oldest supported version; the environment has the newest
$(VENV)/sherpa-1.12.26: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@ --no-deps sherpa-onnx==1.12.26 sherpa-onnx-core==1.12.26
	touch $@

slow: $(VENV)/dev $(VENV)/sherpa-1.12.26
	OMP_NUM_THREADS=1 SHERPA_OLDEST=$(abspath $(VENV)/sherpa-1.12.26) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

# A separate environment: the site is built without running the code. Broken links and references are errors
$(VENV)-docs/done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --disable-pip-version-check $$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	touch $@

docs: $(VENV)-docs/done
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-docs $(DEMO) site build *.egg-info
