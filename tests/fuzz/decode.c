/* decode.c - fuzzes decoding: any ids, also ids that do not exist, become valid UTF-8 within the
 * bound, by every kind of tokenizer. The first byte chooses the tokenizer; every two bytes after it
 * are an id.
 */
#define _POSIX_C_SOURCE 200809L
#include "../../tokenizer.c"

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static based_tokenizer t[TOKENIZERS];
    static int32_t ids[4096];
    size_t n = 0;
    if (!t[0].kind) open_all(t);
    for (size_t i = 1; i + 1 < size && n < 4096; i += 2)
        ids[n++] = (int16_t)(data[i] | data[i + 1] << 8);
    free(check_decoding(&t[size > 0 ? data[0] % TOKENIZERS : 0], ids, n));
    return 0;
}

/* Makes mutants in which most ids exist. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, most);
    dice_state = seed;
    for (size_t i = 2; i < size; i += 2) if (data[i] > 1 && dice(16)) data[i] = (uint8_t)dice(2);
    return size;
}

static void write_seeds(void) {
    static const unsigned char ids[] =
        { 0, 97, 0, 0, 1, 7, 1, 0xE6, 0, 0x97, 0, 0xA5, 0, 0xF0, 0, 0x9F, 0, 4, 1, 3, 1, 255, 0 };
    save_seed("bpe", ids, sizeof ids);
    save_seed("one", ids, 3);
}
