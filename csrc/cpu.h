// What the kernels must know of the processor beyond its instruction set.
#pragma once

// Lines that will be needed soon are best asked for into the first cache, not the second. So it is on Zen 5; Zen 4
// reads weights at two thirds of its speed when they are.
extern const bool FETCHES_TO_FIRST;
