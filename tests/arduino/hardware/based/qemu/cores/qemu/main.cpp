// main.cpp - output through a debugger, and the end of the program where the sketch first waits.
#include "Arduino.h"

extern "C" {
#include <semihost.h>
}

Console Serial;

void Console::print(const char *text) { sys_semihost_write0(text); }

void Console::println(unsigned long n, int base) {
  char text[34], *p = text + sizeof text - 1;
  *p = 0;
  do *--p = "0123456789ABCDEF"[n % (unsigned)base]; while (n /= (unsigned)base);
  println(p);
}

void Console::print(double) { print("?"); }     // a speed: the time of an emulator means nothing

extern "C" void delay(unsigned long) { sys_semihost_exit(ADP_Stopped_ApplicationExit, 0); }
extern "C" unsigned long millis(void) { return 0; }

int main() {
  setup();
  for (;;) loop();
}
