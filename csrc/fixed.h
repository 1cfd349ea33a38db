// Products of integer weights: activations become 16-bit integers too, so that sums are exact and no weight is decoded
// to a float.
//
// A row of activations is cut into stretches of 128 values; each has a power of two of its own, for which its largest
// value takes 15 bits and the sign. A sum over the part of a stretch that lies in one group is a 32-bit integer,
// whoever computes it and in whatever order. What follows is done in floats in one order: times the stretch's power,
// added to the group's sum, which is added to the row's, times the scale.
#pragma once

#include "formats.h"

namespace NS {

constexpr size_t STRETCH = 128;

// Values of a stretch that lie together: what one instruction of the matrix unit takes, or all.
constexpr size_t TOGETHER = MATRIX_UNIT<Fixed> ? 64 : STRETCH;

// A tile of tokens: the integers of all stretches, then what else is known of them. A stretch's integers are
// [tokens][128] of 16 bits, or where bytes are multiplied, [high or low][128 / TOGETHER][tokens][TOGETHER] of 8.
struct FixedTile {
  static constexpr size_t token_bytes = STRETCH * sizeof(int16_t), parts = STRETCH / INTEGER_GROUP;
  uint8_t* data;
  size_t tokens, stretches;

  FixedTile(const void* tile, size_t tokens, size_t depth)
      : data(static_cast<uint8_t*>(const_cast<void*>(tile))),
        tokens(tokens),
        stretches((depth + STRETCH - 1) / STRETCH) {}
  size_t bytes() const { return round_up(stretches * tokens * (token_bytes + (1 + parts) * sizeof(float)), 64); }
  uint8_t* stretch(size_t s) const { return data + s * tokens * token_bytes; }
  // The first token's integers from value k on, a multiple of STEP.
  const uint8_t* at(size_t k) const {
    const size_t in = k % STRETCH;
    return stretch(k / STRETCH) + (PLANES ? in / TOGETHER * TOGETHER * tokens + in % TOGETHER : in * sizeof(int16_t));
  }
  // What the sums of a stretch are to be multiplied with, [tokens].
  float* power(size_t s) const { return reinterpret_cast<float*>(stretch(stretches)) + s * tokens * (1 + parts); }
  // The sums of its first 32, 64, 96 and 128 integers, [4][tokens]: codes are weights plus an offset, so that much
  // times a sum of integers is in each product too many.
  int32_t* first(size_t s) const { return reinterpret_cast<int32_t*>(power(s) + tokens); }
  // The same of the integers [begin, end) of a row, which lie in one stretch, times `factor`, for n tokens; begin and
  // end are where a group may begin, or the row ends.
  void sums(size_t begin, size_t end, size_t token, size_t n, int32_t factor, int32_t* out) const {
    const size_t from = begin % STRETCH / INTEGER_GROUP, to = (end - 1) % STRETCH / INTEGER_GROUP;
    const int32_t *last = first(begin / STRETCH) + to * tokens + token, *before = last - (to + 1 - from) * tokens;
    for (size_t t = 0; t < n; ++t) out[t] = factor * last[t];
    if (!from) return;
    for (size_t t = 0; t < n; ++t) out[t] -= factor * before[t];
  }

  static size_t place(size_t k) { return EVEN_FIRST ? (k & ~size_t{3}) | (k & 1) << 1 | (k >> 1 & 1) : k; }

  // One token's stretch, the rest of it zero.
  void put(size_t s, size_t token, const float* x, size_t n) const {
    alignas(64) int16_t integers[STRETCH];
    if (n < STRETCH) std::memset(integers, 0, sizeof integers);
    power(s)[token] = fix(x, n, integers);
    int32_t sum = 0;
    for (size_t i = 0; i < parts; ++i) {
      for (size_t k = 0; k < INTEGER_GROUP; ++k) sum += integers[i * INTEGER_GROUP + k];
      first(s)[i * tokens + token] = sum;
    }
    uint8_t* to = stretch(s);
    if (!PLANES) {
      auto* placed = reinterpret_cast<int16_t*>(to + token * token_bytes);
      for (size_t k = 0; k < STRETCH; ++k) placed[place(k)] = integers[k];
      return;
    }
    for (size_t i = 0; i < STRETCH; i += TOGETHER) {
      uint8_t *high = to + i * tokens + token * TOGETHER, *low = high + STRETCH * tokens;
      for (size_t k = 0; k < TOGETHER; ++k) {
        high[k] = static_cast<uint8_t>((integers[i + k] + 128) >> 8);
        low[k] = static_cast<uint8_t>(integers[i + k]);
      }
    }
  }
};

template <>
inline size_t tile_bytes<Fixed>(size_t tokens, size_t depth) {
  return FixedTile(nullptr, tokens, depth).bytes();
}

// Sums of P panels' `steps` from those at `panel` on, which lie together, times T tokens.
template <class F, int P, int T>
inline void add_steps(const Panels& b, const uint8_t* const* panel, size_t steps, const typename F::Group (&groups)[P],
                      const uint8_t* x, Dots (&sums)[P][T]) {
  constexpr size_t token = PLANES ? TOGETHER : FixedTile::token_bytes, step = STEP * token / TOGETHER;
  const size_t bytes = steps * b.stride, stride = b.stride;
  const bool ahead = b.ahead && fetches_ahead<P>();
  for (size_t at = 0; at < bytes; at += stride) {
    if (ahead) fetch_ahead<P, P * F::bytes>(panel[0] + at);
    for (size_t v = 0; v < F::vectors; ++v, x += step) {
      if constexpr (FEW_REGISTERS) {  // which hold the codes of one panel at a time
        for (int p = 0; p < P; ++p) {
          const Codes w = F::load(panel[p] + at, groups[p], v);
          for (size_t t = 0; t < T; ++t) sums[p][t].add(w, x + t * token, STRETCH * T);
        }
      } else {
        Codes w[P];
        for (int p = 0; p < P; ++p) w[p] = F::load(panel[p] + at, groups[p], v);
        for (size_t t = 0; t < T; ++t) {
          for (int p = 0; p < P; ++p) sums[p][t].add(w[p], x + t * token, STRETCH * T);
        }
      }
    }
  }
}

// out[p][t]: P panels from `first` on times T tokens.
template <class F, int P, int T>
inline void multiply_fixed(const Panels& b, size_t first, const FixedTile& x, F16 (&out)[P][T]) {
  constexpr size_t whole = TOGETHER / F::values;
  F16 in_group[P][T];
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < T; ++t) out[p][t] = in_group[p][t] = F16::zero();
  }
  for (Extent e = extent_at<STRETCH, F>(b, 0, 0); e.begin < b.steps;
       e = extent_at<STRETCH, F>(b, e.end, e.group + e.closes)) {
    const float* scales[P];
    typename F::Group groups[P];
    for (size_t p = 0; p < P; ++p) {
      scales[p] = b.scales(first + p, e.group);
      groups[p] = F::group(scales[p]);
    }
    if (b.ahead && fetches_ahead<P>() && e.closes)
      fetch_ahead<P, P * PANEL * sizeof(float)>(reinterpret_cast<const uint8_t*>(scales[0]));
    Dots sums[P][T];
    for (int p = 0; p < P; ++p) {
      for (int t = 0; t < T; ++t) sums[p][t] = Dots::zero();
    }
    for (size_t begin = e.begin, end; begin < e.end; begin = end) {
      end = std::min((begin / whole + 1) * whole, e.end);
      const uint8_t* panel[P];
      for (size_t p = 0; p < P; ++p) panel[p] = b.step(first + p, begin, e.group);
      add_steps<F, P, T>(b, panel, end - begin, groups, x.at(begin * F::values), sums);
    }
    const float* power = x.power(e.begin * F::values / STRETCH);
    int32_t offset[T];
    x.sums(e.begin * F::values, e.end * F::values, 0, T, F::offset, offset);
    for (size_t t = 0; t < T; ++t) {
      for (int p = 0; p < P; ++p) {
        in_group[p][t].fma(sums[p][t].less(offset[t]), F16::all(power[t]));
        if (!e.closes) continue;
        out[p][t].fma(in_group[p][t], F16::load(scales[p]));
        in_group[p][t] = F16::zero();
      }
    }
  }
}

template <class F, int P, int T>
void fixed_of(const Panels& b, const FixedTile& x, float* out) {
  each_panels<Fixed, P, T>(b, out, [&](size_t at, F16(&y)[P][T]) { multiply_fixed<F, P, T>(b, at, x, y); });
}

// Tokens that are multiplied by vectors where there is a matrix unit, which takes more at once and gives the same bits.
constexpr size_t MOST_BY_VECTORS = 5;

// As many panels as there are registers for their sums.
template <class F>
void by_vectors(const Panels& b, const FixedTile& x, float* out) {
  switch (x.tokens) {
    case 1:
      return fixed_of<F, 4, 1>(b, x, out);
    case 2:
      return fixed_of<F, FEW_REGISTERS ? 2 : 4, 2>(b, x, out);
    case 3:
      return fixed_of<F, FEW_REGISTERS ? 1 : 4, 3>(b, x, out);
    case 4:
      return fixed_of<F, FEW_REGISTERS ? 1 : 2, 4>(b, x, out);
    default:
      return fixed_of<F, 2, 5>(b, x, out);
  }
}

}  // namespace NS
