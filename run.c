/* run.c - the command line of based.c: arguments, files, the terminal, timing.
 *
 * This file knows the library only through based.h and knows nothing of tensors. It does five jobs: continue a text
 * (generate), talk (chat), measure how well a model predicts a text (measure) and how fast it is (bench), and say what a
 * checkpoint is (inform).
 * Its promises:
 *
 *     stdout        is the text and nothing else; a failed write is an error
 *     stderr        has one line for an error, and otherwise statistics; with -q only errors
 *     exit status   0 done, 1 bad input or I/O, 2 bad usage, 130 interrupted. A closed pipe (| head) is status 1
 *                   without a message: the reader has what it wanted, but the text was not written to its end.
 *     Ctrl-C        ends the text, and the statistics still come; a second one ends the process at once
 *
 * The order of the file: the operating system, error lines, options, files, text on stdout, the dump of logits, feeding
 * with progress, the past as a file, the five jobs, main. All memory is allocated before the first token is fed; only
 * what a conversation may be taken back to grows with its turns, up to a limit.
 */
#if !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#endif
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "based.h"

#if !defined(__wasi__)
#include <signal.h>
#endif
#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#elif (defined(__unix__) || defined(__APPLE__)) && !defined(__wasi__)
#define RUN_POSIX 1
#include <sys/stat.h>
#include <unistd.h>
#endif

enum { DONE = 0, BAD_INPUT = 1, BAD_USAGE = 2, INTERRUPTED = 130 };     /* exit statuses                             */
enum { BLOCK = 128 };                                                   /* tokens of a prompt computed together      */
enum { ROWS_BYTES = 1 << 24 };                                          /* memory for the logits of a block, at most */
enum { FLUSH_BYTES = 12 };                                              /* what based_decode_flush may write         */
enum { NUMBER_BYTES = 24 };                                             /* a 64-bit number, sign, space, zero        */

/* ---------------------------------------------------------------------------------------------------------------------
 * The operating system: everything that is not C99 is here, and without it the program only gets plainer.
 */

/* Set by Ctrl-C, read between tokens. The only variable of this file that outlives a function. */
#if defined(SIGINT)
static volatile sig_atomic_t interrupted_by_user = 0;

static void on_interrupt(int number) {
    (void)number;
    interrupted_by_user = 1;
}
#else
enum { interrupted_by_user = 0 };
#endif

/* The first Ctrl-C asks for an orderly end and gives the signal back its default action, so that a second one cannot be
 * missed whatever the program is doing. Who started us with the signal ignored (nohup) is obeyed. A closed pipe must
 * come back as a failed write, not as a sudden death that would leave a half-written dump behind. */
static void catch_signals(void) {
#if defined(RUN_POSIX)
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESTART | (int)SA_RESETHAND;
    if (sigaction(SIGINT, NULL, &old) == 0 && old.sa_handler != SIG_IGN) sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
#elif defined(SIGINT)
    signal(SIGINT, on_interrupt);
#endif
}

/* A checkpoint is mapped, not copied. If its file is cut off while it is in use, or its disk goes away, reading it raises a
 * signal, after which nothing can go on: all that is left is to say so. */
#if defined(RUN_POSIX)
static void on_lost_bytes(int number) {
    static const char line[] = "run: the checkpoint cannot be read any more; was its file cut off while it was in use?\n";
    ssize_t written = write(STDERR_FILENO, line, sizeof line - 1);
    (void)number, (void)written;
    _exit(BAD_INPUT);
}
#endif

static void catch_lost_bytes(void) {
#if defined(RUN_POSIX)
    signal(SIGBUS, on_lost_bytes);
#endif
}

/* Seconds since some moment in the past, never running backwards where the system can promise it. */
static double seconds(void) {
#if defined(RUN_POSIX) || defined(__wasi__)
    struct timespec now;
    return clock_gettime(CLOCK_MONOTONIC, &now) == 0 ? (double)now.tv_sec + 1e-9 * (double)now.tv_nsec : 0;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

/* A seed that differs from one start to the next, also within a second. */
static uint64_t seed_from_time(void) {
    uint64_t seed = (uint64_t)time(NULL) * 1000000007u;
#if defined(RUN_POSIX)
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now) == 0) {
        seed = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
#endif
    return seed;
}

/* Progress is for eyes only: into a file or a log it would be noise. */
static int stderr_is_terminal(void) {
#if defined(RUN_POSIX)
    return isatty(STDERR_FILENO);
#elif defined(_WIN32)
    return _isatty(_fileno(stderr));
#else
    return 0;
#endif
}

/* Bytes are bytes: no system may turn a newline into something else on its way. */
static void use_plain_bytes(void) {
#if defined(_WIN32)
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
}

/* For someone who is asked for a line; elsewhere input comes by itself. */
static int stdin_is_terminal(void) {
#if defined(RUN_POSIX)
    return isatty(STDIN_FILENO);
#elif defined(_WIN32)
    return _isatty(_fileno(stdin));
#else
    return 0;
#endif
}

/* While a person is being waited for, Ctrl-C ends the program at once. */
static void leave_signals(void) {
#if defined(SIGINT)
    interrupted_by_user = 0;
    if (signal(SIGINT, SIG_DFL) == SIG_IGN) signal(SIGINT, SIG_IGN);
#endif
}

/* Makes sure that a file is on the disk before it gets its name. Not every file knows how (a pipe, a device). */
static int sync_file(FILE *file) {
#if defined(RUN_POSIX)
    return fsync(fileno(file)) == 0 || errno == EINVAL || errno == ENOTSUP;
#else
    (void)file;
    return 1;
#endif
}

/* True if `path` may be replaced by renaming another file over it: it does not exist, or is an ordinary file. A device
 * or a symbolic link must be written through instead, or it would be lost. */
static int may_be_replaced(const char *path) {
#if defined(RUN_POSIX)
    struct stat there;
    if (lstat(path, &there) != 0) return errno == ENOENT;
    return S_ISREG(there.st_mode) != 0;
#else
    (void)path;                                         /* rename does not replace everywhere in plain C             */
    return 0;
#endif
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Error lines and numbers for people.
 */

/* Bytes that could move the cursor or break a line become '?': files and arguments are not trusted with a terminal. */
static void scrub(char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7f) *text = '?';
    }
}

/* Prints one line on stderr, whatever is in the arguments, and returns `status` so that a caller can pass it on. */
static int fail(int status, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    scrub(line);
    fprintf(stderr, "run: %s\n", line);
    return status;
}

/* Leaves the function with the status of a call that did not go well. */
#define TRY(call) do { int status_ = (call); if (status_ != DONE) return status_; } while (0)

static int out_of_memory(const char *what) {
    return fail(BAD_INPUT, "not enough memory for %s", what);
}

enum { QUOTE_BYTES = 80 };

/* What the user typed, in quotes, shortened between two characters if it is long. Returns out. */
static const char *quote(char out[QUOTE_BYTES], const char *text) {
    size_t n = strlen(text), most = QUOTE_BYTES - 8;
    const char *rest = "";
    if (n > most) {
        for (n = most; n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80; n--) {
        }
        rest = "...";
    }
    snprintf(out, QUOTE_BYTES, "\"%.*s%s\"", (int)n, text, rest);
    return out;
}

enum { GROUPED_BYTES = 32 };

/* 1234567 as 1,234,567. Returns out. */
static const char *grouped(char out[GROUPED_BYTES], uint64_t value) {
    char digits[NUMBER_BYTES];
    size_t n = (size_t)snprintf(digits, sizeof digits, "%llu", (unsigned long long)value);
    char *to = out;
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && (n - i) % 3 == 0) *to++ = ',';
        *to++ = digits[i];
    }
    *to = '\0';
    return out;
}

static double per_second(uint64_t count, double spent) {
    return spent > 0 ? (double)count / spent : 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Options. One table says everything about every flag: parsing, help, defaults and error lines all come from it.
 */

typedef struct {
    const char *checkpoint;
    const char *prompt, *file, *tokens, *perplexity;    /* where the tokens come from; at most one is not NULL       */
    const char *dump;                                   /* file for logits                                           */
    const char *vectors;                                /* file of what a model without an embedding reads           */
    const char *save, *load, *append;                   /* files of the past, and what comes after a loaded one      */
    const char *system, *turns;                         /* chat: what comes first, and how a turn looks              */
    char       *before, *after, *stop;                  /* the two halves of `turns`, and what ends a reply          */
    const char **stops;                                 /* (n_stops) texts that end the reply                        */
    size_t      n_stops;
    int64_t     predict, top_k, repeat_last_n, threads, branches;
    double      temperature, top_p, min_p, repeat_penalty;
    uint64_t    seed;
    int         chat, has_seed, ignore_eos, no_checksum, info, check, bench, csv, no_display_prompt, quiet, verbose, help;
    int         version;
} options;

enum kind { SWITCH, TEXT, TEXTS, WHOLE, REAL, SEED, MODE };
enum group { PROMPT, SAMPLING, PAST, CHAT, MEASURING, OUTPUT, GROUPS };

static const char *const group_titles[GROUPS] = {
    "Model and prompt", "Generation and sampling", "The past as a file", "Conversation", "Measuring", "Output"
};

typedef struct {
    char        letter;                                 /* 0: none                                                   */
    const char *name;
    const char *value;                                  /* how help calls the value; NULL for a switch               */
    enum group  group;
    enum kind   kind;
    size_t      offset;                                 /* of the field in struct options                            */
    double      low, high;                              /* of a number, both allowed                                 */
    const char *standard;                               /* the default as one would type it; parsed at the start     */
    const char *help;
    const char *takes;                                  /* for error lines: "-p takes ..."                           */
    const char *elsewhere;                              /* what the letter means in llama.cpp, for who typed that    */
} flag;

#define AT(field) offsetof(options, field)

static const flag flags[] = {
    {'i', "prompt", "TEXT", PROMPT, TEXT, AT(prompt), 0, 0, NULL,
     "Continue this text; \"-\" reads it from standard input. Without a prompt a new text begins", "a text", NULL},
    {'f', "file", "FILE", PROMPT, TEXT, AT(file), 0, 0, NULL,
     "Continue the text in this file; \"-\" is standard input. One newline at the end of the input is dropped",
     "the name of a text file", NULL},
    {0, "tokens", "IDS", PROMPT, TEXT, AT(tokens), 0, 0, NULL,
     "Continue these token ids, such as \"1 403 407\", exactly as given", "token ids separated by spaces", NULL},
    {'j', "threads", "N", PROMPT, WHOLE, AT(threads), 0, 1024, "0",
     "Compute with N threads; the result is the same for any number. 0 chooses by the size of the model and the "
     "processors there are", "a number of threads from 0 to 1024", NULL},

    {0, "no-checksum", NULL, PROMPT, SWITCH, AT(no_checksum), 0, 0, NULL,
     "Open the checkpoint without comparing its checksum: at once, where the file is known to be whole, or to see what is left "
     "of a damaged one", NULL, NULL},

    {'n', "predict", "N", SAMPLING, WHOLE, AT(predict), -1, 9e18, "256",
     "Generate N tokens after the prompt. 0 only reads the prompt; -1 goes on until the end of the text or Ctrl-C: the "
     "model's memory of the past has a fixed size, so there is no limit",
     "a whole number of tokens, 0 or more, or -1 for no limit", NULL},
    {'t', "temp", "X", SAMPLING, REAL, AT(temperature), 0, 100, "1.0",
     "Temperature: low is careful, high is daring, 0 always takes the most probable token",
     "a temperature from 0 to 100", "for threads use -j or --threads"},
    {'p', "top-p", "X", SAMPLING, REAL, AT(top_p), 0, 1, "0.9",
     "Choose among the most probable tokens that together reach probability X; 1 is all",
     "a top-p value from 0 to 1", "for a prompt use -i or --prompt"},
    {'k', "top-k", "N", SAMPLING, WHOLE, AT(top_k), 0, 4294967295.0, "0",
     "Choose among the N most probable tokens; 0 is all", "a whole number from 0 to 4294967295", NULL},
    {0, "min-p", "X", SAMPLING, REAL, AT(min_p), 0, 1, "0",
     "Leave out tokens less than X times as probable as the best one", "a value from 0 to 1", NULL},
    {0, "repeat-penalty", "X", SAMPLING, REAL, AT(repeat_penalty), 0.01, 100, "1.0",
     "Make recent tokens less probable if above 1", "a value from 0.01 to 100 (1 is off)", NULL},
    {0, "repeat-last-n", "N", SAMPLING, WHOLE, AT(repeat_last_n), 0, 1048576, "64",
     "Count the last N tokens as recent", "a whole number from 0 to 1048576", NULL},
    {'s', "seed", "N", SAMPLING, SEED, AT(seed), 0, 0, NULL,
     "Seed of the random choices; the same seed gives the same text on every machine (default: the time, "
     "which -v shows)",
     "a whole number from 0 to 18446744073709551615", NULL},
    {'r', "reverse-prompt", "TEXT", SAMPLING, TEXTS, 0, 0, 0, NULL,
     "Stop before this text would be printed; may be given several times", "a text that is not empty", NULL},
    {0, "ignore-eos", NULL, SAMPLING, SWITCH, AT(ignore_eos), 0, 0, NULL,
     "Go on past the end of a text", NULL, NULL},

    {0, "save", "FILE", PAST, TEXT, AT(save), 0, 0, NULL,
     "At the end, write all that the model remembers to FILE; its size depends only on the model", "the name of a file",
     NULL},
    {0, "load", "FILE", PAST, TEXT, AT(load), 0, 0, NULL,
     "Begin where a run with --save ended. Without a prompt its text goes on. A prompt (-i, -f, --tokens) is the whole "
     "text, as always: it must begin with the saved one, and only the rest is read",
     "the name of a file written by --save", NULL},
    {0, "append", "TEXT", PAST, TEXT, AT(append), 0, 0, NULL,
     "With --load: put this behind the saved text before going on; \"-\" reads it from standard input", "a text", NULL},
    {0, "branches", "N", PAST, WHOLE, AT(branches), 0, 65536, "0",
     "Read the prompt once and write N continuations, each as a run of its own with the next seed would; 0 is one text "
     "as usual", "a number of continuations from 1 to 65536, or 0", NULL},

    {'m', "mode", "MODE", CHAT, MODE, AT(chat), 0, 0, NULL,
     "generate (the default) or chat: a conversation, line by line from standard input, until Ctrl-D; /help there lists "
     "its commands", "generate or chat", "the model is the first argument: run CHECKPOINT [options]"},
    {'y', "system-prompt", "TEXT", CHAT, TEXT, AT(system), 0, 0, NULL, "A text that stands before the conversation",
     "a text", NULL},
    {0, "chat-template", "TEXT", CHAT, TEXT, AT(turns), 0, 0, "User: {}\\nAssistant:",
     "How a turn looks to the model; {} is what you say, \\n a new line", "a text with one {} in it, such as "
     "\"User: {}\\nAssistant:\"", NULL},

    {'x', "perplexity", "FILE", MEASURING, TEXT, AT(perplexity), 0, 0, NULL,
     "Measure how well the model predicts the text in FILE, of any length; \"-\" is standard input. Documents that "
     "an end-of-text token separates begin from nothing each",
     "the name of a text file", NULL},
    {'b', "bench", NULL, MEASURING, SWITCH, AT(bench), 0, 0, NULL,
     "Measure speed: prompts, texts of several lengths, several texts at once; beside each the share of the memory's "
     "speed that it uses", NULL, NULL},
    {0, "csv", NULL, MEASURING, SWITCH, AT(csv), 0, 0, NULL,
     "With --bench: comma-separated values instead of a table", NULL, NULL},
    {0, "info", NULL, MEASURING, SWITCH, AT(info), 0, 0, NULL,
     "Say what this checkpoint is: its layers, parameters and sizes", NULL, NULL},
    {0, "check", NULL, MEASURING, SWITCH, AT(check), 0, 0, NULL,
     "Check all of this checkpoint, each weight too, and say in one line whether it is sound (status 0) or what is wrong first "
     "(status 1)", NULL, NULL},
    {0, "dump-logits", "FILE", MEASURING, TEXT, AT(dump), 0, 0, NULL,
     "Write the logits after every token read, row after row, as little-endian float32", "the name of a file", NULL},
    {0, "vectors", "FILE", MEASURING, TEXT, AT(vectors), 0, 0, NULL,
     "For a model that reads vectors: feed those in FILE, rows of little-endian float32; --dump-logits receives what comes out",
     "the name of a file", NULL},

    {0, "no-display-prompt", NULL, OUTPUT, SWITCH, AT(no_display_prompt), 0, 0, NULL,
     "Print only what is generated", NULL, NULL},
    {'q', "quiet", NULL, OUTPUT, SWITCH, AT(quiet), 0, 0, NULL,
     "Write nothing but errors to standard error", NULL, NULL},
    {'v', "verbose", NULL, OUTPUT, SWITCH, AT(verbose), 0, 0, NULL,
     "Also write the model, the seed, sizes, times, and a fingerprint of all logits used", NULL, NULL},
    {'h', "help", NULL, OUTPUT, SWITCH, AT(help), 0, 0, NULL, "Print this text", NULL, NULL},
    {0, "version", NULL, OUTPUT, SWITCH, AT(version), 0, 0, NULL, "Print the version", NULL, NULL},
};

enum { FLAGS = (int)(sizeof flags / sizeof flags[0]) };

/* Flags of llama2.c and llama.cpp that mean nothing here, and what to do instead. */
static const struct { const char *name, *advice; } foreign[] = {
    {"--model", "the model is the first argument: run CHECKPOINT [options]"},
    {"-z", "the tokenizer is inside the checkpoint"},
    {"--steps", "the number of tokens to generate is -n or --predict"},
    {"-c", "the model's memory has a fixed size, so there is no context to set"},
    {"--ctx-size", "the model's memory has a fixed size, so there is no context to set"},
};

/* Word-wraps `text` between columns 30 and 80. */
static void print_help_text(const char *text, const char *standard) {
    char whole[512];
    int column = 30;
    snprintf(whole, sizeof whole, standard ? "%s (default %s)." : "%s.", text, standard);
    for (const char *word = whole; *word; ) {
        int n = (int)strcspn(word, " ");
        if (column > 30 && column + 1 + n > 80) {
            printf("\n%30s", "");
            column = 30;
        } else if (column > 30) {
            putchar(' ');
            column++;
        }
        printf("%.*s", n, word);
        column += n;
        word += n;
        word += *word == ' ';
    }
    putchar('\n');
}

static void print_help(void) {
    puts("usage: run CHECKPOINT [options]\n\n"
         "Continues a text with a Based language model. The text goes to standard output and\n"
         "nothing else does; statistics and errors go to standard error.");
    for (int group = 0; group < GROUPS; group++) {
        printf("\n%s:\n", group_titles[group]);
        for (int i = 0; i < FLAGS; i++) {
            const flag *f = &flags[i];
            if ((int)f->group == group) {
                char left[64], letter[8] = "    ";
                if (f->letter) snprintf(letter, sizeof letter, "-%c, ", f->letter);
                snprintf(left, sizeof left, "%s--%s %s", letter, f->name, f->value ? f->value : "");
                printf("  %-27s ", left);
                print_help_text(f->help, f->standard);
            }
        }
    }
    puts("\nExamples:\n"
         "  run models/stories260K.bin                               a story\n"
         "  run models/stories260K.bin -i \"Once upon a time\" -t 0    always the same story\n"
         "  run models/stories260K.bin -f draft.txt -n -1 -r \"The end\"\n"
         "  run models/stories260K.bin -x book.txt                   perplexity of a book\n"
         "  run models/stories260K.bin -f book.txt -n 0 --save book.state     read it once,\n"
         "  run models/stories260K.bin --load book.state --append \"Then\"     go on at once\n\n"
         "Exit status: 0 done, 1 bad input or I/O, 2 bad usage, 130 interrupted by Ctrl-C.");
}

/* A finite decimal number and nothing else: no spaces, no hexadecimal, no "nan". */
static int parse_real(const char *text, double *value) {
    char *end;
    if (text[strspn(text, "+-.0123456789eE")] != '\0') return 0;
    *value = strtod(text, &end);
    return end != text && *end == '\0' && *value - *value == 0;
}

static int parse_whole(const char *text, int64_t *value) {
    char *end;
    if (text[strspn(text, "+-0123456789")] != '\0') return 0;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return end != text && *end == '\0' && errno == 0;
}

static int parse_seed(const char *text, uint64_t *value) {
    char *end;
    if (text[strspn(text, "0123456789")] != '\0') return 0;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return end != text && *end == '\0' && errno == 0;
}

/* "-p takes a top-p value from 0 to 1, got ..."; what the letter means elsewhere only if no number was meant. */
static int bad_value(const flag *f, const char *typed, const char *text) {
    char shown[QUOTE_BYTES];
    double number;
    int hint = f->elsewhere && !parse_real(text, &number);
    return fail(BAD_USAGE, "%s takes %s, got %s%s%s", typed, f->takes, quote(shown, text), hint ? "; " : "",
                hint ? f->elsewhere : "");
}

/* Stores the value of one flag. typed: the flag as the user wrote it. */
static int set_value(options *o, const flag *f, const char *typed, const char *text) {
    void *field = (char *)o + f->offset;
    double real = 0;
    int64_t whole = 0;
    int good = 1;
    switch (f->kind) {
    case SWITCH: *(int *)field = 1; break;
    case TEXT:   *(const char **)field = text; break;
    case TEXTS:  good = *text != '\0', o->stops[o->n_stops++] = text; break;
    case REAL:   good = parse_real(text, &real) && real >= f->low && real <= f->high, *(double *)field = real; break;
    case WHOLE:  good = parse_whole(text, &whole) && (double)whole >= f->low && (double)whole <= f->high;
                 *(int64_t *)field = whole; break;
    case SEED:   good = parse_seed(text, (uint64_t *)field), o->has_seed = 1; break;
    case MODE:   good = strcmp(text, "chat") == 0 || strcmp(text, "generate") == 0;
                 *(int *)field = strcmp(text, "chat") == 0; break;
    }
    return good ? DONE : bad_value(f, typed, text);
}

/* How many letters must be changed, added or left out to make one word of the other. */
static size_t distance(const char *a, const char *b) {
    enum { MOST = 32 };
    size_t row[MOST + 1], na = strlen(a), nb = strlen(b);
    na = na < MOST ? na : MOST;
    nb = nb < MOST ? nb : MOST;
    for (size_t j = 0; j <= nb; j++) row[j] = j;
    for (size_t i = 1; i <= na; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            best = row[j] + 1 < best ? row[j] + 1 : best;
            row[j] = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
        }
    }
    return row[nb];
}

/* An unknown flag: says what it is in the program it comes from, or the nearest one there is. */
static int unknown_flag(const char *typed) {
    char shown[QUOTE_BYTES];
    const char *word = typed + strspn(typed, "-"), *nearest = NULL;
    size_t best = 2 + strlen(word) / 4;
    for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++) {
        if (strcmp(typed, foreign[i].name) == 0) {
            return fail(BAD_USAGE, "there is no %s: %s", typed, foreign[i].advice);
        }
    }
    for (int i = 0; i < FLAGS; i++) {
        if (typed[1] == flags[i].letter && flags[i].value && strspn(typed + 2, "+-.0123456789") > 0) {
            return fail(BAD_USAGE, "unknown option %s; put a space before the value: -%c %.20s", quote(shown, typed),
                        typed[1], typed + 2);
        }
        size_t n = strlen(flags[i].name);
        size_t far = n > 2 && strncmp(word, flags[i].name, n) == 0 ? 1 : distance(word, flags[i].name);
        if (strlen(word) > 1 && far < best) {
            best = far;
            nearest = flags[i].name;
        }
    }
    return fail(BAD_USAGE, "unknown option %s; %s%s%s", quote(shown, typed), nearest ? "did you mean --" : "",
                nearest ? nearest : "run --help lists them all", nearest ? "?" : "");
}

/* The flag that `typed` names, or NULL. *attached: the value after "=" in "--name=value", or NULL. */
static const flag *find_flag(const char *typed, const char **attached) {
    size_t n = strcspn(typed, "=");
    *attached = NULL;
    for (int i = 0; i < FLAGS; i++) {
        const flag *f = &flags[i];
        if (typed[1] == f->letter && typed[1] != '\0' && typed[2] == '\0') return f;
        if (typed[1] == '-' && n == strlen(f->name) + 2 && strncmp(typed + 2, f->name, n - 2) == 0) {
            *attached = typed[n] == '=' ? typed + n + 1 : NULL;
            return f;
        }
    }
    return NULL;
}

/* Takes the flag at argv[*i], and its value if it has one. */
static int take_flag(options *o, int argc, char **argv, int *i) {
    const char *typed = argv[*i], *text;
    const flag *f = find_flag(typed, &text);
    char name[48];
    if (!f) return unknown_flag(typed);
    snprintf(name, sizeof name, "%.*s", (int)strcspn(typed, "="), typed);
    if (!f->value && text) return fail(BAD_USAGE, "%s is a switch and takes no value", name);
    if (f->value && !text) {
        if (*i + 1 >= argc) return fail(BAD_USAGE, "%s needs a value: %s", name, f->takes);
        text = argv[++*i];
    }
    return set_value(o, f, name, text ? text : "");
}

static int take_checkpoint(options *o, const char *path) {
    char one[QUOTE_BYTES], two[QUOTE_BYTES];
    if (o->checkpoint) {
        return fail(BAD_USAGE, "two checkpoints, %s and %s; if one is a prompt, put -i before it",
                    quote(one, o->checkpoint), quote(two, path));
    }
    o->checkpoint = path;
    return DONE;
}

/* What the past can be combined with: nothing but a text that goes on. */
static int check_past(const options *o, int sources) {
    if ((o->save || o->load || o->branches || o->chat) && (o->info || o->perplexity || o->vectors)) {
        return fail(BAD_USAGE, "--save, --load, --branches and -m chat do not go with -x, --info or --vectors");
    }
    if ((o->save && (o->save[0] == '\0' || strcmp(o->save, "-") == 0)) || (o->load && strcmp(o->load, "-") == 0)) {
        return fail(BAD_USAGE, "--save and --load take the name of a file");
    }
    if (o->append && !o->load) return fail(BAD_USAGE, "--append goes with --load; without it, give a prompt with -i");
    if (o->append && sources > 0) {
        return fail(BAD_USAGE, "both --append and a prompt; -i, -f and --tokens give the whole text, --append only what "
                    "comes after the saved one");
    }
    if (o->branches && (o->save || o->dump || o->chat)) {
        return fail(BAD_USAGE, "--branches goes with neither --save nor --dump-logits nor -m chat");
    }
    if (!o->chat && o->system) return fail(BAD_USAGE, "-y is for a conversation; add -m chat");
    if (o->chat && (o->tokens || o->dump || o->append)) {
        return fail(BAD_USAGE, "-m chat goes with neither --tokens nor --dump-logits nor --append");
    }
    if (o->chat && ((o->prompt && strcmp(o->prompt, "-") == 0) || (o->file && strcmp(o->file, "-") == 0))) {
        return fail(BAD_USAGE, "in a conversation standard input is what you say; a first message can be given with -i");
    }
    return DONE;
}

/* What single flags cannot know: which of them do not go together. */
static int check_options(const options *o) {
    int sources = (o->prompt != NULL) + (o->file != NULL) + (o->tokens != NULL) + (o->perplexity != NULL);
    if (!o->checkpoint) {
        return fail(BAD_USAGE, "no checkpoint; usage: run CHECKPOINT [options], and run --help explains them");
    }
    if (sources > 1) {
        return fail(BAD_USAGE, "more than one of -i, -f, --tokens and -x; there can be only one text");
    }
    if (o->info && (sources > 0 || o->dump)) {
        return fail(BAD_USAGE, "--info only describes the checkpoint; leave the text options away");
    }
    if (o->check && (sources > 0 || o->dump || o->info || o->bench || o->save || o->load || o->chat || o->branches)) {
        return fail(BAD_USAGE, "--check only checks the checkpoint; leave the other work away");
    }
    if (o->bench && (sources > 0 || o->dump || o->info || o->vectors)) {
        return fail(BAD_USAGE, "--bench makes its own text; leave the text options away");
    }
    if (o->csv && !o->bench) return fail(BAD_USAGE, "--csv goes with --bench");
    if (o->perplexity && o->dump) {
        return fail(BAD_USAGE, "--dump-logits goes with a prompt, not with -x; use -f FILE -n 0 --dump-logits OUT");
    }
    if (o->dump && (o->dump[0] == '\0' || strcmp(o->dump, "-") == 0)) {
        return fail(BAD_USAGE, "--dump-logits takes the name of a file; standard output is for the text");
    }
    if (o->vectors && (sources > 0 || !o->dump)) {
        return fail(BAD_USAGE, "--vectors goes with --dump-logits OUT, which receives the result, and with no text");
    }
    if (o->quiet && o->verbose) return fail(BAD_USAGE, "both -q and -v; choose one");
    return check_past(o, sources);
}

/* Cuts the template of a turn in two around {}, with \n made a new line. What begins the next turn ends a reply. */
static int read_template(options *o) {
    size_t n = strlen(o->turns) + 1, at = 0;
    char *text = malloc(n), *stop = malloc(n + 1), *hole;
    o->before = text;
    o->stop = stop;
    if (!text || !stop) return out_of_memory("the template of a conversation");
    for (const char *from = o->turns; *from; from++) {
        int newline = from[0] == '\\' && from[1] == 'n';
        text[at++] = newline ? '\n' : *from;
        from += newline;
    }
    text[at] = '\0';
    hole = strstr(text, "{}");
    if (!hole || strstr(hole + 2, "{}")) {
        return fail(BAD_USAGE, "--chat-template takes a text with one {} in it, such as \"User: {}\\nAssistant:\"");
    }
    *hole = '\0';
    o->after = hole + 2;
    snprintf(stop, n + 1, "\n%s", text);
    for (n = strlen(stop); n > 1 && stop[n - 1] == ' '; n--) stop[n - 1] = '\0';
    o->stops[o->n_stops++] = stop;
    return DONE;
}

/* Fills *o from the command line. o->stops must have room for argc texts. */
static int parse_options(options *o, int argc, char **argv) {
    int only_paths = 0;
    for (int i = 0; i < FLAGS; i++) {
        if (flags[i].standard) TRY(set_value(o, &flags[i], flags[i].name, flags[i].standard));
    }
    for (int i = 1; i < argc && !o->help && !o->version; i++) {
        if (only_paths || argv[i][0] != '-' || argv[i][1] == '\0') TRY(take_checkpoint(o, argv[i]));
        else if (strcmp(argv[i], "--") == 0) only_paths = 1;
        else TRY(take_flag(o, argc, argv, &i));
    }
    if (o->help || o->version) return DONE;
    TRY(check_options(o));
    return o->chat ? read_template(o) : DONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What one run of the program holds.
 */

typedef struct {                                        /* text on its way to stdout                                 */
    based_decoder decoder;
    char   *token;                                      /* text of one token                                         */
    char   *held;                                       /* the tail that might be the beginning of a stop text       */
    size_t  n_held;
    int     wrote, stopped;                             /* anything was printed; a stop text has come                */
} text_out;

typedef struct {                                        /* the file of --dump-logits                                 */
    FILE   *file;
    char   *temporary;                                  /* name while it is written; NULL: written in place          */
} dump_out;

typedef struct {                                        /* a saved past in memory                                    */
    unsigned char *bytes;
    size_t n;
} past;

enum { UNDO = 8 };                                      /* turns of a conversation that can be taken back            */

typedef struct {
    past     first, turn[UNDO];                         /* before the first turn; before the last ones, as a ring    */
    uint64_t turns, have;                               /* put on the ring ever; still there                         */
    uint64_t generated;                                 /* tokens and seconds of all replies                         */
    double   generate_time;
    uint64_t start;                                     /* tokens that do not count as text: the start token         */
    based_session *anchor;                              /* before the token in which the held text begins            */
    char    *raw;                                       /* the text generated since then                             */
    size_t   n_raw, room;
    int      anchored;                                  /* there is held text, and tokens of it were fed             */
    char    *line;                                      /* what was typed                                            */
    size_t   line_room;
} conversation;

typedef struct {                                        /* what perplexity sums up                                   */
    uint64_t tokens;
    double   nats, mean, squares;                       /* sum, running mean, sum of squared deviations (Welford)    */
} score;

typedef struct {                                        /* the line that tells how far a long work has come        */
    const char *what;
    double begun, shown;                                /* times; shown 0: nothing on the screen                     */
} progress;

typedef struct {
    const options  *o;
    based_model    *model;
    based_session  *session;
    based_tokenizer tokenizer;
    int             has_tokenizer;
    based_sampler   sampler;
    void           *sampler_memory;
    int32_t        *ids;                                /* (n_ids) the prompt, or the text to be measured            */
    size_t          n_ids, kept;                        /* kept: the first ones, which a loaded past contains        */
    int32_t         unfed;                              /* the last token of the text, not fed yet; or -1            */
    int32_t        *recent;                             /* (repeat_last_n) for saving                                */
    past            saved;
    conversation    chat;
    float          *rows;                               /* (block, width) logits of fed tokens; NULL if nobody looks */
    size_t          block;
    text_out        out;
    dump_out        dump;
    score           sum;
    progress        bar;
    uint32_t        hash;                               /* of all logits used                                        */
    uint64_t        fed, generated;                     /* tokens                                                    */
    double          feed_time, generate_time;
} run;

enum { PROGRESS_COLUMNS = 76 };

/* Must come before anything else is written to stderr. */
static void clear_progress(run *r) {
    if (r->bar.shown > 0) {
        fprintf(stderr, "\r%*s\r", PROGRESS_COLUMNS + 3, "");     /* and the "^C" that a terminal wrote behind it  */
        fflush(stderr);
    }
    r->bar.shown = 0;
}

/* Logits that decided something enter the fingerprint; it costs time, so only where it is shown. */
static void use_logits(run *r, const float *logits) {
    if (r->o->verbose) r->hash = based_hash(r->hash, logits, based_width(r->model));
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Reading text and turning it into tokens.
 */

/* Reads all of `file` into memory; returns NULL if that fails, with errno set. */
static char *read_all(FILE *file, size_t *n) {
    size_t room = 1 << 16;
    char *bytes = malloc(room), *more;
    *n = 0;
    for (;;) {
        errno = bytes ? 0 : ENOMEM;
        if (!bytes) return NULL;
        *n += fread(bytes + *n, 1, room - *n, file);
        if (ferror(file)) break;
        if (*n < room) return bytes;
        more = room <= SIZE_MAX / 2 ? realloc(bytes, room *= 2) : NULL;
        if (!more) {
            errno = ENOMEM;
            break;
        }
        bytes = more;
    }
    free(bytes);
    return NULL;
}

/* Reads a whole file, or standard input for "-". The caller frees *bytes. */
static int read_text(const char *path, char **bytes, size_t *n) {
    int standard = strcmp(path, "-") == 0;
    FILE *file = standard ? stdin : fopen(path, "rb");
    *bytes = file ? read_all(file, n) : NULL;
    int error = errno;
    if (file && !standard) fclose(file);
    if (*bytes) return DONE;
    return fail(BAD_INPUT, "cannot read %s: %s", standard ? "standard input" : path, strerror(error));
}

/* The token that a text begins with: what the model saw before every text in training. -1 if there is none. */
static int32_t start_token(const based_tokenizer *t) {
    if (t->bos != BASED_NONE && (t->flags & BASED_TOK_ADD_BOS)) return (int32_t)t->bos;
    return t->eos != BASED_NONE ? (int32_t)t->eos : t->bos != BASED_NONE ? (int32_t)t->bos : -1;
}

static int no_tokenizer(const run *r) {
    return fail(BAD_INPUT, "%s has no tokenizer; give token ids with --tokens, or export it with a tokenizer",
                r->o->checkpoint);
}

/* Encodes a text into r->ids. lead: begin with the start token even where the model does not ask for one before every
 * text, so that the first word has something to be predicted from. */
static int encode(run *r, const char *text, size_t n, int lead) {
    const based_tokenizer *t = &r->tokenizer;
    int add_bos = (t->flags & BASED_TOK_ADD_BOS) && t->bos != BASED_NONE;
    size_t bound = based_encode_bound(t, n), scratch_bytes = based_encode_scratch(t, n);
    based_error e;
    if (bound > SIZE_MAX / sizeof *r->ids - 2) return out_of_memory("the tokens of the text");
    r->ids = malloc((bound + 1) * sizeof *r->ids);
    void *scratch = malloc(scratch_bytes + 1);
    if (!r->ids || !scratch) {
        free(scratch);
        return out_of_memory("the tokens of the text");
    }
    int64_t got = 0;
    if (start_token(t) >= 0 && (n == 0 || (lead && !add_bos))) r->ids[r->n_ids++] = start_token(t);
    if (n > 0) {
        got = based_encode(t, text, n, BASED_PARSE_SPECIALS | (add_bos ? BASED_ADD_BOS : 0), r->ids + r->n_ids, scratch,
                           &e);
    }
    free(scratch);
    if (got < 0) return fail(BAD_INPUT, "cannot encode the text: %s", e.text);
    r->n_ids += (size_t)got;
    return DONE;
}

/* Reads the next id of a list such as "1 5 2"; spaces, commas and newlines separate. Returns 0 at its end. */
static int next_id(const char **at, char word[QUOTE_BYTES]) {
    *at += strspn(*at, " ,\t\r\n");
    size_t n = strcspn(*at, " ,\t\r\n"), copied = n < QUOTE_BYTES - 1 ? n : QUOTE_BYTES - 1;
    memcpy(word, *at, copied);
    word[copied] = '\0';
    *at += n;
    return n > 0;
}

/* Fills r->ids from the list of --tokens. Every id is at least one character, which bounds their number. */
static int read_tokens(run *r, const char *list) {
    char word[QUOTE_BYTES], shown[QUOTE_BYTES];
    size_t vocab = based_width(r->model);
    r->ids = malloc((strlen(list) / 2 + 1) * sizeof *r->ids);
    if (!r->ids) return out_of_memory("the tokens");
    while (next_id(&list, word)) {
        uint64_t id;
        if (!parse_seed(word, &id) || id >= vocab) {
            return fail(BAD_USAGE, "--tokens takes ids from 0 to %llu separated by spaces, got %s",
                        (unsigned long long)vocab - 1, quote(shown, word));
        }
        r->ids[r->n_ids++] = (int32_t)id;
    }
    return r->n_ids > 0 ? DONE : fail(BAD_USAGE, "--tokens is empty; it takes ids such as \"1 403 407\"");
}

/* Fills r->ids with n bytes that follow a text already read: nothing is put before them. */
static int encode_more(run *r, const char *text, size_t n) {
    based_tokenizer t = r->tokenizer;
    based_error e;
    t.flags &= ~(uint32_t)BASED_TOK_PREFIX_SPACE;
    free(r->ids);
    r->n_ids = r->kept = 0;
    r->ids = malloc((based_encode_bound(&t, n) + 1) * sizeof *r->ids);
    void *scratch = malloc(based_encode_scratch(&t, n) + 1);
    if (!r->ids || !scratch) {
        free(scratch);
        return out_of_memory("the tokens of the text");
    }
    int64_t got = based_encode(&t, text, n, BASED_PARSE_SPECIALS, r->ids, scratch, &e);
    free(scratch);
    if (got < 0) return fail(BAD_INPUT, "cannot encode the text: %s", e.text);
    r->n_ids = (size_t)got;
    return DONE;
}

static int has_prompt(const options *o) {
    return o->prompt || o->file || o->tokens;
}

/* Fills r->ids with what comes after a loaded past: nothing, or the text of --append. */
static int read_append(run *r) {
    const char *text = r->o->append;
    char *bytes = NULL;
    size_t n = text ? strlen(text) : 0;
    if (!text) return DONE;
    if (!r->has_tokenizer) return no_tokenizer(r);
    if (strcmp(text, "-") == 0) {
        TRY(read_text("-", &bytes, &n));
        if (n > 0 && bytes[n - 1] == '\n') n -= n > 1 && bytes[n - 2] == '\r' ? 2 : 1;
        text = bytes;
    }
    int rc = encode_more(r, text, n);
    free(bytes);
    return rc;
}

/* Fills r->ids with the prompt, wherever it comes from. Without one, the start token begins a new text. */
static int read_prompt(run *r) {
    const options *o = r->o;
    if (o->load && !has_prompt(o)) return read_append(r);
    if (o->tokens) return read_tokens(r, o->tokens);
    if (!r->has_tokenizer) return no_tokenizer(r);
    const char *path = o->file ? o->file : o->prompt && strcmp(o->prompt, "-") == 0 ? "-" : NULL;
    char *bytes = NULL;
    size_t n = !path && o->prompt ? strlen(o->prompt) : 0;
    int rc = path ? read_text(path, &bytes, &n) : DONE;
    if (rc == DONE) {
        if (path && n > 0 && bytes[n - 1] == '\n') n -= n > 1 && bytes[n - 2] == '\r' ? 2 : 1;
        rc = encode(r, path ? bytes : o->prompt, n, 0);
    }
    free(bytes);
    if (rc == DONE && r->n_ids == 0) {
        rc = fail(BAD_INPUT, "%s has no token that begins a text; give a prompt with -i", o->checkpoint);
    }
    return rc;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Text on its way to stdout: tokens -> whole characters -> what is surely not part of a stop text.
 */

/* After a failed write to stdout. A reader that went away (| head) is no news to anyone. */
static int write_failed(void) {
#ifdef EPIPE
    if (errno == EPIPE) return BAD_INPUT;
#endif
    return fail(BAD_INPUT, "cannot write the text to standard output: %s", strerror(errno));
}

static int flush_text(void) {
    return fflush(stdout) == 0 && !ferror(stdout) ? DONE : write_failed();
}

static int write_text(text_out *out, const char *text, size_t n) {
    out->wrote |= n > 0;
    return fwrite(text, 1, n, stdout) == n ? DONE : write_failed();
}

static size_t longest_stop(const options *o) {
    size_t longest = 0;
    for (size_t i = 0; i < o->n_stops; i++) {
        size_t n = strlen(o->stops[i]);
        longest = n > longest ? n : longest;
    }
    return longest;
}

/* Reserves all memory that printing will need: the text of one token, after a tail shorter than the longest stop. */
static int open_text(run *r) {
    size_t most = r->has_tokenizer ? based_decode_bound(&r->tokenizer) : 0;
    most = (most > NUMBER_BYTES ? most : NUMBER_BYTES) + FLUSH_BYTES;
    r->out.token = malloc(most);
    r->out.held = malloc(most + longest_stop(r->o));
    return r->out.token && r->out.held ? DONE : out_of_memory("the text");
}

/* The first place in the held text where a stop text begins, whole or (cut) running over its end; n_held if none. */
static size_t find_stop(const run *r, int cut) {
    const text_out *out = &r->out;
    for (size_t at = 0; at < out->n_held; at++) {
        size_t rest = out->n_held - at;
        for (size_t i = 0; i < r->o->n_stops; i++) {
            size_t n = strlen(r->o->stops[i]);
            if ((n <= rest || cut) && memcmp(out->held + at, r->o->stops[i], n < rest ? n : rest) == 0) {
                return at;
            }
        }
    }
    return out->n_held;
}

/* Adds n bytes of generated text and prints all that cannot belong to a stop text any more; all of it if `last`. */
static int put_text(run *r, const char *text, size_t n, int last) {
    text_out *out = &r->out;
    memcpy(out->held + out->n_held, text, n);
    out->n_held += n;
    size_t ready = find_stop(r, 0);
    out->stopped = ready < out->n_held;
    if (!out->stopped && !last) ready = find_stop(r, 1);
    int rc = write_text(out, out->held, ready);
    out->n_held -= ready;
    memmove(out->held, out->held + ready, out->n_held);
    return rc != DONE || ready == 0 ? rc : flush_text();
}

/* The text of one token, into r->out.token; returns its length. A model without a tokenizer speaks in numbers. */
static size_t decode(run *r, int32_t id) {
    int first = !r->out.wrote && r->out.n_held == 0;
    if (r->has_tokenizer) return based_decode(&r->tokenizer, &r->out.decoder, id, r->out.token);
    return (size_t)snprintf(r->out.token, NUMBER_BYTES, first ? "%ld" : " %ld", (long)id);
}

/* Prints the prompt as the model has read it. It also passes through the decoder when it is not shown, since a
 * character may begin in the prompt and end in the reply. */
static int echo_prompt(run *r) {
    for (size_t i = 0; i < r->n_ids; i++) {
        size_t n = decode(r, r->ids[i]);
        if (!r->o->no_display_prompt) TRY(write_text(&r->out, r->out.token, n));
    }
    return flush_text();
}

/* Ends the text: what is held comes out, and one newline, as in llama2.c. Half a character that is saved is not shown: its
 * other half will come. */
static int end_text(run *r) {
    if (!r->out.stopped) {
        size_t n = r->has_tokenizer && (!r->o->save || r->o->chat) ? based_decode_flush(&r->out.decoder, r->out.token) : 0;
        TRY(put_text(r, r->out.token, n, 1));
    }
    if (r->out.wrote) TRY(write_text(&r->out, "\n", 1));
    return flush_text();
}

/* The name under which a file is written until it is complete, or NULL if it must be written in place. The caller frees it. */
static int temporary_name(const char *path, char **name) {
    size_t bytes = strlen(path) + sizeof ".tmp";
    *name = NULL;
    if (!may_be_replaced(path)) return DONE;
    *name = malloc(bytes);
    if (!*name) return out_of_memory("a file name");
    snprintf(*name, bytes, "%s.tmp", path);
    return DONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The dump of logits. It appears under its name only when it is complete.
 */

static int dump_failed(run *r) {
    int error = errno;
    clear_progress(r);
    return fail(BAD_INPUT, "cannot write the logits to %s: %s", r->o->dump, strerror(error));
}

static int open_dump(run *r) {
    const char *path = r->o->dump;
    TRY(temporary_name(path, &r->dump.temporary));
    r->dump.file = fopen(r->dump.temporary ? r->dump.temporary : path, "wb");
    return r->dump.file ? DONE : dump_failed(r);
}

/* Writes n rows of logits, byte by byte so that the file is the same on every machine. */
static int dump_rows(run *r, const float *rows, size_t n) {
    size_t width = based_width(r->model), total = n * width;
    unsigned char bytes[4096];
    for (size_t row = 0; row < n; row++) use_logits(r, rows + row * width);
    for (size_t done = 0; done < total; ) {
        size_t some = total - done < sizeof bytes / 4 ? total - done : sizeof bytes / 4;
        for (size_t i = 0; i < some; i++) {
            uint32_t bits;
            memcpy(&bits, &rows[done + i], sizeof bits);
            for (size_t b = 0; b < 4; b++) bytes[4 * i + b] = (unsigned char)(bits >> (8 * b) & 0xff);
        }
        if (fwrite(bytes, 4, some, r->dump.file) != some) return dump_failed(r);
        done += some;
    }
    return DONE;
}

/* Closes the dump; a complete one gets its name, another one is removed. */
static int close_dump(run *r, int complete) {
    int rc = DONE;
    if (r->dump.file) {
        int closed = fclose(r->dump.file) == 0;
        r->dump.file = NULL;
        if (complete && (!closed || (r->dump.temporary && rename(r->dump.temporary, r->o->dump) != 0))) {
            rc = dump_failed(r);
        }
        if (r->dump.temporary && (!complete || rc != DONE)) remove(r->dump.temporary);
    }
    free(r->dump.temporary);
    r->dump.temporary = NULL;
    return rc;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Feeding many tokens, with progress where a person is waiting.
 */

/* Rewrites the progress line a few times per second, once the work has taken long enough to wonder about. */
static void show_progress(run *r, size_t done, size_t total) {
    progress *p = &r->bar;
    double now = seconds(), spent = now - p->begun;
    char line[160], some[GROUPED_BYTES], all[GROUPED_BYTES];
    if (r->o->quiet || spent < 0.3 || now - p->shown < 0.1 || !stderr_is_terminal()) return;
    int n = snprintf(line, sizeof line, "%s %s of %s tokens, %.0f tok/s, %.0f s left", p->what,
                     grouped(some, done), grouped(all, total), per_second(done, spent),
                     spent / (double)done * (double)(total - done));
    if (r->sum.tokens > 0) snprintf(line + n, sizeof line - (size_t)n, ", PPL %.4g", exp(r->sum.mean));
    fprintf(stderr, "\r%-*.*s", PROGRESS_COLUMNS, PROGRESS_COLUMNS, line);
    fflush(stderr);
    p->shown = now;
}

/* When measuring, every document begins from nothing, as the first one does: at a start token the past is forgotten.
 * Returns how many of the m tokens from i on belong to the document that i belongs to. */
static size_t within_document(run *r, size_t i, size_t m) {
    int32_t start = start_token(&r->tokenizer);
    size_t n = 1;
    if (r->ids[i] == start) based_reset(r->session);
    while (n < m && r->ids[i + n] != start) n++;
    return n;
}

/* Feeds the first n of r->ids in blocks, without those that are kept. visit: NULL, or called with each block's logits in
 * r->rows; `first` is the index of the block's first token. Stops early on Ctrl-C; r->fed says how far it came. */
static int feed_ids(run *r, size_t n, const char *what, int (*visit)(run *r, size_t first, size_t n)) {
    based_error e;
    r->bar.what = what;
    r->bar.begun = seconds();
    for (size_t i = r->kept, m; i < n && !interrupted_by_user; i += m) {
        m = n - i < r->block ? n - i : r->block;
        if (r->o->perplexity) m = within_document(r, i, m);
        if (based_feed(r->session, r->ids + i, m, visit ? r->rows : NULL, &e) != BASED_OK) {
            clear_progress(r);
            return fail(BAD_INPUT, "cannot compute tokens %llu and on: %s", (unsigned long long)i, e.text);
        }
        r->fed += m;
        if (visit) TRY(visit(r, i, m));
        show_progress(r, i + m, n);
    }
    r->feed_time += seconds() - r->bar.begun;
    clear_progress(r);
    return DONE;
}

/* Feeds one generated token. */
static int step(run *r, int32_t id) {
    based_error e;
    r->unfed = -1;
    if (based_step(r->session, id, &e) != BASED_OK) {
        return fail(BAD_INPUT, "cannot compute token %llu: %s", (unsigned long long)based_count(r->session), e.text);
    }
    return r->o->dump ? dump_rows(r, based_logits(r->session), 1) : DONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Opening a checkpoint, and what is said about it.
 */

static int open_model(run *r) {
    based_error e;
    r->model = based_open(r->o->checkpoint, r->o->no_checksum ? BASED_NO_CHECKSUM : 0, &e);
    if (!r->model) return fail(BAD_INPUT, "%s", e.text);
    r->has_tokenizer = based_model_config(r->model)->tokenizer_bytes > 0;
    if (r->has_tokenizer && based_tokenizer_open(&r->tokenizer, r->model, &e) != BASED_OK) {
        return fail(BAD_INPUT, "%s: %s", r->o->checkpoint, e.text);
    }
    return DONE;
}

/* Opens a session, with room for the logits of a whole block if somebody looks at every row. */
static int open_session(run *r, int every_row) {
    const based_config *c = based_model_config(r->model);
    size_t width = based_width(r->model), fit = ROWS_BYTES / sizeof(float) / (width > 0 ? width : 1);
    based_error e;
    if (c->input > 0 || c->rows == 0) {
        return fail(BAD_INPUT, "%s is not a language model: it reads or writes vectors; see --vectors",
                    r->o->checkpoint);
    }
    r->block = !every_row || fit > BLOCK ? BLOCK : fit > 0 ? fit : 1;
    r->unfed = -1;
    r->session = based_session_new(r->model, (uint32_t)r->block, &e);
    if (!r->session) return fail(BAD_INPUT, "%s: %s", r->o->checkpoint, e.text);
    based_set_threads(r->session, (int)r->o->threads);
    if (every_row) r->rows = malloc(r->block * width * sizeof(float));
    return r->rows || !every_row ? DONE : out_of_memory("logits");
}

static int open_sampler(run *r) {
    const options *o = r->o;
    based_sampler *s = &r->sampler;
    based_error e;
    s->temperature = (float)o->temperature;
    s->top_p = (float)o->top_p;
    s->top_k = (uint32_t)o->top_k;
    s->min_p = (float)o->min_p;
    s->repeat_penalty = (float)o->repeat_penalty;
    s->repeat_last_n = (uint32_t)o->repeat_last_n;
    s->seed = o->has_seed ? o->seed : seed_from_time();
    s->vocab = (uint32_t)based_width(r->model);
    size_t bytes = based_sampler_bytes(s);
    r->sampler_memory = malloc(bytes + 1);
    r->recent = malloc((s->repeat_last_n + 1) * sizeof *r->recent);
    if (!r->sampler_memory || !r->recent) return out_of_memory("sampling");
    return based_sampler_init(s, r->sampler_memory, bytes, &e) == BASED_OK ? DONE : fail(BAD_USAGE, "%s", e.text);
}

/* The name in the checkpoint, fit for a terminal. */
static const char *model_name(const run *r, char name[65]) {
    const based_config *c = based_model_config(r->model);
    memcpy(name, c->name, sizeof c->name);
    name[64] = '\0';
    scrub(name);
    return name[0] ? name : "a model without a name";
}

static void describe(const run *r, const char *what) {
    char name[65], number[GROUPED_BYTES];
    if (!r->o->verbose) return;
    fprintf(stderr, "model:  %s, %s parameters\n", model_name(r, name),
            grouped(number, based_model_parameters(r->model)));
    fprintf(stderr, "state:  %s bytes, however long the text\n", grouped(number, based_state_bytes(r->model)));
    fprintf(stderr, "%-7s %s tokens\n", what, grouped(number, r->n_ids));
}

static void time_line(const char *what, double spent, uint64_t count, const char *unit) {
    fprintf(stderr, "%16s = %10.2f ms / %5llu %-6s (%8.2f ms per token, %8.2f tokens per second)\n", what, 1e3 * spent,
            (unsigned long long)count, unit, count > 0 ? 1e3 * spent / (double)count : 0, per_second(count, spent));
}

/* The statistics. The last line is the one that scripts written for llama2.c look for. */
static void report(const run *r, const char *feeding, double speed) {
    if (r->o->verbose) {
        time_line(feeding, r->feed_time, r->fed, "tokens");
        if (r->generated > 1) time_line("eval time", r->generate_time, r->generated - 1, "runs");
        fprintf(stderr, "logits #%08x\n", (unsigned)r->hash);
    }
    if (!r->o->quiet) fprintf(stderr, "achieved tok/s: %f\n", speed);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The past as a file. What a session knows goes in and out through based_save and based_load; what only this program
 * knows travels as their note, little-endian:
 *
 *     0   "run", and 1 for this version          16  the decoder: held[4], n, started, two zeros
 *     4   uint32 1 if a generator is saved       24  uint32 number of recent tokens
 *     8   uint64 its state                       28  int32 each, oldest first: what the repetition penalty knows
 *
 * The generator is saved only if a seed was asked for: then the loaded text goes on as if it had never been interrupted,
 * unless another seed is given. Who asked for no seed wants another text each time.
 */
enum { NOTE_HEADER = 28 };

static void put_little(unsigned char *to, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = (unsigned char)(value >> (8 * i) & 0xff);
}

static uint64_t get_little(const unsigned char *from, size_t n) {
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++) value |= (uint64_t)from[i] << (8 * i);
    return value;
}

/* The past up to here as bytes. p keeps its memory and is reused. */
static int pack(run *r, past *p) {
    size_t n = based_sampler_recent(&r->sampler, r->recent), note_bytes = NOTE_HEADER + 4 * n;
    size_t need = based_saved_bytes(r->model, note_bytes);
    unsigned char *note = malloc(note_bytes), *bytes = need > 0 ? realloc(p->bytes, need) : NULL;
    based_error e;
    if (bytes) p->bytes = bytes, p->n = need;
    if (!bytes || !note) {
        free(note);
        return out_of_memory("the saved past");
    }
    memset(note, 0, NOTE_HEADER);
    memcpy(note, "run\1", 4);
    put_little(note + 4, (uint64_t)r->o->has_seed, 4);
    put_little(note + 8, r->o->has_seed ? r->sampler.state : 0, 8);
    memcpy(note + 16, r->out.decoder.held, 4);
    note[20] = r->out.decoder.n;
    note[21] = r->out.decoder.started;
    put_little(note + 24, n, 4);
    for (size_t i = 0; i < n; i++) put_little(note + NOTE_HEADER + 4 * i, (uint32_t)r->recent[i], 4);
    int rc = based_save(r->session, note, note_bytes, p->bytes, need, &e);
    free(note);
    return rc == BASED_OK ? DONE : fail(BAD_INPUT, "%s", e.text);
}

/* Any program may save a past with a note of its own, which tells us nothing. */
static int is_our_note(const unsigned char *note, size_t n) {
    return n >= 4 && memcmp(note, "run\1", 4) == 0;
}

/* Nothing, or bytes that UTF-8 lets a character begin with and that need more to follow. */
static int begins_character(const unsigned char *p, size_t n) {
    size_t whole = p[0] < 0xc2 || p[0] > 0xf4 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    int low = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80, high = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
    return n == 0 || (n < whole && (n < 2 || (p[1] >= low && p[1] <= high)) && (n < 3 || (p[2] & 0xc0) == 0x80));
}

/* A note of ours may have been forged: based_load vouches for nothing in it. */
static int check_note(const run *r, const unsigned char *note, size_t n, const char *path) {
    if (n < NOTE_HEADER || n - NOTE_HEADER != 4 * get_little(note + 24, 4)) {
        return fail(BAD_INPUT, "%s: its note has %zu bytes, expected %d and 4 for each recent token", path, n, NOTE_HEADER);
    }
    if (get_little(note + 4, 4) > 1 || note[21] > 1 || note[22] || note[23]) {
        return fail(BAD_INPUT, "%s: its note has a mark that is neither 0 nor 1", path);
    }
    if (!begins_character(note + 16, note[20])) {
        return fail(BAD_INPUT, "%s: its note holds %d bytes, %02x %02x %02x, expected the beginning of a character", path,
                    note[20], note[16], note[17], note[18]);
    }
    for (size_t at = NOTE_HEADER; at < n; at += 4) {
        if (get_little(note + at, 4) < r->sampler.vocab) continue;
        return fail(BAD_INPUT, "%s: its note has token %llu, but the vocabulary has %u", path,
                    (unsigned long long)get_little(note + at, 4), (unsigned)r->sampler.vocab);
    }
    return DONE;
}

/* Makes sampler and decoder go on as the note says. */
static void read_note(run *r, const unsigned char *note, size_t n) {
    const based_decoder fresh = { {0}, 0, 1 };
    uint64_t generator = r->sampler.state;
    based_sampler_init(&r->sampler, r->sampler_memory, based_sampler_bytes(&r->sampler), NULL);
    r->sampler.state = generator;       /* going back in a conversation must not bring the same reply again          */
    r->out.decoder = fresh;
    if (!is_our_note(note, n)) return;
    for (size_t at = NOTE_HEADER; at < n; at += 4) based_sampler_accept(&r->sampler, (int32_t)get_little(note + at, 4));
    if (get_little(note + 4, 4) && !r->o->has_seed) r->sampler.state = get_little(note + 8, 8);
    memcpy(r->out.decoder.held, note + 16, 4);
    r->out.decoder.n = note[20];
    r->out.decoder.started = note[21];
}

static int unpack(run *r, const past *p, const char *path) {
    const void *note;
    size_t n;
    based_error e;
    if (based_load(r->session, p->bytes, p->n, &note, &n, &e) != BASED_OK) {
        return fail(BAD_INPUT, "%s: %s", path, e.text);
    }
    if (is_our_note(note, n)) TRY(check_note(r, note, n, path));
    read_note(r, note, n);
    r->unfed = -1;
    return DONE;
}

/* 412 kB, 6.1 MB. Returns out. */
static const char *amount(char out[GROUPED_BYTES], size_t bytes) {
    double n = (double)bytes;
    snprintf(out, GROUPED_BYTES, n < 1e6 ? "%.0f kB" : "%.1f MB", n < 1e6 ? (n > 1e3 ? n / 1e3 : 1) : n / 1e6);
    return out;
}

static int save_failed(const char *path, const char *temporary) {
    int error = errno;
    if (temporary) remove(temporary);
    return fail(BAD_INPUT, "cannot write the past to %s: %s", path, strerror(error));
}

/* Writes all of a past, or nothing: under another name first, then renamed. */
static int write_past(const past *p, const char *path) {
    char *temporary;
    TRY(temporary_name(path, &temporary));
    FILE *file = fopen(temporary ? temporary : path, "wb");
    int rc = DONE;
    if (!file) {
        rc = save_failed(path, NULL);
    } else {
        int good = fwrite(p->bytes, 1, p->n, file) == p->n && fflush(file) == 0 && sync_file(file), error = errno;
        if (fclose(file) != 0 && good) good = 0, error = errno;
        errno = error;
        if (good && temporary) good = rename(temporary, path) == 0;
        if (!good) rc = save_failed(path, temporary);
    }
    free(temporary);
    return rc;
}

/* Saves the past; the last token of the text has not been fed yet, because nobody had asked what comes after it. */
static int save_past(run *r, const char *path) {
    char tokens[GROUPED_BYTES], size[GROUPED_BYTES];
    if (r->unfed >= 0) TRY(step(r, r->unfed));
    TRY(pack(r, &r->saved));
    TRY(write_past(&r->saved, path));
    if (!r->o->quiet) {
        fprintf(stderr, "saved %s tokens in %s\n", grouped(tokens, based_count(r->session)), amount(size, r->saved.n));
    }
    return DONE;
}

/* Reads and loads a saved past, and tells so. */
static int read_past(run *r, const char *path) {
    char tokens[GROUPED_BYTES], size[GROUPED_BYTES], *bytes;
    past p;
    TRY(read_text(path, &bytes, &p.n));
    p.bytes = (unsigned char *)bytes;
    int rc = unpack(r, &p, path);
    free(bytes);
    if (rc == DONE && !r->o->quiet) {
        fprintf(stderr, "restored %s tokens from %s\n", grouped(tokens, based_count(r->session)), amount(size, p.n));
    }
    return rc;
}

/* --load. A prompt is the whole text: if it begins with the saved one, only the rest needs to be read, and all else is as
 * if it had been read from its beginning. */
static int load_past(run *r) {
    const options *o = r->o;
    char tokens[GROUPED_BYTES];
    const based_decoder fresh = { {0}, 0, 0 };
    TRY(read_past(r, o->load));
    uint64_t n = based_count(r->session);
    if (!has_prompt(o)) {
        if (n + r->n_ids > 0) return DONE;
        return fail(BAD_INPUT, "%s: nothing had been read when it was saved; give a prompt with -i", o->load);
    }
    if (n > r->n_ids || based_history_of(0, r->ids, (size_t)n) != based_history(r->session)) {
        return fail(BAD_INPUT, "the prompt does not begin with the %s tokens saved in %s; to put it behind them, use "
                    "--append", grouped(tokens, n), o->load);
    }
    r->kept = (size_t)n;
    r->out.decoder = fresh;
    based_sampler_init(&r->sampler, r->sampler_memory, based_sampler_bytes(&r->sampler), NULL);
    return DONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Job 1: continue a text.
 */

static int dump_block(run *r, size_t first, size_t n) {
    (void)first;
    return dump_rows(r, r->rows, n);
}

/* Feeds the prompt and lets the sampler know of it. */
static int feed_prompt(run *r) {
    uint64_t before = r->fed;
    TRY(feed_ids(r, r->n_ids, "reading the prompt:", r->o->dump ? dump_block : NULL));
    for (size_t i = 0; i < r->kept + (r->fed - before); i++) based_sampler_accept(&r->sampler, r->ids[i]);
    if (r->o->predict == 0 && !r->o->dump && based_count(r->session) > 0) use_logits(r, based_logits(r->session));
    return DONE;
}

static int ends_text(const run *r, int32_t id) {
    return r->has_tokenizer && ((uint32_t)id == r->tokenizer.eos || (uint32_t)id == r->tokenizer.bos);
}

/* Remembers where the held text begins, in case it turns out to be a stop text: then the session must go back to just
 * before it, or the next turn would come after half of a turn that the model made up. The token just printed is not fed
 * yet; n is the length of its text. */
static int keep_anchor(run *r, size_t n) {
    conversation *c = &r->chat;
    if (r->out.n_held == 0) {
        c->anchored = 0;
        return DONE;
    }
    if (r->out.n_held <= n || !c->anchored || c->n_raw + n > c->room) {
        c->anchored = 1;
        c->n_raw = 0;
        based_copy(c->anchor, r->session, NULL);
    }
    memcpy(c->raw + c->n_raw, r->out.token, n);
    c->n_raw += n;
    return DONE;
}

/* Samples, prints and feeds until something ends the text. A token is fed only when the next one is wanted. The clock
 * starts after the first token, whose time belongs to the prompt. */
static int continue_text(run *r) {
    const options *o = r->o;
    double begun = 0;
    int32_t id;
    while (!r->out.stopped && !interrupted_by_user && (o->predict < 0 || r->generated < (uint64_t)o->predict)) {
        if (r->unfed >= 0) TRY(step(r, r->unfed));
        if (!o->dump) use_logits(r, based_logits(r->session));
        id = based_sample(&r->sampler, based_logits(r->session));
        if (r->generated++ == 0) begun = seconds();
        r->generate_time = seconds() - begun;
        if (ends_text(r, id) && !o->ignore_eos) break;
        based_sampler_accept(&r->sampler, id);
        size_t n = ends_text(r, id) ? 0 : decode(r, id);
        TRY(put_text(r, r->out.token, n, 0));
        r->unfed = id;
        if (o->chat) TRY(keep_anchor(r, n));
    }
    return DONE;
}

/* The text of one session: what was read, then what comes to the model's mind. */
static int write_one(run *r) {
    if (!interrupted_by_user) TRY(echo_prompt(r));
    TRY(continue_text(r));
    TRY(end_text(r));
    return r->o->save ? save_past(r, r->o->save) : DONE;
}

/* One prompt, many continuations. Each begins from a copy of the session and a sampler as new, and so is what a run of its
 * own with its seed would have written. */
static int branch(run *r) {
    size_t bytes = based_sampler_bytes(&r->sampler), n = based_sampler_recent(&r->sampler, r->recent);
    based_decoder decoder = r->out.decoder;
    uint64_t first = r->sampler.seed, generated = 0;
    double spent = 0;
    based_error e;
    based_session *root = based_session_new(r->model, 1, &e);
    int rc = root && based_copy(root, r->session, &e) == BASED_OK ? DONE : fail(BAD_INPUT, "%s", e.text);
    for (int64_t i = 0; rc == DONE && i < r->o->branches && !interrupted_by_user; i++) {
        char shown[GROUPED_BYTES];
        printf("--- branch %s of", grouped(shown, (uint64_t)i + 1));
        printf(" %s, seed %llu ---\n", grouped(shown, (uint64_t)r->o->branches), (unsigned long long)(first + (uint64_t)i));
        if (i > 0) based_copy(r->session, root, NULL);
        r->sampler.seed = first + (uint64_t)i;
        based_sampler_init(&r->sampler, r->sampler_memory, bytes + 1, NULL);
        for (size_t t = 0; t < n; t++) based_sampler_accept(&r->sampler, r->recent[t]);
        r->out.decoder = decoder;
        r->out.n_held = 0, r->out.wrote = r->out.stopped = 0;
        r->generated = 0, r->unfed = -1, r->hash = 0;
        rc = write_one(r);
        if (rc == DONE && r->o->verbose) {
            fprintf(stderr, "branch %llu: logits #%08x\n", (unsigned long long)i + 1, (unsigned)r->hash);
        }
        generated += r->generated > 0 ? r->generated - 1 : 0;
        spent += r->generate_time;
    }
    r->generated = generated + 1;
    r->generate_time = spent;
    based_session_free(root);
    return rc;
}

static int generate(run *r) {
    TRY(open_session(r, r->o->dump != NULL));
    TRY(read_prompt(r));
    TRY(open_sampler(r));
    TRY(open_text(r));
    if (r->o->load) TRY(load_past(r));
    if (r->o->dump) TRY(open_dump(r));
    catch_signals();
    describe(r, "prompt:");
    if (r->o->verbose) fprintf(stderr, "seed:   %llu\n", (unsigned long long)r->sampler.seed);
    TRY(feed_prompt(r));
    if (r->o->branches) TRY(branch(r));
    else TRY(write_one(r));
    TRY(close_dump(r, 1));
    report(r, "prompt eval time", per_second(r->generated > 0 ? r->generated - 1 : 0, r->generate_time));
    return interrupted_by_user ? INTERRUPTED : DONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Job 2: a conversation. One turn after the other is put into the template and fed, and the reply ends where the model
 * begins the next turn. After it, the session knows exactly the text that is on the screen.
 */

/* Feeds n bytes behind all that came before. */
static int feed_text(run *r, const char *text, size_t n) {
    TRY(encode_more(r, text, n));
    return feed_prompt(r);
}

/* Puts the present on the ring, so that /undo finds it. */
static int remember(run *r) {
    conversation *c = &r->chat;
    TRY(pack(r, &c->turn[c->turns % UNDO]));
    c->turns++;
    c->have += c->have < UNDO;
    return DONE;
}

static int undo(run *r) {
    conversation *c = &r->chat;
    if (c->have == 0) return fail(BAD_INPUT, "there is no turn to take back");
    c->have--;
    c->turns--;
    return unpack(r, &c->turn[c->turns % UNDO], "the last turn");
}

/* Ends a reply: what is printed is fed, and what is held back is not, even where a token is partly both. */
static int settle_reply(run *r) {
    conversation *c = &r->chat;
    int stopped = r->out.stopped;
    size_t n_held = r->out.n_held, shown = c->n_raw > n_held ? c->n_raw - n_held : 0;
    TRY(end_text(r));
    r->out.stopped = r->out.wrote = 0;
    r->out.n_held = 0;
    if (!stopped) return r->unfed >= 0 ? step(r, r->unfed) : DONE;
    r->unfed = -1;
    based_copy(r->session, c->anchor, NULL);
    c->anchored = 0;
    return shown > 0 ? feed_text(r, c->raw, shown) : DONE;
}

/* One turn: what was said, and the reply. */
static int talk(run *r, const char *line) {
    const options *o = r->o;
    conversation *c = &r->chat;
    size_t bytes = strlen(o->before) + strlen(line) + strlen(o->after) + 2;
    char *text = malloc(bytes);
    if (!text) return out_of_memory("a turn");
    snprintf(text, bytes, "%s%s%s%s", based_count(r->session) > c->start ? "\n" : "", o->before, line, o->after);
    int rc = remember(r);
    if (rc == DONE) rc = feed_text(r, text, strlen(text));
    free(text);
    TRY(rc);
    if (interrupted_by_user) return undo(r);
    r->generated = 0;
    c->anchored = 0;
    TRY(continue_text(r));
    c->generated += r->generated > 0 ? r->generated - 1 : 0;
    c->generate_time += r->generate_time;
    return settle_reply(r);
}

static void print_statistics(const run *r) {
    const conversation *c = &r->chat;
    char tokens[GROUPED_BYTES], size[GROUPED_BYTES];
    size_t bytes = based_saved_bytes(r->model, NOTE_HEADER + 4 * (size_t)r->o->repeat_last_n);
    fprintf(stderr, "%s tokens read and written, remembered in %s\n", grouped(tokens, based_count(r->session)),
            amount(size, bytes));
    fprintf(stderr, "%llu turns can be taken back (at most %d, %s each)\n", (unsigned long long)c->have, UNDO, size);
    fprintf(stderr, "%.1f tokens per second\n", per_second(c->generated, c->generate_time));
}

/* A line that begins with a slash. A command that fails says why, and the conversation goes on. */
static void obey(run *r, const char *line) {
    size_t n = strcspn(line, " ");
    const char *file = line + n + strspn(line + n, " ");
    char shown[QUOTE_BYTES];
    if (strncmp(line, "/save", n) == 0 && n == 5 && *file) save_past(r, file);
    else if (strncmp(line, "/load", n) == 0 && n == 5 && *file) {
        if (remember(r) == DONE && read_past(r, file) != DONE) undo(r);
    } else if (strcmp(line, "/undo") == 0) {
        undo(r);
    } else if (strcmp(line, "/reset") == 0) {
        if (remember(r) == DONE) unpack(r, &r->chat.first, "the beginning");
    } else if (strcmp(line, "/stats") == 0) {
        print_statistics(r);
    } else if (strcmp(line, "/help") == 0) {
        fputs("/save FILE   write all that the model remembers to a file\n"
              "/load FILE   go on from such a file\n"
              "/undo        take back the last turn, /load or /reset\n"
              "/reset       begin anew\n"
              "/stats       what is remembered, and how fast\n"
              "Ctrl-C ends a reply, Ctrl-D the conversation\n", stderr);
    } else {
        fail(BAD_INPUT, "%s is no command; /help lists them", quote(shown, line));
    }
}

/* Reads a line into c->line, without its end. Returns 0 at the end of the input. */
static int read_line(conversation *c, int *rc) {
    size_t n = 0;
    for (int byte; (byte = getc(stdin)) != EOF && byte != '\n'; c->line[n++] = (char)byte) {
        if (n + 2 <= c->line_room) continue;
        char *more = realloc(c->line, 2 * c->line_room);
        if (!more) return *rc = out_of_memory("a line"), 0;
        c->line = more;
        c->line_room *= 2;
    }
    if (n == 0 && feof(stdin)) return 0;
    if (ferror(stdin)) return *rc = fail(BAD_INPUT, "cannot read standard input: %s", strerror(errno)), 0;
    n -= n > 0 && c->line[n - 1] == '\r';
    c->line[n] = '\0';
    return 1;
}

/* What there is before the first turn: a loaded past, or the token that begins a text and the system prompt. */
static int open_chat(run *r) {
    const options *o = r->o;
    conversation *c = &r->chat;
    based_error e;
    c->room = 4096 + based_decode_bound(&r->tokenizer) + longest_stop(o);
    c->raw = malloc(c->room);
    c->line_room = 256;
    c->line = malloc(c->line_room);
    if (!c->raw || !c->line) return out_of_memory("the conversation");
    c->anchor = based_session_new(r->model, 1, &e);
    if (!c->anchor) return fail(BAD_INPUT, "%s", e.text);
    r->out.decoder.started = 1;         /* what is said does not pass the decoder, but it is what a reply follows   */
    catch_signals();
    if (o->load) {
        TRY(read_past(r, o->load));
    } else {
        TRY(encode(r, "", 0, 0));
        TRY(feed_prompt(r));
        c->start = based_count(r->session);
    }
    if (o->system) TRY(feed_text(r, o->system, strlen(o->system)));
    return pack(r, &c->first);
}

/* The first message, which -i or -f gives. */
static int talk_first(run *r) {
    const options *o = r->o;
    char *bytes = NULL;
    size_t n = 0;
    if (o->prompt) return talk(r, o->prompt);
    if (!o->file) return DONE;
    TRY(read_text(o->file, &bytes, &n));
    char *line = malloc(n + 1);
    if (line) memcpy(line, bytes, n), line[n - (n > 0 && bytes[n - 1] == '\n')] = '\0';
    free(bytes);
    int rc = line ? talk(r, line) : out_of_memory("the first message");
    free(line);
    return rc;
}

static int chat(run *r) {
    conversation *c = &r->chat;
    int rc, asked = stdin_is_terminal() && !r->o->quiet;
    TRY(open_session(r, 0));
    if (!r->has_tokenizer) return no_tokenizer(r);
    TRY(open_sampler(r));
    TRY(open_text(r));
    TRY(open_chat(r));
    if (r->o->verbose) fprintf(stderr, "seed:   %llu\n", (unsigned long long)r->sampler.seed);
    if (asked) fputs("/help lists the commands, Ctrl-D ends.\n", stderr);
    rc = talk_first(r);
    while (rc == DONE) {
        leave_signals();
        if (asked) fputs("> ", stderr);
        if (!read_line(c, &rc)) break;
        catch_signals();
        if (c->line[0] == '/') obey(r, c->line);
        else if (c->line[0] != '\0') rc = talk(r, c->line);
    }
    catch_signals();
    if (asked && rc == DONE) fputc('\n', stderr);
    if (rc == DONE && r->o->save) rc = save_past(r, r->o->save);
    r->generated = c->generated + 1;
    r->generate_time = c->generate_time;
    if (rc == DONE) report(r, "prompt eval time", per_second(c->generated, c->generate_time));
    return rc;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Job 3: measure how well a text is predicted. Each token is scored by the logits after all that came before it; the
 * first one is predicted from the start token, as if <|endoftext|> stood before the text.
 */

static int score_block(run *r, size_t first, size_t n) {
    size_t width = based_width(r->model);
    for (size_t i = 0; i < n; i++) {
        const float *logits = r->rows + i * width;
        double nats = -based_log_probability(logits, width, r->ids[first + i + 1]);
        if (nats - nats != 0) {
            clear_progress(r);
            return fail(BAD_INPUT, "%s gives token %llu of %s no probability; the checkpoint is broken",
                        r->o->checkpoint, (unsigned long long)(first + i + 1), r->o->perplexity);
        }
        use_logits(r, logits);
        score *s = &r->sum;
        double off = nats - s->mean;
        s->tokens++;
        s->nats += nats;
        s->mean += off / (double)s->tokens;
        s->squares += off * (nats - s->mean);
    }
    return DONE;
}

/* Bytes of the text that are predicted: all of them, but for a first token that nothing stands before, and for the names of
 * special tokens, which stand for no text. */
static size_t predicted_bytes(const run *r, size_t bytes) {
    const based_tokenizer *t = &r->tokenizer;
    size_t n = 0;
    if (start_token(t) < 0 && based_token_bytes(t, r->ids[0], &n) && n < bytes) bytes -= n;
    for (size_t i = 1; i < r->n_ids; i++) {
        int32_t id = r->ids[i];
        if (based_token_bytes(t, id, &n) && n == 0) bytes -= t->start[id + 1] - t->start[id];
    }
    return bytes;
}

/* The result, or after Ctrl-C what there is of it; then nothing on stdout could be taken for the result. */
static int print_estimate(const run *r, size_t bytes) {
    const score *s = &r->sum;
    double n = (double)s->tokens, perplexity = exp(s->nats / n);
    double error = perplexity * sqrt(s->squares / n / (n - 1));
    double bits = s->nats / log(2.0) / (double)predicted_bytes(r, bytes);
    char tokens[GROUPED_BYTES], of[GROUPED_BYTES];
    grouped(tokens, s->tokens);
    if (interrupted_by_user) {
        if (!r->o->quiet && n > 0) {
            fprintf(stderr, "interrupted after %s tokens: PPL = %.4f so far\n", tokens, perplexity);
        }
        return DONE;
    }
    if (!r->o->quiet) fprintf(stderr, "%s tokens predicted, %s bytes\n", tokens, grouped(of, bytes));
    printf("Final estimate: PPL = %.4f +/- %.5f, %.4f bits per byte\n", perplexity, error, bits);
    return flush_text();
}

static int measure(run *r) {
    char *text = NULL;
    size_t bytes = 0;
    TRY(open_session(r, 1));
    if (!r->has_tokenizer) return no_tokenizer(r);
    TRY(read_text(r->o->perplexity, &text, &bytes));
    int rc = encode(r, text, bytes, 1);
    free(text);
    TRY(rc);
    if (r->n_ids < 3) return fail(BAD_INPUT, "%s is too short to measure; it takes several tokens", r->o->perplexity);
    catch_signals();
    describe(r, "text:");
    TRY(feed_ids(r, r->n_ids - 1, "measuring:", score_block));
    TRY(print_estimate(r, bytes));
    report(r, "eval time", per_second(r->fed, r->feed_time));
    return interrupted_by_user ? INTERRUPTED : DONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Job 4: say what a checkpoint is.
 */

/* Names for the numbers of a header. */
#define NAME_OF(names, value) ((value) < sizeof(names) / sizeof(names)[0] ? (names)[value] : "unknown")

static const char *const mixer_names[] = {"none", "conv", "taylor", "window"};
static const char *const norm_names[]  = {"none", "RMS", "layer", "L2"};
static const char *const mlp_names[]   = {"none", "SwiGLU", "GELU"};
static const char *const dtype_names[] = {"f32", "q8", "q4"};
static const char *const tokenizer_names[] = {"none", "byte-level BPE", "score merges"};

static void inform_size(const char *label, uint64_t bytes, const char *note) {
    char number[GROUPED_BYTES];
    printf("%-12s %15s bytes%s\n", label, grouped(number, bytes), note);
}

/* One letter for each layer, so that the rhythm of the mixers can be seen. */
static void inform_picture(const run *r, uint32_t layers) {
    static const char letters[] = "-ctw";
    for (uint32_t i = 0; i < layers; i++) {
        uint32_t mixer = based_model_layer(r->model, i)->mixer;
        if (i % 64 == 0) printf("%s%-12s ", i ? "\n" : "", i ? "" : "mixers");
        putchar(mixer < sizeof letters - 1 ? letters[mixer] : '?');
    }
    puts(layers ? "  (c conv, t taylor, w window)" : "");
}

/* The line of layers first..last, which are all alike. */
static void inform_layers(const based_layer *l, uint32_t first, uint32_t last) {
    char range[NUMBER_BYTES], heads[48], shape[120] = "";
    snprintf(range, sizeof range, first == last ? "%u" : "%u-%u", (unsigned)first, (unsigned)last);
    snprintf(heads, sizeof heads, l->kv_heads == l->heads ? "%u heads" : "%u heads (%u key/value)",
             (unsigned)l->heads, (unsigned)l->kv_heads);
    if (l->mixer == BASED_CONV) {
        snprintf(shape, sizeof shape, "%u channels, %u taps", (unsigned)l->value_width, (unsigned)l->taps);
    } else if (l->mixer == BASED_TAYLOR) {
        int n = snprintf(shape, sizeof shape, "%s, keys of %u, values of %u, degree %u", heads, (unsigned)l->key_width,
                         (unsigned)l->value_width, (unsigned)l->degree);
        if (l->window) snprintf(shape + n, sizeof shape - (size_t)n, ", last %u tokens exact", (unsigned)l->window);
    } else if (l->mixer == BASED_WINDOW) {
        snprintf(shape, sizeof shape, "%s of %u, last %u tokens", heads, (unsigned)l->key_width,
                 (unsigned)l->window);
    }
    printf("%-12s %-8s %-52s %s", range, NAME_OF(mixer_names, l->mixer), shape, NAME_OF(mlp_names, l->mlp));
    if (l->mlp != BASED_MLP_NONE) printf(" %u", (unsigned)l->hidden);
    putchar('\n');
    if (l->keep) printf("%22s the first %u tokens stay for ever\n", "", (unsigned)l->keep);
    if (l->forget > 0) {
        printf("%22s %sfade to one half in %.0f tokens\n", "", l->keep ? "others " : "tokens ",
               l->chunk * log(0.5) / log1p(-(double)l->forget));
    }
}

static void inform_table(const run *r, uint32_t layers) {
    printf("\n%-12s %-8s %-52s %s\n", "layer", "mixer", "shape", "MLP");
    for (uint32_t first = 0, next; first < layers; first = next) {
        const based_layer *l = based_model_layer(r->model, first);
        for (next = first + 1; next < layers; next++) {
            if (memcmp(l, based_model_layer(r->model, next), sizeof *l) != 0) break;
        }
        inform_layers(l, first, next - 1);
    }
}

static void inform_tokenizer(const run *r) {
    char number[GROUPED_BYTES];
    const based_tokenizer *t = &r->tokenizer;
    if (!r->has_tokenizer) {
        puts("tokenizer    none");
        return;
    }
    printf("%-12s %s, %s tokens, %u special", "tokenizer", NAME_OF(tokenizer_names, t->kind), grouped(number, t->size),
           (unsigned)t->specials);
    if (t->bos != BASED_NONE) {
        printf(", begin %u%s", (unsigned)t->bos, t->flags & BASED_TOK_ADD_BOS ? " before every text" : "");
    }
    if (t->eos != BASED_NONE) printf(", end %u", (unsigned)t->eos);
    putchar('\n');
}

static void inform_sizes(const run *r, const based_config *c) {
    uint64_t file = (uint64_t)c->file_size[1] << 32 | c->file_size[0];
    uint64_t header = sizeof *c + (uint64_t)c->layers * sizeof(based_layer);
    inform_size("file", file, "");
    inform_size("  header", header, "");
    inform_size("  tokenizer", c->tokenizer_bytes, "");
    inform_size("  weights", file - header - c->tokenizer_bytes, ", gaps between sections included");
    inform_size("per token", based_model_weight_bytes(r->model), " of weights are read");
    inform_size("state", based_state_bytes(r->model), " of one session, however long the text");
    inform_size("session", based_session_bytes(r->model, 1), " with scratch memory");
}

/* How the matrices are stored: the name of one dtype, if all have the same. */
static const char *matrix_dtype(const run *r) {
    const based_config *c = based_model_config(r->model);
    int same = c->rows == 0 || c->head_dtype == c->embedding_dtype;
    for (uint32_t i = 0; i < c->layers; i++) {
        const based_layer *l = based_model_layer(r->model, i);
        same = same && (l->mixer == BASED_MIXER_NONE || l->in_dtype == c->embedding_dtype) &&
               (l->mlp == BASED_MLP_NONE || l->up_dtype == c->embedding_dtype);
    }
    return same ? NAME_OF(dtype_names, c->embedding_dtype) : "mixed";
}

static int inform(run *r) {
    const based_config *c = based_model_config(r->model);
    char name[65], number[GROUPED_BYTES];
    printf("%-12s %s\n", "name", model_name(r, name));
    printf("%-12s %u, checksum %08x%08x is %s\n", "format", (unsigned)c->format,
           (unsigned)c->checksum[1], (unsigned)c->checksum[0], r->o->no_checksum ? "not compared" : "right");
    printf("%-12s %s (%s)\n", "parameters", grouped(number, based_model_parameters(r->model)),
           matrix_dtype(r));
    printf("%-12s %u wide, %u layers, final norm %s\n", "shape", (unsigned)c->dim, (unsigned)c->layers,
           NAME_OF(norm_names, c->final_norm));
    printf("%-12s %s tokens, %u rows, head %s\n", "vocabulary", grouped(number, c->vocab), (unsigned)c->rows,
           c->flags & BASED_TIED ? "tied to the embedding" : "of its own");
    if (c->context > 0) {
        printf("%-12s %s tokens at once (a note, not a limit)\n", "trained on", grouped(number, c->context));
    }
    inform_tokenizer(r);
    inform_picture(r, c->layers);
    inform_table(r, c->layers);
    putchar('\n');
    inform_sizes(r, c);
    return flush_text();
}

/* Opening has checked all but the weights themselves. */
static int check(const run *r) {
    char number[GROUPED_BYTES];
    based_error e;
    if (based_check_weights(r->model, &e) != BASED_OK) return fail(BAD_INPUT, "%s: %s", r->o->checkpoint, e.text);
    printf("%s is sound: header, sizes, %s%s and %s parameters\n", r->o->checkpoint, r->o->no_checksum ? "" : "checksum, ",
           r->has_tokenizer ? "tokenizer" : "no tokenizer", grouped(number, based_model_parameters(r->model)));
    return flush_text();
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Job 5: how fast is it? Reading a prompt, writing after texts of several lengths, many texts at once; and beside each how
 * much of the memory's speed is used, since a token cannot be written faster than its weights can be read.
 */
enum { REPEATS = 5, DECODED = 128, BATCH_STEPS = 16, BATCH_MOST = 64, DEEPEST = 262144, PATIENCE = 600 };

typedef struct {
    double each[REPEATS];                               /* seconds of each repetition                                */
    double reads[REPEATS];                              /* bytes that memory gave per second just before             */
    double tokens;                                      /* computed in each                                          */
    double readings;                                    /* of all weights, in each                                   */
} timing;

/* Two ways to have every line of a block travel to the processor: one word of each, whose addresses are known beforehand; and a
 * search for a byte that is not there, which the C library does with the widest instructions there are. */
static int read_lines(const unsigned char *p, size_t n) {
    int found = 0;
    for (size_t i = 0; i < n; i += 64) found |= p[i];
    return found >> 1;
}

static int search(const unsigned char *p, size_t n) { return memchr(p, 2, n) != NULL; }

/* The most memory this process ever had, in bytes; 0 where the system does not tell. (getrusage would count what the process
 * was before it became this program.) */
static uint64_t peak_memory(void) {
    char line[128];
    uint64_t kilobytes = 0;
    FILE *f = fopen("/proc/self/status", "r");          /* Linux                                                     */
    while (f && kilobytes == 0 && fgets(line, sizeof line, f)) {
        if (strncmp(line, "VmHWM:", 6) == 0) kilobytes = strtoull(line + 6, NULL, 10);
    }
    if (f) fclose(f);
    return kilobytes * 1024;
}

/* What is measured, in full, for the file and for people. */
typedef struct {
    const char *model;
    int      threads;
    uint64_t weights, state, memory;                    /* bytes: read per token, of a session, of the process       */
    unsigned char *block;                               /* as many bytes as the weights: fewer would stay in a cache */
} benched;

/* How many bytes does this machine read per second, right now, with as many threads as the model uses? 0: it cannot be told. What
 * fits a cache gets there only after some readings. */
static double read_memory(const benched *b) {
    size_t part = (size_t)b->weights / (size_t)b->threads;
    double most = 0.0, enough = seconds() + 0.05;
    int found = 0;
    for (int way = 0; b->block && (way < 2 || seconds() < enough); way++) {
        double begun = seconds(), spent;
#ifdef _OPENMP
#pragma omp parallel for num_threads(b->threads) schedule(static) reduction(| : found)
#endif
        for (int i = 0; i < b->threads; i++) found |= (way % 2 ? search : read_lines)(b->block + (size_t)i * part, part);
        spent = seconds() - begun;
        if (!found && spent > 0.0 && (double)b->weights / spent > most) most = (double)b->weights / spent;
    }
    return most;
}

/* One line of the table. Memory is measured beside each repetition, not once at its best: where others use it too, its speed
 * comes and goes. */
static void print_timing(const run *r, const char *test, const timing *t, const benched *b) {
    double mean = 0.0, spread = 0.0, reads = 0.0, bandwidth, used;
    for (int i = 0; i < REPEATS; i++) {
        mean += t->tokens / t->each[i] / REPEATS;
        reads += t->reads[i] * 1e-9 / REPEATS;
    }
    for (int i = 0; i < REPEATS; i++) spread += (t->tokens / t->each[i] - mean) * (t->tokens / t->each[i] - mean);
    spread = sqrt(spread / (REPEATS - 1));
    bandwidth = mean / t->tokens * t->readings * (double)b->weights * 1e-9;
    used = reads > 0.0 ? 100.0 * bandwidth / reads : 0.0;
    if (r->o->csv) {
        printf("\"%s\",%s,%d,%llu,%llu,%llu,%.3f,%s,%.2f,%.2f,%.3f,%.1f\n", b->model, based_model_kernels(r->model),
               b->threads, (unsigned long long)b->weights, (unsigned long long)b->state, (unsigned long long)b->memory, reads,
               test, mean, spread, bandwidth, used);
    } else {
        printf("| %-14s | %9.2f | %7.2f | %6.2f | %6.2f | %4.0f%% |\n", test, mean, spread, bandwidth, reads, used);
    }
    fflush(stdout);
}

static int32_t any_token(const run *r, uint64_t i) {
    return (int32_t)((i * 2654435761u >> 7) % based_model_config(r->model)->vocab);
}

/* Feeds n tokens that mean nothing. */
static int feed_any(run *r, uint64_t n) {
    int32_t ids[BLOCK];
    based_error e;
    for (uint64_t done = 0; done < n;) {
        size_t many = n - done < BLOCK ? (size_t)(n - done) : BLOCK;
        for (size_t i = 0; i < many; i++) ids[i] = any_token(r, based_count(r->session) + i);
        if (based_feed(r->session, ids, many, NULL, &e)) return fail(BAD_INPUT, "%s", e.text);
        done += many;
        if (interrupted_by_user) return INTERRUPTED;
    }
    return DONE;
}

static int bench_prompt(run *r, uint64_t n, const benched *b, double *speed) {
    timing t = { { 0 }, { 0 }, (double)n, ceil((double)n / BLOCK) };
    char name[32];
    for (int i = 0; i < REPEATS; i++) {
        t.reads[i] = read_memory(b);
        based_reset(r->session);
        double begun = seconds();
        int rc = feed_any(r, n);
        if (rc != DONE) return rc;
        t.each[i] = seconds() - begun;
        *speed = t.tokens / t.each[i];
    }
    snprintf(name, sizeof name, "pp%llu", (unsigned long long)n);
    print_timing(r, name, &t, b);
    return DONE;
}

static int bench_depth(run *r, uint64_t depth, const benched *b, double prompt_speed) {
    timing t = { { 0 }, { 0 }, DECODED, DECODED };
    char name[32];
    double wait = ((double)depth - (double)based_count(r->session)) / prompt_speed;
    based_error e;
    int rc = DONE;
    snprintf(name, sizeof name, "tg%d @ %llu", DECODED, (unsigned long long)depth);
    if (wait > PATIENCE) {
        fprintf(stderr, "%s is left out: reading so long a text first would take %.0f minutes\n", name, wait / 60.0);
        return DONE;
    }
    if (depth > based_count(r->session)) rc = feed_any(r, depth - based_count(r->session));
    for (int i = 0; i < REPEATS && rc == DONE; i++) {
        t.reads[i] = read_memory(b);
        if (depth == 0) based_reset(r->session);
        double begun = seconds();
        for (int step = 0; step < DECODED && rc == DONE; step++) {
            if (based_step(r->session, any_token(r, (uint64_t)step), &e)) rc = fail(BAD_INPUT, "%s", e.text);
            if (interrupted_by_user) rc = INTERRUPTED;
        }
        t.each[i] = seconds() - begun;
    }
    if (rc == DONE) print_timing(r, name, &t, b);
    return rc;
}

/* `many` texts, one token of each at a time. */
static int bench_batch(run *r, based_session **all, size_t many, const benched *b) {
    timing t = { { 0 }, { 0 }, (double)many * BATCH_STEPS, BATCH_STEPS };
    int32_t ids[BATCH_MOST];
    char name[32];
    based_error e;
    for (int i = 0; i < REPEATS; i++) {
        t.reads[i] = read_memory(b);
        double begun = seconds();
        for (int step = 0; step < BATCH_STEPS; step++) {
            for (size_t s = 0; s < many; s++) ids[s] = any_token(r, s * 977 + (size_t)step);
            if (based_step_many(all, ids, many, &e)) return fail(BAD_INPUT, "%s", e.text);
            if (interrupted_by_user) return INTERRUPTED;
        }
        t.each[i] = seconds() - begun;
    }
    snprintf(name, sizeof name, "tg%d x %zu", BATCH_STEPS, many);
    print_timing(r, name, &t, b);
    return DONE;
}

static int bench_batches(run *r, const benched *b) {
    based_session *all[BATCH_MOST] = { r->session };
    based_error e;
    int rc = DONE;
    for (size_t have = 1, many = 1; many <= BATCH_MOST && rc == DONE; many *= 4) {
        for (; have < many && rc == DONE; have++) {
            all[have] = based_session_new(r->model, BATCH_MOST, &e);
            if (!all[have]) rc = fail(BAD_INPUT, "%s", e.text);
            else based_set_threads(all[have], based_threads(r->session));
        }
        if (rc == DONE) rc = bench_batch(r, all, many, b);
    }
    for (size_t i = 1; i < BATCH_MOST; i++) based_session_free(all[i]);
    return rc;
}

static void print_head(const run *r, const benched *b) {
    char weights[GROUPED_BYTES], state[GROUPED_BYTES], memory[GROUPED_BYTES];
    if (r->o->csv) {
        puts("model,kernels,threads,weight bytes,state bytes,peak memory,read GB/s,test,tokens/s,spread,GB/s,% of read speed");
        return;
    }
    printf("%s, %s kernels, %d thread%s: %s bytes of weights per token, %s bytes of state, %s bytes of memory at most with one "
           "session\n\n"
           "| test           |  tokens/s |  spread |   GB/s | memory | used |\n"
           "|----------------|-----------|---------|--------|--------|------|\n",
           b->model, based_model_kernels(r->model), b->threads, b->threads == 1 ? "" : "s", grouped(weights, b->weights),
           grouped(state, b->state), grouped(memory, b->memory));
}

static int bench(run *r) {
    static const uint64_t prompts[] = { 128, 512, 2048 }, depths[] = { 0, 1024, 16384, DEEPEST };
    double speed = 1.0;
    int rc = DONE;
    benched b;
    char name[65];
    TRY(open_session(r, 0));
    catch_signals();
    b.model = model_name(r, name);
    b.threads = based_threads(r->session);
    b.weights = based_model_weight_bytes(r->model);
    b.state = based_state_bytes(r->model);
    TRY(feed_any(r, BLOCK));                            /* touches all that a session will ever touch                */
    b.memory = peak_memory();
    b.block = b.weights <= SIZE_MAX ? malloc((size_t)b.weights) : NULL;
    if (b.block) memset(b.block, 1, (size_t)b.weights);
    print_head(r, &b);
    for (size_t i = 0; i < 3 && rc == DONE; i++) rc = bench_prompt(r, prompts[i], &b, &speed);
    if (rc == DONE) rc = bench_batches(r, &b);
    based_reset(r->session);                            /* what takes longest comes last: Ctrl-C loses no more       */
    for (size_t i = 0; i < 4 && rc == DONE; i++) rc = bench_depth(r, depths[i], &b, speed);
    free(b.block);
    return rc == DONE ? flush_text() : rc;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* ---------------------------------------------------------------------------------------------------------------------
 * Job 6: vectors in, vectors out.
 */

/* Reads the file of vectors: little-endian numbers become floats in place. */
static int read_vectors(run *r, char **bytes, size_t *rows) {
    size_t n, input = based_model_config(r->model)->input;
    if (input == 0) return fail(BAD_INPUT, "%s reads tokens, not vectors; give it a text", r->o->checkpoint);
    TRY(read_text(r->o->vectors, bytes, &n));
    if (n == 0 || n % (4 * input) != 0) {
        return fail(BAD_INPUT, "%s has %zu bytes; expected rows of %zu numbers, 4 bytes each", r->o->vectors, n, input);
    }
    for (size_t i = 0; i < n; i += 4) {
        const unsigned char *p = (const unsigned char *)*bytes + i;
        uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        memcpy(*bytes + i, &bits, 4);
    }
    *rows = n / (4 * input);
    return DONE;
}

/* A model that looks both ways sees the file as one window. */
static int feed_file(run *r, const float *x, size_t rows) {
    const based_config *c = based_model_config(r->model);
    int window = (c->flags & BASED_BIDIRECTIONAL) != 0;
    size_t block = window ? rows : BLOCK;
    based_error e;
    if (block > BASED_MAX_BLOCK) {
        return fail(BAD_INPUT, "%s has %zu rows; this model sees all of a window at once, at most %u", r->o->vectors, rows,
                    BASED_MAX_BLOCK);
    }
    r->session = based_session_new(r->model, (uint32_t)block, &e);
    if (!r->session) return fail(BAD_INPUT, "%s: %s", r->o->checkpoint, e.text);
    based_set_threads(r->session, (int)r->o->threads);
    r->rows = malloc(block * based_width(r->model) * sizeof(float));
    if (!r->rows) return out_of_memory("the result");
    TRY(open_dump(r));
    for (size_t at = 0; at < rows; at += block) {
        size_t n = rows - at < block ? rows - at : block;
        if ((window ? based_feed_window : based_feed_vectors)(r->session, x + at * c->input, n, r->rows, &e) != BASED_OK) {
            return fail(BAD_INPUT, "%s: %s", r->o->checkpoint, e.text);
        }
        TRY(dump_rows(r, r->rows, n));
    }
    return close_dump(r, 1);
}

static int turn_vectors(run *r) {
    char *bytes = NULL;
    size_t rows = 0;
    int rc = read_vectors(r, &bytes, &rows);
    if (rc == DONE) rc = feed_file(r, (const float *)(void *)bytes, rows);
    free(bytes);
    if (rc == DONE && r->o->verbose) fprintf(stderr, "logits #%08x\n", (unsigned)r->hash);
    return rc;
}

static int do_job(run *r) {
    if (r->o->help) print_help();
    if (r->o->version) puts("based.c " BASED_VERSION);
    if (r->o->help || r->o->version) return flush_text();
    TRY(open_model(r));
    if (r->o->vectors) return turn_vectors(r);
    if (r->o->info) return inform(r);
    if (r->o->check) return check(r);
    if (r->o->bench) return bench(r);
    return r->o->perplexity ? measure(r) : r->o->chat ? chat(r) : generate(r);
}

static void close_run(run *r) {
    close_dump(r, 0);                                   /* one that is complete was closed before                    */
    free(r->out.token);
    free(r->out.held);
    free(r->rows);
    free(r->ids);
    free(r->sampler_memory);
    free(r->recent);
    free(r->saved.bytes);
    for (size_t i = 0; i < UNDO; i++) free(r->chat.turn[i].bytes);
    free(r->chat.first.bytes);
    free(r->chat.raw);
    free(r->chat.line);
    based_session_free(r->chat.anchor);
    based_session_free(r->session);
    based_close(r->model);
}

int main(int argc, char **argv) {
    options o;
    run r;
    memset(&o, 0, sizeof o);
    memset(&r, 0, sizeof r);
    r.o = &o;
    use_plain_bytes();
    catch_lost_bytes();
    o.stops = calloc((size_t)argc + 1, sizeof *o.stops);
    int rc = o.stops ? parse_options(&o, argc, argv) : out_of_memory("the options");
    if (rc == DONE) rc = do_job(&r);
    close_run(&r);
    free(o.stops);
    free(o.before);
    free(o.stop);
    return rc;
}
