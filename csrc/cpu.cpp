#include "cpu.h"

#ifdef GLM52_X86
// Of the processors with AVX-512, Zen 5 is the one that has this too.
const bool FETCHES_TO_FIRST = __builtin_cpu_supports("avx512vp2intersect");
#else
const bool FETCHES_TO_FIRST = false;
#endif
