/* main.c - a story from a microcontroller: no operating system, no heap, no files.
 *
 * The checkpoint lies in flash and is used where it lies (model.S puts it there). Everything that
 * changes is in one static block of RAM, the arena; the library says how much of it each object
 * needs. Only the two functions of board.h depend on the machine: semihost.c calls a debugger,
 * which QEMU plays; pico.c writes to UART and USB of a Raspberry Pi Pico; on a board of your own
 * you write them.
 *
 * It ends with a few lines for the test that runs it (boards.py): the fingerprint of all logits it
 * used, which must be the one that ./run -v shows for the same checkpoint on a computer, and the
 * memory it took.
 */
#include "based.h"
#include "board.h"

#include <string.h>

#ifndef PROMPT
#define PROMPT "Once upon a time"
#endif
#ifndef TOKENS
#define TOKENS 40                       /* to generate after the prompt */
#endif
#ifndef ARENA
#define ARENA (180 * 1024)
#endif

extern const unsigned char checkpoint[], checkpoint_end[];     /* in flash, aligned to 64 */

static unsigned char arena[ARENA] __attribute__((aligned(64)));
static size_t used;                     /* bytes of it, from the front */

/* ---- The stack ------------------------------------------------------------------------------- */

/* From the linker script: where static data ends and where the stack begins. The stack grows down
 * towards the data. */
extern unsigned char __end[], __stack[], __data_start[];
#define PAINT 0xa5

/* Fills the RAM below the stack with PAINT; bytes that have changed at the end were used. */
static void __attribute__((noinline)) paint_stack(void) {
    unsigned char here;
    const uintptr_t limit = (uintptr_t)&here - 64;
    for (volatile unsigned char *p = __end; (uintptr_t)p < limit; p++) *p = PAINT;
}

static size_t stack_used(void) {
    const unsigned char *p = __end;
    while (p < __stack && *p == PAINT) p++;
    return (size_t)(__stack - p);
}

/* ---- Writing without printf ------------------------------------------------------------------ */

static void put_number(const char *name, size_t n, unsigned base) {
    char text[16], *p = text + sizeof text - 1;
    *p = 0;
    do *--p = "0123456789abcdef"[n % base]; while (n /= base);
    if (base == 16) while (p > text + sizeof text - 9) *--p = '0';
    put(name);
    put(p);
    put("\n");
}

static void die(const char *why) {
    put("\nfirmware: ");
    put(why);
    put("\n");
    leave(1);
}

/* ---- The arena ------------------------------------------------------------------------------- */

/* The rest of the arena, if it has n bytes. 64-byte blocks keep everything aligned. */
static void *room(size_t n, const char *what) {
    if (n > ARENA - used) {
        put_number("\nbytes needed: ", used + n, 10);
        put_number("bytes there:  ", ARENA, 10);
        die(what);
    }
    return arena + used;
}

static void keep(size_t n) { used += (n + 63) / 64 * 64; }

/* ---- The story ------------------------------------------------------------------------------- */

static based_model *open_model(void) {
    based_error e;
    based_model *m = NULL;
    size_t size = (size_t)(checkpoint_end - checkpoint);
    size_t n = based_model_bytes(checkpoint, size, &e);
    if (n == 0) die(e.text);
    void *memory = room(n, "the arena is too small for the model");
    if (based_model_init(&m, memory, n, checkpoint, size, 0, &e)) die(e.text);
    keep(n);
    return m;
}

static based_session *open_session(const based_model *m) {
    based_error e;
    based_session *s = NULL;
    size_t n = based_session_bytes(m, 1);
    if (based_session_init(&s, m, room(n, "the arena is too small for the session"), n, 1, &e))
        die(e.text);
    keep(n);
    return s;
}

/* The ids of the prompt, at most `max`. Encoding uses memory that the session will use later. */
static size_t encode(const based_tokenizer *t, int32_t *ids, size_t max) {
    based_error e;
    size_t n = strlen(PROMPT);
    void *scratch = room(based_encode_scratch(t, n), "the arena is too small for the prompt");
    if (based_encode_bound(t, n) > max) die("the prompt is too long");
    int64_t got = based_encode(t, PROMPT, n, t->flags & BASED_TOK_ADD_BOS ? BASED_ADD_BOS : 0, ids,
                               scratch, &e);
    if (got < 0) die(e.text);
    return (size_t)got;
}

static int32_t most_probable(const float *logits, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++) if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

/* Where the test starts and stops counting instructions. */
void token_begins(void);
void __attribute__((noinline)) token_begins(void) { __asm__ volatile("" ::: "memory"); }

static int32_t step(based_session *s, size_t width, int32_t id, uint32_t *hash) {
    based_error e;
    token_begins();
    if (based_step(s, id, &e)) die(e.text);
    *hash = based_hash(*hash, based_logits(s), width);
    return most_probable(based_logits(s), width);
}

static uint32_t tell(based_session *s, const based_tokenizer *t, const int32_t *ids, size_t n,
                     size_t width) {
    static char text[64];               /* of one token */
    static based_decoder d;
    uint32_t hash = 0, unused = 0;
    int32_t id = 0;
    if (based_decode_bound(t) >= sizeof text)
        die("a token of this model is longer than the room for its text");
    put(PROMPT);
    for (size_t i = 0; i < n; i++) {
        based_decode(t, &d, ids[i], text);
        id = step(s, width, ids[i], i + 1 < n ? &unused : &hash);
    }
    for (int i = 0; i < TOKENS && !based_is_stop(t, id); i++) {
        text[based_decode(t, &d, id, text)] = 0;
        put(text);
        if (i + 1 < TOKENS) id = step(s, width, id, &hash);
    }
    token_begins();
    put("\n");
    return hash;
}

int main(void) {
    static int32_t ids[256];
    based_tokenizer t;
    based_error e;
    paint_stack();
    based_model *m = open_model();
    if (based_tokenizer_open(&t, m, &e)) die(e.text);
    size_t n = encode(&t, ids, sizeof ids / sizeof *ids);
    based_session *s = open_session(m);
    uint32_t hash = tell(s, &t, ids, n, based_width(m));
    put_number("logits #", hash, 16);
    put_number("tokens ", (size_t)based_count(s), 10);
    put_number("state ", based_state_bytes(m), 10);
    put_number("arena ", used, 10);
    put_number("other ", (size_t)(__end - __data_start) - sizeof arena, 10);
    put_number("stack ", stack_used(), 10);
    leave(0);
    return 0;
}
