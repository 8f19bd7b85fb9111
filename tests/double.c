/* double.c - based.c with every float a double: how much of an error is arithmetic, how much is a wrong formula.
 *
 * Good for based.h part 9 only: a checkpoint has floats, and our exp and erf have the digits of one.
 */
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BASED_FREESTANDING 1
#define float double
#define sqrtf sqrt
#define fabsf fabs
#include "../based.c"
