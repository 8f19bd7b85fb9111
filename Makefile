# based.c - every task a person does here is one word. `make help` lists them.
CC      ?= cc
CFLAGS  ?= -O3
PREFIX  ?= /usr/local
PYTHON  ?= python3
DEMO    ?= models/based-82m-english.bin

# based.c turns off the fusing of float operations itself; the flag is for what the programs around it compute.
# -fno-trapping-math lets gcc turn comparisons of floats into vector code; no result depends on it.
STRICT  := -std=c99 -ffp-contract=off -fno-trapping-math
WARN    := -Wall -Wextra -Wconversion -Wshadow -pedantic
# OpenMP if the compiler has it; never required. `make OPENMP=` builds without.
OPENMP  ?= $(shell t=$$(mktemp); echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o "$$t" 2>/dev/null && echo -fopenmp; rm -f "$$t")
BUILD   := build
FLAGS    = $(STRICT) $(CFLAGS) $(WARN) $(OPENMP)

run: run.c based.c tokenizer.c based.h
	$(CC) $(FLAGS) -o $@ run.c based.c tokenizer.c $(LDFLAGS) -lm

.PHONY: help demo test unit install clean
help:
	@echo 'make           build ./run'
	@echo 'make demo      build it and let a model tell a story'
	@echo 'make test      build and run every test, on all processors (Python packages go into $(BUILD)/venv)'
	@echo 'make unit      the C tests only: needs no Python'
	@echo 'make fuzz      throw hostile bytes at every reader, FUZZ_SECONDS=60 each (clang, libFuzzer)'
	@echo 'make reproduce the same bits on every compiler, instruction set and (emulated) machine: a table'
	@echo 'make coverage  how much of the code the tests reach (-v in COVERAGE_FLAGS: what they do not)'
	@echo 'make endless   ten million tokens against float64: a table and a plot (a few minutes)'
	@echo 'make bench     speed and memory beside llama.cpp, for tests/speed.md (ten minutes; needs npm)'
	@echo 'make install   the program as based, the library, man pages and completions go under PREFIX=$(PREFIX)'
	@echo '               (DESTDIR is obeyed); make uninstall removes them'
	@echo 'make dist      the sources as $(BUILD)/based-$(VERSION).tar.gz'
	@echo 'make amalgamation  the library as one file and its header: $(BUILD)/based_all.c, $(BUILD)/based_all.h'
	@echo 'make firmware  run a story on nine emulated microcontroller cores: memory, instructions, the same bits'
	@echo 'make size      bytes of code on each microcontroller core'
	@echo 'make pico      $(BUILD)/story.uf2, a story for a Raspberry Pi Pico; make pico2: $(BUILD)/story2.uf2'
	@echo 'make arduino   $(BUILD)/based-arduino.zip, a library for Arduino, PlatformIO, ESP-IDF and Zephyr'
	@echo 'make page      the same in a browser: $(BUILD)/based.html'
	@echo 'make format-check  lines of C and Python over 100 columns, with a tab or with a blank at the end'
	@echo 'make clean     remove what was built'
	@echo 'Variables: CC CFLAGS OPENMP PREFIX DESTDIR PYTHON, for example: make CC=clang CFLAGS=-O2 OPENMP='

demo: run
	./run "$(DEMO)" -s 12 -i "The fox looked up at the moon and said"

UNITS := $(patsubst tests/%.c,$(BUILD)/%,$(wildcard tests/test_*.c))

# A unit test includes the source it tests, so that it reaches what is static there. Without optimization, since compiling
# takes longer than running, except where it does not.
OPTIMIZE := -O0
$(BUILD)/test_tokenizer: OPTIMIZE := -O2
$(BUILD)/test_%: tests/test_%.c tests/test.h tests/model.h based.c tokenizer.c based.h
	@mkdir -p $(BUILD)
	$(CC) $(FLAGS) $(OPTIMIZE) -g -pthread -I. -o $@ $< -lm

unit: $(UNITS)
	@for t in $(UNITS); do ./$$t || exit 1; done

$(BUILD)/venv/ready: tests/requirements.txt models/requirements.txt
	@mkdir -p $(BUILD)
	@echo 'Packages of tests/requirements.txt go into $(BUILD)/venv, once: 0.3 GB to download, 1.2 GB on disk.'
	@echo 'On Linux, PyTorch from PyPI brings 2.5 GB for GPUs along. To do without them:'
	@echo '    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test'
	tests/make_venv.sh "$(PYTHON)" $(BUILD)/venv
	$(BUILD)/venv/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt
	@touch $@

test: $(BUILD)/venv/ready
	@echo 'Building the program and $(words $(UNITS)) C tests'
	@$(MAKE) -s -j $$(getconf _NPROCESSORS_ONLN) run $(UNITS)
	@$(BUILD)/venv/bin/python tests/run_tests.py $(UNITS)

# The same columns everywhere: continuation bytes of UTF-8 do not count. Without git, all files here are looked at.
.PHONY: format-check
format-check:
	@{ git ls-files -z '*.c' '*.h' '*.py' 2>/dev/null || find . -name $(BUILD) -prune -o -name '*.[ch]' -print0 -o -name '*.py' -print0; } | \
	LC_ALL=C xargs -0 awk ' \
	    function bad(what) { print FILENAME ":" FNR ": " what; count++ } \
	    { text = $$0; gsub(/[\200-\277]/, "", text) } \
	    length(text) > 100 { bad(length(text) " columns, at most 100") } \
	    /\t/ { bad("a tab") } \
	    /[ \t]$$/ { bad("a blank at the end") } \
	    END { exit count > 0 }'

.PHONY: coverage reproduce endless bench
coverage: $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python tests/coverage.py $(COVERAGE_FLAGS)

# ---- Fuzzing: tests/README.md tells what it has found ------------------------------------------------------------------
FUZZERS := $(patsubst tests/fuzz/%.c,%,$(filter-out %/main.c,$(wildcard tests/fuzz/*.c)))
FUZZ_SECONDS ?= 60
FUZZ_CC ?= clang-14
FUZZ_FLAGS ?= -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all
fuzz_sources = tests/fuzz/$1.c $(if $(filter checkpoint options request,$1),tokenizer.c) $(if $(filter options request,$1),based.c)
fuzz_depends := tests/fuzz/fuzz.h tests/fuzz/text.h tests/sections.h tests/model.h based.c tokenizer.c run.c based.h

$(BUILD)/fuzz_%: tests/fuzz/%.c $(fuzz_depends)
	@mkdir -p $(BUILD)
	$(FUZZ_CC) -std=c11 -O2 -g -ffp-contract=off -I. $(FUZZ_FLAGS) -o $@ $(call fuzz_sources,$*) -lm
# The same without libFuzzer, by any compiler: replays what was found, and random mutants.
$(BUILD)/replay_%: tests/fuzz/%.c tests/fuzz/main.c $(fuzz_depends)
	@mkdir -p $(BUILD)
	$(CC) -std=c11 -ffp-contract=off $(CFLAGS) -g -I. -o $@ $(call fuzz_sources,$*) tests/fuzz/main.c -lm

# Seeds go into the corpus, which grows in $(BUILD)/fuzz from run to run; what breaks a target stays in $(BUILD)/fuzz, too.
.PHONY: fuzz $(FUZZERS:%=fuzz-%)
fuzz: $(FUZZERS:%=fuzz-%)
$(FUZZERS:%=fuzz-%): fuzz-%: $(BUILD)/fuzz_%
	@mkdir -p $(BUILD)/fuzz/$*
	@$< --seeds $(BUILD)/fuzz/$*
	$< -max_total_time=$(FUZZ_SECONDS) -max_len=32768 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
	    -artifact_prefix=$(BUILD)/fuzz/$*- $(BUILD)/fuzz/$* $(wildcard tests/fuzz/found/$*)
# ---- End of fuzzing ----------------------------------------------------------------------------------------------------

# PEERS_FLAGS: options of tests/peers.py, for example: --llama DIR
bench: run $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python tests/peers.py $(PEERS_FLAGS)
	$(BUILD)/venv/bin/python tests/speed.py

reproduce: run $(BUILD)/venv/ready
	PYTHON=$(BUILD)/venv/bin/python tests/reproduce.sh

endless: $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python tests/endless.py --plot $(BUILD)/endless.png

# The library as one C file and its header, to be dropped into any build.
.PHONY: amalgamation
amalgamation: $(BUILD)/based_all.c
$(BUILD)/based_all.c: based.c tokenizer.c based.h LICENSE
	@mkdir -p $(BUILD)
	{ echo '/*'; sed 's/^/ * /; s/ *$$//' LICENSE; echo ' */'; \
	  sed 's/#include "based.h"/#include "based_all.h"/' based.c; sed '/#include "based.h"/d' tokenizer.c; } > $@
	cp based.h $(BUILD)/based_all.h

# ---- As a package ------------------------------------------------------------------------------------------------------
# What is installed is built in $(STAGE), where it lies as below PREFIX. Until 1.0 the second number of the version is part of
# the shared library's name, since what programs rely on may change with it.
VERSION := $(shell sed -n 's/^.define BASED_VERSION "\(.*\)".*/\1/p' based.h)
STAGE   := $(BUILD)/package
SYSTEM  := $(shell uname -s)
ifeq ($(SYSTEM),Darwin)
SHARED  := libbased.$(basename $(VERSION)).dylib
LINK    := libbased.dylib
SHARING  = -dynamiclib -install_name @rpath/$(SHARED)
else
SHARED  := libbased.so.$(basename $(VERSION))
LINK    := libbased.so
SHARING  = -shared -Wl,-soname,$(SHARED)
endif
PAGES   := share/man/man1/based.1 share/man/man3/based.3 share/bash-completion/completions/based share/zsh/site-functions/_based \
           share/fish/vendor_completions.d/based.fish lib/pkgconfig/based.pc lib/cmake/based/based-config.cmake \
           lib/cmake/based/based-config-version.cmake
FILES   := bin/based lib/$(SHARED) lib/libbased.a include/based.h share/based/based.py $(PAGES)
DEST     = $(DESTDIR)$(PREFIX)

$(STAGE)/%:
	@mkdir -p $(@D)
	cp $< $@
$(STAGE)/bin/based: run
$(STAGE)/include/based.h: based.h
$(STAGE)/share/based/based.py: tests/based.py
# Without OpenMP, so that nothing but libm need be linked with it.
$(BUILD)/%.o: %.c based.h
	@mkdir -p $(BUILD)
	$(CC) $(STRICT) $(CFLAGS) $(WARN) -fPIC -c -o $@ $<
$(STAGE)/lib/libbased.a: $(BUILD)/based.o $(BUILD)/tokenizer.o
	@mkdir -p $(@D)
	$(AR) rcs $@ $^
$(STAGE)/lib/$(SHARED): based.c tokenizer.c based.h
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -fPIC $(SHARING) -o $@ based.c tokenizer.c $(LDFLAGS) -lm
$(STAGE)/pages: run based.h tests/package/generate.sh
	tests/package/generate.sh $(STAGE)
	@touch $@

.PHONY: uninstall dist
install: $(addprefix $(STAGE)/,$(filter-out $(PAGES),$(FILES))) $(STAGE)/pages
	for f in $(FILES); do \
	    install -d "$(DEST)/$${f%/*}" && install -m 644 "$(STAGE)/$$f" "$(DEST)/$$f" || exit 1; done
	chmod 755 "$(DEST)/bin/based"
	ln -sf $(SHARED) "$(DEST)/lib/$(LINK)"
uninstall:
	cd "$(DEST)" && rm -f $(FILES) lib/$(LINK)
	-cd "$(DEST)" && rmdir lib/cmake/based share/based

# The sources of COMMIT, without what only tests need and all models but the smallest: a C compiler and make build
# and install them. The same commit gives the same bytes.
COMMIT  := HEAD
dist:
	@mkdir -p $(BUILD)
	git archive --prefix=based-$(VERSION)/ $(COMMIT) . ':!.ci' ':!tests/data' ':!tests/golden' ':!*.png' ':!*.xz' \
	    ':!models/based-*.bin' ':!models/stories260K.bin' | gzip -9n > $(BUILD)/based-$(VERSION).tar.gz
# ---- End of the package ------------------------------------------------------------------------------------------------

# ---- Small devices ---------------------------------------------------------------------------------------------------
# MODEL is any checkpoint; WINDOW (empty: as it is) lets its window layers see at most so many keys, to save RAM. SOURCE_URL
# is where the library for Arduino and the page say that their source is; without one they do not say it.
MODEL   ?= models/stories260K.bin
WINDOW  ?= 128
FIRMWARE_FLAGS ?=
.PHONY: firmware size pico pico2 arduino
firmware: run
	$(PYTHON) tests/firmware/boards.py "$(MODEL)" $(if $(WINDOW),--window $(WINDOW)) $(FIRMWARE_FLAGS)
size:
	$(PYTHON) tests/firmware/boards.py --size
pico: MODEL := models/stories260K-q8.bin
pico2: MODEL := models/based-4m-story.bin
pico2: WINDOW :=
pico pico2:
	@mkdir -p $(BUILD)
	$(PYTHON) tests/firmware/pico.py --board $@ "$(MODEL)" $(BUILD)/story$(@:pico%=%).uf2 $(if $(WINDOW),--window $(WINDOW))
arduino:
	@mkdir -p $(BUILD)
	$(PYTHON) tests/arduino/pack.py models/stories260K-q8.bin $(BUILD)/based-arduino.zip --url "$(SOURCE_URL)"

# The same C in a browser: build/page/ is for any static server, build/based.html is all of it in one file.
WASM_CC ?= clang-14
WASM    := --target=wasm32-wasi -nostartfiles -msimd128 -mbulk-memory -DBASED_FREESTANDING -I. \
           -Wl,--no-entry,--gc-sections,--strip-all,-z,stack-size=131072
PAGE    := $(BUILD)/page/index.html
.PHONY: page
$(BUILD)/page/based.wasm: models/page/page.c based.c tokenizer.c based.h
	@mkdir -p $(BUILD)/page
	@echo '#include <string.h>' | $(WASM_CC) $(WASM) -x c - -o $(BUILD)/page/probe 2>/dev/null || { \
	  echo 'make page needs a compiler and headers for WebAssembly; on Debian:'; \
	  echo '    apt-get install clang-14 lld wasi-libc libclang-rt-14-dev-wasm32'; \
	  echo 'WASM_CC=clang takes another version of clang.'; exit 1; } >&2
	@rm $(BUILD)/page/probe
	$(WASM_CC) $(STRICT) -O2 $(WARN) $(WASM) -DBASED_RELAXED_SIMD -o $(BUILD)/page/relaxed.wasm $(filter %.c,$^)
	$(WASM_CC) $(STRICT) -O2 $(WARN) $(WASM) -o $@ $(filter %.c,$^)
page: MODEL := models/based-4m-story.bin
page: $(BUILD)/page/based.wasm
	cp "$(MODEL)" $(BUILD)/page/model.bin
	sed -e '/<!-- licence -->/{r LICENSE' -e 'd;}' \
	    -e 's|<!-- source -->|$(if $(SOURCE_URL),<p><a href="$(subst &,\&amp;,$(SOURCE_URL))">Source</a></p>)|' \
	    models/page/index.html > $(PAGE)
	{ sed '/<!-- files -->/q' $(PAGE); \
	  printf '<script>const FILES = { wasm: "'; base64 < $(BUILD)/page/based.wasm | tr -d '\n'; \
	  printf '", relaxed: "'; base64 < $(BUILD)/page/relaxed.wasm | tr -d '\n'; \
	  printf '", model: "'; base64 < "$(MODEL)" | tr -d '\n'; \
	  printf '" };</script>\n'; sed '1,/<!-- files -->/d' $(PAGE); } > $(BUILD)/based.html
# ---- End of small devices --------------------------------------------------------------------------------------------

clean:
	rm -rf run $(BUILD)
