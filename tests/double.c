/* double.c - based.c with every float a double, to tell errors of arithmetic from wrong formulas.
 *
 * For based.h part 9 only: a checkpoint has floats, and exp and erf have the precision of a float.
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
