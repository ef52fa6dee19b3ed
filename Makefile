# Everything runs in .venv; constraints.txt pins what the figures in docs/ were made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-rest coverage test-gpu gpu test-processes test-kill test-slow bench-parts bench-reconstruction measure-promise measure-curves check format \
	soak profile results wheel clean

# Score the embedded model's heads, draw them, and answer a question under a cache budget of 64 tokens per head.
demo: $(VENV)/.installed
	$(BIN)/headprof score --no-tune -o demo/SmolLM2-135M-Instruct.safetensors
	$(BIN)/headprof heatmap demo/SmolLM2-135M-Instruct.safetensors -o heads.png
	$(BIN)/headprof generate --profile demo/SmolLM2-135M-Instruct.safetensors --budget 64 --compare < /dev/null

# Every test that takes less than five seconds, of those with many cases six that are spread over them.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal --cases spread

# The others, marked `long`, and all other cases; part of .ci/run.
test-rest: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal --cases rest

# All of these, slower, with the lines that none of them runs.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal --cov=headprof --cov-report=term --cov-fail-under=90

# Tests that need CUDA; run them on a machine that has it.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu

# These tests and every figure that takes a GPU, within eight minutes on one H100; PARTS=steps,tests for some of it (see
# tests/gpu_report.py). GPU_PYTHON=python3 takes that Python as it is, with the required packages, and makes no .venv.
GPU_PYTHON ?= $(BIN)/python
GPU_OUT ?= gpu
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.installed)
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) tests/gpu_report.py $(if $(PARTS),--parts $(PARTS)) \
		-o "$(GPU_OUT)" $(GPU_OPTIONS)

# Whole runs by processes of their own: two at once, servers, those that are killed or interrupted and resumed; part of .ci/run.
test-processes: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m processes

# A scoring run killed three times at random moments and resumed, again and again.
test-kill: $(VENV)/.installed
	HEADPROF_KILLED_RUNS=10 $(BIN)/python -m pytest tests/test_team.py -m processes -k killed

# What takes long: many random configurations, and every causal model class of Transformers.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# Merging the rows of a layer, the importance of its prompt, and compressing all of it, each timed alone.
bench-parts: $(VENV)/.installed
	$(BIN)/python tests/bench_parts.py merge --shape smollm2-135m
	$(BIN)/python tests/bench_parts.py merge --shape llama-3-8b
	$(BIN)/python tests/bench_parts.py importance --shape llama-3-8b
	$(BIN)/python tests/bench_compress.py --shape llama-3-8b

# A document compressed by its own repetition, at once and in segments, beside a plain prefill: time and memory.
bench-reconstruction: $(VENV)/.installed
	$(BIN)/python tests/bench_reconstruction.py --length 4k

# How well promised losses are kept on questions that were never seen; goes on where it was interrupted.
measure-promise: $(VENV)/.installed
	$(BIN)/python tests/measure_promise.py --documents 40 -o results/promise

# How well the sum of a profile's influence curves foretells what all heads lose together; CURVES names the profile.
CURVES ?= profiles/SmolLM2-135M-Instruct.safetensors
measure-curves: $(VENV)/.installed
	$(BIN)/python tests/measure_curves.py --profile "$(CURVES)" --question known --allocations 50 -o results/curves

# Eight clients ask a server of a tiny model at once: is each answer the one that it gets alone, are all bytes free again?
soak: $(VENV)/.installed
	$(BIN)/python tests/soak_server.py -o soak.json $(SOAK)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The profile of the embedded model that ships in profiles/.
profile: $(VENV)/.installed
	$(BIN)/headprof score --no-tune -o profiles/SmolLM2-135M-Instruct.safetensors
	$(BIN)/headprof score --reconstruction --add-to profiles/SmolLM2-135M-Instruct.safetensors
	$(BIN)/headprof tune profiles/SmolLM2-135M-Instruct.safetensors
	rm profiles/SmolLM2-135M-Instruct.probes.safetensors

# The figures of docs/results.md, and most of docs/scoring.md: five and a half hours on 2 cores that do nothing else; an
# evaluation that was interrupted goes on where it was. DATA holds LongBench's multi_news.jsonl and BABILong's files; without
# it, the evaluations of these two come from the hub (leave --data-dir away). Two processes of one thread each ask more in the
# same time than one of two threads.
METHODS := headkv-ems,headkv-r2,headkv,snapkv,ems,adakv,pyramidkv,tova,h2o,knorm,streamingllm
TUNED := snapkv:kernel=11:pooling=mean:power=2:ramp=true
ABLATION := ems,ems:combine=global,ems:combine=local,ems:threshold=1,ems:mass=false,ems:threshold=-1,ems:merge_keys=true
DATA ?= data-of-benchmarks
TEXTS ?= $(DATA)/longbench/multi_news.jsonl
EVAL := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m headprof eval --resume
results: $(VENV)/.installed
	$(EVAL) --preset standard --methods $(METHODS),$(TUNED) -o results/known
	$(EVAL) --preset standard --methods $(METHODS),$(TUNED) --lengths 2k --probes 100 -o results/known-2k
	$(EVAL) --preset standard --methods $(METHODS),$(TUNED) --query-agnostic --budgets 128,256 -o results/agnostic
	$(EVAL) --tasks niah --lengths 256,512,1k,2k --methods headkv-r2,headkv,snapkv,adakv,pyramidkv,tova,h2o,streamingllm \
		--budgets 32,64,128 --probes 100 -o results/depths
	$(EVAL) --tasks babilong --lengths 0k,1k,2k --limit 100 --data-dir $(DATA) --methods $(METHODS) --budgets 64,128,256 \
		-o results/babilong
	$(EVAL) --tasks longbench/multi_news --limit 6 --data-dir $(DATA) --methods $(METHODS) --budgets 64,128,256 \
		-o results/multi_news
	$(EVAL) --preset standard --methods $(ABLATION),$(subst ems,headkv-ems,$(ABLATION)) --budgets 16,64 --probes 120 \
		-o results/ablation
	$(BIN)/headprof eval --tasks perplexity --data-dir $(TEXTS) --budgets 32,64,128,256 -o results/perplexity \
		--methods headkv-ems,ems,headkv-r2,snapkv,tova,h2o,knorm,streamingllm
	$(BIN)/headprof eval --tasks perplexity --data-dir $(TEXTS) --budgets 64,256 --documents 8 -o results/ablation-perplexity \
		--methods $(ABLATION)
	$(BIN)/headprof bench generate --methods headkv-r2,headkv-ems,ems,snapkv,h2o,tova,knorm,streamingllm,adakv \
		--lengths 4000 --new-tokens 16 -o results/bench-methods.json
	$(BIN)/headprof bench generate --methods ems --budgets 128 --lengths 1k --new-tokens 6000 --repeats 1 --without-full -o results/bench-long.json
	$(MAKE) bench-parts
	$(BIN)/headprof bench score --probes 96 --sides packed,stepwise-fast -o results/bench-score.json
	$(BIN)/headprof bench score --probes 24 -o results/bench-score-all.json
	$(BIN)/headprof bench score --probes 24 --sides packed --lengths 1k,2k,4k,8k -o results/bench-score-memory.json
	$(BIN)/headprof bench score --probes 2 --sides stepwise-attentions --lengths 1k,2k,3k -o results/bench-score-attentions.json
	$(BIN)/headprof validate -o results/validate.png
	$(BIN)/headprof validate --probes 48 --draws 1 --per-head --csv results/drops.csv -o results/validate-per-head.png
	$(BIN)/headprof bench generate --lengths 4000,8000 --repeats 2 -o results/bench-float32.json
	$(BIN)/headprof bench generate --lengths 4000,8000 --repeats 2 --dtype bfloat16 -o results/bench-bfloat16.json

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist demo heads.png soak.json .coverage* .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $@
