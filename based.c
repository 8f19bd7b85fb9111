/* based.c - the whole runtime of Based language models, in one file, to be read from top to bottom.
 * Part one (sections 1 to 6) is Based itself: data, layers, forward pass, sampling loop. Part two
 * (sections 7 to 20) makes it exact, safe and fast. The public interface is based.h.
 *
 * THE IDEA
 * For every token j that it has read, a transformer stores a key k_j and a value v_j in every head.
 * A new token has a query q. With s_j = q.k_j / sqrt(d), d the length of k_j, its attention is
 *
 *     y = sum_j exp(s_j) v_j / sum_j exp(s_j)                               softmax attention
 *
 * so memory and time per token grow with the text. The memory of a Based model (Arora et al. 2024,
 * arXiv 2402.18668) has a fixed size, because the Taylor polynomial of degree 2 replaces exp(s):
 *
 *     w(q, k) = 1 + s + s^2 / 2          never below 1/2, so the denominator below is positive
 *
 * A polynomial of a dot product is a dot product of longer vectors: w(q, k) = phi(q).phi(k). The
 * feature map phi(x) lists the monomials 1, x_i and x_i x_j (i <= j); constant factors go to phi(q)
 * alone. The sum over the past moves inside, and two running sums replace all keys and values:
 *
 *     y = sum_j w(q, k_j) v_j / sum_j w(q, k_j) = phi(q) S / phi(q).z       linear attention
 *     S = sum_j phi(k_j) v_j^T           a (D, d_v) matrix, if values have d_v numbers
 *     z = sum_j phi(k_j)                 a (D) vector
 *
 * There are D = C(d + 2, 2) features, 153 for d = 16. Degree 1 recalls much less; odd degrees can
 * make w negative; degree 4 has D = 4,845, thirty times the memory and the work.
 *
 * THE MAP
 * A model is a list of layers. Each has an MLP, which works on every token alone, and a mixer, the
 * only place where one token sees others. There are three kinds of mixer:
 *
 *     conv      gated short convolution: the order of neighboring words.  State: 2 input vectors.
 *     taylor    linear attention: all of the past, but blurred.           State per head: S and z.
 *     window    softmax attention over 64 past tokens and the present     State per head: a ring
 *               one: exact, but short.                                    of 65 keys and values.
 *
 * The published model of 360 million parameters has 27 layers of width 1024: taylor in layers 1, 6,
 * 11, 16 and 21, window in the layer after each of these, conv in the other 17. Attention has 16
 * heads; d_v is 64, and d is 16 in taylor layers, 64 in window layers. Its state in float32:
 *     conv      2 vectors of 2048 (twice the width) 16 KB per layer
 *     taylor    16 heads of 153 * (64 + 1)         636 KB per layer
 *     window    16 heads of 65 * (64 + 64)         532 KB per layer
 *     all 27 layers                                  6 MB, after ten tokens or ten million
 *
 * (8 MB with what keeps the sums exact, section 4.) The keys and values of a transformer of this
 * shape take 6 MB after 28 tokens. The price is recall: details of old text are found only as well
 * as S can separate them. More features or a longer window recall more and cost more memory.
 *
 * One token, from its id to the scores of the next one:
 *
 *     x = embedding[token]                             (dim)
 *     for each layer:  x = x + mixer(norm1(x))
 *                      x = x + mlp(norm2(x))           mlp(x) = down(silu(gate) * value),
 *     logits = head norm(x)                            (vocab)         where gate, value = up(x)
 */
#if !defined(BASED_FREESTANDING) && (defined(__unix__) || defined(__APPLE__))
#define BASED_POSIX 1
#define _POSIX_C_SOURCE 200809L /* clock_gettime, nanosleep, sched_yield, mmap */
#define _DEFAULT_SOURCE 1       /* syscall, on Linux */
#endif
#ifdef __clang__ /* products are rounded before they are added, section 9 */
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "based.h"

#include <float.h>
#include <math.h> /* sqrtf and fabsf, whose results IEEE 754 fixes; log, in double */
#include <string.h>

/* ==== 1. Data ====================================================================================
 * The shape of an array is written (rows, columns); it lies in memory row after row. What the file
 * says of the model and of each layer (based_config, based_layer) is described in based.h, part 7.
 */
struct matrix {                 /* y = W x + bias */
    const float *data;          /* (rows, cols) of float32, or NULL if W is quantized: then */
    const uint32_t *words;      /* the values, of 8 or 4 bits, in tiles of 16 rows, and */
    const uint32_t *scales;     /* their scales, see based.h part 7 */
    const float *bias;          /* (rows) or NULL */
    uint32_t rows, cols, dtype, parts; /* threads divide each part of the rows, matmul */
};

struct norm {
    const float *weight, *bias; /* (dim), bias NULL unless it is a layer norm */
    uint32_t kind; float eps;   /* based_norm_kind */
};

struct based_taylor {           /* what a Taylor attention knows before it sees tokens */
    based_taylor_config c;      /* degree, ...; coefficients a[p], (heads, degree + 1): 1/p! */
    const struct kernels *k;    /* the instruction set in use */
    const float *multinomial;   /* (D) how often a monomial is in (q.k)^p: x_i x_i 1, x_i x_j 2 */
    uint32_t features;          /* D = C(head_dim_k + degree, degree) */
    uint32_t fading;            /* based_fading, a refinement */
    const float *q_map, *k_map; /* (heads, degree, head_dim_k) of hedgehog; its mix (heads) is a */
};

struct layer {
    const based_layer *c;       /* from the file: mixer, heads, head_dim_k, head_dim_v, ... */
    struct norm norm1, norm2;   /* before the mixer, before the MLP */
    struct matrix in, out;      /* of the mixer: (in_rows, dim), (dim, inner_dim) */
    struct matrix up, down;     /* MLP: gate and value (2 hidden_dim, dim); (dim, hidden_dim) */
    struct matrix gates;        /* (heads, dim), a refinement, section 7, as are these: */
    const float *key_mean, *qk_norm[2], *fade, *fade_bias; /* key_mean (kv_heads, head_dim_k) */
    const float *conv_weight;   /* (conv_width, channels); the last row multiplies the present */
    const float *conv_bias;     /* (channels) or NULL */
    const uint32_t *rope_freq;  /* (rope_pairs, 2) angle per token, in units of 2^-64 turns */
    struct based_taylor taylor;
    size_t state;               /* where the layer's state begins in a session's, in floats */
    size_t shift;               /* BASED_SHIFT: where in it the previous input is, (dim) */
};

struct based_model {            /* immutable: any number of sessions and threads may share it */
    const based_config *c;
    const struct kernels *k;    /* the instruction set in use */
    const void *tokenizer;      /* the tokenizer's section of the file, or NULL */
    struct matrix embedding;    /* (rows, dim): one row per token */
    struct matrix input;        /* (dim, input) in its place, in models that take vectors */
    struct matrix head;         /* (rows, dim), or the embedding; rows from vocab on are padding */
    struct norm final_norm;
    uint32_t widest_in, widest_mid; /* the longest output of in/up, in 16s; input of out/down */
    uint32_t widest_q, most_groups; /* columns of the widest quantized matrix, and its groups */
    uint32_t shifted;           /* a layer has BASED_SHIFT: sessions have mixer_in */
    size_t scratch; uint32_t scratch_heads; /* floats of scratch per head; heads at the same time */
    size_t state;               /* floats of state of one session */
    uint64_t parameters, weight_bytes;
    void *self, *owned, *mapped; size_t mapped_size; /* what based_close gives back */
    struct layer layer[];
};

struct row {                    /* one token of the block being computed */
    based_session *s;           /* the session that it belongs to */
    uint64_t t;                 /* its position in the text, from 0 */
    float *out, *old;           /* where its logits go, (vocab); of a guess, section 12 */
};

struct based_session {          /* one text: its state, and memory to compute the next block in */
    const based_model *m;
    uint64_t count, history;    /* tokens fed; a hash of all of them */
    float *state;               /* (m->state) all that the past determines; zero at the beginning */
    float *logits;              /* (vocab) of the last token */
    uint32_t block; struct row *row; /* tokens computed together, at most; (block) one for each */
    float *x;                   /* (block, dim) the residual stream */
    float *x_norm;              /* (block, dim) x after a norm; then what a mixer or MLP gives */
    float *mixer_in;            /* (block, dim) the mixer's input before its norm, if shifted */
    float *proj;                /* (block, widest_in) what in/up give: q, k, v; gate, value */
    float *inner;               /* (block, widest_mid) what out/down take */
    float *scratch;             /* (scratch_heads, m->scratch) */
    float *xq, *xq_scale, *xq_offset;    /* vectors quantized to int8, section 10 */
    int bidirectional, in_prefix; /* tokens of the block see those after them, too, section 7 */
    void *owned;                /* what based_session_free gives back */
    int threads, oversubscribed; /* section 15; what barriers write has a cache line of its own: */
    unsigned char before[64]; int barrier_count, barrier_phase, spin_ns, contended, after[16];
};

struct thread {                 /* all threads run forward() together, section 15 */
    based_session *s;           /* whose memory is used */
    size_t id, count;           /* this thread, and how many there are */
};

/* The tools, defined in part two. Those in struct kernels have one version per instruction set, and
 * all versions give the same bits. */
struct kernels {
    const char *name; const struct matmul_kernels *mm; /* matmul, checksum: 10 */
    /* out (width) = sum_i w[i] rows[i], i ascending; the n rows lie `stride` floats apart */
    void (*weighted_sum)(float *out, const float *w, const float *rows, size_t n, size_t width,
                         size_t stride);
    /* the same for m outputs; that of output j has the weights w[i * step_i + j * step_j] */
    void (*weighted_sums)(float *const *out, size_t m, const float *w, size_t step_i, size_t step_j,
                          const float *rows, size_t n, size_t width, size_t stride);
    /* out[j] = dot product of column j of a (n, m) with b (n) */
    void (*dot_columns)(float *out, size_t m, const float *a, const float *b, size_t n);
    /* y[i] += a[i] * x[i]; y[i] = silu(gate[i]) * value[i], where silu(x) = x / (1 + exp(-x)) */
    void (*mul_add)(float *y, const float *a, const float *x, size_t n);
    void (*silu_mul)(float *y, const float *gate, const float *value, size_t n);
    /* *top = max of *top and scale * x[i]; x[i] = exp(scale * x[i] - *top); returns their sum */
    float (*softmax_exp)(float *x, size_t n, float scale, float *top);
    /* total[i] += x[i], n <= 32; comp keeps the rounding errors, which the next call adds */
    void (*compensated_add)(float *total, float *comp, const float *x, size_t n);
};

/* out[t] = W[first .. first + rows - 1] x[t] + bias for n vectors x (n, cols). All threads call it;
 * each computes my_row(rows / parts, th, 0) up to my_row(rows / parts, th, 1) of each part. */
static void matmul(float *out, size_t out_stride, const struct matrix *a, size_t first, size_t rows,
                   const float *x, size_t n, const struct thread *th);
static void embed(float *x, const based_model *m, int32_t token); /* x (dim) = its row of E */
/* barrier waits until all threads have come here. This thread's part of 0 .. n - 1 goes from
 * partition(n, th, 0) to partition(n, th, 1) - 1. run_threads lets all threads run forward() on the
 * n rows of s->row, then head() on the last n_logits of them. */
static void barrier(const struct thread *th);
static size_t partition(size_t n, const struct thread *th, size_t end);
static size_t my_row(size_t n, const struct thread *th, size_t end); /* the same in tiles of 16 */
/* x_norm (n, dim) = norm(x), whole for the thread that gets it; x += y (n, dim), what this thread
 * has computed of it, and a barrier */
static const float *normalize_rows(const float *x, const struct norm *norm, size_t n,
                                   const struct thread *th);
static void add_residual(const float *y, uint32_t flags, size_t n, const struct thread *th);
static float *scratch_of(based_session *s, size_t head); /* (m->scratch) for one head at a time */
static void run_threads(based_session *s, size_t n, size_t n_logits);
#define FOR_MY_PART(i, n) \
    for (size_t i = partition(n, th, 0), end_##i = partition(n, th, 1); i < end_##i; i++)
/* Session after session: each has the rows at .. end - 1, and its heads lie side by side. */
static size_t session_end(const based_session *s, size_t at, size_t n);
#define FOR_SESSIONS(at, end, n)                                                                   \
    for (size_t at = 0, end; at < (n) && (end = session_end(th->s, at, n)) > 0; at = end)
static float dot(const float *a, const float *b, size_t n), sum(const float *a, size_t n);
static float mul_add(float a, float b, float c), divide(float a, float b); /* a * b + c; a / b */
static float gelu(float x), gelu_tanh(float x);
static void sincos_turns(uint64_t angle, float *cosine, float *sine); /* angle: 2^64 is a turn */
static uint64_t two_words(const uint32_t w[2]);                       /* low word first */

/* ==== 2. Norm, rotary embedding, convolution =====================================================
 * n tokens are computed together, a block. Inside it, tokens of one session follow each other in
 * order, and each mixer treats them one by one, so many at once give the same bits as single steps.
 */

/* out = norm(x), both (dim) */
static void normalize(float *out, const float *x, const struct norm *n, size_t dim) {
    float mean = 0.0f, scale, squares;
    /* LAYER is the RMS norm of x - mean(x), plus bias */
    if (n->kind == BASED_NORM_LAYER) mean = sum(x, dim) / (float)dim;
    for (size_t i = 0; i < dim; i++) out[i] = n->kind == BASED_NORM_LAYER ? x[i] - mean : x[i];
    if (n->kind == BASED_NORM_NONE) return;
    squares = dot(out, out, dim);
    if (n->kind == BASED_NORM_L2) {
        /* x / max(|x|, eps) * sqrt(dim) * weight */
        float length = sqrtf(squares);
        scale = sqrtf((float)dim) / (length > n->eps ? length : n->eps);
    } else {
        /* RMS: x / sqrt(mean(x^2) + eps) * weight */
        scale = 1.0f / sqrtf(squares / (float)dim + n->eps);
    }
    for (size_t i = 0; i < dim; i++)
        out[i] = mul_add(out[i] * scale, n->weight[i], n->bias ? n->bias[i] : 0.0f);
}

/* Widths of a layer's arrays. `in` gives in_rows numbers per token: the queries of all heads, the
 * keys, the values. Each key/value head serves heads / kv_heads query heads. */
static uint32_t q_dim(const based_layer *c) { return c->heads * c->head_dim_k; }
static uint32_t k_dim(const based_layer *c) { return c->kv_heads * c->head_dim_k; }
static uint32_t v_dim(const based_layer *c) { return c->kv_heads * c->head_dim_v; }
static uint32_t inner_dim(const based_layer *c) { return c->heads * c->head_dim_v; }
static uint32_t in_rows(const based_layer *c) { /* conv: channels of u, channels of its gate g */
    return c->mixer == BASED_CONV ? 2 * c->head_dim_v : q_dim(c) + k_dim(c) + v_dim(c);
}

static float *state_of(const struct row *row, const struct layer *l) {
    return row->s->state + l->state;
}

/* Rotary position embedding (Su et al. 2021), of window layers: rotates the pairs of coordinates
 * (i, i + head_dim_k / 2), i < rope_pairs, of all queries and keys by the angle t * rope_freq[i]; t
 * is the token's position. Then q.k depends only on the distance of the two tokens. It also
 * subtracts key_mean, a refinement; taylor layers of Based have rope_pairs = 0 and no key_mean. */
static void apply_rope(const struct layer *l, const struct thread *th, size_t n) {
    const based_layer *c = l->c;
    based_session *s = th->s;
    FOR_MY_PART(r, n) {
        size_t d = c->head_dim_k;
        float *q = s->proj + r * in_rows(c), *k = q + q_dim(c);
        for (size_t h = 0; (c->flags & BASED_QK_NORM) && h < c->heads + c->kv_heads; h++)
            normalize(q + h * d, q + h * d, &(struct norm){ l->qk_norm[h >= c->heads], NULL,
                      BASED_NORM_RMS, c->norm1_eps }, d);
        for (size_t i = 0; i < c->rope_pairs; i++) {
            /* integers wrap around as angles do, so a position of any size is exact */
            float cosine, sine;
            sincos_turns(two_words(l->rope_freq + 2 * i) * s->row[r].t, &cosine, &sine);
            /* the keys (kv_heads, d) lie right behind the queries (heads, d) */
            for (size_t h = 0; h < c->heads + c->kv_heads; h++) {
                float *a = q + h * d + i, *b = a + d / 2, x = *a, y = *b;
                *a = x * cosine - y * sine;
                *b = y * cosine + x * sine;
            }
        }
        for (size_t i = 0; l->key_mean && i < k_dim(c); i++) k[i] -= l->key_mean[i];
    }
    if (c->rope_pairs || l->key_mean || (c->flags & BASED_QK_NORM)) barrier(th);
}

/* conv: proj has u and g, (channels) each. In each channel, with W = conv_width (3 in Based):
 * c[t] = bias + sum_i weight[i] * u[t - W + 1 + i], i < W, and inner = silu(c[t]) * g[t].
 * State: the last W - 1 vectors u. Threads divide the channels. */
static void conv_mixer(const struct layer *l, const struct thread *th, size_t n) {
    const struct kernels *k = th->s->m->k;
    size_t channels = l->c->head_dim_v, past = l->c->conv_width - 1;
    size_t first = my_row(channels, th, 0), many = my_row(channels, th, 1) - first;
    const float *weight = l->conv_weight + first;
    for (size_t r = 0; r < n; r++) {
        const struct row *row = &th->s->row[r];
        const float *u = th->s->proj + r * 2 * channels + first, *g = u + channels;
        float *ring = state_of(row, l) + first;         /* (past, channels) */
        float *y = th->s->inner + r * channels + first; /* (channels) */
        /* a ring buffer: u[t] is in row t mod past, so the newest replaces the oldest */
        size_t oldest = past ? (size_t)(row->t % past) : 0;
        /* y = bias + sum over the past inputs, oldest first, and the present one */
        if (l->conv_bias) memcpy(y, l->conv_bias + first, many * sizeof *y);
        else memset(y, 0, many * sizeof *y);
        for (size_t i = 0; i < past; i++)
            k->mul_add(y, weight + i * channels, ring + (oldest + i) % past * channels, many);
        k->mul_add(y, weight + past * channels, u, many);
        /* y = silu(y) * g */
        k->silu_mul(y, y, g, many);
        /* u replaces the oldest input */
        if (past) memcpy(ring + oldest * channels, u, many * sizeof *u);
    }
}

/* ==== 3. Sliding-window attention ================================================================
 * inner = softmax(scale q.K) V over the last `window` tokens, the present one included.
 * State per key/value head: K (d_k, window), one column per token, then V (window, d_v), one row.
 * Token t is in column and row t mod window, where token t - window was. A softmax does not depend
 * on the order of the keys, so this ring buffer is read as it lies. Threads divide the heads.
 */
static void window_mixer(const struct layer *l, const struct thread *th, size_t n) {
    const based_layer *c = l->c;
    const struct kernels *kernel = th->s->m->k;
    size_t dk = c->head_dim_k, dv = c->head_dim_v, window = c->window;
    size_t group = c->heads / c->kv_heads;
    FOR_SESSIONS(at, end, n) FOR_MY_PART(head, c->kv_heads) for (size_t r = at; r < end; r++) {
        const struct row *row = &th->s->row[r];
        const float *q = th->s->proj + r * in_rows(c); /* (heads, dk) */
        const float *k = q + q_dim(c) + head * dk;
        const float *v = q + q_dim(c) + k_dim(c) + head * dv;
        float *keys = state_of(row, l) + head * window * (dk + dv); /* (dk, window) */
        float *values = keys + window * dk;                         /* (window, dv) */
        float *scores = scratch_of(th->s, head);                    /* (window) */
        size_t newest = (size_t)(row->t % window);
        size_t seen = row->t < window ? (size_t)row->t + 1 : window;
        /* k and v replace those of the token that leaves the window */
        for (size_t i = 0; i < dk; i++) keys[i * window + newest] = k[i];
        memcpy(values + newest * dv, v, dv * sizeof *v);
        for (size_t h = head * group; h < (head + 1) * group; h++) {
            float *y = th->s->inner + r * inner_dim(c) + h * dv, top = -FLT_MAX, total;
            /* scores = q K, then exp(scale * scores - their maximum) */
            kernel->weighted_sum(scores, q + h * dk, keys, dk, seen, window);
            total = kernel->softmax_exp(scores, seen, c->scale, &top);
            /* y = scores V / sum of scores */
            kernel->weighted_sum(y, scores, values, seen, dv, dv);
            for (size_t e = 0; e < dv; e++) y[e] = divide(y[e], total);
        }
    }
}

/* ==== 4. Taylor linear attention =================================================================
 * State per key/value head, with D features, C = chunk, and room for N = kv_capacity tokens, = C in
 * the simplest case:
 *     s (D, d_v)      S = sum of phi(k) v^T over all tokens but the most recent ones
 *     z (D)           sum of phi(k) over the same tokens; z[0] is their number
 *     k (d_k, N)      keys of the most recent tokens, the oldest first, one column per token
 *     v (N, d_v)      their values
 *     comp, comp_z    what rounding has cut off s and z: two bfloat16 per word, (D, d_v / 2); (D)
 * A token that is added to a large S loses its low bits. So recent tokens are kept as keys and
 * values, their weights w(q, k) are computed directly, and C of them are flushed into the sums
 * together, with what earlier flushes lost to rounding (comp). Then the error does not grow with
 * the text (tests/endless.py: ten million tokens); without comp it is visible after some 100,000.
 */
struct head_state {             /* made when it is needed: pointers into the session's state */
    float *s, *z, *k, *v, *comp, *comp_z, *fade; /* fade: a refinement */
    uint64_t count;             /* tokens in this state; this and n_recent follow from row->t */
    size_t n_recent;            /* how many of them are in k and v, at most N */
    int flushed; float lost;    /* 0: the sums are still empty; what they lose, a refinement */
    size_t head;                /* the key/value head whose state it is */
};

struct queries {                /* of n tokens, one from each head that shares the state */
    const float *q;             /* (n, group, d_k); q_stride floats from one token to the next */
    float *y, *z;               /* (n, group, d_v) results, y_stride apart; (n, group) their z */
    size_t n, q_stride, y_stride, head; /* head: the first of the group */
};

/* Section 7 defines these, which hide the refinements: exact window, sinks, decay at each flush,
 * fading at each token, prefix, kernels, normalizers. In the simplest case: key_features is
 * feature_map of the keys at .. at + n - 1 of the chunk; add_to_z is z[f] += x, add_to_s S[f][e ..]
 * += x (n); query_features gives phi_q (D, n) of n queries, a[p] scale^p multinomial times the
 * monomials of degree p, so that phi_q.phi(k) = w(q, k), and y, where results go; local_scores is
 * scores[j] = w(q, k_j) = sum_p a[p] (scale q.k_j)^p and their sum; normalize_output y /= z + eps.
 * TOGETHER: columns of phi, at most; columns_of = min(C, TOGETHER). */
enum { TOGETHER = 32 };
static size_t kv_capacity(const based_taylor_config *c), columns_of(const based_taylor_config *c);
static struct head_state head_state_of(const struct row *row, const struct layer *l, size_t head);
static struct queries queries_of(const struct layer *l, based_session *s, size_t head, size_t r,
                                 size_t end, const struct head_state *state);
static void key_features(float *phi, struct head_state *s, const struct based_taylor *t, size_t at,
                         size_t n);
static void add_to_z(struct head_state *s, const struct based_taylor *t, size_t f, float x);
static void add_to_s(struct head_state *s, const struct based_taylor *t, size_t f, size_t e,
                     const float *x, size_t n);
static void drop_oldest(struct head_state *s, const struct based_taylor *t); /* out of K and V */
static void query_features(float *phi, float **y, const struct queries *u, size_t first, size_t n,
                           const struct based_taylor *t);
static float local_scores(float *scores, const struct head_state *s, const struct based_taylor *t,
                          const float *q, size_t head, float *y, float *z);
static void normalize_output(float *y, size_t n, float z, const based_taylor_config *c);
static void fade_state(struct head_state *s, const struct layer *l, based_session *p, size_t r);
static uint64_t monomials(uint64_t d, uint64_t p, uint64_t cap); /* of degree p: C(d + p - 1, p) */

/* phi (D, n) = the features of n vectors x (d, stride), one column per vector: 1, then for p = 1 to
 * degree the monomials x_i x_j ... of p factors, i <= j <= ..., in lexicographic order. */
static void feature_map(float *phi, const float *x, size_t n, size_t stride,
                        const based_taylor_config *c) {
    size_t d = c->head_dim_k;
    float *next = phi + n;
    for (size_t j = 0; j < n; j++) phi[j] = 1.0f;
    for (uint32_t p = 1; p <= c->degree; p++) {
        const float *end = next; /* of the monomials of degree p - 1 */
        for (size_t i = 0; i < d; i++) {
            /* The monomials of degree p that begin with x_i are x_i times those of degree p - 1
               that begin with x_i or a later one, which are the last `many` of that degree: one
               multiplication per feature, and no table of indices. */
            size_t many = (size_t)monomials(d - i, p - 1, BASED_MAX_FEATURES);
            const float *parent = end - many * n;
            if (c->kernel == BASED_DIAGONAL) /* a refinement: only the monomials x_i^p */
                many = 1, parent = p == 1 ? phi : end - (d - i) * n;
            for (size_t f = 0; f < many; f++, next += n)
                for (size_t j = 0; j < n; j++) next[j] = parent[f * n + j] * x[i * stride + j];
        }
    }
}

/* S += sum_j phi_j v_j^T and z += sum_j phi_j for n tokens: phi (D, n), v (n, d_v) */
static void update_state(struct head_state *s, const struct based_taylor *t, const float *phi,
                         const float *v, size_t n) {
    size_t dv = t->c.head_dim_v;
    /* z[f] += sum_j phi[f][j] */
    for (size_t f = 0; f < t->features; f++) add_to_z(s, t, f, sum(phi + f * n, n));
    /* S[f] += sum_j phi[f][j] v[j], 4 features and 32 columns at a time */
    for (size_t f = 0; f < t->features; f += 4) for (size_t e = 0; e < dv; e += 32) {
        size_t width = dv - e < 32 ? dv - e : 32, many = t->features - f < 4 ? t->features - f : 4;
        float x[4][32], *const rows[4] = { x[0], x[1], x[2], x[3] };
        t->k->weighted_sums(rows, many, phi + f * n, 1, n, v + e, n, width, dv);
        for (size_t i = 0; i < many; i++) add_to_s(s, t, f + i, e, x[i], width);
    }
}

/* If there is no room for a token, flushes the oldest chunk into the sums (but not the sinks, a
 * refinement); drop_oldest then sets `flushed`. phi: scratch memory, (D, columns_of). */
static void make_room(struct head_state *s, const struct based_taylor *t, float *phi) {
    size_t chunk = t->c.chunk, most = columns_of(&t->c);
    if (s->n_recent < kv_capacity(&t->c)) return;
    for (size_t at = 0, n; at < chunk; at += n) {
        n = chunk - at < most ? chunk - at : most;
        key_features(phi, s, t, at, n);
        update_state(s, t, phi, s->v + (t->c.sinks + at) * t->c.head_dim_v, n);
    }
    drop_oldest(s, t);
}

/* One more token: k (d_k) becomes a column of s->k, v (d_v) a row of s->v. */
static void append_kv(struct head_state *s, const struct based_taylor *t, const float *k,
                      const float *v, float *phi) {
    size_t dv = t->c.head_dim_v;
    make_room(s, t, phi);
    for (size_t i = 0; i < t->c.head_dim_k; i++) s->k[i * kv_capacity(&t->c) + s->n_recent] = k[i];
    memcpy(s->v + s->n_recent * dv, v, dv * sizeof *v);
    s->n_recent++, s->count++;
}

/* The flushed tokens: y = phi(q) S and z = phi(q).z. A few queries read S together. phi: scratch
 * memory, (D, columns_of). */
static void read_sums(const struct queries *u, const struct head_state *s,
                      const struct based_taylor *t, float *phi) {
    size_t total = u->n * t->c.group, most = columns_of(&t->c), dv = t->c.head_dim_v;
    float *y[TOGETHER];
    for (size_t at = 0, n; at < total; at += n) {
        n = total - at < most ? total - at : most;
        query_features(phi, y, u, at, n, t);
        t->k->weighted_sums(y, n, phi, n, 1, s->s, t->features, dv, dv);
        t->k->dot_columns(u->z + at, n, phi, s->z, t->features);
    }
}

/* The recent tokens, for query h of token i: y += sum_j w(q, k_j) v_j, z += sum_j w(q, k_j). Then
 * y /= z + eps is the result of the attention. */
static void read_recent(const struct queries *u, size_t i, size_t h, const struct head_state *s,
                        const struct based_taylor *t, float *scratch) {
    size_t dv = t->c.head_dim_v;
    const float *q = u->q + i * u->q_stride + h * t->c.head_dim_k;
    float *y = u->y + i * u->y_stride + h * dv, z = s->flushed ? u->z[i * t->c.group + h] : 0.0f;
    float *scores = scratch, part[32], total; /* scores (N) */
    if (!s->flushed) memset(y, 0, dv * sizeof *y);
    total = local_scores(scores, s, t, q, u->head + h, y, &z);
    for (size_t e = 0; e < dv; e += 32) {
        size_t width = dv - e < 32 ? dv - e : 32;
        t->k->weighted_sum(part, scores, s->v + e, s->n_recent, width, dv);
        for (size_t l = 0; l < width; l++) y[e + l] += part[l];
    }
    normalize_output(y, dv, z + total, &t->c);
}

/* taylor: make room, read the sums, store the token, read the recent tokens, itself included. Until
 * the next flush the sums stay as they are, so the u.n tokens of one session that come before it
 * read them together. Threads divide the heads. */
static void taylor_mixer(const struct layer *l, const struct thread *th, size_t n) {
    const based_layer *c = l->c;
    const struct based_taylor *t = &l->taylor;
    based_session *s = th->s;
    size_t group = t->c.group, dk = c->head_dim_k, dv = c->head_dim_v;
    FOR_SESSIONS(at, end, n) FOR_MY_PART(head, c->kv_heads) for (size_t r = at; r < end;) {
        float *scratch = scratch_of(s, head), *row = s->proj + r * in_rows(c);
        struct head_state state = head_state_of(&s->row[r], l, head);
        make_room(&state, t, scratch);
        struct queries u = queries_of(l, s, head, r, end, &state);
        if (state.flushed) read_sums(&u, &state, t, scratch);
        for (size_t i = 0; i < u.n; i++, r++, row += in_rows(c)) {
            const float *k = row + q_dim(c) + head * dk, *v = row + q_dim(c) + k_dim(c) + head * dv;
            append_kv(&state, t, k, v, scratch);
            if (t->fading) fade_state(&state, l, s, r);
            for (size_t h = 0; h < group; h++) read_recent(&u, i, h, &state, t, scratch);
        }
    }
}

/* ==== 5. The forward pass ========================================================================
 * n tokens, from embeddings in s->x (n, dim) to their last hidden vectors in the same place.
 * Every thread runs it on its part of the work, and waits for the others (in a barrier) before it
 * reads what they have computed. In a plain Based model all flags are 0; the functions
 * declared here are refinements, section 7. */
typedef void layer_step(const struct layer *l, const struct thread *th, size_t n);
static layer_step shift_tokens, gate_heads, bidirectional_mixer, keep_old;
static void store_prefix(const struct layer *l, const float *x, const struct thread *th, size_t n);

static void forward(const struct thread *th, size_t n) {
    based_session *s = th->s;
    const based_model *m = s->m;
    size_t dim = m->c->dim;
    for (uint32_t i = 0; i < m->c->layers; i++) {
        const struct layer *l = &m->layer[i];
        const based_layer *c = l->c;
        if (c->mixer != BASED_MIXER_NONE) {
            const float *x = s->x, *y = c->flags & BASED_NO_OUT ? s->inner : s->x_norm;
            /* proj (n, in_rows) = in(norm1(x)) */
            if (c->flags & BASED_SHIFT) shift_tokens(l, th, n), x = s->mixer_in;
            x = normalize_rows(x, &l->norm1, n, th);
            if (s->in_prefix && (c->flags & BASED_PREFIX)) store_prefix(l, x, th, n);
            matmul(s->proj, in_rows(c), &l->in, 0, in_rows(c), x, n, th);
            if (l->in.parts == 1) barrier(th); /* else a thread reads only what it computed */
            /* inner (n, inner_dim) = mixer(proj): the only place where one token sees another */
            if (c->mixer != BASED_CONV) apply_rope(l, th, n);
            if (s->row->old) keep_old(l, th, n);
            if (c->mixer == BASED_CONV) conv_mixer(l, th, n);
            else if (c->mixer == BASED_WINDOW) window_mixer(l, th, n);
            else if (s->bidirectional) bidirectional_mixer(l, th, n);
            else taylor_mixer(l, th, n);
            barrier(th);
            if (c->flags & (BASED_VALUE_GATES | BASED_VALUE_FACTORS)) gate_heads(l, th, n);
            /* x += out(inner), the residual connection */
            if (y == s->x_norm) matmul(s->x_norm, dim, &l->out, 0, dim, s->inner, n, th);
            add_residual(y, c->flags, n, th);
        }
        if (c->mlp != BASED_MLP_NONE) {
            const size_t hidden = c->hidden_dim, rows = l->up.rows;
            const size_t first = my_row(hidden, th, 0), many = my_row(hidden, th, 1) - first;
            /* proj (n, rows) = up(norm2(x)) */
            matmul(s->proj, rows, &l->up, 0, rows, normalize_rows(s->x, &l->norm2, n, th), n, th);
            if (l->up.parts == 1) barrier(th); /* the same */
            /* inner (n, hidden) = silu(gate) * value, or gelu(gate) */
            for (size_t r = 0; r < n; r++) {
                const float *gate = s->proj + r * rows + first;
                float *y = s->inner + r * hidden + first;
                if (c->mlp == BASED_SWIGLU) m->k->silu_mul(y, gate, gate + hidden, many);
                else for (size_t e = 0; e < many; e++)
                    y[e] = c->mlp == BASED_GELU ? gelu(gate[e]) : gelu_tanh(gate[e]);
            }
            barrier(th);
            /* x += down(inner) */
            matmul(s->x_norm, dim, &l->down, 0, dim, s->inner, n, th);
            add_residual(s->x_norm, 0, n, th);
        }
    }
}

/* logits = head final_norm(x), for rows first .. first + n - 1, each to its place row.out: of one
 * token at once, of more in tiles, because whole rows of logits for every token of a block would be
 * most of a session's memory. */
static void head(const struct thread *th, size_t first, size_t n) {
    based_session *s = th->s;
    const based_model *m = s->m;
    const struct row *row = s->row + first;
    size_t dim = m->c->dim, width = based_width(m), tile = n == 1 ? width : m->widest_in;
    const float *x = normalize_rows(s->x + first * dim, &m->final_norm, n, th);
    /* without a head, the hidden vectors are the output */
    for (size_t r = 0; m->c->rows == 0 && th->id == 0 && r < n; r++)
        memcpy(row[r].out, x + r * dim, dim * sizeof *x);
    for (size_t at = 0; m->c->rows && at < width; at += tile) {
        size_t many = width - at < tile ? width - at : tile;
        /* proj (n, tile) = rows at .. at + many - 1 of the head, times x */
        matmul(n == 1 ? row->out : s->proj, tile, &m->head, at, many, x, n, th);
        if (n == 1) return;
        barrier(th);
        FOR_MY_PART(r, n) memcpy(row[r].out + at, s->proj + r * tile, many * sizeof *x);
        barrier(th);
    }
}

static int check_tokens(const based_model *m, const int32_t *tokens, size_t n, based_error *e);
static void project_input(based_session *s, const float *x, size_t n);

/* Feeds n tokens (or n vectors x), block after block. Their outputs go to the rows of `out`; if it
 * is NULL, only the last one is computed, for s->logits. */
static void feed(based_session *s, const int32_t *tokens, const float *x, size_t n, float *out) {
    size_t dim = s->m->c->dim, width = based_width(s->m);
    for (size_t at = 0, many; at < n; at += many) {
        /* x (many, dim) = embeddings; then forward and head, by all threads */
        many = n - at < s->block ? n - at : s->block;
        if (x) project_input(s, x + at * s->m->c->input, many);
        for (size_t r = 0; r < many; r++) {
            if (tokens) embed(s->x + r * dim, s->m, tokens[at + r]);
            s->row[r] = (struct row){ s, s->count + r, out ? out + (at + r) * width : s->logits,
                                      NULL };
        }
        run_threads(s, many, out ? many : at + many == n);
        if (out && at + many == n) memcpy(s->logits, out + (n - 1) * width, width * sizeof *out);
        s->count += many;
    }
}

int based_feed(based_session *s, const int32_t *tokens, size_t n, float *logits, based_error *e) {
    int status = check_tokens(s->m, tokens, n, e);
    if (status) return status;
    feed(s, tokens, NULL, n, logits);
    s->history = based_history_of(s->history, tokens, n);
    return BASED_OK;
}

/* ==== 6. Sampling, the simplest way ==============================================================
 * With the prompt fed, a caller writes a text like this:
 *     while (n-- > 0) {
 *         int32_t token = draw(based_logits(s), vocab, temperature, uniform(&seed));
 *         print the text of the token
 *         if (based_step(s, token, &e)) return e.status;
 *     }
 * draw(logits, vocab, temperature, u), u a random number in [0, 1): p[i] = exp((logits[i] - max) /
 * temperature); the result is the first i at which p[0] + ... + p[i] exceeds u * sum of all p. At
 * temperature 0 it is the i of the largest logit. based_sample, section 8, adds top-k, top-p, ...
 */

/* ==== Whoever wanted to understand Based can stop here. Part two: exact, safe, fast. ========== */

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
#define COUNT(a) (sizeof(a) / sizeof(a)[0])
#define U64(x) ((uint64_t)(x))
enum { LANES = 16 };            /* partial sums of a float sum, see section 9 */
enum { MIN_SPIN_NS = 10000, MAX_SPIN_NS = 500000 }; /* of a barrier, see section 15 */
static float exp_approx(float x);
static float sigmoid(float x);
static float two_sum(float *total, float x); /* *total += x; returns the rounding error */
static int fail(based_error *e, int status, const char *format, ...);
#define INVALID(e, ...) fail(e, BASED_EINVAL, __VA_ARGS__)  /* a wrong argument */
#define DAMAGED(e, ...) fail(e, BASED_EFORMAT, __VA_ARGS__) /* wrong bytes of a file */
static int is_finite(float x) { return x - x == 0.0f; }

/* ==== 7. Refinements of Taylor attention =========================================================
 * Why: what part one only named. A layer may give its newest keys exact softmax weights (window),
 * keep its first keys out of the sums (sinks), let the past fade at each flush (decay) or at each
 * token (fading), begin with the pairs of a prefix, have other features (hedgehog) or other
 * normalizers, mix in the token before (token shift) and scale each head (value gates). The sums
 * need to know how often each monomial occurs (multinomials) and where in a session they lie.
 * May assume: every field is within the limits that check_taylor and check_layer enforce.
 * Later code relies on: head_state_floats and scratch_floats, by which memory is reserved, are
 * exactly what the attention uses.
 */

/* The number of monomials of degree exactly p in d variables, C(d + p - 1, p), or `cap` if less. */
static uint64_t monomials(uint64_t d, uint64_t p, uint64_t cap) {
    uint64_t n = 1;
    for (uint64_t i = 1; i <= p; i++) {
        /* exact at each step: n is C(d + i - 1, i) */
        n = n * (d + i - 1) / i;
        if (n > cap) return cap;
    }
    return n;
}

/* scores (n) = w(q, k_j) = sum_p a[p] (q.k_j)^p for n keys k (d, stride); q is already scaled. The
 * diagonal kernel is a[0] + sum_i sum_{p >= 1} a[p] (q_i k_ij)^p. */
static void polynomial_scores(float *scores, const float *q, const float *k, size_t n,
                              size_t stride, const float *a, const struct based_taylor *t) {
    const based_taylor_config *c = &t->c;
    if (c->kernel == BASED_DOT) {
        t->k->weighted_sum(scores, q, k, c->head_dim_k, n, stride);
        for (size_t j = 0; j < n; j++) {
            /* Horner's rule */
            float s = scores[j], w = a[c->degree];
            for (uint32_t p = c->degree; p-- > 0;) w = w * s + a[p];
            scores[j] = w;
        }
        return;
    }
    for (size_t j = 0; j < n; j++) {
        scores[j] = a[0];
        for (size_t i = 0; i < c->head_dim_k; i++) {
            float s = q[i] * k[i * stride + j], w = a[c->degree];
            for (uint32_t p = c->degree; p-- > 1;) w = w * s + a[p];
            scores[j] += w * s;
        }
    }
}

/* The number of features; if there are more than `cap`, some number above it. */
static uint64_t count_features(const based_taylor_config *t, uint64_t cap) {
    uint64_t n = 1;
    if (t->kernel == BASED_DIAGONAL) return 1 + U64(t->head_dim_k) * t->degree;
    if (t->kernel == BASED_HEDGEHOG) return U64(t->group) * 2 * t->degree;
    for (uint32_t p = 1; p <= t->degree; p++) n += monomials(t->head_dim_k, p, cap);
    return n;
}

/* (q.k)^p is a sum over all p-tuples of coordinates. Tuples that are permutations of each other
 * share one monomial x_i^a x_j^b ..., which therefore counts p!/(a! b! ...) times, a multinomial
 * coefficient. Monomials are the non-decreasing tuples in lexicographic order, degree after degree.
 * p <= 12 keeps every coefficient exact in a float. */
static void fill_multinomials(float *out, const based_taylor_config *t) {
    *out++ = 1.0f;
    if (t->kernel == BASED_DIAGONAL) {
        for (uint64_t i = 0; i < U64(t->head_dim_k) * t->degree; i++) *out++ = 1.0f;
        return;
    }
    for (uint32_t p = 1; p <= t->degree; p++) {
        uint32_t tuple[BASED_MAX_DEGREE] = { 0 };
        for (;;) {
            /* p!/(a! b! ...), factor by factor: every intermediate result is a whole number */
            uint32_t count = 1, run = 0;
            for (uint32_t i = 0; i < p; i++) {
                run = i && tuple[i] == tuple[i - 1] ? run + 1 : 1;
                count = count * (i + 1) / run;
            }
            *out++ = (float)count;
            /* the next tuple: raise the last index that is not at its maximum, and set all after
             * it to the same value */
            uint32_t i = p;
            while (i && tuple[i - 1] == t->head_dim_k - 1) i--;
            if (!i) break;
            uint32_t value = tuple[i - 1] + 1;
            for (i--; i < p; i++) tuple[i] = value;
        }
    }
}

/* N, the tokens that K and V have room for: the sinks, the window, and a chunk that is filling. */
static size_t kv_capacity(const based_taylor_config *t) {
    return (size_t)t->sinks + t->window + t->chunk;
}

/* So many columns phi has room for: keys of a chunk, or queries that read the sums together. */
static size_t columns_of(const based_taylor_config *t) {
    return t->chunk < TOGETHER ? t->chunk : TOGETHER;
}

/* Sums that lose a part of themselves again and again need no compensation: errors fade, too. */
static int is_compensated(const struct based_taylor *t) {
    return t->c.decay == 0.0f && !t->fading;
}

/* Floats of state of one key/value head: S, z, K, V, the compensation of S and z, and fade. */
static uint64_t head_state_floats(const struct based_taylor *t, uint64_t features) {
    uint64_t comp = is_compensated(t) ? (U64(t->c.head_dim_v) + 1) / 2 : 0;
    return features * (U64(t->c.head_dim_v) + 2 + comp) + (t->fading ? kv_capacity(&t->c) + 1 : 0)
           + kv_capacity(&t->c) * (U64(t->c.head_dim_k) + t->c.head_dim_v);
}

/* Floats of scratch of one head: the features of keys or queries; later, in their place, the
 * weights of the recent keys and a scaled query. Behind that, the z of the queries, or a key. */
static uint64_t z_at(const struct based_taylor *t, uint64_t features) {
    uint64_t phi = features * columns_of(&t->c), recent = kv_capacity(&t->c) + t->c.head_dim_k;
    return phi > recent ? phi : recent;
}
static uint64_t scratch_floats(const struct based_taylor *t, uint64_t features) {
    uint64_t z = t->c.group > columns_of(&t->c) ? t->c.group : columns_of(&t->c);
    return z_at(t, features) + (z > t->c.head_dim_k ? z : t->c.head_dim_k);
}

/* The state that begins at `base`, after `count` tokens, of which n_recent are in K and V. */
static struct head_state head_state(float *base, const struct based_taylor *t, uint64_t count,
                                    size_t n_recent) {
    size_t d = t->features, dk = t->c.head_dim_k, dv = t->c.head_dim_v;
    struct head_state s;
    s.s = base;                                                 /* (D, dv) */
    s.z = s.s + d * dv;                                         /* (D) */
    s.k = s.z + d;                                              /* (dk, N) */
    s.v = s.k + kv_capacity(&t->c) * dk;                        /* (N, dv) */
    s.comp = s.v + kv_capacity(&t->c) * dv;                     /* (D, dv/2), if compensated */
    s.comp_z = s.comp + (is_compensated(t) ? d * ((dv + 1) / 2) : 0);           /* (D) */
    s.fade = s.comp_z + d;                                      /* (N + 1), with fading only */
    s.count = count;
    s.n_recent = n_recent;
    s.flushed = count > n_recent;
    s.lost = 0.0f;
    s.head = 0;
    return s;
}

/* In a session the number of pairs says how many are recent: up to N at first; from then on, each
 * time a token finds no room, a chunk is flushed into the sums. */
static struct head_state head_state_at(const struct row *r, const struct layer *l, size_t head,
                                       uint64_t pairs) {
    const based_taylor_config *c = &l->taylor.c;
    size_t stay = (size_t)c->sinks + c->window, n_recent = (size_t)pairs;
    if (pairs > stay) n_recent = stay + (size_t)((pairs - stay - 1) % c->chunk) + 1;
    float *base = state_of(r, l) + head * (size_t)head_state_floats(&l->taylor, l->taylor.features);
    struct head_state s = head_state(base, &l->taylor, pairs, n_recent);
    s.head = head;
    return s;
}

/* Rows of `in` for the pairs of a prefix; the tokens of the session's prefix, a number that is the
 * last one of the state, so that it is saved, copied and reset with it. */
static uint32_t prefix_rows(const based_layer *c) {
    return c->flags & BASED_PREFIX ? k_dim(c) + v_dim(c) : 0;
}
static uint32_t prefix_tokens(const based_session *s) {
    return s->m->c->prefix ? (uint32_t)s->state[s->m->state - 1] : 0;
}

/* In a prefix layer the pairs of the prefix come before those of the tokens. */
static struct head_state head_state_of(const struct row *r, const struct layer *l, size_t head) {
    int prefix = (l->c->flags & BASED_PREFIX) != 0;
    return head_state_at(r, l, head, r->t + (prefix ? prefix_tokens(r->s) : 0));
}

/* JRT: the pairs k_enc, v_enc of all n tokens of the prefix go into the state, before any of these
 * tokens reads it. */
static void store_prefix(const struct layer *l, const float *x, const struct thread *th, size_t n) {
    based_session *s = th->s;
    size_t rows = prefix_rows(l->c), dk = l->c->head_dim_k, dv = l->c->head_dim_v;
    matmul(s->proj, rows, &l->in, in_rows(l->c), rows, x, n, th);
    barrier(th);
    FOR_MY_PART(head, l->c->kv_heads) for (size_t r = 0; r < n; r++) {
        struct head_state state = head_state_at(&s->row[r], l, head, r);
        const float *k = s->proj + r * rows + head * dk;
        const float *v = s->proj + r * rows + k_dim(l->c) + head * dv;
        append_kv(&state, &l->taylor, k, v, scratch_of(s, head));
    }
    barrier(th);
}

/* The attention of the queries q (n, group, d_k) -> y (n, group, d_v) to all that is in a state. */
static void taylor_attention(float *y, size_t y_stride, const float *q, size_t q_stride, size_t n,
                             size_t head, const struct head_state *s, const struct based_taylor *t,
                             float *scratch) {
    float *z = scratch + (size_t)z_at(t, t->features);
    for (size_t i = 0; i < n; i++) {
        struct queries u = { q + i * q_stride, y + i * y_stride, z, 1, q_stride, y_stride, head };
        if (s->flushed) read_sums(&u, s, t, scratch);
        for (size_t h = 0; h < t->c.group; h++) read_recent(&u, 0, h, s, t, scratch);
    }
}

/* Bidirectional models: all pairs of the block are stored before any query reads. */
static void bidirectional_mixer(const struct layer *l, const struct thread *th, size_t n) {
    const based_layer *c = l->c;
    based_session *s = th->s;
    size_t dk = c->head_dim_k, dv = c->head_dim_v, group = c->heads / c->kv_heads;
    FOR_MY_PART(head, c->kv_heads) {
        float *scratch = scratch_of(s, head);
        struct head_state state = head_state_of(&s->row[0], l, head);
        for (size_t r = 0; r < n; r++) {
            const float *k = s->proj + r * in_rows(c) + q_dim(c) + head * dk;
            const float *v = s->proj + r * in_rows(c) + q_dim(c) + k_dim(c) + head * dv;
            append_kv(&state, &l->taylor, k, v, scratch);
        }
        taylor_attention(s->inner + head * group * dv, inner_dim(c), s->proj + head * group * dk,
                         in_rows(c), n, head * group, &state, &l->taylor, scratch);
    }
}

/* The queries of head `head` in rows r .. end - 1, all of one session, for as many rows as read the
 * same sums: while there is room for their tokens, and their queries are columns of one phi. */
static struct queries queries_of(const struct layer *l, based_session *s, size_t head, size_t r,
                                 size_t end, const struct head_state *state) {
    const struct based_taylor *t = &l->taylor;
    size_t group = t->c.group, in = in_rows(l->c), inner = inner_dim(l->c), many = 1;
    while (r + many < end && (many + 1) * group <= columns_of(&t->c)
           && state->n_recent + many < kv_capacity(&t->c))
        many++;
    return (struct queries){ s->proj + r * in + head * group * t->c.head_dim_k,
                             s->inner + r * inner + head * group * t->c.head_dim_v,
                             scratch_of(s, head) + (size_t)z_at(t, t->features), many, in, inner,
                             head * group };
}

/* Hedgehog features (Zhang et al. 2024, arXiv 2402.04347) of n vectors: u = map x (degree) becomes
 * softmax(u), then softmax(-u). Here u is given, in the first half of phi (2 degree, n), whose rows
 * are `stride` floats apart. 1e-12 keeps the sum of them, by which y is divided, above 0. */
static void hedgehog_softmax(float *phi, size_t degree, size_t n, size_t stride) {
    for (size_t j = 0; j < n; j++) {
        float *p = phi + j, *minus = p + degree * stride, top = -FLT_MAX, low = FLT_MAX;
        float up = 0.0f, down = 0.0f;
        for (size_t f = 0; f < degree; f++) {
            float u = p[f * stride];
            top = u > top ? u : top;
            low = u < low ? u : low;
        }
        for (size_t f = 0; f < degree; f++) {
            float u = p[f * stride];
            up += p[f * stride] = exp_approx(u - top);
            down += minus[f * stride] = exp_approx(low - u);
        }
        for (size_t f = 0; f < 2 * degree; f++) {
            float x = p[f * stride] / (f < degree ? up : down);
            p[f * stride] = x > 1e-12f ? x : 1e-12f;
        }
    }
}

/* The features of n recent keys, from k on. Every query head has maps of its own, so a key has
 * features for each head of the group, one below the other in phi (D, n). */
static void hedgehog_keys(float *phi, const struct head_state *s, const struct based_taylor *t,
                          const float *k, size_t n) {
    size_t degree = t->c.degree, dk = t->c.head_dim_k;
    for (size_t h = 0; h < t->c.group; h++, phi += 2 * degree * n) {
        const float *map = t->k_map + (s->head * t->c.group + h) * degree * dk;
        for (size_t f = 0; f < degree; f++)
            t->k->weighted_sum(phi + f * n, map + f * dk, k, dk, n, kv_capacity(&t->c));
        hedgehog_softmax(phi, degree, n, n);
    }
}

/* Column j of phi (D, n): the features of a query of head h of the group in their place, and zeros
 * in place of the other heads. So q meets its own part of S and z only. */
static void hedgehog_query(float *phi, const float *q, size_t h, size_t j, size_t n,
                           const struct queries *u, const struct based_taylor *t) {
    size_t degree = t->c.degree, dk = t->c.head_dim_k;
    const float *map = t->q_map + (u->head + h) * degree * dk;
    float *own = phi + 2 * h * degree * n + j;
    for (size_t f = 0; f < t->features; f++) phi[f * n + j] = 0.0f;
    for (size_t f = 0; f < degree; f++) own[f * n] = dot(map + f * dk, q, dk);
    hedgehog_softmax(own, degree, 1, n);
}

/* phi (D, n) = a[p] * multinomial * monomial of degree p of q, for queries first .. first + n - 1,
 * with the coefficients a[p] of their heads, so that phi(q).phi(k) = w(q, k). y[j]: where the
 * result of column j goes. */
static void query_features(float *phi, float **y, const struct queries *u, size_t first, size_t n,
                           const struct based_taylor *t) {
    const based_taylor_config *c = &t->c;
    size_t dk = c->head_dim_k, f = 0;
    float *q = phi + n, a[TOGETHER];    /* q (dk, n), where the features of degree 1 go */
    for (size_t j = 0; j < n; j++) {
        size_t token = (first + j) / c->group, h = (first + j) % c->group;
        const float *from = u->q + token * u->q_stride + h * dk;
        if (c->kernel == BASED_HEDGEHOG) hedgehog_query(phi, from, h, j, n, u, t);
        else for (size_t i = 0; i < dk; i++) q[i * n + j] = from[i] * c->scale;
        y[j] = u->y + token * u->y_stride + h * c->head_dim_v;
    }
    if (c->kernel == BASED_HEDGEHOG) return;
    feature_map(phi, q, n, n, c);
    for (uint32_t p = 0; p <= c->degree; p++) {
        size_t end = f + (size_t)(c->kernel == BASED_DIAGONAL && p
                                      ? dk : monomials(dk, p, BASED_MAX_FEATURES));
        for (size_t j = 0; j < n; j++)
            a[j] = c->coefficients[(u->head + (first + j) % c->group) * (c->degree + 1) + p];
        if (n == 1) /* on its own, because compilers vectorize this loop */
            for (; f < end; f++) phi[f] *= a[0] * t->multinomial[f];
        for (; f < end; f++)
            for (size_t j = 0; j < n; j++) phi[f * n + j] *= a[j] * t->multinomial[f];
    }
}

/* z[0], the sum of the feature 1, is the number of tokens in the sums. It is set from an exact
 * integer; only if it decays, or hedgehog has no such feature, it is a sum like the others. */
static void set_count(struct head_state *s, const struct based_taylor *t) {
    uint64_t n = s->count - s->n_recent;
    if (t->c.decay > 0.0f || t->fading == BASED_GATED || t->c.kernel == BASED_HEDGEHOG) return;
    /* negative if pairs were subtracted while they were still recent */
    s->z[0] = n >> 63 ? -(float)(0 - n) : (float)n;
    s->comp_z[0] = 0.0f;
}

/* After a flush the tokens behind the chunk move to its place. */
static void drop_oldest(struct head_state *s, const struct based_taylor *t) {
    size_t chunk = t->c.chunk, sinks = t->c.sinks, dv = t->c.head_dim_v;
    size_t stay = s->n_recent - sinks - chunk;
    for (size_t i = 0; i < t->c.head_dim_k; i++) {
        float *k = s->k + i * kv_capacity(&t->c) + sinks;
        memmove(k, k + chunk, stay * sizeof *k);
    }
    memmove(s->v + sinks * dv, s->v + (sinks + chunk) * dv, stay * dv * sizeof *s->v);
    if (t->fading) memmove(s->fade, s->fade + chunk, stay * sizeof *s->fade);
    s->n_recent -= chunk;
    s->flushed = 1;
    set_count(s, t);
}

/* total[i] += x[i] - decay * total[i]. What has faded to almost nothing becomes zero before it is
 * subnormal: each operation on a subnormal number costs hundreds of cycles. */
INLINE void decayed_add(float *total, float decay, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float now = total[i] + (x[i] - decay * total[i]);
        total[i] = fabsf(now) < 1e-30f ? 0.0f : now;
    }
}

/* z[f] += x, with compensation; before that, z loses a part of itself, if it decays. */
static void add_to_z(struct head_state *s, const struct based_taylor *t, size_t f, float x) {
    if (s->lost > 0.0f && t->fading != BASED_FIXED) x -= s->lost * s->z[f];
    s->comp_z[f] = two_sum(s->z + f, x + s->comp_z[f]);
}

/* The same for S[f][e ..] += x (n). */
static void add_to_s(struct head_state *s, const struct based_taylor *t, size_t f, size_t e,
                     const float *x, size_t n) {
    float *total = s->s + f * t->c.head_dim_v + e;
    if (!is_compensated(t)) decayed_add(total, s->lost, x, n);
    else t->k->compensated_add(total, s->comp + f * ((t->c.head_dim_v + 1) / 2) + e / 2, x, n);
}

/* A guess (section 12) keeps what it overwrites in the state: its history, then for each layer, per
 * channel or head, the input or the pair in whose place its own comes and what fading had left;
 * and the half of the channels that is shifted. */
static size_t old_floats(const struct layer *l) {
    const based_layer *c = l->c;
    size_t fade = l->taylor.fading ? c->kv_heads * (kv_capacity(&l->taylor.c) + 1) : 0;
    return (c->mixer == BASED_CONV ? c->head_dim_v : k_dim(c) + v_dim(c)) + fade
           + (c->flags & BASED_SHIFT ? l->in.cols / 2 : 0);
}
static float *old_of(const struct row *row, const struct layer *l) {
    float *old = row->old + 2;
    for (const struct layer *i = row->s->m->layer; i < l; i++) old += old_floats(i);
    return old;
}
static float *old_fade(const struct row *row, const struct layer *l, size_t head) {
    return old_of(row, l) + k_dim(l->c) + v_dim(l->c) + head * (kv_capacity(&l->taylor.c) + 1);
}

/* Fading: before a token is stored, all that is there loses a part, so that it keeps the factor
 * g < 1. fade[j] is the product of these factors since recent token j, fade[N] since the last
 * flush, when the sums changed. GATED: g is computed from the token, x = norm1(x'); FIXED: it is
 * given. */
static void fade_state(struct head_state *s, const struct layer *l, based_session *p, size_t r) {
    size_t n = kv_capacity(&l->taylor.c), dim = l->in.cols, head = s->head;
    const float *x = p->x_norm + r * dim;
    float g = l->fade_bias ? sigmoid(dot(l->fade + head * dim, x, dim) + l->fade_bias[head])
                           : l->fade[head];
    if (p->row[r].old) memcpy(old_fade(&p->row[r], l, head), s->fade, (n + 1) * sizeof *s->fade);
    for (size_t j = 0; j <= n; j++)     /* columns without a token are set when they get one */
        s->fade[j] = s->fade[j] * g < 1e-30f ? 0.0f : s->fade[j] * g;
    s->fade[s->n_recent - 1] = 1.0f;
}

/* At a flush: what the sums lose before the first part of the chunk is added to them, and what is
 * left of the tokens at .. at + n - 1 of the chunk, whose features are phi (D, n). */
static void fade_chunk(struct head_state *s, const struct based_taylor *t, float *phi, size_t at,
                       size_t n) {
    size_t dv = t->c.head_dim_v;
    float *of_sums;
    s->lost = at ? 0.0f : t->c.decay;
    if (!t->fading) return;
    of_sums = s->fade + kv_capacity(&t->c);
    s->lost = at ? 0.0f : 1.0f - *of_sums;
    *of_sums = 1.0f;
    for (size_t j = 0; j < n; j++)      /* FIXED: only what is added to S has faded, not z */
        for (size_t e = 0; t->fading == BASED_FIXED && e < dv; e++)
            s->v[(at + j) * dv + e] *= s->fade[at + j];
    for (size_t f = 0; t->fading == BASED_GATED && f < t->features; f++)
        for (size_t j = 0; j < n; j++) phi[f * n + j] *= s->fade[at + j];
}

/* phi (D, n) of the keys at .. at + n - 1 of the chunk, and what is left of them. */
static void key_features(float *phi, struct head_state *s, const struct based_taylor *t, size_t at,
                         size_t n) {
    const float *k = s->k + t->c.sinks + at;
    if (t->c.kernel == BASED_HEDGEHOG) hedgehog_keys(phi, s, t, k, n);
    else feature_map(phi, k, n, kv_capacity(&t->c), &t->c);
    fade_chunk(s, t, phi, at, n);
}

/* The same when a query reads: weights (n_recent) and what the sums give are multiplied by what is
 * left of them. Returns the sum of the weights, which fade too if GATED. */
static float fade_weights(float *weights, const struct head_state *s, const struct based_taylor *t,
                          float *y, float *z) {
    float left = s->fade[kv_capacity(&t->c)], total = sum(weights, s->n_recent);
    for (size_t j = 0; j < s->n_recent; j++) weights[j] *= s->fade[j];
    if (t->fading == BASED_GATED) {
        total = sum(weights, s->n_recent);
        /* weights that are never negative add up to zero or less by rounding only */
        int drop = t->c.normalizer == BASED_ADD && t->c.normalizer_eps == 0.0f && !(*z > 0.0f);
        if (drop) left = 0.0f;
        *z *= left;
    }
    for (size_t e = 0; e < t->c.head_dim_v; e++) y[e] *= left;
    return total;
}

/* The weights of the recent keys; returns their sum. On entry y and *z are what the sums give.
 * Without a window, or with fading, the weights are the polynomial. With a window they are exp(s),
 * and all weights, those behind y and *z too, are divided by exp(top), so that none overflows. If
 * the weights behind *z add up to zero or less, as those of a polynomial can, the sums are left
 * out. Hedgehog: the weights are a exp(s - top), and the sums count as they are. */
static float local_scores(float *weights, const struct head_state *s, const struct based_taylor *t,
                          const float *query, size_t head, float *y, float *z) {
    int hedgehog = t->c.kernel == BASED_HEDGEHOG;
    float *q = weights + kv_capacity(&t->c), top = *z > 0.0f && !hedgehog ? 0.0f : -FLT_MAX, total;
    for (size_t i = 0; i < t->c.head_dim_k; i++) q[i] = query[i] * t->c.scale;
    if (!hedgehog && (!t->c.window || t->fading)) {
        const float *a = t->c.coefficients + head * (t->c.degree + 1);
        polynomial_scores(weights, q, s->k, s->n_recent, kv_capacity(&t->c), a, t);
        return t->fading ? fade_weights(weights, s, t, y, z) : sum(weights, s->n_recent);
    }
    /* weights = exp(q.k - top), top = the largest q.k, and at least 0 if the sums count */
    t->k->weighted_sum(weights, q, s->k, t->c.head_dim_k, s->n_recent, kv_capacity(&t->c));
    total = t->k->softmax_exp(weights, s->n_recent, 1.0f, &top);
    if (hedgehog) {
        float a = sigmoid(t->c.coefficients[head]);
        for (size_t j = 0; j < s->n_recent; j++) weights[j] *= a;
        return a * total;
    }
    if (*z > 0.0f) {
        float unit = exp_approx(-top);
        for (size_t e = 0; e < t->c.head_dim_v; e++) y[e] *= unit;
        *z *= unit;
    } else {
        memset(y, 0, t->c.head_dim_v * sizeof *y);
        *z = 0.0f;
    }
    return total;
}

/* y /= N(z), N as in based.h part 7. RAW follows the model it comes from: 0/0 gives 0, x/0 the
 * largest float. */
static void normalize_output(float *y, size_t n, float z, const based_taylor_config *c) {
    if (c->normalizer == BASED_ONE) return;
    if (c->normalizer == BASED_ADD) z += c->normalizer_eps;
    if (c->normalizer == BASED_CLAMP) z = z > c->normalizer_eps ? z : c->normalizer_eps;
    for (size_t e = 0; e < n; e++) {
        y[e] = divide(y[e], z);
        if (c->normalizer != BASED_RAW) continue;
        if (y[e] != y[e]) y[e] = 0.0f;
        if (y[e] > FLT_MAX) y[e] = FLT_MAX;
        if (y[e] < -FLT_MAX) y[e] = -FLT_MAX;
    }
}

/* Token shift: the second half of the channels of mixer_in (n, dim) comes from the token before,
 * whose channels are kept in the state. One thread does it, because each token needs the row
 * before, which another thread may have written. */
static void shift_tokens(const struct layer *l, const struct thread *th, size_t n) {
    based_session *p = th->s;
    size_t dim = p->m->c->dim, kept = (dim + 1) / 2, moved = (dim - kept) * sizeof(float);
    FOR_MY_PART(r, n) memcpy(p->mixer_in + r * dim, p->x + r * dim, dim * sizeof *p->x);
    barrier(th);
    for (size_t r = 0; th->id == 0 && r < n; r++) {
        float *before = p->row[r].s->state + l->shift;
        memcpy(p->mixer_in + r * dim + kept, before + kept, moved);
        memcpy(before + kept, p->x + r * dim + kept, moved);
    }
    barrier(th);
}

/* Value gates: each head's output (head_dim_v) is multiplied by one number between 0 and 1, so that
 * a head can add nothing: y *= sigmoid(gate . mixer_in). Value factors: y *= gate . norm1(x'). */
static void gate_heads(const struct layer *l, const struct thread *th, size_t n) {
    size_t dv = l->c->head_dim_v, heads = l->c->heads, dim = th->s->m->c->dim;
    const float *x = l->c->flags & BASED_SHIFT ? th->s->mixer_in : th->s->x;
    FOR_MY_PART(r, n) for (size_t h = 0; h < heads; h++) {
        const float *w = l->gates.data + h * dim;
        float g = l->c->flags & BASED_VALUE_FACTORS
                      ? dot(w, th->s->x_norm + r * dim, dim)
                      : sigmoid(dot(w, x + r * dim, dim));
        for (size_t e = 0; e < dv; e++) th->s->inner[(r * heads + h) * dv + e] *= g;
    }
    barrier(th);
}

/* ==== 8. Sampling in full ========================================================================
 * Why: a softmax gives every token of the vocabulary some probability, so that a long text draws
 * improbable ones too. The steps, in this order: repetition penalty, temperature, softmax, top-k,
 * min-p, top-p, draw. Sorting a whole vocabulary for each token would take most of the time, so
 * tokens that cannot be drawn are left out first, and a heap yields only as many as are needed.
 * May assume: based_sampler_init has checked the settings. Logits may be anything, NaN included.
 * Later code relies on: the settings, the generator's state and the recent tokens determine what is
 * drawn, on every machine; so a saved session goes on as it would have.
 * Memory: one candidate per token of the vocabulary, then the ring of recent tokens.
 */
struct candidate { float p; int32_t id; };      /* p: first the logit, then the probability */

size_t based_sampler_bytes(const based_sampler *s) {
    return s->vocab * sizeof(struct candidate) + s->repeat_last_n * sizeof(int32_t);
}

/* The settings of a sampler, and those that a checkpoint recommends. */
static int check_sampler(const based_sampler *s, int status, based_error *e) {
    if (!(s->temperature >= 0.0f && is_finite(s->temperature)))
        return fail(e, status, "temperature must be a number from 0 up");
    if (!(s->top_p >= 0.0f && s->top_p <= 1.0f) || !(s->min_p >= 0.0f && s->min_p <= 1.0f))
        return fail(e, status, "top_p and min_p must be numbers from 0 to 1");
    if (!(s->repeat_penalty > 0.0f && is_finite(s->repeat_penalty)))
        return fail(e, status, "repeat_penalty must be a number above 0 (1: off)");
    if (s->repeat_last_n > BASED_MAX_VOCAB)
        return fail(e, status, "repeat_last_n must be at most %u", BASED_MAX_VOCAB);
    return BASED_OK;
}

int based_sampler_init(based_sampler *s, void *memory, size_t bytes, based_error *e) {
    if (s->vocab == 0 || s->vocab > BASED_MAX_VOCAB)
        return INVALID(e, "a sampler needs 1 to %u logits", BASED_MAX_VOCAB);
    if (check_sampler(s, BASED_EINVAL, e)) return BASED_EINVAL;
    if (!memory || (uintptr_t)memory % 8 || bytes < based_sampler_bytes(s))
        return fail(e, BASED_ENOMEM, "a sampler needs %zu bytes, aligned to 8",
                    based_sampler_bytes(s));
    s->memory = memory;
    s->state = s->seed;
    s->seen = 0;
    return BASED_OK;
}

static int32_t *recent_tokens(const based_sampler *s) {
    return (int32_t *)(void *)((struct candidate *)s->memory + s->vocab);
}

void based_sampler_accept(based_sampler *s, int32_t token) {
    if (s->repeat_last_n) recent_tokens(s)[s->seen % s->repeat_last_n] = token;
    s->seen++;
}

size_t based_sampler_recent(const based_sampler *s, int32_t *tokens) {
    size_t n = s->seen < s->repeat_last_n ? (size_t)s->seen : s->repeat_last_n;
    for (size_t i = 0; i < n; i++)
        tokens[i] = recent_tokens(s)[(s->seen - n + i) % s->repeat_last_n];
    return n;
}

/* A uniform number in [0, 1): splitmix64 (Steele, Lea, Flood 2014), the top 53 bits. */
static double uniform(based_sampler *s) {
    uint64_t z = s->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * (1.0 / 9007199254740992.0);
}

/* Makes the logits candidates, in order of id, and applies the repetition penalty; a token that
 * occurs twice among the recent ones is penalized once. NaN becomes the lowest number. */
static void apply_penalty(based_sampler *s, const float *logits) {
    struct candidate *c = s->memory;
    const int32_t *recent = recent_tokens(s);
    uint64_t n = s->seen < s->repeat_last_n ? s->seen : s->repeat_last_n;
    for (uint32_t i = 0; i < s->vocab; i++) {
        c[i].p = logits[i] == logits[i] ? logits[i] : -FLT_MAX;
        c[i].id = (int32_t)i;
    }
    for (uint64_t i = 0; i < n && s->repeat_penalty != 1.0f; i++) {
        uint32_t id = (uint32_t)recent[i];
        if (id >= s->vocab || logits[id] != logits[id]) continue;
        /* from the logit itself, not from c[id].p: so twice is once */
        c[id].p = logits[id] > 0.0f ? logits[id] / s->repeat_penalty
                                    : logits[id] * s->repeat_penalty;
    }
}

static uint32_t argmax(const struct candidate *c, uint32_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) if (c[i].p > c[best].p) best = i;
    return best;
}

/* The order of candidates: the more probable first, then the lower id, so that no two are equal. */
static int more_likely(const struct candidate *a, const struct candidate *b) {
    return a->p > b->p || (a->p == b->p && a->id < b->id);
}

/* A heap with the most likely candidate on top: restores it below `at`. */
static void sift_down(struct candidate *c, uint32_t at, uint32_t n) {
    struct candidate moved = c[at];
    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && more_likely(&c[child + 1], &c[child])) child++;
        if (!more_likely(&c[child], &moved)) break;
        c[at] = c[child];
    }
    c[at] = moved;
}

/* Removes the candidates that cannot be drawn: those below min-p (the most probable has p = 1), and
 * those so improbable that all of them together cannot make up the part that top-p cuts off.
 * Returns how many remain, at least 1; with min-p, *total becomes their probability. */
static uint32_t prefilter(const based_sampler *s, struct candidate *c, double *total) {
    double rest = s->top_k ? 0.0 : (1.0 - s->top_p) * *total / s->vocab, kept = 0.0;
    float least = s->min_p > (float)rest ? s->min_p : (float)rest;
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->vocab; i++) {
        if (c[i].p < least || c[i].p == 0.0f) continue;
        kept += c[i].p;
        c[n++] = c[i];
    }
    if (s->min_p > 0.0f) *total = kept;
    return n;
}

/* Takes the most likely of n candidates off a heap one by one, as many as top-k and then top-p
 * admit. They end up at the end of the array, the most likely last. Returns how many, at least 1;
 * *total becomes their probability. */
static uint32_t top_k_top_p(const based_sampler *s, struct candidate *c, uint32_t n,
                            double *total) {
    uint32_t limit = s->top_k && s->top_k < n ? s->top_k : n, kept = 0;
    double mass = 0.0;
    for (uint32_t i = n / 2; i-- > 0;) sift_down(c, i, n);
    while (kept < limit && (kept == 0 || s->top_k || mass < s->top_p * *total)) {
        struct candidate best = c[0];
        mass += best.p;
        c[0] = c[n - ++kept];
        c[n - kept] = best;
        sift_down(c, 0, n - kept);
    }
    /* with top-k, top-p counts from what top-k has left */
    if (s->top_k) {
        double all = mass;
        mass = 0.0;
        for (limit = kept, kept = 0; kept < limit && (kept == 0 || mass < s->top_p * all);)
            mass += c[n - ++kept].p;
    }
    *total = mass;
    return kept;
}

int32_t based_sample(based_sampler *s, const float *logits) {
    struct candidate *c = s->memory;
    uint32_t n = s->vocab, i, last;
    double total = 0.0, target;
    apply_penalty(s, logits);
    i = argmax(c, n);
    if (s->temperature == 0.0f || c[i].p == -FLT_MAX) return c[i].id;
    /* softmax with temperature, not divided by its sum, so that the most probable has p = 1 */
    for (float top = c[i].p; n-- > 0; total += c[n].p)
        c[n].p = exp_approx((c[n].p - top) / s->temperature);
    n = prefilter(s, c, &total);
    last = s->top_k || s->top_p < 1.0f ? n - top_k_top_p(s, c, n, &total) : 0;
    /* draw: the first candidate at which the running sum exceeds target, from the end on */
    target = uniform(s) * total;
    for (i = n - 1; i > last && (target -= c[i].p) >= 0.0; i--) {}
    return c[i].id;
}

/* log softmax(logits)[token] = logit - max - log(sum of exp(logit - max)) */
double based_log_probability(const float *logits, size_t n, int32_t token) {
    float top = -FLT_MAX;
    double total = 0.0;
    for (size_t i = 0; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (size_t i = 0; i < n; i++) total += exp_approx(logits[i] - top);
    return (double)(logits[token] - top) - log(total);
}

/* ==== 9. Exact arithmetic ========================================================================
 * The same checkpoint and tokens give the same bits on every machine. IEEE 754 fixes the results of
 * + - * / and sqrt. It does not fix exp, erf, sin or cos, nor the order in which a sum is computed.
 * Therefore:
 *   - Of libm only sqrtf is used. The expf of glibc, of mingw and of the C libraries for a
 *     Cortex-M4 give three different results for the same numbers; exp_approx, gelu and
 *     sincos_turns below consist of + - * / and integer operations.
 *   - Every sum has one order: lane l of sixteen adds the elements l, l + 16, l + 32 ..., and a
 *     fixed tree adds the lanes. Sixteen floats are one register of AVX-512, two of AVX2, four of
 *     SSE or NEON; compilers vectorize these loops for all of them without reordering an addition.
 *   - a * b + c is rounded twice: the pragmas at the top of the file turn fusing off. Some kernels
 *     below round it once, but only where the product is exact, so that the result is the same.
 * All later code relies on this: these functions return the same bits wherever they are inlined.
 */

/* Machines without vector registers have too few registers for sixteen sums; gcc would keep them in
 * memory. "Walled off I" at the end of the file has other versions of the long loops for them. */
#if !defined(BASED_NARROW) && (defined(__arm__) || defined(__riscv) || defined(__XTENSA__)) \
    && !defined(__ARM_NEON) && !defined(__riscv_vector)
#define BASED_NARROW 1
#endif
/* Nor do some have floats: their compilers call functions. "Walled off I" has shorter ones. */
#if !defined(BASED_SOFT_FLOAT) && defined(BASED_NARROW) \
    && ((defined(__arm__) && !defined(__ARM_FP)) || (defined(__riscv) && !defined(__riscv_flen)) \
        || defined(__XTENSA_SOFT_FLOAT__))
#define BASED_SOFT_FLOAT 1
#endif

#ifndef BASED_SOFT_FLOAT
INLINE float mul_add(float a, float b, float c) { return a * b + c; }   /* rounded twice */
INLINE float divide(float a, float b) { return a / b; }
#endif

/* The sum of the sixteen lanes, in a fixed tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1. */
INLINE float horizontal_sum(float s[LANES]) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) s[l] += s[l + half];
    return s[0];
}

#ifndef BASED_NARROW
INLINE float dot(const float *a, const float *b, size_t n) {
    float s[LANES] = { 0 };
    size_t i = 0;
    for (; n - i >= LANES; i += LANES)
        for (size_t l = 0; l < LANES; l++) s[l] += a[i + l] * b[i + l];
    for (size_t l = 0; i < n; l++, i++) s[l] += a[i] * b[i];
    return horizontal_sum(s);
}
#endif

INLINE float sum(const float *a, size_t n) {
    float s[LANES] = { 0 };
    size_t i = 0;
    for (; n - i >= LANES; i += LANES)
        for (size_t l = 0; l < LANES; l++) s[l] += a[i + l];
    for (size_t l = 0; i < n; l++, i++) s[l] += a[i];
    return horizontal_sum(s);
}

/* Rounding to a whole number, halves to even: adding 1.5 * 2^23 leaves no bit for a fraction. For
 * whole numbers |i| < 2^22, the bits of the float 1.5 * 2^23 + i are ROUND_MAGIC + i. */
#define ROUND_MAGIC_F 12582912.0f
enum { ROUND_MAGIC = 0x4b400000 };

/* round(x * scale), but at most 127 in size, where scale is a power of two */
#ifndef BASED_SOFT_FLOAT
INLINE int32_t quantized(float x, float scale) {
    int32_t bits;
    x = x * scale + ROUND_MAGIC_F;
    memcpy(&bits, &x, sizeof bits);
    bits = bits > ROUND_MAGIC - 127 ? bits : ROUND_MAGIC - 127;
    return (bits < ROUND_MAGIC + 127 ? bits : ROUND_MAGIC + 127) - ROUND_MAGIC;
}
#else
INLINE int32_t quantized(float x, float scale);
#endif

#ifndef BASED_SOFT_FLOAT        /* "Walled off I" makes the same steps in integers */
#define exp_definition exp_approx
#endif

/* exp(x) to 1 part in 10^7. x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial gives exp(r), and
 * 2^n is made of the exponent's bits. Below -87 the result is 0, because subnormal numbers cost
 * hundreds of cycles; above 88 it is exp(88). */
INLINE float exp_definition(float x) {
    float c = x > -87.0f ? x : -87.0f, n, r, y, power;
    uint32_t bits;
    c = c < 88.0f ? c : 88.0f;
    n = mul_add(c, 1.44269504f, ROUND_MAGIC_F); /* round(x / ln 2) */
    n -= ROUND_MAGIC_F;
    r = mul_add(n, -0.693359375f, c);       /* ln 2 in two parts; the first product is exact */
    r = mul_add(n, 2.12194440e-4f, r);
    y = 1.395060218e-3f;
    y = mul_add(y, r, 8.368953523e-3f);
    y = mul_add(y, r, 4.166620414e-2f);
    y = mul_add(y, r, 1.666651831e-1f);
    y = mul_add(y, r, 5.000000096e-1f);
    y = mul_add(y, r * r, r) + 1.0f;
    bits = (uint32_t)((int32_t)n + 127) << 23;
    memcpy(&power, &bits, sizeof power);    /* 2^n */
    y = x < -87.0f ? 0.0f : y * power;
    return x == x ? y : x;                  /* a NaN stays a NaN */
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }
INLINE float silu(float x) { return divide(x, 1.0f + exp_approx(-x)); }

/* gelu(x) = x (1 + erf(z)) / 2 with z = x / sqrt(2). erf(z) is a polynomial for |z| <= 1, and
 * 1 - exp(-z^2) times a polynomial in 1 / (1 + z/2) beyond. */
static float gelu(float x) {
    float z = fabsf(x) * 0.707106781f, erf;
    if (z <= 1.0f) {
        static const float c[] = { 7.889122784e-05f, -8.020842254e-04f, 5.189535449e-03f,
            -2.685444465e-02f, 1.128360018e-01f, -3.761262714e-01f, 1.128379166e+00f };
        float p = c[0];
        for (size_t i = 1; i < COUNT(c); i++) p = p * (z * z) + c[i];
        erf = z * p;
    } else {
        static const float c[] = { 9.379706612e-02f, -3.824765519e-01f, 4.324679613e-01f,
            2.496074697e-03f, 2.966584044e-01f, 2.743333388e-01f, 2.826056390e-01f };
        float t = 1.0f / (1.0f + 0.5f * z), p = c[0];
        for (size_t i = 1; i < COUNT(c); i++) p = p * t + c[i];
        erf = z < 4.0f ? 1.0f - exp_approx(-z * z) * t * p : 1.0f;
    }
    return x * (0.5f + 0.5f * (x < 0.0f ? -erf : erf));
}

/* x (1 + tanh(u)) / 2 = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3) */
static float gelu_tanh(float x) {
    return x * sigmoid(1.595769122f * (x + 0.044715f * x * x * x));
}

/* Cosine and sine of an angle in units of 2^-64 turns. The product of such an integer and a
 * position wraps around exactly at whole turns, so position 10^9 is as exact as position 10. Only
 * the upper 32 bits are used: a float cannot distinguish more. */
static void sincos_turns(uint64_t angle, float *cosine, float *sine) {
    /* the nearest quarter turn, and the rest: -1/8 .. 1/8 turn in two's complement */
    uint32_t t = (uint32_t)(angle >> 32), quarter = (t + 0x20000000u) >> 30;
    uint32_t rest = t - (quarter << 30);
    float r = rest < 0x80000000u ? (float)rest : -(float)(0u - rest);
    float x = r * 1.46291808e-9f, z = x * x;        /* radians: 2 pi / 2^32 */
    float s = x + x * z * (-1.666665494e-1f + z * (8.332177915e-3f + z * -1.951726674e-4f));
    float c = 1.0f - 0.5f * z
            + z * z * (4.166664686e-2f + z * (-1.388736721e-3f + z * 2.443841536e-5f));
    float rotated[4][2] = { { c, s }, { -s, c }, { -c, -s }, { s, -c } };
    *cosine = rotated[quarter & 3][0];
    *sine = rotated[quarter & 3][1];
}

/* *total += x; returns the rounding error of this addition, which is itself a float (TwoSum, Knuth
 * 1969). Totals below 1e-30 and errors below 1e-36 become 0 before they are subnormal numbers,
 * which would make every later token some hundred times slower. */
INLINE float two_sum(float *total, float x) {
    float old = *total, now = old + x, back = now - old;
    float error = (old - (now - back)) + (x - back);
    *total = fabsf(now) < 1e-30f ? 0.0f : now;
    return fabsf(error) > 1e-36f && fabsf(error) <= FLT_MAX ? error : 0.0f;
}

/* A bfloat16 is the upper half of a float. Both functions keep it in the upper half of a word; what
 * the lower half holds is ignored, respectively 0. */
INLINE float bf16_to_f32(uint32_t bits) {
    float x = 0.0f;
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

INLINE uint32_t f32_to_bf16(float x) {
    uint32_t bits;
    if (sizeof x != sizeof bits) return 0;  /* tests/double.c: doubles need no compensation */
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x8000u) & 0xffff0000u;
}

/* ==== 10. Generic kernels: the definition ========================================================
 * Nearly all time is spent here, in products of matrices and vectors and in weighted_sum. Each
 * kernel is a NAME_body in plain C that gcc and clang vectorize. FLOAT_KERNELS and TILE_KERNELS
 * compile the bodies once for each instruction set, as NAME_set. A struct kernels holds one set,
 * and a model chooses its set when it is opened. Only the integer products of quantized weights
 * need intrinsics, because no compiler finds those instructions: see "Walled off II" at the end of
 * the file.
 *
 * The generic set, which based.h calls "plain", defines all results. Integer sums are exact in any
 * order and every float sum has one order, so each other set must give the same bits;
 * tests/test_based.c compares them. Machines without vector units (BASED_NARROW) replace dot above
 * and three loops below by functions of the same name from "Walled off I".
 */

/* n vectors, as the products of matmul take them. Quantized weights share a scale in groups of
 * columns; for these, vectors are quantized in the same groups, and `pack` vectors (16, 4 or 1) are
 * stored together: the same group of each of them side by side. */
struct activations {
    const float *x;             /* (n, cols) */
    int8_t *q;                  /* (n / pack, groups, pack, group_width) round(x / scale) */
    float *scale;               /* (n / pack, groups, pack) a power of two */
    int32_t *offset;            /* (n / pack, groups, pack) ROUND_MAGIC - zero point * sum of q */
    size_t n, cols, groups, pack;
    int bits;                   /* of the weights that they are multiplied with */
};

#define TILE float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, \
             const struct activations *x, size_t from, size_t to
struct matmul_kernels {
    /* called by each thread before and after its work on a block of n vectors; may be NULL */
    void (*begin)(size_t n);
    void (*end)(void);
    /* out[t][r] = w[r] . x[t], for a few rows of float weights */
    void (*rows_f32)(float *out, size_t out_stride, const float *w, size_t rows,
                     const struct activations *x);
    /* the same for 16 rows of quantized weights, [0] of 8 and [1] of 4 bits, and the vectors
       from .. to - 1 */
    void (*tile[2])(TILE);
    /* groups from .. to - 1 of all vectors become int8 numbers with a scale */
    void (*quantize)(const struct activations *x, size_t from, size_t to);
    uint64_t (*checksum)(const unsigned char *p, size_t n);     /* based_checksum */
};
static const struct kernels *choose_kernels(int flags);

static uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* ---- Quantized numbers in memory ----------------------------------------------------------------
 * Weights: a tile has 16 rows, the last tile is padded with zeros. In a tile, the columns of a row
 * share a scale in groups of 64 (8 bits) or 32 (4 bits). Columns are padded to a multiple of 32, so
 * the last group of 64 may have only 32 columns. based.h describes words and scales.
 *
 * Vectors: quantized in groups of the same width; the last group is padded with zeros. Sixteen
 * vectors (or 4 or 1 where there are fewer) form a pack, in which the same group of all its vectors
 * lies side by side: q is (n / pack, groups, pack, group_width).
 */
static size_t tiles(uint32_t rows) { return ((size_t)rows + 15) / 16; }
static int bits_of(uint32_t dtype) { return dtype == BASED_Q4 ? 4 : 8; }

INLINE size_t padded(size_t cols) { return (cols + 31) / 32 * 32; }
INLINE size_t group_width(const int bits) { return bits == 8 ? 64 : 32; }
INLINE size_t groups(size_t cols, const int bits) {
    return (cols + group_width(bits) - 1) / group_width(bits);
}

/* words of 16 rows: of a tile, of a group */
INLINE size_t tile_words(size_t cols, const int bits) { return padded(cols) * (bits == 8 ? 4 : 2); }
INLINE size_t group_words(const int bits) { return tile_words(group_width(bits), bits); }

/* how many groups of the weights have all their columns, and how many columns group g has */
INLINE size_t whole_groups(const struct activations *x, const int bits) {
    return padded(x->cols) / group_width(bits);
}
INLINE size_t group_columns(const struct activations *x, size_t g, const int bits) {
    return g < whole_groups(x, bits) ? group_width(bits) : 32;
}

/* vectors in a pack, and the index of group g of vector t */
INLINE size_t pack_of(size_t n) { return n < 4 ? 1 : n < 8 ? 4 : 16; }
INLINE size_t group_at(const struct activations *x, size_t t, size_t g) {
    return (t / x->pack * x->groups + g) * x->pack + t % x->pack;
}

/* ---- Quantizing vectors -------------------------------------------------------------------------
 * One group: q = round(x / scale), where scale is the smallest power of two, at least 2^-56, with
 * which no |q| exceeds 127.
 *
 * A power of two makes x / scale exact. It also makes the last product of a tile exact, (sum of
 * w q) * scale of w * scale, because the scales of weights lie between 2^-82 and 2^20
 * (is_bad_scale); kernels may fuse it with the addition that follows. The maximum of |x| is taken
 * over the bits without the sign, which have the order of the numbers, and rounding uses
 * ROUND_MAGIC: compilers vectorize both. An infinity becomes 127 * 2^84. If x has a NaN, the scale
 * and with it all results are NaN; it is a fixed one, because the bits of the NaN in x may differ
 * between machines.
 *
 * Weights are stored with zero_point added. Adding -zero_point * sum(q) to a sum of products
 * corrects that; offset is ROUND_MAGIC plus this number, the form that AVX-512 and AMX need.
 */
INLINE void quantize_group(int8_t *q, float *scale, int32_t *offset, const float *x,
                           const int bits) {
    const int32_t min_bits = (127 - 50) << 23, max_bits = (127 + 90) << 23;     /* 2^-50, 2^90 */
    const int32_t zero_point = bits == 8 ? 128 : 8;
    const size_t width = group_width(bits);
    int32_t n[64], top = 0, total = 0, scale_bits, inv_bits;
    float inv_scale;

    /* top: the bits of max |x| */
    for (size_t l = 0; l < width; l++) {
        float value = x[l];
        int32_t i;
        memcpy(&i, &value, sizeof i);
        top = (i & 0x7fffffff) > top ? i & 0x7fffffff : top;
    }

    /* scale = 2^(e - 6) for the smallest e with top <= 127/64 * 2^e; if top is more than 127/64 of
     * its power of two, adding 0x1ffff carries into the exponent */
    scale_bits = top < min_bits ? min_bits : top > max_bits ? max_bits : top;
    scale_bits = ((scale_bits + 0x1ffff) & 0x7f800000) - (6 << 23);
    inv_bits = (254 << 23) - scale_bits;
    memcpy(&inv_scale, &inv_bits, sizeof inv_bits);

    /* n = round(x / scale), at most 127 in size */
    for (size_t l = 0; l < width; l++) n[l] = quantized(x[l], inv_scale);
    for (size_t l = 0; l < width; l++) q[l] = (int8_t)n[l];
    for (size_t l = 0; l < width; l++) total += n[l];
    if (top > 0x7f800000) scale_bits = 0x7fc00000;              /* there was a NaN */
    memcpy(scale, &scale_bits, sizeof scale_bits);
    *offset = ROUND_MAGIC - zero_point * total;
}

/* Quantizes groups from .. to - 1, counted from the first group of the first vector to the last of
 * the last one. */
INLINE void quantize_body(const struct activations *a, size_t from, size_t to, const int bits) {
    size_t t = from / a->groups, g = from % a->groups, width = group_width(bits);
    size_t at = group_at(a, t, g);
    for (size_t i = from; i < to; i++) {
        size_t n = a->cols - g * width;
        const float *x = a->x + t * a->cols + g * width;
        float filled[64];
        /* the last group of a vector is padded with zeros */
        if (n < width) {
            memset(filled, 0, sizeof filled);
            x = memcpy(filled, x, n * sizeof *x);
        }
        quantize_group(a->q + at * width, a->scale + at, a->offset + at, x, bits);
        at += a->pack;
        if (++g < a->groups) continue;
        /* the next vector may be in another pack */
        g = 0;
        at = group_at(a, ++t, 0);
    }
}

/* ---- Softmax and compensated sums ------------------------------------------------------------ */

/* x[i] = exp(scale * x[i] - *top), after *top became the maximum of itself and all scale * x[i];
 * returns the sum. No exp exceeds 1, so nothing overflows. */
INLINE float softmax_exp_body(float *x, size_t n, float scale, float *top) {
    float most = *top;
    for (size_t i = 0; i < n; i++) x[i] *= scale;
    for (size_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    for (size_t i = 0; i < n; i++) x[i] = exp_approx(x[i] - most);
    *top = most;
    return sum(x, n);
}

/* total[i] += x[i] + its compensation, the rounding error of the addition before. comp has
 * bfloat16s, two in a word: that of total[i] in the upper half of word i, of total[half + i] in
 * the lower half. */
INLINE void compensated_add_body(float *total, float *comp, const float *x, const size_t n) {
    size_t half = (n + 1) / 2;
    for (size_t i = 0; i < half; i++) {
        uint32_t word, low = 0;
        memcpy(&word, comp + i, sizeof word);
        if (half + i < n)
            low = f32_to_bf16(two_sum(total + half + i, x[half + i] + bf16_to_f32(word << 16)));
        word = f32_to_bf16(two_sum(total + i, x[i] + bf16_to_f32(word))) | low >> 16;
        memcpy(comp + i, &word, sizeof word);
    }
}

/* ---- Rows of floats, weighted sums, tiles of quantized weights ------------------------------- */

/* Loads memory into the cache before it is read. Hardware prefetching stops at the end of a page;
 * PREFETCH_WORDS in "Walled off II" says where this is used, and what it gains. */
#ifdef __GNUC__
#define PREFETCH(p) __builtin_prefetch(p)
#define PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)      /* only into the second-level cache */
#else
#define PREFETCH(p) ((void)(p))
#define PREFETCH_L2(p) ((void)(p))
#endif

/* The columns e .. of a weighted sum, as many at a time as stay in registers. In a session values
 * lie behind keys, then comes the next head: prefetching what is FLOATS_AHEAD makes steps of 16 to
 * 64 texts 2 to 3 % faster on Zen 4. */
enum { FLOATS_AHEAD = 4096 };
#define WEIGHTED_SUM(many)                                                                         \
    for (; width - e >= (many); e += (many)) {                                                     \
        float s[many] = { 0 };                                                                     \
        for (size_t i = 0; i < n; i++) {                                                           \
            const float *row = rows + i * stride + e;                                              \
            for (size_t l = 0; (many) == 64 && l < 64; l += 16)                                    \
                PREFETCH_L2(row + FLOATS_AHEAD + l);                                               \
            for (size_t l = 0; l < (many); l++) s[l] += w[i] * row[l];                             \
        }                                                                                          \
        for (size_t l = 0; l < (many); l++) out[e + l] = s[l];                                     \
    }

#ifndef BASED_NARROW
/* Four dot products with the same x. One row alone is bound by latency: each addition waits for the
 * previous one of its lane. The four sums have names because gcc 12 leaves an array s[4][LANES] in
 * memory, which takes 1.4 to 3.4 times the instructions. prefetch: also load the next four rows. */
INLINE void dot4(float out[4], const float *w, size_t stride, const float *x, size_t n,
                 const int prefetch) {
    float s0[LANES] = { 0 }, s1[LANES] = { 0 }, s2[LANES] = { 0 }, s3[LANES] = { 0 };
    const float *w1 = w + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    size_t i = 0;
    for (; n - i >= LANES; i += LANES) {
        for (size_t r = 4; r < 8 && prefetch; r++) PREFETCH(w + r * stride + i);
        for (size_t l = 0; l < LANES; l++) {
            s0[l] += w[i + l] * x[i + l];
            s1[l] += w1[i + l] * x[i + l];
            s2[l] += w2[i + l] * x[i + l];
            s3[l] += w3[i + l] * x[i + l];
        }
    }
    for (size_t l = 0; i < n; l++, i++) {
        s0[l] += w[i] * x[i];
        s1[l] += w1[i] * x[i];
        s2[l] += w2[i] * x[i];
        s3[l] += w3[i] * x[i];
    }
    out[0] = horizontal_sum(s0);
    out[1] = horizontal_sum(s1);
    out[2] = horizontal_sum(s2);
    out[3] = horizontal_sum(s3);
}

/* For the first vector, weights come from memory: reading them in order, one row after the other,
 * is fastest, unless the kernel prefetches. For all other vectors, and in short rows, the weights
 * are in a cache, and four rows at a time are faster. */
INLINE void rows_f32_body(float *out, size_t out_stride, const float *w, size_t rows,
                          const struct activations *x, const int prefetch) {
    size_t cols = x->cols;
    for (size_t r = 0; r < rows; r += 4, w += 4 * cols)
        for (size_t t = 0; t < x->n; t++) {
            const float *v = x->x + t * cols;
            float *y = out + t * out_stride + r;
            if (rows - r < 4 || !(prefetch || t > 0 || cols < 256))
                for (size_t i = 0; i < 4 && i < rows - r; i++) y[i] = dot(w + i * cols, v, cols);
            else if (prefetch && t == 0) dot4(y, w, cols, v, cols, 1);
            else dot4(y, w, cols, v, cols, 0);
        }
}

/* out = sum of w[i] * rows[i]. All of attention is this one sum: scores (rows: coordinates of the
 * keys), outputs (rows: values), and reading the Taylor state (rows: features). */
INLINE void weighted_sum_body(float *out, const float *w, const float *rows, size_t n, size_t width,
                              size_t stride, const int columns) {
    size_t e = 0;
    if (columns == 32) WEIGHTED_SUM(64) /* AVX-512: others keep 64 sums in memory */
    WEIGHTED_SUM(32)
    WEIGHTED_SUM(8)
    WEIGHTED_SUM(1)
}

/* For each group: y[r] += (float)(offset + sum of w * q) * scale of row r * scale of x. Words of a
 * group: 8 bits: word 16 c + r holds columns 4c .. 4c+3 of row r; 4 bits: columns 8c .. 8c+3 in the
 * low halves of its bytes, 8c+4 .. 8c+7 in the high halves. */
INLINE void tile_generic(TILE, const int bits) {
    for (size_t t = from; t < to; t++, out += out_stride) {
        float y[16] = { 0 };
        for (size_t g = 0; g < x->groups; g++) {
            size_t at = group_at(x, t, g), quads = group_columns(x, g, bits) / 4;
            int32_t s[16], offset = x->offset[at] - ROUND_MAGIC;
            for (size_t r = 0; r < 16; r++) s[r] = offset;
            /* four columns of all sixteen rows */
            for (size_t c = 0; c < quads; c++) {
                const int8_t *q = x->q + at * group_width(bits) + 4 * c;
                const uint32_t *word = w + g * group_words(bits) + 16 * (bits == 8 ? c : c / 2);
                for (size_t r = 0; r < 16; r++) {
                    uint32_t v = word[r];
                    if (bits == 4) v = (c % 2 ? v >> 4 : v) & 0x0f0f0f0f;
                    s[r] += (int32_t)(v & 255) * q[0] + (int32_t)(v >> 8 & 255) * q[1]
                          + (int32_t)(v >> 16 & 255) * q[2] + (int32_t)(v >> 24) * q[3];
                }
            }
            for (size_t r = 0; r < 16; r++) {
                float scale = bf16_to_f32(scales[g * 8 + r / 2] << (r % 2 ? 0 : 16));
                y[r] += (float)s[r] * scale * x->scale[at];
            }
        }
        memcpy(out, y, sizeof y);
    }
}
#else
/* "Walled off I" defines them. gcc and clang inline functions that are defined later, too. */
INLINE void rows_f32_body(float *out, size_t out_stride, const float *w, size_t rows,
                          const struct activations *x, const int prefetch);
INLINE void weighted_sum_body(float *out, const float *w, const float *rows, size_t n, size_t width,
                              size_t stride, const int columns);
INLINE void tile_generic(TILE, const int bits);
#endif

enum { ROWS_IN_CACHE = 64 };

/* For `many` columns of four outputs: y += sum of w[i * step_i] * rows[i]. The four sums have names
 * for the same reason as in dot4; gcc 12 vectorizes this form only. */
INLINE void weighted_sums_tile(float *const *y, size_t e, const float *const *w, size_t step_i,
                               const float *rows, size_t n, size_t stride, const size_t many) {
    float s0[32], s1[32], s2[32], s3[32];
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    for (size_t l = 0; l < many; l++) s0[l] = y[0][e + l];
    for (size_t l = 0; l < many; l++) s1[l] = y[1][e + l];
    for (size_t l = 0; l < many; l++) s2[l] = y[2][e + l];
    for (size_t l = 0; l < many; l++) s3[l] = y[3][e + l];
    for (size_t i = 0; i < n; i++) {
        const float *row = rows + i * stride + e;
        const float a0 = w0[i * step_i], a1 = w1[i * step_i];
        const float a2 = w2[i * step_i], a3 = w3[i * step_i];
        for (size_t l = 0; many > 1 && l < many; l += 16)
            PREFETCH(row + ROWS_IN_CACHE * stride + l);
        for (size_t l = 0; l < many; l++) {
            s0[l] += a0 * row[l];
            s1[l] += a1 * row[l];
            s2[l] += a2 * row[l];
            s3[l] += a3 * row[l];
        }
    }
    for (size_t l = 0; l < many; l++) y[0][e + l] = s0[l];
    for (size_t l = 0; l < many; l++) y[1][e + l] = s1[l];
    for (size_t l = 0; l < many; l++) y[2][e + l] = s2[l];
    for (size_t l = 0; l < many; l++) y[3][e + l] = s3[l];
}

/* A matrix product whose sums have the order of weighted_sum. Some rows at a time are read for all
 * outputs, so that they come from memory once and from then on from the cache; the rows after them
 * are prefetched. With 64 rows of 128 floats and 12 outputs AVX-512 reaches 33 GMAC/s of about 40;
 * with 256 rows and without prefetching, 14. If there are fewer than four outputs, the last one is
 * computed several times. */
INLINE void weighted_sums_body(float *const *out, size_t m, const float *w, size_t step_i,
                               size_t step_j, const float *rows, size_t n, size_t width,
                               size_t stride, const int columns) {
    if (m == 1 && step_i == 1) {
        weighted_sum_body(out[0], w, rows, n, width, stride, columns);
        return;
    }
    for (size_t j = 0; j < m; j++) memset(out[j], 0, width * sizeof *out[j]);
    for (size_t from = 0, many; from < n; from += many, rows += many * stride) {
        many = n - from < ROWS_IN_CACHE ? n - from : ROWS_IN_CACHE;
        for (size_t j = 0; j < m; j += 4) {
            float *y[4];
            const float *v[4];
            size_t e = 0;
            for (size_t i = 0; i < 4; i++) {
                size_t at = j + i < m ? j + i : m - 1;
                y[i] = out[at];
                v[i] = w + from * step_i + at * step_j;
            }
            for (; columns == 32 && width - e >= 32; e += 32)
                weighted_sums_tile(y, e, v, step_i, rows, many, stride, 32);
            for (; columns >= 16 && width - e >= 16; e += 16)
                weighted_sums_tile(y, e, v, step_i, rows, many, stride, 16);
            for (; e < width; e++) weighted_sums_tile(y, e, v, step_i, rows, many, stride, 1);
        }
    }
}

/* Dot products with the columns of a (n, m), in the order of dot: lane l adds rows l, l + 16 ... */
INLINE void dot_columns_body(float *out, size_t m, const float *a, const float *b, size_t n) {
    if (m == 1) {
        *out = dot(a, b, n);
        return;
    }
    for (size_t j = 0, many; j < m; j += many) {
        float lane[LANES][LANES];
        many = m - j < LANES ? m - j : LANES;
        for (size_t l = 0; l < LANES; l++) {
            float s[LANES] = { 0 };
            if (many == LANES)
                for (size_t i = l; i < n; i += LANES)
                    for (size_t c = 0; c < LANES; c++) s[c] += a[i * m + j + c] * b[i];
            else
                for (size_t i = l; i < n; i += LANES)
                    for (size_t c = 0; c < many; c++) s[c] += a[i * m + j + c] * b[i];
            memcpy(lane[l], s, sizeof s);
        }
        for (size_t half = LANES / 2; half; half /= 2)
            for (size_t l = 0; l < half; l++)
                for (size_t c = 0; c < many; c++) lane[l][c] += lane[l + half][c];
        memcpy(out + j, lane[0], many * sizeof *out);
    }
}

/* ---- The checksum, as based.h part 7 defines it: five times as fast with AVX2 ---------------- */
INLINE uint64_t checksum_body(const unsigned char *p, size_t n) {
    uint32_t lane[16];
    uint64_t g = n;
    size_t i = 0;
    /* sixteen lanes, each a hash of every sixteenth word, so that they can run side by side */
    for (uint32_t l = 0; l < 16; l++) lane[l] = l + 1;
    for (; n - i >= 64; i += 64)
        for (int l = 0; l < 16; l++) {
            const unsigned char *b = p + i + 4 * l;
            uint32_t w = (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16
                         | (uint32_t)b[3] << 24;
            lane[l] = lane[l] * 0x9e3779b1u + w;
        }
    /* the rest, the last word padded with zeros */
    for (int l = 0; i < n; l++) {
        uint32_t w = 0;
        for (int byte = 0; byte < 4 && i < n; byte++) w |= (uint32_t)p[i++] << (8 * byte);
        lane[l] = lane[l] * 0x9e3779b1u + w;
    }
    for (int l = 0; l < 16; l++) {
        g = (g ^ lane[l]) * 0x9e3779b97f4a7c15u;
        g ^= g >> 32;
    }
    return g;
}

/* ---- Sets of kernels: `target` is the attribute that selects the instruction set ------------- */
#define ROWS_KERNEL(set, target, prefetch)                                                         \
    target static void rows_f32_##set(float *out, size_t out_stride, const float *w, size_t rows,  \
                                      const struct activations *x) {                               \
        rows_f32_body(out, out_stride, w, rows, x, prefetch);                                      \
    }
/* A constant (n == 32, 8 bits, 4 bits) lets the compiler vectorize and unroll. */
#define FLOAT_KERNELS(set, target, columns)                                                        \
    target static void weighted_sum_##set(float *out, const float *w, const float *rows, size_t n, \
                                          size_t width, size_t stride) {                           \
        weighted_sum_body(out, w, rows, n, width, stride, columns);                                \
    }                                                                                              \
    target static void weighted_sums_##set(float *const *out, size_t m, const float *w,            \
                                           size_t step_i, size_t step_j, const float *rows,        \
                                           size_t n, size_t width, size_t stride) {                \
        weighted_sums_body(out, m, w, step_i, step_j, rows, n, width, stride, columns);            \
    }                                                                                              \
    target static void dot_columns_##set(float *out, size_t m, const float *a, const float *b,     \
                                         size_t n) {                                               \
        dot_columns_body(out, m, a, b, n);                                                         \
    }                                                                                              \
    target static void mul_add_##set(float *y, const float *a, const float *x, size_t n) {         \
        for (size_t i = 0; i < n; i++) y[i] += a[i] * x[i];                                        \
    }                                                                                              \
    target static void silu_mul_##set(float *y, const float *gate, const float *value, size_t n) { \
        for (size_t i = 0; i < n; i++) y[i] = silu(gate[i]) * value[i];                            \
    }                                                                                              \
    target static float softmax_exp_##set(float *x, size_t n, float scale, float *top) {           \
        return softmax_exp_body(x, n, scale, top);                                                 \
    }                                                                                              \
    target static void compensated_add_##set(float *total, float *comp, const float *x, size_t n) {\
        if (n == 32) compensated_add_body(total, comp, x, 32);                                     \
        else compensated_add_body(total, comp, x, n);                                              \
    }                                                                                              \
    target static void quantize_##set(const struct activations *a, size_t from, size_t to) {       \
        if (a->bits == 8) quantize_body(a, from, to, 8);                                           \
        else quantize_body(a, from, to, 4);                                                        \
    }                                                                                              \
    target static uint64_t checksum_##set(const unsigned char *p, size_t n) {                      \
        return checksum_body(p, n);                                                                \
    }
#define TILE_KERNELS(set, target)                                                                  \
    target static void q8_##set(TILE) { tile_##set(out, out_stride, scales, w, x, from, to, 8); }  \
    target static void q4_##set(TILE) { tile_##set(out, out_stride, scales, w, x, from, to, 4); }
#define KERNELS(set, name, begin, end, rows, tile, floats)                                         \
    static const struct matmul_kernels set##_matmul = {                                            \
        begin, end, rows_f32_##rows, { q8_##tile, q4_##tile }, quantize_##floats,                  \
        checksum_##floats                                                                          \
    };                                                                                             \
    static const struct kernels set##_kernels = {                                                  \
        name, &set##_matmul, weighted_sum_##floats, weighted_sums_##floats, dot_columns_##floats,  \
        mul_add_##floats, silu_mul_##floats, softmax_exp_##floats, compensated_add_##floats        \
    };

ROWS_KERNEL(generic, , 0)
#ifdef BASED_NARROW
FLOAT_KERNELS(generic, , 1)
#else
FLOAT_KERNELS(generic, , 16)
#endif
TILE_KERNELS(generic, )
KERNELS(generic, "plain", NULL, NULL, generic, generic, generic)

/* ---- Norm and residual by many threads ----------------------------------------------------------
 * Instead of waiting for another thread's norm and quantized vector of a single token, each thread
 * computes all of both by itself: thread i in row i of x_norm and xq, if there are so many rows. So
 * one token needs a third of the barriers, and two threads write 1.13 times as fast with 15 million
 * weights on Zen 4.
 */
static int by_itself(const struct thread *th, size_t n) {
    return n == 1 && th->count <= th->s->block;
}

static size_t my_row(size_t n, const struct thread *th, size_t end) {
    size_t row = 16 * partition((n + 15) / 16, th, end);
    return row < n ? row : n;
}

static const float *normalize_rows(const float *x, const struct norm *norm, size_t n,
                                   const struct thread *th) {
    size_t dim = th->s->m->c->dim;
    float *out = th->s->x_norm;
    if (by_itself(th, n)) {
        normalize(out += th->id * dim, x, norm, dim);
        return out;
    }
    FOR_MY_PART(r, n) normalize(out + r * dim, x + r * dim, norm, dim);
    barrier(th);
    return out;
}

static void add_residual(const float *y, uint32_t flags, size_t n, const struct thread *th) {
    size_t dim = th->s->m->c->dim;
    float *x = th->s->x;
    for (size_t r = 0; r < n; r++, x += dim, y += dim)
        for (size_t e = my_row(dim, th, 0), end = my_row(dim, th, 1); e < end; e++)
            x[e] = (flags & BASED_NO_RESIDUAL ? 0.0f : x[e]) + y[e];
    barrier(th);
}

/* ---- Matrix times vectors, and the embedding ----------------------------------------------------
 * out[t][r] = (row first + r of a) . x[t] + bias, for `rows` rows and n vectors x (n, cols). first
 * is a multiple of 16. Weights are read once for all vectors. A number is the same sum for any n
 * and any number of threads. All threads must have written x before the call. After it, each has
 * its own part of out, and needs a barrier before it reads what others have computed.
 */
static void matmul(float *out, size_t out_stride, const struct matrix *a, size_t first, size_t rows,
                   const float *x, size_t n, const struct thread *th) {
    const based_session *p = th->s;
    const struct matmul_kernels *mm = p->m->k->mm;
    const int bits = bits_of(a->dtype), alone = by_itself(th, n);
    const size_t own = alone ? th->id : 0, count = (rows + 15) / 16 / a->parts;
    struct activations act = { x, (int8_t *)p->xq + own * p->m->widest_q,
                               p->xq_scale + own * p->m->most_groups,
                               (int32_t *)(void *)p->xq_offset + own * p->m->most_groups, n,
                               a->cols, groups(a->cols, bits), pack_of(n), bits };
    /* quantized weights need quantized vectors; each thread quantizes some of the groups */
    if (a->dtype != BASED_F32) {
        mm->quantize(&act, alone ? 0 : partition(n * act.groups, th, 0),
                     alone ? act.groups : partition(n * act.groups, th, 1));
        if (!alone) barrier(th);
    }
    /* each thread computes some of the tiles of 16 rows */
    for (size_t part = 0; part < a->parts; part++) FOR_MY_PART(j, count) {
        size_t i = part * count + j, row = first + 16 * i;
        size_t many = rows - 16 * i < 16 ? rows - 16 * i : 16;
        float *to = out + 16 * i;                       /* (n, many), out_stride apart */
        if (a->dtype == BASED_F32) {
            mm->rows_f32(to, out_stride, a->data + row * a->cols, many, &act);
        } else {
            const uint32_t *scales = a->scales + row / 16 * act.groups * 8;
            const uint32_t *words = a->words + row / 16 * tile_words(a->cols, bits);
            if (many == 16) mm->tile[bits == 4](to, out_stride, scales, words, &act, 0, n);
            /* of the last tile, rows of padding must not be written to out */
            for (size_t t = 0; many < 16 && t < n; t++) {
                float y[16];
                mm->tile[bits == 4](y, 16, scales, words, &act, t, t + 1);
                memcpy(to + t * out_stride, y, many * sizeof *y);
            }
        }
    }
    /* the bias, in the order of memory: tile by tile, each number would come from a slower cache */
    for (size_t t = 0; a->bias && t < n; t++, out += out_stride)
        for (size_t part = 0; part < rows; part += rows / a->parts)
            for (size_t r = part + my_row(rows / a->parts, th, 0),
                        end = part + my_row(rows / a->parts, th, 1); r < end; r++)
                out[r] += a->bias[first + r];
}

/* x (cols) = one row of a quantized matrix. */
static void dequantize_row(float *x, const struct matrix *a, size_t row) {
    int bits = bits_of(a->dtype);
    size_t r = row % 16, tile = row / 16, width = group_width(bits);
    const uint32_t *word = a->words + tile * tile_words(a->cols, bits) + r;
    const uint32_t *two = a->scales + tile * groups(a->cols, bits) * 8 + r / 2;
    for (size_t e = 0; e < a->cols; e++) {
        /* column e is in byte e % 4 of its word; of 4 bits, two columns share a byte */
        size_t c = e / 4;
        uint32_t v = bits == 8 ? word[16 * c] >> (e % 4 * 8) & 255
                               : word[16 * (c / 2)] >> (e % 4 * 8 + c % 2 * 4) & 15;
        float scale = bf16_to_f32(two[e / width * 8] << (r % 2 ? 0 : 16));
        x[e] = (float)((int32_t)v - (bits == 8 ? 128 : 8)) * scale;
    }
}

/* x (dim) = row `token` of the embedding. */
static void embed(float *x, const based_model *m, int32_t token) {
    const struct matrix *a = &m->embedding;
    if (a->dtype != BASED_F32) dequantize_row(x, a, (size_t)token);
    else memcpy(x, a->data + (size_t)token * a->cols, a->cols * sizeof *x);
}

/* ==== 11. Errors =================================================================================
 * Why: a call that fails returns a status and writes one line: what was found, where, what was
 * expected, what to do. The core runs on machines without stdio, so a small formatter writes it.
 * May assume: formats are literals of this file. The formatter knows %s, %d (int32_t), %u
 * (uint32_t), %zu (size_t) and %llu (uint64_t), spelled as in printf, so that a compiler can check
 * the arguments: tests/test_refusals.c has it do so.
 * Later code relies on: fail returns the status it is given, for `return fail(...)`. A line that is
 * too long is cut off, and e may be NULL.
 */
#include <stdarg.h>

static int fail(based_error *e, int status, const char *format, ...) {
    va_list args;
    size_t at = 0;
    if (!e) return status;
    va_start(args, format);
    for (const char *f = format; *f; f++) {
        const char *piece = f;          /* what comes next: a character, a string, or digits */
        char digits[21];                /* filled from its end */
        size_t n = 1, first = sizeof digits;
        if (*f == '%' && *++f == 's') {
            piece = va_arg(args, const char *);
            n = strlen(piece);
        } else if (*piece == '%') {
            int32_t d = *f == 'd' ? va_arg(args, int32_t) : 0;
            uint64_t value = (uint64_t)(d < 0 ? -(int64_t)d : d);
            if (*f == 'u') value = va_arg(args, uint32_t);
            if (*f == 'z') value = va_arg(args, size_t), f += 1;
            if (*f == 'l') value = va_arg(args, uint64_t), f += 2;
            do digits[--first] = (char)('0' + value % 10); while (value /= 10);
            if (d < 0) digits[--first] = '-';
            piece = digits + first;
            n = sizeof digits - first;
        }
        for (size_t i = 0; i < n && at + 1 < sizeof e->text; i++) e->text[at++] = piece[i];
    }
    va_end(args);
    e->text[at] = 0;
    e->status = status;
    return status;
}

/* ==== 12. Other ways to feed =====================================================================
 * Why: some models take vectors instead of tokens, some look at a whole input in both directions,
 * and a server computes the next token of many sessions at once.
 * May assume: nothing of the arguments; a refused call leaves every session as it was.
 * Later code relies on: all of them end in the same forward pass, row by row, so they give the same
 * bits as feeding one token after the other.
 */

/* A bidirectional model that only looks back computes something it was not trained for, and its
 * output does not show it. */
static int check_direction(const based_model *m, based_error *e) {
    if (!(m->c->flags & BASED_BIDIRECTIONAL)) return BASED_OK;
    return INVALID(e, "this model looks at all inputs of a window in both directions: use "
                   "based_feed_bidirectional, or export it with --mode causal, for which it was "
                   "not trained");
}

static int check_tokens(const based_model *m, const int32_t *tokens, size_t n, based_error *e) {
    const based_config *c = m->c;
    int status = check_direction(m, e);
    if (status) return status;
    if (c->input)
        return INVALID(e, "this model takes vectors of %u floats, not tokens", c->input);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= c->vocab)
            return INVALID(e, "token %zu of %zu is %d, but the vocabulary has %u",
                        i + 1, n, tokens[i], c->vocab);
    return BASED_OK;
}

/* s->x (n, dim) = x (n, input), through the input projection if there is one; n <= block. */
static void project_input(based_session *s, const float *x, size_t n) {
    const based_model *m = s->m;
    if (m->input.data)
        matmul(s->x, m->c->dim, &m->input, 0, m->c->dim, x, n, &(struct thread){ s, 0, 1 });
    else memcpy(s->x, x, n * m->c->dim * sizeof *x);
    for (size_t i = 0; i < n * m->c->input; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        s->history = based_history_of(s->history, &bits, 1);
    }
}

int based_step(based_session *s, int32_t token, based_error *e) {
    return based_feed(s, &token, 1, NULL, e);
}

int based_feed_vectors(based_session *s, const float *x, size_t n, float *out, based_error *e) {
    int status = check_direction(s->m, e);
    if (status) return status;
    if (!s->m->c->input) return INVALID(e, "this model takes tokens, not vectors");
    feed(s, NULL, x, n, out);
    return BASED_OK;
}

int based_feed_bidirectional(based_session *s, const float *x, size_t n, float *out,
                             based_error *e) {
    const based_model *m = s->m;
    if (!m->c->input) return INVALID(e, "this model takes tokens, not vectors");
    if (n == 0 || n > s->block)
        return INVALID(e, "a window of %zu inputs, but the session was made for blocks "
                    "of 1 to %u", n, s->block);
    for (uint32_t i = 0; i < m->c->layers; i++)
        if (m->layer[i].c->mixer == BASED_CONV || m->layer[i].c->window)
            return INVALID(e, "layer %u mixes by a convolution or a sliding window, which only "
                           "look back", i);
    based_reset(s);
    s->bidirectional = 1;
    feed(s, NULL, x, n, out);
    s->bidirectional = 0;
    return BASED_OK;
}

int based_feed_prefix(based_session *s, const int32_t *tokens, size_t n, float *logits,
                      based_error *e) {
    const based_model *m = s->m;
    size_t most = m->c->prefix < s->block ? m->c->prefix : s->block;
    int status = check_tokens(m, tokens, n, e);
    if (status) return status;
    if (!m->c->prefix) return INVALID(e, "this model has no prefix layers; use based_feed");
    if (s->count) return INVALID(e, "a prefix must come first, but tokens were fed already");
    if (n == 0 || n > most)
        return INVALID(e, "a prefix of %zu tokens; expected 1 to %zu, the smaller of the session's "
                       "block and the model's prefix", n, most);
    s->state[m->state - 1] = (float)n;
    s->in_prefix = 1;
    feed(s, tokens, NULL, n, logits);
    s->in_prefix = 0;
    s->history = based_history_of(s->history, tokens, n);
    return BASED_OK;
}

/* The first session lends its scratch memory; each row of the block belongs to another session. */
int based_step_many(based_session *const *s, const int32_t *tokens, size_t n, based_error *e) {
    based_session *lead = n ? s[0] : NULL;
    int status = n ? check_tokens(lead->m, tokens, n, e) : BASED_OK;
    if (status) return status;
    if (n && n > lead->block)
        return INVALID(e, "%zu sessions at once, but the first was made for blocks of %u", n,
                       lead->block);
    for (size_t r = 0; r < n; r++) {
        if (s[r]->m != lead->m)
            return INVALID(e, "session %zu is over another model", r);
        for (size_t other = 0; other < r; other++)
            if (s[other] == s[r]) return INVALID(e, "session %zu is given twice", r);
    }
    for (size_t r = 0; r < n; r++) {
        lead->row[r] = (struct row){ s[r], s[r]->count, s[r]->logits, NULL };
        embed(lead->x + r * lead->m->c->dim, lead->m, tokens[r]);
    }
    if (n) run_threads(lead, n, n);
    for (size_t r = 0; r < n; r++) {
        s[r]->row->old = NULL;
        s[r]->count++;
        s[r]->history = based_history_of(s[r]->history, tokens + r, 1);
    }
    return BASED_OK;
}

/* ---- Guesses, which can be taken back -------------------------------------------------------- */

/* How many of n tokens can be fed now so that all but the first can be taken back: the first may be
 * the one for which a chunk is flushed, but no other, and no two may overwrite the same key. */
static size_t draft_length(const based_session *s, size_t n) {
    struct row next = { .s = (based_session *)s, .t = s->count };
    n = n < s->block ? n : s->block;
    for (uint32_t i = 0; i < s->m->c->layers; i++) {
        const struct layer *l = &s->m->layer[i];
        size_t most = n;
        if (l->c->mixer == BASED_WINDOW) most = l->c->window;
        if (l->c->mixer == BASED_TAYLOR) {
            most = kv_capacity(&l->taylor.c) - head_state_of(&next, l, 0).n_recent;
            /* with fixed fading a flush changes values that are no longer used */
            if (!most) most = l->taylor.fading == BASED_FIXED ? 1 : l->taylor.c.chunk;
        }
        n = n < most ? n : most;
    }
    return n;
}

/* old = n numbers of a state, or the other way round */
static void exchange(float *old, float *now, size_t n, size_t stride, int back) {
    for (size_t i = 0; i < n; i++, now += stride) {
        if (back) *now = old[i];
        else old[i] = *now;
    }
}

/* The same for the key and the value in whose place those of a guess come. */
static void exchange_pair(const struct row *row, const struct layer *l, size_t head, int back) {
    size_t dk = l->c->head_dim_k, dv = l->c->head_dim_v, stride = l->c->window;
    float *old = old_of(row, l) + head * (dk + dv);
    float *k = state_of(row, l) + head * stride * (dk + dv), *v = k + stride * dk;
    size_t at = l->c->mixer == BASED_WINDOW ? (size_t)(row->t % stride) : 0;
    if (l->c->mixer == BASED_TAYLOR) {
        struct row next = { .s = row->s, .t = row->t + 1 };
        struct head_state s = head_state_of(&next, l, head);
        k = s.k, v = s.v, at = s.n_recent - 1, stride = kv_capacity(&l->taylor.c);
    }
    exchange(old, k + at, dk, stride, back);
    exchange(old + dk, v + at * dv, dv, 1, back);
}

/* Before a mixer runs: what the tokens behind the first will overwrite. Each thread keeps what it
 * overwrites itself; what guesses overwrite of each other is not yet in the state. */
static void keep_old(const struct layer *l, const struct thread *th, size_t n) {
    based_session *s = th->s;
    const based_layer *c = l->c;
    size_t channels = c->head_dim_v, half = l->in.cols / 2;
    size_t past = c->mixer == BASED_CONV ? c->conv_width - 1 : 0;
    for (size_t r = 1; r < n; r++) {
        const struct row *row = &s->row[r];
        float *old = old_of(row, l);
        if (c->mixer != BASED_CONV)
            FOR_MY_PART(head, c->kv_heads) exchange_pair(row, l, head, 0);
        else for (size_t e = my_row(channels, th, 0); past && e < my_row(channels, th, 1); e++)
            old[e] = r < past ? state_of(row, l)[row->t % past * channels + e]
                              : s->proj[(r - past) * 2 * channels + e];
        /* the last channels of the row before */
        if ((c->flags & BASED_SHIFT) && th->id == 0)
            memcpy(old + old_floats(l) - half, s->x + r * l->in.cols - half, half * sizeof *old);
    }
}

/* Takes a guess back in one layer. */
static void put_back(const struct row *row, const struct layer *l) {
    const based_layer *c = l->c;
    float *old = old_of(row, l);
    size_t past = c->mixer == BASED_CONV ? c->conv_width - 1 : 0, dim = l->in.cols, half = dim / 2;
    if (past)
        exchange(old, state_of(row, l) + row->t % past * c->head_dim_v, c->head_dim_v, 1, 1);
    for (size_t head = 0; head < c->kv_heads; head++) {
        exchange_pair(row, l, head, 1);
        if (l->taylor.fading)
            exchange(old_fade(row, l, head), head_state_of(row, l, head).fade,
                     kv_capacity(&l->taylor.c) + 1, 1, 1);
    }
    if (c->flags & BASED_SHIFT)
        exchange(old + old_floats(l) - half, row->s->state + l->shift + dim - half, half, 1, 1);
}

size_t based_draft_width(const based_model *m) {
    size_t n = sizeof(uint64_t) / sizeof(float);
    for (uint32_t i = 0; i < m->c->layers; i++) n += old_floats(&m->layer[i]);
    return n;
}

int64_t based_feed_draft(based_session *s, const int32_t *tokens, size_t n, float *logits,
                         float *old, based_error *e) {
    const based_model *m = s->m;
    size_t width = based_width(m), kept = based_draft_width(m);
    int status = check_tokens(m, tokens, n, e);
    if (status) return status;
    if (!n) return INVALID(e, "a draft of no tokens; the first one must be certain");
    n = draft_length(s, n);
    for (size_t r = 0; r < n; r++) {
        s->row[r] = (struct row){ s, s->count + r, logits + r * width, old + r * kept };
        memcpy(s->row[r].old, &s->history, sizeof s->history);
        s->history = based_history_of(s->history, tokens + r, 1);
        embed(s->x + r * m->c->dim, m, tokens[r]);
    }
    run_threads(s, n, n);
    memcpy(s->logits, logits + (n - 1) * width, width * sizeof *logits);
    s->count += n;
    return (int64_t)n;
}

int based_keep(based_session *s, size_t n, based_error *e) {
    const struct row *row = s->row;
    size_t fed = row->old ? (size_t)(s->count - row->t) : 0;
    if (n == 0 || n > fed)
        return INVALID(e, "%zu tokens to keep of a draft of %zu; expected 1 to all of them, of the "
                       "last call that fed", n, fed);
    for (size_t r = fed; r-- > n; s->count--)
        for (uint32_t i = 0; i < s->m->c->layers; i++) put_back(&row[r], &s->m->layer[i]);
    if (n < fed) {
        memcpy(&s->history, row[n].old, sizeof s->history);
        memcpy(s->logits, row[n - 1].out, based_width(s->m) * sizeof *s->logits);
    }
    s->row->old = NULL;
    return BASED_OK;
}

/* ==== 13. A hostile file =========================================================================
 * Why: a checkpoint may be damaged, cut off, or made to break this program. based.h part 7
 * describes its bytes. Three steps: check every field of the header against its range; walk the
 * sections in file order and point at them; check that they end where the file ends. Nothing is
 * copied.
 * May assume: the bytes are aligned to 64 and do not change. Nothing is assumed about their values.
 * Later code relies on: no field exceeds its maximum in based.h, so 64-bit sizes cannot overflow;
 * heads divide evenly; features fit in 32 bits; scales are within the range that exact products
 * need. Weights may be NaN or infinite: based_check_weights looks for them.
 */

/* ---- Checking: a field outside its range is named, with what was expected ------------------- */

struct field { const char *name; uint32_t value, low, high; };
#define FIELD(c, name, low, high) { #name, (c)->name, low, high }
#define CHECK_FIELDS(status, where, layer, e, ...)                                                 \
    do {                                                                                           \
        const struct field f_[] = { __VA_ARGS__ };                                                 \
        if (check_fields(f_, COUNT(f_), status, where, layer, e)) return status;                   \
    } while (0)

static int check_fields(const struct field *f, size_t n, int status, const char *where,
                        uint32_t layer, based_error *e) {
    for (size_t i = 0; i < n; i++)
        if (f[i].value < f[i].low || f[i].value > f[i].high)
            return fail(e, status, "%s %u: %s is %u, expected %u to %u; the checkpoint is damaged "
                        "or from another tool", where, layer, f[i].name, f[i].value, f[i].low,
                        f[i].high);
    return BASED_OK;
}

/* Reserved fields must be zero, because a later version may give them a meaning. */
static int check_reserved(const uint32_t *word, size_t n, const char *where, uint32_t layer,
                          based_error *e) {
    for (size_t i = 0; i < n; i++)
        if (word[i])
            return DAMAGED(e, "%s %u: a reserved field is %u, expected 0; the checkpoint is "
                           "damaged or from a later version", where, layer, word[i]);
    return BASED_OK;
}

static int check_config(const based_config *c, based_error *e) {
    CHECK_FIELDS(BASED_EFORMAT, "header", 0, e,
        FIELD(c, flags, 0, BASED_TIED | BASED_HEAD_BIAS | BASED_INPUT_PROJECTION
                           | BASED_BIDIRECTIONAL | BASED_SAMPLING),
        FIELD(c, dim, 1, BASED_MAX_DIM),
        FIELD(c, layers, 1, BASED_MAX_LAYERS),
        FIELD(c, vocab, 0, BASED_MAX_VOCAB),
        FIELD(c, rows, c->vocab, c->vocab ? BASED_MAX_VOCAB : 0),
        FIELD(c, input, 0, BASED_MAX_DIM),
        FIELD(c, final_norm, 0, BASED_NORM_L2),
        FIELD(c, embedding_dtype, 0, BASED_Q4),
        FIELD(c, head_dtype, 0, BASED_Q4),
        FIELD(c, prefix, 0, c->input || (c->flags & BASED_BIDIRECTIONAL) ? 0 : BASED_MAX_BLOCK));
    if (check_reserved(c->reserved, COUNT(c->reserved), "header", 0, e)) return BASED_EFORMAT;
    if (c->name[63]) return DAMAGED(e, "header: the name is not terminated");
    if (!is_finite(c->final_norm_eps))
        return DAMAGED(e, "header: final_norm_eps is not a number");
    if (c->input == 0 && c->rows == 0)
        return DAMAGED(e, "header: neither an embedding (rows) nor input vectors (input)");
    if ((c->flags & BASED_TIED) && (c->input || c->head_dtype != c->embedding_dtype))
        return DAMAGED(e, "header: a tied head needs an embedding of the same dtype");
    if (c->input && c->input != c->dim && !(c->flags & BASED_INPUT_PROJECTION))
        return DAMAGED(e, "header: input vectors of width %u without a projection to "
                    "dim %u", c->input, c->dim);
    if (c->input == 0 && (c->flags & BASED_INPUT_PROJECTION))
        return DAMAGED(e, "header: an input projection without input vectors");
    based_sampler s = {
        .temperature = c->temperature, .top_p = c->top_p, .top_k = c->top_k, .min_p = c->min_p,
        .repeat_penalty = c->repeat_penalty, .repeat_last_n = c->repeat_last_n
    };
    if (c->flags & BASED_SAMPLING) return check_sampler(&s, BASED_EFORMAT, e);
    if (s.temperature != 0.0f || s.top_p != 0.0f || s.top_k || s.min_p != 0.0f
        || s.repeat_penalty != 0.0f || s.repeat_last_n)
        return DAMAGED(e, "header: sampling settings without the flag SAMPLING, expected 0");
    return BASED_OK;
}

/* What a taylor layer computes for each of its key/value heads; coefficients are set later. */
static based_taylor_config taylor_config_of(const based_layer *l) {
    return (based_taylor_config){
        l->head_dim_k, l->head_dim_v, l->kv_heads ? l->heads / l->kv_heads : 1, l->degree,
        l->kernel, l->normalizer, l->chunk, l->window, l->sinks, l->scale, l->normalizer_eps,
        l->decay, NULL
    };
}

/* The rules of Taylor attention, for a layer and for based_taylor_init. */
static int check_taylor(const based_taylor_config *t, int status, const char *where, uint32_t i,
                        based_error *e) {
    CHECK_FIELDS(status, where, i, e,
        FIELD(t, kernel, 0, BASED_HEDGEHOG),
        FIELD(t, degree, 1, t->kernel == BASED_HEDGEHOG ? BASED_MAX_HIDDEN : BASED_MAX_DEGREE),
        FIELD(t, normalizer, 0, BASED_ONE),
        FIELD(t, chunk, 1, BASED_MAX_CHUNK),
        FIELD(t, window, 0, BASED_MAX_WINDOW),
        FIELD(t, sinks, 0, BASED_MAX_WINDOW));
    if (!is_finite(t->scale) || !is_finite(t->normalizer_eps))
        return fail(e, status, "%s %u: scale or normalizer_eps is not a number", where, i);
    if ((t->window || t->kernel == BASED_HEDGEHOG)
        && (t->kernel == BASED_DIAGONAL || t->normalizer != BASED_ADD || t->normalizer_eps != 0.0f))
        return fail(e, status, "%s %u: a window beside the sums needs kernel 0 or 2, normalizer 0 "
                    "and normalizer_eps 0", where, i);
    if (!(t->decay >= 0.0f && t->decay < 1.0f))
        return fail(e, status, "%s %u: decay is not a number from 0 to below 1", where, i);
    return BASED_OK;
}

/* A field that the layer's mixer does not use must be 0. */
static int check_layer(const based_config *c, const based_layer *l, uint32_t i, based_error *e) {
    const uint32_t any = l->mixer != BASED_MIXER_NONE, conv = l->mixer == BASED_CONV;
    const uint32_t taylor = l->mixer == BASED_TAYLOR, attention = l->mixer >= BASED_TAYLOR;
    const uint32_t widest = BASED_MAX_HIDDEN / (l->heads ? l->heads : 1);
    const uint32_t checked = taylor ? UINT32_MAX : 0;   /* by check_taylor */
#define IF(condition, high) ((condition) ? (high) : 0u)
    CHECK_FIELDS(BASED_EFORMAT, "layer", i, e,
        FIELD(l, mixer, 0, BASED_WINDOW),
        FIELD(l, flags, 0, 8191),
        FIELD(l, norm1, 0, BASED_NORM_L2),
        FIELD(l, norm2, 0, BASED_NORM_L2),
        FIELD(l, mlp, 0, BASED_GELU_TANH),
        FIELD(l, hidden_dim, l->mlp != 0, IF(l->mlp, BASED_MAX_HIDDEN)),
        FIELD(l, in_dtype, 0, BASED_Q4),
        FIELD(l, out_dtype, 0, BASED_Q4),
        FIELD(l, up_dtype, 0, BASED_Q4),
        FIELD(l, down_dtype, 0, BASED_Q4),
        FIELD(l, heads, any, conv ? 1u : IF(any, BASED_MAX_HEADS)),
        FIELD(l, kv_heads, attention, IF(attention, l->heads)),
        FIELD(l, head_dim_k, attention, IF(attention, widest)),
        FIELD(l, head_dim_v, any, IF(any, widest)),
        FIELD(l, conv_width, conv, IF(conv, BASED_MAX_CONV_WIDTH)),
        FIELD(l, rope_pairs, 0, l->head_dim_k / 2),
        FIELD(l, window, l->mixer == BASED_WINDOW, IF(attention, BASED_MAX_WINDOW)),
        FIELD(l, chunk, 0, checked),
        FIELD(l, degree, 0, l->kernel == BASED_HEDGEHOG ? widest : checked),
        FIELD(l, kernel, 0, checked),
        FIELD(l, normalizer, 0, checked),
        FIELD(l, sinks, 0, checked),
        FIELD(l, fading, 0, IF(taylor, BASED_FIXED)));
    based_taylor_config t = taylor_config_of(l);
    if (taylor && check_taylor(&t, BASED_EFORMAT, "layer", i, e)) return BASED_EFORMAT;
    if (check_reserved(l->reserved, COUNT(l->reserved), "layer", i, e)) return BASED_EFORMAT;
    if (!is_finite(l->norm1_eps) || !is_finite(l->norm2_eps) || !is_finite(l->scale))
        return DAMAGED(e, "layer %u: norm1_eps, norm2_eps or scale is not a number", i);
    if (attention && l->heads % l->kv_heads)
        return DAMAGED(e, "layer %u: %u heads cannot share %u key/value heads evenly",
                    i, l->heads, l->kv_heads);
    if (taylor && count_features(&t, BASED_MAX_FEATURES) > BASED_MAX_FEATURES)
        return DAMAGED(e, "layer %u: degree %u of width %u has more than %u features",
                    i, l->degree, l->head_dim_k, BASED_MAX_FEATURES);
    if ((l->fading || (l->flags & BASED_PREFIX))
        && (l->sinks || l->decay != 0.0f || l->kernel != BASED_DOT
            || (c->flags & BASED_BIDIRECTIONAL)))
        return DAMAGED(e, "layer %u: fading or a prefix together with sinks, decay, another kernel "
                       "or a bidirectional model", i);
    if ((l->flags & BASED_PREFIX)
        && (!c->prefix || !taylor || l->fading || l->window || l->rope_pairs
            || (l->flags & (BASED_KEY_MEAN | BASED_QK_NORM | BASED_IN_BIAS))))
        return DAMAGED(e, "layer %u: a prefix needs a taylor layer without fading, window, rope, "
                       "key mean, norms of q and k and in.bias, and the header's field prefix", i);
    if ((l->flags & BASED_VALUE_FACTORS) && (l->flags & BASED_VALUE_GATES))
        return DAMAGED(e, "layer %u: value gates and value factors exclude each other", i);
    if (!attention && (l->flags & BASED_QK_NORM))
        return DAMAGED(e, "layer %u: only attention has norms of q and k", i);
    if (!taylor && ((l->flags & BASED_KEY_MEAN) || l->decay != 0.0f || l->normalizer_eps != 0.0f))
        return DAMAGED(e, "layer %u: only taylor layers have a key mean, decay or normalizer_eps, "
                       "expected 0", i);
    if (!attention && l->scale != 0.0f)
        return DAMAGED(e, "layer %u: only attention has a scale, expected 0", i);
    if (any && (l->flags & BASED_NO_OUT) && inner_dim(l) != c->dim)
        return DAMAGED(e, "layer %u: no out projection, but its width is %u and dim is "
                    "%u", i, inner_dim(l), c->dim);
    return BASED_OK;
}

/* 64-bit numbers of the header are stored as two words, the low one first. */
static uint64_t two_words(const uint32_t w[2]) {
    return U64(w[1]) << 32 | w[0];
}

static int check_header(const void *bytes, size_t size, based_error *e) {
    const based_config *c = bytes;
    int status;
    /* is this a file of ours at all, whole and in this machine's byte order? */
    if (!bytes || (uintptr_t)bytes % 64)
        return INVALID(e, "the checkpoint's bytes must be aligned to 64 bytes");
    if (size < sizeof *c)
        return DAMAGED(e, "%zu bytes are too few for a checkpoint, whose header has %zu; was the "
                       "file cut off?", size, sizeof *c);
    if (memcmp(c->magic, BASED_MAGIC, 8))
        return DAMAGED(e, "not a based checkpoint (it does not begin with the bytes BASED); make "
                       "one with export.py");
    if (c->byte_order == 0x04030201u)
        return INVALID(e, "the checkpoint is in the other byte order; call based_to_native first");
    if (c->byte_order != BASED_BYTE_ORDER)
        return DAMAGED(e, "header: the byte-order mark is damaged");
    if (c->format != BASED_FORMAT)
        return DAMAGED(e, "checkpoint format %u; this program reads format %u, so export the model "
                       "again", c->format, BASED_FORMAT);
    if (two_words(c->file_size) != size)
        return DAMAGED(e, "the header says %llu bytes, but there are %zu; was the file "
                    "cut off?", two_words(c->file_size), size);
    /* its fields, layer by layer */
    status = check_config(c, e);
    if (!status && size - sizeof *c < U64(c->layers) * sizeof(based_layer))
        status = DAMAGED(e, "%zu bytes are too few for %u layers", size, c->layers);
    for (uint32_t i = 0; !status && i < c->layers; i++)
        status = check_layer(c, (const based_layer *)(c + 1) + i, i, e);
    return status;
}

/* ---- Reading: every size is derived from checked fields and compared with what is left ------- */

struct reader {
    const unsigned char *bytes;         /* the checkpoint                                         */
    uint64_t at, size;                  /* where the next section begins, and bytes in all        */
    int check_finite;                   /* look at every float (based_check_weights)              */
    int short_of_bytes;                 /* a section did not fit                                  */
    uint64_t bad_scales;                /* scales that are out of range                           */
    uint64_t bad;                       /* floats that are NaN or infinite                        */
    struct {                            /* the first tensor that has some: how many of how many   */
        const char *name, *part;
        uint64_t layer, bad, of;        /* layer: counted from 1; 0: outside the layers           */
    } first;
    based_model *m;                     /* what is being filled in                                */
    uint64_t layer;                     /* which of its layers, counted like first.layer          */
};

/* The next section of n bytes, aligned to 64, or NULL. n < 2^58, because no field exceeds its
 * maximum, so nothing overflows. */
static const void *read_section(struct reader *r, uint64_t n) {
    uint64_t gap = (64 - (r->at & 63)) & 63;
    if (r->short_of_bytes || gap > r->size - r->at || n > r->size - r->at - gap) {
        r->short_of_bytes = 1;
        return NULL;
    }
    r->at += gap + n;
    return r->bytes + (r->at - n);
}

static const float *read_floats(struct reader *r, const char *name, const char *part, uint64_t n) {
    const float *x = read_section(r, n * sizeof(float));
    uint64_t bad = 0;
    for (uint64_t i = 0; r->check_finite && i < n; i++) bad += is_finite(x[i]) ? 0 : 1;
    if (bad && !r->bad) {
        r->first.name = name, r->first.part = part;
        r->first.layer = r->layer, r->first.bad = bad, r->first.of = n;
    }
    r->bad += bad;
    return x;
}

/* The same for floats that count as parameters of the model. */
static const float *read_weights(struct reader *r, const char *name, const char *part,
                                 uint64_t n) {
    r->m->parameters += n;
    return read_floats(r, name, part, n);
}

/* A bfloat16 is the upper half of a float. A scale is zero, or its size is at least 2^-82 and less
 * than 2^20: then the product with the scale of a vector is never rounded (see quantize_group). */
static uint32_t is_bad_scale(uint32_t half) {
    uint32_t size = half & 0x7fff;
    return size && (size < 45 << 7 || size >= 147 << 7) ? 1 : 0; /* exponents have a bias of 127 */
}

static struct matrix read_matrix(struct reader *r, const char *name, uint32_t rows, uint32_t cols,
                                 uint32_t dtype, uint32_t bias) {
    based_model *m = r->m;
    struct matrix a = { NULL, NULL, NULL, NULL, rows, cols, dtype, 1 };
    uint64_t before = r->at;
    if (dtype == BASED_F32) {
        a.data = read_weights(r, name, "", U64(rows) * cols);
    } else {
        /* tiles of 16 rows: first the scales of all groups, two in a word, then the values */
        int bits = bits_of(dtype);
        uint32_t in_row = (uint32_t)groups(cols, bits);
        uint64_t scales = U64(tiles(rows)) * in_row * 8;
        a.scales = read_section(r, scales * 4);
        a.words = read_section(r, U64(tiles(rows)) * tile_words(cols, bits) * 4);
        for (uint64_t i = 0; a.scales && i < scales; i++)
            r->bad_scales += is_bad_scale(a.scales[i]) + is_bad_scale(a.scales[i] >> 16);
        m->parameters += U64(rows) * cols;
        m->most_groups = max_u32(m->most_groups, in_row);
        m->widest_q = max_u32(m->widest_q, in_row * (uint32_t)group_width(bits));
    }
    m->weight_bytes += r->at - before;
    if (bias) a.bias = read_weights(r, name, ".bias", rows);
    return a;
}

static struct norm read_norm(struct reader *r, const char *name, uint32_t kind, float eps) {
    struct norm n = { NULL, NULL, kind, eps };
    if (kind != BASED_NORM_NONE) n.weight = read_weights(r, name, "", r->m->c->dim);
    if (kind == BASED_NORM_LAYER) n.bias = read_weights(r, name, ".bias", r->m->c->dim);
    return n;
}

/* What a layer adds to each session: floats of state, and of scratch for one of its heads. */
struct layer_sizes { uint64_t features, state, scratch; };

static struct layer_sizes sizes_of(const based_config *c, const based_layer *l) {
    struct layer_sizes n = { 0, l->flags & BASED_SHIFT ? c->dim : 0, 0 };
    if (l->mixer == BASED_CONV) n.state += U64(l->conv_width - 1) * l->head_dim_v;
    if (l->mixer == BASED_WINDOW) {
        n.state += l->window * (U64(k_dim(l)) + v_dim(l));
        n.scratch = l->window;
    }
    if (l->mixer == BASED_TAYLOR) {
        struct based_taylor t = { .c = taylor_config_of(l), .fading = l->fading };
        n.features = count_features(&t.c, BASED_MAX_FEATURES);
        n.state += head_state_floats(&t, n.features) * l->kv_heads;
        n.scratch = scratch_floats(&t, n.features);
    }
    return n;
}

/* Walks the sections in file order, that of based.h part 7, and fills in *m and the layers. With
 * r->check_finite, `layer` is one struct that serves all of them in turn. */
static void bind_weights(struct reader *r, based_model *m, struct layer *layer) {
    const based_config *c = m->c;
    const uint32_t dim = c->dim;
    int tied = (c->flags & BASED_TIED) != 0;
    r->m = m;
    read_section(r, sizeof *c);
    read_section(r, U64(c->layers) * sizeof(based_layer));
    if (c->tokenizer_bytes) m->tokenizer = read_section(r, c->tokenizer_bytes);
    if (c->input == 0)
        m->embedding = read_matrix(r, "embedding", c->rows, dim, c->embedding_dtype, 0);
    /* a token reads one row of an embedding, but all of it if it is the head too */
    if (!tied) m->weight_bytes = 0;
    if (c->flags & BASED_INPUT_PROJECTION)
        m->input = read_matrix(r, "input", dim, c->input, BASED_F32, 1);
    m->scratch_heads = 1;
    for (uint32_t i = 0; i < c->layers; i++) {
        struct layer *l = r->check_finite ? layer : layer + i;
        const based_layer *f = l->c = (const based_layer *)(c + 1) + i;
        struct layer_sizes need = sizes_of(c, f);
        r->layer = i + 1;
        /* the mixer */
        if (f->mixer != BASED_MIXER_NONE) {
            l->norm1 = read_norm(r, "norm1", f->norm1, f->norm1_eps);
            l->in = read_matrix(r, "in", in_rows(f) + prefix_rows(f), dim, f->in_dtype,
                                f->flags & BASED_IN_BIAS);
            /* u and g, gate and value: a thread that computes both needs no barrier in between */
            if (f->mixer == BASED_CONV && f->head_dim_v % 16 == 0) l->in.parts = 2;
            if (f->flags & BASED_QK_NORM) {
                l->qk_norm[0] = read_weights(r, "q_norm", "", f->head_dim_k);
                l->qk_norm[1] = read_weights(r, "k_norm", "", f->head_dim_k);
            }
            if (f->mixer == BASED_CONV) {
                uint64_t n = U64(f->conv_width) * f->head_dim_v;
                l->conv_weight = read_weights(r, "conv_weight", "", n);
                if (f->flags & BASED_CONV_BIAS)
                    l->conv_bias = read_weights(r, "conv_weight", ".bias", f->head_dim_v);
            }
            if (f->rope_pairs) l->rope_freq = read_section(r, U64(f->rope_pairs) * 8);
            if (f->flags & BASED_KEY_MEAN) l->key_mean = read_floats(r, "key_mean", "", k_dim(f));
            if (f->mixer == BASED_TAYLOR) {
                l->taylor.c = taylor_config_of(f);
                if (f->kernel == BASED_HEDGEHOG) {
                    uint64_t map = U64(f->heads) * f->degree * f->head_dim_k;
                    l->taylor.q_map = read_weights(r, "q_map", "", map);
                    l->taylor.k_map = read_weights(r, "k_map", "", map);
                    l->taylor.c.coefficients = read_weights(r, "mix", "", f->heads);
                } else
                    l->taylor.c.coefficients = read_floats(r, "coefficients", "",
                                                           U64(f->heads) * (f->degree + 1));
                l->taylor.k = m->k;
                l->taylor.features = (uint32_t)need.features;
                l->taylor.fading = f->fading;
            }
            if (f->fading == BASED_GATED) {
                l->fade = read_weights(r, "fade", "", U64(f->kv_heads) * dim);
                l->fade_bias = read_weights(r, "fade", ".bias", f->kv_heads);
            }
            if (f->fading == BASED_FIXED) l->fade = read_floats(r, "fade", ".factor", f->kv_heads);
            if (f->flags & (BASED_VALUE_GATES | BASED_VALUE_FACTORS))
                l->gates = read_matrix(r, "gate", f->heads, dim, BASED_F32, 0);
            if (!(f->flags & BASED_NO_OUT))
                l->out = read_matrix(r, "out", dim, inner_dim(f), f->out_dtype,
                                     f->flags & BASED_OUT_BIAS);
            m->widest_in = max_u32(m->widest_in, max_u32(in_rows(f), prefix_rows(f)));
            m->widest_mid = max_u32(m->widest_mid, inner_dim(f));
        }
        /* the MLP; SwiGLU has a gate beside each value */
        l->norm2 = read_norm(r, "norm2", f->norm2, f->norm2_eps);
        if (f->mlp != BASED_MLP_NONE) {
            uint32_t rows = f->mlp == BASED_SWIGLU ? 2 * f->hidden_dim : f->hidden_dim;
            l->up = read_matrix(r, "up", rows, dim, f->up_dtype, f->flags & BASED_UP_BIAS);
            if (f->mlp == BASED_SWIGLU && f->hidden_dim % 16 == 0) l->up.parts = 2;
            l->down = read_matrix(r, "down", dim, f->hidden_dim, f->down_dtype,
                                  f->flags & BASED_DOWN_BIAS);
            m->widest_in = max_u32(m->widest_in, rows);
            m->widest_mid = max_u32(m->widest_mid, f->hidden_dim);
        }
        /* its place in a session: the input of the token before, if it is kept, comes last */
        l->state = m->state;
        m->state += (size_t)need.state;
        if (f->flags & BASED_SHIFT) l->shift = m->state - dim, m->shifted = 1;
        if (need.scratch > m->scratch) m->scratch = (size_t)need.scratch;
#ifdef _OPENMP
        m->scratch_heads = max_u32(m->scratch_heads, f->kv_heads);
#endif
    }
    r->layer = 0;
    if (c->prefix) m->state++;          /* prefix_tokens */
    /* at least one tile of 16 rows; head() computes as many logits at a time */
    m->widest_in = m->widest_in ? (m->widest_in + 15) / 16 * 16 : 16;
    m->final_norm = read_norm(r, "final_norm", c->final_norm, c->final_norm_eps);
    m->head = m->embedding;
    if (c->rows && !tied) m->head = read_matrix(r, "head", c->rows, dim, c->head_dtype, 0);
    if (c->flags & BASED_HEAD_BIAS) m->head.bias = read_weights(r, "head", ".bias", c->rows);
#ifdef _OPENMP
    m->most_groups = (m->most_groups + 15) / 16 * 16; /* cache lines for each thread's own row */
#endif
}

/* Walks through a model that is already open once more, and looks at every float. */
int based_check_weights(const based_model *m, based_error *e) {
    struct reader r = {
        .bytes = (const unsigned char *)m->c, .size = two_words(m->c->file_size), .check_finite = 1
    };
    based_error where;
    based_model copy;
    struct layer layer;
    memcpy(&copy, m, sizeof copy);
    bind_weights(&r, &copy, &layer);
    if (!r.bad) return BASED_OK;
    /* "layer 3, up.bias: ..." or "embedding: ..." */
    where.text[0] = 0;
    if (r.first.layer) fail(&where, BASED_OK, "layer %llu, ", r.first.layer - 1);
    return DAMAGED(e, "%s%s%s: %llu of the %llu numbers are NaN or infinite, %llu in all; export "
                   "the model again, or train it again", where.text, r.first.name, r.first.part,
                   r.first.bad, r.first.of, r.bad);
}

/* ==== 14. Memory: models and sessions ============================================================
 * Why: nothing here allocates. The caller asks how many bytes an object needs and hands them over,
 * so that a microcontroller can use a static array and a server can know its memory beforehand.
 * May assume: check_header has passed before any size is computed.
 * Later code relies on: a model never changes once it is initialized, so threads may share it; a
 * session never grows. Memory is aligned to 64 bytes, and so is every array in it.
 */
static uint64_t align64(uint64_t n) { return (n + 63) / 64 * 64; }

static int check_memory(const void *memory, size_t have, size_t need, based_error *e) {
    if (!memory || (uintptr_t)memory % 64)
        return INVALID(e, "the memory block must be aligned to 64 bytes");
    if (have < need)
        return fail(e, BASED_ENOMEM, "the memory block has %zu bytes, %zu are needed", have, need);
    return BASED_OK;
}

/* Multiplying and adding in one rounding (FMA contraction), or in a wider type, gives other bits
 * than IEEE float32 does. Compiler flags decide, so it is tried out: with a = 1 + 2^-12, a*a must
 * round to 1 + 2^-11, and 1 + 2^-25 to 1. Sums in another order (-ffast-math) cannot be found by
 * trying, but compilers that were allowed to reorder define a macro. */
static int check_machine(based_error *e) {
    volatile float a = 1.0f + 1.0f / 4096.0f, b = 1.0f + 1.0f / 2048.0f;
    volatile float tiny = 1.0f / 33554432.0f, one = 1.0f;       /* volatile: computed at run time */
    float p = a, q = b, r = p * p - q, s = one + tiny - one;
    int strict = r == 0.0f && s == 0.0f;
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
    strict = 0;
#endif
    /* tests/double.c compiles this file with `float` defined as double */
    if (strict || sizeof(float) != sizeof(uint32_t)) return BASED_OK;
    return fail(e, BASED_EMACHINE, "this build fuses or widens float operations; compile without "
                "-ffast-math (and with -msse2 -mfpmath=sse on 32-bit x86, with clang not with "
                "-ffp-contract=fast)");
}

/* The checksum of all bytes from 32 on: of a checkpoint, before it is changed to another order. */
static int check_sum(const void *bytes, size_t size, uint64_t stored, based_error *e) {
    if (based_checksum((const unsigned char *)bytes + 32, size - 32) == stored) return BASED_OK;
    return fail(e, BASED_ECHECKSUM, "the checksum does not match: the checkpoint was damaged after "
                "it was written; copy or export it again");
}

uint64_t based_checksum(const void *bytes, size_t n) {
    return choose_kernels(0)->mm->checksum(bytes, n);
}

/* ---- Byte order: files are little-endian ----------------------------------------------------- */

static int machine_is_big_endian(void) {
    const uint32_t one = 1;
    return *(const unsigned char *)&one == 0;
}

/* Reverses the bytes of n numbers of `width` bytes each. */
static void swap_bytes(void *numbers, size_t n, size_t width) {
    unsigned char *p = numbers;
    for (size_t i = 0; i < n; i++, p += width)
        for (size_t b = 0; b < width / 2; b++) {
            unsigned char kept = p[b];
            p[b] = p[width - 1 - b];
            p[width - 1 - b] = kept;
        }
}

/* From the other byte order to ours. Everything but names and text is words of 4 bytes. */
static int swap_checkpoint(void *bytes, size_t size, based_error *e) {
    based_config *c = bytes;
    unsigned char *p = bytes;
    uint64_t at;
    uint32_t words = 0;
    /* the header, from the format version to the name and behind it, and the layers */
    swap_bytes(p + 8, (offsetof(based_config, name) - 8) / 4, 4);
    swap_bytes(p + offsetof(based_config, prefix), (256 - offsetof(based_config, prefix)) / 4, 4);
    at = align64(sizeof *c + U64(c->layers) * sizeof(based_layer));
    if (c->layers > BASED_MAX_LAYERS || at > size || c->tokenizer_bytes > size - at)
        return DAMAGED(e, "the header describes more than the %zu bytes there are",
                    size);
    swap_bytes(c + 1, (size_t)(at - sizeof *c) / 4, 4);
    /* the tokenizer, whose first word is the number of its words; text follows them */
    if (c->tokenizer_bytes) {
        if (c->tokenizer_bytes >= 4) {
            swap_bytes(p + at, 1, 4);
            memcpy(&words, p + at, 4);
        }
        if (words == 0 || words > c->tokenizer_bytes / 4)
            return DAMAGED(e, "the tokenizer section is damaged");
        swap_bytes(p + at + 4, words - 1, 4);
        at = align64(at + c->tokenizer_bytes);
    }
    /* the tensors */
    if (at < size) swap_bytes(p + at, (size - (size_t)at) / 4, 4);
    return BASED_OK;
}

int based_to_native(void *bytes, size_t size, int flags, based_error *e) {
    based_config *c = bytes;
    uint32_t stored[2];
    if (!machine_is_big_endian() || size < sizeof *c || c->byte_order == BASED_BYTE_ORDER
        || memcmp(c->magic, BASED_MAGIC, 8))
        return BASED_OK;                /* nothing to do, or based_model_init says what is wrong */
    memcpy(stored, c->checksum, sizeof stored);
    swap_bytes(stored, 2, 4);
    if (!(flags & BASED_NO_CHECKSUM) && check_sum(bytes, size, two_words(stored), e))
        return BASED_ECHECKSUM;
    return swap_checkpoint(bytes, size, e);
}

/* ---- Models ---------------------------------------------------------------------------------- */

/* A model: the struct, its layers, then the multinomials of each taylor layer. */
size_t based_model_bytes(const void *bytes, size_t size, based_error *e) {
    const based_config *c = bytes;
    uint64_t n, floats = 0;
    if (check_header(bytes, size, e)) return 0;
    n = sizeof(based_model) + U64(c->layers) * sizeof(struct layer);
    for (uint32_t i = 0; i < c->layers; i++) {
        struct layer_sizes need = sizes_of(c, (const based_layer *)(c + 1) + i);
        n += need.features * sizeof(float);
        floats += need.state + need.scratch;
    }
    /* from here on, size_t can hold the state and the scratch of a session */
    int session = floats > SIZE_MAX / 8;
    if (session || n > SIZE_MAX)
        return fail(e, BASED_ENOMEM, "%s needs %llu bytes, more than this machine can address",
                    session ? "a session" : "the model", session ? 4 * floats : n), 0;
    return (size_t)n;
}

int based_model_init(based_model **out, void *memory, size_t memory_bytes, const void *bytes,
                     size_t size, int flags, based_error *e) {
    const based_config *c = bytes;
    based_model *m = memory;
    struct reader r = { .bytes = bytes, .size = size };
    float *multinomial;
    /* all that can be checked before memory is written */
    int status = check_header(bytes, size, e);
    size_t need = status ? 0 : based_model_bytes(bytes, size, e);
    if (!status && !need) status = BASED_ENOMEM;
    if (!status) status = check_memory(memory, memory_bytes, need, e);
    if (!status) status = check_machine(e);
    /* on a big-endian machine based_to_native has checked it, before it changed the bytes */
    if (!status && !(flags & BASED_NO_CHECKSUM) && !machine_is_big_endian())
        status = check_sum(bytes, size, two_words(c->checksum), e);
    if (status) return status;
    memset(m, 0, need);
    m->c = c;
    m->k = choose_kernels(flags);
    bind_weights(&r, m, m->layer);
    if (r.short_of_bytes || r.at != size)
        return DAMAGED(e, "the header describes %s than the %zu bytes there are; the checkpoint is "
                       "damaged", r.short_of_bytes ? "more" : "less", size);
    if (r.bad_scales)
        return DAMAGED(e, "%llu scales of weights are neither zero nor between 2^-82 and 2^20; "
                       "export the model again", r.bad_scales);
    multinomial = (float *)(m->layer + c->layers);
    for (uint32_t i = 0; i < c->layers; i++) {
        struct based_taylor *t = &m->layer[i].taylor;
        if (m->layer[i].c->mixer != BASED_TAYLOR || t->c.kernel == BASED_HEDGEHOG) continue;
        fill_multinomials(multinomial, &t->c);
        t->multinomial = multinomial;
        multinomial += t->features;
    }
    *out = m;
    return BASED_OK;
}

/* Numbers per output: logits, or the last hidden vector in a model without a head. */
size_t based_width(const based_model *m) {
    return m->c->rows ? m->c->vocab : m->c->dim;
}

const based_config *based_model_config(const based_model *m) { return m->c; }
const based_layer *based_model_layer(const based_model *m, uint32_t i) {
    return i < m->c->layers ? m->layer[i].c : NULL;
}
const void *based_model_tokenizer(const based_model *m, size_t *bytes) {
    *bytes = m->c->tokenizer_bytes;
    return m->tokenizer;
}
uint64_t based_model_parameters(const based_model *m) { return m->parameters; }
uint64_t based_model_weight_bytes(const based_model *m) { return m->weight_bytes; }
const char *based_model_kernels(const based_model *m) { return m->k->name; }
size_t based_state_bytes(const based_model *m) { return m->state * sizeof(float); }

/* ---- Sessions -------------------------------------------------------------------------------- */

static float *scratch_of(based_session *s, size_t head) {
    return s->scratch + (s->m->scratch_heads > 1 ? head * s->m->scratch : 0);
}

/* Returns the bytes of a session; with `memory`, points the session's arrays into it. */
static uint64_t lay_out(based_session *s, const based_model *m, uint64_t block,
                        unsigned char *memory) {
    /* quantized vectors are stored four or sixteen side by side */
    uint64_t at = 0, packed = block < 4 ? block : (block + 15) / 16 * 16;
    uint64_t q_groups = packed * m->most_groups;
    struct { float **where; uint64_t n; } part[] = {
        { &s->x, block * m->c->dim },
        { &s->x_norm, block * m->c->dim },
        { &s->mixer_in, m->shifted ? block * m->c->dim : 0 },
        { &s->proj, block * m->widest_in },
        { &s->inner, block * m->widest_mid },
        { &s->scratch, U64(m->scratch_heads) * m->scratch },
        { &s->xq, packed * m->widest_q / 4 },
        { &s->xq_scale, q_groups },
        { &s->xq_offset, q_groups },
        { &s->state, m->state },
        { &s->logits, based_width(m) }
    };
    at += align64(sizeof *s);
    if (memory) s->row = (struct row *)(void *)(memory + at);
    at += align64(block * sizeof(struct row));
    for (size_t i = 0; i < COUNT(part); i++) {
        if (memory) *part[i].where = (float *)(void *)(memory + at);
        at += align64(part[i].n * sizeof(float));
    }
    return at;
}

size_t based_session_bytes(const based_model *m, uint32_t block) {
    based_session unused;
    uint64_t n = block && block <= BASED_MAX_BLOCK ? lay_out(&unused, m, block, NULL) : 0;
    return n <= SIZE_MAX ? (size_t)n : 0;
}

int based_session_init(based_session **out, const based_model *m, void *memory,
                       size_t memory_bytes, uint32_t block, based_error *e) {
    based_session *s = memory;
    size_t need = based_session_bytes(m, block);
    if (!need)
        return INVALID(e, "a block of %u tokens; expected 1 to %u, and a session that fits in "
                       "memory", block, BASED_MAX_BLOCK);
    int status = check_memory(memory, memory_bytes, need, e);
    if (status) return status;
    memset(s, 0, sizeof *s);
    s->m = m;
    s->block = block;
    s->threads = 1;
    s->spin_ns = MAX_SPIN_NS;
    lay_out(s, m, block, memory);
    based_reset(s);
    *out = s;
    return BASED_OK;
}

/* ==== 15. Threads ================================================================================
 * Why: one thread alone does not use all the memory bandwidth of a machine. One parallel region
 * computes a whole block of tokens: every thread runs the same forward pass, computes its part of
 * each step (partition), and waits at a barrier where it needs what the others have computed. The
 * steps take microseconds, too little to start threads for each of them.
 * May assume: all threads of a session go through the same barriers in the same order.
 * Later code relies on: the number of threads changes no bit, because each number is computed by
 * one thread, in one order. Without OpenMP there is one thread, and barrier does nothing.
 *
 * Why this file has a barrier of its own instead of `#pragma omp barrier`: it is three times as
 * fast where other programs want the processors too, as on most machines. Measured with GCC 12's
 * OpenMP, a model of 45M parameters and 2 threads on a busy machine with 2 processors: 197 to 234
 * tokens/s with this barrier, 61 to 93 with OpenMP's. Two such programs at once: 63 to 77 against
 * 9 to 11. Only with more threads than processors is OpenMP's faster: with 4 threads, 128 to 169
 * tokens/s against 111 to 127.
 */
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef BASED_POSIX
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>
#endif

enum { SPINS_BEFORE_CLOCK = 2000, PREEMPTED_NS = 300000, CONTENDED_WAITS = 2500 };
enum { MAX_THREADS = 1024 };

/* The rows of a session in a block of n rows follow each other. A thread that computes its heads of
 * one session after those of another reads memory in long stretches: a step of 64 texts is 1.04
 * times as fast as with one head of all of them after the other. */
static size_t session_end(const based_session *s, size_t at, size_t n) {
    size_t end = at + 1;
    while (end < n && s->row[end].s == s->row[at].s) end++;
    return end;
}

/* A thread's part of n things: from partition(n, th, 0) up to partition(n, th, 1). */
static size_t partition(size_t n, const struct thread *th, size_t end) {
    return n / th->count * (th->id + end) + n % th->count * (th->id + end) / th->count;
}

#ifdef _OPENMP
/* Waits until barrier_phase is no longer `phase`. Usually that takes microseconds, and spinning is
 * all there is to do. Otherwise a thread that we wait for may have been preempted by another
 * program:
 *   - After spin_ns we sleep for 20 microseconds. Not sched_yield: it would give our processor to
 *     the other program for a whole time slice, at every barrier, while a thread that has slept is
 *     soon scheduled again.
 *   - If more than PREEMPTED_NS pass between two looks at the clock, we were preempted ourselves:
 *     others need the processors. For the next CONTENDED_WAITS waits, each sleep halves spin_ns, so
 *     that we do not spin on a processor that the missing thread could have. Two programs that
 *     spin against each other lose nine tenths of their speed. spin_ns never falls below
 *     MIN_SPIN_NS, because a thread that wakes up late makes the others sleep in turn.
 *   - If nobody was preempted, the missing thread is only slower, and spin_ns grows again.
 *   - With more threads than processors, sched_yield gives ours to one of our own threads. */
static void barrier_wait(based_session *p, int phase) {
#ifdef BASED_POSIX
    int now, was, contended, spin_ns, slept = 0;
    int64_t begun = 0, last = 0;
#pragma omp atomic read
    was = p->spin_ns;
#pragma omp atomic read
    contended = p->contended;
    for (int seen = 0;; seen++) {
#pragma omp atomic read seq_cst
        now = p->barrier_phase;
        if (now != phase) break;
        if (seen < SPINS_BEFORE_CLOCK) continue;
        struct timespec clock;
        clock_gettime(CLOCK_MONOTONIC, &clock);
        int64_t t = (int64_t)clock.tv_sec * 1000000000 + clock.tv_nsec;
        if (begun == 0) begun = last = t;
        if (t - last > PREEMPTED_NS) contended = CONTENDED_WAITS;
        last = t;
        if (p->oversubscribed) sched_yield();
        else if (t - begun > was) slept = nanosleep(&(struct timespec){ 0, 20000 }, NULL) == 0;
    }
    if (contended > 0) {
#pragma omp atomic write
        p->contended = contended - 1;
    }
    spin_ns = slept && contended > 0 ? was / 2 : was + was / 32;
    spin_ns = spin_ns < MIN_SPIN_NS ? MIN_SPIN_NS : spin_ns > MAX_SPIN_NS ? MAX_SPIN_NS : spin_ns;
    if (spin_ns == was) return;
#pragma omp atomic write
    p->spin_ns = spin_ns;
#else
    int now;
    do {
#pragma omp atomic read seq_cst
        now = p->barrier_phase;
    } while (now == phase);
#endif
}
#endif

/* Returns when all threads have called it. The last one to arrive resets the count and flips the
 * phase, for which the others wait. */
static void barrier(const struct thread *th) {
#ifdef _OPENMP
    based_session *p = th->s;
    int phase, count;
    if (th->count == 1) return;
#pragma omp atomic read seq_cst
    phase = p->barrier_phase;
#pragma omp atomic capture seq_cst
    count = ++p->barrier_count;
    if (count < (int)th->count) {
        barrier_wait(p, phase);
        return;
    }
    p->barrier_count = 0;
#pragma omp atomic write seq_cst
    p->barrier_phase = phase ^ 1;
#else
    (void)th;
#endif
}

static void thread_main(const struct thread *th, size_t n, size_t n_logits) {
    const struct matmul_kernels *mm = th->s->m->k->mm;
    if (mm->begin) mm->begin(n);
    forward(th, n);
    if (n_logits) head(th, n - n_logits, n_logits);
    if (mm->end) mm->end();
}

#if defined(_OPENMP) && defined(BASED_POSIX)
/* OpenMP keeps threads for each thread that calls it: in which process, and how many. */
static int omp_process, omp_ready;
#pragma omp threadprivate(omp_process, omp_ready)

#ifdef __clang__
enum { OMP_HELPERS = 16 };      /* LLVM's OpenMP makes threads for itself, too: 8, and some more */
#else
enum { OMP_HELPERS = 0 };
#endif

static void *wait_for_lock(void *lock) {
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return NULL;
}

/* How many of `wanted` threads can there be? OpenMP ends the process if it cannot create a thread,
 * and in a process that was forked after OpenMP was used it waits for threads that do not exist
 * there. So such a process computes with one thread; and before OpenMP needs more threads than it
 * has, twice as many are created here, all alive at the same time, and joined again. Twice, because
 * OpenMP needs memory of its own. */
static int possible_threads(int wanted) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_t thread[2 * MAX_THREADS + OMP_HELPERS];
    int process = (int)getpid(), made = 0, allowed = omp_get_thread_limit();
    if (wanted > allowed) wanted = allowed;
    if (omp_ready && omp_process != process) return 1;
    if (wanted > omp_ready) {
        pthread_mutex_lock(&lock);
        while (made < 2 * wanted + OMP_HELPERS
               && pthread_create(&thread[made], NULL, wait_for_lock, &lock) == 0) made++;
        pthread_mutex_unlock(&lock);
        for (int i = 0; i < made; i++) pthread_join(thread[i], NULL);
        wanted = (made - OMP_HELPERS) / 2;
    }
    if (wanted < 2) return 1;
    omp_process = process;
    omp_ready = wanted;
    return wanted;
}
#elif defined(_OPENMP)
static int possible_threads(int wanted) { return wanted; }
#endif

/* Computes the n rows in p->row, and the outputs of the last n_logits of them. */
static void run_threads(based_session *p, size_t n, size_t n_logits) {
#ifdef _OPENMP
    if (p->threads > 1) p->threads = possible_threads(p->threads);
    if (p->threads > 1) {
        p->barrier_count = 0;
        p->oversubscribed = p->threads > omp_get_num_procs();
#pragma omp parallel num_threads(p->threads)
        {
            struct thread w = { p, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads() };
            thread_main(&w, n, n_logits);
        }
        return;
    }
#endif
    thread_main(&(struct thread){ p, 0, 1 }, n, n_logits);
}

/* 0 chooses: a thread for each 16 MiB of weights, as many as there are processors. With less to
 * read, waiting at barriers costs more than a second thread gains. */
void based_set_threads(based_session *s, int threads) {
#ifdef _OPENMP
    uint64_t useful = s->m->weight_bytes / (16 << 20), processors = (uint64_t)omp_get_num_procs();
    if (threads == 0) threads = (int)(useful < processors ? useful : processors);
#else
    threads = 1;
#endif
    s->threads = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
}

int based_threads(const based_session *s) { return s->threads; }

/* ==== 16. State in and out =======================================================================
 * Why: all that the past determines can be reset, copied, saved and loaded: the number of tokens, a
 * hash of them, the state, and the last logits, so that the first token after a load needs nothing
 * computed. How many bytes that is depends on the model alone, not on the length of the text.
 * May assume: nothing of the bytes that are loaded; a refused load leaves the session as it was.
 * Later code relies on: the same past gives the same bytes on every machine, and any machine loads
 * them. based.h part 8 describes them.
 */
void based_reset(based_session *s) {
    memset(s->state, 0, s->m->state * sizeof *s->state);
    memset(s->logits, 0, based_width(s->m) * sizeof *s->logits);
    s->count = s->history = 0;
    s->row->old = NULL;
}

int based_copy(based_session *dst, const based_session *src, based_error *e) {
    if (dst->m != src->m)
        return INVALID(e, "the two sessions are over different models");
    if (dst == src) return BASED_OK;
    memcpy(dst->state, src->state, src->m->state * sizeof *src->state);
    memcpy(dst->logits, src->logits, based_width(src->m) * sizeof *src->logits);
    dst->count = src->count;
    dst->history = src->history;
    dst->row->old = NULL;
    return BASED_OK;
}

/* Each step is one-to-one in h: two texts of equal hash that go on alike stay equal, and two that
 * differ stay different while they go on alike. */
uint64_t based_history_of(uint64_t h, const int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h = (h + (uint32_t)tokens[i] + 1) * 0x9e3779b97f4a7c15u;
        h ^= h >> 32;
    }
    return h;
}

const float *based_logits(const based_session *s) { return s->count ? s->logits : NULL; }
uint64_t based_count(const based_session *s) { return s->count; }
uint64_t based_history(const based_session *s) { return s->history; }

uint32_t based_hash(uint32_t h, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        h = (h ^ bits) * 0x9e3779b1u;
        h ^= h >> 15;
    }
    return h;
}

struct saved_header {                   /* offset; logits, state and note follow                  */
    unsigned char magic[8];             /*   0  BASED_STATE_MAGIC                                 */
    uint32_t version, byte_order;       /*   8, 12                                                */
    uint64_t size, checksum;            /*  16, 24  bytes in all; of those from 32 on             */
    uint64_t model;                     /*  32  the checksum of the checkpoint                    */
    uint64_t count, history;            /*  40, 48                                                */
    uint64_t width, state, note;        /*  56, 64, 72  floats, floats, bytes                     */
};

/* Between this machine's byte order and that of the file. */
static void order_header(void *header) {
    if (!machine_is_big_endian()) return;
    swap_bytes((unsigned char *)header + 8, 2, 4);
    swap_bytes((unsigned char *)header + 16, 8, 8);
}

size_t based_saved_bytes(const based_model *m, size_t note_bytes) {
    /* less than a session has, so it does not overflow */
    size_t n = sizeof(struct saved_header) + (based_width(m) + m->state) * sizeof(float);
    return note_bytes <= SIZE_MAX - n ? n + note_bytes : 0;
}

int based_save(const based_session *s, const void *note, size_t note_bytes, void *out, size_t room,
               based_error *e) {
    const based_model *m = s->m;
    size_t width = based_width(m), need = based_saved_bytes(m, note_bytes);
    struct saved_header h = {
        .version = BASED_STATE_FORMAT, .byte_order = BASED_BYTE_ORDER, .size = need,
        .model = two_words(m->c->checksum), .count = s->count, .history = s->history,
        .width = width, .state = m->state, .note = note_bytes
    };
    unsigned char *p = out, *floats = p + sizeof h;
    if (!need || room < need)
        return fail(e, BASED_ENOMEM, "a saved state of this model needs %zu bytes, there are %zu",
                    need, room);
    /* what the checksum covers, in the file's byte order; then the header once more, with it */
    memcpy(h.magic, BASED_STATE_MAGIC, 8);
    memcpy(floats, s->logits, 4 * width);
    memcpy(floats + 4 * width, s->state, 4 * m->state);
    if (machine_is_big_endian()) swap_bytes(floats, width + m->state, 4);
    if (note_bytes) memcpy(floats + 4 * (width + m->state), note, note_bytes);
    memcpy(p, &h, sizeof h);
    order_header(p);
    h.checksum = based_checksum(p + 32, need - 32);
    memcpy(p, &h, sizeof h);
    order_header(p);
    return BASED_OK;
}

int based_load(based_session *s, const void *saved, size_t size, const void **note,
               size_t *note_bytes, based_error *e) {
    const based_model *m = s->m;
    const unsigned char *p = saved;
    size_t width = based_width(m), fixed = based_saved_bytes(m, 0);
    struct saved_header h;
    /* is it a saved state, whole and undamaged? */
    if (size < 8 || memcmp(p, BASED_STATE_MAGIC, 8))
        return DAMAGED(e, "not a saved state (it does not begin with the bytes BSTATE)");
    if (size < sizeof h)
        return DAMAGED(e, "%zu bytes are too few for a saved state, whose header has %zu; was the "
                       "file cut off?", size, sizeof h);
    memcpy(&h, p, sizeof h);
    order_header(&h);
    if (h.version != BASED_STATE_FORMAT)
        return DAMAGED(e, "saved state of version %u; this program reads version %u",
                    h.version, BASED_STATE_FORMAT);
    if (h.byte_order != BASED_BYTE_ORDER)
        return DAMAGED(e, "the byte-order mark of the saved state is damaged");
    if (h.size != size)
        return DAMAGED(e, "the saved state says %llu bytes, but there are %zu; was the file cut "
                       "off?", h.size, size);
    if (h.checksum != based_checksum(p + 32, size - 32))
        return fail(e, BASED_ECHECKSUM, "the checksum does not match: the saved state was damaged "
                    "after it was written");
    /* is it one of this model? */
    if (h.model != two_words(m->c->checksum))
        return INVALID(e, "the state was saved with another checkpoint; load it with the one it "
                       "belongs to");
    if (h.width != width || h.state != m->state || size < fixed || h.note != size - fixed)
        return DAMAGED(e, "the configuration does not match: %llu logits and %llu numbers of state "
                       "were saved, this model has %zu and %zu", h.width, h.state,
                    width, m->state);
    if (m->c->prefix) {
        /* the last number of the state: the tokens of the prefix */
        float n;
        memcpy(&n, p + fixed - 4, 4);
        if (machine_is_big_endian()) swap_bytes(&n, 1, 4);
        if (!(n >= 0.0f && n <= (float)m->c->prefix && n == (float)(uint32_t)n))
            return DAMAGED(e, "the saved state has a prefix of another number of tokens than 0 to "
                           "%u", m->c->prefix);
    }
    s->count = h.count;
    s->history = h.history;
    s->row->old = NULL;
    memcpy(s->logits, p + sizeof h, 4 * width);
    memcpy(s->state, p + sizeof h + 4 * width, 4 * m->state);
    if (machine_is_big_endian()) {
        swap_bytes(s->logits, width, 4);
        swap_bytes(s->state, m->state, 4);
    }
    if (note) *note = p + fixed;
    if (note_bytes) *note_bytes = size - fixed;
    return BASED_OK;
}

/* ==== 17. Taylor attention by itself =============================================================
 * Why: the taylor mixer is useful without a model around it, as an attention over any set of keys
 * and values. based.h part 9 says how; the functions here call those of part one.
 * May assume: attention and state were initialized here, from a config that was checked.
 * Later code relies on: nothing here allocates, and a state is one block that can be copied.
 */
struct based_taylor_state {
    const based_taylor *t;
    float *scratch;
    struct head_state sums;             /* points behind this struct                              */
};

int based_taylor_measure(based_taylor_sizes *out, const based_taylor_config *c, based_error *e) {
    /* stop counting features here: far above what is allowed, far below where bytes overflow */
    const uint64_t cap = U64(1) << 36;
    uint64_t d, attention, state, scratch;
    struct based_taylor t = { .fading = BASED_NO_FADING };
    CHECK_FIELDS(BASED_EINVAL, "Taylor attention", 0, e,
        FIELD(c, head_dim_k, 1, BASED_MAX_HIDDEN), FIELD(c, head_dim_v, 1, BASED_MAX_HIDDEN),
        FIELD(c, group, 1, BASED_MAX_HEADS), FIELD(c, kernel, 0, BASED_DIAGONAL));
    if (check_taylor(c, BASED_EINVAL, "Taylor attention", 0, e)) return BASED_EINVAL;
    d = count_features(c, cap);
    /* an attention: the struct, the coefficients (group, degree + 1), the multinomials (d) */
    attention = align64(sizeof(based_taylor))
                + (U64(c->group) * (c->degree + 1) + d) * sizeof(float);
    t.c = *c;
    state = align64(sizeof(based_taylor_state)) + head_state_floats(&t, d) * sizeof(float);
    scratch = scratch_floats(&t, d) * sizeof(float);
    if (d > BASED_MAX_FEATURES || state > SIZE_MAX || scratch > SIZE_MAX) {
        const char *more = d > cap ? "more than " : "";
        return fail(e, BASED_ENOMEM, "Taylor attention of degree %u and key width %u: a state "
                    "needs %s%llu bytes for %s%llu features; at most %u features, and what this "
                    "machine can address, are possible", c->degree, c->head_dim_k, more, state,
                    more, d > cap ? cap : d, BASED_MAX_FEATURES);
    }
    out->features = d;
    out->work = (d + d * c->head_dim_v) + c->group * (2 * d + d * (U64(c->head_dim_v) + 1));
    out->attention = (size_t)attention;
    out->state = (size_t)state;
    out->scratch = (size_t)scratch;
    return BASED_OK;
}

int based_taylor_init(based_taylor **out, const based_taylor_config *c, void *memory,
                      size_t memory_bytes, based_error *e) {
    based_taylor_sizes sizes;
    based_taylor *t = memory;
    int status = based_taylor_measure(&sizes, c, e);
    float *a;
    if (!status) status = check_memory(memory, memory_bytes, sizes.attention, e);
    if (!status) status = check_machine(e);
    if (status) return status;
    a = (float *)(void *)((unsigned char *)memory + align64(sizeof *t));
    t->c = *c;
    t->k = choose_kernels(0);
    t->features = (uint32_t)sizes.features;
    t->fading = BASED_NO_FADING;
    t->c.coefficients = a;
    for (uint32_t h = 0; h < c->group; h++) {
        float factorial = 1.0f;         /* without coefficients: 1/p!, the Taylor series of exp */
        for (uint32_t p = 0; p <= c->degree; p++) {
            if (p) factorial *= (float)p;
            *a++ = c->coefficients ? c->coefficients[h * (c->degree + 1) + p] : 1.0f / factorial;
        }
    }
    t->multinomial = a;
    fill_multinomials(a, c);
    *out = t;
    return BASED_OK;
}

int based_taylor_state_init(based_taylor_state **out, const based_taylor *t, void *memory,
                            size_t memory_bytes, void *scratch, size_t scratch_bytes,
                            based_error *e) {
    based_taylor_sizes sizes;
    based_taylor_state *s = memory;
    int status = based_taylor_measure(&sizes, &t->c, e);
    if (!status) status = check_memory(memory, memory_bytes, sizes.state, e);
    if (!status) status = check_memory(scratch, scratch_bytes, sizes.scratch, e);
    if (status) return status;
    s->t = t;
    s->scratch = scratch;
    s->sums = head_state((float *)(void *)((unsigned char *)memory + align64(sizeof *s)), t, 0, 0);
    s->sums.flushed = 1;                /* a subtraction may change the sums at any time */
    based_taylor_reset(s);
    *out = s;
    return BASED_OK;
}

void based_taylor_reset(based_taylor_state *s) {
    memset(s->sums.s, 0, (size_t)head_state_floats(s->t, s->t->features) * sizeof(float));
    s->sums.count = s->sums.n_recent = 0;
}

uint64_t based_taylor_count(const based_taylor_state *s) { return s->sums.count; }

void based_taylor_add(based_taylor_state *s, const float *k, const float *v, size_t n) {
    const based_taylor_config *c = &s->t->c;
    for (size_t i = 0; i < n; i++)
        append_kv(&s->sums, s->t, k + i * c->head_dim_k, v + i * c->head_dim_v, s->scratch);
}

void based_taylor_read(const based_taylor_state *s, const float *q, size_t n, float *y) {
    const based_taylor_config *c = &s->t->c;
    taylor_attention(y, c->group * c->head_dim_v, q, c->group * c->head_dim_k, n, 0, &s->sums, s->t,
                     s->scratch);
}

void based_taylor_feed(based_taylor_state *s, const float *q, const float *k, const float *v,
                       size_t n, float *y) {
    size_t dk = s->t->c.head_dim_k, dv = s->t->c.head_dim_v, group = s->t->c.group;
    for (size_t i = 0; i < n; i++) {
        based_taylor_add(s, k + i * dk, v + i * dv, 1);
        based_taylor_read(s, q + i * group * dk, 1, y + i * group * dv);
    }
}

/* Adds -phi(k) v^T to the sums, even if the pair itself is still in K and V: what is read adds up
 * to the same. */
int based_taylor_subtract(based_taylor_state *s, const float *k, const float *v, based_error *e) {
    if (!s->sums.count)
        return INVALID(e, "nothing can be subtracted from an empty state");
    if (s->t->c.window || s->t->c.decay > 0.0f)
        return INVALID(e, "nothing can be subtracted from a state with a window or with decay");
    feature_map(s->scratch, k, 1, 1, &s->t->c);
    for (size_t f = 0; f < s->t->features; f++) s->scratch[f] = -s->scratch[f];
    update_state(&s->sums, s->t, s->scratch, v, 1);
    s->sums.count--;
    set_count(&s->sums, s->t);
    return BASED_OK;
}

int based_taylor_copy(based_taylor_state *dst, const based_taylor_state *src, based_error *e) {
    if (dst->t != src->t)
        return INVALID(e, "the two states belong to different attentions");
    if (dst == src) return BASED_OK;
    memcpy(dst->sums.s, src->sums.s,
           (size_t)head_state_floats(src->t, src->t->features) * sizeof(float));
    dst->sums.count = src->sums.count;
    dst->sums.n_recent = src->sums.n_recent;
    return BASED_OK;
}

int based_taylor_merge(based_taylor_state *dst, const based_taylor_state *src, based_error *e) {
    const struct head_state *from = &src->sums;
    struct head_state *to = &dst->sums;
    const based_taylor *t = dst->t;
    size_t dk = t->c.head_dim_k, dv = t->c.head_dim_v, comp_width = (dv + 1) / 2;
    if (dst->t != src->t)
        return INVALID(e, "the two states belong to different attentions");
    if (dst == src)
        return INVALID(e, "a state cannot be merged with itself; copy it first");
    if (t->c.decay > 0.0f)
        return INVALID(e, "states with decay cannot be merged: it is not known which one is older");
    /* the sums, feature by feature, and then their compensation, two bfloat16 to a word */
    for (size_t f = 0; f < t->features; f++) {
        to->comp_z[f] = two_sum(to->z + f, from->z[f] + to->comp_z[f]) + from->comp_z[f];
        for (size_t at = 0; at < dv; at += 32) {
            size_t width = dv - at < 32 ? dv - at : 32, half = (width + 1) / 2;
            float *total = to->s + f * dv + at, *total_comp = to->comp + f * comp_width + at / 2;
            float comp[32];
            for (size_t i = 0; i < width; i++) {
                uint32_t word;
                memcpy(&word, from->comp + f * comp_width + at / 2 + i % half, sizeof word);
                comp[i] = bf16_to_f32(i < half ? word : word << 16);
            }
            t->k->compensated_add(total, total_comp, from->s + f * dv + at, width);
            t->k->compensated_add(total, total_comp, comp, width);
        }
    }
    to->count += from->count - from->n_recent;
    set_count(to, t);
    /* the recent pairs, one by one; keys are columns of K and are gathered in the scratch */
    for (size_t j = 0; j < from->n_recent; j++) {
        float *key = dst->scratch + (size_t)scratch_floats(t, t->features) - dk;
        for (size_t i = 0; i < dk; i++) key[i] = from->k[i * kv_capacity(&t->c) + j];
        append_kv(to, t, key, from->v + j * dv, dst->scratch);
    }
    return BASED_OK;
}

/* ==== 18. With an operating system ===============================================================
 * Why: convenience. Memory comes from malloc, checkpoints from files; everything here is built on
 * the calls of section 14. -DBASED_FREESTANDING leaves it out where there is no operating system.
 * May assume: nothing of a file. It may be missing, empty, a directory, or change while it is read.
 * Later code relies on: a call that fails leaves nothing allocated, open or mapped.
 */
#ifndef BASED_FREESTANDING
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef BASED_POSIX
#include <sys/mman.h>
#endif

/* malloc aligned to 64 bytes, or to large pages, which Linux is asked for: they make a step of 64
 * sessions 1.1 times as fast. *owned is what free wants back. */
static void *aligned(size_t n, void **owned) {
    size_t to = 64;
#ifdef MADV_HUGEPAGE
    if (n >= 2 << 20) to = 2 << 20;
#endif
    unsigned char *p = n <= SIZE_MAX - to ? malloc(n + to) : NULL;
    *owned = p;
    if (!p) return NULL;
    p += to - (uintptr_t)p % to;
#ifdef MADV_HUGEPAGE
    if (to > 64) madvise(p, n, MADV_HUGEPAGE);
#endif
    return p;
}

static int no_memory(const char *what, size_t n, based_error *e) {
    return fail(e, BASED_ENOMEM, "out of memory: %zu bytes for %s", n, what);
}

struct file { void *bytes, *owned, *mapped; size_t size; };

static void close_file(struct file *f) {
#ifdef BASED_POSIX
    if (f->mapped) munmap(f->mapped, f->size);
#endif
    free(f->owned);
}

/* Reads n bytes, and goes on where a signal interrupts; returns how many bytes there were. */
static size_t read_bytes(FILE *in, void *to, size_t n) {
    size_t at = 0;
    do {
        clearerr(in);
        at += fread((unsigned char *)to + at, 1, n - at, in);
    } while (at < n && ferror(in) && errno == EINTR);
    return at;
}

/* Reads a pipe to its end; its first byte was read already. The header says how long the file is.
 * If it is none, only the header is read, and then refused as such. */
static int load_pipe(struct file *f, FILE *in, char first, const char *path, based_error *e) {
    unsigned char head[sizeof(based_config)] = { (unsigned char)first };
    size_t n = 1 + read_bytes(in, head + 1, sizeof head - 1), size = n;
    if (n == sizeof head && memcmp(head, BASED_MAGIC, 8) == 0) {
        const unsigned char *low = head + offsetof(based_config, file_size);
        uint64_t says = 0;
        for (int i = 7; i >= 0; i--) says = says << 8 | low[i];
        /* one byte more than it says, to see whether there are more */
        if (says > size) size = says < SIZE_MAX ? (size_t)says + 1 : SIZE_MAX;
    }
    f->bytes = aligned(size, &f->owned);
    if (!f->bytes) return no_memory(path, size, e);
    memcpy(f->bytes, head, n);
    f->size = n + read_bytes(in, (char *)f->bytes + n, size - n);
    return ferror(in) ? fail(e, BASED_EIO, "%s: %s", path, strerror(errno)) : BASED_OK;
}

/* The bytes of a file: mapped and shared where they can be used as they are, else read. */
static int load_file(struct file *f, const char *path, based_error *e) {
    FILE *in;
    long size = -1;
    char first = 0;
    int status = BASED_OK;
    do in = fopen(path, "rb"); while (!in && errno == EINTR);
    if (!in) return fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    /* a directory can be opened, but not read */
    if (read_bytes(in, &first, 1) == 0) {
        status = ferror(in) ? fail(e, BASED_EIO, "%s: %s", path, strerror(errno))
                            : DAMAGED(e, "%s: the file is empty", path);
    } else if (fseek(in, 0, SEEK_END) || (size = ftell(in)) < 0 || fseek(in, 0, SEEK_SET)) {
        /* a pipe has no end to go to, and is still at its second byte */
        status = errno == ESPIPE && size < 0 ? load_pipe(f, in, first, path, e)
                                             : fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    } else {
        f->size = (size_t)size;
#ifdef BASED_POSIX
        if (!machine_is_big_endian()) {
            void *p = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fileno(in), 0);
            if (p != MAP_FAILED) f->bytes = f->mapped = p;
        }
#ifdef MADV_HUGEPAGE
        /* larger pages are read some 5 % faster; where there are none, it does no harm */
        if (f->mapped) madvise(f->mapped, f->size, MADV_HUGEPAGE);
#endif
#endif
        if (!f->bytes) {
            f->bytes = aligned(f->size, &f->owned);
            if (!f->bytes)
                status = no_memory(path, f->size, e);
            else if (read_bytes(in, f->bytes, f->size) < f->size)
                status = fail(e, BASED_EIO, "%s: %s", path, ferror(in) ? strerror(errno)
                              : "the file became shorter while it was read");
        }
    }
    fclose(in);
    return status;
}

/* The environment variable BASED_KERNELS (plain, avx2, avx512vnni) excludes newer instructions, for
 * tests and comparisons. */
static int kernel_flags(void) {
    const char *name = getenv("BASED_KERNELS");
    return !name ? 0 : !strcmp(name, "plain") ? BASED_PLAIN : !strcmp(name, "avx2") ? BASED_AVX2
           : !strcmp(name, "avx512vnni") ? BASED_AVX512 : 0;
}

based_model *based_open(const char *path, int flags, based_error *e) {
    struct file f = { NULL, NULL, NULL, 0 };
    based_model *m = NULL;
    void *owned = NULL, *memory = NULL;
    size_t need;
    if (load_file(&f, path, e) == BASED_OK) {
        int status = based_to_native(f.bytes, f.size, flags, e);
        need = status ? 0 : based_model_bytes(f.bytes, f.size, e);
        if (need && !(memory = aligned(need, &owned))) no_memory("the model", need, e);
        if (memory)
            based_model_init(&m, memory, need, f.bytes, f.size, flags | kernel_flags(), e);
        /* "path: what is wrong with its content" */
        if (!m && e) {
            based_error inner = *e;
            fail(e, inner.status, "%s: %s", path, inner.text);
        }
    }
    if (!m) {
        free(owned);
        close_file(&f);
        return NULL;
    }
    m->owned = f.owned;
    m->mapped = f.mapped;
    m->mapped_size = f.size;
    m->self = owned;
    return m;
}

void based_close(based_model *m) {
    if (!m) return;
    struct file f = { NULL, m->owned, m->mapped, m->mapped_size };
    void *self = m->self;               /* where m itself lies */
    close_file(&f);
    free(self);
}

based_session *based_session_new(const based_model *m, uint32_t block, based_error *e) {
    based_session *s = NULL;
    void *owned = NULL;
    size_t need = based_session_bytes(m, block);
    void *memory = need ? aligned(need, &owned) : NULL;
    if (need && !owned) return no_memory("a session", need, e), NULL;
    if (based_session_init(&s, m, memory, need, block, e)) return free(owned), NULL;
    s->owned = owned;
    return s;
}

void based_session_free(based_session *s) {
    if (s) free(s->owned);
}
#endif

/* ==== 19. Walled off I: machines without vector units ============================================
 * Twins of dot, rows_f32_body, weighted_sum_body and tile_generic for ARM without NEON (Cortex-M)
 * and RISC-V without vectors. The generic functions in sections 9 and 10 define the result. The
 * twins make the same additions in the same order, but four lanes at a time, because sixteen sums
 * do not fit the registers of these machines.
 *
 * Why two versions: one body for both, with the number of lanes as a constant, gives the same
 * bits, but then a Cortex-M4F takes 53 to 69 % more instructions per token. The tile alone costs
 * 46 %: 1,490,520 instead of 1,019,577 instructions per token of an 8-bit model.
 *
 * They may assume what the generic functions assume: columns are padded to a multiple of 32.
 * Tests: `make firmware` compares the logits of each emulated board with those of the host. With
 * -DBASED_NARROW on x86-64, tests/test_based.c compares the AVX2 and AVX-512 sets with the twins.
 * tests/test_soft_float.c and test_soft_float_cores.c compare floats in integer registers with
 * those of this machine.
 */
#ifdef BASED_SOFT_FLOAT
/* ---- Floats in integer registers ----------------------------------------------------------------
 * Without an FPU most of a token's time goes into exp and into products that are added. Functions
 * that keep a number in registers from step to step, and know the common case only, are faster than
 * the compiler's, which pack and unpack it for every operation. They round as those do. A token of
 * stories260K-q8 takes 5.8 instead of 12.2 million instructions on a Cortex-M0+, 3.3 instead of 5.4
 * on an M3, 4.0 instead of 10.5 on RV32IMAC.
 */
INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE int exponent(uint32_t bits) { return (int)(bits << 1 >> 24); }

/* A float m / 2^29 * 2^(e - 127) with a sign. m begins at bit 29 and has six bits more than a float
 * that are 0 outside add_product; or all is 0. */
struct unpacked { uint32_t m, sign; int e; };

/* Zeros, subnormal numbers, infinities and NaNs are treated like others: beside a product that is
 * not rare (see below) they are so small or so large that the sum is the right one. */
INLINE struct unpacked unpack(float x) {
    uint32_t bits = bits_of_float(x);
    struct unpacked u = { (bits << 9 >> 3) | 0x20000000, bits, exponent(bits) };
    return u;
}

INLINE float pack(struct unpacked u) {
    uint32_t bits = (u.sign >> 31 << 31) + ((uint32_t)(u.e - 1) << 23) + (u.m >> 6);
    return u.m ? float_of_bits(bits) : 0.0f;
}

/* Whether two factors or their product, with these exponents, are so large or so small that an
 * infinity, a NaN, a zero or a subnormal number may be near. The compiler's functions treat these;
 * they are called by functions of their own, so that the fast ones need not save registers. */
INLINE int is_rare(int x, int y, int product) {
    return ((x - 64) | (y - 64) | (product - 64)) & ~127;
}

__attribute__((noinline)) static float rare_mul_add(float a, float b, float c) { return a * b + c; }
__attribute__((noinline)) static float rare_divide(float a, float b) { return a / b; }
__attribute__((noinline)) static float rare_scaled_sum(float y, int32_t s, float w, float x) {
    return y + (float)s * w * x;
}

/* m / 2^bits, rounded to nearest, halves to even; `lost` is not 0 if m had more bits, cut off */
INLINE uint32_t round_off(uint32_t m, uint32_t lost, const int bits) {
    uint32_t sum = m + (1u << (bits - 1));
    return sum << (32 - bits) | lost ? sum >> bits : sum >> bits & ~1u;
}

/* See section 9. A NaN may become any number. */
INLINE int32_t quantized(float x, float scale) {
    uint32_t bits = bits_of_float(x), m = (bits << 9 >> 9) | 0x800000;
    int by = 277 - exponent(bits) - exponent(bits_of_float(scale));
    m = by < 17 ? 127 : by > 24 ? 0 : round_off(m, 0, by);
    m = m < 127 ? m : 127;
    return (int32_t)(bits >> 31 ? 0u - m : m);
}

/* m / 2^by, by < 32; the lowest bit is set, too, if bits are lost */
INLINE uint32_t shift_right(uint32_t m, int by) {
    uint32_t shifted = m >> by;
    return shifted << by == m ? shifted : shifted | 1;
}

/* a * b / 2^32 for multiples of 2^6; *lost is not 0 if bits are cut off */
INLINE uint32_t high_product(uint32_t a, uint32_t b, uint32_t *lost) {
#if defined(__ARM_ARCH_6M__) || defined(__XTENSA__)    /* an M0+ and lx106 have 32-bit products */
    uint32_t a1 = a >> 16, a0 = (a & 0xffff) >> 6, b1 = b >> 16, b0 = (b & 0xffff) >> 6;
    uint32_t low = a0 * b0, middle = a1 * b0 + a0 * b1 + (low >> 10);
    *lost = (middle | low) << 22;
    return a1 * b1 + (middle >> 10);
#else
    uint64_t product = (uint64_t)a * b;
    *lost = (uint32_t)product;
    return (uint32_t)(product >> 32);
#endif
}

#if defined(__ARM_FEATURE_CLZ) || defined(__XTENSA__)
enum { COUNTS_ZEROS = 1 };              /* one instruction does */
#else
enum { COUNTS_ZEROS = 0 };
#endif

/* The number of zeros before the first bit of m */
INLINE int leading_zeros(uint32_t m) {
    int n = 0;
    if (COUNTS_ZEROS) return __builtin_clz(m);
    _Pragma("GCC unroll 5") for (int by = 16; by; by /= 2)
        if (m >> (32 - by) == 0) m <<= by, n += by;
    return n;
}

/* ---- exp_approx ---------------------------------------------------------------------------------
 * A float is a word below with 24 significant bits, the first of them near bit 30; its power of two
 * is known from its place in the polynomial and from that of r. So nothing is packed or unpacked,
 * and every step is rounded as exp_definition rounds it. */

/* m >= 2^24 with its highest 24 bits, rounded to nearest, halves to even; lost as above */
INLINE uint32_t round_to_24(uint32_t m, uint32_t lost) {
    uint32_t half = COUNTS_ZEROS ? 128u >> leading_zeros(m) : 128, rest;
    while (!COUNTS_ZEROS && m >> 24 < half) half >>= 1;
    m += half;
    rest = m & (2 * half - 1);
    return rest | lost ? m - rest : m & ~(2 * half);
}

/* a * b / 2^31 */
INLINE uint32_t product_of_24(uint32_t a, uint32_t b) {
    uint32_t lost, p = high_product(a << 1, b, &lost);
    return round_to_24(p, lost);
}

/* c + a * b / 2^31 / 2^by, or - if `minus` is all ones */
INLINE uint32_t add_product_to(uint32_t c, uint32_t a, uint32_t b, int by, uint32_t minus) {
    uint32_t p = shift_right(product_of_24(a, b), by);
    return round_to_24(c + (p ^ minus) - minus, 0);
}

static float exp_approx(float x) {
    static const uint32_t c[] = { 0x448ef780, 0x55551780, 0x55552380, 0x40000000 };
    uint32_t bits = bits_of_float(x), size = bits << 1 >> 1, n = 0, y = 0x40000000, u;
    uint32_t minus = 0u - (bits >> 31); /* all ones if r is negative; now, if x is */
    int e = exponent(bits) - 127;       /* r = x is m * 2^(e - 30) */
    uint32_t m = (size << 7 | 0x40000000) & 0x7fffffff;
    int32_t power = 127;
    if (size > 0x7f800000) return x;                            /* NaN */
    if (minus && size > 0x42ae0000) return 0.0f;                /* below -87 */
    if (!minus && size > 0x42b00000) e = 6, m = 0x58000000;     /* 88 */
    if (e >= -2) n = round_off(product_of_24(m, 0x5c551d80), 0, 29 - e);
    if (n) {
        /* r = |x| - n * 355 / 512 (exact, in units of 2^-25) + n * 2.12194440e-4, in 2^-37 */
        int32_t exact = (int32_t)((m >> 7 << (e + 2)) - n * (355u << 16));
        int64_t r = (int64_t)exact * 4096 + (int64_t)round_to_24(n * 0x1bd0106, 0);
        power = minus ? 127 - (int32_t)n : 127 + (int32_t)n;
        if (r < 0) r = -r, minus = ~minus;
        e = r >> 31 ? -1 : -7;
        m = r >> 31 ? (uint32_t)(r >> 6) | ((r & 63) != 0) : (uint32_t)r;
        for (; m < 0x40000000; m <<= 1) e--;
        m = round_to_24(m, 0);
        if (m >> 31) m >>= 1, e++;
    }
    if (e >= -26) {                     /* not so small that 1 + r is 1 */
        u = 0x2db69d00;
        for (size_t i = 0; i < COUNT(c); i++) u = add_product_to(c[i], u, m, 1 - e, minus);
        u = add_product_to(m, u, product_of_24(m, m), -1 - e, minus);
        y = round_to_24(y + (shift_right(u, -e) ^ minus) - minus, 0);
    }
    /* y * 2^n */
    bits = y >> 30 ? y >> 7 : (power--, y >> 6);
    return float_of_bits(((uint32_t)(power - 1) << 23) + bits);
}

/* p / 2^30 * 2^(e - 127), rounded to a float, with the sign of `sign`. p is at least 2^30 and less
 * than 2^31; lost as above. */
INLINE struct unpacked rounded(uint32_t p, uint32_t lost, uint32_t sign, int e) {
    return (struct unpacked){ round_off(p, lost, 7) << 6, sign, e };
}

/* s += p, not 0 */
INLINE void add(struct unpacked *s, struct unpacked p) {
    uint32_t sum = p.m, other = s->m, sign = p.sign;
    int e = p.e, d = e - s->e;
    if (d < 0) {
        sum = d < -31 ? 0 : shift_right(sum, -d);
        e = s->e;
    } else {
        other = d > 31 ? 0 : shift_right(other, d);
    }
    if ((int32_t)(sign ^ s->sign) >= 0) {
        sum += other;
    } else {
        sum -= other;
        if ((int32_t)sum < 0) {
            sum = 0u - sum;
            sign = s->sign;
        }
        if (sum == 0) {
            *s = (struct unpacked){ 0, 0, 0 };
            return;
        }
        for (; sum < 0x20000000; sum <<= 1) e--;
    }
    if (sum >= 0x40000000) {
        sum = sum >> 1 | (sum & 1);
        e++;
    }
    *s = (struct unpacked){ round_off(sum, 0, 6) << 6, sign, e };
}

/* s += a * b, both rounded; or 0 and nothing is done, if that is rare. A sum of such products is 0
 * or not less than the lowest bit of a product, 2^-86. */
INLINE int mul_add_to(struct unpacked *s, float a, float b) {
    uint32_t x = bits_of_float(a), y = bits_of_float(b), p, lost;
    int ex = exponent(x), ey = exponent(y), e = ex + ey - 127;
    if (is_rare(ex, ey, e)) return 0;
    p = high_product(x << 8 | 0x80000000u, y << 9 >> 2 | 0x40000000u, &lost);
    if (p >> 30) e++;
    else p <<= 1;
    add(s, rounded(p, lost, x ^ y, e));
    return 1;
}

__attribute__((noinline)) static float mul_add(float a, float b, float c) {
    struct unpacked s = unpack(c);
    return mul_add_to(&s, a, b) ? pack(s) : rare_mul_add(a, b, c);
}

/* a / b: long division, 8 bits at a time where an instruction divides, else one. The quotient of
 * two floats is never a half that would have to be rounded to even. */
__attribute__((noinline)) static float divide(float a, float b) {
    uint32_t x = bits_of_float(a), y = bits_of_float(b), q = 1;         /* q: 25 bits in the end */
    uint32_t rest = (x & 0x7fffff) | 0x800000, by = (y & 0x7fffff) | 0x800000;
    int ex = exponent(x), ey = exponent(y), e = ex - ey + 126;
    if (is_rare(ex, ey, e)) return rare_divide(a, b);
    if (rest < by) rest <<= 1, e--;
    rest -= by;
#if defined(__ARM_FEATURE_IDIV) || defined(__riscv_div)
    for (int i = 0; i < 3; i++) rest <<= 8, q = q << 8 | rest / by, rest %= by;
#else
    _Pragma("GCC unroll 4") for (int i = 0; i < 24; i++) {
        rest <<= 1, q <<= 1;
        if (rest >= by) rest -= by, q++;
    }
#endif
    return float_of_bits(((x ^ y) >> 31 << 31) + ((uint32_t)e << 23) + ((q + 1) >> 1));
}

/* y + (float)s * w * x, where w is a bfloat16, x a power of two and |s| < 2^24 */
__attribute__((noinline)) static float add_scaled_sum(float y, int32_t s, float w, float x) {
    uint32_t p = s < 0 ? 0u - (uint32_t)s : (uint32_t)s, scale = bits_of_float(w);
    int ew = exponent(scale), ex = exponent(bits_of_float(x)), e = ew + ex - 103, zeros;
    struct unpacked sum = unpack(y), product;
    if (s == 0 || is_rare(ew, ex, e - 24)) return rare_scaled_sum(y, s, w, x);
    p *= (scale >> 16 & 127) | 128;     /* 8 to 32 bits */
    zeros = leading_zeros(p);
    p <<= zeros;
    product = rounded(p >> 1, p & 1, (uint32_t)s ^ scale, e - zeros);
    if (bits_of_float(y) == 0) return pack(product);
    add(&sum, product);
    return pack(sum);
}
#endif

#ifdef BASED_NARROW
#ifndef BASED_SOFT_FLOAT
INLINE float add_scaled_sum(float y, int32_t s, float w, float x) { return y + (float)s * w * x; }
#endif

struct four { float a, b, c, d; };      /* neighboring lanes, in registers */

INLINE struct four mul_add_four(struct four s, const float *x, const float *y) {
    s.a = mul_add(x[0], y[0], s.a);
    s.b = mul_add(x[1], y[1], s.b);
    s.c = mul_add(x[2], y[2], s.c);
    s.d = mul_add(x[3], y[3], s.d);
    return s;
}

INLINE struct four add_four(struct four x, struct four y) {
    struct four s = { x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d };
    return s;
}

INLINE float dot(const float *a, const float *b, size_t n) {
    struct four s0 = { 0, 0, 0, 0 }, s1 = s0, s2 = s0, s3 = s0;
    float s[LANES];
    size_t i = 0;
    for (; n - i >= LANES; i += LANES) {
        s0 = mul_add_four(s0, a + i, b + i);
        s1 = mul_add_four(s1, a + i + 4, b + i + 4);
        s2 = mul_add_four(s2, a + i + 8, b + i + 8);
        s3 = mul_add_four(s3, a + i + 12, b + i + 12);
    }
    if (i == n) {                       /* the tree of horizontal_sum, in registers */
        s0 = add_four(add_four(s0, s2), add_four(s1, s3));
        return (s0.a + s0.c) + (s0.b + s0.d);
    }
    memcpy(s, &s0, sizeof s0);
    memcpy(s + 4, &s1, sizeof s1);
    memcpy(s + 8, &s2, sizeof s2);
    memcpy(s + 12, &s3, sizeof s3);
    for (size_t l = 0; i < n; l++, i++) s[l] += a[i] * b[i];
    return horizontal_sum(s);
}

INLINE void rows_f32_body(float *out, size_t out_stride, const float *w, size_t rows,
                          const struct activations *x, const int prefetch) {
    size_t cols = x->cols;
    (void)prefetch;
    for (size_t r = 0; r < rows; r += 4, w += 4 * cols)
        for (size_t t = 0; t < x->n; t++) {
            const float *v = x->x + t * cols;
            float *y = out + t * out_stride + r;
            for (size_t i = 0; i < 4 && i < rows - r; i++) y[i] = dot(w + i * cols, v, cols);
        }
}

#ifdef BASED_SOFT_FLOAT
INLINE void weighted_sum_body(float *out, const float *w, const float *rows, size_t n, size_t width,
                              size_t stride, const int columns) {
    (void)columns;
    for (size_t e = 0, i = 0; e < width; e++, rows++, i = 0) {
        struct unpacked s = { 0, 0, 0 };
        while (i < n && mul_add_to(&s, w[i], rows[i * stride])) i++;
        out[e] = pack(s);
        for (; i < n; i++) out[e] = mul_add(w[i], rows[i * stride], out[e]);
    }
}
#else
INLINE void weighted_sum_body(float *out, const float *w, const float *rows, size_t n, size_t width,
                              size_t stride, const int columns) {
    size_t e = 0;
    (void)columns;
    for (; width - e >= 4; e += 4) {
        struct four s = { 0, 0, 0, 0 };
        for (size_t i = 0; i < n; i++) {
            const float wi[4] = { w[i], w[i], w[i], w[i] };
            s = mul_add_four(s, wi, rows + e + i * stride);
        }
        memcpy(out + e, &s, sizeof s);
    }
    WEIGHTED_SUM(1)
}
#endif

/* ---- The integer products of four rows of a group, in three versions ------------------------- */
#ifdef __ARM_FEATURE_MVE
/* Helium, the vector unit of Cortex-M55 and M85: a load gathers the words of one row, which lie
 * between those of its neighbors, and one instruction sums sixteen products of signed bytes. */
#include <arm_mve.h>

INLINE int8x16_t gather_row(const uint32_t *word, uint32x4_t index) {
    return vreinterpretq_s8_u32(vldrwq_gather_shifted_offset_u32(word, index));
}

INLINE void dot_four_rows(int32_t s[4], const uint32_t *word, const int8_t *q, size_t columns,
                          int32_t offset, const int bits) {
    const uint32x4_t every16 = vshlq_n_u32(vidupq_n_u32(0, 1), 4);
    if (bits == 8) {                    /* w + 128 with its highest bit flipped is w: no offset */
        const int8x16_t flip = vdupq_n_s8(-128);
        int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (const int8_t *end = q + columns; q < end; q += 16, word += 64) {
            const int8x16_t v = vldrbq_s8(q);
            s0 = vmladavaq_s8(s0, veorq_s8(gather_row(word, every16), flip), v);
            s1 = vmladavaq_s8(s1, veorq_s8(gather_row(word + 1, every16), flip), v);
            s2 = vmladavaq_s8(s2, veorq_s8(gather_row(word + 2, every16), flip), v);
            s3 = vmladavaq_s8(s3, veorq_s8(gather_row(word + 3, every16), flip), v);
        }
        s[0] = s0;
        s[1] = s1;
        s[2] = s2;
        s[3] = s3;
    } else {                            /* low and high halves belong to alternate words of q */
        const uint32x4_t every2 = vshlq_n_u32(vidupq_n_u32(0, 1), 1);
        const int32_t *x = (const int32_t *)(const void *)q;
        const int8x16_t even = vreinterpretq_s8_s32(vldrwq_gather_shifted_offset_s32(x, every2)),
                        odd = vreinterpretq_s8_s32(vldrwq_gather_shifted_offset_s32(x + 1, every2));
        (void)columns;
        for (size_t r = 0; r < 4; r++) {
            int8x16_t v = gather_row(word + r, every16), low = vandq_s8(v, vdupq_n_s8(15)),
                      high = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4));
            s[r] = vmladavaq_s8(vmladavaq_s8(offset, low, even), high, odd);
        }
    }
}
#else
/* Four numbers of a vector in the form that dot_bytes multiplies by the four bytes of a word. */
#ifdef __ARM_FEATURE_SIMD32     /* Cortex-M4 and M7: one instruction adds two 16-bit products */
#include <arm_acle.h>
struct columns { int16x2_t even, odd; };

INLINE struct columns four_columns(const int8_t *q) {
    uint32_t four;
    memcpy(&four, q, sizeof four);
    struct columns c = { __sxtb16((int8x4_t)four), __sxtb16((int8x4_t)(four >> 8)) };
    return c;
}

INLINE int32_t dot_bytes(int32_t s, uint32_t bytes, struct columns q) {
    uint32_t odd;
    /* rotate and extend: no compiler makes one instruction of the two by itself */
    __asm__("uxtb16 %0, %1, ror #8" : "=r"(odd) : "r"(bytes));
    return __smlad((int16x2_t)odd, q.odd, __smlad((int16x2_t)__uxtb16(bytes), q.even, s));
}
#else
struct columns { int32_t a, b, c, d; };

INLINE struct columns four_columns(const int8_t *q) {
    struct columns c = { q[0], q[1], q[2], q[3] };
    return c;
}

INLINE int32_t dot_bytes(int32_t s, uint32_t bytes, struct columns q) {
    return s + (int32_t)(bytes & 255) * q.a + (int32_t)(bytes >> 8 & 255) * q.b
             + (int32_t)(bytes >> 16 & 255) * q.c + (int32_t)(bytes >> 24) * q.d;
}
#endif

/* s + the products of one word: four columns of 8 bits, or four and four more (high) of 4 bits */
INLINE int32_t dot_word(int32_t s, const uint32_t *word, struct columns q, struct columns high,
                        const int bits) {
#if defined(__ARM_ARCH_6M__) || defined(__riscv) /* one instruction loads a byte, two cut it out */
    const uint8_t *byte = (const uint8_t *)word;
    if (bits == 8) return s + byte[0] * q.a + byte[1] * q.b + byte[2] * q.c + byte[3] * q.d;
#else
    if (bits == 8) return dot_bytes(s, *word, q);
#endif
    return dot_bytes(dot_bytes(s, *word & 0x0f0f0f0f, q), *word >> 4 & 0x0f0f0f0f, high);
}

/* The four sums, the columns and the pointers just fit in thirteen registers. */
INLINE void dot_four_rows(int32_t s[4], const uint32_t *word, const int8_t *q, size_t columns,
                          int32_t offset, const int bits) {
    int32_t s0 = offset, s1 = offset, s2 = offset, s3 = offset;
    for (const int8_t *end = q + columns; q < end; q += bits == 8 ? 4 : 8, word += 16) {
        struct columns c = four_columns(q), high = four_columns(bits == 8 ? q : q + 4);
        s0 = dot_word(s0, word, c, high, bits);
        s1 = dot_word(s1, word + 1, c, high, bits);
        s2 = dot_word(s2, word + 2, c, high, bits);
        s3 = dot_word(s3, word + 3, c, high, bits);
    }
    s[0] = s0;
    s[1] = s1;
    s[2] = s2;
    s[3] = s3;
}
#endif

INLINE void tile_generic(TILE, const int bits) {
    for (size_t t = from; t < to; t++, out += out_stride)
        for (size_t r = 0; r < 16; r += 4) {
            const uint32_t *two = scales + r / 2, *word = w + r;
            struct four y = { 0, 0, 0, 0 };
            size_t at = group_at(x, t, 0), width = group_width(bits);
            for (size_t g = 0; g < x->groups; g++) {
                float scale = x->scale[at];
                int32_t s[4];
                dot_four_rows(s, word, x->q + at * width, group_columns(x, g, bits),
                              x->offset[at] - ROUND_MAGIC, bits);
                y.a = add_scaled_sum(y.a, s[0], bf16_to_f32(two[0] << 16), scale);
                y.b = add_scaled_sum(y.b, s[1], bf16_to_f32(two[0]), scale);
                y.c = add_scaled_sum(y.c, s[2], bf16_to_f32(two[1] << 16), scale);
                y.d = add_scaled_sum(y.d, s[3], bf16_to_f32(two[1]), scale);
                at += x->pack;
                two += 8;
                word += group_words(bits);
            }
            out[r] = y.a;
            out[r + 1] = y.b;
            out[r + 2] = y.c;
            out[r + 3] = y.d;
        }
}
#endif

/* ==== 20. Walled off II: AVX2, AVX-512, AMX, dot products of ARM and WebAssembly =================
 * Why: no compiler finds the instructions for sums of products of bytes by itself, so the tiles of
 * quantized weights have a version with intrinsics for each instruction set. The float kernels are
 * those of section 10, compiled again. tile_generic defines the result.
 *
 * They may assume that the processor has the instructions (choose_kernels asks it), that columns
 * are padded to a multiple of 32, that the vectors of a pack lie side by side, and that the
 * product with the scale of a vector is exact (quantize_group), so that a fused addition gives the
 * same bits.
 *
 * Tests: tests/test_based.c compares every set that the machine supports with the generic one.
 */
/* The same weights for `many` vectors from t on, all of one pack. */
#define VECTORS                                                                                    \
    float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w,                      \
    const struct activations *x, size_t t, const size_t many
/* Calls function for the vectors from t on, `many` at a time, as long as a pack has so many. */
#define IN_STEPS(many, function, ...)                                                              \
    for (; (many) <= x->pack && t % (many) == 0 && t + (many) <= to;                               \
         t += (many), out += (many) * out_stride)                                                  \
        function(out, out_stride, scales, w, x, t, many, __VA_ARGS__);

#if defined(__GNUC__) && defined(__x86_64__) && !defined(BASED_FREESTANDING)
#define BASED_X86 1
#include <cpuid.h>
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512_TARGETS "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define AVX512 __attribute__((target(AVX512_TARGETS)))
#define UNROLL8 _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")
#define NO_UNROLL _Pragma("GCC unroll 1")
FLOAT_KERNELS(avx2, AVX2, 16)
FLOAT_KERNELS(avx512, AVX512, 32)
ROWS_KERNEL(avx2, AVX2, 0)      /* for AVX-512 too, which gains nothing: memory is the limit */

typedef int32_t __attribute__((may_alias)) four_bytes;  /* of a quantized vector */

/* How many words ahead of their use weights are prefetched. This makes generating text 5 to 12 %
 * faster on Intel processors with AMX, and the AVX2 tiles of 8 bits 10 % faster. It is off for
 * AVX-512 without AMX: on Zen 4 it cost a sixth, because hardware prefetching works better alone
 * there. */
enum { PREFETCH_WORDS = 512 };

/* ---- AVX2: eight rows in a register ---------------------------------------------------------- */

/* s[half of the rows][vector]: the sums of one group for `many` (a constant for the compiler)
 * vectors. maddubs multiplies unsigned by signed bytes and adds pairs of products in 16 bits. 8
 * bits: the factors are |w| <= 128 and x with the sign of w; a pair just fits. 4 bits: w is
 * unsigned, and the sum of all sixteen products of a lane fits: 16 * 15 * 127 < 32768. */
AVX2 INLINE void sum_group(__m256i s[2][4], const __m256i *word, const four_bytes *q,
                           size_t columns, const size_t many, const int bits) {
    const __m256i flip = _mm256_set1_epi8(-128), one = _mm256_set1_epi16(1),
                  low = _mm256_set1_epi8(15);
    for (size_t i = 0; i < many; i++) s[0][i] = s[1][i] = _mm256_setzero_si256();
    /* unrolled, this loop would need more registers than there are */
    NO_UNROLL for (size_t pair = 0; pair < columns / 4; pair += 2) {
        for (size_t part = 0; part < 4; part++) {
            size_t c = pair + part / 2, h = part % 2;
            __m256i v = _mm256_loadu_si256(word + h + (bits == 8 ? 2 * c : pair)), size;
            if (bits == 8) v = _mm256_xor_si256(v, flip);
            else v = _mm256_and_si256(c > pair ? _mm256_srli_epi16(v, 4) : v, low);
            size = bits == 8 ? _mm256_abs_epi8(v) : v;
            for (size_t i = 0; i < many; i++) {
                __m256i x = _mm256_set1_epi32(q[i * (group_width(bits) / 4) + c]);
                x = _mm256_maddubs_epi16(size, bits == 8 ? _mm256_sign_epi8(x, v) : x);
                if (bits == 8) s[h][i] = _mm256_add_epi32(s[h][i], _mm256_madd_epi16(x, one));
                else s[h][i] = _mm256_add_epi16(s[h][i], x);
            }
        }
    }
    for (size_t i = 0; i < many && bits == 4; i++) {
        s[0][i] = _mm256_madd_epi16(s[0][i], one);
        s[1][i] = _mm256_madd_epi16(s[1][i], one);
    }
}

AVX2 INLINE void tile_ymm(VECTORS, const int bits) {
    size_t at = group_at(x, t, 0), words = group_words(bits);
    __m256 y[2][4];
    for (size_t i = 0; i < many; i++) y[0][i] = y[1][i] = _mm256_setzero_ps();
    for (size_t g = 0; g < x->groups; g++, at += x->pack) {
        __m256i s[2][4];
        const __m256i *word = (const __m256i *)(const void *)(w + g * words);
        const four_bytes *q = (const four_bytes *)(x->q + at * group_width(bits));
        for (size_t i = 0; i < words && t == 0; i += 16)
            PREFETCH(w + PREFETCH_WORDS + g * words + i);
        sum_group(s, word, q, group_columns(x, g, bits), many, bits);
        for (size_t h = 0; h < 2; h++) {
            __m128i half = _mm_loadu_si128((const __m128i *)(const void *)(scales + g * 8 + 4 * h));
            __m256 ws = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
            for (size_t i = 0; i < many; i++) {
                __m256 product, scale = _mm256_set1_ps(x->scale[at + i]);
                if (bits == 4) {        /* 8 bits: w has its sign, so no offset is left */
                    __m256i offset = _mm256_set1_epi32(x->offset[at + i] - ROUND_MAGIC);
                    s[h][i] = _mm256_add_epi32(s[h][i], offset);
                }
                product = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s[h][i]), ws), scale);
                y[h][i] = _mm256_add_ps(y[h][i], product);
            }
        }
    }
    for (size_t i = 0; i < many; i++, out += out_stride) {
        _mm256_storeu_ps(out, y[0][i]);
        _mm256_storeu_ps(out + 8, y[1][i]);
    }
}

AVX2 INLINE void tile_avx2(TILE, const int bits) {
    size_t t = from;
    IN_STEPS(4, tile_ymm, bits)
    IN_STEPS(1, tile_ymm, bits)
}

/* ---- AVX-512 with VNNI: sixteen rows in a register ------------------------------------------- */

/* v: columns 4c .. 4c+3 and 4c+4 .. 4c+7 of sixteen rows of one group */
AVX512 INLINE void load_pair(__m512i v[2], const uint32_t *w, size_t c, const int bits) {
    const __m512i low = _mm512_set1_epi8(15);
    v[0] = _mm512_loadu_si512(w + (bits == 8 ? 16 : 8) * c);
    v[1] = bits == 8 ? _mm512_loadu_si512(w + 16 * c + 16) : _mm512_srli_epi16(v[0], 4);
    for (size_t i = 0; i < 2 && bits == 4; i++) v[i] = _mm512_and_si512(v[i], low);
}

struct row_scales { __m512 scale, magic; };     /* of sixteen rows, and ROUND_MAGIC_F * scale */

AVX512 INLINE struct row_scales load_scales(const uint32_t *scales) {
    __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)scales);
    struct row_scales ws;
    ws.scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    ws.magic = _mm512_mul_ps(ws.scale, _mm512_set1_ps(ROUND_MAGIC_F));
    return ws;
}

/* y + (float)s * scale of the rows * scale of x in two instructions, for a sum s that is given as
 * ROUND_MAGIC + s: its bits are those of the float ROUND_MAGIC_F + s. A scale of weights has 8
 * significant bits, so `magic` is exact, and fmsub rounds s * scale once. */
AVX512 INLINE __m512 add_scaled(__m512 y, __m512i s, struct row_scales ws, float x_scale) {
    __m512 product = _mm512_fmsub_ps(_mm512_castsi512_ps(s), ws.scale, ws.magic);
    return _mm512_fmadd_ps(product, _mm512_set1_ps(x_scale), y);
}

/* Adds one group to y: sixteen rows for each of `many` vectors. Two sums halve the chain of
 * dependent instructions. many, columns and bits are constants for the compiler. For one vector the
 * loop over bytes is not unrolled: the order in which gcc puts sixteen loads costs up to 8 %. */
AVX512 INLINE void add_group(__m512 y[8], const uint32_t *scales, const uint32_t *w,
                             const struct activations *x, size_t at, const size_t many,
                             const size_t columns, const int bits) {
    const size_t stride = group_width(bits) / 4;
    const int one = many == 1 && bits == 8;
    const four_bytes *q = (const four_bytes *)(x->q + at * group_width(bits));
    struct row_scales ws = load_scales(scales);
    __m512i v[16];
    for (size_t c = 0; !one && c < columns / 4; c += 2) load_pair(v + c, w, c, bits);
    UNROLL8 for (size_t i = 0; i < many; i++, q += stride) {
        __m512i s = _mm512_set1_epi32(x->offset[at + i]), more = _mm512_setzero_si512();
        if (!one) for (size_t c = 0; c < columns / 4; c += 2) {
            s = _mm512_dpbusd_epi32(s, v[c], _mm512_set1_epi32(q[c]));
            more = _mm512_dpbusd_epi32(more, v[c + 1], _mm512_set1_epi32(q[c + 1]));
        } else NO_UNROLL for (size_t c = 0; c < columns / 4; c += 2) {
            load_pair(v, w, c, bits);
            s = _mm512_dpbusd_epi32(s, v[0], _mm512_set1_epi32(q[c]));
            more = _mm512_dpbusd_epi32(more, v[1], _mm512_set1_epi32(q[c + 1]));
        }
        y[i] = add_scaled(y[i], _mm512_add_epi32(s, more), ws, x->scale[at + i]);
    }
}

/* Eights of vectors together prefetch the next tile, `part` bytes in each group: without that, the
 * first eight waits for memory (64 vectors on Zen 4: 130 instead of 184 GMAC/s). */
AVX512 INLINE void tile_zmm(VECTORS, const int bits, const int prefetch) {
    size_t whole = whole_groups(x, bits), at = group_at(x, t, 0), words = group_words(bits);
    size_t eights = many == 8 ? x->n / 8 : 0;
    size_t part = eights > 1 ? (words / 16 + eights - 1) / eights * 64 : 0;
    const char *next = (const char *)(w + tile_words(x->cols, bits)) + t / 8 * whole * part;
    __m512 y[8];
    for (size_t i = 0; i < many; i++) y[i] = _mm512_setzero_ps();
    for (size_t g = 0; g < whole; g++, at += x->pack, scales += 8, w += words) {
        for (size_t i = 0; i < words && prefetch && t == 0; i += 16)
            PREFETCH(w + PREFETCH_WORDS + i);
        for (size_t i = 0; i < part; i += 64) PREFETCH(next + g * part + i);
        add_group(y, scales, w, x, at, many, group_width(bits), bits);
    }
    if (whole < x->groups) add_group(y, scales, w, x, at, many, 32, bits);
    for (size_t i = 0; i < many; i++) _mm512_storeu_ps(out + i * out_stride, y[i]);
}

AVX512 INLINE void tile_vnni(TILE, const int bits, const int prefetch) {
    size_t t = from;
    IN_STEPS(8, tile_zmm, bits, prefetch)
    IN_STEPS(4, tile_zmm, bits, prefetch)
    IN_STEPS(1, tile_zmm, bits, prefetch)
}

AVX512 INLINE void tile_avx512(TILE, const int bits) {
    tile_vnni(out, out_stride, scales, w, x, from, to, bits, 0);
}

TILE_KERNELS(avx2, AVX2)
TILE_KERNELS(avx512, AVX512)
KERNELS(avx2, "avx2", NULL, NULL, avx2, avx2, avx2)
KERNELS(avx512, "avx512vnni", NULL, NULL, avx2, avx512, avx512)

/* ---- AMX: products of sixteen rows and sixteen vectors ------------------------------------------
 * Only Linux lets a program use the tile registers, and older compilers do not know them. */
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define BASED_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#define AMX __attribute__((target(AVX512_TARGETS ",amx-tile,amx-int8")))

/* Columns multiplied at a time. Of 4 bits they are first unpacked into bytes, four columns of
 * sixteen rows in a register. They and the sums fit the first-level cache. */
enum { PANEL = 1024 };
typedef __m512i panel[PANEL / 4];

AVX512 INLINE void unpack_panel(panel to, const uint32_t *w, size_t columns) {
    for (size_t c = 0; c < columns / 4; c += 2) load_pair(to + c, w, c, 4);
}

/* Tile register `sum` = sums of the products of group g, [vector][row], without the offset: weights
 * are unsigned. Tile registers are named by literals. */
#define MULTIPLY_TILES(sum, g)                                                                     \
    do {                                                                                           \
        _tile_zero(sum);                                                                           \
        if ((g) < whole) {      /* 64 columns */                                                   \
            _tile_loadd(2, q + (g) * 1024, 64);                                                    \
            _tile_loadd(3, w + (g) * 256, 64);                                                     \
            _tile_dpbsud(sum, 2, 3);                                                               \
        } else {                /* 32: of 4 bits, or the last ones */                              \
            _tile_loadd(4, q + (g) * 16 * group_width(bits), group_width(bits));                   \
            _tile_loadd(5, w + (g) * 4 * group_width(bits), 64);                                   \
            _tile_dpbsud(sum, 4, 5);                                                               \
        }                                                                                          \
    } while (0)

/* Scales group g, whose sums are in s[sum], while the tile unit stores those of group g + 1 and
 * multiplies group g + 2. Prefetches `step` bytes of later weights. */
#define SCALE_GROUP(sum, next)                                                                     \
    if (g + 2 < groups) MULTIPLY_TILES(sum, g + 2);                                                \
    _tile_stored(next, s[next], 64);                                                               \
    for (size_t i = 0; i < step; i += 64) PREFETCH(ahead + g * step + i);                          \
    ws = load_scales(scales + g * 8);                                                              \
    UNROLL16 for (size_t i = 0; i < 16; i++) {                                                     \
        __m512i offset = _mm512_set1_epi32(x->offset[at + g * 16 + i]);                            \
        y[i] = add_scaled(y[i], _mm512_add_epi32(s[sum][i], offset), ws, x_scale[g * 16 + i]);     \
    }                                                                                              \
    if (++g == groups) break

/* One panel w, of bytes, for sixteen vectors, of which the first `many` are stored. Their groups
 * begin at `at`; weights at `ahead` will be needed next, `step` bytes for each group. */
AMX INLINE void add_panel(float *out, size_t out_stride, size_t many, const uint32_t *scales,
                          const uint32_t *w, size_t columns, const struct activations *x, size_t at,
                          int first, const char *ahead, size_t step, const int bits) {
    const size_t groups = (columns + group_width(bits) - 1) / group_width(bits);
    const size_t whole = bits == 8 ? columns / 64 : 0;
    const int8_t *q = x->q + at * group_width(bits);
    const float *x_scale = x->scale + at;
    struct row_scales ws;
    __m512i s[2][16];
    __m512 y[16];
    UNROLL16 for (size_t i = 0; i < 16; i++) {
        int empty = first || i >= many;
        y[i] = empty ? _mm512_setzero_ps() : _mm512_loadu_ps(out + i * out_stride);
    }
    MULTIPLY_TILES(0, 0);
    _tile_stored(0, s[0], 64);
    if (groups > 1) MULTIPLY_TILES(1, 1);
    for (size_t g = 0;;) {
        SCALE_GROUP(0, 1);
        SCALE_GROUP(1, 0);
    }
    UNROLL16 for (size_t i = 0; i < 16; i++)
        if (i < many) _mm512_storeu_ps(out + i * out_stride, y[i]);
}

AMX INLINE void tile_amx(TILE, const int bits) {
    const size_t width = group_width(bits), cols = padded(x->cols), packs = (to - from + 15) / 16;
    /* cache lines per group of the next weights, so that all packs together load them all */
    const size_t step = (group_words(bits) / 16 + packs - 1) / packs * 64;
    panel unpacked;
    if (x->pack < 16 || from % 16) {
        tile_vnni(out, out_stride, scales, w, x, from, to, bits, 1);
        return;
    }
    for (size_t first = 0, columns; first < cols; first += columns) {
        const uint32_t *bytes = bits == 8 ? w : (const uint32_t *)(const void *)unpacked;
        const size_t g = first / width;
        columns = cols - first < PANEL ? cols - first : PANEL;
        if (bits == 4) unpack_panel(unpacked, w, columns);
        w += tile_words(columns, bits);
        for (size_t t = from; t < to; t += 16) {
            const char *ahead = (const char *)w + (t - from) / 16 * (columns / width) * step;
            add_panel(out + (t - from) * out_stride, out_stride, to - t, scales + g * 8, bytes,
                      columns, x, group_at(x, t, g), g == 0, ahead, step, bits);
        }
    }
}

/* Configuring the tile registers takes as long as six products: once for a block of tokens. */
AMX static void begin_amx(size_t n) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {                 /* two sums; vectors and weights of 64 columns; of 32 */
        1, 0, { 0 }, { 64, 64, 64, 64, 32, 64 }, { 16, 16, 16, 16, 16, 8 }
    };
    if (pack_of(n) == 16) _tile_loadconfig(&shape);
}

AMX static void end_amx(void) {
    _tile_release();
}

ROWS_KERNEL(amx, AVX2, 1)
TILE_KERNELS(amx, AMX)
KERNELS(amx, "amx", begin_amx, end_amx, amx, amx, avx512)

/* Tile registers are 8 KB that the system must save when it switches programs, so Linux wants each
 * process to request them once. A second request is harmless. */
static int may_use_amx(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3    /* amx-tile, amx-int8 */
        && syscall(SYS_arch_prctl, 0x1023, 18) == 0;        /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
}
#endif

#elif defined(__GNUC__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)
/* ---- ARM: four rows in a register, both factors signed -----------------------------------------
 * With gcc on Linux the program asks the processor for dot products; other compilers use them where
 * they are told that it has them. */
#define BASED_NEON 1
#include <arm_neon.h>

/* v[h]: columns 4c .. 4c+3 of rows 4h .. 4h+3; flip: 8 bits become signed */
INLINE void load_quad(uint8x16_t v[4], const uint32_t *w, size_t c, const int bits,
                      const int flip) {
    for (size_t h = 0; h < 4; h++) {
        v[h] = vreinterpretq_u8_u32(vld1q_u32(w + 16 * (bits == 8 ? c : c / 2) + 4 * h));
        if (bits == 4) v[h] = c % 2 ? vshrq_n_u8(v[h], 4) : vandq_u8(v[h], vdupq_n_u8(15));
        else if (flip) v[h] = veorq_u8(v[h], vdupq_n_u8(128));
    }
}

INLINE int32_t four_columns(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return four;
}

/* s[i][h] += rows 4h .. 4h+3 of one group times vector i. Two products fit 16 bits: 2 * 128 * 127 <
 * 32768. */
INLINE void sum_group_neon(int32x4_t s[4][4], const uint32_t *w, const int8_t *q, size_t columns,
                           const size_t many, const int bits) {
    int32x4_t low[2][4], high[2][4];        /* two sums of each of two rows */
    for (size_t i = 0; i < many; i++)
        for (size_t h = 0; h < 4; h++) low[i][h] = high[i][h] = vdupq_n_s32(0);
    for (size_t c = 0; c < columns / 4; c += 2) {
        uint8x16_t v[2][4];
        load_quad(v[0], w, c, bits, 1);
        load_quad(v[1], w, c + 1, bits, 1);
        for (size_t i = 0; i < many; i++) {
            const int8_t *x = q + i * group_width(bits) + 4 * c;
            int8x8_t x0 = vreinterpret_s8_s32(vdup_n_s32(four_columns(x)));
            int8x8_t x1 = vreinterpret_s8_s32(vdup_n_s32(four_columns(x + 4)));
            for (size_t h = 0; h < 4; h++) {
                int8x16_t v0 = vreinterpretq_s8_u8(v[0][h]), v1 = vreinterpretq_s8_u8(v[1][h]);
                int16x8_t a = vmull_s8(vget_low_s8(v0), x0), b = vmull_s8(vget_high_s8(v0), x0);
                low[i][h] = vpadalq_s16(low[i][h], vmlal_s8(a, vget_low_s8(v1), x1));
                high[i][h] = vpadalq_s16(high[i][h], vmlal_s8(b, vget_high_s8(v1), x1));
            }
        }
    }
    for (size_t i = 0; i < many; i++)
        for (size_t h = 0; h < 4; h++) {
            int32x2_t a = vpadd_s32(vget_low_s32(low[i][h]), vget_high_s32(low[i][h]));
            int32x2_t b = vpadd_s32(vget_low_s32(high[i][h]), vget_high_s32(high[i][h]));
            s[i][h] = vaddq_s32(s[i][h], vcombine_s32(a, b));
        }
}

/* y += (float)s * scale of sixteen rows * scale of x. In 32 bits NEON takes the smallest floats for
 * zero, so the floats are left to the compiler. */
INLINE void add_scaled(float *y, const int32x4_t *s, const uint32_t *scales, float x_scale) {
    for (size_t h = 0; h < 4; h++) {
#ifdef __aarch64__
        uint32x4_t half = vmovl_u16(vreinterpret_u16_u32(vld1_u32(scales + 2 * h)));
        float32x4_t ws = vreinterpretq_f32_u32(vshlq_n_u32(half, 16));
        vst1q_f32(y + 4 * h, vfmaq_n_f32(vld1q_f32(y + 4 * h), vmulq_f32(vcvtq_f32_s32(s[h]), ws),
                                         x_scale));
#else
        int32_t n[4];
        vst1q_s32(n, s[h]);
        for (size_t r = 4 * h; r < 4 * h + 4; r++)
            y[r] += (float)n[r % 4] * bf16_to_f32(scales[r / 2] << (r % 2 ? 0 : 16)) * x_scale;
#endif
    }
}

/* tile_rows_SET: `many` vectors, two or four of which fit the registers. tile_SET: all. */
#define ARM_KERNELS(set, target, most, flip)                                                       \
    target INLINE void tile_rows_##set(VECTORS, const int bits) {                                  \
        size_t at = group_at(x, t, 0);                                                             \
        float y[4][16] = { { 0 } };                                                                \
        for (size_t g = 0; g < x->groups; g++, at += x->pack) {                                    \
            const int8_t *q = x->q + at * group_width(bits);                                       \
            int32x4_t s[4][4];                                                                     \
            for (size_t i = 0; i < many; i++)                                                      \
                s[i][0] = s[i][1] = s[i][2] = s[i][3] =                                            \
                    vdupq_n_s32(bits == 8 && (flip) ? 0 : x->offset[at + i] - ROUND_MAGIC);        \
            sum_group_##set(s, w + g * group_words(bits), q, group_columns(x, g, bits), many,      \
                            bits);                                                                 \
            for (size_t i = 0; i < many; i++)                                                      \
                add_scaled(y[i], s[i], scales + g * 8, x->scale[at + i]);                          \
        }                                                                                          \
        for (size_t i = 0; i < many; i++) memcpy(out + i * out_stride, y[i], sizeof y[i]);         \
    }                                                                                              \
    target INLINE void tile_##set(TILE, const int bits) {                                          \
        size_t t = from;                                                                           \
        IN_STEPS(most, tile_rows_##set, bits)                                                      \
        IN_STEPS(1, tile_rows_##set, bits)                                                         \
    }                                                                                              \
    TILE_KERNELS(set, target)                                                                      \
    KERNELS(set, #set, NULL, NULL, generic, set, generic)

ARM_KERNELS(neon, , 2, 1)

/* Columns 4 (c + lane) .. + 3; the lane of x must be a number for the compiler. */
#define DOT_QUAD(product, flip, lane)                                                              \
    load_quad(v, w, c + (lane), bits, (flip));                                                     \
    for (size_t i = 0; i < many; i++)                                                              \
        for (size_t h = 0; h < 4; h++) s[i][h] = product(s[i][h], v[h], x[i], lane);
#define DOT_GROUP(set, target, product, flip)                                                      \
    target INLINE void sum_group_##set(int32x4_t s[4][4], const uint32_t *w, const int8_t *q,      \
                                       size_t columns, const size_t many, const int bits) {        \
        for (size_t c = 0; c < columns / 4; c += 4) {                                              \
            uint8x16_t v[4];                                                                       \
            int8x16_t x[4];                                                                        \
            for (size_t i = 0; i < many; i++) x[i] = vld1q_s8(q + i * group_width(bits) + 4 * c);  \
            DOT_QUAD(product, flip, 0)                                                             \
            DOT_QUAD(product, flip, 1)                                                             \
            DOT_QUAD(product, flip, 2)                                                             \
            DOT_QUAD(product, flip, 3)                                                             \
        }                                                                                          \
    }
#define SIGNED_DOT(s, v, x, lane) vdotq_laneq_s32(s, vreinterpretq_s8_u8(v), x, lane)

#ifdef __ARM_FEATURE_DOTPROD
#define BASED_DOTPROD 1
#define DOTPROD
#ifdef __ARM_FEATURE_MATMUL_INT8
#define BASED_I8MM 1
#define I8MM
#endif
#elif defined(__aarch64__) && defined(__linux__) && !defined(__clang__) \
    && !defined(BASED_FREESTANDING)
#include <sys/auxv.h>
#define BASED_DOTPROD (getauxval(AT_HWCAP) >> 20 & 1)
#define BASED_I8MM (getauxval(AT_HWCAP2) >> 13 & 1)
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif

#ifdef BASED_DOTPROD
DOT_GROUP(dotprod, DOTPROD, SIGNED_DOT, 1)
ARM_KERNELS(dotprod, DOTPROD, 4, 1)
#endif
/* One factor is unsigned, as weights are stored. */
#ifdef BASED_I8MM
DOT_GROUP(i8mm, I8MM, vusdotq_laneq_s32, 0)
ARM_KERNELS(i8mm, I8MM, 4, 0)
#endif

#elif defined(__wasm_simd128__)
/* ---- WebAssembly: four rows in a register -------------------------------------------------------
 * BASED_RELAXED_SIMD: for engines that have relaxed dot products, which are one instruction on many
 * processors. Their second factor has only 7 bits: what a larger one gives is not defined. Weights
 * of 4 bits fit. With 8 bits, |q| <= 127 is the second factor, and the first is the weight w with
 * the sign of q: w or, because -w may not fit, ~w = -w - 1. What is missing then is |q|. */
#include <wasm_simd128.h>
#ifdef BASED_RELAXED_SIMD
enum { RELAXED = 1 };
#else
enum { RELAXED = 0 };
#endif
/* Four columns, or eight of 4 bits, in turn. Not unrolled, the loop over them waits for the memory:
 * based-82m-english in Chromium 156 wrote 25 to 36 instead of 145 to 155 tokens per second. */
#define UNROLL4 _Pragma("clang loop unroll_count(4)")

/* s + sums of four products a * b of bytes: a is signed, b is not. The instruction is
 * i32x4.relaxed_dot_i8x16_i7x16_add_s, written in bytes because clang 14 does not know it. */
INLINE v128_t add_products(v128_t s, v128_t a, v128_t b) {
#ifdef BASED_RELAXED_SIMD
    __asm__("local.get %1\n local.get %2\n local.get %3\n .byte 0xfd, 0x93, 0x02\n local.set %0"
            : "=r"(s) : "r"(a), "r"(b), "r"(s));
    return s;
#else
    v128_t even = wasm_i16x8_shr(wasm_i16x8_shl(a, 8), 8), odd = wasm_i16x8_shr(a, 8);
    s = wasm_i32x4_add(s, wasm_i32x4_dot_i16x8(wasm_v128_and(b, wasm_i16x8_splat(255)), even));
    return wasm_i32x4_add(s, wasm_i32x4_dot_i16x8(wasm_u16x8_shr(b, 8), odd));
#endif
}

INLINE void tile_simd128(TILE, const int bits) {
    const v128_t low = wasm_i8x16_splat(15), top = wasm_i8x16_splat(-128);
    const v128_t zero = wasm_i8x16_splat(0), one = wasm_i8x16_splat(1);
    const int signs = RELAXED && bits == 8;     /* weights take the sign of q */
    const size_t step = bits == 8 ? 4 : 8;
    for (size_t t = from; t < to; t++, out += out_stride) {
        v128_t y[4] = { 0 };
        for (size_t g = 0; g < x->groups; g++) {
            size_t at = group_at(x, t, g), columns = group_columns(x, g, bits);
            const uint32_t *word = w + g * group_words(bits);
            const int8_t *q = x->q + at * group_width(bits);
            v128_t offset = signs ? zero : wasm_i32x4_splat(x->offset[at] - ROUND_MAGIC);
            v128_t s[4] = { 0 };
            UNROLL4 for (size_t c = 0; c < columns; c += step, q += step, word += 16) {
                v128_t q0 = wasm_v128_load32_splat(q), q1 = wasm_v128_load32_splat(q + step - 4);
                v128_t size = wasm_i8x16_abs(q0), negative = wasm_i8x16_lt(q0, zero);
                if (signs) offset = add_products(offset, wasm_v128_and(negative, one), size);
                for (size_t h = 0; h < 4; h++) {
                    v128_t v = wasm_v128_load(word + 4 * h);
                    if (signs) {
                        v = wasm_v128_xor(v, wasm_v128_xor(negative, top));
                        s[h] = add_products(s[h], v, size);
                    } else if (bits == 8) {
                        s[h] = add_products(s[h], q0, v);
                    } else {
                        s[h] = add_products(s[h], q0, wasm_v128_and(v, low));
                        v = wasm_v128_and(wasm_u16x8_shr(v, 4), low);
                        s[h] = add_products(s[h], q1, v);
                    }
                }
            }
            for (size_t h = 0; h < 4; h++) {
                v128_t ws = wasm_i32x4_shl(wasm_u32x4_load16x4(scales + g * 8 + 2 * h), 16);
                v128_t a = wasm_f32x4_convert_i32x4(wasm_i32x4_add(s[h], offset));
                a = wasm_f32x4_mul(wasm_f32x4_mul(a, ws), wasm_f32x4_splat(x->scale[at]));
                y[h] = wasm_f32x4_add(y[h], a);
            }
        }
        for (size_t h = 0; h < 4; h++) wasm_v128_store(out + 4 * h, y[h]);
    }
}

TILE_KERNELS(simd128, )
KERNELS(simd128, "simd128", NULL, NULL, generic, simd128, generic)
#endif

/* The best set that the processor has and that `flags` (BASED_PLAIN, ...) allow. */
static const struct kernels *choose_kernels(int flags) {
#ifdef BASED_X86
    if (!(flags & BASED_PLAIN) && __builtin_cpu_supports("avx2")) {
        if (flags & BASED_AVX2 || !__builtin_cpu_supports("avx512vnni")
            || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")
            || !__builtin_cpu_supports("avx512dq")) return &avx2_kernels;
#ifdef BASED_AMX
        if (!(flags & BASED_AVX512) && may_use_amx()) return &amx_kernels;
#endif
        return &avx512_kernels;
    }
#elif defined(BASED_NEON)
    if (flags & BASED_PLAIN) return &generic_kernels;
#ifdef BASED_I8MM
    if (BASED_I8MM) return &i8mm_kernels;
#endif
#ifdef BASED_DOTPROD
    if (BASED_DOTPROD) return &dotprod_kernels;
#endif
    return &neon_kernels;
#elif defined(__wasm_simd128__)
    if (!(flags & BASED_PLAIN)) return &simd128_kernels;
#endif
    (void)flags;
    return &generic_kernels;
}

