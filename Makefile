# Everything runs from .venv, which the first target that needs it sets up; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# TORCH=cpu or TORCH=cuda; remembered, so that only `make setup` needs it.
TORCH ?= $(shell cat $(VENV)/.torch 2>/dev/null || echo cpu)
STAMP := $(VENV)/.stamp-$(TORCH)
CONSTRAINTS := constraints/default.txt
EXTRAS := metaworld,minari,pixels,dev
# What the tests of the environments need on top, and nobody else.
ENV_EXTRAS := sb3,robotics,ogbench,pusht,dmcontrol,mjx,foundation
ENV_STAMP := $(VENV)/.stamp-envs
# Without these most tests of the environments would skip and the rest be green; with WAMRL_TEST_NEEDS pytest refuses.
TEST_NEEDS := metaworld minari stable_baselines3 gymnasium_robotics ogbench gym_pusht shimmy dm_control mujoco jax torchmetrics diffusers
CPU_WHEELS := https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BENCHMARKS ?= plan_metaworld planner_overhead planners
ARGS ?=

ISAAC := .venv-isaac
ISAAC_STAMP := $(ISAAC)/.stamp
ISAAC_CONSTRAINTS := constraints/isaac.txt

.PHONY: help setup plan test setup-isaac test-isaac checkpoint lint bench tables clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo
	@echo "  ARGS=\"...\" goes to the command: make plan ARGS=\"env=metaworld/push-v3 planner.horizon=8\""

setup: $(STAMP) ## make .venv with pinned versions (TORCH=cuda for a GPU build of torch, PYTHON=... for another Python)

plan: $(STAMP) ## plan inside the shipped World Action Model on a simulated robot arm; writes outputs/plan/latest
	@$(BIN)/python -m wamrl.plan $(ARGS)

test: $(ENV_STAMP) ## run the tests (ARGS="-k name" for some of them)
	@OMP_NUM_THREADS=1 WAMRL_TEST_NEEDS="$(TEST_NEEDS)" $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

$(ENV_STAMP): $(STAMP)
	@echo "installing the packages of the environments that the tests ask: $(ENV_EXTRAS)"
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-input -c $(CONSTRAINTS) --no-build-isolation \
		-e ".[$(EXTRAS),$(ENV_EXTRAS)]"
	@$(BIN)/python -m pip --disable-pip-version-check check
	@touch $(ENV_STAMP)

setup-isaac: $(ISAAC_STAMP) ## make .venv-isaac: real Isaac Lab on a CPU, which cannot share an environment with Meta-World

test-isaac: $(ISAAC_STAMP) ## run the tests of the Isaac Lab environments (two minutes; four the first time)
	@WARP_CACHE_PATH=$(CURDIR)/$(ISAAC)/warp-cache OMP_NUM_THREADS=1 WAMRL_TEST_NEEDS=isaaclab \
		$(ISAAC)/bin/python -m pytest -m isaac --timeout 900 tests/test_env_isaaclab.py tests/test_env_contract.py $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

checkpoint: $(STAMP) ## collect, train and write the shipped checkpoint again
	@$(BIN)/python -m benchmarks.make_checkpoint $(ARGS)

bench: $(STAMP) ## run the benchmarks (BENCHMARKS="planner_overhead" for some); writes benchmarks/results
	@$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[$(EXTRAS),bench]"
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(ARGS); done

tables: $(STAMP) ## write the tables of the README and the docs from benchmarks/results
	@$(BIN)/python -m benchmarks.tables $(ARGS)

clean: ## remove caches and build products; .venv and outputs stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@case "$(TORCH)" in cpu|cuda) ;; *) echo "TORCH=$(TORCH) is not known; use TORCH=cpu or TORCH=cuda" >&2; exit 2;; esac
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "wamrl needs Python 3.11 or 3.12, and none was found as python3.11, python3.12, python3 or python." >&2; \
		echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi; \
	if ! $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
		echo "PYTHON=$$python is no Python 3.11 or 3.12 that runs ($$($$python --version 2>&1 | tail -n 1))" >&2; \
		exit 2; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making $(VENV) with $$python ($$($$python --version))"; \
		$$python -m venv --clear $(VENV) || \
			{ echo "$$python cannot make a virtual environment; on Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 2; }; \
	fi
	@rm -f $(VENV)/.stamp-* $(VENV)/.torch
	@pip="$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-input"; \
	$$pip -c $(CONSTRAINTS) setuptools wheel; \
	version=$$(sed -n 's/^torch==//p' $(CONSTRAINTS)); \
	echo "installing torch $$version ($(TORCH))"; \
	if [ "$(TORCH)" = cuda ]; then \
		$$pip --no-deps "torch===$$version"; \
	elif ! $$pip --no-deps "torch==$$version+cpu" 2>/dev/null && \
	     ! $$pip --no-deps --retries 1 --timeout 30 --index-url $(CPU_WHEELS) "torch==$$version" 2>/dev/null; then \
		echo "$(CPU_WHEELS) has no torch $$version for this machine or cannot be reached;" >&2; \
		echo "taking torch from the default package index instead, which on Linux brings several GB of CUDA libraries" >&2; \
		$$pip --no-deps "torch==$$version"; \
	fi; \
	echo "installing wamrl[$(EXTRAS)] and what it needs, at the versions of $(CONSTRAINTS)"; \
	$$pip -c $(CONSTRAINTS) --no-build-isolation -e ".[$(EXTRAS)]"
	@$(BIN)/python -m pip --disable-pip-version-check check
	@if [ "$(TORCH)" = cuda ]; then $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None and \
		f"torch {torch.__version__} was installed, which is no CUDA build; does this platform have one?")'; fi
	@$(BIN)/python -c 'from ctypes.util import find_library as f; f("EGL") or f("OSMesa") or print("neither EGL nor OSMesa \
	was found, so runs go on without videos; on Debian or Ubuntu: sudo apt-get install libegl1 libosmesa6")'
	@echo $(TORCH) > $(VENV)/.torch
	@touch $(STAMP)

# Upstream supports Isaac Lab on Python 3.12 only, with several GB of CUDA libraries; its wheel is pure Python and runs on
# 3.11 and a CPU build of torch as well, hence --no-deps and the list of what it needs.
$(ISAAC_STAMP): pyproject.toml $(ISAAC_CONSTRAINTS)
	@python="$(PYTHON)"; test -n "$$python" || { echo "wamrl needs Python 3.11 or 3.12; name it: make setup-isaac PYTHON=..." >&2; exit 2; }; \
	if ! $(ISAAC)/bin/python -m pip --version >/dev/null 2>&1; then \
		echo "making $(ISAAC) with $$python"; $$python -m venv --clear $(ISAAC); \
	fi
	@rm -f $(ISAAC_STAMP)
	@pip="$(ISAAC)/bin/python -m pip --disable-pip-version-check install --quiet --no-input"; \
	$$pip -c $(ISAAC_CONSTRAINTS) setuptools wheel; \
	version=$$(sed -n 's/^torch==//p' $(ISAAC_CONSTRAINTS)); \
	echo "installing torch $$version (cpu)"; \
	if ! $$pip --no-deps "torch==$$version+cpu" 2>/dev/null && \
	   ! $$pip --no-deps --retries 1 --timeout 30 --index-url $(CPU_WHEELS) "torch==$$version" 2>/dev/null; then \
		echo "$(CPU_WHEELS) has no torch $$version for this machine or cannot be reached;" >&2; \
		echo "taking torch from the default package index instead, which on Linux brings several GB of CUDA libraries" >&2; \
		$$pip --no-deps "torch==$$version"; \
	fi; \
	echo "installing Isaac Lab and what it needs, at the versions of $(ISAAC_CONSTRAINTS)"; \
	$$pip -c $(ISAAC_CONSTRAINTS) $$(sed -n 's/^# needs: //p' $(ISAAC_CONSTRAINTS)); \
	$$pip --ignore-requires-python --no-deps -c $(ISAAC_CONSTRAINTS) isaaclab; \
	$$pip -c $(ISAAC_CONSTRAINTS) --no-deps --no-build-isolation -e .
	@touch $(ISAAC_STAMP)
