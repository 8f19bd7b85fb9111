/* run.c - the command line of based.c: arguments, files, the terminal, timing.
 *
 *     run CHECKPOINT [options]                 run --help explains the options
 *
 * The program continues a text with a Based language model. It also holds conversations, saves and
 * loads the state of a model, answers files of requests, measures how well a model predicts a text
 * (perplexity) and how fast it is (bench), and describes a checkpoint. It uses the library through
 * based.h alone and does not touch a tensor.
 *
 * What it promises:
 *
 *     stdout        is the text and nothing else; a failed write is an error
 *     stderr        has one line for an error, and statistics otherwise; with -q only errors
 *     exit status   0 done, 1 bad input or I/O, 2 bad usage, 130 interrupted. If the reader of
 *                   stdout goes away (run ... | head), the status is 1 and there is no message
 *     Ctrl-C        ends the text, and the statistics still come; a second one ends the process
 *     files         appear whole under their names, or not at all; what is read is not overwritten
 *     memory        is allocated before the first token is fed. Only a conversation allocates
 *                   later: its lines, and the states that /undo can go back to, at most 8; and
 *                   --jsonl and --branches: requests, answers, a session for each text, at most 8
 *                   beginnings of prompts
 *
 * The map of this file:
 *
 *      1. Data and error lines       what one run of the program holds
 *      2. Continue a text            feed the prompt; then sample, print and feed each token
 *         -- readers who only want to know how a text is written can stop there --
 *      3. The operating system       all that is not C99
 *      4. Files                      reading, and writing a file that appears only when complete
 *      5. From text to tokens        prompts from everywhere
 *      6. Feeding and statistics     blocks of tokens, guesses, the progress line, times
 *      7. Saved states               --save, --load, and what /undo goes back to
 *      8. Chat                       turns, with commands
 *      9. Perplexity                 -x
 *     10. Bench                      -b
 *     11. Info and check             --info, --check
 *     12. Vectors                    --vectors, for models that do not read text
 *     13. Options                    one table: parsing, help, errors, what goes with what
 *     14. Many texts at once         --jsonl, --branches
 *     15. main                       generate, and the choice of what is to be done
 */
#if !defined(_XOPEN_SOURCE) && !defined(_WIN32)
#define _XOPEN_SOURCE 700               /* POSIX 2008, and realpath                               */
#endif
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "based.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if !defined(__wasi__)
#include <signal.h>
#endif
#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#elif (defined(__unix__) || defined(__APPLE__)) && !defined(__wasi__)
#define RUN_POSIX 1
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

/* ==== 1. Data and error lines ====================================================================
 * One struct holds everything that a run of the program needs, and every function gets a pointer to
 * it. A function that can fail prints its own error line and returns an exit status; its caller
 * passes the status on with TRY.
 */
enum { DONE = 0, BAD_INPUT = 1, BAD_USAGE = 2, INTERRUPTED = 130 };     /* exit statuses          */
enum { BLOCK = 128 };                   /* tokens of a prompt computed together                   */
enum { GUESSES = 127 };                 /* most of --lookup                                       */
enum { ROWS_BYTES = 1 << 24 };          /* memory for the logits of a block, at most              */
enum { NUMBER_BYTES = 24 };             /* a 64-bit number with its sign, a space and a zero      */
enum { NOTE_HEADER = 28 };              /* bytes of a saved note before the recent tokens         */
enum { UNDO = 8 };                      /* turns of a conversation that can be taken back         */
enum { SHORT_BYTES = 80 };              /* what the user typed, shortened for a line              */
enum { FORMAT_BYTES = 160 };            /* of FORMAT, below                                       */

typedef struct {                        /* the command line; section 13 fills it                  */
    const char *checkpoint;
    const char *prompt, *file, *tokens, *perplexity, *vectors;  /* the input; at most one         */
    const char *dump;                   /* file for logits                                        */
    const char *save, *load, *append;   /* files of saved states; text behind a loaded one        */
    const char *jsonl;                  /* requests, one a line                                   */
    const char *system, *chat_template; /* chat: the text before it, and how a turn looks         */
    char       *turn, *stop, *own;      /* the plain template; what ends a reply there; one block */
    char      **stops;                  /* (n_stops) texts that end the generated text            */
    size_t      n_stops;
    int64_t     predict, top_k, repeat_last_n, threads, branches, parallel, lookup;
    double      temperature, top_p, min_p, repeat_penalty;
    uint64_t    seed;
    uint64_t    given;                  /* bit i: flag i of section 13 was given                  */
    int         has_seed, chat, specials, ignore_eos, no_checksum, info, check, bench, csv;
    int         unordered, no_display_prompt, quiet, verbose, help, version;
} options;

typedef struct {                        /* bytes in memory, as many as come                       */
    char   *bytes;
    size_t  n, room;
} buffer;

typedef struct {                        /* text on its way to stdout                              */
    buffer       *to;                   /* or to memory, if not NULL                              */
    based_decoder decoder;
    char   *token;                      /* text of one token                                      */
    buffer  held;                       /* the end that may be the start of a stop text           */
    int     wrote, stopped;             /* something was printed; a stop text was found           */
    int     trims;                      /* spaces at the beginning are not printed                */
} text_out;

typedef struct {                        /* a file that is being written; section 4                */
    FILE       *file;
    char       *temporary;              /* its name until it is complete; NULL: written in place  */
    char       *target;                 /* the name that it gets then; NULL: path                 */
    const char *path, *what;            /* "the logits"                                           */
} output;

typedef struct {                        /* of a conversation                                      */
    buffer   first;                     /* the state before the first turn                        */
    struct { buffer state; char said[SHORT_BYTES]; } turn[UNDO];    /* before the last ones, a    */
    uint64_t turns, n_undo;             /* ring: put there so far; still there                    */
    const char *text[4];                /* what it looks like, by based_chat_text                 */
    buffer   begin;                     /* what stands before the first message                   */
    uint64_t start;                     /* based_history there                                    */
    buffer   line, name;                /* what was typed; the file of the last /save, or --save  */
    buffer   message;                   /* what was typed, in the template                        */
    based_session *snapshot;            /* before the token in which the held text begins         */
    buffer   raw;                       /* the text generated since the snapshot                  */
} conversation;

typedef struct {                        /* guesses at the next tokens, from the text so far; 6    */
    int32_t  *text;                     /* (RECALLED) its newest tokens, a ring                   */
    uint64_t *last;                     /* (RECALLED) by the hash of two tokens: where the text   */
    uint64_t *before;                   /* (RECALLED) went on behind them; and by that place, the */
                                        /* last time; one block of memory with last               */
    uint64_t  n, from;                  /* tokens so far; where it went on as it might do now     */
    size_t    same, enough;             /* tokens that agree before `from`; that make a guess     */
    int32_t   draft[1 + GUESSES];       /* the newest token, then guesses                         */
    float    *rows, *old;               /* of based_feed_draft; one block                         */
    size_t    fed, used;                /* tokens of the draft that are fed; those in the text    */
    uint64_t  guessed, right;           /* tokens in all                                          */
} lookup;

typedef struct {                        /* one run of the program                                 */
    const options  *o;
    based_model    *model;
    const based_config *config;         /* of the model                                           */
    size_t          width;              /* of a row of its logits                                 */
    char            name[65];           /* its name, fit for a terminal                           */
    based_session  *session;
    based_tokenizer tokenizer;
    int             has_tokenizer;
    based_sampler   sampler;
    void           *sampler_memory;
    int32_t        *recent;             /* (repeat_last_n) the sampler's recent tokens            */
    based_error     error;              /* of the last call to the library that failed            */

    int32_t        *ids;                /* (n_ids) the prompt, or the text to be measured         */
    size_t          n_ids, n_loaded;    /* n_loaded: the first ones, part of a loaded state       */
    size_t          n_first;            /* tokens before text[from] when it was encoded           */
    int32_t         unfed;              /* the newest token, if it is not fed yet; or -1          */
    size_t          block;              /* tokens of r->ids that are fed together                 */
    float          *rows;               /* (block, width) logits of fed tokens; NULL: not needed  */
    text_out        out;
    output          dump;
    buffer          input;              /* what was read, by read_input                           */
    buffer          saved;              /* the state, as based_save wrote it                      */
    conversation    chat;
    lookup          lookup;

    uint64_t        scored;             /* perplexity: tokens scored                              */
    double          nats, mean, squares;        /* sum, mean and squared deviations of -log p     */
    uint32_t        hash;               /* of all logits used                                     */
    uint64_t        fed, timed;         /* tokens that took feed_time, and generate_time          */
    double          feed_time, generate_time;   /* seconds                                        */
    double          begun;              /* when reading or measuring began, for the progress line */
} run;

/* Replaces bytes that could move the cursor or break a line. Names and files are not trusted. */
static void sanitize(char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7f) *text = '?';
    }
}

/* What the program was started as; set once, by main. */
static const char *program = "run";

/* When the progress line was last written; 0: it is not on the screen. */
static double progress_shown = 0;
enum { PROGRESS_COLUMNS = 76 };

/* Must come before anything else is written. Also covers the "^C" of the terminal. */
static void clear_progress(void) {
    if (progress_shown > 0) fprintf(stderr, "\r%*s\r", PROGRESS_COLUMNS + 3, "");
    fflush(stderr);
    progress_shown = 0;
}

/* Prints one line on stderr, unless -q forbids it. */
static void say(const options *o, const char *line) {
    if (o->quiet) return;
    clear_progress();
    fprintf(stderr, "%s\n", line);
}

/* Prints one error line and returns `status`. */
static int fail(int status, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    sanitize(line);
    clear_progress();
    fprintf(stderr, "%s: %s\n", program, line);
    return status;
}

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* Leaves the function if a call did not go well. TRY_LIB is for calls to the library. */
#define TRY(call) do { int rc_ = (call); if (rc_ != DONE) return rc_; } while (0)
#define TRY_LIB(call, where) \
    do { if ((call) != BASED_OK) return library_failed(r, where); } while (0)
#define TRY_MODEL(call) TRY_LIB(call, r->o->checkpoint)

static int library_failed(const run *r, const char *where) {
    return fail(BAD_INPUT, "%s: %s", where, r->error.text);
}

static int out_of_memory(const char *what) {
    return fail(BAD_INPUT, "not enough memory for %s", what);
}

/* FORMAT(...), a short text made as printf does, brings its own buffer, which lives as long as the
 * block around it. So do THOUSANDS(1234567), 1,234,567; QUOTE(text), what the user typed, in quotes
 * and shortened; and AMOUNT(bytes), 412 kB or 6.1 MB. */
#define FORMAT(...) format_text((char[FORMAT_BYTES]){ 0 }, __VA_ARGS__)
#define THOUSANDS(value) thousands((char[SHORT_BYTES]){ 0 }, value)
#define QUOTE(text) quote((char[SHORT_BYTES]){ 0 }, text)
#define AMOUNT(bytes) amount((char[SHORT_BYTES]){ 0 }, (double)(bytes))

static const char *format_text(char out[FORMAT_BYTES], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out, FORMAT_BYTES, format, arguments);
    va_end(arguments);
    return out;
}

static const char *thousands(char out[SHORT_BYTES], uint64_t value) {
    int n = snprintf(out, SHORT_BYTES, "%" PRIu64, value);
    for (int at = n - 3; at > 0; at -= 3) {
        memmove(out + at + 1, out + at, strlen(out + at) + 1);
        out[at] = ',';
    }
    return out;
}

static const char *quote(char out[SHORT_BYTES], const char *text) {
    size_t n = strlen(text), most = SHORT_BYTES - 8;
    int cut = n > most;
    if (cut) n = most;
    while (cut && n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80) n--;    /* between characters */
    snprintf(out, SHORT_BYTES, "\"%.*s%s\"", (int)n, text, cut ? "..." : "");
    return out;
}

static const char *amount(char out[SHORT_BYTES], double bytes) {
    if (bytes < 1e6) snprintf(out, SHORT_BYTES, "%.0f kB", bytes > 1e3 ? bytes / 1e3 : 1);
    else snprintf(out, SHORT_BYTES, "%.1f MB", bytes / 1e6);
    return out;
}

/* Are the n bytes that were typed this name? */
static int is_name(const char *name, const char *typed, size_t n) {
    return name && strlen(name) == n && memcmp(name, typed, n) == 0;
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static double per_second(uint64_t count, double spent) {
    return spent > 0 ? (double)count / spent : 0;
}

/* The other variables that outlive a function: what a signal changes or needs. The number of the
 * signal that ended the text is read between tokens. */
#if defined(SIGINT)
static volatile sig_atomic_t interrupted = 0;
#else
enum { interrupted = 0 };
#endif
#if defined(RUN_POSIX)
static volatile sig_atomic_t orderly = 0;       /* 1: Ctrl-C ends the text; 2: all signals do     */
static char *volatile unfinished = NULL;        /* file to remove if a signal ends the process    */
static volatile sig_atomic_t renaming = 0;      /* which file that is just changes                */
static volatile sig_atomic_t waiting = 0;       /* a signal that came meanwhile                   */
#endif

/* What stands before encoded text: nothing; a prefix space if the model asks for it; that and a
 * start token if the model asks for them; a start token in any case. */
enum lead { CONTINUES, OPENS, BEGINS, PREDICTS };

/* What read_input reads: all of a file; the next line; a saved state, if it begins as one. */
enum extent { ALL, LINE, STATE };

/* What is used before its section, with the number of that. */
static int    feed_ids(run *r, size_t n);                           /*  6: the first n of r->ids  */
static int    feed_ahead(run *r, int32_t id, uint64_t most);        /*  6: it, and guesses        */
static void   look_up(run *r, int32_t id);                          /*  6: one more token of text */
static int    drop_guesses(run *r);                                 /*  6: out of the session     */
static int    dump_rows(run *r, const float *rows, size_t n);       /*  6: --dump-logits          */
static int    score_rows(run *r, size_t first, size_t n);           /*  9: --perplexity           */
static double seconds(void);                                        /*  3: a clock                */
static void   print_settings(const run *r, FILE *to);               /* 13: of the sampler         */

/* ==== 2. Continue a text =========================================================================
 * Why the program exists. The prompt is fed in blocks; then each new token is drawn from the
 * logits, printed, and fed when the next one is wanted. On its way to stdout a token becomes bytes,
 * bytes become whole characters (the decoder of the library), and what may be the beginning of a
 * stop text is held back until that is known.
 *
 * Later sections rely on this: after continue_text, r->unfed is the newest token, if it is not fed
 * yet, and r->out.held is text that was generated and not printed.
 */

/* A reader of stdout that went away (| head) has what it wanted: no message. */
static int write_failed(void) {
#ifdef EPIPE
    if (errno == EPIPE) return BAD_INPUT;
#endif
    return fail(BAD_INPUT, "cannot write the text to standard output: %s", strerror(errno));
}

static int flush_text(void) {
    return fflush(stdout) == 0 && !ferror(stdout) ? DONE : write_failed();
}

/* Makes room for n more bytes and a zero. Returns 0 if there is not enough memory. */
static int reserve(buffer *b, size_t n) {
    size_t least = b->n + n, room = 2 * least + 64;
    if (b->room > least) return 1;
    char *more = room > least ? realloc(b->bytes, room) : NULL;
    if (more) b->bytes = more, b->room = room;
    return more != NULL;
}

static int append(buffer *b, const void *bytes, size_t n) {
    if (!reserve(b, n)) return out_of_memory("the text");
    if (n > 0) memcpy(b->bytes + b->n, bytes, n);
    b->n += n;
    return DONE;
}

/* Appends text, and a zero that does not count. */
static int put(buffer *b, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (n < 0 || !reserve(b, (size_t)n)) return out_of_memory("the text");
    va_start(arguments, format);
    vsnprintf(b->bytes + b->n, (size_t)n + 1, format, arguments);
    va_end(arguments);
    b->n += (size_t)n;
    return DONE;
}

static int write_text(text_out *out, const char *text, size_t n) {
    for (; out->trims && !out->wrote && n > 0 && *text == ' '; n--) text++;
    out->wrote |= n > 0;
    if (out->to) return append(out->to, text, n);
    return fwrite(text, 1, n, stdout) == n ? DONE : write_failed();
}

/* The text of one token, into r->out.token; returns its length. Without a tokenizer it is the
 * number of the token. */
static size_t decode(run *r, int32_t id) {
    const char *format = r->out.wrote || r->out.held.n ? " %ld" : "%ld";
    if (r->has_tokenizer) return based_decode(&r->tokenizer, &r->out.decoder, id, r->out.token);
    return (size_t)snprintf(r->out.token, NUMBER_BYTES, format, (long)id);
}

/* Appends n bytes of generated text to the held text, and prints all of it that cannot belong to a
 * stop text; all of it if `last`. The first stop text found ends the text. */
static int put_text(run *r, const char *text, size_t n, int last) {
    text_out *out = &r->out;
    buffer *held = &out->held;
    TRY(append(held, text, n));         /* prepare has made room                                  */

    /* ready: where a stop text begins that is there as a whole; else where one begins that runs
     * over the end of the held text */
    size_t ready = held->n;
    for (size_t at = 0; at < held->n && !out->stopped; at++) {
        size_t rest = held->n - at;
        for (size_t i = 0; i < r->o->n_stops; i++) {
            const char *stop = r->o->stops[i];
            size_t bytes = strlen(stop);
            if (memcmp(held->bytes + at, stop, smaller(bytes, rest)) != 0) continue;
            out->stopped |= bytes <= rest;
            if (bytes <= rest || (!last && at < ready)) ready = at;
        }
    }

    /* print that much and move the rest to the front */
    TRY(write_text(out, held->bytes, ready));
    held->n -= ready;
    memmove(held->bytes, held->bytes + ready, held->n);
    return ready > 0 && !out->to ? flush_text() : DONE;
}

/* Prints what is held at the end of the text, half a character as U+FFFD. If the state is saved,
 * the other half may still come after --load. */
static int put_rest(run *r) {
    if (r->out.stopped) return DONE;
    size_t n = r->has_tokenizer && (!r->o->save || r->o->chat)
             ? based_decode_flush(&r->out.decoder, r->out.token) : 0;
    return put_text(r, r->out.token, n, 1);
}

/* Ends the text, with one newline as llama2.c does. */
static int end_text(run *r) {
    TRY(put_rest(r));
    if (r->out.wrote) TRY(write_text(&r->out, "\n", 1));
    return r->out.to ? DONE : flush_text();
}

/* The logits after the newest token that is fed, and how many tokens that are. The session may be
 * ahead of the text: guesses are fed together with the token before them (--lookup). */
static const float *logits_of(const run *r) {
    const lookup *l = &r->lookup;
    return l->used ? l->rows + (l->used - 1) * r->width : based_logits(r->session);
}
static uint64_t count_of(const run *r) {
    return based_count(r->session) - (r->lookup.fed - r->lookup.used);
}

/* Logits that decided something enter the fingerprint. It costs time, so only where it is shown. */
static void hash_logits(run *r, const float *logits) {
    if (r->o->verbose) r->hash = based_hash(r->hash, logits, r->width);
}

/* If no logit is finite, there is nothing to choose from. */
static int check_logits(run *r, const float *logits, uint64_t token) {
    for (size_t i = 0; i < r->width; i++) {
        if (logits[i] - logits[i] == 0) return DONE;
    }
    return fail(BAD_INPUT, "all logits after %s %s are NaN or infinite; %s is broken%s",
                r->o->vectors ? "vector" : "token", THOUSANDS(token), r->o->checkpoint,
                r->o->vectors ? ", or the vectors are" : "");
}

/* Feeds the newest token of the text, unless that has been done, and at most `ahead` guesses. */
static int feed_newest(run *r, uint64_t ahead) {
    int32_t id = r->unfed;
    r->unfed = -1;
    if (id < 0) return DONE;
    TRY(feed_ahead(r, id, ahead));
    return r->o->dump ? dump_rows(r, logits_of(r), 1) : DONE;
}

/* Feeds the prompt in r->ids and tells the sampler of it. */
static int feed_prompt(run *r) {
    uint64_t before = r->fed;
    TRY(feed_ids(r, r->n_ids));
    size_t n = r->n_loaded + (size_t)(r->fed - before);
    for (size_t i = 0; i < n; i++) {
        based_sampler_accept(&r->sampler, r->ids[i]);
        look_up(r, r->ids[i]);
    }
    if (based_count(r->session) == 0) return DONE;
    if (r->o->predict == 0 && !r->o->dump) hash_logits(r, based_logits(r->session));
    return check_logits(r, based_logits(r->session), based_count(r->session));
}

/* In a chat: remembers where the held text begins. If it turns out to be a stop text, the session
 * must go back to just before it; otherwise the next turn would stand behind half of a turn that
 * the model made up. The token just printed is not fed yet; n is the length of its text. */
static void take_snapshot(run *r, size_t n) {
    conversation *c = &r->chat;
    size_t held = r->out.held.n;
    if (held <= n || c->raw.n + n > c->raw.room) c->raw.n = 0;
    if (held == 0) return;
    if (c->raw.n == 0) based_copy(c->snapshot, r->session, NULL);
    memcpy(c->raw.bytes + c->raw.n, r->out.token, n);
    c->raw.n += n;
}

/* Draws the next token from the logits and prints it. *ended: the model has ended the text. */
static int write_token(run *r, int *ended) {
    const options *o = r->o;
    const float *logits = logits_of(r);
    TRY(check_logits(r, logits, count_of(r)));
    if (!o->dump) hash_logits(r, logits);
    int32_t id = based_sample(&r->sampler, logits);
    int stops = r->has_tokenizer && based_is_stop(&r->tokenizer, id);
    *ended = stops && !o->ignore_eos;
    if (*ended) return DONE;
    based_sampler_accept(&r->sampler, id);
    size_t bytes = stops ? 0 : decode(r, id);
    TRY(put_text(r, r->out.token, bytes, 0));
    r->unfed = id;
    if (o->chat) take_snapshot(r, bytes);
    return DONE;
}

/* The loop that writes a text: feed the newest token, draw the next one, print it, until something
 * ends the text. The clock starts after the first token, whose time belongs to the prompt. */
static int continue_text(run *r) {
    double earlier = r->generate_time, begun = 0;
    uint64_t limit = r->o->predict < 0 ? UINT64_MAX : (uint64_t)r->o->predict;
    int ended = 0, rc = DONE;
    for (uint64_t n = 0; n < limit && !ended && !r->out.stopped && !interrupted && !rc; n++) {
        rc = feed_newest(r, limit - n - 1);
        if (rc == DONE) rc = write_token(r, &ended);
        if (n == 0) begun = seconds();
        r->timed += n > 0;
        r->generate_time = earlier + (seconds() - begun);
    }
    int dropped = drop_guesses(r);
    return rc != DONE ? rc : dropped;
}

/* The prompt passes through the decoder even if it is not shown, since a character may begin in the
 * prompt and end in the continuation. */
static int show_prompt(run *r, int shown) {
    for (size_t i = 0; i < r->n_ids; i++) {
        size_t n = decode(r, r->ids[i]);
        if (shown) TRY(write_text(&r->out, r->out.token, n));
    }
    return DONE;
}

static int reset_sampler(run *r) {
    return based_sampler_init(&r->sampler, r->sampler_memory, based_sampler_bytes(&r->sampler),
                              &r->error);
}

/* Makes the sampler, and room for the text of one token behind the longest held text. */
static int prepare(run *r) {
    const options *o = r->o;
    r->sampler = (based_sampler){
        .temperature = (float)o->temperature, .top_p = (float)o->top_p,
        .top_k = (uint32_t)o->top_k, .min_p = (float)o->min_p,
        .repeat_penalty = (float)o->repeat_penalty, .repeat_last_n = (uint32_t)o->repeat_last_n,
        .seed = o->seed, .vocab = (uint32_t)r->width
    };
    /* without -s the seed differs from one start to the next, also within a second */
    if (!o->has_seed) {
        r->sampler.seed = (uint64_t)time(NULL) * 1000000007u + (uint64_t)(seconds() * 1e9);
    }
    size_t longest = 0, token = r->has_tokenizer ? based_decode_bound(&r->tokenizer) : NUMBER_BYTES;
    token += 12;                        /* what based_decode_flush may write                      */
    for (size_t i = 0; i < o->n_stops; i++) {
        if (strlen(o->stops[i]) > longest) longest = strlen(o->stops[i]);
    }
    r->out.token = malloc(token);
    r->sampler_memory = malloc(based_sampler_bytes(&r->sampler) + 1);
    r->recent = malloc(((size_t)r->sampler.repeat_last_n + 1) * sizeof *r->recent);
    if (!r->out.token || !reserve(&r->out.held, token + longest) || !r->sampler_memory
        || !r->recent) {
        return out_of_memory("sampling");
    }
    return reset_sampler(r) == BASED_OK ? DONE : fail(BAD_USAGE, "%s", r->error.text);
}

/* What prepare made. */
static void free_text(run *r) {
    free(r->sampler_memory);
    free(r->recent);
    free(r->out.token);
    free(r->out.held.bytes);
    r->sampler_memory = r->recent = NULL;
    r->out.token = r->out.held.bytes = NULL;
}

/* ---- If you wanted to know how a text is written with based.h, you can stop reading here; only
 * generate, in section 15, puts these functions into their order. ---- */

/* ==== 3. The operating system ====================================================================
 * Everything that is not C99. Without it the program still works: the clock is coarser, files are
 * written in place, there is no progress line and Ctrl-C ends the process.
 */
#if defined(RUN_POSIX)
/* A checkpoint is mapped, not copied. If its file is cut off while it is in use, reading it raises
 * SIGBUS, and all that can be done is to say so. */
static void on_lost_bytes(int number) {
    static const char line[] = ": the checkpoint cannot be read any more; was its file cut off "
                               "while it was in use?\n";
    ssize_t written = write(STDERR_FILENO, program, strlen(program));
    written += write(STDERR_FILENO, line, sizeof line - 1);
    (void)number, (void)written;
    if (unfinished) unlink(unfinished);
    _exit(BAD_INPUT);
}

/* An orderly end, or the end of the process: without the file that is not finished. The second
 * Ctrl-C always ends the process. */
static void on_signal(int number) {
    int enough = number == SIGINT ? orderly > 0 && !interrupted : orderly > 1;
    if (enough) {
        interrupted = number;           /* a closed terminal sends SIGHUP more than once          */
    } else if (renaming) {
        waiting = number;
    } else {
        if (unfinished) unlink(unfinished);
        signal(number, SIG_DFL);
        raise(number);
    }
}

/* A signal that was ignored when the program started (nohup) stays ignored. */
static void listen(int flags) {
    static const int numbers[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT };
    for (size_t i = 0; i < COUNT(numbers); i++) {
        struct sigaction old, action = { .sa_handler = on_signal, .sa_flags = flags };
        if (sigaction(numbers[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN) {
            sigaction(numbers[i], &action, NULL);
        }
    }
}

static void prepare_system(void) {
    /* If a standard stream is closed, the next file that is opened would get its number, and text
     * would be written into it. Opened in the wrong direction, each read or write of it fails. */
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) != fd) {
            _exit(BAD_INPUT);
        }
    }
    signal(SIGBUS, on_lost_bytes);
    signal(SIGPIPE, SIG_IGN);           /* a closed pipe comes back as a failed write             */
    signal(SIGXFSZ, SIG_IGN);           /* and so does a file that may not become larger          */
    listen(SA_RESTART);
}

/* The first Ctrl-C asks for an orderly end; so do all other signals if `all`. */
static void catch_signals(int all) {
    orderly = all ? 2 : 1;
    listen(SA_RESTART);
}

/* While the program waits for a person, Ctrl-C ends it at once; if `all`, in order. */
static void leave_signals(int all) {
    if (interrupted == SIGINT) interrupted = 0;
    orderly = all ? 2 : 0;
    listen(0);                          /* reading ends                                           */
}

static int is_terminal(FILE *file) { return isatty(fileno(file)); }

/* Is standard input a file, or a pipe through which something comes? -1: a pipe, but nothing came
 * within a second; whoever started the program may just have left it open. */
static int input_comes(void) {
    struct pollfd input = { STDIN_FILENO, POLLIN, 0 };
    struct stat there;
    if (fstat(STDIN_FILENO, &there) != 0) return 0;
    if (S_ISFIFO(there.st_mode)) return poll(&input, 1, 1000) == 0 ? -1 : 1;
    return S_ISREG(there.st_mode);
}

/* The size of a file; 0 for what has none. */
static double file_size(FILE *file) {
    struct stat there;
    return fstat(fileno(file), &there) == 0 && S_ISREG(there.st_mode) ? (double)there.st_size : 0;
}

/* Reads at most n bytes: what is there now, or, if `wait`, what comes next. Returns their number, 0
 * at the end of the file, -1 if reading failed, -2 if there is nothing yet. */
static long read_some(FILE *file, char *to, size_t n, int wait) {
    struct pollfd input = { fileno(file), POLLIN, 0 };
    if (!wait && poll(&input, 1, 0) == 0) return -2;
    return (long)read(input.fd, to, n);
}

/* Puts the bytes of a file on the disk. Pipes and devices cannot do that, which is no error. */
static int sync_file(FILE *file) {
    return fsync(fileno(file)) == 0 || errno == EINVAL || errno == ENOTSUP;
}

/* Is this one file, and not a device? "-" is standard input. */
static int same_file(const char *path, const char *other) {
    struct stat a, b;
    if (strcmp(path, other) == 0) return stat(path, &a) != 0 || S_ISREG(a.st_mode);
    return stat(path, &a) == 0 && S_ISREG(a.st_mode)
        && (strcmp(other, "-") == 0 ? fstat(STDIN_FILENO, &b) : stat(other, &b)) == 0
        && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* How is `path` to be written? A new or a regular file by renaming another one over it. What is not
 * a regular file, or has several names (hard links), is written in place; so is standard output
 * under the name of a device, by its descriptor. `there` gets what is there now; its mode is 0 if
 * that is nothing. */
enum way { NO_WAY, IN_PLACE, BY_RENAMING, STANDARD_OUTPUT };

static enum way way_to_write(const char *path, struct stat *there) {
    struct stat link, out;
    if (stat(path, there) != 0) {
        there->st_mode = 0;
        if (errno != ENOENT) return NO_WAY;
        return lstat(path, &link) == 0 ? IN_PLACE : BY_RENAMING;    /* a link to nothing, nothing */
    }
    if (S_ISDIR(there->st_mode)) {
        errno = EISDIR;
        return NO_WAY;
    }
    if (fstat(STDOUT_FILENO, &out) == 0 && out.st_dev == there->st_dev
        && out.st_ino == there->st_ino && lstat(path, &link) == 0 && S_ISLNK(link.st_mode)) {
        return STANDARD_OUTPUT;
    }
    if (access(path, W_OK) != 0) return NO_WAY;
    return S_ISREG(there->st_mode) && there->st_nlink == 1 ? BY_RENAMING : IN_PLACE;
}

static void end_renaming(void) {
    renaming = 0;
    if (waiting) raise((int)waiting);
}

/* Creates a file beside f->target (the file itself where `path` is a link) with a name that no file
 * has, "x.state.1234-0.tmp". Returns its descriptor, or -1. */
static int open_temporary(output *f) {
    f->target = realpath(f->path, NULL);
    if (!f->target && errno != ENOENT) return -1;
    const char *path = f->target ? f->target : f->path, *slash = strrchr(path, '/');
    size_t folder = slash ? (size_t)(slash + 1 - path) : 0;
    size_t base = smaller(strlen(path + folder), 200);  /* names may have 255 bytes */
    size_t bytes = folder + base + 48;
    char *name = malloc(bytes);
    int fd = -1;
    if (!name) return -1;
    renaming = 1;
    for (int k = 0; fd < 0 && k < 10000 && (k == 0 || errno == EEXIST); k++) {
        snprintf(name, bytes, "%.*s.%ld-%d.tmp", (int)(folder + base), path, (long)getpid(), k);
        fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0666);
    }
    if (fd >= 0) unfinished = f->temporary = name;
    else free(name);
    end_renaming();
    return fd;
}

static void drop_temporary(output *f) {
    if (f->temporary && unfinished) unlink(unfinished);
    if (f->temporary) unfinished = NULL;
    free(f->temporary);
    free(f->target);
    f->temporary = f->target = NULL;
}

/* May a file be written though no other can be created beside it? */
static int only_in_place(void) { return errno == EACCES || errno == EPERM || errno == EROFS; }

static int can_be_written(const char *path) {
    struct stat there;
    output f = { .path = path };
    enum way way = way_to_write(path, &there);
    if (way != BY_RENAMING) return way != NO_WAY;
    int fd = open_temporary(&f), good = fd >= 0 || (there.st_mode && only_in_place()), why = errno;
    if (fd >= 0) close(fd);
    drop_temporary(&f);
    errno = why;
    return good;
}

static FILE *open_place(output *f) {
    struct stat there;
    enum way way = way_to_write(f->path, &there);
    int fd = way == STANDARD_OUTPUT ? dup(STDOUT_FILENO) : way == BY_RENAMING ? open_temporary(f)
                                                                               : -1;
    if (way == BY_RENAMING && fd < 0 && there.st_mode && only_in_place()) way = IN_PLACE;
    if (way == IN_PLACE) fd = open(f->path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0) return NULL;

    /* owner and mode of the file that is replaced */
    if (way == BY_RENAMING && there.st_mode) {
        mode_t mode = there.st_mode & 07777;
        if (there.st_uid != geteuid() || there.st_gid != getegid()) {
            if (fchown(fd, there.st_uid, there.st_gid) != 0) mode &= 0777;
        }
        fchmod(fd, mode);
    }
    FILE *file = fdopen(fd, "wb");
    if (!file) close(fd);
    return file;
}

/* Copies a complete file over one that cannot be replaced, because it is mounted there (in a
 * container), or because its folder protects the files of others (/tmp). */
static int copy_over(const char *from, const char *path) {
    FILE *in = fopen(from, "rb"), *out = in ? fopen(path, "wb") : NULL;
    char bytes[4096];
    int good = out != NULL, error;
    for (size_t n; good && (n = fread(bytes, 1, sizeof bytes, in)) > 0; ) {
        good = fwrite(bytes, 1, n, out) == n;
    }
    good = good && !ferror(in) && fflush(out) == 0 && sync_file(out);
    error = errno;
    if (in) fclose(in);
    if (out && fclose(out) != 0 && good) good = 0, error = errno;
    errno = error;
    return good;
}

static int give_name(output *f) {
    renaming = 1;
    int done = rename(f->temporary, f->target ? f->target : f->path) == 0;
    if (done) unfinished = NULL;        /* from now on another program may use that name          */
    end_renaming();
    if (done) return 1;
    if (errno != EBUSY && errno != EXDEV && !only_in_place()) return 0;
    return copy_over(f->temporary, f->path);
}
#else
static void prepare_system(void) {
#if defined(_WIN32)
    _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
#endif
}

#if defined(SIGINT)
static void on_interrupt(int number) { interrupted = number; }
#endif

static void catch_signals(int all) {
    (void)all;
#if defined(SIGINT)
    signal(SIGINT, on_interrupt);
#endif
}

static void leave_signals(int all) {
    (void)all;
#if defined(SIGINT)
    interrupted = 0;
    signal(SIGINT, SIG_DFL);
#endif
}

#if defined(_WIN32)
static int is_terminal(FILE *file) { return _isatty(_fileno(file)); }
static int same_file(const char *path, const char *other) {
    char a[_MAX_PATH], b[_MAX_PATH];
    return _fullpath(a, path, sizeof a) && _fullpath(b, other, sizeof b) && _stricmp(a, b) == 0;
}
#else
static int is_terminal(FILE *file) { return (void)file, 0; }
static int same_file(const char *path, const char *other) { return strcmp(path, other) == 0; }
#endif
static int input_comes(void) { return 0; }
static int sync_file(FILE *file) { return (void)file, 1; }
static double file_size(FILE *file) { return (void)file, 0; }
static long read_some(FILE *file, char *to, size_t n, int wait) {
    long got = 0;
    for (int c = 0; (size_t)got < n && c != '\n' && (c = getc(file)) != EOF; ) {
        to[got++] = (char)c;
    }
    return (void)wait, got == 0 && ferror(file) ? -1 : got;
}

/* Files are written in place. */
static int can_be_written(const char *path) {
    FILE *file = fopen(path, "rb");
    int there = file != NULL;
    if (file) fclose(file);
    file = fopen(path, there ? "r+b" : "wb");
    if (!file) return 0;
    fclose(file);
    if (!there) remove(path);
    return 1;
}
static FILE *open_place(output *f) { return fopen(f->path, "wb"); }
static int give_name(output *f) { return (void)f, 1; }
static void drop_temporary(output *f) { (void)f; }
#endif

/* Seconds since some moment in the past; monotonic where the system has such a clock. */
static double seconds(void) {
#if defined(RUN_POSIX) || defined(__wasi__)
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) return 0;
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

/* ==== 4. Files ===================================================================================
 * Everything that is read comes through read_input. A file that is written goes through open_output
 * and close_output, and nowhere else.
 */

/* Numbers of n bytes, little-endian. */
static void put_little(unsigned char *to, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = (unsigned char)(value >> (8 * i) & 0xff);
}

static uint64_t get_little(const unsigned char *from, size_t n) {
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++) value |= (uint64_t)from[i] << (8 * i);
    return value;
}

static int cannot_read(const char *path) {
    return fail(BAD_INPUT, "cannot read %s: %s",
                strcmp(path, "-") == 0 ? "standard input" : path, strerror(errno));
}

/* Reads a file, or standard input for "-"; all of it, or only its next line, newline included, or
 * only its beginning if a saved state was expected and it is none. The bytes are followed by a zero
 * that does not count; there are none at the end of the input. */
static int read_input(const char *path, enum extent extent, buffer *to) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    int error = file ? 0 : errno;
    to->n = 0;
    for (size_t wanted = 0, got = 0; !error && got == wanted; ) {
        if (extent == LINE && to->n > 0 && to->bytes[to->n - 1] == '\n') break;
        if (extent == STATE && to->n >= 8 && memcmp(to->bytes, BASED_STATE_MAGIC, 8) != 0) break;
        if (!reserve(to, 1)) {
            error = ENOMEM;
            break;
        }
        wanted = extent == LINE ? 1 : to->room - 1 - to->n;
        got = fread(to->bytes + to->n, 1, wanted, file);
        to->n += got;
        if (ferror(file)) error = errno;
    }
    if (!error) to->bytes[to->n] = '\0';
    if (file && file != stdin) fclose(file);
    if (!error) return DONE;
    if (interrupted && error == EINTR) {
        clearerr(stdin);
        return interrupted > 0 ? 128 + (int)interrupted : INTERRUPTED;
    }
    errno = error;
    return cannot_read(path);
}

/* The length of the byte order mark that a text begins with, and which is no part of it; or 0. */
static size_t mark_bytes(const char *text, size_t n) {
    return n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

static void drop_mark(buffer *text) {
    size_t mark = mark_bytes(text->bytes, text->n);
    text->n -= mark;
    memmove(text->bytes, text->bytes + mark, text->n + 1);
}

/* Drops one newline at the end, \n or \r\n. */
static void drop_newline(buffer *text) {
    if (text->n == 0 || text->bytes[text->n - 1] != '\n') return;
    text->n -= text->n > 1 && text->bytes[text->n - 2] == '\r' ? 2 : 1;
    text->bytes[text->n] = '\0';
}

/* Reads a text, as a person would type it. */
static int read_text(run *r, const char *path) {
    TRY(read_input(path, ALL, &r->input));
    drop_mark(&r->input);
    drop_newline(&r->input);
    return DONE;
}

static int output_failed(const output *f) {
    return fail(BAD_INPUT, "cannot write %s to %s: %s", f->what, f->path, strerror(errno));
}

/* What is given as a checkpoint and is none: says what it is, if that can be seen. */
static int no_checkpoint(const run *r) {
    static const struct { size_t at; const char *begins, *is, *advice; } kinds[] = {
        { 0, "GGUF", "a GGUF file of llama.cpp, which cannot be read; export the model that it was "
                     "made from", NULL },
        { 0, BASED_STATE_MAGIC, "a saved state; give a checkpoint, and this with --load", NULL },
        { 0, "24ka", "a llama2.c file of a version that cannot be read; write version 0 of it",
          NULL },
        { 8, "{", "a safetensors file", "" }, { 0, "PK\3\4", "a PyTorch file", "" },
        { 0, "\x80\2", "a PyTorch file", "" }
    };
    const char *path = r->o->checkpoint, *is = NULL, *advice = NULL;
    unsigned char start[28] = { 0 };
    FILE *file = fopen(path, "rb");
    errno = 0;
    int whole = file && fread(start, 1, sizeof start, file) == sizeof start;
    if (errno == EISDIR) is = "a directory", advice = "";
    if (file) fclose(file);
    for (size_t i = 0; i < COUNT(kinds); i++) {
        if (memcmp(start + kinds[i].at, kinds[i].begins, strlen(kinds[i].begins)) == 0) {
            is = kinds[i].is, advice = kinds[i].advice;
        }
    }
    /* llama2.c: seven numbers; the sixth, the size of the vocabulary, may be negative */
    for (size_t i = 0; i < 7 && whole; i++) {
        int64_t n = (int32_t)(uint32_t)get_little(start + 4 * i, 4);
        whole = (i == 5 ? n * n : n) > 0 && n < 1 << 22;
    }
    if (whole) is = "a llama2.c file", advice = " --tokenizer tokenizer.bin";
    if (!is) return fail(BAD_INPUT, "%s", r->error.text);
    if (!advice) return fail(BAD_INPUT, "%s is %s", path, is);
    return fail(BAD_INPUT, "%s is %s; python3 export.py %s OUT.bin%s makes a checkpoint of it",
                path, is, path, advice);
}

static int open_model(run *r) {
    r->model = based_open(r->o->checkpoint, r->o->no_checksum ? BASED_NO_CHECKSUM : 0, &r->error);
    if (!r->model) return no_checkpoint(r);
    r->config = based_model_config(r->model);
    r->width = based_width(r->model);
    const char *name = r->config->name; /* (64)                                                   */
    snprintf(r->name, sizeof r->name, "%.64s", *name ? name : "a model without a name");
    sanitize(r->name);
    r->has_tokenizer = r->config->tokenizer_bytes > 0;
    if (!r->has_tokenizer) return DONE;
    TRY_MODEL(based_tokenizer_open(&r->tokenizer, r->model, &r->error));
    return DONE;
}

/* Refuses to write over what the program reads. A state may be saved where it was loaded from: it
 * is read completely before. */
static int refuse_inputs(const run *r, const char *path, const char *what) {
    const options *o = r->o;
    const struct { const char *path, *is; } inputs[] = {
        { o->checkpoint, "the checkpoint" }, { o->file, "the prompt" },
        { o->vectors, "the vectors" }, { path == o->dump ? o->load : NULL, "the loaded state" },
        { "-", "standard input" }, { path == o->dump ? o->save : o->dump, "another output" }
    };
    for (size_t i = 0; i < COUNT(inputs); i++) {
        if (inputs[i].path && same_file(path, inputs[i].path)) {
            return fail(BAD_USAGE, "cannot write %s to %s: it is also %s; give another name", what,
                        path, inputs[i].is);
        }
    }
    return DONE;
}

/* Before anything is read or computed: is this a file that can be written? */
static int check_output(const run *r, const char *path, const char *what) {
    TRY(refuse_inputs(r, path, what));
    return can_be_written(path) ? DONE : output_failed(&(output){ .path = path, .what = what });
}

/* Opens a file for writing; all files that this program writes pass through here. A file appears
 * under its name only when it is complete: until then it has a temporary name in the same folder,
 * which no other file has. Of several programs that write to one name, the last one wins. The
 * caller writes to f->file and then calls close_output in any case. */
static int open_output(const run *r, output *f, const char *path, const char *what) {
    *f = (output){ .path = path, .what = what };
    TRY(refuse_inputs(r, path, what));
    f->file = open_place(f);
    if (f->file) return DONE;
    int rc = output_failed(f);
    drop_temporary(f);
    return rc;
}

/* Ends a file. rc: DONE if all of it was written; then it gets its name, once it is safe on the
 * disk. Otherwise it is removed and rc is returned. Does nothing if no file is open. */
static int close_output(output *f, int rc) {
    int error = 0;                      /* errno of the first call that failed                    */
    if (!f->file) return rc;

    /* all bytes to the disk */
    if (rc == DONE && (fflush(f->file) != 0 || !sync_file(f->file))) error = errno;
    if (fclose(f->file) != 0 && error == 0) error = errno;
    f->file = NULL;

    /* the name, or nothing */
    if (rc == DONE && error == 0 && f->temporary && !give_name(f)) error = errno;
    drop_temporary(f);
    errno = error;
    return rc == DONE && error ? output_failed(f) : rc;
}

/* ==== 5. From text to tokens =====================================================================
 * Prompts come from -i, -f, --tokens, --append or standard input, and end up in r->ids.
 */
static int no_tokenizer(const run *r) {
    return fail(BAD_INPUT, "%s has no tokenizer; give token ids with --tokens, or export it with a "
                "tokenizer", r->o->checkpoint);
}

/* The token that the model saw before every text in training; -1 if there is none. */
static int32_t start_token(const based_tokenizer *t) {
    if (t->bos != BASED_NONE && (t->flags & BASED_TOK_ADD_BOS)) return (int32_t)t->bos;
    return t->eos != BASED_NONE ? (int32_t)t->eos : t->bos != BASED_NONE ? (int32_t)t->bos : -1;
}

/* Says once that a text holds what the original tokenizer composes (U+0300 to U+036F, accents that
 * follow their letter) and this one does not. */
static void warn_of_nfc(const run *r, const char *text, size_t n) {
    static int told = 0;
    for (size_t i = 0; i + 1 < n && !told && (r->tokenizer.flags & BASED_TOK_NFC); i++) {
        unsigned char a = (unsigned char)text[i], b = (unsigned char)text[i + 1];
        told = a == 0xCC || (a == 0xCD && b <= 0xAF);
        if (told) say(r->o, "note: some accents of this text stand apart from their letters; the "
                       "model was trained on text without such (Unicode's NFC), and understands it "
                       "less well");
    }
}

/* Fills r->ids with n bytes of text. Names of special tokens become these tokens, except in
 * text[from .. to - 1]. Returns a status of the library; r->error says more. */
static int encode_quietly(run *r, const char *text, size_t n, enum lead lead, size_t from,
                          size_t to) {
    based_tokenizer t = r->tokenizer;
    const size_t end[3] = { from, to, n };
    int add_bos = lead >= BEGINS && (t.flags & BASED_TOK_ADD_BOS) && t.bos != BASED_NONE;
    int64_t got = 0;
    warn_of_nfc(r, text, n);
    if (lead == CONTINUES) t.flags &= ~(uint32_t)BASED_TOK_PREFIX_SPACE;

    /* room for the start token and as many others as there can be */
    size_t bound = based_encode_bound(&t, n), size = sizeof *r->ids;
    free(r->ids);
    r->n_ids = r->n_loaded = 0;
    r->ids = bound >= SIZE_MAX / size ? NULL : malloc((bound + 1) * size);
    void *scratch = malloc(based_encode_scratch(&t, n) + 1);
    if (!r->ids || !scratch) {
        free(scratch);
        r->error = (based_error){ BASED_ENOMEM, "not enough memory for its tokens" };
        return BASED_ENOMEM;
    }

    /* the start token, where based_encode does not put it */
    if (start_token(&t) >= 0 && (n == 0 ? lead >= BEGINS : lead == PREDICTS && !add_bos)) {
        r->ids[r->n_ids++] = start_token(&t);
    }
    for (size_t part = 0, at = 0; part < 3 && got >= 0; at = end[part++]) {
        int flags = part == 1 ? 0 : BASED_PARSE_SPECIALS;
        if (part == 1) r->n_first = r->n_ids;
        if (end[part] == at) continue;
        if (at == 0 && add_bos) flags |= BASED_ADD_BOS;
        got = based_encode(&t, text + at, end[part] - at, flags, r->ids + r->n_ids, scratch,
                           &r->error);
        /* only the first text gets a prefix space */
        for (int64_t i = 0; i < got; i++) {
            size_t shown;
            based_token_bytes(&t, r->ids[r->n_ids++], &shown);
            if (shown > 0) t.flags &= ~(uint32_t)BASED_TOK_PREFIX_SPACE;
        }
    }
    free(scratch);
    return got < 0 ? (int)got : BASED_OK;
}

static int encode(run *r, const char *text, size_t n, enum lead lead) {
    TRY_LIB(encode_quietly(r, text, n, lead, n, n), "cannot encode the text");
    return DONE;
}

/* The length of the special token's name that the text begins with; or 0. */
static size_t special_name(const based_tokenizer *t, const char *text, size_t n) {
    for (uint32_t i = 0; i < t->specials; i++) {
        uint32_t from = t->start[t->special_id[i]], bytes = t->start[t->special_id[i] + 1] - from;
        if (bytes <= n && memcmp(t->bytes + from, text, bytes) == 0) return bytes;
    }
    return 0;
}

/* Encodes a turn, in which text[from .. to - 1] is what somebody said: names of special tokens are
 * text there. The text is cut only at special tokens of the template, where it would be cut in any
 * case; so without such names the tokens are those of encode. */
static int encode_message(run *r, const char *text, size_t n, enum lead lead, size_t from,
                          size_t to) {
    size_t begin = 0, name;
    for (size_t at = 0; at < from; ) {
        name = special_name(&r->tokenizer, text + at, from - at);
        at += name ? name : 1;
        if (name) begin = at;
    }
    while (to < n && !special_name(&r->tokenizer, text + to, n - to)) to++;
    TRY_LIB(encode_quietly(r, text, n, lead, begin, to), "cannot encode the text");
    return DONE;
}

/* --tokens: ids such as "1 403 407", separated by spaces, commas or newlines. */
static int read_tokens(run *r, const char *list) {
    static const char separators[] = " ,\t\r\n";
    uint64_t vocab = r->width;
    r->ids = malloc((strlen(list) / 2 + 1) * sizeof *r->ids);   /* an id and a space: two bytes   */
    if (!r->ids) return out_of_memory("the tokens");
    for (size_t n; *(list += strspn(list, separators)) != '\0'; list += n) {
        n = strcspn(list, separators);
        uint64_t id = strtoull(list, NULL, 10);
        if (strspn(list, "0123456789") < n || id >= vocab) {
            return fail(BAD_USAGE, "--tokens takes ids from 0 to %" PRIu64 " separated by spaces, "
                        "got %s", vocab - 1, QUOTE(FORMAT("%.*s", (int)smaller(n, 99), list)));
        }
        r->ids[r->n_ids++] = (int32_t)id;
    }
    if (r->n_ids > 0) return DONE;
    return fail(BAD_USAGE, "--tokens is empty; it takes ids such as \"1 403 407\"");
}

/* The prompt. Without one a new text begins with the start token. After --load the prompt is the
 * text of --append, or nothing. */
static int read_prompt(run *r) {
    const options *o = r->o;
    int append = o->load && !(o->prompt || o->file || o->tokens);
    const char *text = append ? o->append : o->prompt, *path = append ? NULL : o->file;
    if (append && !text) return DONE;
    if (o->tokens) return read_tokens(r, o->tokens);
    if (!r->has_tokenizer) return no_tokenizer(r);
    if (text && strcmp(text, "-") == 0) path = "-";
    if (!text && !path && !same_file(o->checkpoint, "-")) {
        int comes = input_comes();
        if (comes > 0) path = "-";
        if (comes < 0) say(o, "note: nothing came through the pipe on standard input, so a new "
                            "text begins; -i - waits for it");
    }
    size_t n = text ? strlen(text) : 0;
    if (path) {
        TRY(read_text(r, path));
        text = r->input.bytes, n = r->input.n;
    }
    TRY(encode(r, text, n, append ? CONTINUES : BEGINS));
    if (r->n_ids > 0 || append) return DONE;
    return fail(BAD_INPUT, "%s has no token that begins a text; give a prompt with -i",
                o->checkpoint);
}

/* ==== 6. Feeding and statistics ==================================================================
 * Sessions, blocks of tokens with a progress line where a person is waiting, and what is told on
 * stderr.
 */
static int new_session(run *r, based_session **s, size_t block) {
    *s = based_session_new(r->model, (uint32_t)block, &r->error);
    if (!*s) return library_failed(r, r->o->checkpoint);
    based_set_threads(*s, (int)r->o->threads);
    return DONE;
}

/* Opens a session for text. every_row: with room for the logits of every token of a block, which is
 * smaller then if the vocabulary is large. */
static int open_session(run *r, int every_row) {
    const based_config *c = r->config;
    if (c->input > 0 || c->rows == 0) {
        return fail(BAD_INPUT, "%s is not a language model: it reads or writes vectors; see "
                    "--vectors", r->o->checkpoint);
    }
    size_t row = r->width * sizeof(float), fit = ROWS_BYTES / row;
    r->block = every_row ? smaller(BLOCK, fit > 0 ? fit : 1) : BLOCK;
    if (c->prefix > r->block) r->block = c->prefix;     /* it is fed in one block */
    r->unfed = -1;
    TRY(new_session(r, &r->session, r->block));
    if (every_row) r->rows = malloc(r->block * row);
    if (every_row && !r->rows) return out_of_memory("logits");
    return r->has_tokenizer || !(r->o->chat || r->o->perplexity || r->o->jsonl) ? DONE
                                                                               : no_tokenizer(r);
}

/* Writes the n newest rows of logits, (n, width), little-endian on every machine. */
static int dump_rows(run *r, const float *rows, size_t n) {
    size_t width = r->width, total = n * width, at = 0;
    uint64_t before = count_of(r) - n;
    unsigned char bytes[4096];
    for (size_t row = 0; row < n; row++) {
        TRY(check_logits(r, rows + row * width, before + row + 1));
        hash_logits(r, rows + row * width);
    }
    for (size_t i = 0; i < total; i++) {
        uint32_t bits;
        memcpy(&bits, rows + i, sizeof bits);
        put_little(bytes + at, bits, 4);
        at += 4;
        if (at < sizeof bytes && i + 1 < total) continue;
        if (fwrite(bytes, 1, at, r->dump.file) != at) return output_failed(&r->dump);
        at = 0;
    }
    return DONE;
}

/* The progress line is rewritten a few times per second, once the work has taken a while. */
static void show_progress(const run *r, const char *line) {
    double now = seconds();
    int due = now - r->begun >= 0.3 && now - progress_shown >= 0.1;
    if (!due || r->o->quiet || !is_terminal(stderr)) return;
    fprintf(stderr, "\r%-*.*s", PROGRESS_COLUMNS, PROGRESS_COLUMNS, line);
    fflush(stderr);
    progress_shown = now;
}

/* Feeds the first n of r->ids, without the loaded ones, and scores or dumps the logits if that is
 * wanted. Stops early on Ctrl-C; r->fed says how far it came. */
static int feed_ids(run *r, size_t n) {
    const options *o = r->o;
    int32_t start = start_token(&r->tokenizer);
    float *rows = o->perplexity || o->dump ? r->rows : NULL;
    r->begun = seconds();
    for (size_t i = r->n_loaded, some; i < n && !interrupted; i += some) {
        some = smaller(n - i, r->block);
        if (o->perplexity) {
            /* every document of a text begins, at a start token, with an empty session */
            size_t same = 1;
            if (r->ids[i] == start) based_reset(r->session);
            while (same < some && r->ids[i + same] != start) same++;
            some = same;
        }
        /* the beginning of a prompt, in a model that has prefix layers */
        int alone = o->perplexity || based_count(r->session) > 0;
        size_t prefix = alone ? 0 : r->config->prefix;
        if (prefix > 0 && some > prefix) some = prefix;
        TRY_LIB((prefix > 0 ? based_feed_prefix : based_feed)(r->session, r->ids + i, some, rows,
                &r->error), FORMAT("cannot compute tokens %zu and on", i));
        r->fed += some;
        if (o->perplexity) TRY(score_rows(r, i, some));
        if (o->dump) TRY(dump_rows(r, r->rows, some));
        double spent = seconds() - r->begun, done = (double)(i + some);
        if (!o->jsonl) {
            show_progress(r, FORMAT("%s: %s of %s tokens, %.0f tok/s, %.0f s left%s",
                          o->perplexity ? "measuring" : "reading the prompt", THOUSANDS(i + some),
                          THOUSANDS(n), done / spent, spent / done * ((double)n - done),
                          o->perplexity ? FORMAT(", PPL %.4g", exp(r->mean)) : ""));
        }
    }
    r->feed_time += seconds() - r->begun;
    clear_progress();
    return DONE;
}

/* ---- Looking ahead: --lookup ------------------------------------------------------------------
 * A text that quotes itself goes on as it did before: where the longest run of its newest tokens
 * came before, what followed there is a guess at what follows now. Guesses are fed together with
 * the newest token, for which weights are read once, and the session goes back to the first wrong
 * one. The sampler draws each token as ever, from the same logits, so no text depends on guesses.
 * A guess takes a sixth (AMX) to a half (AVX2) of the time of a step. So more of them are made,
 * from shorter runs, while more than half are right.
 */
enum { RECALLED = 1 << 14, MOST_SAME = 64, TRIED = 16 };

static int open_lookup(run *r) {
    lookup *l = &r->lookup;
    size_t most = 1 + (size_t)r->o->lookup;
    if (most == 1 || (r->o->chat && r->o->n_stops > 0)) return DONE;    /* see take_snapshot      */
    l->enough = 16;
    size_t rows = most * r->width, old = most * based_draft_width(r->model);
    l->text = calloc(RECALLED, sizeof *l->text);
    l->last = calloc(2 * RECALLED, sizeof *l->last);
    l->rows = malloc((rows + old) * sizeof *l->rows);
    if (!l->text || !l->last || !l->rows) return out_of_memory("guesses; --lookup 0 makes none");
    l->before = l->last + RECALLED;
    l->old = l->rows + rows;
    return DONE;
}

static int32_t token_at(const lookup *l, uint64_t at) { return l->text[at % RECALLED]; }

/* One more token of the text. If it is what followed `from`, that goes on; else the longest run of
 * newest tokens among the last TRIED places where the newest two came before. */
static void look_up(run *r, int32_t id) {
    lookup *l = &r->lookup;
    if (!l->text) return;
    int goes_on = l->same > 0 && token_at(l, l->from) == id;
    l->same = goes_on ? l->same + 1 : 0;
    l->from += (uint64_t)goes_on;
    l->text[l->n++ % RECALLED] = id;
    if (l->n < 2) return;
    uint32_t two = (uint32_t)token_at(l, l->n - 2) * 0x9e3779b1u + (uint32_t)id;
    uint64_t *last = &l->last[(two * 0x85ebca6bu >> 16) % RECALLED], at = *last;
    l->before[l->n % RECALLED] = at;
    *last = l->n;
    for (int i = 0; i < TRIED && !goes_on && at > 0 && l->n - at < RECALLED - MOST_SAME; i++) {
        size_t same = 0;
        while (same < MOST_SAME && same < at
               && token_at(l, at - 1 - same) == token_at(l, l->n - 1 - same)) {
            same++;
        }
        if (same > l->same) l->same = same, l->from = at;
        at = l->before[at % RECALLED];
    }
}

/* Takes back the guesses that are not part of the text. */
static int drop_guesses(run *r) {
    lookup *l = &r->lookup;
    if (l->fed == 0) return DONE;
    TRY_LIB(based_keep(r->session, l->used, &r->error), "cannot take guesses back");
    l->guessed += l->fed - 1;
    l->right += l->used - 1;
    l->fed = l->used = 0;
    return DONE;
}

/* Feeds the newest token, unless it was guessed and is fed already; with at most `most` guesses. */
static int feed_ahead(run *r, int32_t id, uint64_t most) {
    lookup *l = &r->lookup;
    int guessed = l->used < l->fed && l->draft[l->used] == id;
    look_up(r, id);
    l->used += (size_t)guessed;
    if (guessed) return DONE;

    /* were the last guesses worth their time? */
    if (l->fed > 1) {
        int gained = 2 * (l->used - 1) > l->fed - 1;
        if (gained && l->enough > 2) l->enough /= 2;
        if (!gained && l->enough < MOST_SAME) l->enough *= 2;
    }
    TRY(drop_guesses(r));

    /* as many guesses as tokens agree; what is itself guessed may be what follows */
    size_t n = 0;
    if (most > (uint64_t)r->o->lookup) most = (uint64_t)r->o->lookup;
    if (l->same >= l->enough) n = l->same < most ? l->same : (size_t)most;
    for (size_t i = 0; i < n; i++) {
        uint64_t at = l->from + i;
        l->draft[i + 1] = at < l->n ? token_at(l, at) : l->draft[1 + at - l->n];
    }
    if (n == 0) {
        TRY_LIB(based_step(r->session, id, &r->error), "cannot compute the next token");
        return DONE;
    }
    l->draft[0] = id;
    int64_t fed = based_feed_draft(r->session, l->draft, n + 1, l->rows, l->old, &r->error);
    if (fed < 0) return library_failed(r, "cannot compute the next tokens");
    l->fed = (size_t)fed;
    l->used = 1;
    return DONE;
}

/* -v, before the work: what was opened and how long the text is. */
static void describe(const run *r, const char *what) {
    if (!r->o->verbose) return;
    fprintf(stderr, "model:  %s, %s parameters\nstate:  %s bytes, however long the text\n",
            r->name, THOUSANDS(based_model_parameters(r->model)),
            THOUSANDS(based_state_bytes(r->model)));
    if (what) fprintf(stderr, "%-7s %s tokens\n", what, THOUSANDS(r->n_ids));
}

/* For -v: the seed and the settings. */
static void tell_sampling(const run *r) {
    if (!r->o->verbose) return;
    fprintf(stderr, "seed:   %" PRIu64 "\nsample:", r->sampler.seed);
    print_settings(r, stderr);
}

static void time_line(const char *what, double spent, uint64_t n, const char *unit) {
    fprintf(stderr, "%16s = %10.2f ms / %5" PRIu64 " %-6s (%8.2f ms per token, "
            "%8.2f tokens per second)\n", what, 1e3 * spent, n, unit,
            n > 0 ? 1e3 * spent / (double)n : 0, per_second(n, spent));
}

/* The statistics. Scripts written for llama2.c look for the last line, the speed: of reading, or of
 * writing. */
static void report(const run *r, const char *feeding, int reading) {
    if (r->o->verbose) {
        time_line(feeding, r->feed_time, r->fed, "tokens");
        if (r->timed > 0) time_line("eval time", r->generate_time, r->timed, "runs");
        if (r->lookup.guessed > 0) {
            fprintf(stderr, "lookup: %s of %s guesses were right\n", THOUSANDS(r->lookup.right),
                    THOUSANDS(r->lookup.guessed));
        }
        fprintf(stderr, "logits #%08x\n", (unsigned)r->hash);
    }
    say(r->o, FORMAT("achieved tok/s: %f", reading ? per_second(r->fed, r->feed_time)
                                                   : per_second(r->timed, r->generate_time)));
}

/* ==== 7. Saved states ============================================================================
 * What a session knows goes in and out through based_save and based_load. What only this program
 * knows travels with it as the note, little-endian:
 *
 *      0   "run", and 1 for this version         16   the decoder: held[4], n, started, two zeros
 *      4   uint32 1 if a generator is saved      24   uint32 number of recent tokens
 *      8   uint64 state of the generator         28   int32 each, oldest first
 *
 * The generator is saved only if a seed was asked for. Then a loaded text goes on as if it had
 * never been interrupted, unless another seed is given. Without a seed, each continuation of a
 * saved text is a different one.
 */
/* Saves the state in memory. The memory of s is used again. */
static int save_state(run *r, buffer *s) {
    size_t n = based_sampler_recent(&r->sampler, r->recent), note_bytes = NOTE_HEADER + 4 * n;
    size_t bytes = based_saved_bytes(r->model, note_bytes);
    s->n = 0;
    if (!bytes || !reserve(s, bytes + note_bytes)) return out_of_memory("the saved past");

    /* the note, as above, behind where the state will be; what is not set is zero */
    unsigned char *note = (unsigned char *)s->bytes + bytes;
    memset(note, 0, note_bytes);
    memcpy(note, "run\1", 4);
    put_little(note + 4, (uint64_t)r->o->has_seed, 4);
    if (r->o->has_seed) put_little(note + 8, r->sampler.state, 8);
    memcpy(note + 16, r->out.decoder.held, 4);
    note[20] = r->out.decoder.n;
    note[21] = r->out.decoder.started;
    put_little(note + 24, n, 4);
    for (size_t i = 0; i < n; i++) {
        put_little(note + NOTE_HEADER + 4 * i, (uint32_t)r->recent[i], 4);
    }

    /* the session and the note */
    s->n = bytes;
    TRY_MODEL(based_save(r->session, note, note_bytes, s->bytes, bytes, &r->error));
    return DONE;
}

/* Another program may save a state with a note of its own; that note is ignored. */
static int is_our_note(const unsigned char *note, size_t n) {
    return n >= 4 && memcmp(note, "run\1", 4) == 0;
}

/* Are these n bytes nothing, or the beginning of a UTF-8 character that needs more bytes? */
static int begins_character(const unsigned char *p, size_t n) {
    size_t whole = p[0] < 0xc2 || p[0] > 0xf4 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    int low = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;
    int high = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
    return n == 0 || (n < whole && (n < 2 || (p[1] >= low && p[1] <= high))
                                && (n < 3 || (p[2] & 0xc0) == 0x80));
}

/* A note of ours may be forged: based_load checks only that its bytes are not damaged. */
static int check_note(const run *r, const unsigned char *note, size_t n, const char *path) {
    if (n < NOTE_HEADER || n - NOTE_HEADER != 4 * get_little(note + 24, 4)) {
        return fail(BAD_INPUT, "%s: its note has %zu bytes, expected %d and 4 for each recent "
                    "token", path, n, NOTE_HEADER);
    }
    if (get_little(note + 4, 4) > 1 || note[21] > 1 || note[22] || note[23]) {
        return fail(BAD_INPUT, "%s: its note has a mark that is neither 0 nor 1", path);
    }
    if (!begins_character(note + 16, note[20])) {
        return fail(BAD_INPUT, "%s: its note holds %d bytes, %02x %02x %02x, expected the "
                    "beginning of a character", path, note[20], note[16], note[17], note[18]);
    }
    for (size_t at = NOTE_HEADER; at < n; at += 4) {
        uint64_t id = get_little(note + at, 4);
        if (id >= r->sampler.vocab) {
            return fail(BAD_INPUT, "%s: its note has token %u, but the vocabulary has %u", path,
                        (unsigned)id, (unsigned)r->sampler.vocab);
        }
    }
    return DONE;
}

/* Makes sampler and decoder go on as the note says. The generator keeps its state unless one was
 * saved: going back in a chat must not bring the same reply again. */
static void read_note(run *r, const unsigned char *note, size_t n) {
    based_decoder *d = &r->out.decoder;
    uint64_t generator = r->sampler.state;
    reset_sampler(r);
    r->sampler.state = generator;
    *d = (based_decoder){ .started = 1 };
    if (!is_our_note(note, n)) return;
    for (size_t at = NOTE_HEADER; at < n; at += 4) {
        based_sampler_accept(&r->sampler, (int32_t)get_little(note + at, 4));
    }
    if (get_little(note + 4, 4) && !r->o->has_seed) r->sampler.state = get_little(note + 8, 8);
    memcpy(d->held, note + 16, 4);
    d->n = note[20];
    d->started = note[21];
}

static int load_state(run *r, const buffer *s, const char *path) {
    const void *note;
    size_t n;
    TRY_LIB(based_load(r->session, s->bytes, s->n, &note, &n, &r->error), path);
    if (is_our_note(note, n)) TRY(check_note(r, note, n, path));
    read_note(r, note, n);
    r->unfed = -1;
    return DONE;
}

static int save_to_file(run *r, const char *path) {
    output f;
    TRY(feed_newest(r, 0));             /* all that was printed is saved                          */
    TRY(save_state(r, &r->saved));
    TRY(open_output(r, &f, path, "the past"));
    int good = fwrite(r->saved.bytes, 1, r->saved.n, f.file) == r->saved.n;
    TRY(close_output(&f, good ? DONE : output_failed(&f)));
    if (ferror(stdin) || ferror(stdout)) return DONE;   /* nothing stands behind an error line    */
    say(r->o, FORMAT("saved %s tokens in %s", THOUSANDS(based_count(r->session)),
                      AMOUNT(r->saved.n)));
    return DONE;
}

/* The end of a text that was loaded: the tokens that its note tells. */
static void show_recent(run *r) {
    size_t n = based_sampler_recent(&r->sampler, r->recent), bytes;
    for (size_t i = 0; i < n; i++) {
        const char *text = based_token_bytes(&r->tokenizer, r->recent[i], &bytes);
        fwrite(text, 1, bytes, stderr);
    }
    if (n > 0) fputc('\n', stderr);
}

static int load_from_file(run *r, const char *path) {
    TRY(read_input(path, STATE, &r->input));
    TRY(load_state(r, &r->input, path));
    say(r->o, FORMAT("restored %s tokens from %s", THOUSANDS(based_count(r->session)),
                      AMOUNT(r->input.n)));
    if (r->o->chat && !r->o->quiet) show_recent(r);
    return DONE;
}

/* Does the text of the n saved tokens end inside a token of the prompt, which is like it before? */
static int ends_inside(run *r, size_t n) {
    size_t recent = based_sampler_recent(&r->sampler, r->recent), bytes, some;
    for (size_t k = 1; k <= 16 && k <= recent && k <= n; k++) { /* the last k are others          */
        const int32_t *last = r->recent + recent - k;
        size_t same = n - k, at = 0;
        if (same >= r->n_ids || based_history_of(based_history_of(0, r->ids, same), last, k)
                                != based_history(r->session)) continue;
        const char *whole = based_token_bytes(&r->tokenizer, r->ids[same], &bytes);
        for (size_t i = 0; i < k; i++, at += some) {
            const char *text = based_token_bytes(&r->tokenizer, last[i], &some);
            if (some > bytes - at || memcmp(whole + at, text, some) != 0) return 0;
        }
        return 1;
    }
    return 0;
}

/* --load, before a text is continued. A prompt is the whole text: it must begin with the saved one.
 * Then only the rest has to be fed, and the result is the same as if all of it had been fed. */
static int load_prompt(run *r) {
    const options *o = r->o;
    TRY(load_from_file(r, o->load));
    uint64_t n = based_count(r->session);

    /* no prompt: the saved text goes on */
    if (!(o->prompt || o->file || o->tokens)) {
        if (n + r->n_ids > 0) return DONE;
        return fail(BAD_INPUT, "%s: nothing had been read when it was saved; give a prompt with -i",
                    o->load);
    }

    /* the history is a hash of all tokens that were fed */
    if (n > r->n_ids || based_history_of(0, r->ids, (size_t)n) != based_history(r->session)) {
        if (!o->tokens && ends_inside(r, (size_t)n)) {
            return fail(BAD_INPUT, "the text saved in %s ends inside a token of this prompt; give "
                        "what follows it with --append, or save where a word ends", o->load);
        }
        return fail(BAD_INPUT, "the prompt does not begin with the %s tokens saved in %s; to put "
                    "it behind them, use --append", THOUSANDS(n), o->load);
    }

    /* decoder and sampler will get all of the prompt */
    r->n_loaded = (size_t)n;
    r->out.decoder = (based_decoder){ .started = 0 };
    reset_sampler(r);
    return DONE;
}

/* ==== 8. Chat ====================================================================================
 * A conversation is one text. Each message is put into a template and fed. The checkpoint has one
 * if the model was trained to converse; then a stop token ends the reply. With the plain template a
 * reply ends where the model begins the next turn, which is a stop text. After each reply the
 * session has read exactly the text that is on the screen; what stands between a reply and the next
 * message is fed with that message. Before each turn the state is put on a ring of UNDO states.
 */

/* Puts the state in r->saved on the ring, with what was said. Only a turn that went well gets
 * there. */
static void push_undo(run *r, const char *said) {
    conversation *c = &r->chat;
    size_t at = c->turns++ % UNDO;
    buffer oldest = c->turn[at].state;
    c->turn[at].state = r->saved;
    sanitize(memcpy(c->turn[at].said, QUOTE(said), SHORT_BYTES));
    r->saved = oldest;
    c->n_undo += c->n_undo < UNDO;
}

static int undo(run *r) {
    conversation *c = &r->chat;
    if (c->n_undo == 0) return fail(BAD_INPUT, "there is no turn to take back");
    c->n_undo--;
    size_t at = --c->turns % UNDO;
    TRY(load_state(r, &c->turn[at].state, "the last turn"));
    say(r->o, FORMAT("took back %s", c->turn[at].said));
    return DONE;
}

/* Ends a reply. What was printed gets fed; what is held back does not, even if one token is partly
 * both: then the session goes back to the snapshot and reads the printed part as text. */
static int commit_reply(run *r) {
    conversation *c = &r->chat;
    int stopped = r->out.stopped;
    size_t held = r->out.held.n, printed = c->raw.n > held ? c->raw.n - held : 0;
    int rc = ferror(stdout) ? BAD_INPUT : end_text(r);      /* one error line is enough           */
    r->out.stopped = r->out.wrote = 0;
    r->out.held.n = 0;
    if (!stopped) {
        TRY(feed_newest(r, 0));
        return rc;
    }

    /* a stop text: back to before it, then up to it */
    r->unfed = -1;
    based_copy(r->session, c->snapshot, NULL);
    if (printed > 0) {
        TRY(encode_message(r, c->raw.bytes, printed, CONTINUES, 0, printed));
        TRY(feed_prompt(r));
    }
    return rc;
}

/* One turn: a message of n bytes and the reply to it. */
static int chat_turn(run *r, const char *message, size_t n) {
    conversation *c = &r->chat;

    /* the message in its template, then the beginning of a reply */
    const char *user = c->text[BASED_CHAT_USER], *said = strstr(user, "{}"),
               *reply = c->text[BASED_CHAT_REPLY], *end = strstr(reply, "{}");
    int first = based_history(r->session) == c->start;
    enum lead opens = based_count(r->session) == 0 ? OPENS : CONTINUES;
    buffer *text = &c->message;
    text->n = 0;
    TRY(put(text, "%s%.*s", first ? c->begin.bytes : end + 2, (int)(said - user), user));
    size_t from = text->n;
    TRY(append(text, message, n));
    TRY(put(text, "%s%.*s", said + 2, (int)(end - reply), reply));
    TRY(save_state(r, &r->saved));
    TRY(r->o->specials ? encode(r, text->bytes, text->n, opens)
                       : encode_message(r, text->bytes, text->n, opens, from, from + n));
    TRY(feed_prompt(r));
    if (interrupted) return load_state(r, &r->saved, "the last turn");
    push_undo(r, message);

    /* the reply */
    c->raw.n = 0;
    int rc = continue_text(r);
    if (rc != DONE && !ferror(stdout)) return rc;
    int committed = commit_reply(r);    /* the session knows what was said, even if nobody reads  */
    return rc != DONE ? rc : committed;
}

/* A line of n bytes that begins with a slash. A command that fails says why and changes nothing;
 * the chat goes on. Returns 0 if it is to end. */
static int run_command(run *r, const char *line, size_t n) {
    conversation *c = &r->chat;
    size_t word = strcspn(line, " ");
    const char *file = line + word + strspn(line + word, " ");
    if (strlen(line) < n) {
        fail(BAD_INPUT, "a command has no zero byte in it; /help lists them");
    } else if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) {
        return 0;
    } else if (is_name("/save", line, word)) {
        if (!*file && c->name.n == 0) {
            fail(BAD_INPUT, "/save needs the name of a file the first time");
        } else if (save_to_file(r, *file ? file : c->name.bytes) == DONE && *file) {
            c->name.n = 0;
            put(&c->name, "%s", file);
        }
    } else if ((is_name("/load", line, word) && *file) || strcmp(line, "/reset") == 0) {
        if (save_state(r, &r->saved) != DONE) return 1;
        if ((*file ? load_from_file(r, file)
                   : load_state(r, &c->first, "the beginning")) == DONE) push_undo(r, line);
        else load_state(r, &r->saved, "what was there before");
    } else if (strcmp(line, "/undo") == 0) {
        undo(r);
    } else if (strcmp(line, "/stats") == 0) {
        const char *size = AMOUNT(based_saved_bytes(r->model, NOTE_HEADER
                                                     + 4 * (size_t)r->o->repeat_last_n));
        fprintf(stderr, "%s tokens read and written, remembered in %s\n"
                "%d turns can be taken back (at most %d, %s each)\n%.1f tokens per second\n",
                THOUSANDS(based_count(r->session)), size, (int)c->n_undo, UNDO, size,
                per_second(r->timed, r->generate_time));
    } else if (strcmp(line, "/help") == 0) {
        fputs("/save FILE   write all that the model remembers to a file; later without its name\n"
              "/load FILE   go on from such a file\n"
              "/undo        take back the last turn, /load or /reset\n"
              "/reset       begin anew\n"
              "/stats       what is remembered, and how fast\n"
              "/quit        end, as Ctrl-D does; Ctrl-C ends a reply\n"
              "Started as \"rlwrap ", stderr);
        fprintf(stderr, "%s ...\", lines can be edited and come back with the arrow keys\n",
                program);
    } else {
        fail(BAD_INPUT, "%s is no command; /help lists them", QUOTE(line));
    }
    return 1;
}

/* What a turn looks like: as --chat-template says, as the checkpoint says, or plain. */
static void choose_template(run *r, options *o) {
    const char *const plain[4] = { "{}\n", o->turn, "{}\n", "" };
    if (!o->chat || !r->has_tokenizer) return;
    if (r->tokenizer.chat[0] && !o->chat_template) {
        memcpy(r->chat.text, r->tokenizer.chat, sizeof r->chat.text);
        return;
    }
    memcpy(r->chat.text, plain, sizeof r->chat.text);
    o->stops[o->n_stops++] = o->stop;
    if (o->own[strspn(o->own, " \n")]) o->stops[o->n_stops++] = o->own;
    if (o->chat_template) return;
    say(o, FORMAT("%s is a base model: it was not trained to converse, and goes on as a text of "
                   "two people might", r->name));
}

/* Feeds the start token if the template does not name it, and sets what stands before the first
 * message: the system prompt or what is there without one, or after --load the end of a reply. */
static int begin_chat(run *r) {
    const options *o = r->o;
    conversation *c = &r->chat;
    const char *lead = o->load ? strstr(c->text[BASED_CHAT_REPLY], "{}") + 2
                     : o->system ? "" : c->text[BASED_CHAT_BEGIN];
    const char *system = c->text[BASED_CHAT_SYSTEM], *hole = strstr(system, "{}");
    if (o->system && !hole) {
        return fail(BAD_USAGE, "%s knows no system prompt; put the text into your first message",
                    o->checkpoint);
    }
    TRY(put(&c->begin, "%s", lead));
    if (o->system) {
        TRY(put(&c->begin, "%.*s%s%s", (int)(hole - system), system, o->system, hole + 2));
    }
    if (o->load) {
        TRY(load_from_file(r, o->load));
    } else if (c->text[BASED_CHAT_USER] == o->turn) {
        TRY(encode(r, "", 0, BEGINS));
        TRY(feed_prompt(r));
    }
    c->start = based_history(r->session);
    return save_state(r, &c->first);
}

static int chat(run *r) {
    const options *o = r->o;
    conversation *c = &r->chat;
    int rc = DONE, asking = is_terminal(stdin) && !o->quiet, saves = o->save != NULL;
    TRY(open_session(r, 0));
    TRY(prepare(r));
    TRY(open_lookup(r));
    TRY(new_session(r, &c->snapshot, 1));
    if (saves) TRY(put(&c->name, "%s", o->save));
    if (!reserve(&c->raw, 4096 + r->out.held.room)) return out_of_memory("the conversation");
    catch_signals(saves);

    r->out.decoder.started = 1;
    r->out.trims = 1;
    TRY(begin_chat(r));
    tell_sampling(r);
    if (asking) fputs("/help lists the commands, Ctrl-D ends.\n", stderr);

    /* the first message may come from -i or -f */
    if (o->prompt) rc = chat_turn(r, o->prompt, strlen(o->prompt));
    if (o->file) {
        TRY(read_text(r, o->file));
        rc = chat_turn(r, r->input.bytes, r->input.n);
    }

    /* the others line by line; while a line is waited for, Ctrl-C ends the program */
    for (int first = 1, more = 1; rc == DONE && more; first = 0) {
        buffer *line = &c->line;
        leave_signals(saves);
        if (interrupted) break;         /* by a signal that ends the conversation                 */
        if (asking) fputs("> ", stderr);
        rc = read_input("-", LINE, line);
        if (rc != DONE) break;
        catch_signals(saves);
        more = line->n > 0;
        if (first) drop_mark(line);
        drop_newline(line);
        if (line->bytes[0] == '/') more &= run_command(r, line->bytes, line->n);
        else if (line->n > 0) rc = chat_turn(r, line->bytes, line->n);
    }
    catch_signals(saves);
    if (asking) fputc('\n', stderr);

    /* what was said is saved also if a signal or a closed terminal ended the conversation */
    int ended = rc == DONE || interrupted || ferror(stdin) || ferror(stdout);
    int saved = saves && ended ? save_to_file(r, o->save) : DONE;
    if (rc == DONE) rc = interrupted ? 128 + (int)interrupted : saved;
    if (rc != BAD_INPUT) report(r, "prompt eval time", o->predict == 0);
    return rc;
}

/* ==== 9. Perplexity ==============================================================================
 * How well is a text predicted? Each token is scored by the logits after all tokens before it; the
 * first one is predicted from the start token. Mean and variance are running ones (Welford), so
 * their error does not grow with the length of the text.
 */

/* Scores the n tokens that follow those just fed. `first` is the index of the first one fed. */
static int score_rows(run *r, size_t first, size_t n) {
    size_t width = r->width;
    for (size_t i = 0; i < n; i++) {
        const float *logits = r->rows + i * width;
        double nats = -based_log_probability(logits, width, r->ids[first + i + 1]);
        if (nats - nats != 0) {         /* infinite, or not a number                              */
            return fail(BAD_INPUT, "%s gives token %zu of %s no probability; the checkpoint is "
                        "broken", r->o->checkpoint, first + i + 1, r->o->perplexity);
        }
        hash_logits(r, logits);

        /* Welford */
        double off = nats - r->mean;
        r->scored++;
        r->nats += nats;
        r->mean += off / (double)r->scored;
        r->squares += off * (nats - r->mean);
    }
    return DONE;
}

static int measure(run *r) {
    const based_tokenizer *t = &r->tokenizer;
    const char *path = r->o->perplexity;
    const buffer *text = &r->input;
    size_t n = 0;
    TRY(open_session(r, 1));
    TRY(read_input(path, ALL, &r->input));
    drop_mark(&r->input);
    TRY(encode(r, text->bytes, text->n, PREDICTS));
    if (r->n_ids < 3) {
        return fail(BAD_INPUT, "%s is too short to measure; it takes several tokens", path);
    }
    catch_signals(0);
    describe(r, "text:");
    TRY(feed_ids(r, r->n_ids - 1));
    double tokens = (double)r->scored, perplexity = exp(r->nats / tokens);

    /* after Ctrl-C nothing on stdout may look like a result */
    if (interrupted) {
        if (r->scored > 0) say(r->o, FORMAT("interrupted after %s tokens: PPL = %.4f so far",
                                             THOUSANDS(r->scored), perplexity));
        report(r, "eval time", 1);
        return INTERRUPTED;
    }

    /* bytes that were predicted: not a first token without a start token before it, and not the
     * names of special tokens, which stand for no text */
    size_t predicted = text->n;
    if (start_token(t) < 0 && based_token_bytes(t, r->ids[0], &n) && n < predicted) predicted -= n;
    for (size_t i = 1; i < r->n_ids; i++) {
        int32_t id = r->ids[i];
        if (based_token_bytes(t, id, &n) && n == 0) predicted -= t->start[id + 1] - t->start[id];
    }
    say(r->o, FORMAT("%s tokens predicted, %s bytes", THOUSANDS(r->scored), THOUSANDS(text->n)));
    printf("Final estimate: PPL = %.4f +/- %.5f, %.4f bits per byte\n", perplexity,
           perplexity * sqrt(r->squares / tokens / (tokens - 1)),
           r->nats / log(2.0) / (double)predicted);
    TRY(flush_text());
    report(r, "eval time", 1);
    return DONE;
}

/* ==== 10. Bench ==================================================================================
 * How fast is it? Prompts, several texts at once, and texts of several lengths. A token cannot be
 * computed faster than its weights can be read from memory, so beside each speed stands the part of
 * the memory's bandwidth that it uses. The bandwidth is measured before each repetition, because
 * other programs on the machine use it too.
 */
enum { REPEATS = 5, DECODED = 128, BATCH_STEPS = 16, BATCH_MOST = 64, DEEPEST = 262144 };
enum { LONGEST_WAIT = 600 };            /* seconds for a text before its test is left out         */

typedef struct {
    int      threads;
    uint64_t weights, state, memory;    /* bytes: read per token, of a session, of the process    */
    unsigned char *bytes;               /* (weights) what is read to measure the memory           */
    double   speed;                     /* of the last test, tokens per second                    */
    based_session *session[BATCH_MOST];
} benchmark;

/* Two ways to read all cache lines of a block: one byte of each line, at addresses known
 * beforehand; and a search for a byte that is not there, for which the C library uses the widest
 * instructions of the machine. */
static int read_lines(const unsigned char *p, size_t n) {
    int found = 0;
    for (size_t i = 0; i < n; i += 64) found |= p[i];
    return found >> 1;
}

static int search(const unsigned char *p, size_t n) { return memchr(p, 2, n) != NULL; }

/* How many bytes per second can be read now, by as many threads as the model uses? The best of
 * several readings, because a block that fits into a cache is there only after the first ones. 0 if
 * that cannot be measured. */
static double read_memory(const benchmark *b) {
    size_t part = (size_t)b->weights / (size_t)b->threads;
    double most = 0.0, enough = seconds() + 0.05;
    int found = 0;
    for (int i = 0; b->bytes && (i < 4 || seconds() < enough); i++) {
        double begun = seconds();
#ifdef _OPENMP
#pragma omp parallel for num_threads(b->threads) schedule(static) reduction(| : found)
#endif
        for (int thread = 0; thread < b->threads; thread++) {
            found |= (i % 2 ? search : read_lines)(b->bytes + (size_t)thread * part, part);
        }
        double speed = per_second(b->weights, seconds() - begun);
        if (!found && speed > most) most = speed;
    }
    return most;
}

static int32_t any_token(const run *r, uint64_t i) {
    return (int32_t)((i * 2654435761u >> 7) % r->config->vocab);
}

/* Feeds n tokens that mean nothing. */
static int feed_any(run *r, uint64_t n) {
    int32_t ids[BLOCK];
    for (uint64_t done = 0, some; done < n; done += some) {
        some = n - done < BLOCK ? n - done : BLOCK;
        for (size_t i = 0; i < some; i++) ids[i] = any_token(r, based_count(r->session) + i);
        TRY_MODEL(based_feed(r->session, ids, (size_t)some, NULL, &r->error));
        if (interrupted) return INTERRUPTED;
    }
    return DONE;
}

/* Times one test and prints its line. sessions > 0: n steps of so many sessions at once; 0: a
 * prompt of n tokens. reset: each repetition begins with an empty session. */
static int time_test(run *r, benchmark *b, const char *test, size_t sessions, uint64_t n,
                     int reset) {
    double tokens = (double)(sessions ? n * sessions : n);
    double readings = sessions ? (double)n : ceil((double)n / (double)BLOCK);   /* of weights */
    double each[REPEATS], mean = 0.0, spread = 0.0, reads = 0.0;
    int32_t ids[BATCH_MOST];
    for (int i = 0; i < REPEATS; i++) {
        reads += read_memory(b) * 1e-9 / (double)REPEATS;
        if (reset) based_reset(r->session);

        /* the prompt, or the steps */
        double begun = seconds();
        if (!sessions) TRY(feed_any(r, n));
        for (uint64_t step = 0; sessions && step < n; step++) {
            for (size_t s = 0; s < sessions; s++) ids[s] = any_token(r, s * 977 + step);
            TRY_MODEL(based_step_many(b->session, ids, sessions, &r->error));
            if (interrupted) return INTERRUPTED;
        }
        each[i] = b->speed = tokens / (seconds() - begun);
        mean += each[i] / (double)REPEATS;
    }

    /* the standard deviation; and bytes per second beside what memory can give: of weights, and of
     * the state, of which each step reads all */
    for (int i = 0; i < REPEATS; i++) spread += (each[i] - mean) * (each[i] - mean);
    spread = sqrt(spread / (REPEATS - 1));
    double bytes = readings * (double)b->weights + (sessions ? tokens * (double)b->state : 0.0);
    double bandwidth = mean / tokens * bytes * 1e-9;
    double used = reads > 0.0 ? 100.0 * bandwidth / reads : 0.0;
    if (r->o->csv) {
        printf("\"%s\",%s,%d,%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%.3f,%s,%.2f,%.2f,%.3f,%.1f\n",
               r->name, based_model_kernels(r->model), b->threads, b->weights, b->state,
               b->memory, reads, test, mean, spread, bandwidth, used);
    } else {
        printf("| %-14s | %9.2f | %7.2f | %6.2f | %6.2f | %4.0f%% |\n", test, mean, spread,
               bandwidth, reads, used);
    }
    fflush(stdout);
    return DONE;
}

static int run_tests(run *r, benchmark *b) {
    static const uint64_t prompts[] = { 128, 512, 2048 }, depths[] = { 0, 1024, 16384, DEEPEST };
    if (r->o->csv) {
        puts("model,kernels,threads,weight bytes,state bytes,peak memory,read GB/s,test,tokens/s,"
             "spread,GB/s,% of read speed");
    } else {
        printf("%s, %s kernels, %d thread%s: %s bytes of weights per token, %s bytes of state, "
               "%s bytes of memory at most with one session\n\n"
               "| test           |  tokens/s |  spread |   GB/s | memory | used |\n"
               "|----------------|-----------|---------|--------|--------|------|\n",
               r->name, based_model_kernels(r->model), b->threads, b->threads == 1 ? "" : "s",
               THOUSANDS(b->weights), THOUSANDS(b->state), THOUSANDS(b->memory));
    }

    /* read a prompt */
    for (size_t i = 0; i < 3; i++) {
        TRY(time_test(r, b, FORMAT("pp%" PRIu64, prompts[i]), 0, prompts[i], 1));
    }
    double prompt_speed = b->speed;

    /* many texts, one token of each at a time, behind the last prompt: an empty state is faster */
    b->session[0] = r->session;
    for (size_t have = 1, many = 1; many <= BATCH_MOST; many *= 4) {
        for (; have < many; have++) {
            TRY(new_session(r, &b->session[have], BATCH_MOST));
            TRY_MODEL(based_copy(b->session[have], r->session, &r->error));
        }
        TRY(time_test(r, b, FORMAT("tg%d x %zu", BATCH_STEPS, many), many, BATCH_STEPS, 0));
    }

    /* behind texts of several lengths. The longest test comes last: Ctrl-C loses only that one */
    based_reset(r->session);
    for (size_t i = 0; i < 4; i++) {
        uint64_t depth = depths[i], count = based_count(r->session);
        double wait = ((double)depth - (double)count) / prompt_speed;
        const char *test = FORMAT("tg%d @ %" PRIu64, DECODED, depth);
        if (wait > (double)LONGEST_WAIT) {
            fprintf(stderr, "%s is left out: reading so long a text first would take %.0f "
                    "minutes\n", test, wait / 60.0);
            continue;
        }
        if (depth > count) TRY(feed_any(r, depth - count));
        TRY(time_test(r, b, test, 1, DECODED, depth == 0));
    }
    return flush_text();
}

static int bench(run *r) {
    benchmark b = { .memory = 0 };
    char line[128];
    TRY(open_session(r, 0));
    catch_signals(0);
    b.weights = based_model_weight_bytes(r->model);
    b.state = based_state_bytes(r->model);

    /* The most memory that the process ever had, where the system tells (Linux), after all that a
     * session uses was used. getrusage would count what was there before this program started. */
    TRY(feed_any(r, BLOCK));
    b.threads = based_threads(r->session);      /* that there can be                              */
    FILE *f = fopen("/proc/self/status", "r");
    while (f && b.memory == 0 && fgets(line, sizeof line, f)) {
        if (strncmp(line, "VmHWM:", 6) == 0) b.memory = strtoull(line + 6, NULL, 10) * 1024;
    }
    if (f) fclose(f);

    /* as many bytes as the weights; fewer would stay in a cache */
    b.bytes = b.weights <= SIZE_MAX ? malloc((size_t)b.weights) : NULL;
    if (b.bytes) memset(b.bytes, 1, (size_t)b.weights);
    int rc = run_tests(r, &b);
    for (size_t i = 1; i < BATCH_MOST; i++) based_session_free(b.session[i]);
    free(b.bytes);
    return rc;
}

/* ==== 11. Info and check =========================================================================
 * What a checkpoint says of itself, in words; and whether it is sound.
 */
#define NAME_OF(names, value) ((value) < COUNT(names) ? (names)[value] : "unknown")

static const char *const mixer_names[] = {"none", "conv", "taylor", "window"};
static const char *const norm_names[]  = {"none", "RMS", "layer", "L2"};
static const char *const mlp_names[]   = {"none", "SwiGLU", "GELU", "tanh GELU"};
static const char *const dtype_names[] = {"f32", "q8", "q4"};
static const char *const tokenizer_names[] = {"none", "byte-level BPE", "score merges"};

static void print_size(const char *label, uint64_t bytes, const char *note) {
    printf("%-12s %15s bytes%s\n", label, THOUSANDS(bytes), note);
}

/* The line of layers first..last, which are all alike. */
static void print_layers(const based_layer *l, unsigned first, unsigned last) {
    const char *heads = FORMAT(l->kv_heads == l->heads ? "%u heads" : "%u heads (%u key/value)",
                               (unsigned)l->heads, (unsigned)l->kv_heads);
    const char *exact = l->window ? FORMAT(", last %u tokens", (unsigned)l->window) : "";
    const char *shape = l->mixer == BASED_CONV
        ? FORMAT("%u channels, width %u", (unsigned)l->head_dim_v, (unsigned)l->conv_width)
        : l->mixer == BASED_TAYLOR
        ? FORMAT("%s, keys of %u, values of %u, %s %u%s%s", heads, (unsigned)l->head_dim_k,
                 (unsigned)l->head_dim_v, l->kernel == BASED_HEDGEHOG ? "hedgehog" : "degree",
                 (unsigned)l->degree, exact, l->window ? " exact" : "")
        : l->mixer == BASED_WINDOW
        ? FORMAT("%s of %u%s", heads, (unsigned)l->head_dim_k, exact) : "";
    const char *range = FORMAT(first == last ? "%u" : "%u-%u", first, last);
    printf("%-12s %-8s %-52s %s", range, NAME_OF(mixer_names, l->mixer), shape,
           NAME_OF(mlp_names, l->mlp));
    if (l->mlp != BASED_MLP_NONE) printf(" %u", (unsigned)l->hidden_dim);
    putchar('\n');
    if (l->sinks) printf("%22s the first %u tokens stay for ever\n", "", (unsigned)l->sinks);
    if (l->decay > 0) {
        printf("%22s %sfade to one half in %.0f tokens\n", "", l->sinks ? "others " : "tokens ",
               l->chunk * log(0.5) / log1p(-(double)l->decay));
    }
    if (l->fading) {
        printf("%22s tokens fade by %s\n", "", l->fading == BASED_GATED
               ? "a gate of each token" : "a fixed factor of each head");
    }
}

static int print_info(run *r) {
    const based_config *c = r->config;
    const based_tokenizer *t = &r->tokenizer;

    /* one dtype, if all matrices have the same */
    int same = c->rows == 0 || c->head_dtype == c->embedding_dtype;
    for (uint32_t i = 0; i < c->layers; i++) {
        const based_layer *l = based_model_layer(r->model, i);
        if (l->mixer != BASED_MIXER_NONE) same &= l->in_dtype == c->embedding_dtype;
        if (l->mlp != BASED_MLP_NONE) same &= l->up_dtype == c->embedding_dtype;
    }

    /* the header */
    printf("name         %s\n", r->name);
    printf("format       %u, checksum %08x%08x is %s\n", (unsigned)c->format,
           (unsigned)c->checksum[1], (unsigned)c->checksum[0],
           r->o->no_checksum ? "not compared" : "right");
    printf("parameters   %s (%s)\n", THOUSANDS(based_model_parameters(r->model)),
           same ? NAME_OF(dtype_names, c->embedding_dtype) : "mixed");
    printf("shape        %u wide, %u layers, final norm %s\n", (unsigned)c->dim,
           (unsigned)c->layers, NAME_OF(norm_names, c->final_norm));
    printf("vocabulary   %s tokens, %u rows, head %s\n", THOUSANDS(c->vocab),
           (unsigned)c->rows, c->flags & BASED_TIED ? "tied to the embedding" : "of its own");
    if (c->context > 0) {
        printf("trained on   %s tokens at once (a note, not a limit)\n",
               THOUSANDS(c->context));
    }
    if (c->prefix > 0) {
        printf("prefix       the first %s tokens of a prompt see each other\n",
               THOUSANDS(c->prefix));
    }

    /* the tokenizer */
    if (r->has_tokenizer) {
        printf("tokenizer    %s, %s tokens, %u special", NAME_OF(tokenizer_names, t->kind),
               THOUSANDS(t->size), (unsigned)t->specials);
        if (t->bos != BASED_NONE) {
            printf(", begin %u%s", (unsigned)t->bos,
                   t->flags & BASED_TOK_ADD_BOS ? " before every text" : "");
        }
        if (t->eos != BASED_NONE) printf(", end %u", (unsigned)t->eos);
        for (uint32_t i = 0; i < t->stops; i++) {
            printf("%s%u", i || t->eos != BASED_NONE ? " or " : ", end ", (unsigned)t->stop_id[i]);
        }
        putchar('\n');
        printf("chat         %s\n", t->chat[0] ? "by a template of its own" : "no: a base model");
    } else {
        puts("tokenizer    none");
    }

    if (c->rows > 0) {
        printf("sampling    ");
        print_settings(r, stdout);
    }

    /* one letter for each layer shows the order of the mixers; then a line for each run of layers
     * that are alike */
    for (uint32_t i = 0; i < c->layers; i++) {
        uint32_t mixer = based_model_layer(r->model, i)->mixer;
        if (i % 64 == 0) printf("%s%-12s ", i ? "\n" : "", i ? "" : "mixers");
        putchar(mixer < 4 ? "-ctw"[mixer] : '?');
    }
    puts(c->layers ? "  (c conv, t taylor, w window)" : "");
    printf("\n%-12s %-8s %-52s %s\n", "layer", "mixer", "shape", "MLP");
    for (uint32_t first = 0, next; first < c->layers; first = next) {
        const based_layer *l = based_model_layer(r->model, first);
        for (next = first + 1; next < c->layers; next++) {
            if (memcmp(l, based_model_layer(r->model, next), sizeof *l) != 0) break;
        }
        print_layers(l, first, next - 1);
    }

    /* bytes */
    uint64_t file = (uint64_t)c->file_size[1] << 32 | c->file_size[0];
    uint64_t header = sizeof *c + (uint64_t)c->layers * sizeof(based_layer);
    putchar('\n');
    print_size("file", file, "");
    print_size("  header", header, "");
    print_size("  tokenizer", c->tokenizer_bytes, "");
    print_size("  weights", file - header - c->tokenizer_bytes, ", gaps between sections included");
    print_size("per token", based_model_weight_bytes(r->model), " of weights are read");
    print_size("state", based_state_bytes(r->model), " of one session, however long the text");
    print_size("session", based_session_bytes(r->model, 1), " with scratch memory");
    return flush_text();
}

/* Feeds a few tokens, or vectors, and looks for logits that are not finite: weights may be finite
 * and still too large. */
static int check_few(run *r) {
    enum { FEW = 8 };
    const based_config *c = r->config;
    size_t total = FEW * r->width, bad = 0, inputs = FEW * (size_t)c->input;
    int32_t ids[FEW];
    for (int i = 0; i < FEW && c->vocab; i++) ids[i] = any_token(r, (uint64_t)i);
    if (r->has_tokenizer && start_token(&r->tokenizer) >= 0) ids[0] = start_token(&r->tokenizer);
    TRY(new_session(r, &r->session, FEW));
    float *rows = calloc(total + inputs, sizeof(float));        /* (FEW, width), (FEW, input)     */
    if (!rows) return out_of_memory("logits");
    float *x = rows + total;
    for (size_t i = 0; i < inputs; i++) x[i] = (float)((int)(i % 7) - 3) / 4;
    int status = c->flags & BASED_BIDIRECTIONAL
        ? based_feed_bidirectional(r->session, x, FEW, rows, &r->error)
        : c->input ? based_feed_vectors(r->session, x, FEW, rows, &r->error)
                   : based_feed(r->session, ids, FEW, rows, &r->error);
    for (size_t i = 0; i < total && status == BASED_OK; i++) bad += rows[i] - rows[i] != 0;
    free(rows);
    TRY_MODEL(status);
    if (bad == 0) return DONE;
    return fail(BAD_INPUT, "%s: all weights are finite, but %s of the %s logits after the first %d "
                "tokens are NaN or infinite; the checkpoint is broken", r->o->checkpoint,
                THOUSANDS(bad), THOUSANDS(total), FEW);
}

/* Opening has checked everything except the weights and what they compute. */
static int check(run *r) {
    TRY_MODEL(based_check_weights(r->model, &r->error));
    TRY(check_few(r));
    printf("%s is sound: header, sizes, %s%s and %s parameters\n", r->o->checkpoint,
           r->o->no_checksum ? "" : "checksum, ", r->has_tokenizer ? "tokenizer" : "no tokenizer",
           THOUSANDS(based_model_parameters(r->model)));
    return flush_text();
}

/* ==== 12. Vectors ================================================================================
 * For a model without an embedding: rows of little-endian float32 in, rows of logits out. A
 * bidirectional model reads the file as one window.
 */
static int vectors(run *r) {
    const based_config *c = r->config;
    if (c->input == 0) {
        return fail(BAD_INPUT, "%s reads tokens, not vectors; give it a text", r->o->checkpoint);
    }
    TRY(read_input(r->o->vectors, ALL, &r->input));
    char *bytes = r->input.bytes;
    int window = (c->flags & BASED_BIDIRECTIONAL) != 0;
    size_t n = r->input.n, rows = n / 4 / c->input, block = window ? rows : BLOCK;
    if (n == 0 || n % (4 * (size_t)c->input) != 0) {
        return fail(BAD_INPUT, "%s has %zu bytes; expected rows of %u numbers, 4 bytes each",
                    r->o->vectors, n, (unsigned)c->input);
    }
    if (block > BASED_MAX_BLOCK) {
        return fail(BAD_INPUT, "%s has %zu rows; this model sees all of a window at once, at most "
                    "%u", r->o->vectors, rows, BASED_MAX_BLOCK);
    }
    for (size_t i = 0; i < n; i += 4) {                         /* become floats in place         */
        uint32_t bits = (uint32_t)get_little((unsigned char *)bytes + i, 4);
        memcpy(bytes + i, &bits, 4);
    }
    const float *x = (const float *)(void *)bytes;              /* (rows, input)                  */
    TRY(new_session(r, &r->session, block));
    r->rows = malloc(block * r->width * sizeof(float));    /* (block, width)         */
    if (!r->rows) return out_of_memory("the result");
    TRY(open_output(r, &r->dump, r->o->dump, "the logits"));
    for (size_t at = 0; at < rows; at += block) {
        size_t some = smaller(rows - at, block);
        TRY_MODEL((window ? based_feed_bidirectional : based_feed_vectors)(r->session,
                x + at * c->input, some, r->rows, &r->error));
        TRY(dump_rows(r, r->rows, some));
    }
    TRY(close_output(&r->dump, DONE));
    if (r->o->verbose) fprintf(stderr, "logits #%08x\n", (unsigned)r->hash);
    return DONE;
}

/* ==== 13. Options ================================================================================
 * One table says everything about every flag. Parsing, help, defaults, error lines and which flags
 * go together all follow from it.
 */
#define PLAIN_TURN "User: {}\\nAssistant:"
/* What a flag takes; and how help calls that. A REGULAR file cannot be "-". */
enum kind { SWITCH, TEXT, TEXTS, IDS, INPUT, REGULAR, WHOLE, SEED, REAL, MODE };
static const char *const values[] = { NULL, "TEXT", "TEXT", "IDS", "FILE", "FILE", "N", "N", "X",
                                      "MODE" };

/* What a flag is, for the rules about others. A JOB writes no text; it excludes NO_TEXT. */
enum {
    PROMPT = 1, CHAT = 2, JOB = 4, BENCH = 8, SAVE = 16, LOAD = 32, BRANCHES = 64, DUMP = 128,
    VERBOSE = 256, JSONL = 512, NO_TEXT = PROMPT | CHAT | JOB | SAVE | LOAD | BRANCHES | DUMP
};

typedef struct {
    char        letter;                 /* 0: none                                                */
    const char *name;
    enum kind   kind;
    int         is, excludes, needs;    /* of the enum above                                      */
    size_t      offset;                 /* of the field in options                                */
    const char *help;
    const char *title;                  /* in help, the heading above this flag                   */
    const char *standard;               /* the default as one would type it                       */
    double      low, high;              /* of a number, both allowed                              */
    size_t      config;                 /* of the field in based_config that recommends a value   */
    const char *takes;                  /* for error lines, where it does not follow from kind    */
    const char *elsewhere;              /* what the letter means in llama.cpp                     */
    const char *alias;                  /* the name there, if another                             */
} flag;

#define AT(field) .offset = offsetof(options, field)
#define RECOMMENDED(field) .config = offsetof(based_config, field), AT(field)

static const flag flags[] = {

    {'i', "prompt", TEXT, AT(prompt), .title = "Model and prompt",
     .help = "Continue this text; \"-\" reads it from standard input. Without a prompt, that "
             "is done with what comes through a pipe or from a file there, if it begins within a "
             "second; or else a new text begins",
     .is = PROMPT, .excludes = PROMPT},
    {'f', "file", INPUT, AT(file),
     "Continue the text in this file; \"-\" is standard input. One newline at the end of "
     "the input is dropped",
     .is = PROMPT, .excludes = PROMPT},
    {0, "tokens", IDS, AT(tokens),
     "Continue these token ids, such as \"1 403 407\", exactly as given",
     .is = PROMPT, .excludes = PROMPT | CHAT},
    {'j', "threads", WHOLE, AT(threads),
     "Compute with N threads; the result is the same for any number. 0 chooses by the "
     "size of the model and the processors there are",
     .standard = "0", .high = 1024},
    {0, "no-checksum", SWITCH, AT(no_checksum),
     "Open the checkpoint without comparing its checksum: at once, where the file is "
     "known to be whole, or to see what is left of a damaged one"},

    {'n', "predict", WHOLE, AT(predict), .title = "Generation and sampling",
     .help = "Generate N tokens after the prompt. 0 only reads the prompt; -1 goes on until the "
             "end of the text or Ctrl-C: the model's memory of the past has a fixed size, so "
             "there is no limit",
     .standard = "256", .low = -1, .high = 9e18, .alias = "n-predict",
     .takes = "a whole number of tokens, 0 or more, or -1 for no limit"},
    {'t', "temp", REAL, RECOMMENDED(temperature),
     "Temperature: low is careful, high is daring, 0 always takes the most probable token",
     .standard = "1.0", .high = 100, .elsewhere = "for threads use -j or --threads"},
    {'p', "top-p", REAL, RECOMMENDED(top_p),
     "Choose among the most probable tokens that together reach probability X; 1 is all",
     .standard = "0.9", .high = 1, .elsewhere = "for a prompt use -i or --prompt"},
    {'k', "top-k", WHOLE, RECOMMENDED(top_k),
     "Choose among the N most probable tokens; 0 is all",
     .standard = "0", .high = 4294967295.0},
    {0, "min-p", REAL, RECOMMENDED(min_p),
     "Leave out tokens less than X times as probable as the best one",
     .standard = "0", .high = 1},
    {0, "repeat-penalty", REAL, RECOMMENDED(repeat_penalty),
     "Make recent tokens less probable if above 1",
     .standard = "1.0", .low = 0.01, .high = 100},
    {0, "repeat-last-n", WHOLE, RECOMMENDED(repeat_last_n),
     "Count the last N tokens as recent",
     .standard = "64", .high = 1048576},
    {'s', "seed", SEED, AT(seed),
     "Seed of the random choices; the same seed gives the same text on every machine "
     "(default: the time, which -v shows)",
     .takes = "a whole number from 0 to 18446744073709551615"},
    {'r', "reverse-prompt", TEXTS, .offset = 0,
     "Stop before this text would be printed; may be given several times. \\n is a new "
     "line, \\\\ a backslash",
     .takes = "a text that is not empty"},
    {0, "lookup", WHOLE, AT(lookup),
     "Where the text repeats itself, guess up to N tokens from what followed before and "
     "compute them together: the same text, sooner. 0 makes no guesses",
     .standard = "15", .high = GUESSES},
    {0, "ignore-eos", SWITCH, AT(ignore_eos), "Go on past the end of a text"},

    {0, "save", REGULAR, AT(save), .title = "The past as a file",
     .help = "At the end, write all that the model remembers to FILE; its size depends only on "
             "the model",
     .is = SAVE},
    {0, "load", REGULAR, AT(load),
     "Begin where a run with --save ended. Without a prompt its text goes on. A prompt "
     "(-i, -f, --tokens) is the whole text, as always: it must begin with the saved one, "
     "and only the rest is read",
     .is = LOAD},
    {0, "append", TEXT, AT(append),
     "With --load: put this behind the saved text before going on; \"-\" reads it from "
     "standard input",
     .excludes = PROMPT | CHAT, .needs = LOAD},
    {0, "branches", WHOLE, AT(branches),
     "Read the prompt once and write N continuations, each as a run of its own with the "
     "next seed would; 0 is one text as usual",
     .is = BRANCHES, .excludes = SAVE | DUMP | CHAT, .standard = "0", .high = 65536},

    {0, "jsonl", INPUT, AT(jsonl), .title = "Many texts at once",
     .help = "Answer the requests in FILE, one JSON object a line, such as {\"id\": 1, "
             "\"prompt\": \"Once\", \"max_tokens\": 20}, with one line each; \"-\" is standard "
             "input. Other keys: temperature, top_p, top_k, min_p, repeat_penalty, "
             "repeat_last_n, seed, stop, logprobs, n; or continuation, a text to be scored. What a "
             "line leaves out is as the options say",
     .is = JOB | JSONL},
    {0, "parallel", WHOLE, AT(parallel),
     "Compute at most N texts together; the answers are the same for any number. 0 is "
     "64, or fewer if the model's memory of so many texts takes more than 1 GB",
     .needs = JSONL | BRANCHES, .standard = "0", .high = BASED_MAX_BLOCK},
    {0, "unordered", SWITCH, AT(unordered),
     "Write each answer when it is complete, not in the order of the requests",
     .needs = JSONL},

    {'m', "mode", MODE, AT(chat), .title = "Conversation",
     .help = "generate (the default) or chat: a conversation, line by line from standard input, "
             "until Ctrl-D; /help there lists its commands",
     .is = CHAT, .takes = "generate or chat",
     .elsewhere = "the model is the first argument, before the options"},
    {'y', "system-prompt", TEXT, AT(system),
     "A text that stands before the conversation",
     .needs = CHAT},
    {0, "chat-template", TEXT, AT(chat_template),
     "How a turn looks to the model; {} is what you say, \\n a new line, \\\\ a backslash "
     "(default: as the checkpoint says, else \"" PLAIN_TURN "\")",
     .takes = "a text with one {} in it"},
    {0, "specials", SWITCH, AT(specials),
     "Names of special tokens in what you say become these tokens. Without it they are "
     "text, as anything that you say",
     .needs = CHAT},

    {'x', "perplexity", INPUT, AT(perplexity), .title = "Measuring",
     .help = "Measure how well the model predicts the text in FILE, of any length; \"-\" is "
             "standard input. Documents that an end-of-text token separates begin from nothing "
             "each",
     .is = JOB},
    {'b', "bench", SWITCH, AT(bench),
     "Measure speed: prompts, texts of several lengths, several texts at once; beside "
     "each the share of the memory's speed that it uses",
     .is = JOB | BENCH},
    {0, "csv", SWITCH, AT(csv),
     "With --bench: comma-separated values instead of a table",
     .needs = BENCH},
    {0, "info", SWITCH, AT(info),
     "Say what this checkpoint is: its layers, parameters and sizes",
     .is = JOB},
    {0, "check", SWITCH, AT(check),
     "Check all of this checkpoint, each weight too, and say in one line whether it is "
     "sound (status 0) or what is wrong first (status 1)",
     .is = JOB},
    {0, "dump-logits", REGULAR, AT(dump),
     "Write the logits after every token read, row after row, as little-endian float32",
     .is = DUMP, .excludes = CHAT},
    {0, "vectors", INPUT, AT(vectors),
     "For a model that reads vectors: feed those in FILE, rows of little-endian float32; "
     "--dump-logits receives what comes out",
     .is = JOB, .needs = DUMP},

    {0, "no-display-prompt", SWITCH, AT(no_display_prompt), .title = "Output",
     .help = "Print only what is generated"},
    {'q', "quiet", SWITCH, AT(quiet),
     "Write nothing but errors to standard error",
     .excludes = VERBOSE},
    {'v', "verbose", SWITCH, AT(verbose),
     "Also write the model, the seed, sizes, times, and a fingerprint of all logits used",
     .is = VERBOSE},
    {'h', "help", SWITCH, AT(help), "Print this text"},
    {0, "version", SWITCH, AT(version), "Print the version"},
};

enum { FLAGS = (int)COUNT(flags) };

/* Flags of llama2.c and llama.cpp that mean nothing here, and what to do instead. */
static const struct { const char *names, *advice; } foreign[] = {
    {" --model ", "the model is the first argument, before the options"},
    {" -z ", "the tokenizer is inside the checkpoint"},
    {" --steps ", "the number of tokens to generate is -n or --predict"},
    {" -c --ctx-size ", "the model's memory has a fixed size, so there is no context to set"},
    {" -ngl --gpu-layers --n-gpu-layers -dev --device ", "the processor computes; leave it out"},
    {" -tb --threads-batch -ub --ubatch-size --batch-size ", "-j is for all of the work"},
    {" -cnv --conversation -i --interactive ", "a conversation is -m chat"},
    {" --color --no-warmup --no-mmap --mlock --simple-io -no-cnv --no-conversation -fa ",
     "nothing here needs it; leave it out"},
};

static int print_help(void) {
    printf("usage: %s CHECKPOINT [options]\n\n"
           "Continues a text with a Based language model. The text goes to standard output and\n"
           "nothing else does; statistics and errors go to standard error.\n", program);
    for (const flag *f = flags; f < flags + FLAGS; f++) {
        const char *letter = f->letter ? FORMAT("-%c, ", f->letter) : "    ";
        char whole[512];
        if (f->title) printf("\n%s:\n", f->title);
        printf("  %-27s", FORMAT("%s--%s %s", letter, f->name,
                                 f->kind == SWITCH ? "" : values[f->kind]));

        /* the words of the text, in columns 30 to 80 */
        snprintf(whole, sizeof whole, f->config ? "%s (default %s, or as the checkpoint says)."
                 : f->standard ? "%s (default %s)." : "%s.", f->help, f->standard);
        int column = 29;
        for (const char *word = strtok(whole, " "); word; word = strtok(NULL, " ")) {
            if (column + 1 + (int)strlen(word) > 80) column = printf("\n%29s", "") - 1;
            column += printf(" %s", word);
        }
        putchar('\n');
    }
    static const char *const examples[] = {
        "                              a story",
        "-i \"Once upon a time\" -t 0    always the same story",
        "-f draft.txt -n -1 -r \"The end\"", "-x book.txt                   perplexity of a book",
        "-f book.txt -n 0 --save book.state     read it once,",
        "--load book.state --append \"Then\"     go on at once"
    };
    puts("\nExamples:");
    for (size_t i = 0; i < COUNT(examples); i++) {
        printf("  %s models/stories260K.bin %s\n", program, examples[i]);
    }
    puts("\nExit status: 0 done, 1 bad input or I/O, 2 bad usage, 130 interrupted by Ctrl-C.");
    return flush_text();
}

/* Reads a decimal number and nothing else: no spaces, no hexadecimal, no "nan". *value is a double
 * (REAL), int64_t (WHOLE) or uint64_t (SEED). */
static int parse_number(const char *text, enum kind kind, void *value) {
    const char *allowed = "0123456789";
    char *end;
    if (kind == WHOLE) allowed = "+-0123456789";
    if (kind == REAL) allowed = "+-.0123456789eE";
    if (text[strspn(text, allowed)] != '\0') return 0;
    errno = 0;
    if (kind == REAL) *(double *)value = strtod(text, &end);
    else if (kind == WHOLE) *(int64_t *)value = strtoll(text, &end, 10);
    else *(uint64_t *)value = strtoull(text, &end, 10);
    if (end == text || *end != '\0') return 0;
    if (kind != REAL) return errno == 0;
    return *(double *)value - *(double *)value == 0;            /* not infinite                   */
}

/* What a flag takes, for error lines. */
static const char *takes(char out[SHORT_BYTES], const flag *f) {
    if (f->takes) return f->takes;
    if (f->kind != REAL && f->kind != WHOLE) return "the name of a file";
    snprintf(out, SHORT_BYTES, "a %snumber from %.10g to %.10g", f->kind == WHOLE ? "whole " : "",
             f->low, f->high);
    return out;
}

/* Makes \n a new line and \\ a backslash, in place. */
static void unescape(char *text) {
    char *to = text;
    for (; *text; text++) {
        int escape = text[0] == '\\' && (text[1] == 'n' || text[1] == '\\');
        *to++ = escape && text[1] == 'n' ? '\n' : *text;
        text += escape;
    }
    *to = '\0';
}

static void drop_spaces(char *text) {
    for (size_t n = strlen(text); n > 0 && text[n - 1] == ' '; n--) text[n - 1] = '\0';
}

/* Stores the value of a flag. Returns 0 if the flag takes no such value. */
static int store_value(options *o, const flag *f, const char *text) {
    void *field = (char *)o + f->offset;
    double number = 0;
    int good = 1;
    switch (f->kind) {
    case SWITCH: *(int *)field = 1; break;
    case TEXT:
    case IDS:
    case INPUT:  *(const char **)field = text; break;
    case TEXTS:  o->stops[o->n_stops] = (char *)text, good = *text != '\0';
                 unescape(o->stops[o->n_stops++]); break;
    case REGULAR: *(const char **)field = text;
                 good = *text != '\0' && strcmp(text, "-") != 0; break;
    case SEED:   good = o->has_seed = parse_number(text, SEED, field); break;
    case MODE:   *(int *)field = strcmp(text, "chat") == 0;
                 good = *(int *)field || strcmp(text, "generate") == 0; break;
    case REAL:
    case WHOLE:  good = parse_number(text, f->kind, field);
                 number = f->kind == REAL ? *(double *)field : (double)*(int64_t *)field;
                 good = good && number >= f->low && number <= f->high; break;
    }
    return good;
}

/* Stores the value of a flag, which the user typed as `typed`. */
static int set_value(options *o, const flag *f, const char *typed, const char *text) {
    double number;
    if (store_value(o, f, text)) return DONE;
    /* what the letter means elsewhere, unless a number was meant */
    int hint = f->elsewhere && !parse_number(text, REAL, &number);
    return fail(BAD_USAGE, "%s takes %s, got %s%s%s", typed, takes((char[SHORT_BYTES]){ 0 }, f),
                QUOTE(text), hint ? "; " : "", hint ? f->elsewhere : "");
}

/* How many letters must be changed, added or left out to make one word of the other (Levenshtein),
 * row by row. */
static size_t distance(const char *a, const char *b) {
    size_t row[33], nb = smaller(strlen(b), 32);
    for (size_t j = 0; j <= nb; j++) row[j] = j;
    for (size_t i = 0; i < 32 && a[i]; i++) {
        size_t diagonal = row[0]++;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = diagonal + (a[i] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            row[j] = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
        }
    }
    return row[nb];
}

/* An unknown flag: says what to do instead, or which flag is nearest. */
static int unknown_flag(const char *typed) {
    const char *word = typed + strspn(typed, "-"), *nearest = NULL;
    size_t best = 2 + strlen(word) / 4;
    const char *name = FORMAT(" %.*s ", (int)strcspn(typed, "= "), typed);
    for (size_t i = 0; i < COUNT(foreign); i++) {
        if (strstr(foreign[i].names, name)) {
            return fail(BAD_USAGE, "there is no %.*s: %s", (int)strlen(name) - 2, name + 1,
                        foreign[i].advice);
        }
    }
    for (const flag *f = flags; f < flags + FLAGS; f++) {
        if (typed[1] == f->letter && f->kind != SWITCH && strspn(typed + 2, "+-.0123456789") > 0) {
            return fail(BAD_USAGE, "unknown option %s; put a space before the value: -%c %.20s",
                        QUOTE(typed), typed[1], typed + 2);
        }
        size_t n = strlen(f->name);
        size_t far = n > 2 && strncmp(word, f->name, n) == 0 ? 1 : distance(word, f->name);
        if (strlen(word) > 1 && far < best) best = far, nearest = f->name;
    }
    return fail(BAD_USAGE, nearest ? "unknown option %s; did you mean --%s?"
                                   : "unknown option %s; %s --help lists them all", QUOTE(typed),
                nearest ? nearest : program);
}

/* Was this flag given, with a value that is not off? Only for flags with rules about others. */
static int is_on(const options *o, const flag *f) {
    const void *field = (const char *)o + f->offset;
    if (!(f->is || f->excludes || f->needs)) return 0;
    if (f->kind == WHOLE) return *(const int64_t *)field != 0;
    if (f->kind == SWITCH || f->kind == MODE) return *(const int *)field;
    return *(const char *const *)field != NULL;
}

/* The rules about several flags: excludes and needs in the table; and what stdin is in a chat. */
static int check_options(const options *o) {
    if (!o->checkpoint) {
        return fail(BAD_USAGE, "no checkpoint; usage: %s CHECKPOINT [options], and %s --help "
                    "explains them", program, program);
    }
    /* each flag f that is on against all others */
    for (const flag *f = flags; f < flags + FLAGS; f++) {
        int others = 0, excludes = f->is & JOB ? NO_TEXT : f->excludes;
        const flag *needed = NULL;
        if (!is_on(o, f)) continue;
        for (const flag *g = flags; g < flags + FLAGS; g++) {
            if (g->is & f->needs) needed = g;
            if (g == f || !is_on(o, g)) continue;
            others |= g->is;
            if (g->is & excludes & ~f->needs) {
                return fail(BAD_USAGE, "--%s does not go with --%s%s; leave one of them out",
                            f->name, g->name, g->kind == MODE ? " chat" : "");
            }
        }
        if (needed && !(others & f->needs)) {
            return fail(BAD_USAGE, "--%s goes with --%s%s; add that, or leave it out", f->name,
                        needed->name, needed->kind == MODE ? " chat" : "");
        }
    }
    if (o->chat && ((o->prompt && strcmp(o->prompt, "-") == 0)
                    || (o->file && strcmp(o->file, "-") == 0))) {
        return fail(BAD_USAGE, "in a conversation standard input is what you say; a first message "
                    "can be given with -i");
    }
    return DONE;
}

/* Reads --chat-template, or the plain one. There a reply ends where the model begins the next turn:
 * at a new line and what stands before {}; or a reply again: at what stands behind {}. Both without
 * the spaces at their ends. */
static int read_template(options *o) {
    const char *text = o->chat_template ? o->chat_template : PLAIN_TURN;
    size_t n = strlen(text) + 2;
    o->turn = malloc(3 * n);
    if (!o->turn) return out_of_memory("the template of a conversation");
    o->stop = o->turn + n;
    o->own = o->stop + n;
    snprintf(o->turn, n, "%s", text);
    unescape(o->turn);
    const char *hole = strstr(o->turn, "{}");
    if (!hole || strstr(hole + 2, "{}")) {
        return fail(BAD_USAGE, "--chat-template takes a text with one {} in it, such as "
                    "\"" PLAIN_TURN "\"");
    }
    snprintf(o->stop, n, "\n%.*s", (int)(hole - o->turn), o->turn);
    snprintf(o->own, n, "%s", hole + 2);
    drop_spaces(o->stop);
    drop_spaces(o->own);
    return DONE;
}

/* Where the user said nothing, settings of the sampler are those that the checkpoint recommends. */
static void take_recommended(options *o, const based_config *c) {
    for (const flag *f = flags; f < flags + FLAGS && (c->flags & BASED_SAMPLING); f++) {
        const void *from = (const char *)c + f->config;
        void *to = (char *)o + f->offset;
        if (!f->config || (o->given >> (f - flags) & 1)) continue;
        if (f->kind == REAL) *(double *)to = (double)*(const float *)from;
        else *(int64_t *)to = *(const uint32_t *)from;
    }
}

/* The settings of the sampler as they would be typed, and who chose them. */
static void print_settings(const run *r, FILE *to) {
    static const char *const by[] = { "by default", "as the checkpoint says", "as given" };
    int recommends = (r->config->flags & BASED_SAMPLING) != 0, groups = 0;
    for (int who = 2; who >= 0; who--) {
        int n = 0;
        for (const flag *f = flags; f < flags + FLAGS; f++) {
            const void *field = (const char *)r->o + f->offset;
            int given = r->o->given >> (f - flags) & 1;
            if (!f->config || who != (given ? 2 : recommends)) continue;
            if (n++ == 0 && groups++ > 0) putc(',', to);
            fputs(f->letter ? FORMAT(" -%c ", f->letter) : FORMAT(" --%s ", f->name), to);
            if (f->kind == REAL) fprintf(to, "%g", *(const double *)field);
            else fprintf(to, "%" PRId64, *(const int64_t *)field);
        }
        if (n > 0) fprintf(to, " %s", by[who]);
    }
    putc('\n', to);
}

/* Says what is allowed and seldom meant. */
static void warn_of_values(const options *o) {
    if (o->temperature >= 2) {
        say(o, FORMAT("note: -t %g is a temperature, and a high one; for threads use -j",
                       o->temperature));
    }
#ifdef _OPENMP
    if (o->threads > omp_get_num_procs()) {
        say(o, FORMAT("note: -j %d is more than the %d processors there are, which makes it slower",
                       (int)o->threads, omp_get_num_procs()));
    }
#endif
}

/* Fills *o from the command line. o->stops must have room for argc texts. */
static int parse_options(options *o, int argc, char **argv) {
    int only_paths = 0;
    for (const flag *f = flags; f < flags + FLAGS; f++) {
        if (f->standard) TRY(set_value(o, f, f->name, f->standard));
    }
    for (int i = 1; i < argc && !o->help && !o->version; i++) {
        const char *typed = argv[i], *text = NULL;
        size_t n = strcspn(typed, "=");
        const flag *f = NULL;

        /* the checkpoint */
        if (only_paths || typed[0] != '-' || typed[1] == '\0') {
            if (o->checkpoint) {
                return fail(BAD_USAGE, "two checkpoints, %s and %s; if one is a prompt, put -i "
                            "before it", QUOTE(o->checkpoint), QUOTE(typed));
            }
            o->checkpoint = typed;
            continue;
        }
        if (strcmp(typed, "--") == 0) {
            only_paths = 1;
            continue;
        }

        /* a flag, and its value: behind "=" or the next argument */
        for (const flag *g = flags; g < flags + FLAGS; g++) {
            if (typed[1] == g->letter && typed[2] == '\0') f = g;
            if (typed[1] == '-' && (is_name(g->name, typed + 2, n - 2)
                                    || is_name(g->alias, typed + 2, n - 2))) {
                f = g;
                if (typed[n] == '=') text = typed + n + 1;
            }
        }
        if (!f) return unknown_flag(typed);
        const char *name = FORMAT("%.*s", (int)n, typed);
        if (f->kind == SWITCH) {
            if (text) return fail(BAD_USAGE, "%s is a switch and takes no value", name);
        } else if (!text) {
            if (++i == argc) return fail(BAD_USAGE, "%s needs a value: %s", name, values[f->kind]);
            text = argv[i];
        }
        TRY(set_value(o, f, name, text));
        o->given |= (uint64_t)1 << (f - flags);
    }
    if (o->help || o->version) return DONE;
    TRY(check_options(o));
    return o->chat ? read_template(o) : DONE;
}

/* ==== 14. Many texts at once =====================================================================
 * --jsonl: each line of a file asks for a text, or for the probability of one, and a line answers.
 * --branches: one prompt, many continuations. A text among others is a job: a run with options, a
 * sampler and an output of its own; only its session computes together with theirs. So each answer
 * is what a program of its own would have written.
 *
 * Prompts are read one after another by r->session, in blocks, and the session of a job begins as a
 * copy of it. Before that, r->session itself begins as a copy of what was kept of the prompts
 * before. What is worth keeping is known beforehand: where a waiting prompt parts from this one.
 */
enum { PARALLEL = 64, SESSIONS_BYTES = 1 << 30 };       /* texts computed together, at most       */
enum { QUEUE = 1024, QUEUE_BYTES = 1 << 26 };   /* requests, and bytes of them, read beforehand   */
enum { LOOKAHEAD = 64 };                /* waiting prompts that a prompt is compared with         */
enum { SHARED_LEAST = 32, KEPT = 8 };   /* tokens worth keeping; how many sessions are kept       */
enum { STOPS = 16, WORD_BYTES = 64 };   /* of a request: stop texts; bytes of a number            */

typedef struct {                        /* a text of the request; n bytes and a zero              */
    char  *text;
    size_t n;
} span;

typedef struct job {
    struct job *next;                   /* in the order of the requests                           */
    options     o;                      /* the command line, and over it what the request says    */
    run         r;
    span        line;                   /* the texts of the request point into it                 */
    span        id, prompt, continuation;
    char       *stops[STOPS];
    int         id_is_text, logprobs;
    uint64_t    index;                  /* of several texts for one request                       */
    size_t      n_prompt, n_scored;     /* r.ids: the prompt, then the continuation               */
    uint64_t    n;                      /* tokens written or scored so far                        */
    double      score;                  /* log probability of the continuation                    */
    int         greedy;                 /* it is what temperature 0 would have written            */
    buffer      text, tokens, logs;     /* written so far; ids and log probabilities, as JSON     */
    const char *finish;                 /* why it ended; NULL: not yet                            */
    int         delivered;
    const char *wrong;                  /* with the request; NULL: nothing                        */
    uint64_t    line_number, byte;      /* where; byte 0: nowhere in particular                   */
    char        detail[200];            /* what `wrong` may point to                              */
} job;

typedef struct {
    run     *r;
    job     *first, *last, *waiting;    /* the queue; the first job that was not started          */
    size_t   n_queued, queued_bytes;
    job    **running;                   /* (parallel), the first n_running                        */
    based_session **session;            /* (parallel) of the running ones; NULL: not yet made     */
    size_t   parallel, n_running;
    based_session *kept[KEPT];          /* beginnings of prompts                                  */
    uint64_t used[KEPT], clock;         /* when each was used last                                */
    buffer   answer;

    FILE    *file;                      /* requests; bytes.bytes[at .. bytes.n - 1] were read     */
    buffer   bytes;
    size_t   at;
    span     line;                      /* the newest line                                        */
    uint64_t lines, texts, index;       /* read so far; texts of this line, and how many came     */
    int      ended, too_long, status;   /* of the file; the newest line; of reading               */
    double   file_bytes, done_bytes;    /* 0: not known                                           */
    uint64_t requests, answered, errors, prompt_tokens, shared_tokens, tokens;
    double   begun;
} batch;

/* ---- JSON: one object of texts, numbers, true, false, null, and one list ----------------------*/
typedef struct {
    char *at, *end;
    const char *wrong;                  /* what is wrong at `at`; NULL: nothing                   */
} reader;

static int refuse(reader *in, const char *wrong) {
    in->wrong = wrong;
    return 0;
}

/* The next byte that is not blank; -1 at the end. */
static int peek(reader *in) {
    while (in->at < in->end && memchr(" \t\r\n", *in->at, 4)) in->at++;
    return in->at < in->end ? (unsigned char)*in->at : -1;
}

/* Takes this byte, if it is the next one. */
static int take(reader *in, char c) {
    if (peek(in) != c) return 0;
    in->at++;
    return 1;
}

/* The length of the UTF-8 character that p begins with; 0 if it is not valid. */
static size_t character(const unsigned char *p, size_t n) {
    size_t whole = p[0] < 0x80 ? 1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    if (whole == 1) return 1;
    return whole <= n && begins_character(p, whole - 1) && (p[whole - 1] & 0xc0) == 0x80 ? whole
                                                                                          : 0;
}

/* Reads \uXXXX from p, of which n bytes are there. Returns its length, or 0. */
static size_t read_unit(const char *p, size_t n, uint32_t *code) {
    char digits[5] = "";
    if (n < 6 || p[0] != '\\' || p[1] != 'u') return 0;
    memcpy(digits, p + 2, 4);
    *code = (uint32_t)strtoul(digits, NULL, 16);
    return strspn(digits, "0123456789abcdefABCDEF") == 4 ? 6 : 0;
}

/* Decodes the escape at p. Two \u that are surrogates make one character; one alone makes none. */
static size_t read_escape(const char *p, size_t n, uint32_t *code) {
    static const char names[] = "\"\\/bfnrt", means[] = "\"\\/\b\f\n\r\t";
    const char *name = n > 1 && p[1] ? strchr(names, p[1]) : NULL;
    uint32_t low;
    if (name) {
        *code = (unsigned char)means[name - names];
        return 2;
    }
    if (!read_unit(p, n, code) || (*code >= 0xdc00 && *code < 0xe000)) return 0;
    if (*code < 0xd800 || *code >= 0xe000) return 6;
    if (!read_unit(p + 6, n - 6, &low) || low < 0xdc00 || low >= 0xe000) return 0;
    *code = 0x10000 + ((*code - 0xd800) << 10) + (low - 0xdc00);
    return 12;
}

static size_t put_utf8(char *to, uint32_t code) {
    size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; code >>= 6) to[i] = (char)(0x80 | (code & 0x3f));
    to[0] = (char)(n == 1 ? code : (0xf00u >> n & 0xf0) | code);
    return n;
}

/* Reads a string and decodes it in place: it never gets longer. */
static int read_string(reader *in, span *out) {
    char *text = ++in->at, *to = text;
    while (in->at < in->end && *in->at != '"') {
        size_t rest = (size_t)(in->end - in->at), n;
        uint32_t code = 0;
        if ((unsigned char)*in->at < 0x20) {
            return refuse(in, "a control character in a text must be written as \\u00..");
        }
        if (*in->at == '\\') {
            n = read_escape(in->at, rest, &code);
            if (n == 0) return refuse(in, "this escape is no character");
            to += put_utf8(to, code);
        } else {
            n = character((unsigned char *)in->at, rest);
            if (n == 0) return refuse(in, "these bytes are not UTF-8");
            memmove(to, in->at, n);
            to += n;
        }
        in->at += n;
    }
    if (in->at == in->end) return refuse(in, "a text does not end");
    in->at++;
    *to = '\0';
    *out = (span){ text, (size_t)(to - text) };
    return 1;
}

static int is_digit(char c) { return c >= '0' && c <= '9'; }

/* A number that C reads, and that begins and has digits where JSON wants them. */
static int is_number(const char *text) {
    const char *first = text + (*text == '-'), *point = strchr(text, '.');
    double value;
    return is_digit(first[0]) && !(first[0] == '0' && is_digit(first[1]))
        && (!point || is_digit(point[1])) && parse_number(text, REAL, &value);
}

/* The keys of a request. A number has the range of the flag. */
enum { ID, TO_CONTINUE, TO_SCORE, STOP, LOGPROBS };
static const struct { const char *name, *takes, *flag; } keys[] = {
    {"id", "a text or a number", NULL}, {"prompt", "a text", NULL},
    {"continuation", "a text", NULL}, {"stop", "a text or a list of at most 16, none empty", NULL},
    {"logprobs", "true or false", NULL}, {"max_tokens", NULL, "predict"},
    {"temperature", NULL, "temp"}, {"top_p", NULL, "top-p"}, {"top_k", NULL, "top-k"},
    {"min_p", NULL, "min-p"}, {"repeat_penalty", NULL, "repeat-penalty"},
    {"repeat_last_n", NULL, "repeat-last-n"}, {"seed", NULL, "seed"}, {"n", NULL, "branches"}
};
enum { KEYS = (int)COUNT(keys) };

/* One stop text, or the list of them. Returns 0 if it is something else. */
static int read_stops(job *j, reader *in) {
    int list = take(in, '[');
    j->o.stops = j->stops;
    j->o.n_stops = 0;
    if (list && take(in, ']')) return 1;
    do {
        span stop;
        if (peek(in) != '"' || !read_string(in, &stop)) return 0;
        if (stop.n == 0 || strlen(stop.text) < stop.n || j->o.n_stops == STOPS) return 0;
        j->stops[j->o.n_stops++] = stop.text;
    } while (list && take(in, ','));
    return !list || take(in, ']');
}

/* The value of a key. null is as if the key were not there. */
static int read_value(job *j, reader *in, int key) {
    static const char letters[] = "+-.0123456789Eaeflnrstu";
    const flag *f = NULL;
    char word[WORD_BYTES] = "";
    span source = { in->at, 0 };        /* of a word                                              */
    int good = 0;
    for (const flag *g = flags; g < flags + FLAGS && keys[key].flag; g++) {
        if (strcmp(g->name, keys[key].flag) == 0) f = g;
    }
    if (peek(in) == '"' && key <= TO_SCORE) {
        span *to = key == ID ? &j->id : key == TO_CONTINUE ? &j->prompt : &j->continuation;
        if (!read_string(in, to)) return 0;
        good = 1;
        if (key == ID) j->id_is_text = 1;
    } else if (key == STOP && (peek(in) == '"' || peek(in) == '[')) {
        good = read_stops(j, in);
        if (in->wrong) return 0;
    } else {
        while (in->at < in->end && source.n + 1 < WORD_BYTES
               && memchr(letters, *in->at, sizeof letters - 1)) {
            word[source.n++] = *in->at++;
        }
        if (strcmp(word, "null") == 0) return 1;
        if (key == ID) good = is_number(word), j->id = good ? source : j->id;
        if (key == LOGPROBS) {
            j->logprobs = strcmp(word, "true") == 0;
            good = j->logprobs || strcmp(word, "false") == 0;
        }
        if (f) good = is_number(word) && store_value(&j->o, f, word);
    }
    if (good) return 1;
    char range[SHORT_BYTES];
    snprintf(j->detail, sizeof j->detail, "\"%s\" takes %s", keys[key].name,
             f ? takes(range, f) : keys[key].takes);
    return refuse(in, j->detail);
}

static int read_members(job *j, reader *in) {
    unsigned seen = 0;
    if (!take(in, '{')) return refuse(in, "an object, {...}, is expected");
    for (int more = !take(in, '}'); more; ) {
        span name;
        int key = 0;
        if (peek(in) != '"') return refuse(in, "a key in quotes is expected");
        if (!read_string(in, &name)) return 0;
        while (key < KEYS && !is_name(keys[key].name, name.text, name.n)) key++;
        if (key == KEYS || seen >> key & 1) {
            snprintf(j->detail, sizeof j->detail, key == KEYS ? "there is no key %s; the help for "
                     "--jsonl lists them all" : "there are two keys %s", QUOTE(name.text));
            return refuse(in, j->detail);
        }
        seen |= 1u << key;
        if (!take(in, ':')) return refuse(in, "a colon is expected");
        peek(in);
        if (!read_value(j, in, key)) return 0;
        more = take(in, ',');
        if (!more && !take(in, '}')) return refuse(in, "a comma or } is expected");
    }
    return peek(in) == -1 || refuse(in, "something stands behind the object");
}

/* Reads the request in line[0 .. n - 1] over the values that *j has. The texts of *j then point
 * into the line, which has changed. Returns 0 if it is not valid; then j->wrong says why. */
static int read_request(job *j, char *line, size_t n) {
    reader in = { line, line + n, NULL };
    if (read_members(j, &in)) return 1;
    j->wrong = in.wrong;
    j->byte = (uint64_t)(in.at - line) + 1;
    return 0;
}

/* ---- The queue --------------------------------------------------------------------------------*/

/* Finds the next line that is not blank, without its newline. Returns 0 if none is there yet, or
 * there is no other. */
static int next_line(batch *b, int wait) {
    b->too_long = 0;
    for (size_t searched = b->at; ; ) {
        char *from = b->bytes.bytes + b->at;
        char *end = memchr(b->bytes.bytes + searched, '\n', b->bytes.n - searched);
        if (!end && b->ended && b->bytes.n > b->at) end = b->bytes.bytes + b->bytes.n;
        if (end) {
            size_t n = (size_t)(end - from), mark = b->lines == 0 ? mark_bytes(from, n) : 0;
            b->line = (span){ from + mark, n - mark };
            b->at += n + (end < b->bytes.bytes + b->bytes.n);
            searched = b->at;
            b->lines++;
            reader blank = { b->line.text, b->line.text + b->line.n, NULL };
            if (peek(&blank) != -1 || b->too_long) return 1;
            continue;
        }
        if (b->ended) return 0;

        /* more bytes behind those of the unfinished line, which move to the front */
        b->bytes.n -= b->at;
        if (b->bytes.n > 0 && b->at > 0) memmove(b->bytes.bytes, from, b->bytes.n);
        searched = b->bytes.n;
        b->at = 0;
        if (!reserve(&b->bytes, BUFSIZ)) b->too_long = 1, b->bytes.n = searched = 0;
        if (wait) leave_signals(0);     /* while it waits, Ctrl-C ends the program                */
        long got = read_some(b->file, b->bytes.bytes + b->bytes.n, b->bytes.room - b->bytes.n,
                             wait);
        if (wait) catch_signals(0);
        if (got == -2) return 0;
        if (got < 0) b->status = cannot_read(b->r->o->jsonl);
        if (got > 0) b->bytes.n += (size_t)got;
        else b->ended = 1;
    }
}

static job *add_job(batch *b) {
    job *j = calloc(1, sizeof *j);
    if (!j) return NULL;
    j->o = *b->r->o;
    j->r = *b->r;
    j->r.o = &j->o;
    j->id = (span){ "null", 4 };
    j->r.out = (text_out){ .to = &j->text, .decoder = b->r->out.decoder };
    j->r.sampler_memory = NULL, j->r.recent = NULL;
    *(b->first ? &b->last->next : &b->first) = j;
    b->last = j;
    if (!b->waiting) b->waiting = j;
    b->n_queued++;
    return j;
}

/* The tokens of a request: the prompt, or the start token, and then the continuation. Returns what
 * is wrong with it, or NULL. */
static const char *encode_request(job *j) {
    run *r = &j->r;
    size_t n = j->prompt.n, more = j->continuation.n;
    int unprompted = j->continuation.text && n == 0;    /* all of the text is scored              */
    char *text = malloc(n + more + 1);
    if (!text) return "not enough memory for its text";
    if (j->prompt.text) memcpy(text, j->prompt.text, n);
    if (j->continuation.text) memcpy(text + n, j->continuation.text, more);
    int status = encode_quietly(r, text, n + more, unprompted ? PREDICTS : BEGINS, n, n);
    free(text);
    if (status != BASED_OK) return r->error.text;
    if (r->n_ids == 0 || (unprompted && start_token(&r->tokenizer) < 0)) {
        return "no token begins a text; give a prompt";
    }
    j->n_prompt = unprompted ? 1 : r->n_first;
    j->n_scored = r->n_ids - j->n_prompt;
    return NULL;
}

/* Puts the next text that is asked for into the queue; a request that is not valid as a job that
 * has ended. */
static int read_job(batch *b, int wait, int *got) {
    *got = b->index < b->texts || next_line(b, wait);
    if (!*got) return DONE;
    if (b->index == b->texts) b->index = 0, b->texts = 1;
    job *j = add_job(b);
    if (!j) return out_of_memory("the requests");
    j->index = b->index++;
    j->line_number = b->lines;
    b->requests += j->index == 0;

    /* a copy of the line, which becomes its texts */
    char *copy = b->too_long ? NULL : malloc(b->line.n + 1);
    if (!copy) {
        j->wrong = "not enough memory for so long a line";
    } else {
        j->line = (span){ memcpy(copy, b->line.text, b->line.n), b->line.n };
        b->queued_bytes += b->line.n;
        if (read_request(j, copy, b->line.n)) j->wrong = encode_request(j);
        if (j->byte == 0 && j->index == 0 && j->o.branches > 1 && !j->continuation.text) {
            b->texts = (uint64_t)j->o.branches;
        }
        j->o.seed += j->index;
    }
    if (j->wrong) {
        j->finish = "error";
        b->errors++;
    }
    return DONE;
}

static void free_first(batch *b) {
    job *j = b->first;
    b->first = j->next;
    if (!b->first) b->last = NULL;
    if (b->waiting == j) b->waiting = b->first;
    b->n_queued--;
    b->queued_bytes -= j->line.n;
    free_text(&j->r);
    if (!b->r->o->branches) free(j->r.ids);
    free(j->text.bytes);
    free(j->tokens.bytes);
    free(j->logs.bytes);
    free(j->line.text);
    free(j);
}

/* ---- Answers ----------------------------------------------------------------------------------*/
static int put_quoted(buffer *b, const char *text, size_t n) {
    TRY(put(b, "\""));
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '"' || c == '\\') TRY(put(b, "\\"));
        if (c < 0x20) TRY(put(b, c == '\n' ? "\\n" : "\\u%04x", c));
        else TRY(append(b, text + i, 1));
    }
    return put(b, "\"");
}

/* A log probability behind some text; JSON has no infinity. */
static int put_log(buffer *b, const char *before, double x) {
    return put(b, x - x == 0 ? "%s%.9g" : "%snull", before, x);
}

/* Notes a token that was written or scored. */
static int note_token(batch *b, job *j, const float *logits, int32_t id) {
    double log = j->logprobs || j->n_scored
               ? based_log_probability(logits, b->r->width, id) : 0;
    TRY(put(&j->tokens, j->n ? ", %ld" : "%ld", (long)id));
    if (j->logprobs) TRY(put_log(&j->logs, j->n ? ", " : "", log));
    j->n++;
    j->score += log;
    return DONE;
}

/* The answer is complete in memory before it is written, as a whole line, by one call. */
static int write_answer(batch *b, job *j) {
    buffer *a = &b->answer;
    a->n = 0;
    TRY(put(a, "{\"id\": "));
    if (j->id_is_text) TRY(put_quoted(a, j->id.text, j->id.n));
    else TRY(put(a, "%.*s", (int)j->id.n, j->id.text));
    if (j->wrong) {
        const char *byte = j->byte ? FORMAT(", byte %" PRIu64, j->byte) : "";
        TRY(put(&j->text, "line %" PRIu64 "%s: %s", j->line_number, byte, j->wrong));
        TRY(put(a, ", \"error\": "));
        TRY(put_quoted(a, j->text.bytes, j->text.n));
    } else {
        if (j->continuation.text) {
            TRY(put_log(a, ", \"logprob\": ", j->score));
            TRY(put(a, ", \"greedy\": %s", j->greedy ? "true" : "false"));
        } else {
            TRY(put(a, ", \"index\": %" PRIu64 ", \"text\": ", j->index));
            TRY(put_quoted(a, j->text.bytes, j->text.n));
        }
        TRY(put(a, ", \"tokens\": [%s%s%s]", j->n ? j->tokens.bytes : "",
                j->logprobs ? "], \"logprobs\": [" : "",
                j->n && j->logprobs ? j->logs.bytes : ""));
    }
    TRY(put(a, ", \"finish_reason\": \"%s\"}\n", j->finish));
    return fwrite(a->bytes, 1, a->n, stdout) == a->n ? DONE : write_failed();
}

static int write_branch(batch *b, const job *j) {
    printf("--- branch %s of %s, seed %" PRIu64 " ---\n", THOUSANDS(j->index + 1),
           THOUSANDS((uint64_t)b->r->o->branches), j->r.sampler.seed);
    TRY(write_text(&b->r->out, j->text.bytes, j->text.n));
    TRY(flush_text());
    b->r->hash = j->r.hash;
    if (b->r->o->verbose) {
        fprintf(stderr, "branch %" PRIu64 ": logits #%08" PRIx32 "\n", j->index + 1, j->r.hash);
    }
    return DONE;
}

/* Writes the answers that are complete: in order, up to the first that is not, or each. Then tells
 * how far that is. */
static int deliver(batch *b) {
    for (job *j = b->first; j && (j->finish || b->r->o->unordered); j = j->next) {
        if (!j->finish || j->delivered) continue;
        clear_progress();
        TRY(b->r->o->branches ? write_branch(b, j) : write_answer(b, j));
        if (j->index == 0) b->answered++, b->done_bytes += (double)j->line.n + 1;
        j->delivered = 1;
    }
    while (b->first && b->first->delivered) free_first(b);
    if (!b->r->o->jsonl) return DONE;

    double spent = seconds() - b->begun;
    double share = b->file_bytes > 0 ? b->done_bytes / b->file_bytes : 0;
    show_progress(b->r, FORMAT("answered %s requests, %s tokens, %.0f tok/s%s",
                  THOUSANDS(b->answered), THOUSANDS(b->tokens), per_second(b->tokens, spent),
                  share > 0 ? FORMAT(", %.0f s left", spent / share - spent) : ""));
    return DONE;
}

/* ---- Computing --------------------------------------------------------------------------------*/

/* Keeps a copy of r->session, in place of the one that was not used for the longest time. */
static int keep(batch *b) {
    size_t oldest = 0;
    for (size_t i = 0; i < KEPT; i++) if (b->used[i] < b->used[oldest]) oldest = i;
    if (!b->kept[oldest]) TRY(new_session(b->r, &b->kept[oldest], 1));
    b->used[oldest] = ++b->clock;
    based_copy(b->kept[oldest], b->r->session, NULL);
    return DONE;
}

/* Makes r->session the longest kept one that the n tokens begin with. Returns its length. */
static size_t recall(batch *b, const int32_t *ids, size_t n) {
    size_t best = KEPT, length = 0;
    for (size_t i = 0; i < KEPT; i++) {
        uint64_t count = b->kept[i] ? based_count(b->kept[i]) : 0;
        if (count > length && count <= n
            && based_history_of(0, ids, (size_t)count) == based_history(b->kept[i])) {
            best = i, length = (size_t)count;
        }
    }
    based_reset(b->r->session);
    if (best == KEPT) return 0;
    based_copy(b->r->session, b->kept[best], NULL);
    b->used[best] = ++b->clock;
    return length;
}

/* Where does the prompt of a waiting job part from these n tokens? The first such place that is
 * worth keeping, *shared; or n. */
static size_t next_fork(const batch *b, const int32_t *ids, size_t n, size_t from, int *shared) {
    const job *j = b->waiting;
    size_t fork = n, least = from + SHARED_LEAST;
    size_t prefix = b->r->config->prefix;
    *shared = 0;
    if (least < prefix) least = prefix; /* whose tokens see each other, so it is read as a whole  */
    for (int k = 0; j && k < LOOKAHEAD; k++, j = j->next) {
        size_t most = smaller(j->n_prompt, fork), same = 0;
        if (j->finish || most < least) continue;
        while (same < most && j->r.ids[same] == ids[same]) same++;
        if (same >= least) fork = same, *shared = 1;
    }
    return fork;
}

/* Reads the prompt of a job with r->session. */
static int read_job_prompt(batch *b, job *j) {
    run *r = b->r;
    size_t n = j->n_prompt - (j->n_scored > 0), from = recall(b, j->r.ids, n), fork;
    int shared, rc = DONE;
    b->prompt_tokens += j->n_prompt;
    b->shared_tokens += from;
    r->ids = j->r.ids;
    for (; from < n && rc == DONE && !interrupted; from = fork) {
        fork = next_fork(b, r->ids, n, from, &shared);
        r->n_loaded = from;
        rc = feed_ids(r, fork);
        if (shared && rc == DONE && !interrupted) rc = keep(b);
    }
    r->ids = NULL;
    return rc;
}

/* Would temperature 0 choose this token? */
static int is_best(const float *logits, size_t n, int32_t id) {
    for (size_t i = 0; i < n; i++) {
        if (logits[i] > logits[id] || (i < (size_t)id && logits[i] == logits[id])) return 0;
    }
    return 1;
}

/* Scores the continuation by the logits before each of its tokens, in blocks. r->session has read
 * the prompt but for its last token. */
static int score_continuation(batch *b, job *j) {
    run *r = b->r;
    size_t n = j->n_scored, width = r->width;
    const int32_t *ids = j->r.ids + j->n_prompt;        /* (n_scored)                             */
    j->greedy = 1;
    for (size_t at = 0, some; at < n && !interrupted; at += some) {
        some = smaller(n - at, r->block);
        TRY_LIB(based_feed(r->session, ids + at - 1, some, r->rows, &r->error), r->o->jsonl);
        for (size_t i = 0; i < some; i++) {
            const float *logits = r->rows + i * width;
            TRY(check_logits(r, logits, based_count(r->session)));
            j->greedy &= is_best(logits, width, ids[at + i]);
            TRY(note_token(b, j, logits, ids[at + i]));
        }
    }
    b->tokens += n;
    j->finish = "stop";
    return DONE;
}

static int finish(job *j, const char *reason) {
    j->finish = reason;
    TRY(j->o.branches && !j->o.jsonl ? end_text(&j->r) : put_rest(&j->r));
    free_text(&j->r);
    return DONE;
}

/* Starts the first waiting job: with its prompt read, it takes the next place. */
static int start_job(batch *b) {
    job *j = b->waiting;
    run *r = b->r;
    b->waiting = j->next;
    if (j->finish) return DONE;
    const int32_t *before = j->r.ids;   /* what was read before the text                          */
    size_t n = j->r.n_ids;
    if (r->o->branches) {
        before = r->recent, n = based_sampler_recent(&r->sampler, r->recent);
    } else {
        TRY(read_job_prompt(b, j));
        if (interrupted) return DONE;
        if (j->continuation.text) return score_continuation(b, j);
    }
    TRY(prepare(&j->r));
    for (size_t i = 0; i < n; i++) based_sampler_accept(&j->r.sampler, before[i]);
    TRY(show_prompt(&j->r, r->o->branches && !r->o->no_display_prompt));
    if (j->o.predict == 0) return finish(j, "length");

    /* the first session lends its scratch memory to all */
    size_t i = b->n_running++;
    if (!b->session[i]) TRY(new_session(r, &b->session[i], i == 0 ? b->parallel : 1));
    based_copy(b->session[i], r->session, NULL);
    b->running[i] = j;
    j->r.session = b->session[i];
    return DONE;
}

/* The next token of one text. */
static int advance(batch *b, job *j) {
    int ended = 0;
    TRY(write_token(&j->r, &ended));
    if (ended) return finish(j, "stop");
    TRY(note_token(b, j, based_logits(j->r.session), j->r.unfed));
    if (j->r.out.stopped) return finish(j, "stop");
    return j->n == (uint64_t)j->o.predict ? finish(j, "length") : DONE;
}

/* The next token of all texts that are running. */
static int advance_all(batch *b) {
    int32_t ids[BASED_MAX_BLOCK];
    size_t n = b->n_running, left = 0;
    int status = DONE;
#ifdef _OPENMP
    int threads = based_threads(b->session[0]);
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : status) if (n > 1)
#endif
    for (size_t i = 0; i < n; i++) status |= advance(b, b->running[i]);
    if (status != DONE) return status;
    b->tokens += n;

    /* those that go on close the ranks; the first session stays the first */
    for (size_t i = 0; i < n; i++) {
        job *j = b->running[i];
        based_session *s = b->session[i];
        if (j->finish) continue;
        if (left == 0 && i > 0) {
            based_copy(b->session[0], s, NULL);
        } else {
            b->session[i] = b->session[left];
            b->session[left] = s;
        }
        b->running[left] = j;
        j->r.session = b->session[left];
        ids[left++] = j->r.unfed;
    }
    b->n_running = left;
    run *r = b->r;
    TRY_LIB(based_step_many(b->session, ids, left, &r->error), "cannot compute the next tokens");
    return DONE;
}

static int run_jobs(batch *b) {
    run *r = b->r;
    int got = 1;
    while (!interrupted) {
        /* read ahead what is there; wait only if there is nothing to do */
        while (r->o->jsonl && b->n_queued < QUEUE && b->queued_bytes < QUEUE_BYTES) {
            TRY(read_job(b, !b->first, &got));
            if (!got) break;
        }
        if (!b->first) return b->status;
        while (b->waiting && b->n_running < b->parallel && !interrupted) {
            TRY(start_job(b));
            TRY(deliver(b));
        }
        if (b->n_running > 0 && !interrupted) TRY(advance_all(b));
        TRY(deliver(b));
    }
    return INTERRUPTED;
}

static int open_batch(batch *b) {
    b->begun = b->r->begun = seconds();
    size_t fit = SESSIONS_BYTES / based_session_bytes(b->r->model, 1);
    b->parallel = (size_t)b->r->o->parallel;
    if (b->parallel == 0) b->parallel = fit > PARALLEL ? PARALLEL : fit > 0 ? fit : 1;
    b->running = calloc(b->parallel, sizeof(job *));
    b->session = calloc(b->parallel, sizeof(based_session *));
    return b->running && b->session ? DONE : out_of_memory("so many texts");
}

static void close_batch(batch *b) {
    b->r->timed = b->tokens;
    b->r->generate_time = seconds() - b->begun;
    while (b->first) free_first(b);
    for (size_t i = 0; b->session && i < b->parallel; i++) based_session_free(b->session[i]);
    for (size_t i = 0; i < KEPT; i++) based_session_free(b->kept[i]);
    free(b->running);
    free(b->session);
    free(b->answer.bytes);
    free(b->bytes.bytes);
    if (b->file && b->file != stdin) fclose(b->file);
}

/* --branches: every text begins where r->session is, with the next seed. */
static int write_branches(run *r) {
    batch b = { .r = r };
    int rc = open_batch(&b);
    for (uint64_t i = 0; i < (uint64_t)r->o->branches && rc == DONE; i++) {
        job *j = add_job(&b);
        if (!j) rc = out_of_memory("so many texts");
        else j->index = i, j->o.has_seed = 1, j->o.seed = r->sampler.seed + i;
    }
    if (rc == DONE) rc = run_jobs(&b);
    for (size_t i = 0; i < b.n_running && rc == INTERRUPTED; i++) {     /* what there is so far   */
        if (finish(b.running[i], "interrupted") != DONE) rc = BAD_INPUT;
    }
    if (rc == INTERRUPTED) rc = deliver(&b);
    close_batch(&b);
    return rc;
}

static int open_requests(batch *b) {
    run *r = b->r;
    b->file = strcmp(r->o->jsonl, "-") == 0 ? stdin : fopen(r->o->jsonl, "rb");
    if (!b->file) return cannot_read(r->o->jsonl);
    b->file_bytes = file_size(b->file);
    if (!reserve(&b->bytes, BUFSIZ)) return out_of_memory("the requests");
    setvbuf(stdout, NULL, _IONBF, 0);   /* a line is written by one call                          */
    return DONE;
}

static int answer_requests(run *r) {
    batch b = { .r = r };
    TRY(open_session(r, 1));
    int rc = open_batch(&b);
    if (rc == DONE) rc = open_requests(&b);
    catch_signals(0);
    describe(r, NULL);
    if (rc == DONE) rc = run_jobs(&b);
    clear_progress();
    close_batch(&b);
    if (rc != DONE && rc != INTERRUPTED) return rc;
    if (r->o->verbose) {
        fprintf(stderr, "{\"requests\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"prompt_tokens\": %"
                PRIu64 ", \"shared_tokens\": %" PRIu64 ", \"tokens\": %" PRIu64 ", \"seconds\": "
                "%.3f, \"tokens_per_second\": %.1f}\n", b.requests, b.errors, b.prompt_tokens,
                b.shared_tokens, b.tokens, r->generate_time,
                per_second(r->timed, r->generate_time));
    }
    if (b.errors > 0 && rc == DONE) {
        return fail(BAD_INPUT, "%s of %s requests were not valid; their answers say why",
                    THOUSANDS(b.errors), THOUSANDS(b.requests));
    }
    say(r->o, FORMAT("achieved tok/s: %f", per_second(r->timed, r->generate_time)));
    return rc;
}

/* ==== 15. main ===================================================================================
 * The work that the options ask for; generate, which continues one text, is the usual one.
 */
static int generate(run *r) {
    TRY(open_session(r, r->o->dump != NULL));
    TRY(read_prompt(r));
    TRY(prepare(r));
    TRY(open_lookup(r));
    if (r->o->load) TRY(load_prompt(r));
    if (r->o->dump) TRY(open_output(r, &r->dump, r->o->dump, "the logits"));
    catch_signals(0);
    describe(r, "prompt:");
    tell_sampling(r);
    TRY(feed_prompt(r));
    if (r->o->branches) {
        TRY(write_branches(r));
    } else {
        if (!interrupted) TRY(show_prompt(r, !r->o->no_display_prompt));
        TRY(flush_text());
        TRY(continue_text(r));
        TRY(end_text(r));
    }
    if (r->o->save) TRY(feed_newest(r, 0));     /* its logits belong to the dump                  */
    TRY(close_output(&r->dump, DONE));
    if (r->o->save) TRY(save_to_file(r, r->o->save));
    report(r, "prompt eval time", r->o->predict == 0);
    return interrupted ? INTERRUPTED : DONE;
}

static int do_job(run *r, options *o) {
    if (o->help) return print_help();
    if (o->version) {
        puts("based.c " BASED_VERSION);
        return flush_text();
    }
    warn_of_values(o);
    if (o->save) TRY(check_output(r, o->save, "the past"));
    if (o->dump) TRY(check_output(r, o->dump, "the logits"));
    TRY(open_model(r));
    take_recommended(o, r->config);
    if (o->vectors) return vectors(r);
    if (o->info) return print_info(r);
    if (o->check) return check(r);
    if (o->bench) return bench(r);
    if (o->jsonl) return answer_requests(r);
    choose_template(r, o);
    return o->perplexity ? measure(r) : o->chat ? chat(r) : generate(r);
}

int main(int argc, char **argv) {
    options o = { .stops = calloc((size_t)argc + 2, sizeof *o.stops) };
    run r = { .o = &o };
    prepare_system();
    for (char *at = argc > 0 ? argv[0] : NULL; at && *at; at++) {
        if (at == argv[0] || strchr("/\\", at[-1])) program = at;
    }
    int rc = o.stops ? parse_options(&o, argc, argv) : out_of_memory("the options");
    if (rc == DONE) rc = do_job(&r, &o);

    close_output(&r.dump, BAD_INPUT);   /* a file that is complete was closed before              */
    for (size_t i = 0; i < UNDO; i++) free(r.chat.turn[i].state.bytes);
    free(r.chat.first.bytes);
    free(r.chat.line.bytes);
    free(r.chat.name.bytes);
    free(r.chat.message.bytes);
    free(r.chat.raw.bytes);
    free(r.chat.begin.bytes);
    free(r.input.bytes);
    free(r.saved.bytes);
    free_text(&r);
    free(r.rows);
    free(r.lookup.text);
    free(r.lookup.last);
    free(r.lookup.rows);
    free(r.ids);
    based_session_free(r.chat.snapshot);
    based_session_free(r.session);
    based_close(r.model);
    free(o.stops);
    free(o.turn);
    return rc;
}
