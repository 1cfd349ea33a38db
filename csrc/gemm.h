// The one product of panels and tiles that every kernel is built from.
#pragma once

#include <algorithm>

#include "fixed.h"
#if defined(__AMX_BF16__)
#include "amx_integers.h"
#endif

namespace NS {

// Adds a step of P panels times T tokens, of W in the tile: by its four columns, widened to floats.
template <class F, int P, int T, int W>
inline void add_columns(const uint8_t* const (&step)[P], const typename F::Activation* x, F16 (&sums)[P][T]) {
  typename F::Scratch scratch[P];
  const uint8_t* w[P];
  for (int p = 0; p < P; ++p) w[p] = F::decoded(step[p], scratch[p]);
  for (size_t k = 0; k < STEP; ++k) {
    if constexpr (T < P) {
      for (int p = 0; p < P; ++p) {
        const F16 column = F::column(w[p], k);
        for (int t = 0; t < T; ++t) sums[p][t].fma(column, F16::all(widen(x[k * W + t])));
      }
    } else {
      F16 column[P];
      for (int p = 0; p < P; ++p) column[p] = F::column(w[p], k);
      for (int t = 0; t < T; ++t) {
        const F16 b = F16::all(widen(x[k * W + t]));
        for (int p = 0; p < P; ++p) sums[p][t].fma(column[p], b);
      }
    }
  }
}

// The same by pairs of bfloat16.
template <class F, int P, int T, int W>
inline void add_pairs([[maybe_unused]] const uint8_t* const (&step)[P], [[maybe_unused]] const Rounded* x,
                      [[maybe_unused]] F16 (&sums)[P][T]) {
#if defined(__AVX512F__)
  Step w[P];
  for (int p = 0; p < P; ++p) w[p] = F::load(step[p]);
  for (int half = 0; half < 2; ++half) {
    for (int t = 0; t < T; ++t) {
      const Pairs b = Pairs::all(x + (half * W + t) * 2);
      for (int p = 0; p < P; ++p) Pairs::dot(sums[p][t], w[p].pairs[half], b);
    }
  }
#endif
}

// out[p][t] = sum over k of panel `first + p` [row, k] * x[k, t], one row in each lane. k runs upwards in one chain for
// each element, whatever P and T are; formats with scales close a chain at the end of every group. x is tiled for W.
template <class F, int P, int T, int W = T>
inline void multiply(const Panels& b, size_t first, const typename F::Activation* x, F16 (&out)[P][T]) {
  constexpr size_t all = SIZE_MAX;
  const size_t stride = b.stride;
  const bool ahead = b.ahead && fetches_ahead<P>();
  const uint8_t* next = b.next ? b.next + first * b.steps * F::bytes : nullptr;
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < T; ++t) out[p][t] = F16::zero();
  }
  for (Extent e = extent_at<all, F>(b, 0, 0); e.begin < b.steps; e = extent_at<all, F>(b, e.end, e.group + 1)) {
    const uint8_t* panel[P];
    for (size_t p = 0; p < P; ++p) panel[p] = b.step(first + p, e.begin, e.group);
    F16 acc[P][T];
    for (int p = 0; p < P; ++p) {
      for (int t = 0; t < T; ++t) acc[p][t] = F16::zero();
    }
    const size_t bytes = (e.end - e.begin) * stride;
    for (size_t at = 0; at < bytes; at += stride, x += STEP * W) {
      if (next) {
        fetch<P * F::bytes>(next);
        next += P * F::bytes;
      } else if (ahead) {
        fetch_ahead<P, P * F::bytes>(panel[0] + at);
      }
      const uint8_t* step[P];
      for (size_t p = 0; p < P; ++p) step[p] = panel[p] + at;
      if constexpr (PAIRS && F::format != Format::f32)
        add_pairs<F, P, T, W>(step, x, acc);
      else
        add_columns<F, P, T, W>(step, x, acc);
    }
    for (size_t p = 0; p < P; ++p) {
      for (int t = 0; t < T; ++t) {
        if constexpr (F::scaled) {
          out[p][t].fma(acc[p][t], F16::load(b.scales(first + p, e.group)));
        } else {
          out[p][t] = acc[p][t];
        }
      }
    }
  }
}

template <class F, int P, int T, int W = T>
void product_of(const Panels& b, const typename F::Activation* x, float* out) {
  each_panels<typename F::Activation, P, T>(b, out,
                                            [&](size_t at, F16(&y)[P][T]) { multiply<F, P, T, W>(b, at, x, y); });
}

// Half of the tokens at a time: the other half finds the weights in a cache.
template <class F, int P, int T>
void product_in_halves(const Panels& b, const typename F::Activation* x, float* out) {
  constexpr size_t half = T / 2, word = PAIRS && F::format != Format::f32 ? 2 : 1;
  product_of<F, P, half, T>(b, x, out);
  product_of<F, P, half, T>(b, x + half * word, out + half * LANES);
}

// As many accumulators as registers hold; the sums of groups, where there are any, may live in memory.
template <class F>
void product(const Panels& b, size_t width, const typename F::Activation* x, float* out) {
  switch (width) {
    case 1:
      return product_of<F, 4, 1>(b, x, out);
    case 2:
      return product_of<F, FEW_REGISTERS ? 2 : 4, 2>(b, x, out);
    case 4:
      return product_of<F, FEW_REGISTERS ? 1 : 4, 4>(b, x, out);
    case 8:
      if constexpr (FEW_REGISTERS)
        return product_in_halves<F, 1, 8>(b, x, out);
      else if constexpr (F::scaled)
        return product_of<F, 2, 8>(b, x, out);  // what must be decoded is decoded once
      else
        return product_in_halves<F, 4, 8>(b, x, out);  // memory is read as it lies
    default:
      if constexpr (FEW_REGISTERS)
        return product_in_halves<F, 1, 12>(b, x, out);
      else
        return product_of<F, 2, 12>(b, x, out);
  }
}

// out [BLOCK][TILE][LANES] = the panels times a tile of tokens.
template <class F>
void product(const Panels& b, size_t tokens, const void* x, float* out, [[maybe_unused]] Tiles& tiles) {
  using Activation = typename F::Activation;
  if constexpr (std::is_same_v<Activation, Fixed>) {
    const FixedTile tile(x, tokens, b.steps * F::values);
#if defined(__AMX_INT8__)
    if (tokens > MOST_BY_VECTORS) return codes_by_tiles<F>(b, tokens, tile, out, tiles);
#endif
    by_vectors<F>(b, tile, out);
  } else if constexpr (MATRIX_UNIT<Activation>) {
#if defined(__AMX_BF16__)
    product_tiles<F>(b, tokens, static_cast<const bf16*>(x), out, tiles);
#endif
  } else {
    product<F>(b, tile_width<Activation>(tokens), static_cast<const Activation*>(x), out);
  }
}

}  // namespace NS
