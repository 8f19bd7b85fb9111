/* state.c - fuzzes the reader of saved sessions: any bytes are refused with one line and leave the
 * session as it was, or are loaded, come back byte for byte when saved again, and the session goes
 * on.
 */
#define _POSIX_C_SOURCE 200809L
#include "based.c"

#include "tests/fuzz/fuzz.h"
#include "tests/model.h"

enum { SAVED_MOST = 1 << 16, HEADER = sizeof(struct saved_header) };

static based_session *s;
static unsigned char kept[SAVED_MOST], after[SAVED_MOST];
static const int32_t text[] = { 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3 };

/* A session that has read something, and what that looks like when it is saved. */
static void begin(void) {
    static int begun;
    based_error e;
    if (!s) s = based_session_new(make_model((struct wish){ 7, 1.0f, 0, BASED_F32, 5 }), 8, &e);
    REQUIRE(s && based_saved_bytes(s->m, 4096) <= SAVED_MOST);
    if (begun) {
        REQUIRE(based_load(s, kept, based_saved_bytes(s->m, 0), NULL, NULL, &e) == BASED_OK);
        return;
    }
    REQUIRE(based_feed(s, text, COUNT(text), NULL, &e) == BASED_OK
            && based_save(s, NULL, 0, kept, SAVED_MOST, &e) == BASED_OK);
    begun = 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    begin();
    unsigned char *saved = tight(data, size);
    size_t usual = based_saved_bytes(s->m, 0), note_bytes = 0;
    const void *note = NULL;
    based_error e;
    if (based_load(s, saved, size, &note, &note_bytes, &e)) {
        REQUIRE(strlen(e.text) > 10 && !strchr(e.text, '\n') && note == NULL && note_bytes == 0);
        REQUIRE(based_save(s, NULL, 0, after, SAVED_MOST, &e) == BASED_OK
                && memcmp(kept, after, usual) == 0);
    } else {
        REQUIRE(size == usual + note_bytes && (const unsigned char *)note == saved + usual);
        unsigned char *again = tight(NULL, size);
        REQUIRE(based_save(s, note, note_bytes, again, size, &e) == BASED_OK
                && memcmp(saved, again, size) == 0);
        uint64_t count = based_count(s);
        REQUIRE(based_feed(s, text, 3, NULL, &e) == BASED_OK && based_count(s) == count + 3);
        free(again);
    }
    free(saved);
    return 0;
}

/* Mutants keep magic, model, size and checksum right, most of the time. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    if (!s) begin();
    size = LLVMFuzzerMutate(data, size, most);
    dice_state = seed;
    if (size < HEADER || dice(8) == 0) return size;
    size_t usual = based_saved_bytes(s->m, 0);
    if (usual <= most && (size < usual || dice(2))) {
        for (; size < usual; size++) data[size] = 0;
        put_little(data + 56, based_width(s->m), 8);
        put_little(data + 64, s->m->state, 8);
        put_little(data + 72, size - usual, 8);
    }
    memcpy(data, BASED_STATE_MAGIC, 8);
    put_little(data + 8, BASED_STATE_FORMAT, 4);
    put_little(data + 12, BASED_BYTE_ORDER, 4);
    put_little(data + 16, size, 8);
    put_little(data + 32, two_words(s->m->c->checksum), 8);
    put_little(data + 24, based_checksum(data + 32, size - 32), 8);
    return size;
}

static void write_seeds(void) {
    based_error e;
    begin();
    for (size_t note = 0; note < 2; note++) {
        REQUIRE(based_save(s, "a note", 6 * note, after, SAVED_MOST, &e) == BASED_OK);
        save_seed(note ? "note" : "plain", after, based_saved_bytes(s->m, 6 * note));
        based_reset(s);
    }
}
