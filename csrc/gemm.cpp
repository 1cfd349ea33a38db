// Products with weight matrices: plain, gated (SwiGLU), and weighted sums of experts; packing; tiling of activations.
#include "gemm.h"

#include <algorithm>

#include "table.h"

namespace NS {
namespace {

// Results of a block of panels for one tile of tokens: [BLOCK][TILE][LANES].
using Block = float[BLOCK * TILE * LANES];

template <class F, int P, int T>
void block(const Matrix& w, const uint8_t* data, size_t stride, size_t first, const typename F::Activation* x,
           float* out) {
  const size_t count = w.block_panels(first), bytes = stride / count;
  for (size_t at = 0; at < count; at += P) {
    const uint8_t* panel[P];
    const float* scale[P];
    for (int p = 0; p < P; ++p) {
      const size_t mine = std::min(at + p, count - 1);  // a block's last panel stands in for those that are missing
      panel[p] = data + mine * bytes;
      scale[p] = w.group ? w.scales.data() + w.scale_at(first + mine) : nullptr;
    }
    F16 y[P][T];
    multiply<F, P, T>(panel, stride, scale, w.scale_stride(first), w.steps(), w.group, x, y);
    for (int p = 0; p < P && at + p < count; ++p) {
      for (int t = 0; t < T; ++t) y[p][t].store(out + ((at + p) * TILE + t) * LANES);
    }
  }
}

template <class F>
void block_of_width(const Matrix& w, const uint8_t* data, size_t stride, size_t first, size_t width,
                    const typename F::Activation* x, float* out) {
  // As many accumulators as registers hold; the sums of groups, where there are any, may live in memory.
  switch (width) {
    case 1:
      return block<F, 4, 1>(w, data, stride, first, x, out);
    case 2:
      return block<F, 4, 2>(w, data, stride, first, x, out);
    case 4:
      return block<F, 4, 4>(w, data, stride, first, x, out);
    case 8:
      return block<F, 2, 8>(w, data, stride, first, x, out);
    default:
      return block<F, 2, TILE>(w, data, stride, first, x, out);
  }
}

// Every block of panels [begin, end), begin at a block's start, against every tile; ``each(panel, count, token, tokens,
// results)`` takes them.
template <class F, class Each>
void walk(const Matrix& w, const void* x, size_t tokens, size_t begin, size_t end, Each each) {
  static thread_local Buffer<uint8_t> decoded;
  for (size_t first = begin; first < end; first += BLOCK) {
    const size_t count = w.block_panels(first), whole = count * w.steps();
    const uint8_t* data = w.data.data() + w.panel_at(first);
    size_t stride = w.panel_stride(first);
    bool wide = false;
    if constexpr (F::scaled) {
      if (tokens > TILE) {  // several tiles: decode once
        wide = true;
        auto* to = reinterpret_cast<Step*>(decoded.reserve(whole * sizeof(Step)));
        for (size_t s = 0; s < whole; ++s) {
          const size_t group = s / count / (w.group / STEP);
          const float* scales = w.scales.data() + w.scale_at(first + s % count) + group * w.scale_stride(first);
          to[s] = load_step<F>(data + s * F::bytes, scales);
        }
        data = decoded.data();
        stride = count * sizeof(Step);
      }
    }
    const auto* tile = static_cast<const typename F::Activation*>(x);
    Block results;
    for (size_t t = 0; t < tokens; t += TILE) {
      const size_t live = std::min(TILE, tokens - t), width = tile_width(live);
      if constexpr (F::scaled) {
        if (wide)
          block_of_width<ScaledBF16>(w, data, stride, first, width, tile, results);
        else
          block_of_width<F>(w, data, stride, first, width, tile, results);
      } else {
        block_of_width<F>(w, data, stride, first, width, tile, results);
      }
      each(first, count, t, live, results);
      tile += width * w.steps() * STEP;
    }
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
      if (w.lowest) return walk<INT8Lowest>(w, x, tokens, begin, end, each);
      return walk<INT8>(w, x, tokens, begin, end, each);
    case Format::int4:
      if (w.zeros) return walk<INT4Zeros>(w, x, tokens, begin, end, each);
      return walk<INT4>(w, x, tokens, begin, end, each);
    case Format::fp8:
      return walk<FP8>(w, x, tokens, begin, end, each);
  }
}

void linear(const Matrix& w, const void* x, size_t tokens, float* y, size_t stride, size_t begin, size_t end) {
  walk_any(w, x, tokens, begin, end, [&](size_t panel, size_t count, size_t t, size_t live, const float* r) {
    for (size_t p = 0; p < count; ++p) {
      const size_t row = (panel + p) * PANEL, rows = std::min(PANEL, w.rows - row);
      for (size_t i = 0; i < live; ++i) std::memcpy(y + (t + i) * stride + row, r + (p * TILE + i) * LANES, rows * 4);
    }
  });
}

void linear_add(const Matrix& w, const void* x, size_t tokens, const int32_t* token, const float* weight, float* y,
                size_t stride, size_t begin, size_t end) {
  walk_any(w, x, tokens, begin, end, [&](size_t panel, size_t count, size_t t, size_t live, const float* r) {
    for (size_t p = 0; p < count; ++p) {
      const size_t row = (panel + p) * PANEL, rows = std::min(PANEL, w.rows - row);
      for (size_t i = 0; i < live; ++i) {
        float* out = y + (token ? token[t + i] : t + i) * stride + row;
        const float* in = r + (p * TILE + i) * LANES;
        const float scale = weight ? weight[t + i] : 1.0f;
        for (size_t n = 0; n < rows; ++n) out[n] += scale * in[n];
      }
    }
  });
}

void gated(const Matrix& w, const void* x, size_t tokens, float* h, size_t stride, size_t begin, size_t end) {
  walk_any(w, x, tokens, 2 * begin, 2 * end, [&](size_t panel, size_t count, size_t t, size_t live, const float* r) {
    for (size_t p = 0; p < count; p += 2) {
      for (size_t i = 0; i < live; ++i) {
        const float* gate = r + (p * TILE + i) * LANES;
        const float* up = gate + TILE * LANES;
        float* out = h + (t + i) * stride + (panel + p) / 2 * PANEL;
        for (size_t n = 0; n < LANES; ++n) out[n] = gate[n] * sigmoid(gate[n]) * up[n];
      }
    }
  });
}

template <class T>
void tile_as(const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, T* out) {
  static thread_local Buffer<T> scratch;
  const size_t padded = round_up(depth, STEP), width = tile_width(tokens);
  T* row = width == 1 ? out : scratch.reserve(padded);
  for (size_t t = 0; t < width; ++t) {
    const size_t n = t < tokens ? depth : 0;
    narrow(x + (token && t < tokens ? token[t] : t) * stride, n, row);
    std::memset(row + n, 0, (padded - n) * sizeof(T));
    if (width == 1) return;
    // Pairs of bfloat16 stay together; single floats stand alone. Either is four bytes.
    const size_t words = padded * sizeof(T) / 4;
    for (size_t k = 0; k < words; ++k)
      std::memcpy(reinterpret_cast<char*>(out) + (k * width + t) * 4, reinterpret_cast<char*>(row) + k * 4, 4);
  }
}

// Tiles [begin, end) of a product's tokens.
void tile(bool as_float, const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, void* out,
          size_t begin, size_t end) {
  const size_t size = TILE * round_up(depth, STEP);
  for (size_t i = begin; i < end; ++i) {
    const size_t first = i * TILE, live = std::min(TILE, tokens - first);
    const float* rows = token ? x : x + first * stride;
    const int32_t* picked = token ? token + first : nullptr;
    if (as_float)
      tile_as(rows, stride, picked, live, depth, static_cast<float*>(out) + i * size);
    else
      tile_as(rows, stride, picked, live, depth, static_cast<bf16*>(out) + i * size);
  }
}

}  // namespace

extern const Gemm gemm;
const Gemm gemm = {linear, linear_add, gated, tile};

}  // namespace NS
