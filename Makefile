# based.c - every task a person does here is one word. `make help` lists them.
CC      ?= cc
CFLAGS  ?= -O3
PREFIX  ?= /usr/local
PYTHON  ?= python3
DEMO    ?= models/stories260K.bin

# The flags that the promise "the same bits everywhere" rests on; based_model_init refuses to work without them.
# -fno-trapping-math lets gcc turn comparisons of floats into vector code; no result depends on it.
STRICT  := -std=c99 -ffp-contract=off -fno-trapping-math
WARN    := -Wall -Wextra -Wconversion -Wshadow -pedantic
# OpenMP if the compiler has it; never required. `make OPENMP=` builds without.
OPENMP  ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
BUILD   := build
FLAGS    = $(STRICT) $(CFLAGS) $(WARN) $(OPENMP)

run: run.c based.c tokenizer.c based.h
	$(CC) $(FLAGS) -o $@ run.c based.c tokenizer.c $(LDFLAGS) -lm

.PHONY: help demo test unit install clean
help:
	@echo 'make           build ./run'
	@echo 'make demo      build it and let a model tell a story'
	@echo 'make test      build and run every test (Python packages go into $(BUILD)/venv)'
	@echo 'make unit      the C tests only: needs no Python'
	@echo 'make install   install run as based, the library and its header under PREFIX=$(PREFIX) (DESTDIR honoured)'
	@echo 'make firmware  run a story on six emulated microcontrollers: memory, instructions, the same bits'
	@echo 'make size      bytes of code on each microcontroller core'
	@echo 'make clean     remove what was built'
	@echo 'Variables: CC CFLAGS OPENMP PREFIX DESTDIR PYTHON, for example: make CC=clang CFLAGS=-O2 OPENMP='

demo: run
	./run $(DEMO) -t 0.8 -s 7 -i "Once upon a time"

UNITS := $(patsubst tests/%.c,$(BUILD)/%,$(wildcard tests/test_*.c))

# A unit test includes the source it tests, so that it reaches what is static there.
$(BUILD)/test_%: tests/test_%.c tests/test.h based.c tokenizer.c based.h
	@mkdir -p $(BUILD)
	$(CC) $(FLAGS) -g -I. -o $@ $< $(if $(findstring tokenizer,$@),,tokenizer.c) -lm

unit: $(UNITS)
	@for t in $(UNITS); do ./$$t || exit 1; done

$(BUILD)/venv/ready: tests/requirements.txt
	@mkdir -p $(BUILD)
	tests/make_venv.sh $(PYTHON) $(BUILD)/venv
	$(BUILD)/venv/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt
	@touch $@

test: run $(UNITS) $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python tests/run_tests.py $(UNITS)

$(BUILD)/based.o: based.c based.h
	@mkdir -p $(BUILD)
	$(CC) $(FLAGS) -c -o $@ $<
$(BUILD)/tokenizer.o: tokenizer.c based.h
	@mkdir -p $(BUILD)
	$(CC) $(FLAGS) -c -o $@ $<
$(BUILD)/libbased.a: $(BUILD)/based.o $(BUILD)/tokenizer.o
	$(AR) rcs $@ $^

install: run $(BUILD)/libbased.a
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib $(DESTDIR)$(PREFIX)/include
	install -m 755 run $(DESTDIR)$(PREFIX)/bin/based
	install -m 644 $(BUILD)/libbased.a $(DESTDIR)$(PREFIX)/lib
	install -m 644 based.h $(DESTDIR)$(PREFIX)/include

# ---- Small devices ---------------------------------------------------------------------------------------------------
# MODEL is any checkpoint; WINDOW (empty: as it is) lets its window layers see at most so many keys, to save RAM.
MODEL   ?= $(DEMO)
WINDOW  ?= 128
FIRMWARE_FLAGS ?=
.PHONY: firmware size
firmware: run
	$(PYTHON) tests/firmware/boards.py $(MODEL) $(if $(WINDOW),--window $(WINDOW)) $(FIRMWARE_FLAGS)
size:
	$(PYTHON) tests/firmware/boards.py --size
# ---- End of small devices --------------------------------------------------------------------------------------------

clean:
	rm -rf run $(BUILD)
