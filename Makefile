# The verbs of this repository. Each prepares what it needs; only Python 3.11 or newer has to be there.

PYTHON ?= python3
ROOTS := client controller coordinator proto store
BIN := .venv/bin

.PHONY: demo test test-cluster chaos storm scale lint proto bench

# A cluster on this machine, three controllers, and a device that changes hands.
demo: .venv/.demo
	$(BIN)/leasehold demo

# Everything, except what an absent system tool makes impossible: the summary names each such test and tool.
# With LEASEHOLD_REQUIRE_ALL=1 an absent tool is a failure. ARGS goes to pytest. Most of the time is spent waiting
# for leases to run out, so four processes share it even on two cores.
test: .venv/.dev
	$(BIN)/pytest -n 4 --dist loadfile $(ARGS)

# What deploy/compose.yaml describes, in containers: transfers, hosts killed, stopped and cut off, and an upgrade
# under load. For the engine that answers, or for root one of its own.
test-cluster: .venv/.dev
	tests/tools/with-engine $(BIN)/pytest tests/cluster -p no:xdist $(ARGS)

# Whatever can break, broken at random for LEASEHOLD_CHAOS seconds; LEASEHOLD_SEED repeats a plan.
chaos: .venv/.dev
	$(BIN)/pytest tests/chaos -s $(ARGS)

# A hundred transfers and thirty kills or pauses of holders for each driver, judged by what stands on the devices;
# LEASEHOLD_SEED repeats a plan. The figures come with what each test printed.
storm: .venv/.dev
	$(BIN)/pytest tests/storm -n 2 -rP --show-capture=stdout $(ARGS)

# Ten thousand devices, and the death of a controller that holds a thousand: what docs/scale.md tells.
scale: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -m scale $(ARGS)

lint: .venv/.dev .venv-proto/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(ROOTS) tests
	$(BIN)/lint-imports
	$(BIN)/buf lint
	rm -rf .venv-proto/stubs
	mkdir .venv-proto/stubs
	$(call stubs,.venv-proto/stubs)
	diff -r -x '*.proto' -x __init__.py -x py.typed -x __pycache__ .venv-proto/stubs/leasehold proto/leasehold || \
	  { echo 'the stubs are not what the .proto files say: run make proto' >&2; exit 1; }

# The stubs that stand beside the .proto files, made anew.
proto: .venv-proto/.ready
	$(call stubs,proto)

# What it costs and how fast it is, beside its peers; writes docs/benchmarks.md. ARGS=--quick only shows.
bench: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

# leasehold/etcd has no services: it calls etcd by literal method paths.
define stubs
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" python -m grpc_tools.protoc -Iproto --python_out=$(1) \
	  --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/leasehold/v1/*.proto
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" python -m grpc_tools.protoc -Iproto --python_out=$(1) \
	  --mypy_out=quiet:$(1) proto/leasehold/etcd/v3/*.proto
endef

# What is left of an environment that could not be made would only fail in another way the next time.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Leasehold needs Python 3.11 or newer: name one by make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	touch .venv/.demo $@

# An environment of its own: the generators pin an older protobuf than the program runs on. The stubs they
# write are good for every protobuf from 5.29 and every grpcio from 1.71 on.
.venv-proto/.ready: Makefile
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install -qq --disable-pip-version-check grpcio-tools==1.71.2 mypy-protobuf==3.6.0
	touch $@
