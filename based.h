/* based.h - run Based language models from plain C.
 *
 * A Based model (Arora et al. 2024, arXiv 2402.18668) is a language model whose memory of the past
 * has a fixed size: the last two inputs of each short convolution, the running sums of each Taylor
 * linear attention, and the last keys and values of each sliding window. This header is the only
 * document that one needs to use the library, easiest part first:
 *
 *     1. errors             what every call returns
 *     2. models             a checkpoint opened for use: immutable, shared by any number of threads
 *     3. sessions           one timeline over a model: constant size, one thread at a time
 *     4. tokenizers         text <-> token ids, exact
 *     5. sampling           logits -> the next token
 *     6. caller-owned memory, for machines without a heap
 *     7. the checkpoint format and what a model computes; it is specified nowhere else
 *     8. the format of a saved session, likewise
 *     9. Taylor attention by itself, for queries, keys and values that come from elsewhere
 *
 * In a few lines (README.md has the whole program, with the error checks that are left out here):
 *
 *     based_error e;
 *     based_model *m = based_open("models/stories260K.bin", 0, &e);
 *     based_session *s = m ? based_session_new(m, 32, &e) : NULL;
 *     ...
 *     based_feed(s, prompt, n, NULL, &e);
 *     for (;;) {
 *         int32_t id = based_sample(&sampler, based_logits(s));
 *         based_step(s, id, &e);
 *     }
 *
 * Link based.c; add tokenizer.c if you need part 4. A program that feeds ids needs based.c alone.
 *
 * Nothing here prints, exits, or keeps global state (with OpenMP, each thread remembers how many
 * threads it has started in which process; see based_set_threads). Sizes are size_t, counts without
 * a limit are uint64_t, token ids are int32_t. Numbers are IEEE float32, arrays are row-major. The
 * same checkpoint and tokens give the same bits on every machine. A pointer argument must not be
 * NULL unless its description says that it may be.
 */
#ifndef BASED_H
#define BASED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BASED_VERSION "0.8.0"           /* of 2026-11-29 */

/* ==== 1. Errors ==================================================================================
 * A function that can fail returns BASED_OK (0) or a negative status (or NULL where it returns a
 * pointer, or 0 where it returns a size) and writes one line into *e: what was found, where, what
 * was expected, what to do. e may be NULL. A failed call leaves every
 * object that it was given as it was.
 */
enum based_status {
    BASED_OK        = 0,
    BASED_EFORMAT   = -1,               /* not a valid checkpoint, tokenizer or saved session */
    BASED_ECHECKSUM = -2,               /* the bytes were damaged after they were written */
    BASED_EIO       = -3,               /* the operating system could not open or read a file */
    BASED_ENOMEM    = -4,               /* not enough memory, or the caller's block is too small */
    BASED_EINVAL    = -5,               /* an argument is out of its range */
    BASED_EMACHINE  = -6                /* built with inexact arithmetic (see based_model_init) */
};

typedef struct based_error {
    int  status;                        /* one of based_status */
    char text[252];                     /* one line without a newline, always zero-terminated */
} based_error;

/* ==== 2. Models ==================================================================================
 * A model is a checkpoint opened for use. It is immutable: any number of threads and sessions may
 * share one model without a lock.
 */
typedef struct based_model based_model;

enum based_open_flags {                 /* of based_open and based_model_init; same results */
    BASED_NO_CHECKSUM = 1,              /* skip the checksum, for which all weights are read */
    BASED_PLAIN  = 2,                   /* use the portable kernels only */
    BASED_AVX2   = 4,                   /* on x86-64, use nothing newer than AVX2 */
    BASED_AVX512 = 8                    /* on x86-64, use nothing newer than AVX-512 VNNI: no AMX */
};

/* Maps the checkpoint at `path` read-only and checks all of it: header, sizes, checksum. A pipe is
 * read into memory instead. Returns NULL on failure. Free it with based_close, after its sessions;
 * based_close(NULL) does nothing. The file is not copied and must not change while the model is
 * open. Reading a part that was cut off raises SIGBUS: replace a checkpoint by renaming a new file
 * over it, not by writing into it. The environment variable BASED_KERNELS (plain, avx2, avx512vnni)
 * acts like the flags above. The "amx" kernels load a tile configuration into each thread that
 * feeds and release it at the end of the call; a caller with a tile configuration of its own must
 * load it again. */
based_model *based_open(const char *path, int flags, based_error *e);
void         based_close(based_model *m);

/* The header of the checkpoint and of one layer (NULL if there is no such layer): the structs of
 * part 7. They live as long as the model. */
typedef struct based_config based_config;
typedef struct based_layer  based_layer;
const based_config *based_model_config(const based_model *m);
const based_layer  *based_model_layer(const based_model *m, uint32_t layer);

/* The tokenizer section of the checkpoint, and its size in *bytes, as based_tokenizer_init takes
 * them; NULL and 0 if the checkpoint has none. It lives as long as the model. */
const void *based_model_tokenizer(const based_model *m, size_t *bytes);

uint64_t    based_model_parameters(const based_model *m);   /* tied weights once, no tables */
uint64_t    based_model_weight_bytes(const based_model *m); /* bytes read to compute one token */
const char *based_model_kernels(const based_model *m);      /* instruction set: "avx2", ... */

/* Checks that every float of the weights is finite, by reading the whole checkpoint once.
 * BASED_EFORMAT if one is NaN or infinite; e says which tensor has the first of them, and how many
 * there are. Opening a model checks the scales of quantized weights, but no other weight. */
int based_check_weights(const based_model *m, based_error *e);

/* ==== 3. Sessions ================================================================================
 * A session is one timeline over a model: the state (all that the past determines) and scratch
 * memory, in one block of memory whose size is known beforehand and never grows. Sessions over one
 * model are independent of each other; each is used by one thread at a time.
 */
typedef struct based_session based_session;

/* A session in which nothing has been fed. `block` (1 to BASED_MAX_BLOCK) is the largest number of
 * tokens that are computed together: more of them make prompts faster and cost scratch memory; no
 * result depends on it. NULL on failure. Free it with based_session_free, which accepts NULL. The
 * model must live longer than the session. */
based_session *based_session_new(const based_model *m, uint32_t block, based_error *e);
void           based_session_free(based_session *s);

/* Feeds one token. based_logits then holds the score of every possible next token. BASED_EINVAL if
 * the id is not in the vocabulary, or if the model does not take tokens one after another. */
int based_step(based_session *s, int32_t token, based_error *e);

/* Feeds n tokens (n may be 0): bit for bit the same as n calls of based_step, but weights are read
 * once per block instead of once per token. logits: NULL, or room for (n, based_width(m)) floats,
 * one row per token. Fails as based_step does; then no token was fed. */
int based_feed(based_session *s, const int32_t *tokens, size_t n, float *logits, based_error *e);

/* The same for a model without an embedding (config.input > 0). x: (n, config.input).
 * out: NULL, or (n, based_width(m)). */
int based_feed_vectors(based_session *s, const float *x, size_t n, float *out, based_error *e);

/* Feeds n vectors that all see each other: resets s, then computes full (bidirectional) attention
 * over the n inputs in every taylor layer. Arguments as in based_feed_vectors; 1 <= n <= block.
 * Leave out inputs that should be masked. The inputs are then the past of the session: tokens fed
 * later see all of them. A model with flag BIDIRECTIONAL can be fed in this way only. BASED_EINVAL
 * for a model with a conv or window layer or a taylor layer with an exact window, for a model that
 * takes tokens, and if n is out of its range. */
int based_feed_bidirectional(based_session *s, const float *x, size_t n, float *out,
                             based_error *e);

/* Feeds the beginning of a text to a model with config.prefix > 0 (JRT): n tokens, all of which see
 * each other in its prefix layers; what is fed later sees them as a past. The session must be
 * empty, and 1 <= n <= block and config.prefix: make it with a block of at least the prompt's
 * beginning. logits: as in based_feed. BASED_EINVAL if this does not hold or a token is not in the
 * vocabulary. A text may also be fed without this call; then it has no prefix. */
int based_feed_prefix(based_session *s, const int32_t *tokens, size_t n, float *logits,
                      based_error *e);

/* Feeds tokens[i] to session s[i], for n different sessions over one model. They are computed
 * together, so that weights are read once for all: bit for bit the same as based_step on each.
 * The first session lends its scratch memory: n is at most its `block`, and the others may have
 * been made with a block of 1. On failure no session has changed. */
int based_step_many(based_session *const *s, const int32_t *tokens, size_t n, based_error *e);

/* Feeds tokens[0], which is part of the text, and as many of the n - 1 guesses behind it as can be
 * taken back: less if the session's block is smaller than n, up to
 * the token for which a taylor layer flushes a chunk, and up to the size of the smallest window.
 * Returns how many tokens were fed, 1 to n, or a negative status: as based_feed, and BASED_EINVAL
 * if n is 0. The logits and the state are those of as many calls of based_step.
 *
 * logits: room for (n, based_width(m)) floats, one row per token. old: room for (n,
 * based_draft_width(m)) floats, in which the session keeps what guesses overwrite, so that going
 * back copies no state. Both must stay as they are until based_keep. */
size_t  based_draft_width(const based_model *m);
int64_t based_feed_draft(based_session *s, const int32_t *tokens, size_t n, float *logits,
                         float *old, based_error *e);

/* Takes back all but the first n tokens of a draft: s is then, to the last bit, as if only these
 * had been fed. Not needed if all are kept. BASED_EINVAL if n is 0 or more than were fed, or if
 * this draft is not the last that s was fed, copied, loaded or kept. */
int based_keep(based_session *s, size_t n, based_error *e);

/* The output after the last token: based_width(m) floats, the logits of the vocabulary (without
 * padding), or the final hidden vector of a model without a head. The session owns it; the next
 * call that feeds overwrites it. NULL before the first token. */
const float *based_logits(const based_session *s);
size_t       based_width(const based_model *m);

uint64_t based_count(const based_session *s);       /* tokens fed since the beginning */
void     based_reset(based_session *s);             /* back to the beginning: nothing was fed */
size_t   based_state_bytes(const based_model *m);   /* size of the state in one session */

/* Makes dst continue where src is, logits included. BASED_EINVAL if they are over two models. */
int based_copy(based_session *dst, const based_session *src, based_error *e);

/* A 64-bit hash of everything that was fed; sessions that were fed the same tokens have the same.
 * It tells whether a saved session belongs to a text, or to the beginning of a longer one: after n
 * tokens it is based_history_of(0, tokens, n). It can be continued with more tokens:
 * based_history_of(h, more, n). Vectors are hashed by their bits. */
uint64_t based_history(const based_session *s);
uint64_t based_history_of(uint64_t h, const int32_t *tokens, size_t n);

/* Writes the session as bytes (part 8), whose number depends on the model and the note only. Equal
 * sessions give equal bytes, and any machine can load them, whatever its byte order and word size.
 * `note` is stored with it: note_bytes bytes for the caller's own use, for example what a sampler
 * needs to continue (based_sampler_recent and its `state`). out: `room` bytes, at least
 * based_saved_bytes, which is 0 if this machine cannot address so many. BASED_ENOMEM if room is too
 * small. */
size_t based_saved_bytes(const based_model *m, size_t note_bytes);
int    based_save(const based_session *s, const void *note, size_t note_bytes, void *out,
                  size_t room, based_error *e);

/* Makes s continue where the saved session was, logits included. The bytes may come from anywhere;
 * all of them are checked before s changes. BASED_EFORMAT: not a saved session, of another version,
 * or cut off; BASED_ECHECKSUM: damaged; BASED_EINVAL: saved with another checkpoint. *note and
 * *note_bytes (each pointer may be NULL) receive the place of the note in `saved` and its size. The
 * checksum covers the note, but its content is not checked. */
int based_load(based_session *s, const void *saved, size_t size, const void **note,
               size_t *note_bytes, based_error *e);

/* Sets the number of threads that later calls use, at most 1024; it is always 1 in a build without
 * OpenMP. No result depends on it. 0 chooses by the size of the model and the number of processors.
 * Threads wait for each other after every matrix product, so more threads make a small model
 * slower.
 *
 * On POSIX systems, if the threads cannot be made, because of a limit or for lack of memory, a call
 * computes with fewer, at least one, and based_threads tells how many are left. So it does in a
 * process that was forked by a thread that had used more than one: OpenMP's threads do not exist
 * there, and waiting for them would never end. The child computes with one thread and gives the
 * same bits. (LLVM's OpenMP reserves more address space than can be foreseen: where RLIMIT_AS is
 * tight, use one thread with it.) A session in which another thread was computing when the process
 * was forked must not be used in the child. */
void based_set_threads(based_session *s, int threads);
int  based_threads(const based_session *s);

/* A fingerprint of n floats, by their bits, to compare outputs between machines: start with h = 0
 * and pass the result on as h to continue. Equal floats give equal fingerprints. */
uint32_t based_hash(uint32_t h, const float *x, size_t n);

/* ==== 4. Tokenizers ==============================================================================
 * A tokenizer is a plain struct that points into the bytes of a checkpoint: nothing is allocated,
 * nothing is to be freed, and it is valid as long as these bytes are. All functions here are pure,
 * so any number of threads may share one tokenizer. They are in tokenizer.c.
 */
typedef struct based_tokenizer {
    uint32_t kind;                      /* BASED_BPE or BASED_SCORES */
    uint32_t flags;                     /* based_tokenizer_flags */
    uint32_t size;                      /* number of tokens; ids are 0 .. size-1 */
    uint32_t bos, eos, unknown;         /* ids, or BASED_NONE */
    uint32_t merges, specials;          /* entries of the tables below */
    uint32_t sorted_size, stops, shown;
    uint32_t cut;                       /* based_tokenizer_cut */
    const uint32_t *byte_id;            /* (256) id of each single byte, or BASED_NONE */
    const uint32_t *special_id;         /* (specials) ids of special tokens, longest name first */
    const uint32_t *stop_id;            /* (stops) ids that end a text, besides bos and eos */
    const uint32_t *shown_id;           /* (shown) special tokens that stand for their name */
    const uint32_t *start;              /* (size + 1) where each token's bytes begin in `bytes` */
    const uint32_t *sorted;             /* (sorted_size) ids that text becomes, by their bytes */
    const float    *score;              /* (size) BASED_SCORES: the highest merges first */
    const uint32_t *merge;              /* (merges, 4) BASED_BPE: left, right, rank, result */
    const unsigned char *bytes;         /* of all tokens, one after another */
    const char     *chat[4];            /* the chat template, by based_chat_text; all NULL: none */
} based_tokenizer;

/* What a conversation looks like to the model, in which names of special tokens stand for these
 * tokens. {} is where the message goes. A conversation is the text BEGIN, or SYSTEM with a system
 * message; then USER, REPLY, USER, REPLY ... What stands in REPLY before {} opens a reply, and what
 * stands behind it is to be fed before the next message. */
enum based_chat_text {
    BASED_CHAT_SYSTEM = 0,              /* "" if the model knows no system message */
    BASED_CHAT_USER   = 1,
    BASED_CHAT_REPLY  = 2,
    BASED_CHAT_BEGIN  = 3               /* without {}; may be "" */
};

/* Fills *t from the tokenizer section of the model. BASED_EINVAL if the checkpoint has none; else
 * it fails as based_tokenizer_init does. */
int based_tokenizer_open(based_tokenizer *t, const based_model *m, based_error *e);

/* Fills *t from the `size` bytes of a tokenizer section (part 7), in native byte order and 4-byte
 * aligned. Every entry of every table is checked. vocab: the number of ids that the model knows; a
 * larger tokenizer is refused. BASED_EFORMAT if the section is not valid, BASED_EINVAL if it is
 * NULL or not aligned. */
int based_tokenizer_init(based_tokenizer *t, const void *section, size_t size, uint32_t vocab,
                         based_error *e);

enum based_encode_flags {
    BASED_ADD_BOS        = 1,           /* put the bos token first, if there is one */
    BASED_PARSE_SPECIALS = 2            /* the name of a special token becomes that token */
};

/* Encodes n bytes of text, which may be any bytes, invalid UTF-8 included. ids: room for
 * based_encode_bound ids. scratch: based_encode_scratch bytes, 8-byte aligned. Returns the number
 * of ids or a negative status: BASED_EINVAL for an unknown flag, a NULL pointer, or more than
 * 2^31 - 16 bytes. The time is O(n log n) for any text. */
size_t  based_encode_bound(const based_tokenizer *t, size_t n);
size_t  based_encode_scratch(const based_tokenizer *t, size_t n);
int64_t based_encode(const based_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids,
                     void *scratch, based_error *e);

/* Whether the token ends a text: bos, eos, or one of the stop tokens. */
int based_is_stop(const based_tokenizer *t, int32_t id);

/* The raw bytes of one token, not terminated, and their number in *n: 0 for a special token, which
 * stands for no text, unless it is one that is shown. NULL if there is no such id. */
const char *based_token_bytes(const based_tokenizer *t, int32_t id, size_t *n);
/* The id of the special token with this name ("<|endoftext|>"), or -1. */
int32_t based_special(const based_tokenizer *t, const char *text);

/* A streaming decoder: tokens in, whole characters out. Bytes of a character that is split over
 * several tokens are held until it is whole; bytes that cannot become a character are replaced by
 * U+FFFD, one for each maximal subpart (Unicode 15.0, section 3.9). All zero is the first state. */
typedef struct based_decoder {
    unsigned char held[4];              /* the beginning of a character */
    uint8_t       n;                    /* how many bytes of it */
    uint8_t       started;              /* a token was decoded, so its leading space was dropped */
} based_decoder;

/* based_decode writes the text of one token to out and returns the number of bytes, 0 while a
 * character is incomplete. out: room for based_decode_bound bytes; this function looks at every
 * token, so call it once. At the end of the text, based_decode_flush writes U+FFFD for what is
 * still held; out needs room for 12 bytes. */
size_t based_decode(const based_tokenizer *t, based_decoder *d, int32_t id, char *out);
size_t based_decode_flush(based_decoder *d, char *out);
size_t based_decode_bound(const based_tokenizer *t);

/* ==== 5. Sampling ================================================================================
 * A sampler is a plain struct: fill in the first part, then call based_sampler_init with scratch
 * memory. The steps, in order: repetition penalty, temperature, softmax, top-k, min-p, top-p, draw.
 * The same seed gives the same tokens on every machine. One thread at a time.
 */
typedef struct based_sampler {
    /* set by the caller */
    float    temperature;               /* divides logits; 0: greedy, the lowest id among equals */
    float    top_p;                     /* keep the most probable tokens that sum to p; 1: all */
    uint32_t top_k;                     /* keep the k most probable tokens; 0: all */
    float    min_p;                     /* drop tokens below min_p * the most probable; 0: off */
    float    repeat_penalty;            /* divides positive, multiplies negative logits; 1: off */
    uint32_t repeat_last_n;             /* the penalty is for tokens among the last so many */
    uint64_t seed;
    uint32_t vocab;                     /* number of logits */
    /* set by based_sampler_init */
    uint64_t state;                     /* of the random generator */
    uint64_t seen;                      /* tokens accepted */
    void    *memory;
} based_sampler;

size_t based_sampler_bytes(const based_sampler *s);     /* bytes of scratch memory that it needs */
/* Checks the values (BASED_EINVAL), and keeps `memory`: based_sampler_bytes bytes (else
 * BASED_ENOMEM), 8-byte aligned, owned by the caller and used as long as the sampler is. */
int based_sampler_init(based_sampler *s, void *memory, size_t bytes, based_error *e);
/* Draws the next token. logits: (vocab), not changed. NaN is never chosen; if all are NaN, id 0. */
int32_t based_sample(based_sampler *s, const float *logits);
/* Tells the sampler about a token that is now part of the text (prompt or generated), for the
 * repetition penalty. based_sample does not do this by itself. */
void based_sampler_accept(based_sampler *s, int32_t token);
/* Writes the recent tokens, oldest first (room for repeat_last_n ids), and returns their number.
 * Another sampler continues like this one if it accepts them and `state` is copied. */
size_t based_sampler_recent(const based_sampler *s, int32_t *tokens);

/* log(softmax(logits)[token]) of n logits, in nats: the quantity whose mean is log perplexity. */
double based_log_probability(const float *logits, size_t n, int32_t token);

/* ==== 6. Caller-owned memory =====================================================================
 * based_open and based_session_new are built on these calls, which never allocate. A block of
 * memory must be aligned to 64 bytes and stay in place as long as the object is used. The caller
 * owns it; there is nothing to free. Do not call based_close or based_session_free on such objects.
 * A build with -DBASED_FREESTANDING has these calls only, and needs neither files nor malloc.
 */

/* The bytes that a model object needs for this checkpoint (a few hundred per layer; weights are
 * used in place), or 0 if the header is not valid. bytes: the whole checkpoint, 64-byte aligned.
 * Only the header and the layers are read. */
size_t based_model_bytes(const void *bytes, size_t size, based_error *e);

/* Makes a model over a checkpoint in memory, which must not change while the model lives. All that
 * part 7 specifies is checked, except that weights are finite (based_check_weights). BASED_EMACHINE
 * if this build does not compute float32 exactly as IEEE 754 specifies, for example because of
 * -ffast-math: its results would differ from those of other machines. */
int based_model_init(based_model **out, void *memory, size_t memory_bytes, const void *bytes,
                     size_t size, int flags, based_error *e);

/* The bytes of a session; 0 if block is out of its range or this machine cannot address so many. */
size_t based_session_bytes(const based_model *m, uint32_t block);
int    based_session_init(based_session **out, const based_model *m, void *memory,
                          size_t memory_bytes, uint32_t block, based_error *e);

/* Checkpoints are little-endian. On a big-endian machine this converts the bytes to native order,
 * in place and once, before based_model_init. It verifies the checksum first (unless flags has
 * BASED_NO_CHECKSUM), because afterwards it no longer can be. Elsewhere it does nothing. */
int based_to_native(void *bytes, size_t size, int flags, based_error *e);

/* ==== 7. The checkpoint ==========================================================================
 * Format version 2. One little-endian file. No offsets are stored: every size follows from the
 * header, and their sum must equal the size of the file. Every section begins at a multiple of 64
 * bytes; the gaps are zero.
 *
 *     0     struct based_config (256 bytes)
 *     256   struct based_layer (128 bytes) x layers
 *     ...   tokenizer section (tokenizer_bytes; absent if 0)
 *     ...   tensors, in the order below. [rows, cols] is row-major. A tensor in parentheses is
 *           there only under the condition to its right.
 *
 *          (embedding)                 [rows, dim]             input == 0
 *          (input.weight, input.bias)  [dim, input], [dim]     flag INPUT_PROJECTION
 *           for each layer, if mixer != NONE:
 *            (norm1.weight)            [dim]                   norm1 != NONE
 *            (norm1.bias)              [dim]                   norm1 == LAYER
 *             in.weight                [in_rows, dim]          rows of conv: value (channels), gate
 *                                                              (channels), with channels =
 *                                                              head_dim_v; rows of taylor and
 *                                                              window: q (heads * head_dim_k), then
 *                                                              k (kv_heads * head_dim_k), then
 *                                                              v (kv_heads * head_dim_v)
 *                                                              With flag PREFIX then also k_enc
 *                                                              and v_enc, as many rows as k and v
 *            (in.bias)                 [in_rows]               flag IN_BIAS
 *            (q_norm.weight)           [head_dim_k]            flag QK_NORM (taylor and window)
 *            (k_norm.weight)           [head_dim_k]            flag QK_NORM
 *            (conv.weight)             [conv_width, channels]  conv; the last row is the present
 *            (conv.bias)               [channels]              flag CONV_BIAS
 *            (rope_freq)               [rope_pairs] uint64     rope_pairs > 0; see rope below
 *            (key_mean)                [kv_heads, head_dim_k]  flag KEY_MEAN (taylor)
 *            (coefficients)            [heads, degree + 1]     taylor: of s^0, s^1, ...; 1/p! for
 *                                                              the Taylor series of exp; not with
 *                                                              kernel HEDGEHOG
 *            (q_map)                   [heads, degree,         kernel HEDGEHOG
 *                                       head_dim_k]
 *            (k_map)                   as q_map                kernel HEDGEHOG
 *            (mix)                     [heads]                 kernel HEDGEHOG
 *            (fade.weight)             [kv_heads, dim]         fading == GATED
 *            (fade.bias)               [kv_heads]              fading == GATED
 *            (fade.factor)             [kv_heads]              fading == FIXED
 *            (gate.weight)             [heads, dim]            flag VALUE_GATES or VALUE_FACTORS
 *            (out.weight)              [dim, inner]            unless flag NO_OUT;
 *                                                              inner = heads * head_dim_v
 *            (out.bias)                [dim]                   flag OUT_BIAS
 *           for each layer, after its mixer:
 *            (norm2.weight)            [dim]                   norm2 != NONE
 *            (norm2.bias)              [dim]                   norm2 == LAYER
 *            (up.weight)               [up_rows, dim]          mlp != NONE. Rows of SWIGLU: gate
 *                                                              (hidden_dim), value (hidden_dim);
 *                                                              rows of GELU and GELU_TANH:
 *                                                              hidden_dim
 *            (up.bias)                 [up_rows]               flag UP_BIAS
 *            (down.weight)             [dim, hidden_dim]       mlp != NONE
 *            (down.bias)               [dim]                   flag DOWN_BIAS
 *           after the last layer:
 *            (final_norm.weight)       [dim]                   final_norm != NONE
 *            (final_norm.bias)         [dim]                   final_norm == LAYER
 *            (head.weight)             [rows, dim]             rows > 0, unless flag TIED
 *            (head.bias)               [rows]                  flag HEAD_BIAS
 *
 * Vectors and tables are float32 (rope_freq: two uint32 each, low word first). A matrix has the
 * dtype that its header field names; q_map, k_map, fade.weight, gate.weight and input.weight are
 * float32.
 *
 * Q8 and Q4. Rows are padded with zeros to a multiple of 16, columns to a multiple of 32. The
 * columns of a row share a scale in groups of 64 (Q8; the last group may have 32) or 32 (Q4). Two
 * sections take the place of the matrix, each for tiles of 16 rows from top to bottom:
 *     scales  for each group, from left to right, 8 words: word i holds the bfloat16 scales of rows
 *             2i (low half) and 2i + 1 (high half)
 *     values  Q8: word 16 c + r holds columns 4c .. 4c+3 of row r, low byte first, each as
 *             weight / scale + 128
 *             Q4: word 16 c + r holds columns 8c .. 8c+3 of row r in the low halves of its bytes,
 *             low byte first, and columns 8c+4 .. 8c+7 in the high halves, each as
 *             weight / scale + 8
 *     A scale is zero, or its absolute value is at least 2^-82 and less than 2^20.
 * The vectors that such a matrix multiplies are quantized too, each group to round(x / s), halves
 * to even: s is the smallest power of two, of at least 2^-56, with which no value exceeds 127. Then
 * y = sum over the groups of (integer dot product of the group) * scale * s.
 *
 * What is computed, for token number t = 0, 1, ... of a session:
 *
 *     x = embedding[token]   or   input.weight * vector + input.bias   or   vector
 *     for each layer:   x = x + mixer(norm1(x))     if mixer != NONE
 *                       x = x + mlp(norm2(x))       if mlp != NONE
 *     output = head * final_norm(x) + head.bias     or   final_norm(x) if rows == 0
 *
 *     norm     NONE:  x
 *              RMS:   x / sqrt(mean(x^2) + eps) * weight
 *              LAYER: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, var = mean((x - mean)^2)
 *              L2:    x / max(|x|, eps) * sqrt(dim) * weight
 *     mixers   All projections include their bias, if there is one. A mixer ends with the out
 *              projection, out(y) = out.weight * y + out.bias; with flag NO_OUT, out(y) = y, and
 *              inner must equal dim. Query head h uses key/value head
 *              floor(h * kv_heads / heads).
 *     conv     u, g = in(x);  c[t] = sum_i conv.weight[i] u[t - conv_width + 1 + i] + conv.bias,
 *              where u is 0 before the first token;  out(silu(c[t]) * g)
 *     window   q, k, v = in(x);  y = softmax(scale q.k) v over the last `window` keys, the present
 *              one included;  out(y)
 *     taylor   q, k, v = in(x);  y = (sum_j w(q, k_j) v_j) / N(sum_j w(q, k_j)) over all keys up to
 *              the present one;  out(y)
 *              kernel DOT:      w(q, k) = sum_p coefficients[p] s^p, with s = scale q.k
 *              kernel DIAGONAL: w(q, k) = coefficients[0]
 *                                         + sum_i sum_{p >= 1} coefficients[p] (scale q_i k_i)^p
 *              kernel HEDGEHOG: see below
 *              N(z): ADD z + eps; CLAMP max(z, eps); RAW z, where 0/0 gives 0 and x/0 gives
 *              +-FLT_MAX; ONE 1, with eps = normalizer_eps
 *              KEY_MEAN: k - key_mean is used in place of k, after rope.
 *     flush    A taylor layer keeps the first `sinks` keys permanently, and the newest keys until
 *              they are flushed into running sums, `chunk` of them at once, oldest first. There is
 *              room for sinks + window + chunk keys. When no room is left for the key of a token,
 *              one chunk is flushed, then the key is appended, then the token's y is computed. So
 *              for token t, F = chunk * floor(max(t - sinks - window, 0) / chunk) keys are in the
 *              sums, namely keys sinks .. sinks + F - 1. Without window and decay this changes
 *              nothing but rounding.
 *              decay > 0: each flush first multiplies the sums (those of w and those of w v) by
 *              1 - decay, then adds the chunk. Keys that are not in the sums do not decay.
 *              window > 0 (kernel DOT, ADD, eps 0): without fading, the keys that are not in the
 *              sums have the weight w(q, k) = exp(scale q.k) instead, so the newest `window` keys
 *              or more, and the sinks. Let z be what the sums contribute to sum_j w(q, k_j). If z
 *              <= 0, which a polynomial with negative values can give, the sums are left out of
 *              this y, in numerator and denominator. To avoid overflow all weights are divided by
 *              exp(m), where m = max_j scale q.k_j over the keys that are not in the sums, or 0 if
 *              that is larger and z > 0: their weight is exp(scale q.k_j - m), and what the sums
 *              contribute is multiplied by exp(-m).
 *     hedgehog Taylor layers with kernel HEDGEHOG (LoLCATs; Zhang et al. 2024, arXiv 2410.10254).
 *              Query head h has w(q, k) = phi(q_map[h] q).phi(k_map[h] k) for keys in the sums,
 *              with phi(u) = softmax(u) followed by softmax(-u), each number at least 1e-12. Keys
 *              that are not in the sums have w(q, k) = sigmoid(mix[h]) exp(scale q.k - m), with m =
 *              max_j scale q.k_j over these keys, whatever the window, which may be 0. The sums are
 *              used as they are. Only with normalizer ADD and eps 0, without fading and PREFIX.
 *     fading   GATED: w(q, k_j) is multiplied by the product of g_i over the tokens i after token
 *              j, up to the present one, with g = sigmoid(fade.weight x + fade.bias), x =
 *              norm1(x'), of its key/value head (x': see gates). With normalizer ADD and eps 0 the
 *              keys in the sums are left out of this y if they contribute z <= 0 to sum_j w(q,
 *              k_j), which for weights that are never negative is only a matter of rounding.
 *              FIXED: g_i = fade.factor, and only the sum of w v is multiplied, not that of w.
 *              window (see flush) leaves the weights as they are. Not together with sinks, decay or
 *              kernel DIAGONAL.
 *     qk_norm  QK_NORM: q and k of each head are divided by sqrt(mean(q^2) + norm1_eps) and
 *              multiplied by q_norm.weight, k_norm.weight, before rope.
 *     rope     In taylor and window layers, q and k of each head are rotated by the position t:
 *              pair i, i < rope_pairs, is (a, b) = (x[i], x[i + head_dim_k/2]) and becomes
 *              (a cos - b sin, b cos + a sin) of the angle t * frequency[i].
 *              rope_freq[i] = 2^64 * frequency[i] / 2 pi, so that t * rope_freq[i] modulo 2^64 is
 *              the exact fraction of a turn.
 *     shift    SHIFT: the mixer reads x', whose first ceil(dim/2) channels are those of x and whose
 *              last floor(dim/2) channels are those of the previous token's x at this layer (0 for
 *              the first token): x = x + mixer(norm1(x')). The residual itself is not shifted.
 *     gates    VALUE_GATES: y of head h is multiplied by sigmoid(gate.weight[h] . x'), where x' is
 *              the mixer's input after SHIFT and before norm1. VALUE_FACTORS: by
 *              gate.weight[h] . norm1(x').
 *     prefix   PREFIX: the pairs (k_enc, v_enc) of the tokens that were fed with based_feed_prefix
 *              are in the sums of every token, before its own past. They come first, so F above
 *              counts them. (prefix linear attention; Arora et al. 2024, arXiv 2407.05483)
 *     mlp      SWIGLU:    down(silu(gate) * value), with gate, value = up(x)
 *              GELU:      down(gelu(up(x))), the form with erf
 *              GELU_TANH: the same with x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
 *     residual NO_RESIDUAL: x = mixer(norm1(x)) instead of x + mixer(norm1(x))
 *     bidirectional   With flag BIDIRECTIONAL the sums of a taylor layer run over all inputs of one
 *              call of based_feed_bidirectional, not only over those up to the present one.
 *
 * silu(x) = x sigmoid(x). The checksum is based_checksum over all bytes from offset 32 to the end.
 */
#define BASED_MAGIC "BASED\r\n\032"     /* 8 bytes; a transfer in text mode changes them */
#define BASED_FORMAT      2u
#define BASED_BYTE_ORDER  0x01020304u
#define BASED_NONE        0xffffffffu

/* No field may exceed its maximum, so that no size computed from the header overflows 64 bits. */
#define BASED_MAX_DIM        65536u
#define BASED_MAX_LAYERS     1024u
#define BASED_MAX_VOCAB      (1u << 22)
#define BASED_MAX_HIDDEN     (1u << 20) /* hidden_dim, channels, heads * head_dim_k or head_dim_v */
#define BASED_MAX_HEADS      4096u
#define BASED_MAX_CONV_WIDTH 64u
#define BASED_MAX_WINDOW     (1u << 20) /* also of sinks */
#define BASED_MAX_CHUNK      1024u
#define BASED_MAX_DEGREE     12u
#define BASED_MAX_FEATURES   (1u << 24)
#define BASED_MAX_BLOCK      1024u

enum based_dtype {
    BASED_F32 = 0,                      /* float32, row-major */
    BASED_Q8  = 1,                      /* 8 bits, a scale for 64 columns of a row, see above */
    BASED_Q4  = 2                       /* 4 bits, a scale for 32 columns of a row */
};

enum based_config_flags {
    BASED_TIED = 1,                     /* the head is the embedding */
    BASED_HEAD_BIAS = 2,
    BASED_INPUT_PROJECTION = 4,
    BASED_BIDIRECTIONAL = 8,            /* see based_feed_bidirectional */
    BASED_SAMPLING = 16                 /* the fields temperature .. repeat_last_n count */
};

enum based_norm_kind {
    BASED_NORM_NONE = 0, BASED_NORM_RMS = 1, BASED_NORM_LAYER = 2, BASED_NORM_L2 = 3
};

struct based_config {                   /* offset */
    unsigned char magic[8];             /*   0  BASED_MAGIC */
    uint32_t format;                    /*   8  BASED_FORMAT */
    uint32_t byte_order;                /*  12  BASED_BYTE_ORDER */
    uint32_t file_size[2];              /*  16  bytes in all, low word first */
    uint32_t checksum[2];               /*  24  low word first */
    uint32_t flags;                     /*  32  based_config_flags */
    uint32_t dim;                       /*  36  model width */
    uint32_t layers;                    /*  40 */
    uint32_t vocab;                     /*  44  logits per token, without padding */
    uint32_t rows;                      /*  48  rows of embedding and head, >= vocab; 0: no head */
    uint32_t input;                     /*  52  0: tokens; else the width of input vectors */
    uint32_t embedding_dtype;           /*  56  based_dtype */
    uint32_t head_dtype;                /*  60  equals embedding_dtype if TIED */
    uint32_t final_norm;                /*  64  based_norm_kind */
    float    final_norm_eps;            /*  68 */
    uint32_t tokenizer_bytes;           /*  72  0: no tokenizer */
    uint32_t context;                   /*  76  tokens per training sequence; a note, not a limit */
    char     name[64];                  /*  80  of the model, UTF-8, zero-terminated */
    uint32_t prefix;                    /* 144  tokens that based_feed_prefix takes; 0: none */
    float    temperature, top_p;        /* 148, 152  recommended settings of a based_sampler */
    uint32_t top_k;                     /* 156  (flag SAMPLING; else all of them are zero) */
    float    min_p, repeat_penalty;     /* 160, 164 */
    uint32_t repeat_last_n;             /* 168 */
    uint32_t reserved[21];              /* 172  zero */
};

enum based_mixer { BASED_MIXER_NONE = 0, BASED_CONV = 1, BASED_TAYLOR = 2, BASED_WINDOW = 3 };
enum based_mlp { BASED_MLP_NONE = 0, BASED_SWIGLU = 1, BASED_GELU = 2, BASED_GELU_TANH = 3 };
enum based_kernel { BASED_DOT = 0, BASED_DIAGONAL = 1, BASED_HEDGEHOG = 2 };
enum based_normalizer { BASED_ADD = 0, BASED_CLAMP = 1, BASED_RAW = 2, BASED_ONE = 3 };
enum based_fading { BASED_NO_FADING = 0, BASED_GATED = 1, BASED_FIXED = 2 };

enum based_layer_flags {
    BASED_IN_BIAS = 1, BASED_OUT_BIAS = 2, BASED_CONV_BIAS = 4, BASED_UP_BIAS = 8,
    BASED_DOWN_BIAS = 16, BASED_VALUE_GATES = 32, BASED_SHIFT = 64, BASED_NO_OUT = 128,
    BASED_NO_RESIDUAL = 256, BASED_KEY_MEAN = 512, BASED_QK_NORM = 1024, BASED_PREFIX = 2048,
    BASED_VALUE_FACTORS = 4096
};

struct based_layer {                    /* offset; fields that a mixer does not use are zero */
    uint32_t mixer;                     /*   0  based_mixer */
    uint32_t flags;                     /*   4  based_layer_flags */
    uint32_t norm1;                     /*   8  based_norm_kind, before the mixer */
    uint32_t norm2;                     /*  12  before the MLP */
    float    norm1_eps;                 /*  16 */
    float    norm2_eps;                 /*  20 */
    uint32_t heads;                     /*  24  query heads (conv: 1) */
    uint32_t kv_heads;                  /*  28  key/value heads, a divisor of heads (conv: 0) */
    uint32_t head_dim_k;                /*  32  of queries and keys, per head (conv: 0) */
    uint32_t head_dim_v;                /*  36  of values, per head (conv: the channels) */
    uint32_t conv_width;                /*  40  conv: width of its kernel, the present included */
    uint32_t window;                    /*  44  window: visible keys, the present one included;
                                                taylor: newest keys with exact weights, 0: none */
    uint32_t chunk;                     /*  48  taylor: keys that are flushed together */
    uint32_t degree;                    /*  52  taylor: highest power; HEDGEHOG: rows of a map */
    uint32_t kernel;                    /*  56  taylor: based_kernel */
    uint32_t normalizer;                /*  60  taylor: based_normalizer */
    float    normalizer_eps;            /*  64 */
    float    scale;                     /*  68  taylor and window: of q.k */
    uint32_t rope_pairs;                /*  72  pairs rotated, <= head_dim_k/2; 0: no rope */
    uint32_t mlp;                       /*  76  based_mlp */
    uint32_t hidden_dim;                /*  80  MLP width */
    uint32_t in_dtype, out_dtype;       /*  84, 88 */
    uint32_t up_dtype, down_dtype;      /*  92, 96 */
    uint32_t sinks;                     /* 100  taylor: first keys, which are never flushed */
    float    decay;                     /* 104  taylor: 0 <= decay < 1, see flush above */
    uint32_t fading;                    /* 108  taylor: based_fading */
    uint32_t reserved[4];               /* 112  zero */
};

/* The tokenizer section: uint32 words, then bytes.
 *
 *     word 0     number of words, this one included; the rest of the section is bytes
 *          1     kind            BASED_BPE: byte-level byte-pair encoding as in GPT-2;
 *                                BASED_SCORES: merges by score as in llama2.c and SentencePiece
 *          2     flags           based_tokenizer_flags
 *          3     size            number of tokens
 *          4..6  bos, eos, unknown (ids or BASED_NONE)
 *          7     merges          entries of merge (BASED_BPE) or of sorted (BASED_SCORES)
 *          8     specials        number of special tokens
 *          9     cut             BASED_BPE: based_tokenizer_cut; else 0
 *          10    stops + 65536 * shown
 *          11    chat            bytes of the chat template; 0: none
 *          then  byte_id[256], special_id[specials], stop_id[stops], shown_id[shown],
 *                start[size + 1],
 *                BASED_BPE: merge[merges][4], with WHOLE_PIECES sorted[all words that are left];
 *                BASED_SCORES: sorted[merges], score[size] (float32)
 *
 * The text of token id is bytes[start[id]] .. bytes[start[id + 1] - 1], raw bytes (in BASED_BPE
 * after undoing GPT-2's byte-to-character map; in BASED_SCORES "<0x41>" is the one byte 0x41). The
 * bytes of a special token are its name, which is matched in a prompt if that is asked for; the
 * token decodes to nothing, or to its name if it is in shown_id. After the bytes of all tokens
 * comes the chat template, and nothing else: the four texts of based_chat_text, each with a zero at
 * its end. byte_id[b] is a token of the one byte b; a byte without one becomes `unknown`, or
 * nothing if there is no unknown token. stop_id holds tokens that end a text, besides bos and eos.
 *
 * An entry of merge is (left, right, rank, result). Entries are in strictly ascending order of
 * (left, right), and the bytes of result are those of left followed by those of right.
 *
 * sorted holds all tokens that are neither special nor in byte_id, in strictly ascending order of
 * their bytes. Characters and merges are looked up in it; with WHOLE_PIECES, pieces are. So in
 * BASED_SCORES a token in byte_id appears only for a character without a token, and never merges.
 */
#define BASED_MAX_TOKEN   4096u         /* bytes of one token */
enum based_tokenizer_kind { BASED_BPE = 1, BASED_SCORES = 2 };
enum based_tokenizer_flags {
    BASED_TOK_PREFIX_SPACE = 1,         /* SCORES only: encoding puts one space before the text,
                                           decoding drops it */
    BASED_TOK_ADD_BOS      = 2,         /* the model expects bos before every text */
    BASED_TOK_WHOLE_PIECES = 4,         /* BPE only: a piece that is a token becomes that token,
                                           whatever the merges say */
    BASED_TOK_NFC          = 8          /* the original composes text first (Unicode's NFC). A note:
                                           nothing here does that */
};
enum based_tokenizer_cut {              /* how text is cut into pieces */
    BASED_CUT_GPT2 = 0, BASED_CUT_LLAMA3 = 1, BASED_CUT_QWEN2 = 2,
    BASED_CUT_DIGITS = 3                /* single digits, then GPT-2: SmolLM, StarCoder 2 */
};

/* ==== 8. A saved session =========================================================================
 * Format version 1. Little-endian on every machine.
 *
 *     0     BASED_STATE_MAGIC
 *     8     uint32 BASED_STATE_FORMAT, uint32 BASED_BYTE_ORDER
 *     16    uint64 bytes in all
 *     24    uint64 based_checksum over all bytes from 32 to the end
 *     32    uint64 checksum of the checkpoint, which identifies the model
 *     40    uint64 tokens fed
 *     48    uint64 history (see based_history_of): from h = 0, for each token, or for the 32 bits
 *           of each float of a vector: h = (h + word + 1) * 0x9e3779b97f4a7c15, h ^= h >> 32
 *     56    uint64 width of the logits; uint64 floats of state; uint64 bytes of the note
 *     80    float32 logits, float32 state as it lies in memory (based.c describes it for each
 *           mixer; if config.prefix > 0, the last number is that of the prefix tokens), the note
 */
#define BASED_STATE_MAGIC  "BSTATE\r\n"
#define BASED_STATE_FORMAT 1u

/* The checksum of n bytes. Sixteen lanes of 32 bits: lane l reads the little-endian words l,
 * l + 16, ... (a last partial word is padded with zeros): h = h * 0x9e3779b1 + word, from l + 1.
 * Then the lanes are combined in order: g = (g ^ h) * 0x9e3779b97f4a7c15, g ^= g >> 32, from g = n.
 * A change within one word is always detected. */
uint64_t based_checksum(const void *bytes, size_t n);

/* ==== 9. Taylor attention by itself ==============================================================
 * What the taylor mixer of part 7 computes for one key/value head and the query heads that share
 * it, as a data structure: a set of (key, value) pairs of any size in a fixed number of bytes. It
 * can be read with queries, pairs can be added and subtracted, and two sets can be merged.
 *
 *     causal attention           based_taylor_feed: each query reads all pairs up to its own
 *     full attention             based_taylor_add all pairs, then based_taylor_read all queries
 *     cross attention            based_taylor_add the context once, then read as often as needed
 *     masked tokens, padding     are not added
 *     many heads, many texts     one state for each; all may share the attention and, on one
 *                                thread, the scratch memory
 *
 * Nothing here allocates. Blocks of memory are aligned to 64 bytes, stay in place, and belong to
 * the caller.
 */
typedef struct based_taylor_config {
    uint32_t head_dim_k, head_dim_v;    /* 1 to BASED_MAX_HIDDEN */
    uint32_t group;                     /* query heads that read each state, 1 to BASED_MAX_HEADS */
    uint32_t degree;                    /* highest power, 1 to BASED_MAX_DEGREE */
    uint32_t kernel;                    /* based_kernel: DOT or DIAGONAL */
    uint32_t normalizer;                /* based_normalizer: ADD, CLAMP, RAW or ONE */
    uint32_t chunk;                     /* pairs that are flushed into the sums together, 1 to
                                           BASED_MAX_CHUNK; 16 is a good value */
    uint32_t window;                    /* at least so many newest pairs have the exact weight
                                           exp(scale q.k); 0: none; at most BASED_MAX_WINDOW */
    uint32_t sinks;                     /* first pairs, which are never flushed; 0: none */
    float    scale;                     /* of q.k, usually 1/sqrt(head_dim_k) */
    float    normalizer_eps;            /* of ADD and CLAMP */
    float    decay;                     /* each flush first multiplies the sums by 1 - decay */
    const float *coefficients;          /* (group, degree + 1) of s^0, s^1, ..., copied;
                                           NULL: 1/p!, the Taylor series of exp */
} based_taylor_config;

typedef struct based_taylor_sizes {
    uint64_t features;                  /* D = C(head_dim_k + degree, degree) monomials;
                                           DIAGONAL: 1 + head_dim_k * degree */
    uint64_t work;                      /* multiplications to add a pair and to read it with
                                           `group` queries */
    size_t   attention, state, scratch; /* bytes of the three blocks of memory below. A state has
                                           about D * (head_dim_v + 1) floats, and half as much
                                           again for the compensation of rounding errors */
} based_taylor_sizes;

/* Fills *out with what an attention needs, before anything is allocated. BASED_EINVAL: a field of
 * *config is out of its range. BASED_ENOMEM: more than BASED_MAX_FEATURES features, or more bytes
 * than this machine can address; e says how many bytes a state would need. */
int based_taylor_measure(based_taylor_sizes *out, const based_taylor_config *config,
                         based_error *e);

/* Makes an attention in sizes.attention bytes at `memory`: the config and its tables. It is
 * immutable; any number of threads may share it. Fails as based_taylor_measure does, if the memory
 * is too small (BASED_ENOMEM) or not aligned (BASED_EINVAL), and with BASED_EMACHINE as
 * based_model_init does. */
typedef struct based_taylor based_taylor;
int based_taylor_init(based_taylor **out, const based_taylor_config *config, void *memory,
                      size_t memory_bytes, based_error *e);

/* Makes an empty state in sizes.state bytes at `memory`. scratch: sizes.scratch bytes, which hold
 * nothing between two calls: all states that one thread uses may share them. One thread at a time.
 * The attention must live longer than the state. */
typedef struct based_taylor_state based_taylor_state;
int based_taylor_state_init(based_taylor_state **out, const based_taylor *t, void *memory,
                            size_t memory_bytes, void *scratch, size_t scratch_bytes,
                            based_error *e);
void     based_taylor_reset(based_taylor_state *s);         /* empty again */
uint64_t based_taylor_count(const based_taylor_state *s);   /* pairs added less pairs subtracted */

/* Adds n pairs: k (n, head_dim_k), v (n, head_dim_v). Bit for bit the same as one by one. */
void based_taylor_add(based_taylor_state *s, const float *k, const float *v, size_t n);

/* Reads with n times `group` queries: q (n, group, head_dim_k) -> y (n, group, head_dim_v), which
 * must not overlap. Changes nothing but scratch. In an empty state y is 0, unless the normalizer
 * divides by 0 (ADD with eps 0). */
void based_taylor_read(const based_taylor_state *s, const float *q, size_t n, float *y);

/* Adds a pair and reads with its `group` queries, n times: bit for bit the same as based_taylor_add
 * and based_taylor_read in turn. */
void based_taylor_feed(based_taylor_state *s, const float *q, const float *k, const float *v,
                       size_t n, float *y);

/* Subtracts one pair: the state is then as if it had not been added, up to rounding. Whether it was
 * added is not checked. BASED_EINVAL if the state is empty or has a window or a decay. */
int based_taylor_subtract(based_taylor_state *s, const float *k, const float *v, based_error *e);

/* copy: dst becomes equal to src. merge: all pairs of src are added to dst, up to rounding.
 * BASED_EINVAL if the two states belong to different attentions; for merge also if dst is src or
 * the attention has a decay. */
int based_taylor_copy(based_taylor_state *dst, const based_taylor_state *src, based_error *e);
int based_taylor_merge(based_taylor_state *dst, const based_taylor_state *src, based_error *e);

#ifdef __cplusplus
}
#endif
#endif
