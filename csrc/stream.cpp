// How fast this machine reads memory: the ceiling that every other number is held against.
#include "panels.h"
#include "table.h"

namespace NS {
namespace {

float read(const float* data, size_t begin, size_t end) {
  const bool ahead = fetches_ahead<BLOCK>() && !FEW_REGISTERS;
  F16 sums[8];
  for (F16& s : sums) s = F16::zero();
  size_t i = begin;
  for (; i + 8 * LANES <= end; i += 8 * LANES) {
    if (ahead) fetch_ahead<BLOCK, 8 * LANES * sizeof(float)>(reinterpret_cast<const uint8_t*>(data + i));
    for (size_t k = 0; k < 8; ++k) sums[k] = F16::max(sums[k], F16::load(data + i + k * LANES));
  }
  F16 all = sums[0];
  for (const F16& s : sums) all = F16::max(all, s);
  return sum(all);
}

}  // namespace

extern const Stream stream;
const Stream stream = {read};

}  // namespace NS
