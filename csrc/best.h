// The best of many numbers that all differ, in the order in which they stand.
#pragma once

#include <cstddef>
#include <cstdint>

// Drops all but the `keep` largest of `count` items and returns a bound that only those reach. keep < count.
uint64_t keep_largest(uint64_t* items, size_t count, size_t keep);
