/* tokenizer.c - fuzzes the reader of the tokenizer section: any bytes are refused with one line, or
 * are a tokenizer that encodes any text within its bounds and decodes all its tokens to valid
 * UTF-8. The section's own bytes serve as text.
 */
#define _POSIX_C_SOURCE 200809L
#include "../../tokenizer.c"

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    void *section = tight(data, size);
    based_tokenizer t;
    based_error e = { 0, "" };
    if (based_tokenizer_init(&t, section, size, BASED_MAX_VOCAB, &e)) {
        REQUIRE(e.status < 0 && strlen(e.text) > 10 && !strchr(e.text, '\n'));
    } else {
        size_t some = size < 500 ? size : 500;
        check_encoding(&t, data + size - some, some, 0);
        check_encoding(&t, data + size - some, some, BASED_ADD_BOS | BASED_PARSE_SPECIALS);
        int32_t ids[512];
        for (size_t i = 0; i < 512; i++) ids[i] = (int32_t)i - 3;
        free(check_decoding(&t, ids, 512));
        based_special(&t, "<s>");
        for (int i = 0; i < 4 && t.chat[0]; i++) REQUIRE(strlen(t.chat[i]) < size);
        for (size_t i = 0; i < 512; i++) based_is_stop(&t, ids[i]);
    }
    free(section);
    return 0;
}

static void put(uint8_t *data, size_t word, uint32_t value) { memcpy(data + 4 * word, &value, 4); }

static uint32_t get(const uint8_t *data, size_t word) {
    uint32_t value;
    memcpy(&value, data + 4 * word, 4);
    return value;
}

/* Makes mutants whose counts mostly add up and whose tokens mostly follow one another. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, most);
    dice_state = seed;
    if (size < 4 * 270 || dice(8) == 0) return size;
    uint32_t room = (uint32_t)(size / 4), kind = 1 + get(data, 1) % 2, tokens = get(data, 3),
             specials = get(data, 8) % 8, stops = get(data, 10) % 3,
             shown = get(data, 10) >> 16 & 1;
    uint32_t ids = specials + stops + shown, least = 12 + 256 + ids + 1;
    if (least + 2 * tokens > room || tokens == 0 || tokens > room)
        tokens = 1 + dice((room - least) / 3 + 1);
    uint32_t rest = room - least < 2 * tokens ? 0 : room - least - 2 * tokens,
             merges = get(data, 7);
    if (merges > rest / 4) merges = dice(rest / 4 + 1);
    uint32_t words = least + tokens + (kind == BASED_BPE ? 4 * merges : merges + tokens),
             start = 12 + 256 + ids, at = 0, whole = kind == BASED_BPE && get(data, 2) & 4;
    if (whole) words += dice(room < words ? 1 : room - words + 1);
    if (words > room) return size;
    uint32_t chat = get(data, 11);
    if (chat > (uint32_t)size - 4 * words) chat = 0;
    put(data, 0, words), put(data, 1, kind), put(data, 3, tokens);
    put(data, 2, get(data, 2) % 16 & (kind == BASED_BPE ? ~1u : ~4u));
    for (size_t w = 4; w < 7; w++) if (get(data, w) >= tokens) put(data, w, BASED_NONE);
    put(data, 7, merges), put(data, 8, specials);
    put(data, 9, kind == BASED_BPE ? get(data, 9) % 4 : 0);
    put(data, 10, stops | shown << 16), put(data, 11, chat);
    for (size_t w = 0; w < ids; w++)
        if (dice(4) && get(data, 268 + w) >= tokens) put(data, 268 + w, dice(tokens));
    for (uint32_t i = 0; i <= tokens; i++) {
        uint32_t left = (uint32_t)size - 4 * words - chat - at, n = get(data, start + i) - at;
        if (i == tokens) at += left;
        else if (i > 0) at += n <= left && n < 9 ? n : dice(3) < left ? dice(3) % (left + 1) : 0;
        put(data, start + i, at);
    }
    for (uint32_t b = 0; b < 256; b++)
        if (dice(4) && get(data, 12 + b) >= tokens) put(data, 12 + b, BASED_NONE);
    return size;
}

static void write_seeds(void) {
    static maker m;
    size_t n;
    make_bpe(&m);
    unsigned char *section = make_section(&m, &n);
    save_seed("bpe", section, n);
    make_scores(&m);
    section = make_section(&m, &n);
    save_seed("scores", section, n);
    make_whole(&m);
    section = make_section(&m, &n);
    save_seed("whole", section, n);
}
