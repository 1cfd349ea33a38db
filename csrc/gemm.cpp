// Products with weight matrices: plain, gated (SwiGLU), and weighted sums of experts; packing; tiling of activations.
#include "gemm.h"

#include <algorithm>

#include "table.h"

namespace NS {
namespace {

// What a block of panels gave for one tile of tokens.
struct Results {
  const float* values;  // [BLOCK][tile][LANES]
  size_t tile;
  const float* at(size_t panel, size_t token) const { return values + (panel * tile + token) * LANES; }
};

// The block that begins with panel `first`, as it lies or decoded to `data`: each step then makes `vectors`.
template <class F>
Panels block_of(const Matrix& w, size_t first, const uint8_t* data, size_t vectors = 1) {
  Panels b = {w.layout(first), {}, false};
  b.stride = b.count * F::bytes;
  b.steps *= vectors;
  b.group_steps *= vectors;
  for (size_t p = 0; p < BLOCK; ++p) b.panel[p] = data + std::min(p, b.count - 1) * F::bytes;
  return b;
}

// Whether a block is decoded to memory before several tiles are multiplied with it: not where vectors decode and
// multiply in less time than they would load what is decoded.
#if defined(__AVX512VBMI__)
template <class F>
constexpr bool DECODES_ONCE = !std::is_same_v<typename F::Decoded, F> && MATRIX_UNIT<typename F::Activation>;
#else
template <class F>
constexpr bool DECODES_ONCE = !std::is_same_v<typename F::Decoded, F>;
#endif

// A block with all steps decoded.
template <class F>
Panels decode_block(const Matrix& w, size_t first, Buffer<uint8_t>& to) {
  using Decoded = typename F::Decoded;
  constexpr size_t vectors = F::values / Decoded::values;
  const size_t count = w.block_panels(first), scales = count * w.scale_bytes();
  const Panels b = block_of<F>(w, first, w.block(first));
  uint8_t* out = to.reserve(w.steps() * vectors * count * Decoded::bytes + w.groups() * scales);
  for (size_t g = 0, s = 0; s < b.steps; ++g) {
    for (const size_t end = std::min(s + b.group_steps, b.steps); s < end;
         ++s, out += vectors * count * Decoded::bytes) {
      for (size_t p = 0; p < count; ++p) {
        const uint8_t* step = b.step(p, s, g);
        if constexpr (F::format == Format::fp8) {
          F::decode(step, out + p * Decoded::bytes);
        } else {
          const auto group = F::group(b.scales(p, g));
          for (size_t v = 0; v < vectors; ++v) F::load(step, group, v).store(out + (v * count + p) * Decoded::bytes);
        }
      }
    }
    std::memcpy(out, b.scales(0, g), scales);
    out += scales;
  }
  return block_of<Decoded>(w, first, to.data(), vectors);
}

// Every block of panels [begin, end), begin at a block's start, against every tile; ``each(panel, count, token, tokens,
// results)`` takes them.
template <class F, class Each>
void walk(const Matrix& w, const void* x, size_t tokens, size_t begin, size_t end, Each each) {
  using Activation = typename F::Activation;
  constexpr size_t tile = TILE<Activation>;
  static thread_local Buffer<uint8_t> decoded;
  Tiles tiles;
  for (size_t first = begin; first < end; first += BLOCK) {
    const auto* of_tile = static_cast<const uint8_t*>(x);
    alignas(64) float results[BLOCK * tile * LANES];
    const auto each_tile = [&](auto format, Panels panels) {
      for (size_t t = 0; t < tokens; t += tile) {
        const size_t live = std::min(tile, tokens - t);
        product<decltype(format)>(panels, live, of_tile, results, tiles);
        each(first, panels.count, t, live, Results{results, tile});
        panels.ahead = false;
        of_tile += tile_bytes<Activation>(live, w.depth);
      }
    };
    if constexpr (DECODES_ONCE<F>) {
      if (tokens > tile) {  // several tiles: decode once
        each_tile(typename F::Decoded(), decode_block<F>(w, first, decoded));
        continue;
      }
    }
    Panels panels = block_of<F>(w, first, w.block(first));
    panels.ahead = true;
    each_tile(F(), panels);
  }
}

template <class Each>
void walk_any(const Matrix& w, const void* x, size_t tokens, size_t begin, size_t end, Each each) {
  switch (w.format) {
    case Format::f32:
      return walk<F32>(w, x, tokens, begin, end, each);
    case Format::bf16:
      return walk<BF16>(w, x, tokens, begin, end, each);
    case Format::int8:
      return walk<INT8>(w, x, tokens, begin, end, each);
    case Format::int4:
      if (w.zeros) return walk<INT4Zeros>(w, x, tokens, begin, end, each);
      return walk<INT4>(w, x, tokens, begin, end, each);
    case Format::fp8:
      return walk<FP8>(w, x, tokens, begin, end, each);
  }
}

void linear(const Matrix& w, const void* x, size_t tokens, float* y, size_t stride, size_t begin, size_t end) {
  walk_any(w, x, tokens, begin, end, [&](size_t panel, size_t count, size_t t, size_t live, const Results& r) {
    for (size_t p = 0; p < count; ++p) {
      const size_t row = (panel + p) * PANEL, rows = std::min(PANEL, w.rows - row);
      for (size_t i = 0; i < live; ++i) {
        float* out = y + (t + i) * stride + row;
        if (rows == PANEL)
          std::memcpy(out, r.at(p, i), PANEL * sizeof(float));
        else
          std::memcpy(out, r.at(p, i), rows * sizeof(float));
      }
    }
  });
}

void linear_add(const Matrix& w, const void* x, size_t tokens, const int32_t* token, const float* weight, float* y,
                size_t stride, size_t begin, size_t end) {
  walk_any(w, x, tokens, begin, end, [&](size_t panel, size_t count, size_t t, size_t live, const Results& r) {
    for (size_t p = 0; p < count; ++p) {
      const size_t row = (panel + p) * PANEL, rows = std::min(PANEL, w.rows - row);
      for (size_t i = 0; i < live; ++i) {
        float* out = y + (token ? token[t + i] : t + i) * stride + row;
        const float* in = r.at(p, i);
        const float scale = weight ? weight[t + i] : 1.0f;
        for (size_t n = 0; n < rows; ++n) out[n] += scale * in[n];
      }
    }
  });
}

void gated(const Matrix& w, const void* x, size_t tokens, float* h, size_t stride, size_t begin, size_t end) {
  walk_any(w, x, tokens, 2 * begin, 2 * end, [&](size_t panel, size_t count, size_t t, size_t live, const Results& r) {
    for (size_t p = 0; p < count; p += 2) {
      for (size_t i = 0; i < live; ++i) {
        const float* gate = r.at(p, i);
        const float* up = r.at(p + 1, i);
        float* out = h + (t + i) * stride + (panel + p) / 2 * PANEL;
        for (size_t n = 0; n < LANES; ++n) out[n] = gate[n] * sigmoid(gate[n]) * up[n];
      }
    }
  });
}

// Words of four bytes of WIDTH rows of so many bytes, in turns.
template <size_t WIDTH>
void take_turns(const char* rows, size_t bytes, char* to) {
  for (size_t k = 0; k < bytes; k += 4) {
    for (size_t t = 0; t < WIDTH; ++t) std::memcpy(to + k * WIDTH + t * 4, rows + t * bytes + k, 4);
  }
}

// One tile of rows x[token[i]] (or x[i]): see ``tile_bytes``. A word is a pair of bfloat16 or a float.
template <class T>
void tile_as(const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, T* out) {
  static thread_local Buffer<T> scratch;
  const size_t padded = round_up(depth, TILE_DEPTH<T>), width = tile_width<T>(tokens);
  T* rows = width == 1 ? out : scratch.reserve(width * padded);
  for (size_t t = 0; t < width; ++t) {
    const size_t n = t < tokens ? depth : 0;
    narrow(x + (token && t < tokens ? token[t] : t) * stride, n, rows + t * padded);
    std::memset(rows + t * padded + n, 0, (padded - n) * sizeof(T));
  }
  const size_t bytes = padded * sizeof(T);
  const auto* from = reinterpret_cast<const char*>(rows);
  auto* to = reinterpret_cast<char*>(out);
  if (width == 2)
    take_turns<2>(from, bytes, to);
  else if (width == 4)
    take_turns<4>(from, bytes, to);
  else if (width == 8)
    take_turns<8>(from, bytes, to);
  else if (width > 1)
    take_turns<TILE<T>>(from, bytes, to);
}

#if defined(__AMX_BF16__)
// For the matrix unit: first pairs of thirty-two steps, then second ones.
void tile_as(const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, bf16* out) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
  alignas(64) float rest[CHUNK] = {};  // of the last chunk, if it is short
  for (size_t t = 0; t < tokens; ++t) {
    const float* row = x + (token ? token[t] : t) * stride;
    for (size_t k = 0; k < depth; k += CHUNK) {
      const float* from = row + k;
      if (depth - k < CHUNK) {
        std::copy_n(from, depth - k, rest);
        from = rest;
      }
      const auto narrowed = [&](size_t i) {
        const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + LANES);
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      };
      const __m512i a = narrowed(0), b = narrowed(HALF);
      bf16* to = out + k * tokens + t * HALF;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi32(a, first, b));
      _mm512_storeu_si512(to + tokens * HALF, _mm512_permutex2var_epi32(a, second, b));
    }
  }
}
#endif

void tile_as(const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, Fixed* out) {
  const FixedTile tile(out, tokens, depth);
  for (size_t t = 0; t < tokens; ++t) {
    const float* row = x + (token ? token[t] : t) * stride;
    for (size_t s = 0; s < tile.stretches; ++s)
      tile.put(s, t, row + s * STRETCH, std::min(STRETCH, depth - s * STRETCH));
  }
}

// Calls of(a pointer to what tiles are made of, null).
template <class Of>
auto with_rounding(Rounding r, Of of) {
  switch (r) {
    case Rounding::f32:
      return of(static_cast<float*>(nullptr));
    case Rounding::bf16:
      return of(static_cast<Rounded*>(nullptr));
    default:
      return of(static_cast<Fixed*>(nullptr));
  }
}

template <class T>
size_t tiles_bytes(T*, size_t tokens, size_t depth) {
  const size_t whole = tokens / TILE<T>, rest = tokens % TILE<T>;
  return whole * tile_bytes<T>(TILE<T>, depth) + (rest ? tile_bytes<T>(rest, depth) : 0);
}

size_t tiled_bytes(Rounding r, size_t tokens, size_t depth) {
  return with_rounding(r, [&](auto* kind) { return tiles_bytes(kind, tokens, depth); });
}

size_t num_tiles(Rounding r, size_t tokens) {
  return with_rounding(r, [&]<class T>(T*) { return (tokens + TILE<T> - 1) / TILE<T>; });
}

// Tiles [begin, end) of a product's tokens.
void tile(Rounding r, const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, void* out,
          size_t begin, size_t end) {
  with_rounding(r, [&]<class T>(T*) {
    for (size_t i = begin; i < end; ++i) {
      const size_t first = i * TILE<T>, live = std::min(TILE<T>, tokens - first);
      auto* to = static_cast<uint8_t*>(out) + i * tile_bytes<T>(TILE<T>, depth);
      tile_as(token ? x : x + first * stride, stride, token ? token + first : nullptr, live, depth,
              reinterpret_cast<T*>(to));
    }
  });
}

}  // namespace

extern const Gemm gemm;
const Gemm gemm = {linear, linear_add, gated, tile, tiled_bytes, num_tiles};

}  // namespace NS
