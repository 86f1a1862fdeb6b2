# llama3.c: `make help` lists the targets

# ---- switches: each is part of the object path, so that changing one rebuilds ------------------

config ?= release
DEPS   ?=
ifeq ($(origin CC),default)
CC := gcc
endif

CFLAGS_release  := -O3 -march=native -fno-math-errno # sqrtf sets no errno, so that it vectorises: AdamW is 5 times as fast
CFLAGS_debug    := -O1 -g
CFLAGS_sanitize := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ifeq ($(CFLAGS_$(config)),)
$(error config=$(config): expected release, debug or sanitize)
endif
CFLAGS += -std=gnu11 -Wall -Wextra -Werror -Wno-pass-failed -fopenmp -I. -MMD -MP $(CFLAGS_$(config))

BUILD := build/$(config)

# Libraries are looked up inside the recipes, so that `make deps llama3` works where nothing is installed yet.
# DEPS=/dir names a prefix with include and lib, and needs no pkg-config.
ifeq ($(DEPS),)
flags = $$(pkg-config --cflags $(1)) $$(pkg-config --libs $(1))
else
flags = -I$(DEPS)/include -L$(DEPS)/lib -Wl,-rpath,$(DEPS)/lib $(patsubst %,-l%,$(patsubst lib%,%,$(1)))
endif
LIBS := libpcre2-8 libcjson

# `make deps llama3`, also with -j: whatever is built waits for deps
ifneq ($(filter deps,$(MAKECMDGOALS)),)
AFTER_DEPS := deps
endif

# ---- the programs ------------------------------------------------------------------------------

.DEFAULT_GOAL := llama3
.DELETE_ON_ERROR:
.PHONY: help deps test test-parity fuzz fuzz-run bench-cpu bench-cpu-build test_ops profile format clean

VERSION := 0.1

# what the programs learn when they are given no data: an explicit, sorted list, so that a tarball builds too. About a
# tenth is held out, in whole files
CORPUS_VAL := dev/test/test_data.c llmc/attention.h llmc/checkpoint.h llmc/json.h
CORPUS_TRAIN := \
    dev/test/program.h dev/test/test.h dev/test/test_checkpoint.c dev/test/test_cli.c dev/test/test_files.c \
    dev/test/test_matmul.c dev/test/test_model.c dev/test/test_ops.c dev/test/test_parts.c dev/test/test_runs.c \
    dev/test/test_sampler.c dev/test/test_tokenizer.c llama3.c llmc/adamw.h llmc/arena.h llmc/check.h \
    llmc/commands.h llmc/config.h llmc/corpus.h llmc/cross_entropy.h llmc/data.h llmc/dtype.h llmc/embedding.h \
    llmc/error.h llmc/evaluate.h llmc/exp.h llmc/file.h llmc/generate.h llmc/hellaswag.h llmc/llama3.h llmc/log.h \
    llmc/matmul.h llmc/model.h llmc/options.h llmc/params.h llmc/progress.h llmc/random.h llmc/repeat_kv.h \
    llmc/rmsnorm.h llmc/rope.h llmc/run.h llmc/safetensors.h llmc/sampler.h llmc/schedule.h llmc/softmax.h \
    llmc/swiglu.h llmc/tokenizer.h llmc/train.h
CORPUS := build/corpus/train.txt build/corpus/val.txt

build/corpus/train.txt: $(CORPUS_TRAIN)
build/corpus/val.txt: $(CORPUS_VAL)
$(CORPUS): Makefile
	@mkdir -p $(@D)
	@for file in $(filter-out Makefile,$^); do cat $$file; printf '\034'; done >$@

## llama3: the CPU program
llama3: $(BUILD)/llama3
	@cp -f $< $@

$(BUILD)/llama3: llama3.c $(CORPUS) Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DVERSION='"$(VERSION)"' -o $@ $< $(call flags,$(LIBS)) -lm

## test: everything that needs no GPU, no network and no Python
TESTS := $(patsubst dev/test/%.c,$(BUILD)/%,$(wildcard dev/test/test_*.c))
test: $(TESTS) $(BUILD)/llama3
	@LLAMA3_PROGRAM=$(BUILD)/llama3 dev/test/run.sh $(TESTS)

$(BUILD)/test_%: dev/test/test_%.c Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -o $@ $(filter %.c %.o,$^) $(call flags,$(LIBS) cmocka) -lm

# llama3.c as a library, for the tests and for Python
$(BUILD)/test_model: $(BUILD)/llama3_library.o
$(BUILD)/llama3_library.o: llama3.c Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DLLAMA3_LIBRARY -c -o $@ $< $(call flags,$(LIBS))

build/libllama3_cpu.so: llama3.c Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DLLAMA3_LIBRARY -shared -fPIC -o $@ $< $(call flags,$(LIBS)) -lm

## test-parity: live comparison with PyTorch, transformers, tokenizers and tiktoken, in a virtual environment under build/
build/venv/ready: dev/reference/requirements.txt
	python3 -m venv build/venv
	build/venv/bin/pip install -q -r $<
	@touch $@

test-parity: build/venv/ready llama3 build/libllama3_cpu.so
	build/venv/bin/python dev/reference/parity.py

## fuzz: libFuzzer targets (clang) under ASan and UBSan, in build/fuzz
FUZZERS := $(patsubst dev/test/fuzz_%.c,build/fuzz/%,$(wildcard dev/test/fuzz_*.c))
FUZZ_CC := clang
FUZZ_FLAGS := -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
fuzz: $(FUZZERS)

build/fuzz/%: dev/test/fuzz_%.c Makefile
	@mkdir -p $(@D)
	$(FUZZ_CC) -std=gnu11 -Wall -Wextra -Werror -I. -MMD -MP $(FUZZ_FLAGS) -o $@ $< $(call flags,$(LIBS)) -lm

## fuzz-run: run each fuzzer for SECONDS=60
SECONDS ?= 60
fuzz-run: $(FUZZERS)
	@for fuzzer in $(FUZZERS); do mkdir -p $$fuzzer.corpus; \
	    $$fuzzer -seed=1 -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 $$fuzzer.corpus || exit 1; done

## bench-cpu: the CPU lab: the matrix product's variants beside OpenBLAS, and the tokenizer's speed
bench-cpu: bench-cpu-build
	build/lab/matmul $(ARGS)

build/lab/%: dev/cpu/%.c Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@if pkg-config --exists openblas 2>/dev/null; then blas="-DHAVE_OPENBLAS $(call flags,openblas)"; else blas=; fi; \
	    set -x; $(CC) $(CFLAGS) -o $@ $< $$blas $(call flags,$(LIBS)) -lm

bench-cpu-build: $(patsubst dev/cpu/%.c,build/lab/%,$(wildcard dev/cpu/*.c))

# ---- the GPU -----------------------------------------------------------------------------------
# CUDA_ARCH=80|90|100 (several: "80 90 100"; default: the GPU in this machine, 90 where there is none), PRECISION=BF16|FP32,
# USE_CUDNN=0|1. CUDA_EXTRA=/dir names a prefix (include, lib) with what the toolkit's own lacks

NVCC       ?= nvcc
PRECISION  ?= BF16
CUDA_EXTRA ?=
CUDA_FLAGS := $(if $(CUDA_EXTRA),-I$(CUDA_EXTRA)/include -L$(CUDA_EXTRA)/lib)
ifeq ($(filter BF16 FP32,$(PRECISION)),)
$(error PRECISION=$(PRECISION): expected BF16 or FP32)
endif
ifneq ($(filter %cu test_ops gpu-objects profile,$(MAKECMDGOALS)),)
ifeq ($(CUDA_ARCH),)
CUDA_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '.')
endif
ifeq ($(CUDA_ARCH),)
$(info no GPU here: building for CUDA_ARCH=90)
CUDA_ARCH := 90
endif
endif
CUDNN_FLAGS ?= $(if $(DEPS),-I$(DEPS)/include)

# cuDNN's attention is used where its headers and those of cudnn-frontend are found; it knows bf16 alone
ifneq ($(filter %cu test_ops gpu-objects profile,$(MAKECMDGOALS)),)
FOUND_CUDNN := $(shell $(NVCC) -std=c++17 -I. $(CUDNN_FLAGS) $(CUDA_FLAGS) -E llmc/attention_cudnn.cpp >/dev/null 2>&1 && echo 1 || echo 0)
ifeq ($(USE_CUDNN),)
USE_CUDNN := $(if $(filter FP32,$(PRECISION)),0,$(FOUND_CUDNN))
endif
ifeq ($(USE_CUDNN)$(FOUND_CUDNN),10)
$(error USE_CUDNN=1: no cudnn.h or no cudnn_frontend.h here. Install cuDNN 9 (package libcudnn9-dev-cuda-13, or pip install \
    nvidia-cudnn-cu13) and the headers of cudnn-frontend (pip install nvidia-cudnn-frontend), and name folders that the \
    compiler does not search, by CUDA_EXTRA=/prefix)
endif
endif
empty :=
GPU_BUILD := build/$(config)/sm$(subst $(empty) $(empty),-,$(CUDA_ARCH))-$(PRECISION)$(if $(filter 1,$(USE_CUDNN)),-cudnn)
ifeq ($(USE_CUDNN),1)
CUDNN_OBJECT := $(GPU_BUILD)/attention_cudnn.o
CUDNN_LIBS   := -lcudnn -lnvrtc
endif

gencode_80  := -gencode=arch=compute_80,code=sm_80
gencode_90  := -gencode=arch=compute_90a,code=sm_90a
gencode_100 := -gencode=arch=compute_100,code=sm_100
NVCCFLAGS_release  := -O3 -lineinfo
NVCCFLAGS_debug    := -O1 -g -G -DGPU_SYNC
NVCCFLAGS_sanitize := -O1 -g -lineinfo -DGPU_SYNC
comma := ,
NVCCFLAGS = -std=c++17 -I. -MMD -MP $(NVCCFLAGS_$(config)) $(foreach arch,$(CUDA_ARCH),$(gencode_$(arch))) -DPRECISION_$(PRECISION) $(if $(filter 1,$(USE_CUDNN)),-DUSE_CUDNN) \
    -Xcompiler -Wall,-Wextra,-Werror,-fopenmp $(CUDA_FLAGS) $(if $(CUDA_EXTRA),-Xlinker --disable-new-dtags -Xlinker -rpath=$(abspath $(CUDA_EXTRA))/lib)
# nvcc passes what it does not know on to the linker only when told to
cuda_flags = $(subst -Wl$(comma)-rpath$(comma),-Xlinker -rpath=,$(call flags,$(1)))
CUDA_LIBS = -lcublasLt -lcublas $(CUDNN_LIBS) -lm

need_nvcc = @command -v $(NVCC) >/dev/null || { echo "error: no nvcc: install the CUDA Toolkit, version 12.4 or later; make llama3 needs none" >&2; exit 1; }

## train_llama3cu: the CUDA program
train_llama3cu: $(GPU_BUILD)/train_llama3cu
	@cp -f $< $@

$(GPU_BUILD)/train_llama3cu: train_llama3.cu $(CUDNN_OBJECT) $(CORPUS) Makefile | $(AFTER_DEPS)
	$(need_nvcc)
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -DVERSION='"$(VERSION)"' -o $@ $< $(CUDNN_OBJECT) $(call cuda_flags,$(LIBS)) $(CUDA_LIBS)

## profile: the first calls of an op in a step under ncu, and where there is nsys a timeline: OP=adamw ARGS="--model 350M --seq 1024"
OP ?= rmsnorm_backward
PROFILED = ./train_llama3cu train --eval-every 0 --sample-every 0 --checkpoint-every 0 --out build/profile/run $(ARGS)
profile: train_llama3cu
	@command -v ncu >/dev/null || { echo "error: no ncu: install Nsight Compute, which comes with the CUDA Toolkit" >&2; exit 1; }
	@mkdir -p build/profile
	ncu --set full --clock-control none --nvtx --nvtx-include "$(OP)]" --launch-count 4 -f -o build/profile/$(OP) $(PROFILED) --steps 1
	ncu --import build/profile/$(OP).ncu-rep --page details
	@command -v nsys >/dev/null || exit 0; set -x; nsys profile -t cuda,nvtx -f true -o build/profile/timeline $(PROFILED) --steps 5

## test_llama3cu: what the GPU must prove: ops against the CPU, the whole model against llama3.c and PyTorch, resume
test_llama3cu: $(GPU_BUILD)/test_llama3cu
	@cp -f $< $@

OPS := $(filter-out $(if $(CUDNN_OBJECT),,attention_cudnn),$(patsubst dev/test/gpu/test_%.cuh,%,$(wildcard dev/test/gpu/test_*.cuh)))
OP_OBJECTS := $(OPS:%=$(GPU_BUILD)/test_%.o)

$(GPU_BUILD)/test_llama3cu: $(GPU_BUILD)/test_llama3.o $(GPU_BUILD)/gpu_library.o $(OP_OBJECTS) $(BUILD)/llama3_library.o $(CUDNN_OBJECT)
	$(NVCC) $(NVCCFLAGS) -o $@ $(filter %.o,$^) $(call cuda_flags,$(LIBS)) $(CUDA_LIBS)

# the ops alone, against their CPU references: for work on a kernel, and for compute-sanitizer
test_ops: $(GPU_BUILD)/test_ops
$(GPU_BUILD)/test_ops: dev/test/gpu/test_ops.cu $(OP_OBJECTS) $(CUDNN_OBJECT)
	$(NVCC) $(NVCCFLAGS) -o $@ $< $(filter %.o,$^) $(call cuda_flags,$(LIBS)) $(CUDA_LIBS)

$(OP_OBJECTS): $(GPU_BUILD)/test_%.o: dev/test/gpu/test_ops.cu dev/test/gpu/test_%.cuh Makefile | $(AFTER_DEPS)
	$(need_nvcc)
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -DOP=$* -c -o $@ $< $(call cuda_flags,$(LIBS))

$(GPU_BUILD)/test_llama3.o: test_llama3.cu Makefile | $(AFTER_DEPS)
	$(need_nvcc)
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -c -o $@ $< $(call cuda_flags,$(LIBS))

$(GPU_BUILD)/gpu_library.o: train_llama3.cu Makefile | $(AFTER_DEPS)
	$(need_nvcc)
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -DLLAMA3_LIBRARY -c -o $@ $< $(call cuda_flags,$(LIBS))

$(GPU_BUILD)/attention_cudnn.o: llmc/attention_cudnn.cpp Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O1 -DUSE_CUDNN -I. -MMD -MP $(patsubst -I%,-isystem %,$(CUDNN_FLAGS) $(CUDA_FLAGS)) \
	    -Xcompiler -Wall,-Wextra,-Werror,-fopenmp -c -o $@ $<

# ---- the kernel lab ----------------------------------------------------------------------------

LAB_MAKE = $(MAKE) -C dev/cuda NVCC="$(NVCC)" PRECISION=$(PRECISION) CUDA_ARCH="$(CUDA_ARCH)" CUDA_EXTRA="$(if $(CUDA_EXTRA),$(abspath $(CUDA_EXTRA)))"

## bench: the kernel lab's targets, with the files of dev/cuda; bench-OP runs those of one op (bench-rmsnorm ARGS="--only production")
bench:
	@$(LAB_MAKE) --no-print-directory help
bench-%:
	$(LAB_MAKE) bench-$*

## selftest: the kernel lab's harness must reject planted mistakes
selftest:
	$(LAB_MAKE) selftest

## report: the whole lab on this GPU, PyTorch and Liger beside it, into dev/cuda/results and dev/cuda/README.md
report:
	$(LAB_MAKE) report

## deps: install what is missing (compiler, pkg-config, PCRE2, cJSON, cmocka)
deps:
	@scripts/deps.sh

## format: clang-format over every source
format:
	clang-format -i *.c *.cu llmc/*.h llmc/*.cuh llmc/*.cpp dev/test/*.[ch] dev/test/gpu/* dev/cpu/*.c dev/cuda/*.cu dev/cuda/*.cuh

## clean: remove everything that was built
clean:
	rm -rf build llama3 train_llama3cu test_llama3cu

## help: this list
help:
	@sed -n 's/^## \([a-z0-9_-]*\): \(.*\)/  make \1|\2/p' Makefile | sort | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

-include $(wildcard $(BUILD)/*.d $(GPU_BUILD)/*.d build/fuzz/*.d)
