// What a product takes: panels that are multiplied together, and how tokens are tiled for it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu.h"
#include "matrix.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "tiles.h"
#endif

namespace NS {

// A block of weights or of keys: first steps of its panels, the last of which stands in for those missing. `ahead`:
// what lies behind it will be read soon, and is not on its way yet. `next`: the same of a block elsewhere, or null.
struct Panels : BlockLayout {
  const uint8_t* panel[BLOCK];
  bool ahead;
  const uint8_t* next = nullptr;

  const uint8_t* step(size_t p, size_t s, size_t group) const { return panel[p] + BlockLayout::step(s, group); }
  const float* scales(size_t p, size_t group) const {
    return reinterpret_cast<const float*>(panel[0] + BlockLayout::scales(std::min(p, count - 1), group));
  }
};

// A part of a row that is summed before anything else happens: steps [begin, end), within one stretch of VALUES and one
// group of scales.
struct Extent {
  size_t begin, end, group;
  bool closes;  // its group
};

template <size_t VALUES, class F>
Extent extent_at(const Panels& b, size_t begin, size_t group) {
  constexpr size_t whole = VALUES / F::values;
  const size_t close = F::scaled ? std::min((group + 1) * b.group_steps, b.steps) : b.steps;
  const size_t end = std::min((begin / whole + 1) * whole, close);
  return {begin, end, group, end == close};
}

struct Fixed;  // activations as 16-bit integers, see fixed.h

#if defined(__AMX_BF16__)
template <class Activation>
constexpr bool MATRIX_UNIT = !std::is_same_v<Activation, float>;
#else
template <class>
constexpr bool MATRIX_UNIT = false;
struct Tiles {};  // nothing to keep
#endif

// How weights are fetched before a product needs them, as measured. With the matrix unit (Sapphire Rapids, whose first
// cache has too few places for lines on their way) all are, into the second cache. Zen 5 wants them in the first, and
// so does Zen 3, the one without AVX-512 that was measured, though it reads fastest without asking. Zen 4 follows a
// block's one stream better by itself; but a pass over fewer panels than a block has skips what lies between, which no
// processor foresees, and its way is longer.
constexpr bool ALL_TO_SECOND = MATRIX_UNIT<bf16>;
template <int P>
constexpr size_t AHEAD = ALL_TO_SECOND ? 8192
                         : P == BLOCK  ? 4096
                                       : 16384;

template <int P>
bool fetches_ahead() {
  return ALL_TO_SECOND || FEW_REGISTERS || P != BLOCK || FETCHES_TO_FIRST;
}

template <size_t BYTES = 1>
inline void fetch(const void* p) {
  for (size_t line = 0; line < BYTES; line += 64) {
    if (!ALL_TO_SECOND && (FEW_REGISTERS || FETCHES_TO_FIRST))
      __builtin_prefetch(static_cast<const uint8_t*>(p) + line, 0, 3);
    else
      __builtin_prefetch(static_cast<const uint8_t*>(p) + line, 0, 2);
  }
}

// BYTES of what a pass over P panels will need when it has come AHEAD of `p`.
template <int P, size_t BYTES>
inline void fetch_ahead(const uint8_t* p) {
  fetch<BYTES>(p + AHEAD<P>);
}

// Tokens that one pass over a block multiplies at most, and what their depth is padded to.
template <class Activation>
constexpr size_t TILE = MATRIX_UNIT<Activation>             ? 32
                        : std::is_same_v<Activation, Fixed> ? 4
                                                            : 12;
template <class Activation>
constexpr size_t TILE_DEPTH = MATRIX_UNIT<Activation> ? 64 : STEP;

// Tokens a tile of that many is padded to with zeros.
template <class Activation>
size_t tile_width(size_t tokens) {
  if (MATRIX_UNIT<Activation>) return tokens;
  for (size_t width : {1, 2, 4, 8}) {
    if (tokens <= width) return width;
  }
  return TILE<Activation>;
}

// Bytes of a tile. It is [depth / 2][tokens][2] in bfloat16, [depth][tokens] in float, and [depth / 64][first or second
// pairs of steps][tokens][32] for the matrix unit; that of integers is in fixed.h.
template <class Activation>
size_t tile_bytes(size_t tokens, size_t depth) {
  return tile_width<Activation>(tokens) * round_up(depth, TILE_DEPTH<Activation>) * sizeof(Activation);
}
template <>
size_t tile_bytes<Fixed>(size_t tokens, size_t depth);

// out [BLOCK][TILE][LANES] of a block, P panels at a time: ``multiply(first, y)`` gives y[p][t].
template <class Activation, int P, int T, class Multiply>
void each_panels(const Panels& b, float* out, Multiply multiply) {
  for (size_t at = 0; at < b.count; at += P) {
    F16 y[P][T];
    multiply(at, y);
    for (size_t p = 0; p < P && at + p < b.count; ++p) {
      for (size_t t = 0; t < T; ++t) y[p][t].store(out + ((at + p) * TILE<Activation> + t) * LANES);
    }
  }
}

}  // namespace NS
