// Arduino.h - as much of Arduino as the example uses. Serial is the console of a debugger.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define HEX 16

extern "C" {
void delay(unsigned long milliseconds);
unsigned long millis(void);
}
void setup();
void loop();

struct Console {
  void begin(unsigned long) {}
  void print(const char *text);
  void print(double x);
  void println(const char *text) { print(text); print("\n"); }
  void println(unsigned long n, int base);
};
extern Console Serial;
