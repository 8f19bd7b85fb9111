/* test_soft_float_cores.c - test_soft_float.c again, with the steps that based.c takes on other
 * cores: products of 16 bits as on an M0+; instructions that count zeros and divide, as on an M3.
 */
#define __ARM_ARCH_6M__ 1
#define __ARM_FEATURE_CLZ 1
#define __ARM_FEATURE_IDIV 1
#include "test_soft_float.c"
