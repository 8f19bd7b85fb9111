/* request.c - fuzzes the reader of --jsonl: any line is refused, with what is wrong and where, or
 * taken; then its texts lie inside the line and are valid UTF-8, and its numbers in their ranges.
 */
#define _GNU_SOURCE 1
#define main run_main
#include "../../run.c"
#undef main

#include "tests/fuzz/fuzz.h"

static void check_text(const span *s, const char *line, size_t n) {
    REQUIRE(s->text > line && s->n < n && s->text + s->n < line + n);
    REQUIRE(s->text[s->n] == '\0' && valid_utf8((unsigned char *)s->text, s->n));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const options standard = { .predict = 256, .temperature = 1, .top_p = 0.9,
                                      .repeat_penalty = 1, .repeat_last_n = 64 };
    static job j;
    char *line = tight(data, size);
    memset(&j, 0, sizeof j);
    j.o = standard;
    if (!read_request(&j, line, size)) {
        REQUIRE(j.wrong && j.wrong[0] && strlen(j.wrong) < 200 && j.byte >= 1);
        REQUIRE(j.byte <= size + 1);
        REQUIRE(valid_utf8((const unsigned char *)j.wrong, strlen(j.wrong)));
    } else {
        const options *o = &j.o;
        if (j.prompt.text) check_text(&j.prompt, line, size);
        if (j.continuation.text) check_text(&j.continuation, line, size);
        if (j.id_is_text) check_text(&j.id, line, size);
        for (size_t i = 0; i < o->n_stops; i++) {
            check_text(&(span){ o->stops[i], strlen(o->stops[i]) }, line, size);
            REQUIRE(o->stops[i][0]);
        }
        REQUIRE(o->n_stops <= STOPS && o->predict >= -1 && o->branches >= 0);
        REQUIRE(o->temperature >= 0 && o->temperature <= 100 && o->top_p >= 0 && o->top_p <= 1);
        REQUIRE(o->min_p >= 0 && o->min_p <= 1 && o->repeat_penalty > 0 && o->top_k >= 0);
        REQUIRE(o->repeat_last_n >= 0 && o->repeat_last_n <= 1048576 && o->branches <= 65536);
    }
    free(line);
    return 0;
}

/* Puts a piece of JSON somewhere into the line. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static const char *const pieces[] = {
        "{", "}", "[", "]", ",", ":", "\"", "\\", "\\u", "\\ud83d", "\\ude00", "\\u0000", "\\n",
        "null", "true", "1e5", "-0", "01", "1.", "\xed\xa0\x80", "\xf0\x9f\x98\x80", "\"stop\":",
        "\"seed\":18446744073709551615", "\"id\":", "\"a\"", "  "
    };
    dice_state = seed;
    const char *piece = pieces[dice(sizeof pieces / sizeof *pieces)];
    size_t n = strlen(piece), at = dice((uint32_t)size + 1);
    if (dice(3) == 0 || n > most - size) return LLVMFuzzerMutate(data, size, most);
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, piece, n);
    return size + n;
}

static void write_seeds(void) {
    static const char whole[] =
        "{\"id\": \"a\\ud83d\\ude00\", \"prompt\": \"Once\\n\", \"max_tokens\": 9, \"top_p\": 1,"
        " \"temperature\": 0.5, \"top_k\": 5, \"min_p\": 1e-2, \"repeat_penalty\": 1.1,"
        " \"repeat_last_n\": 9,"
        " \"seed\": 7, \"stop\": [\"a\", \"b\"], \"logprobs\": true, \"n\": 2}",
        score[] = "{\"id\": -1.5e3, \"prompt\": null, \"continuation\": \"x\", \"stop\": \"y\"}";
    save_seed("whole", whole, sizeof whole - 1);
    save_seed("score", score, sizeof score - 1);
}
