/* options.c - fuzzes what run.c itself reads. The input is a command line, its arguments separated
 * by zero bytes: it is understood, or refused with one clean line and status 2. Or it begins as the
 * note in a saved session does, and is read as one: it is taken, or refused with one line and
 * status 1.
 */
#define _GNU_SOURCE 1
#include <stdio.h>

static FILE *errors;                                    /* what the program writes to stderr */
static char error_text[8192];
#undef stderr
#define stderr errors
#define main run_main
#include "../../run.c"
#undef main
#undef stderr
extern FILE *stderr;

#include "tests/fuzz/fuzz.h"

static void check_refusal(int rc, int expected) {
    size_t n;
    fflush(errors);
    n = (size_t)ftell(errors);
    REQUIRE(n < sizeof error_text);
    error_text[n] = '\0';
    REQUIRE((n == 0) == (rc == DONE));
    if (rc == DONE) return;
    REQUIRE(rc == expected && n > 10 && memcmp(error_text, "run: ", 5) == 0);
    REQUIRE(error_text[n - 1] == '\n');
    for (size_t i = 0; i < n - 1; i++) {
        REQUIRE((unsigned char)error_text[i] >= 0x20 && error_text[i] != 0x7f);
    }
}

static void check_numbers(const options *o) {
    REQUIRE(o->checkpoint && o->predict >= -1 && o->temperature >= 0 && o->temperature <= 100);
    REQUIRE(o->top_p >= 0 && o->top_p <= 1 && o->min_p >= 0 && o->min_p <= 1);
    REQUIRE(o->repeat_penalty > 0 && o->top_k >= 0 && o->top_k <= 4294967295);
    REQUIRE(o->repeat_last_n >= 0 && o->repeat_last_n <= 1048576);
    REQUIRE(o->threads >= 0 && o->threads <= 1024 && o->branches >= 0 && o->branches <= 65536);
    if (o->chat) REQUIRE(o->turn && strstr(o->turn, "{}") && o->stop && o->stop[0] == '\n');
    for (size_t i = 0; i < o->n_stops; i++) REQUIRE(o->stops[i] && o->stops[i][0]);
}

/* What is taken lies in its ranges, and the decoder can go on from it. */
static void use_note(const uint8_t *data, size_t size) {
    static uint64_t memory[4096];
    static int32_t recent[64];
    options o;
    run r;
    memset(&o, 0, sizeof o), memset(&r, 0, sizeof r);
    r.o = &o, r.sampler_memory = memory;
    r.sampler.temperature = r.sampler.top_p = r.sampler.repeat_penalty = 1.0f;
    r.sampler.repeat_last_n = 64, r.sampler.vocab = 300;
    REQUIRE(based_sampler_init(&r.sampler, memory, sizeof memory, NULL) == BASED_OK);
    int rc = check_note(&r, data, size, "a file");
    check_refusal(rc, BAD_INPUT);
    if (rc != DONE) return;
    read_note(&r, data, size);
    REQUIRE(r.out.decoder.n < sizeof r.out.decoder.held && r.out.decoder.started <= 1);
    size_t n = based_sampler_recent(&r.sampler, recent);
    for (size_t i = 0; i < n; i++) REQUIRE(recent[i] >= 0 && recent[i] < 300);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *argv[66] = { (char *)"run" }, *text = malloc(size + 1);
    int argc = 1;
    options o;
    if (!errors) errors = fmemopen(error_text, sizeof error_text, "w");
    REQUIRE(errors && text);
    rewind(errors);
    if (is_our_note(data, size)) {
        memcpy(text, data, size);       /* a block of just that size */
        use_note((uint8_t *)text, size);
        free(text);
        return 0;
    }
    memcpy(text, data, size);
    text[size] = '\0';
    for (size_t at = 0; at < size && argc < 65; at += strlen(text + at) + 1) {
        argv[argc++] = text + at;
    }
    memset(&o, 0, sizeof o);
    o.stops = calloc((size_t)argc + 1, sizeof *o.stops);
    int rc = parse_options(&o, argc, argv);
    check_refusal(rc, BAD_USAGE);
    if (rc == DONE && !o.help && !o.version) check_numbers(&o);
    free(o.stops), free(o.turn), free(text);
    return 0;
}

/* Puts a flag that there is, or a value near the edge of a range, somewhere into the line. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static const char *const values[] = {
        "0", "1", "-1", "65537", "9223372036854775808", "18446744073709551616", "1e309", "nan",
        "-0", "0x1", "", "-", "--", "chat", "{}", "a{}b{}", "\n", "m.bin"
    };
    char word[64];
    dice_state = seed;
    if (is_our_note(data, size)) {
        /* a mutant that states its length correctly most of the time */
        size = LLVMFuzzerMutate(data, size, most);
        if (size < NOTE_HEADER || dice(8) == 0) return size;
        memcpy(data, "run\1", 4);
        put_little(data + 24, (size - NOTE_HEADER) / 4, 4);
        return dice(8) ? size - size % 4 : size;
    }
    const flag *f = &flags[dice(FLAGS)];
    const char *value = values[dice(sizeof values / sizeof *values)];
    switch (dice(4)) {
    case 0: snprintf(word, sizeof word, "--%s", f->name); break;
    case 1: snprintf(word, sizeof word, "-%c", f->letter ? f->letter : 'n'); break;
    case 2: snprintf(word, sizeof word, "--%s=%s", f->name, value); break;
    default: snprintf(word, sizeof word, "%s", value);
    }
    size_t n = strlen(word) + 1, at = dice((uint32_t)size + 1);
    if (dice(3) == 0 || n > most - size) return LLVMFuzzerMutate(data, size, most);
    while (at > 0 && data[at - 1]) at--;                /* where an argument begins */
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, word, n);
    return size + n;
}

static void write_seeds(void) {
    static const char line[] = "m.bin\0-i\0Once\0-t\0" "0.5\0-n\0" "16\0--seed=7\0-r\0The end\0-v",
        chat[] = "m.bin\0-m\0chat\0-y\0A story.\0--chat-template\0A: {}\\nB:\0--load\0x";
    unsigned char note[NOTE_HEADER + 8] = "run\1";
    put_little(note + 24, 2, 4), put_little(note + NOTE_HEADER, 299, 4);
    memcpy(note + 16, "\xf0\x9f", 3), note[20] = 2;
    save_seed("note", note, sizeof note);
    save_seed("generate", line, sizeof line);
    save_seed("chat", chat, sizeof chat);
}
