/* test_state.c - the past as bytes: saving, loading, refusing; copies and histories; positions
 * beyond 2^32; sums that stay exact and stay clear of subnormal numbers. The model has every mixer
 * and is that of model.h.
 */
#include "based.c"

#include "tests/model.h"

enum { TOKENS = 100, SAVED_ROOM = 1 << 17, HEADER = sizeof(struct saved_header) };

static based_session *start(const based_model *m, uint32_t block) {
    based_error e;
    based_session *s = based_session_new(m, block, &e);
    if (!s) printf("%s\n", e.text);
    return s;
}

static based_model *model, *stranger, *sighted;         /* sighted takes vectors */
static int32_t text[TOKENS];
static unsigned char saved[SAVED_ROOM], again[SAVED_ROOM];

/* Saves s without a note; returns the number of bytes. */
static size_t save(const based_session *s, unsigned char *to) {
    size_t n = based_saved_bytes(s->m, 0);
    based_error e;
    CHECK_EACH(n <= SAVED_ROOM && based_save(s, NULL, 0, to, SAVED_ROOM, &e) == BASED_OK);
    return n;
}

static int same_logits(const based_session *a, const based_session *b) {
    return memcmp(based_logits(a), based_logits(b), based_width(a->m) * sizeof(float)) == 0;
}

/* ---- saving and loading ---- */

/* 100 tokens = n tokens, saved, loaded into a session that had another past, and the rest: for
 * every n, and for the bytes too. */
static void test_every_split(void) {
    based_session *whole = start(model, 16), *first = start(model, 7), *second = start(model, 32);
    based_error e;
    CHECK(based_feed(whole, text, TOKENS, NULL, &e) == 0);
    for (size_t n = 0; n <= TOKENS; n++) {
        based_reset(first);
        CHECK_EACH(based_feed(first, text, n, NULL, &e) == 0);
        size_t size = save(first, saved);
        CHECK_EACH(based_feed(second, text, 13, NULL, &e) == 0);
        CHECK_EACH(based_load(second, saved, size, NULL, NULL, &e) == 0);
        CHECK_EACH(based_count(second) == n
                   && based_history(second) == based_history_of(0, text, n));
        CHECK_EACH(n == 0 ? based_logits(second) == NULL : same_logits(first, second));
        CHECK_EACH(save(second, again) == size && memcmp(saved, again, size) == 0);
        CHECK_EACH(based_feed(second, text + n, TOKENS - n, NULL, &e) == 0
                   && same_logits(second, whole));
    }
    CHECK(save(whole, saved) == save(second, again)
          && memcmp(saved, again, based_saved_bytes(model, 0)) == 0);
    based_session_free(whole), based_session_free(first), based_session_free(second);
}

/* The same past is the same bytes, however it was fed and whatever was in the session before. */
static void test_bytes_are_the_pasts(void) {
    based_session *s = start(model, 16), *one = start(model, 1),
        *pair[2] = { start(model, 2), start(model, 2) };
    based_error e;
    size_t size;
    CHECK(based_feed(s, text, 50, NULL, &e) == 0);
    size = save(s, saved);
    based_feed(one, text + 9, 40, NULL, &e);
    based_reset(one);
    for (size_t i = 0; i < 50; i++) {
        int32_t both[2] = { text[i], text[99 - i] };
        CHECK_EACH(based_step(one, text[i], &e) == 0 && based_step_many(pair, both, 2, &e) == 0);
    }
    CHECK(save(one, again) == size && memcmp(saved, again, size) == 0);
    CHECK(save(pair[0], again) == size && memcmp(saved, again, size) == 0);
    CHECK(save(pair[1], again) == size && memcmp(saved, again, size) != 0);
    CHECK(based_copy(pair[1], s, &e) == 0 && save(pair[1], again) == size
          && memcmp(saved, again, size) == 0);
    based_session_free(s), based_session_free(one), based_session_free(pair[0]),
        based_session_free(pair[1]);
}

static void test_history(void) {
    static float x[20 * 6];
    based_session *s = start(model, 8), *v = start(sighted, 8), *w = start(sighted, 3);
    int32_t swapped[2] = { text[1], text[0] }, zeros[3] = { 0, 0, 0 };
    based_error e;
    for (size_t i = 0; i < COUNT(x); i++) x[i] = (float)random_u32();
    CHECK(based_history(s) == 0 && based_history_of(5, text, 0) == 5);
    CHECK(based_feed(s, text, 2, NULL, &e) == 0
          && based_history(s) == based_history_of(0, text, 2));
    CHECK(based_history(s) == based_history_of(based_history_of(0, text, 1), text + 1, 1));
    CHECK(text[0] != text[1] && based_history(s) != based_history_of(0, swapped, 2));
    CHECK(based_history_of(0, zeros, 1) != based_history_of(0, zeros, 2)
          && based_history_of(0, zeros, 1) != 0);
    uint64_t before = based_history(s);
    zeros[2] = VOCAB;
    CHECK(based_feed(s, zeros, 3, NULL, &e) != 0 && based_history(s) == before);
    based_reset(s);
    CHECK(based_history(s) == 0);
    CHECK(based_feed_vectors(v, x, 20, NULL, &e) == 0);
    for (size_t i = 0; i < 20; i++) CHECK_EACH(based_feed_vectors(w, x + 6 * i, 1, NULL, &e) == 0);
    CHECK(based_history(v) == based_history(w) && based_history(v) != 0 && same_logits(v, w));
    x[77] = -x[77];
    based_reset(w);
    CHECK(based_feed_vectors(w, x, 20, NULL, &e) == 0 && based_history(v) != based_history(w));
    based_session_free(s), based_session_free(v), based_session_free(w);
}

/* The note comes back byte by byte, from bytes that lie at any address; too little room is refused
 * and nothing written. */
static void test_note_and_room(void) {
    static unsigned char room[SAVED_ROOM + 1];
    based_session *s = start(model, 8);
    const void *note = NULL;
    size_t n = 99, need = based_saved_bytes(model, 11);
    based_error e;
    CHECK(need == based_saved_bytes(model, 0) + 11
          && need == 80 + based_state_bytes(model) + 4 * VOCAB + 11);
    CHECK(based_saved_bytes(model, SIZE_MAX) == 0);
    CHECK(based_save(s, "hello world", 11, room + 1, need - 1, &e) == BASED_ENOMEM && room[1] == 0);
    CHECK(based_save(s, "hello world", SIZE_MAX, room + 1, need, &e) == BASED_ENOMEM
          && room[1] == 0);
    CHECK(based_save(s, "hello world", 11, room + 1, need, &e) == 0 && room[need + 1] == 0);
    CHECK(based_load(s, room + 1, need, &note, &n, &e) == 0 && n == 11
          && memcmp(note, "hello world", 11) == 0);
    CHECK((const unsigned char *)note == room + 1 + need - 11);
    CHECK(based_load(s, saved, save(s, saved), &note, &n, &e) == 0 && n == 0);
    based_session_free(s);
}

/* ---- refusing ---- */

static size_t size_before;
static unsigned char untouched[SAVED_ROOM];

/* Loads `bytes`, which must be refused with `status` (or, if that is 0, with any) and leave s,
 * whose saved form is in `untouched`, as it was. The copy lies in a block of just that size, for
 * the sanitizer. */
static void refuse(based_session *s, const unsigned char *bytes, size_t n, int status,
                   const char *says) {
    unsigned char *tight = malloc(n ? n : 1);
    const void *note = "untouched";
    size_t note_bytes = 7;
    based_error e = { 0, "" };
    memcpy(tight, bytes, n);
    int got = based_load(s, tight, n, &note, &note_bytes, &e);
    CHECK_EACH(got < 0 && got == e.status && (status == 0 || got == status) && note_bytes == 7);
    CHECK_EACH(strlen(e.text) > 20 && !strchr(e.text, '\n'));
    if (!strstr(e.text, says)) printf("\"%s\" does not say \"%s\"\n", e.text, says);
    CHECK_EACH(strstr(e.text, says) != NULL);
    CHECK_EACH(save(s, again) == size_before && memcmp(untouched, again, size_before) == 0);
    free(tight);
}

static void seal(unsigned char *bytes, size_t n) {
    put_little(bytes + 24, based_checksum(bytes + 32, n - 32), 8);
}

static void test_damage(void) {
    based_session *other = start(model, 8), *s = start(model, 8);
    based_error e;
    CHECK(based_feed(other, text, 60, NULL, &e) == 0
          && based_feed(s, text + 50, 33, NULL, &e) == 0);
    size_t n = save(other, saved);
    size_before = save(s, untouched);
    for (size_t cut = 0; cut < n; cut++)
        refuse(s, saved, cut, BASED_EFORMAT, cut < 8 ? "not a saved state" : "cut off?");
    refuse(s, saved, n + 1, BASED_EFORMAT, "but there are");
    for (size_t i = 0; i < 1000; i++) {                 /* one bit, anywhere */
        size_t bit = i < 640 ? i : (random_u32() ^ random_u32() << 12) % (8 * n);
        saved[bit / 8] ^= (unsigned char)(1u << bit % 8);
        refuse(s, saved, n, bit < 192 ? BASED_EFORMAT : BASED_ECHECKSUM,
               bit < 64 ? "not a saved state" : bit < 96 ? "version" : bit < 128 ? "byte-order"
               : bit < 192 ? "says" : "checksum does not match");
        saved[bit / 8] ^= (unsigned char)(1u << bit % 8);
    }
    for (size_t i = 0; i < 1000; i++) {                 /* some bytes, anywhere */
        unsigned char kept[16];
        size_t many = 1 + random_u32() % 16, at = random_u32() % (n - many);
        memcpy(kept, saved + at, many);
        for (size_t b = 0; b < many; b++) saved[at + b] ^= (unsigned char)(1 + random_u32() % 255);
        refuse(s, saved, n, 0, "");
        memcpy(saved + at, kept, many);
    }
    CHECK(based_load(s, saved, n, NULL, NULL, &e) == 0 && same_logits(s, other));
    based_session_free(other), based_session_free(s);
}

/* What a checksum cannot tell: an honest file of another model, and one that somebody made up. */
static void test_strangers(void) {
    based_session *s = start(model, 8), *foreign = start(stranger, 8), *vectors = start(sighted, 8);
    static const struct { size_t at; uint64_t value; const char *says; } forged[] = {
        { 8, 2, "version 2; this program reads version 1" }, { 32, 0, "another checkpoint" },
        { 56, 0, "configuration" }, { 56, UINT64_MAX, "configuration" },
        { 56, VOCAB + 1, "configuration" }, { 64, 0, "configuration" },
        { 64, UINT64_MAX, "configuration" }, { 64, 1u << 30, "configuration" },
        { 72, 1, "configuration" }, { 72, UINT64_MAX, "configuration" },
        { 72, (uint64_t)1 << 63, "configuration" }
    };
    unsigned char copy[HEADER];
    based_error e;
    CHECK(based_feed(s, text, 20, NULL, &e) == 0 && based_feed(foreign, text, 20, NULL, &e) == 0);
    size_before = save(s, untouched);
    refuse(s, saved, save(foreign, saved), BASED_EINVAL, "saved with another checkpoint");
    refuse(s, saved, save(vectors, saved), BASED_EINVAL, "saved with another checkpoint");
    size_t n = save(s, saved);
    memcpy(copy, saved, sizeof copy);
    for (size_t i = 0; i < COUNT(forged); i++) {
        put_little(saved + forged[i].at, forged[i].value, forged[i].at == 8 ? 4 : 8);
        seal(saved, n);
        refuse(s, saved, n, 0, forged[i].says);
        memcpy(saved, copy, sizeof copy);
    }
    for (size_t cut = HEADER; cut < n; cut++) {   /* cut off, and everything else put right */
        put_little(saved + 16, cut, 8);
        seal(saved, cut);
        refuse(s, saved, cut, BASED_EFORMAT, "configuration");
    }
    based_session_free(s), based_session_free(foreign), based_session_free(vectors);
}

/* A past that never was: any numbers, any count. It may give nonsense, but nothing worse; this is
 * for the sanitizers. */
static void test_forged_numbers(void) {
    static const uint64_t counts[] = { 0, 1, 5, (uint64_t)1 << 31, (uint64_t)1 << 32,
                                       (uint64_t)1 << 63, UINT64_MAX - 20, UINT64_MAX };
    static const uint32_t bits[] = { 0x7fc00000, 0x7f800000, 0xff800000, 0x7f7fffff, 0xff7fffff, 1,
                                     0x80000001, 0xffffffff };
    based_session *s = start(model, 8);
    based_error e;
    size_t n = save(s, saved);
    for (size_t i = 0; i < 400; i++) {
        put_little(saved + 40, counts[i % COUNT(counts)], 8);
        for (size_t at = HEADER; at < n; at += 4)
            put_little(saved + at, i % 3 ? bits[random_u32() % COUNT(bits)]
                       : random_u32() ^ random_u32() << 16, 4);
        seal(saved, n);
        CHECK_EACH(based_load(s, saved, n, NULL, NULL, &e) == 0);
        CHECK_EACH(save(s, again) == n && memcmp(saved, again, n) == 0);
        CHECK_EACH(based_feed(s, text, 30, NULL, &e) == 0);
    }
    based_session_free(s);
}

/* ---- far from the beginning ---- */

/* A text fed at position t gives what it gives at any other, once nothing but zeros came before:
 * rotations know only distances. Both sides of 2^31 and 2^32, and far beyond; saved and loaded in
 * the middle of it. */
static void test_far_positions(void) {
    static const uint64_t places[] = { 2147483648u, 3000000000u, 4294967296u, 1000000000000u,
                                       (uint64_t)1 << 62 };
    based_model *m = make_model((struct wish){ .seed = 5 });
    based_session *near = start(m, 16), *far = start(m, 16), *loaded = start(m, 5);
    based_error e;
    near->count = 36 * 1000;
    CHECK(based_feed(near, text, TOKENS, NULL, &e) == 0);
    for (size_t p = 0; p < COUNT(places); p++) {
        double worst = 0;
        based_reset(far);
        far->count = places[p] - TOKENS / 2;
        CHECK(based_feed(far, text, 45, NULL, &e) == 0);
        CHECK(based_load(loaded, saved, save(far, saved), NULL, NULL, &e) == 0);
        CHECK(based_feed(far, text + 45, TOKENS - 45, NULL, &e) == 0);
        CHECK(based_feed(loaded, text + 45, TOKENS - 45, NULL, &e) == 0);
        CHECK(same_logits(far, loaded) && based_count(loaded) == places[p] + TOKENS / 2);
        for (size_t i = 0; i < VOCAB; i++)
            worst = fmax(worst, fabs(based_logits(near)[i] - based_logits(far)[i]));
        CHECK(worst < 2e-5);
    }
    based_session_free(near), based_session_free(far), based_session_free(loaded);
}

/* ---- sums that grow for ever ---- */

/* A million additions, as the sums of a taylor layer see them: numbers around a mean, and the same
 * ones taken off again. */
static void test_sums_stay_exact(void) {
    enum { N = 32, ADDITIONS = 1000000 };
    for (size_t n = 1; n <= N; n += n == 1 ? 4 : 27) {
        float total[N] = { 0 }, comp[N / 2] = { 0 }, x[N], naive = 0;
        double exact[N] = { 0 }, worst = 0;
        random_state = n;
        for (size_t t = 0; t < ADDITIONS; t++) {
            for (size_t i = 0; i < n; i++)
                exact[i] += (double)(x[i] = 3.0f + (float)random_u32() / 2147483648.0f);
            compensated_add_body(total, comp, x, n);
            naive += x[0];
        }
        for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs(total[i] - exact[i]) / exact[i]);
        CHECK(worst < 1.2e-7);
        CHECK(fabs(naive - exact[0]) / exact[0] > 1e-6);  /* what a plain sum would have done */
        random_state = n;
        for (size_t t = 0; t < ADDITIONS; t++) {
            for (size_t i = 0; i < n; i++) x[i] = -3.0f - (float)random_u32() / 2147483648.0f;
            compensated_add_body(total, comp, x, n);
        }
        for (size_t i = 0; i < n; i++) CHECK_EACH(fabsf(total[i]) < 1.0f);
    }
}

/* Nothing that a sum holds may be subnormal, whatever is added; an infinite sum stays one and does
 * not turn into NaN. */
static void test_sums_stay_normal(void) {
    static const float tiny[] = { 1e-45f, 1e-40f, -1e-38f, 1e-37f, -1e-33f, 1e-31f, 1e-30f, -1e-29f,
                                  1e-22f };
    float total[2] = { 0 }, comp[1] = { 0 }, most = FLT_MAX, word[2];
    for (size_t i = 0; i < 100000; i++) {
        float x[2] = { tiny[random_u32() % COUNT(tiny)], -tiny[i % COUNT(tiny)] };
        uint32_t bits;
        compensated_add_body(total, comp, x, 2);
        memcpy(&bits, comp, 4);
        word[0] = bf16_to_f32(bits), word[1] = bf16_to_f32(bits << 16);
        for (size_t l = 0; l < 2; l++) {
            CHECK_EACH(total[l] == 0.0f || fabsf(total[l]) >= 1e-30f);
            CHECK_EACH(word[l] == 0.0f || fabsf(word[l]) >= FLT_MIN);
        }
    }
    CHECK(two_sum(&most, FLT_MAX) == 0.0f && most > FLT_MAX);
    CHECK(two_sum(&most, 1.0f) == 0.0f && most > FLT_MAX);
}

/* ---- sampling goes on too ---- */

static void test_sampler_goes_on(void) {
    static uint64_t memory[2][64];
    int32_t recent[4] = { -1, -1, -1, -1 };
    based_sampler a = { .temperature = 1.0f, .top_p = 1.0f, .repeat_penalty = 2.0f,
                        .repeat_last_n = 4, .seed = 3, .vocab = 20 };
    based_sampler b = a;
    float logits[20] = { 0 };
    based_error e;
    b.seed = 99;
    CHECK(based_sampler_init(&a, memory[0], sizeof memory[0], &e) == 0);
    CHECK(based_sampler_init(&b, memory[1], sizeof memory[1], &e) == 0);
    CHECK(based_sampler_recent(&a, recent) == 0);
    based_sampler_accept(&a, 7);
    CHECK(based_sampler_recent(&a, recent) == 1 && recent[0] == 7 && recent[1] == -1);
    for (int i = 0; i < 48; i++) based_sampler_accept(&a, based_sample(&a, logits));
    for (int i = 10; i < 15; i++) based_sampler_accept(&a, i);
    CHECK(based_sampler_recent(&a, recent) == 4 && recent[0] == 11 && recent[3] == 14);
    for (size_t i = 0; i < 4; i++) based_sampler_accept(&b, recent[i]), logits[11 + i] = 2.0f;
    b.state = a.state;
    for (int i = 0; i < 200; i++) {
        int32_t id = based_sample(&a, logits);
        CHECK_EACH(based_sample(&b, logits) == id);
        based_sampler_accept(&a, id), based_sampler_accept(&b, id);
    }
}

int main(void) {
    model = make_model((struct wish){ .seed = 1, .constant = 1 });
    stranger = make_model((struct wish){ .seed = 2, .constant = 1 });
    sighted = make_model((struct wish){ .seed = 3, .constant = 1, .input = 6, .window = 5 });
    for (size_t i = 0; i < TOKENS; i++) text[i] = (int32_t)(random_u32() % VOCAB);
    test_every_split();
    test_bytes_are_the_pasts();
    test_history();
    test_note_and_room();
    test_damage();
    test_strangers();
    test_forged_numbers();
    test_far_positions();
    test_sums_stay_exact();
    test_sums_stay_normal();
    test_sampler_goes_on();
    return test_end();
}
