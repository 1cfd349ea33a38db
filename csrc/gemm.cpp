// linear: matrix-vector and small matrix-matrix products over row-major weights, without packing.
#include "simd.h"
#include "table.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace NS {
namespace {

// A tile of R weight rows and T tokens. One accumulator per element, so that every tile adds in the same order.
template <int R, int T, class W>
void tile(const LinearArgs& a, const W* w, size_t n, size_t t) {
  Vec acc[R][T];
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < T; ++s) acc[r][s] = Vec::zero();
  }
  const size_t whole = a.depth - a.depth % Vec::width;
  for (size_t d = 0; d < whole; d += Vec::width) {
    Vec x[T];
    for (int s = 0; s < T; ++s) x[s] = Vec::load(a.x + (t + s) * a.depth + d);
    for (int r = 0; r < R; ++r) {
      const Vec row = Vec::load(w + (n + r) * a.depth + d);
      for (int s = 0; s < T; ++s) acc[r][s].fma(row, x[s]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < T; ++s) {
      float total = sum(acc[r][s]);
      for (size_t d = whole; d < a.depth; ++d) total += widen(w[(n + r) * a.depth + d]) * a.x[(t + s) * a.depth + d];
      a.y[(t + s) * a.rows + n + r] = total;
    }
  }
}

template <int R, class W>
void rows(const LinearArgs& a, const W* w, size_t n) {
  constexpr int T = 4;
  size_t t = 0;
  if constexpr (R <= 4) {
    for (; t + T <= a.tokens; t += T) tile<R, T>(a, w, n, t);
  }
  for (; t < a.tokens; ++t) tile<R, 1>(a, w, n, t);
}

template <class W>
void linear(const LinearArgs& a, size_t begin, size_t end) {
  const W* w = static_cast<const W*>(a.w);
  size_t n = begin;
  if (a.tokens < 4) {
    for (; n + 8 <= end; n += 8) rows<8>(a, w, n);
  }
  for (; n + 4 <= end; n += 4) rows<4>(a, w, n);
  for (; n < end; ++n) rows<1>(a, w, n);
}

}  // namespace

extern const Table table = {NAME(NS), linear<float>, linear<bf16>};

}  // namespace NS
