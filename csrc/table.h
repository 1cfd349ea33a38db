// What every instruction set offers, as tables of functions, one a family; a caller picks a set when it starts.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "matrix.h"

// Rows of a latent pool are padded with zeros to a multiple of this, except in fp8.
constexpr size_t ROW_PAD = 32;
// And a head's scores to a multiple of this.
constexpr size_t SCORE_PAD = 32;
// Values of an fp8 row that share a scale.
constexpr size_t ROW_GROUP = 128;

// How a cache holds its rows, f32, bf16 or fp8, and how many bytes that is.
//
//   fp8:  latent values, E4M3 | their scales, fp32 | the rotated key, bf16;   index keys: E4M3 and a scale each
struct RowLayout {
  Format format;
  size_t latent, rotary;
  size_t stride() const { return round_up(latent + rotary, ROW_PAD); }
  size_t groups() const { return (latent + ROW_GROUP - 1) / ROW_GROUP; }
  size_t bytes() const {
    return format == Format::fp8 ? latent + groups() * sizeof(float) + 2 * rotary
                                 : stride() * (format == Format::f32 ? 4 : 2);
  }
};

// Sixteen index keys of a pool.
inline size_t key_panel_bytes(Format f, size_t depth) {
  return PANEL * (f == Format::fp8 ? depth + sizeof(float) : depth * (f == Format::f32 ? 4 : 2));
}

// x is tiled, in a layout of the instruction set's own; panels [begin, end) are computed; y and h are float with a
// stride between tokens.
struct Gemm {
  // y[t, n] = w[n] . x[t]
  void (*linear)(const Matrix& w, const void* x, size_t tokens, float* y, size_t stride, size_t begin, size_t end);
  // y[token[i], n] += weight[i] * w[n] . x[i]; without token i itself, without weight 1
  void (*linear_add)(const Matrix& w, const void* x, size_t tokens, const int32_t* token, const float* weight, float* y,
                     size_t stride, size_t begin, size_t end);
  // h[t, n] = silu(gate . x[t]) * (up . x[t]); w alternates panels of gate and up, begin and end count pairs of them
  void (*gated)(const Matrix& w, const void* x, size_t tokens, float* h, size_t stride, size_t begin, size_t end);
  // Tiles [begin, end) of rows x[token[i]] (or x[i]), rounded
  void (*tile)(Rounding r, const float* x, size_t stride, const int32_t* token, size_t tokens, size_t depth, void* out,
               size_t begin, size_t end);
  // Bytes of all tiles of that many tokens, a multiple of 4, and the number of tiles
  size_t (*tiled_bytes)(Rounding r, size_t tokens, size_t depth);
  size_t (*num_tiles)(Rounding r, size_t tokens);
};

struct Norm {
  void (*rms_norm)(const float* x, const float* w, float eps, size_t n, float* out);
  void (*layer_norm)(const float* x, const float* w, const float* b, float eps, size_t n, float* out);
  // bfloat16 to float
  void (*widen)(const uint16_t* x, size_t n, float* out);
  // Rotates interleaved pairs in place.
  void (*rope)(float* x, const float* cos, const float* sin, size_t pairs);
  // Sigmoid router: the bias chooses and never weighs, ties go to the lowest expert.
  void (*route)(const float* logits, const float* bias, size_t experts, size_t k, float scale, bool normalize,
                int32_t* ids, float* weights);
};

// One token's attention: heads q_latent [H, latent] and q_rope [H, rope_stride] against `count` rows of the pool.
struct MlaArgs {
  RowLayout layout;
  const void* rows;
  size_t heads, rope_stride;
  const float *q_latent, *q_rope;
  const int32_t* ids;
  size_t count;
  float scale;
  // Scores of a head, and how far they lie from the next one's: by powers of two all would share a few places of a
  // cache.
  size_t padded() const { return round_up(count, SCORE_PAD); }
  size_t apart() const { return padded() + PANEL; }
};

// Probabilities p of H heads and `padded` rows, rounded like activations of the rows' type, in a layout of the
// instruction set's own, and what the sums they weigh are multiplied with.
struct Softened {
  void* p;
  float* inverse;
};

// What threads may share between them: rows, heads, then columns.
struct Mla {
  // Rows [begin, end) of an fp8 selection as bfloat16 [count, stride], for which the other three then stand
  void (*widen)(const MlaArgs& a, size_t begin, size_t end, uint16_t* out);
  // Scores [H, apart] of rows [begin, end), multiples of SCORE_PAD
  void (*score)(const MlaArgs& a, size_t begin, size_t end, float* scores);
  // Softmax of heads [begin, end); the scores are lost
  void (*soften)(const MlaArgs& a, size_t begin, size_t end, float* scores, const Softened& s);
  // Columns [begin, end), multiples of 2 * ROW_PAD but the last, of out [H, latent]
  void (*mix)(const MlaArgs& a, const Softened& s, size_t begin, size_t end, float* out);
  // x [latent + rotary] into a row of the pool
  void (*write_row)(const float* x, const RowLayout& layout, void* pool, size_t row);
};

// A search among the keys of one sequence, which lie in panels of 16 rows.
struct IndexArgs {
  Format format;
  size_t heads, depth;
  const void* keys;
  const int32_t* table;
  size_t page_size, keep;
  float scale;
};

// One token's part in it: q is tiled with heads in the place of tokens; positions before `end` are visible. `best` has
// room for 2 * keep + 64: (score, position) in one number, `found` of them by position.
struct IndexQuery {
  const void* q;
  const float* weights;
  size_t end;
  uint64_t* best;
  size_t found = 0;
  uint64_t threshold = 0;   // what is not above it is not among the best
  float floor = -INFINITY;  // its score
};

struct Index {
  // The best `keep` of each query's positions from `begin`, a multiple of 64, on. Keys are read once for all queries.
  void (*scan)(const IndexArgs& a, size_t begin, IndexQuery* queries, size_t count);
  void (*write_key)(const float* x, size_t depth, Format format, void* pool, size_t row);
};

struct Stream {
  // Reads [begin, end) once; the result depends on every value, so that none can be left out.
  float (*read)(const float* data, size_t begin, size_t end);
};

struct Table {
  const char* name;
  const Gemm& gemm;
  const Norm& norm;
  const Mla& mla;
  const Index& index;
  const Stream& stream;
};

#define GLM52_DECLARE(NS)     \
  namespace NS {              \
  extern const Gemm gemm;     \
  extern const Norm norm;     \
  extern const Mla mla;       \
  extern const Index index;   \
  extern const Stream stream; \
  }
GLM52_DECLARE(base)
GLM52_DECLARE(avx2)
GLM52_DECLARE(avx512)
GLM52_DECLARE(amx)
#undef GLM52_DECLARE
