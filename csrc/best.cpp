#include "best.h"

#include <algorithm>
#include <bit>

namespace {

// The largest bound that `keep` items reach, found by counting digits from the highest in which items differ. The
// search ends as soon as all items that share the digits so far are wanted.
uint64_t bound_of(const uint64_t* items, size_t count, size_t keep) {
  constexpr unsigned DIGIT = 8;
  uint64_t any = 0, all = ~uint64_t{0};
  for (size_t i = 0; i < count; ++i) {
    any |= items[i];
    all &= items[i];
  }
  unsigned shift = static_cast<unsigned>(std::bit_width(any ^ all));
  uint64_t prefix = shift < 64 ? all >> shift : 0;
  for (size_t wanted = keep;;) {
    const unsigned bits = std::min(DIGIT, shift);
    const auto above = [&](uint64_t x) { return shift < 64 ? x >> shift : 0; };
    const unsigned low = shift - bits;
    size_t counts[1 << DIGIT] = {};
    for (size_t i = 0; i < count; ++i) counts[items[i] >> low & ((1 << bits) - 1)] += above(items[i]) == prefix;
    size_t digit = (size_t{1} << bits) - 1;
    for (; counts[digit] < wanted; --digit) wanted -= counts[digit];
    prefix = prefix << bits | digit;
    shift = low;
    if (counts[digit] == wanted) return prefix << shift;
  }
}

}  // namespace

uint64_t keep_largest(uint64_t* items, size_t count, size_t keep) {
  const uint64_t bound = bound_of(items, count, keep);
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t item = items[i];
    items[kept] = item;
    kept += item >= bound;
  }
  return bound;
}
