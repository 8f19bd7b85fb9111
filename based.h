/* based.h - run Based language models from plain C.
 *
 * A Based model (Arora et al. 2024, arXiv 2402.18668) is a language model whose memory of the past has a fixed size:
 * two vectors per short convolution, running sums per Taylor linear attention, a small ring of keys and values per
 * sliding window. This header is the whole public interface, easiest part first:
 *
 *     1. errors             what every call returns
 *     2. models             a checkpoint opened for use: immutable, shared by any number of threads
 *     3. sessions           one timeline over a model: constant size, one thread at a time
 *     4. tokenizers         text <-> tokens, exact
 *     5. sampling           logits -> the next token
 *     6. caller-owned memory, for machines without a heap
 *     7. the checkpoint format, the only place where it is written down
 *     8. the format of a saved session, likewise
 *     9. Taylor attention by itself, for whoever has queries, keys and values but no checkpoint
 *
 * In twenty lines (see README.md for the same program with its error checks explained):
 *
 *     based_error e;
 *     based_model *m = based_open("models/stories260K.bin", 0, &e);
 *     based_session *s = m ? based_session_new(m, 32, &e) : NULL;
 *     ...
 *     based_feed(s, prompt, n, NULL, &e);
 *     for (;;) { id = based_sample(&sampler, based_logits(s)); based_step(s, id, &e); }
 *
 * Nothing here prints, exits, or keeps global state. Sizes are size_t, counts that can grow for ever are uint64_t,
 * token ids are int32_t. Numbers are IEEE float32; the same checkpoint and tokens give the same bits on every machine.
 */
#ifndef BASED_H
#define BASED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BASED_VERSION "0.3.0"

/* ---------------------------------------------------------------------------------------------------------------------
 * 1. Errors. A function that can fail returns BASED_OK (0) or a negative status (or NULL where it returns a pointer)
 *    and writes one line into *e: what was found, where, what was expected, what to do. e may be NULL. A failed call
 *    leaves every object it was given as it was.
 */
enum based_status {
    BASED_OK        = 0,
    BASED_EFORMAT   = -1,               /* the bytes are not a valid checkpoint                                  */
    BASED_ECHECKSUM = -2,               /* the bytes were damaged after they were written                        */
    BASED_EIO       = -3,               /* the operating system refused                                          */
    BASED_ENOMEM    = -4,               /* not enough memory, or the caller's block is too small                 */
    BASED_EINVAL    = -5,               /* an argument is out of its range                                       */
    BASED_EMACHINE  = -6                /* this build cannot keep the promises (see based_model_init)            */
};

typedef struct based_error {
    int  status;                        /* one of based_status                                                   */
    char text[252];                     /* one line, no newline at its end, always terminated                    */
} based_error;

/* ---------------------------------------------------------------------------------------------------------------------
 * 2. Models.
 */
typedef struct based_model based_model;

enum based_open_flags {                 /* of based_open and based_model_init                                    */
    BASED_NO_CHECKSUM = 1,              /* trust the weights' bytes                                              */
    BASED_PLAIN = 2,                    /* use only the portable kernels                                         */
    BASED_AVX2 = 4,                     /* on x86-64, nothing newer than AVX2                                    */
    BASED_AVX512 = 8                    /* nor than AVX-512 VNNI (AMX); no flag ever changes a bit               */
};

/* Maps the checkpoint at `path` read-only and checks it whole: header, sizes, checksum. Returns NULL on failure.
 * The file is not copied: while the model lives, it must stay as it is. What is cut off of it raises SIGBUS when it is read, so
 * replace a checkpoint by renaming a new one over it.
 * Threads: the model may be used by any number of threads at once. Free with based_close, after its sessions.
 * The "amx" kernels load a tile configuration into the threads that feed, and release it: whoever keeps one of their own there
 * must load it again. */
based_model *based_open(const char *path, int flags, based_error *e);
void         based_close(based_model *m);

/* What the checkpoint says of itself; valid as long as the model. The structs are described in part 7. */
typedef struct based_config based_config;
typedef struct based_layer  based_layer;
const based_config *based_model_config(const based_model *m);
const based_layer  *based_model_layer(const based_model *m, uint32_t layer);
uint64_t            based_model_parameters(const based_model *m);   /* weights, tied ones once; tables not counted */
uint64_t            based_model_weight_bytes(const based_model *m); /* bytes read to produce one token            */
const char         *based_model_kernels(const based_model *m);      /* the instruction set in use: "avx2", ...    */

/* Looks at all floats of the weights, which nothing else does: BASED_EFORMAT if one is a NaN or infinite, and e says where the
 * first of them is and how many there are. Reads the whole checkpoint once. (Opening has looked at the scales.) */
int                 based_check_weights(const based_model *m, based_error *e);

/* ---------------------------------------------------------------------------------------------------------------------
 * 3. Sessions. A session holds the state (all that the past determines) and scratch memory, in one block whose size is
 *    known beforehand and never grows. Sessions over one model are independent; each is used by one thread at a time.
 */
typedef struct based_session based_session;

/* A session at the beginning of time. `block` is the largest number of tokens computed together (1 to BASED_MAX_BLOCK):
 * it costs scratch memory and makes prompts faster; it never changes a result. Free with based_session_free. */
based_session *based_session_new(const based_model *m, uint32_t block, based_error *e);
void           based_session_free(based_session *s);

/* Feeds one token. Afterwards based_logits holds the scores of every possible next token. */
int based_step(based_session *s, int32_t token, based_error *e);

/* Feeds n tokens: bit for bit the same as n steps, but the weights are read once per block instead of once per token.
 * logits: NULL, or room for n rows of based_width(m) floats, one row per token fed. */
int based_feed(based_session *s, const int32_t *tokens, size_t n, float *logits, based_error *e);

/* The same for a model without an embedding (config.input > 0): x holds n rows of config.input floats. */
int based_feed_vectors(based_session *s, const float *x, size_t n, float *out, based_error *e);

/* Full attention: resets s, then feeds n vectors (n <= block) of which each sees all others, those after it too, in every
 * taylor layer; layers of other mixers, or with a window, are refused (BASED_EINVAL). Inputs that should be masked are left
 * out. The window becomes the past: what is fed to s afterwards looks back on it. This is how models with flag BIDIRECTIONAL
 * run; every other way to feed them is refused. */
int based_feed_window(based_session *s, const float *x, size_t n, float *out, based_error *e);

/* One token for each of n different sessions over one model, computed together so that the weights are read once for
 * all: bit for bit the same as based_step on each. 1 <= n <= the smallest block among the sessions. On error no
 * session has moved. */
int based_step_many(based_session *const *s, const int32_t *tokens, size_t n, based_error *e);

/* The output after the last token fed: based_width floats, the logits of the true vocabulary (or, in a model without a
 * head, the final hidden vector). Owned by the session, overwritten by the next feed. NULL before the first token. */
const float *based_logits(const based_session *s);
size_t       based_width(const based_model *m);

uint64_t based_count(const based_session *s);       /* tokens fed since the beginning                             */
void     based_reset(based_session *s);             /* back to the beginning of time                              */
size_t   based_state_bytes(const based_model *m);   /* bytes of one session that the past determines              */

/* Makes dst continue where src is; both must belong to one model. Logits are copied too. */
int based_copy(based_session *dst, const based_session *src, based_error *e);

/* What was fed, in 64 bits: sessions that were fed the same tokens have the same history. So a saved past can be told
 * from another one, and a longer text that begins with it can be recognised: that of a session fed n tokens is
 * based_history_of(0, tokens, n). It may be continued: based_history_of(h, more, n). Vectors count by their bits. */
uint64_t based_history(const based_session *s);
uint64_t based_history_of(uint64_t h, const int32_t *tokens, size_t n);

/* The past as bytes, whose number depends on the model alone: part 8 says what they are. The same past gives the same
 * bytes, and any machine can load them, whatever its byte order and word size. `note` travels along: note_bytes bytes
 * of the caller's own that the session does not know of, such as what sampling needs (based_sampler_recent and the state
 * of the generator). based_saved_bytes says how much room is needed (0: more than this machine can address). */
size_t based_saved_bytes(const based_model *m, size_t note_bytes);
int    based_save(const based_session *s, const void *note, size_t note_bytes, void *out, size_t room, based_error *e);

/* Makes s continue where the saved session was, logits included. The bytes may come from anywhere: all is checked before s
 * changes, and what is refused leaves it as it was: other bytes, another version, cut off (BASED_EFORMAT), damaged
 * (BASED_ECHECKSUM), saved with another checkpoint (BASED_EINVAL). *note and *note_bytes (each may be NULL) receive where
 * in `saved` the note lies; whose content nobody has checked but by the checksum. */
int based_load(based_session *s, const void *saved, size_t size, const void **note, size_t *note_bytes, based_error *e);

/* Threads to use for one call from now on (1 when built without OpenMP). Any number gives the same bits. 0 chooses by the
 * size of the model and the processors there are: threads that meet after every little step make a small model slower. */
void based_set_threads(based_session *s, int threads);
int  based_threads(const based_session *s);

/* A fingerprint of n floats, by their bits; start with h = 0 and chain. Equal logits, equal fingerprint. */
uint32_t based_hash(uint32_t h, const float *x, size_t n);

/* ---------------------------------------------------------------------------------------------------------------------
 * 4. Tokenizers. A plain struct over the bytes of a checkpoint: no allocation, nothing to free; valid as long as the
 *    model. All functions are pure, and any number of threads may share one tokenizer.
 */
typedef struct based_tokenizer {
    uint32_t kind;                      /* BASED_BPE or BASED_SCORES                                             */
    uint32_t flags;                     /* BASED_TOK_*                                                           */
    uint32_t size;                      /* tokens; ids are 0 .. size-1                                           */
    uint32_t bos, eos, unknown;         /* ids, or BASED_NONE                                                    */
    uint32_t merges, specials;          /* entries of the tables below                                           */
    const uint32_t *byte_id;            /* (256) id of each single byte, or BASED_NONE                           */
    const uint32_t *special_id;         /* (specials) ids of tokens that stand for no text, longest first        */
    const uint32_t *start;              /* (size + 1) where each token's bytes begin in `bytes`                  */
    const uint32_t *sorted;             /* (merges) BASED_SCORES: ids that text can become, ordered by bytes     */
    const float    *score;              /* (size) BASED_SCORES: higher merges first                              */
    const uint32_t *merge;              /* (merges, 4) BASED_BPE: left, right, rank, result; by (left, right)    */
    const unsigned char *bytes;
} based_tokenizer;

/* Fills *t from the model's tokenizer section. BASED_EINVAL if the checkpoint carries none. */
int based_tokenizer_open(based_tokenizer *t, const based_model *m, based_error *e);

/* The same from the bytes of a tokenizer section (see part 7) in native byte order, 4-byte aligned; every table is
 * checked. vocab: the number of ids that the model knows; a larger tokenizer is refused. */
int based_tokenizer_init(based_tokenizer *t, const void *section, size_t size, uint32_t vocab, based_error *e);

enum based_encode_flags {
    BASED_ADD_BOS        = 1,           /* put the bos token first, if there is one                              */
    BASED_PARSE_SPECIALS = 2            /* the literal text of a special token becomes that token                */
};

/* Encodes n bytes of text (any bytes; invalid UTF-8 too). ids: room for based_encode_bound ids. scratch: a block of
 * based_encode_scratch bytes, 8-byte aligned. Returns the number of ids (>= 0) or a negative status. Time is
 * O(n log n) for any text. */
size_t  based_encode_bound(const based_tokenizer *t, size_t n);
size_t  based_encode_scratch(const based_tokenizer *t, size_t n);
int64_t based_encode(const based_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids, void *scratch,
                     based_error *e);

/* The raw bytes of one token, *n of them, not terminated; NULL if the id is out of range. A special token has none. */
const char *based_token_bytes(const based_tokenizer *t, int32_t id, size_t *n);
/* The id of a special token by its text ("<|endoftext|>"), or -1. */
int32_t based_special(const based_tokenizer *t, const char *text);

/* A streaming decoder: token by token to whole characters. Bytes of one character that are split over tokens are held
 * until it is whole; bytes that can never become a character turn into U+FFFD, one for each maximal subpart (Unicode
 * 15.0 section 3.9). All zero bytes is the initial state. */
typedef struct based_decoder {
    unsigned char held[4];              /* the beginning of a character                                          */
    uint8_t       n;                    /* how many bytes of it                                                  */
    uint8_t       started;              /* a first token was decoded (its leading space may have been dropped)   */
} based_decoder;

/* Writes the text of one token to out (room for based_decode_bound bytes) and returns the number of bytes, 0 while a
 * character is incomplete. flush: writes what is held as U+FFFD at the end of the text; out has room for 12 bytes. */
size_t based_decode(const based_tokenizer *t, based_decoder *d, int32_t id, char *out);
size_t based_decode_flush(based_decoder *d, char *out);
size_t based_decode_bound(const based_tokenizer *t);

/* ---------------------------------------------------------------------------------------------------------------------
 * 5. Sampling. A plain struct: fill the first part, point it at scratch memory, call based_sampler_init.
 *    The order of the steps: repetition penalty, temperature, softmax, top-k, min-p, top-p, draw. The same seed gives
 *    the same tokens on every machine. One thread at a time.
 */
typedef struct based_sampler {
    /* set by the caller */
    float    temperature;               /* 0: greedy, the highest logit, the lowest id among equals              */
    float    top_p;                     /* keep the most probable tokens that together reach p; 1: all           */
    uint32_t top_k;                     /* keep the k most probable; 0: all                                      */
    float    min_p;                     /* drop tokens below min_p times the most probable; 0: none              */
    float    repeat_penalty;            /* divide positive (multiply negative) logits of recent tokens; 1: off   */
    uint32_t repeat_last_n;             /* how many recent tokens count                                          */
    uint64_t seed;
    uint32_t vocab;                     /* number of logits                                                      */
    /* set by based_sampler_init */
    uint64_t state;                     /* of the generator                                                      */
    uint64_t seen;                      /* tokens accepted                                                       */
    void    *memory;
} based_sampler;

size_t based_sampler_bytes(const based_sampler *s);                 /* bytes of scratch memory it needs           */
/* Checks the values and takes over `memory` (8-byte aligned, based_sampler_bytes bytes, owned by the caller). */
int    based_sampler_init(based_sampler *s, void *memory, size_t bytes, based_error *e);
/* Draws the next token. logits: vocab floats, left untouched. A NaN is never chosen; if nothing else is there, 0. */
int32_t based_sample(based_sampler *s, const float *logits);
/* Tells the sampler of a token that is now part of the text (prompt or generated), for the repetition penalty. */
void   based_sampler_accept(based_sampler *s, int32_t token);
/* Writes the recent tokens, oldest first (room for repeat_last_n), and returns how many there are: what another sampler has
 * to be told to continue like this one. Its generator continues if `state` is copied. */
size_t based_sampler_recent(const based_sampler *s, int32_t *tokens);

/* log softmax(logits)[token], in nats: what perplexity sums up. */
double based_log_probability(const float *logits, size_t n, int32_t token);

/* ---------------------------------------------------------------------------------------------------------------------
 * 6. Caller-owned memory. based_open and based_session_new are built on these four calls, which never allocate. A
 *    block must be 64-byte aligned and stay in place until the object is no longer used; there is nothing to free.
 */

/* The bytes a model object needs for this checkpoint (a few hundred per layer; the weights stay where they are), or 0
 * with *e set if these are not the bytes of a valid checkpoint. bytes: 64-byte aligned. Reads the header only. */
size_t based_model_bytes(const void *bytes, size_t size, based_error *e);

/* A model over a checkpoint in memory. The bytes must stay as they are while the model lives. Checks all that can be
 * checked (see part 7), also that this build does float32 arithmetic as IEEE 754 says, without contraction. */
int based_model_init(based_model **out, void *memory, size_t memory_bytes, const void *bytes, size_t size, int flags,
                     based_error *e);

size_t based_session_bytes(const based_model *m, uint32_t block);   /* 0 if block is out of range or too large    */
int    based_session_init(based_session **out, const based_model *m, void *memory, size_t memory_bytes,
                          uint32_t block, based_error *e);

/* Checkpoints are little-endian. On a big-endian machine this turns the bytes into native form, in place, once, before
 * based_model_init; it verifies the checksum first, since it cannot be verified afterwards. Does nothing elsewhere. */
int based_to_native(void *bytes, size_t size, int flags, based_error *e);

/* ---------------------------------------------------------------------------------------------------------------------
 * 7. The checkpoint format, version 2.
 *
 * One little-endian file. No offsets are stored: every size follows from the header, and the sum must equal the file
 * size exactly. Every section begins at a multiple of 64 bytes; the gaps are zero.
 *
 *     0     struct based_config (256 bytes)
 *     256   struct based_layer (128 bytes) x layers
 *     ...   tokenizer section (tokenizer_bytes; absent if 0)
 *     ...   tensors, in this order; [rows, cols] is row-major; a tensor in brackets is there only if the header says so
 *
 *           embedding                 [rows, dim]           if input == 0
 *          (input.weight, input.bias) [dim, input], [dim]   if flag INPUT_PROJECTION
 *           for each layer:
 *             norm1.weight            [dim]                 if norm1 != NONE; then (norm1.bias [dim]) if norm1 == LAYER
 *             in.weight, (in.bias)    [in_rows, dim]        conv: rows convolved (channels), gate (channels)
 *                                                           taylor and window: rows q (heads*key_width),
 *                                                           k (kv_heads*key_width), v (kv_heads*value_width)
 *            (taps), (taps.bias)      [conv_width, channels], [channels]   conv; the last tap multiplies the present
 *            (turns)                  [rotary] uint64       rotary > 0: 2^64 * frequency / 2 pi of each pair
 *            (key_mean)               [kv_heads, key_width] if flag KEY_MEAN (taylor)
 *            (coefficients)           [heads, degree + 1]   taylor: of s^0, s^1, ... (1/p! for the Taylor series)
 *            (gate.weight)            [heads, dim]          if flag VALUE_GATES
 *            (out.weight, (out.bias)) [dim, inner]          unless flag NO_OUT; inner = heads*value_width
 *             norm2.weight            [dim]                 if norm2 != NONE; then (norm2.bias [dim]) if norm2 == LAYER
 *             up.weight, (up.bias)    [up_rows, dim]        if mlp != NONE; SWIGLU: rows gate (hidden), value (hidden);
 *                                                           GELU: rows hidden
 *             down.weight,(down.bias) [dim, hidden]
 *           final_norm.weight         [dim]                 if final_norm != NONE; then (final_norm.bias) if LAYER
 *          (head.weight)              [rows, dim]           if rows > 0, unless flag TIED
 *          (head.bias)                [rows]                if flag HEAD_BIAS
 *
 * Vectors and tables are float32 (turns: two uint32, low first). A matrix has the dtype its header field names.
 *
 * Q8, Q4: rows are padded with zeros to a multiple of 16 and columns to a multiple of 32. The columns of a row share a scale
 * in groups of 64 (Q8; the last may be half a one) or 32 (Q4). Two sections take the matrix's place, each for tiles of 16
 * rows from top to bottom:
 *     scales  for each group, from left to right, 8 words: word i holds the bfloat16 scales of rows 2i (low half) and 2i + 1
 *     values  Q8: word 16 c + r holds columns 4c .. 4c+3 of row r, low byte first, each as weight / scale + 128
 *             Q4: word 16 c + r holds columns 8c .. 8c+3 of row r in the low halves of its bytes, low byte first, and columns
 *             8c+4 .. 8c+7 in the high halves, each as weight / scale + 8
 *     A scale is zero, or its size is at least 2^-82 and less than 2^20.
 * Vectors that meet such a matrix are quantised too, each group to round(x / s), halves to even: s is the smallest power of
 * two, of at least 2^-56, with which no number exceeds 127. y = sum over the groups of (products of the group) * scale * s.
 *
 * What is computed, for each token (sum = running sum over the past, the present included):
 *
 *     x = embedding[token]   or   input.weight * vector + input.bias   or   vector
 *     for each layer:  x = x + mixer(norm1(x));   x = x + mlp(norm2(x))
 *     output = head * final_norm(x)   or   final_norm(x) if rows == 0
 *
 *     norm     RMS:   x / sqrt(mean(x^2) + eps) * weight
 *              LAYER: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, var biased
 *              L2:    x / max(|x|, eps) * sqrt(dim) * weight
 *     conv     u, g = in(x);  c[t] = sum_i taps[i] u[t - conv_width + 1 + i] + taps.bias;  out(silu(c) * g)
 *     taylor   q, k, v = in(x);  w(q, k) = sum_p coefficient[p] (scale q.k)^p;  y = sum w(q, k) v / N(sum w(q, k))
 *              kernel DIAGONAL instead: w(q, k) = coefficient[0] + sum_i sum_{p >= 1} coefficient[p] (scale q_i k_i)^p
 *              N(z): ADD z + eps; CLAMP max(z, eps); RAW z, where 0/0 gives 0 and x/0 gives +-FLT_MAX; ONE 1
 *              window > 0 (kernel DOT, ADD, eps 0): the newest keys have w(q, k) = exp(scale q.k) instead. These are all but
 *              those that have joined the sums: the oldest `chunk` of them do each time there are window + chunk and one more
 *              comes. If the weights of the keys in the sums add up to 0 or less, these keys are left out
 *              KEY_MEAN: k - key_mean (after rotary) is used in k's place
 *              keep > 0: the first `keep` keys never join the sums (and so, with a window, weigh exp(scale q.k) for ever)
 *              forget > 0: each time a chunk joins, the sums (of weights and of weighted values) lose this part of themselves
 *              before. Chunks begin after the kept tokens; one joins when a key comes for which its keys leave no room
 *     window   q, k, v = in(x);  softmax(scale q.k) v over the last `window` keys, the present included
 *              query head h uses key/value head h * kv_heads / heads
 *     rotary   pair i is (i, i + key_width/2), i < rotary; both q and k are turned by the angle t * frequency[i]
 *     gates    VALUE_GATES: y of head h is multiplied by sigmoid(gate.weight[h] . x'), x' the mixer's input before norm1
 *     shift    SHIFT: the last floor(dim/2) channels of the mixer's input come from the previous token (zero at first),
 *              before gates and norm1
 *     mlp      SWIGLU: down(silu(gate) * value);  GELU: down(gelu(up)), the erf form
 *     NO_RESIDUAL: x = mixer(norm1(x)) instead of x + mixer(norm1(x)); and with NO_OUT, inner must equal dim
 *
 * The checksum is based_checksum over all bytes from offset 32 to the end of the file.
 */
#define BASED_MAGIC "BASED\r\n\032"     /* 8 bytes; a transfer in text mode breaks it visibly                     */
#define BASED_FORMAT      2u
#define BASED_BYTE_ORDER  0x01020304u
#define BASED_NONE        0xffffffffu

/* No field may exceed its maximum: whatever the file says, no size computed from it can overflow 64 bits. */
#define BASED_MAX_DIM     65536u
#define BASED_MAX_LAYERS  1024u
#define BASED_MAX_VOCAB   (1u << 22)
#define BASED_MAX_HIDDEN  (1u << 20)    /* MLP width, conv channels, heads * value_width, heads * key_width      */
#define BASED_MAX_HEADS   4096u
#define BASED_MAX_TAPS    64u
#define BASED_MAX_WINDOW  (1u << 20)
#define BASED_MAX_CHUNK   1024u
#define BASED_MAX_DEGREE  12u
#define BASED_MAX_FEATURES (1u << 24)
#define BASED_MAX_BLOCK   1024u

enum based_dtype {
    BASED_F32 = 0,                      /* float32, row-major                                                    */
    BASED_Q8 = 1,                       /* 8 bits in groups of 64 columns that share a scale, see above          */
    BASED_Q4 = 2                        /* 4 bits in groups of 32                                                */
};

enum based_config_flags {
    BASED_TIED = 1, BASED_HEAD_BIAS = 2, BASED_INPUT_PROJECTION = 4,
    BASED_BIDIRECTIONAL = 8             /* sums run over the whole window, the future included: based_feed_window */
};

enum based_norm_kind { BASED_NORM_NONE = 0, BASED_NORM_RMS = 1, BASED_NORM_LAYER = 2, BASED_NORM_L2 = 3 };

struct based_config {                   /* offset                                                                */
    unsigned char magic[8];             /*   0  BASED_MAGIC                                                      */
    uint32_t format;                    /*   8  BASED_FORMAT                                                     */
    uint32_t byte_order;                /*  12  BASED_BYTE_ORDER                                                 */
    uint32_t file_size[2];              /*  16  bytes in all, low word first                                     */
    uint32_t checksum[2];               /*  24  low word first                                                   */
    uint32_t flags;                     /*  32  based_config_flags                                               */
    uint32_t dim;                       /*  36  model width                                                      */
    uint32_t layers;                    /*  40                                                                   */
    uint32_t vocab;                     /*  44  true vocabulary: logits per token                                */
    uint32_t rows;                      /*  48  rows of embedding and head, >= vocab; the rest is padding        */
    uint32_t input;                     /*  52  0: tokens; else the width of input vectors                       */
    uint32_t embedding_dtype;           /*  56                                                                   */
    uint32_t head_dtype;                /*  60  equals embedding_dtype if TIED                                   */
    uint32_t final_norm;                /*  64  based_norm_kind                                                  */
    float    final_norm_eps;            /*  68                                                                   */
    uint32_t tokenizer_bytes;           /*  72  0: none                                                          */
    uint32_t context;                   /*  76  tokens the model was trained on at once; a note, not a limit     */
    char     name[64];                  /*  80  what it is, UTF-8, zero-terminated                               */
    uint32_t reserved[28];              /* 144  zero                                                             */
};

enum based_mixer { BASED_MIXER_NONE = 0, BASED_CONV = 1, BASED_TAYLOR = 2, BASED_WINDOW = 3 };
enum based_mlp { BASED_MLP_NONE = 0, BASED_SWIGLU = 1, BASED_GELU = 2 };
enum based_kernel { BASED_DOT = 0, BASED_DIAGONAL = 1 };
enum based_normaliser { BASED_ADD = 0, BASED_CLAMP = 1, BASED_RAW = 2, BASED_ONE = 3 };

enum based_layer_flags {
    BASED_IN_BIAS = 1, BASED_OUT_BIAS = 2, BASED_TAPS_BIAS = 4, BASED_UP_BIAS = 8, BASED_DOWN_BIAS = 16,
    BASED_VALUE_GATES = 32, BASED_SHIFT = 64, BASED_NO_OUT = 128, BASED_NO_RESIDUAL = 256, BASED_KEY_MEAN = 512
};

struct based_layer {                    /* offset; fields that a mixer does not use are zero                     */
    uint32_t mixer;                     /*   0  based_mixer                                                      */
    uint32_t flags;                     /*   4  based_layer_flags                                                */
    uint32_t norm1;                     /*   8  based_norm_kind, before the mixer                                */
    uint32_t norm2;                     /*  12  before the MLP                                                   */
    float    norm1_eps;                 /*  16                                                                   */
    float    norm2_eps;                 /*  20                                                                   */
    uint32_t heads;                     /*  24  query heads (conv: 1)                                            */
    uint32_t kv_heads;                  /*  28  key/value heads, a divisor of heads (conv: 0)                    */
    uint32_t key_width;                 /*  32  of one head; taylor: the feature width (conv: 0)                 */
    uint32_t value_width;               /*  36  of one head (conv: the channels)                                 */
    uint32_t taps;                      /*  40  conv: width of the kernel, the present included                  */
    uint32_t window;                    /*  44  window: visible keys, the present included; taylor: see below    */
    uint32_t chunk;                     /*  48  taylor: tokens kept as keys and values before they join the sums */
    uint32_t degree;                    /*  52  taylor: highest power                                            */
    uint32_t kernel;                    /*  56  taylor: based_kernel                                             */
    uint32_t normaliser;                /*  60  taylor: based_normaliser                                         */
    float    normaliser_eps;            /*  64                                                                   */
    float    scale;                     /*  68  taylor and window: of q.k                                        */
    uint32_t rotary;                    /*  72  pairs turned, <= key_width/2; 0: none                            */
    uint32_t mlp;                       /*  76  based_mlp                                                        */
    uint32_t hidden;                    /*  80  MLP width                                                        */
    uint32_t in_dtype, out_dtype;       /*  84, 88                                                               */
    uint32_t up_dtype, down_dtype;      /*  92, 96                                                               */
    uint32_t keep;                      /* 100  taylor: first tokens that never join the sums                    */
    float    forget;                    /* 104  taylor: what the sums lose each time a chunk joins, 0 to below 1 */
    uint32_t reserved[5];               /* 108  zero                                                             */
};

/* Tokenizer section: uint32 words, then bytes.
 *
 *     word 0     number of words, this one included; the rest of the section is bytes
 *          1     kind           BASED_BPE: byte-level byte-pair encoding as GPT-2; BASED_SCORES: score merges as llama2.c
 *          2     flags
 *          3     size           tokens
 *          4..6  bos, eos, unknown (ids or BASED_NONE)
 *          7     merges         entries of merge (BASED_BPE) or of sorted (BASED_SCORES)
 *          8     specials
 *          9..11 zero
 *          then  byte_id[256], special_id[specials], start[size + 1],
 *                BASED_SCORES: sorted[merges], score[size] (float32);  BASED_BPE: merge[merges][4]
 *
 * Token id's text is bytes[start[id]] .. bytes[start[id + 1]], raw bytes (for BASED_BPE after undoing GPT-2's
 * byte-to-character map; for BASED_SCORES "<0x41>" is the one byte 0x41). A special token's bytes are its name: it is
 * matched in a prompt when asked for, and decodes to nothing. The bytes fill the rest of the section exactly. byte_id[b]
 * is a token of the one byte b; a byte that has none becomes `unknown`, or nothing. Entries of merge are left, right,
 * rank, result, in strictly ascending order of (left, right), and result's bytes are left's and right's. sorted holds,
 * in strictly ascending order of their bytes, all tokens that are neither special nor in byte_id: what a character or a
 * merge is looked up in. (In BASED_SCORES a token in byte_id comes only from a character that has no token, and never
 * merges.)
 */
#define BASED_MAX_TOKEN   4096u         /* bytes of one token                                                    */
enum based_tokenizer_kind { BASED_BPE = 1, BASED_SCORES = 2 };
enum based_tokenizer_flags {
    BASED_TOK_PREFIX_SPACE = 1,         /* SCORES only: text is encoded with one space put before it, dropped
                                           again in decoding                                                     */
    BASED_TOK_ADD_BOS      = 2          /* the model expects bos before every text                                */
};

/* ---------------------------------------------------------------------------------------------------------------------
 * 8. The format of a saved session, version 1. Little-endian on every machine.
 *
 *     0     BASED_STATE_MAGIC
 *     8     uint32 version, uint32 BASED_BYTE_ORDER
 *     16    uint64 bytes in all
 *     24    uint64 based_checksum over all bytes from 32 to the end
 *     32    uint64 the checksum of the checkpoint, which tells models apart
 *     40    uint64 tokens fed
 *     48    uint64 history (see based_history_of): h = (h + word + 1) * 0x9e3779b97f4a7c15, h ^= h >> 32, from h = 0,
 *           for each token, or for the 32 bits of each number of a vector
 *     56    uint64 width of the logits; uint64 numbers of state; uint64 bytes of the note
 *     80    float32 logits, float32 state as it lies in memory (based.c says what it is, mixer by mixer), the note
 */
#define BASED_STATE_MAGIC  "BSTATE\r\n"
#define BASED_STATE_FORMAT 1u

/* The checksum: sixteen 32-bit lanes, lane l takes words l, l + 16, ... (little-endian; a last partial word is padded
 * with zeros): h = h * 0x9e3779b1 + word, from h = l + 1; then the lanes are folded in order into 64 bits,
 * g = (g ^ h) * 0x9e3779b97f4a7c15, g ^= g >> 32, from g = number of bytes. A change within one word always shows. */
uint64_t based_checksum(const void *bytes, size_t n);

/* ---------------------------------------------------------------------------------------------------------------------
 * 9. Taylor attention by itself. What the taylor mixer of part 7 computes for one key/value head and the query heads that
 *    share it, as a data structure: a set of (key, value) pairs of any size, in a fixed number of bytes, that can be read
 *    with queries, and to which pairs can be added, taken off again, and added from another set.
 *
 *        causal attention            based_taylor_feed: each query reads what came before it, itself included
 *        full attention              based_taylor_absorb all, then based_taylor_read all
 *        cross attention             based_taylor_absorb the context once, then read for ever
 *        masked tokens, padding      are not absorbed
 *        many heads, many texts      one state for each; all may share the attention and, on one thread, the scratch
 *
 *    Nothing here allocates. Blocks are aligned to 64 bytes, stay in place, and belong to the caller.
 */
typedef struct based_taylor_kind {
    uint32_t key_width, value_width;    /* 1 to BASED_MAX_HIDDEN                                                 */
    uint32_t group;                     /* query heads that read each state, 1 to BASED_MAX_HEADS                */
    uint32_t degree;                    /* highest power, 1 to BASED_MAX_DEGREE                                  */
    uint32_t kernel;                    /* based_kernel: DOT or DIAGONAL                                         */
    uint32_t normaliser;                /* based_normaliser: ADD, CLAMP, RAW or ONE                              */
    uint32_t chunk;                     /* tokens kept as they are until they join the sums together, 1 to
                                           BASED_MAX_CHUNK; 16 is good                                           */
    uint32_t window;                    /* the newest pairs, so many at least, weigh exp(scale q.k); 0: none     */
    uint32_t keep;                      /* the first pairs, so many, stay as they are and never join; 0: none    */
    float    scale;                     /* of q.k, usually 1/sqrt(key_width)                                     */
    float    normaliser_eps;            /* of ADD and CLAMP                                                      */
    float    forget;                    /* part of the sums that is lost each time a chunk joins; 0: nothing     */
    const float *coefficients;          /* (group, degree + 1) of s^0, s^1, ..., copied; NULL: 1/p!              */
} based_taylor_kind;

typedef struct based_taylor_sizes {
    uint64_t features;                  /* D = C(key_width + degree, degree); DIAGONAL: 1 + key_width * degree   */
    uint64_t work;                      /* multiplications to absorb a pair and to read it with `group` queries  */
    size_t   attention, state, scratch; /* bytes of the three blocks below; a state has about D (value_width + 1)
                                           floats, and half as much again for what rounding cuts off             */
} based_taylor_sizes;

/* Says what an attention needs, before anybody allocates. BASED_EINVAL: a field is out of range. BASED_ENOMEM: more than
 * BASED_MAX_FEATURES features, or more bytes than this machine can address; e says how many bytes a state would need. */
int based_taylor_measure(based_taylor_sizes *out, const based_taylor_kind *kind, based_error *e);

/* An attention: the kind and its tables, in sizes.attention bytes at `memory`. Immutable; any number of threads may share
 * it. */
typedef struct based_taylor based_taylor;
int based_taylor_init(based_taylor **out, const based_taylor_kind *kind, void *memory, size_t memory_bytes, based_error *e);

/* An empty state in sizes.state bytes at `memory`. scratch: sizes.scratch bytes, whose content is nobody's: all states that
 * one thread uses may share it. One thread at a time. */
typedef struct based_taylor_state based_taylor_state;
int based_taylor_begin(based_taylor_state **out, const based_taylor *t, void *memory, size_t memory_bytes, void *scratch,
                       size_t scratch_bytes, based_error *e);
void based_taylor_reset(based_taylor_state *s);                    /* empty again                                  */
uint64_t based_taylor_count(const based_taylor_state *s);          /* pairs in it, those taken off not counted     */

/* Adds n pairs: k (n, key_width), v (n, value_width). Bit for bit the same as one by one. */
void based_taylor_absorb(based_taylor_state *s, const float *k, const float *v, size_t n);

/* Reads n times `group` queries: q (n, group, key_width) -> y (n, group, value_width), which may not overlap. Changes nothing
 * but scratch. With nothing absorbed, y is 0 unless the normaliser divides by 0 (ADD with eps 0). */
void based_taylor_read(const based_taylor_state *s, const float *q, size_t n, float *y);

/* Absorbs a pair and reads, n times: bit for bit the same as absorb and read in turn. */
void based_taylor_feed(based_taylor_state *s, const float *q, const float *k, const float *v, size_t n, float *y);

/* Takes one pair off again, as if it had not been absorbed, up to rounding. BASED_EINVAL if the state is empty, or if there is
 * a window or it forgets; whether the pair was ever absorbed cannot be known. */
int based_taylor_subtract(based_taylor_state *s, const float *k, const float *v, based_error *e);

/* dst becomes what src is; dst receives all that src holds, besides its own, up to rounding. Both must have been begun with the
 * same attention, and merging a state with itself is refused (BASED_EINVAL). */
int based_taylor_copy(based_taylor_state *dst, const based_taylor_state *src, based_error *e);
int based_taylor_merge(based_taylor_state *dst, const based_taylor_state *src, based_error *e);

#ifdef __cplusplus
}
#endif
#endif
