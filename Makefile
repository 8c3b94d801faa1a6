# Every target makes its own virtual environment first; nothing needs to be installed by hand. Another interpreter gets an
# environment of its own: make test PYTHON=python3.13 makes .venv-python3.13.
#
#   make demo                        the whole way on a small generated data set
#   make test                        the tests
#   make check                       ruff, mypy and the tests
#   make extract DATA=... ENCODERS=clip,bert,resnet50
#   make heads, make finetune       train and rank heads; train the last layers of encoders with the best
#   make audit DATA=..., make report look at the data; look at the best run
#   make submit                     write the submission
#   make benchmark                   every figure beside its goal and the ways of peers, about 20 minutes
#   make clean                       remove the virtual environment and the demo data

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= $(if $(filter file,$(origin PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TESTED := $(VENV)/.ready-test
MMFEAT := $(BIN)/mmfeat
TESTS  := $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: help install demo extract audit heads finetune report submit test check benchmark format clean
help:
	@sed -n 's/^#   //p' Makefile

install: $(READY)

# The constraints pin the tested set, so that torch and torchvision match.
define fill
@echo "installing into $(VENV) (the first time takes some minutes: PyTorch is large)"
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mmfeat needs Python 3.10 or newer; make PYTHON=...")'
@$(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)'
@touch $@ $(READY)
endef

$(READY): pyproject.toml constraints.txt
	$(call fill,.)

$(TESTED): pyproject.toml constraints.txt
	$(call fill,.[test])

demo: install
	$(MMFEAT) demo --out demo
	$(MMFEAT) run demo --encoders hashing,hog --fusion concat,gated --out submission-demo.csv

extract: install
	@test -n "$(DATA)" || { echo "make extract needs DATA=FOLDER (and optionally ENCODERS=clip,bert,resnet50)"; exit 2; }
	$(MMFEAT) extract --data "$(DATA)" $(if $(ENCODERS),--encoders "$(ENCODERS)")

audit: install
	$(MMFEAT) audit $(if $(DATA),--data "$(DATA)")

heads: install
	$(MMFEAT) heads --fusion all

finetune: install
	$(MMFEAT) finetune

report: install
	$(MMFEAT) report

submit: install
	$(MMFEAT) submit

test: $(TESTED)
	$(TESTS)

check: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin
	MMFEAT_CHECK=1 $(TESTS)

benchmark: $(TESTED)
	$(BIN)/python benchmarks/run.py

format: $(TESTED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo submission-demo.csv
