/* options.c - fuzzes the command line: any arguments are understood, or refused with one clean line and status 2. Arguments
 * are separated by zero bytes. The same for the note in a saved session, which run.c reads.
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

static void check_refusal(int rc) {
    size_t n;
    fflush(errors);
    n = (size_t)ftell(errors);
    REQUIRE(n < sizeof error_text);
    error_text[n] = '\0';
    REQUIRE((n == 0) == (rc == DONE));
    if (rc == DONE) return;
    REQUIRE(rc == BAD_USAGE && n > 10 && memcmp(error_text, "run: ", 5) == 0 && error_text[n - 1] == '\n');
    for (size_t i = 0; i < n - 1; i++) REQUIRE((unsigned char)error_text[i] >= 0x20 && error_text[i] != 0x7f);
}

static void check_numbers(const options *o) {
    REQUIRE(o->checkpoint && o->predict >= -1 && o->temperature >= 0 && o->temperature <= 100);
    REQUIRE(o->top_p >= 0 && o->top_p <= 1 && o->min_p >= 0 && o->min_p <= 1 && o->repeat_penalty > 0);
    REQUIRE(o->top_k >= 0 && o->top_k <= 4294967295 && o->repeat_last_n >= 0 && o->repeat_last_n <= 1048576);
    REQUIRE(o->threads >= 0 && o->threads <= 1024 && o->branches >= 0 && o->branches <= 65536);
    if (o->chat) REQUIRE(o->before && o->after && o->stop && o->stop[0] == '\n');
    for (size_t i = 0; i < o->n_stops; i++) REQUIRE(o->stops[i] && o->stops[i][0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *argv[66] = { (char *)"run" }, *text = malloc(size + 1);
    int argc = 1;
    options o;
    if (!errors) errors = fmemopen(error_text, sizeof error_text, "w");
    REQUIRE(errors && text);
    rewind(errors);
    memcpy(text, data, size);
    text[size] = '\0';
    for (size_t at = 0; at < size && argc < 65; at += strlen(text + at) + 1) argv[argc++] = text + at;
    memset(&o, 0, sizeof o);
    o.stops = calloc((size_t)argc + 1, sizeof *o.stops);
    int rc = parse_options(&o, argc, argv);
    check_refusal(rc);
    if (rc == DONE && !o.help && !o.version) check_numbers(&o);
    free(o.stops), free(o.before), free(o.stop), free(text);
    return 0;
}

/* Puts a flag that there is, or a value near the edge of a range, somewhere into the line. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static const char *const values[] = { "0", "1", "-1", "65537", "9223372036854775808", "18446744073709551616", "1e309",
                                          "nan", "-0", "0x1", "", "-", "--", "chat", "{}", "a{}b{}", "\n", "m.bin" };
    char word[64];
    dice_state = seed;
    const flag *f = &flags[dice(FLAGS)];
    switch (dice(4)) {
    case 0: snprintf(word, sizeof word, "--%s", f->name); break;
    case 1: snprintf(word, sizeof word, "-%c", f->letter ? f->letter : 'n'); break;
    case 2: snprintf(word, sizeof word, "--%s=%s", f->name, values[dice(sizeof values / sizeof *values)]); break;
    default: snprintf(word, sizeof word, "%s", values[dice(sizeof values / sizeof *values)]);
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
    save_seed("generate", line, sizeof line);
    save_seed("chat", chat, sizeof chat);
}
