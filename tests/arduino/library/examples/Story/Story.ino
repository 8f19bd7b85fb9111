// A story from a language model that lies in flash. It prints the fingerprint of all logits that it
// used, which is the same on every board and computer, and how many tokens it made per second.
#include <based.h>
#include "model.h"

const int TOKENS = 40;
const char PROMPT[] = "Once upon a time";

// All memory of the model and of its past; the library tells how much of it each takes.
static unsigned char arena[96 * 1024] __attribute__((aligned(64)));
static based_model *model;
static based_session *session;
static based_tokenizer tokenizer;
static based_error error;

static void stop(const char *why) {
  Serial.println(why);
  for (;;) delay(1000);
}

static void begin() {
  size_t n = based_model_bytes(checkpoint, sizeof checkpoint, &error);
  if (n == 0 || based_model_init(&model, arena, sizeof arena, checkpoint, sizeof checkpoint, 0, &error)) stop(error.text);
  n = (n + 63) / 64 * 64;
  if (based_session_init(&session, model, arena + n, sizeof arena - n, 1, &error)) stop(error.text);
  if (based_tokenizer_open(&tokenizer, model, &error)) stop(error.text);
}

static int32_t mostProbable(const float *logits) {
  int32_t best = 0;
  for (uint32_t i = 1; i < based_width(model); i++)
    if (logits[i] > logits[best]) best = (int32_t)i;
  return best;
}

void setup() {
  Serial.begin(115200);
  begin();
}

void loop() {
  static int32_t ids[64];
  static uint64_t scratch[512];
  static char text[64];
  static based_decoder decoder;
  const size_t length = strlen(PROMPT);
  if (based_encode_bound(&tokenizer, length) > 64 || based_encode_scratch(&tokenizer, length) > sizeof scratch)
    stop("the prompt is too long");
  int64_t n = based_encode(&tokenizer, PROMPT, length, BASED_ADD_BOS, ids, scratch, &error);
  if (n < 0 || based_feed(session, ids, (size_t)n, NULL, &error)) stop(error.text);
  for (int i = 0; i < n; i++) based_decode(&tokenizer, &decoder, ids[i], text);

  Serial.print(PROMPT);
  uint32_t hash = 0;
  unsigned long start = millis();
  for (int i = 0; i < TOKENS; i++) {
    hash = based_hash(hash, based_logits(session), based_width(model));
    int32_t id = mostProbable(based_logits(session));
    text[based_decode(&tokenizer, &decoder, id, text)] = 0;
    Serial.print(text);
    if (i + 1 < TOKENS && based_step(session, id, &error)) stop(error.text);
  }
  Serial.print("\nlogits #");
  Serial.println((unsigned long)hash, HEX);
  Serial.print(1000.0 * TOKENS / (millis() - start + 1));
  Serial.println(" tokens per second");
  based_reset(session);
  delay(10000);
}
