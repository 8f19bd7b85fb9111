/* encode.c - fuzzes encoding: any text, by every kind of tokenizer, stays within its bounds and
 * comes back byte for byte. The first byte chooses the tokenizer and the flags.
 */
#define _POSIX_C_SOURCE 200809L
#include "../../tokenizer.c"

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static based_tokenizer t[TOKENIZERS];
    if (!t[0].kind) open_all(t);
    if (size > 0)
        check_encoding(&t[data[0] / 4 % TOKENIZERS], data + 1, size - 1, data[0] & 3);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static const char *const pieces[] = {
        "<end>", "<end>x", "<s>", "</s>", " ab", "abcc", "aaaa", "\xE6\x97\xA5",
        "\xF0\x9F\xA6\x99", " h", "'re", "  ", "\r\n", "0", "\xC2\xA0", "\n", "'\xC5\xBF", " hello"
    };
    dice_state = seed;
    const char *piece = pieces[dice(sizeof pieces / sizeof *pieces)];
    size_t n = strlen(piece);
    if (dice(2) || size == 0 || n > most - size) return LLVMFuzzerMutate(data, size, most);
    size_t at = 1 + dice((uint32_t)size);
    at = at < size ? at : size;
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, piece, n);
    return size + n;
}

static void write_seeds(void) {
    for (char first = 'd'; first <= 'w'; first++) {
        char name[] = "text0",
             text[] = "0 abcc aaaa hello<end>x \xE6\x97\xA5\xF0\x9F\xA6\x99 it's 12\n\n x\xFF (b'S";
        name[4] = text[0] = first;
        save_seed(name, text, sizeof text - 1);
    }
}
