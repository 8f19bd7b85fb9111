/* page.c - what the page needs of based.c, as functions that a browser can call.
 *
 * One model, one session, one text. Memory is taken once from the end of the static data and never
 * given back. The page writes into it (the checkpoint, a prompt, a saved state) and reads from it
 * (text, errors) by address.
 */
#include "based.h"

#include <string.h>

#define EXPORT(name) __attribute__((export_name(#name))) name

extern unsigned char __heap_base[];

static based_model *model;
static based_session *session;
static based_tokenizer tokenizer;
static based_decoder decoder;
static based_sampler sampler;
static based_error error;
static int32_t *recent;                 /* tokens that a note holds                               */
static char *text;                      /* of the last token                                      */
static int32_t next = -1;               /* chosen but not fed yet                                 */
static uint32_t hash;
static size_t used;                     /* bytes of memory after __heap_base                      */

/* Room for n bytes, aligned to 64; 0 if the browser gives no more. */
void *EXPORT(room)(size_t n) {
    const size_t page = 65536, base = (size_t)__heap_base;
    size_t at = (base + used + 63) / 64 * 64, have = __builtin_wasm_memory_size(0) * page;
    if (n > SIZE_MAX - page - at) return NULL;
    if (at + n > have) {
        size_t pages = (at + n - have + page - 1) / page;
        if (__builtin_wasm_memory_grow(0, pages) == (size_t)-1) return NULL;
    }
    used = at + n - base;
    return (void *)at;
}

/* Gives back everything from `at` on; for memory that was needed only during one call. */
void EXPORT(drop)(const void *at) { used = (size_t)at - (size_t)__heap_base; }

const char *EXPORT(error_text)(void) { return error.text; }
const char *EXPORT(token_text)(void) { return text; }
const char *EXPORT(name)(void) { return based_model_config(model)->name; }
uint32_t EXPORT(fingerprint)(void) { return hash; }
double EXPORT(count)(void) { return (double)based_count(session); }
double EXPORT(parameters)(void) { return (double)based_model_parameters(model); }
size_t EXPORT(state_bytes)(void) { return based_state_bytes(model); }

/* The bytes that one more token would cost a transformer of this shape: in each layer a key and a
 * value, both as wide as the values here. */
uint32_t EXPORT(transformer_bytes)(void) {
    const based_config *c = based_model_config(model);
    uint32_t floats = 0;
    for (uint32_t i = 0; i < c->layers; i++) {
        const based_layer *l = based_model_layer(model, i);
        floats += 2 * (l->kv_heads ? l->kv_heads * l->head_dim_v : c->dim);
    }
    return floats * (uint32_t)sizeof(float);
}

static int out_of_memory(void) {
    const char *why = "the browser has no memory left for this model";
    memcpy(error.text, why, strlen(why) + 1);
    return -1;
}

/* The checkpoint was written to `bytes`. 0, or -1 with an error. */
int EXPORT(open)(const void *bytes, size_t size) {
    size_t n = based_model_bytes(bytes, size, &error);
    void *memory = n ? room(n) : NULL;
    if (!n) return -1;
    if (!memory) return out_of_memory();
    if (based_model_init(&model, memory, n, bytes, size, 0, &error)) return -1;
    if (based_tokenizer_open(&tokenizer, model, &error)) return -1;
    n = based_session_bytes(model, 32);
    memory = room(n);
    text = room(based_decode_bound(&tokenizer) + 12);
    if (!memory || !text) return out_of_memory();
    if (based_session_init(&session, model, memory, n, 32, &error)) return -1;
    const based_config *c = based_model_config(model);
    int known = (c->flags & BASED_SAMPLING) != 0;
    sampler = (based_sampler){
        .temperature = known ? c->temperature : 0.8f, .top_p = known ? c->top_p : 0.9f,
        .top_k = c->top_k, .min_p = c->min_p, .repeat_penalty = known ? c->repeat_penalty : 1.0f,
        .repeat_last_n = known ? c->repeat_last_n : 64, .vocab = c->vocab
    };
    n = based_sampler_bytes(&sampler);
    memory = room(n);
    recent = room((sampler.repeat_last_n + 1) * sizeof *recent);
    if (!memory || !recent) return out_of_memory();
    return based_sampler_init(&sampler, memory, n, &error) ? -1 : 0;
}

/* How to choose from now on; at first as the checkpoint recommends. */
float EXPORT(temperature)(void) { return sampler.temperature; }
float EXPORT(penalty)(void) { return sampler.repeat_penalty; }
void EXPORT(choose)(float temperature, float penalty) {
    sampler.temperature = temperature;
    sampler.repeat_penalty = penalty;
}

/* Begins a new text; the same seed, settings and words give the same text as ./run. */
void EXPORT(forget)(uint32_t seed) {
    based_reset(session);
    sampler.state = seed;
    sampler.seen = 0;
    memset(&decoder, 0, sizeof decoder);
    next = -1;
    hash = 0;
}

/* Feeds n bytes of text, the beginning of a new one, after the token that every text begins with.
 * Returns how many tokens were fed, or -1. */
int EXPORT(read)(const char *bytes, size_t n) {
    const based_tokenizer *t = &tokenizer;
    int bos = (t->flags & BASED_TOK_ADD_BOS) && t->bos != BASED_NONE;
    int32_t *ids = room((based_encode_bound(t, n) + 1) * sizeof *ids);
    void *scratch = room(based_encode_scratch(t, n));
    int64_t many = 0;
    if (!ids || !scratch) return out_of_memory();
    if (n) many = based_encode(t, bytes, n, bos ? BASED_ADD_BOS : 0, ids, scratch, &error);
    else if ((bos ? t->bos : t->eos) != BASED_NONE) ids[many++] = (int32_t)(bos ? t->bos : t->eos);
    if (many >= 0 && based_feed(session, ids, (size_t)many, NULL, &error)) many = -1;
    for (int64_t i = 0; i < many; i++) {
        based_decode(t, &decoder, ids[i], text);
        based_sampler_accept(&sampler, ids[i]);
    }
    drop(ids);
    return (int)many;
}

/* Chooses one more token. Returns the bytes of its text, or -1 at the end of the text (another call
 * continues it all the same), or -2 with an error. */
int EXPORT(tell)(void) {
    size_t n;
    if (next >= 0 && based_step(session, next, &error)) return -2;
    next = -1;
    if (!based_logits(session)) return -1;
    hash = based_hash(hash, based_logits(session), based_width(model));
    next = based_sample(&sampler, based_logits(session));
    based_sampler_accept(&sampler, next);
    if (based_is_stop(&tokenizer, next)) {
        memset(&decoder, 0, sizeof decoder);
        return -1;
    }
    n = based_decode(&tokenizer, &decoder, next, text);
    return (int)n;
}

/* ==== Saved states ===============================================================================
 * The note is the one that run.c writes and describes, always with the generator, so that each of
 * the two continues what the other saved as if it had never been interrupted.
 */
enum { NOTE = 28 };

size_t EXPORT(save_bytes)(void) {
    return based_saved_bytes(model, NOTE + 4 * based_sampler_recent(&sampler, recent));
}

int EXPORT(save)(void *out, size_t bytes) {
    uint32_t n = (uint32_t)based_sampler_recent(&sampler, recent), seeded = 1;
    unsigned char *note = room(NOTE + 4 * (size_t)n);
    if (!note) return out_of_memory();
    /* everything that was shown is part of the state */
    int rc = next >= 0 ? based_step(session, next, &error) : 0;
    next = -1;
    memset(note, 0, NOTE);
    memcpy(note, "run\1", 4);
    memcpy(note + 4, &seeded, 4);
    memcpy(note + 8, &sampler.state, 8);
    memcpy(note + 16, decoder.held, 4);
    note[20] = decoder.n;
    note[21] = decoder.started;
    memcpy(note + 24, &n, 4);
    memcpy(note + NOTE, recent, 4 * (size_t)n);
    if (!rc) rc = based_save(session, note, NOTE + 4 * (size_t)n, out, bytes, &error);
    drop(note);
    return rc ? -1 : 0;
}

int EXPORT(load)(const void *saved, size_t size) {
    const void *found;
    size_t n;
    if (based_load(session, saved, size, &found, &n, &error)) return -1;
    const unsigned char *note = found;
    memset(&decoder, 0, sizeof decoder);
    decoder.started = 1;
    sampler.seen = 0;
    next = -1;
    hash = 0;
    if (n < NOTE || memcmp(note, "run\1", 4) != 0 || note[20] >= sizeof decoder.held) return 0;
    if (note[4]) memcpy(&sampler.state, note + 8, 8);
    memcpy(decoder.held, note + 16, 4);
    decoder.n = note[20];
    decoder.started = note[21];
    for (size_t at = NOTE; n - at >= 4; at += 4) {
        int32_t id;
        memcpy(&id, note + at, 4);
        if (id >= 0 && (uint32_t)id < sampler.vocab) based_sampler_accept(&sampler, id);
    }
    return 0;
}
