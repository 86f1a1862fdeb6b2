# llama3.c: `make help` lists the targets

# ---- switches: each is part of the object path, so that changing one rebuilds ------------------

config ?= release
DEPS   ?=
ifeq ($(origin CC),default)
CC := gcc
endif

CFLAGS_release  := -O3 -march=native
CFLAGS_debug    := -O1 -g
CFLAGS_sanitize := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ifeq ($(CFLAGS_$(config)),)
$(error config=$(config): expected release, debug or sanitize)
endif
CFLAGS += -std=gnu11 -Wall -Wextra -Werror -fopenmp -I. -MMD -MP $(CFLAGS_$(config))

BUILD := build/$(config)

# Libraries are looked up inside the recipes, so that `make deps llama3` works where nothing is installed yet.
# DEPS=/dir names a prefix with include and lib, and needs no pkg-config.
ifeq ($(DEPS),)
flags = $$(pkg-config --cflags $(1)) $$(pkg-config --libs $(1))
else
flags = -I$(DEPS)/include -L$(DEPS)/lib -Wl,-rpath,$(DEPS)/lib $(patsubst lib%,-l%,$(1))
endif
LIBS := libpcre2-8 libcjson

# `make deps llama3`, also with -j: whatever is built waits for deps
ifneq ($(filter deps,$(MAKECMDGOALS)),)
AFTER_DEPS := deps
endif

# ---- the programs ------------------------------------------------------------------------------

.DEFAULT_GOAL := llama3
.PHONY: help deps test format clean

## test: everything that needs no GPU, no network and no Python
TESTS := $(patsubst dev/test/%.c,$(BUILD)/%,$(wildcard dev/test/test_*.c))
test: $(TESTS)
	@dev/test/run.sh $(TESTS)

$(BUILD)/test_%: dev/test/test_%.c Makefile | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -o $@ $< $(call flags,$(LIBS) cmocka) -lm

## deps: install what is missing (compiler, pkg-config, PCRE2, cJSON, cmocka)
deps:
	@scripts/deps.sh

## format: clang-format over every source
format:
	clang-format -i *.c llmc/*.h dev/test/*.[ch] dev/cpu/*.c

## clean: remove everything that was built
clean:
	rm -rf build llama3

## help: this list
help:
	@sed -n 's/^## \([a-z0-9_-]*\): \(.*\)/  make \1|\2/p' Makefile | sort | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

-include $(wildcard $(BUILD)/*.d)
