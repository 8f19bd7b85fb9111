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
    sampler.vocab = based_model_config(model)->vocab;
    sampler.memory = room(based_sampler_bytes(&sampler));
    return sampler.memory ? 0 : out_of_memory();
}

/* How to choose from now on. */
int EXPORT(choose)(float temperature, float top_p, uint32_t seed) {
    sampler.temperature = temperature;
    sampler.top_p = top_p;
    sampler.repeat_penalty = 1.0f;
    sampler.seed = seed;
    size_t bytes = based_sampler_bytes(&sampler);
    return based_sampler_init(&sampler, sampler.memory, bytes, &error) ? -1 : 0;
}

void EXPORT(forget)(void) {
    based_reset(session);
    memset(&decoder, 0, sizeof decoder);
    next = -1;
    hash = 0;
}

/* Feeds n bytes of text. A token that was chosen but not fed yet stands before them. A first text
 * gets the token that every text begins with. Returns how many tokens were fed, or -1. */
int EXPORT(read)(const char *bytes, size_t n) {
    const based_tokenizer *t = &tokenizer;
    int first = based_count(session) == 0;
    int bos = first && (t->flags & BASED_TOK_ADD_BOS) && t->bos != BASED_NONE;
    int32_t start = (int32_t)(bos ? t->bos : t->eos);
    int32_t *ids = room((based_encode_bound(t, n) + 1) * sizeof *ids);
    void *scratch = room(based_encode_scratch(t, n));
    int64_t many = 0, from = 0;
    if (!ids || !scratch) return out_of_memory();
    if (!first && next >= 0) ids[from++] = next;
    if (first && n == 0 && (uint32_t)start != BASED_NONE) ids[from++] = start;
    if (n) {
        many = based_encode(t, bytes, n, bos ? BASED_ADD_BOS : 0, ids + from, scratch, &error);
    }
    if (many >= 0 && based_feed(session, ids, (size_t)(from + many), NULL, &error)) many = -1;
    for (int64_t i = 0; i < from + many; i++) based_decode(t, &decoder, ids[i], text);
    if (many >= 0) next = -1;
    drop(ids);
    return many < 0 ? -1 : (int)(from + many);
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
    if (based_is_stop(&tokenizer, next)) {
        memset(&decoder, 0, sizeof decoder);
        return -1;
    }
    n = based_decode(&tokenizer, &decoder, next, text);
    return (int)n;
}

/* ==== Saved states ===============================================================================
 * The note is the one that run.c writes, without a generator and recent tokens, so that each of the
 * two can continue what the other saved.
 */
enum { NOTE = 28 };

size_t EXPORT(save_bytes)(void) { return based_saved_bytes(model, NOTE); }

int EXPORT(save)(void *out, size_t room) {
    unsigned char note[NOTE] = "run\1";
    if (next >= 0 && based_step(session, next, &error)) return -1;
    next = -1;                          /* everything that was shown is part of the state         */
    memcpy(note + 16, decoder.held, 4);
    note[20] = decoder.n;
    note[21] = decoder.started;
    return based_save(session, note, NOTE, out, room, &error) ? -1 : 0;
}

int EXPORT(load)(const void *saved, size_t size) {
    const void *found;
    size_t n;
    if (based_load(session, saved, size, &found, &n, &error)) return -1;
    const unsigned char *note = found;
    memset(&decoder, 0, sizeof decoder);
    decoder.started = 1;
    next = -1;
    hash = 0;
    if (n < NOTE || memcmp(note, "run\1", 4) != 0 || note[20] >= sizeof decoder.held) return 0;
    memcpy(decoder.held, note + 16, 4);
    decoder.n = note[20];
    decoder.started = note[21];
    return 0;
}
