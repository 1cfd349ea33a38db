// Absorbed multi-head latent attention over selected cache rows, a few heads of one token at a time.
//
// A row is padded with zeros to a multiple of ROW_PAD values; one of an fp8 pool is widened first. Scores, softmax,
// then the weighted sum of the rows' first C values; rows in the order of their ids.
#include <algorithm>

#include "e4m3.h"
#include "panels.h"
#include "table.h"
#if defined(__AMX_BF16__)
#include "tiles.h"
#endif

namespace NS {
namespace {

constexpr size_t ROWS = 4;  // rows scored together

// What differs between pools of float and of bfloat16: 32 values of a row against 32 of a query, and of two rows.
struct Float {
  using Value = float;
  static void dot(F16& sum, const float* row, const float* q) {
    sum.fma(F16::load(row), F16::load(q));
    sum.fma(F16::load(row + LANES), F16::load(q + LANES));
  }
  struct Two {
    F16 a[2], b[2];
    Two(const float* x, const float* y)
        : a{F16::load(x), F16::load(x + LANES)}, b{F16::load(y), F16::load(y + LANES)} {}
    void add(F16& low, F16& high, const float* p) const {
      const F16 first = F16::all(p[0]), second = F16::all(p[1]);
      low.fma(a[0], first);
      high.fma(a[1], first);
      low.fma(b[0], second);
      high.fma(b[1], second);
    }
  };
  static void store(F16 low, F16 high, float* out) {
    low.store(out);
    high.store(out + LANES);
  }
};

struct Half {
  using Value = bf16;
  static void dot(F16& sum, const bf16* row, const bf16* q) { Pairs::dot(sum, Pairs::load(row), Pairs::load(q)); }
  struct Two {
    Pairs low, high;
    Two(const bf16* x, const bf16* y) { Pairs::interleave(x, y, low, high); }
    void add(F16& l, F16& h, const bf16* p) const {
      const Pairs both = Pairs::all(p);
      Pairs::dot(l, low, both);
      Pairs::dot(h, high, both);
    }
  };
  static void store(F16 low, F16 high, float* out) { Pairs::store_interleaved(low, high, out); }
};

// scores[h][i] = scale * q[h] . row(ids[i]) for count rounded up to ROWS; the last row stands in for missing ones.
template <class E, int H>
void score(const MlaArgs& a, const typename E::Value* q, float* scores, size_t padded) {
  const auto* pool = static_cast<const typename E::Value*>(a.rows);
  for (size_t i = 0; i < a.count; i += ROWS) {
    const typename E::Value* row[ROWS];
    for (size_t r = 0; r < ROWS; ++r) row[r] = pool + a.ids[std::min(i + r, a.count - 1)] * a.layout.stride();
    if (i + 2 * ROWS < a.count) {
      for (size_t r = 0; r < ROWS; ++r) {
        const auto* next =
            reinterpret_cast<const char*>(pool + a.ids[std::min(i + ROWS + r, a.count - 1)] * a.layout.stride());
        for (size_t line = 0; line < a.layout.stride() * sizeof(typename E::Value); line += 64)
          __builtin_prefetch(next + line);
      }
    }
    F16 acc[H][ROWS];
    for (auto& of_head : acc) {
      for (F16& s : of_head) s = F16::zero();
    }
    for (size_t z = 0; z < a.layout.stride(); z += ROW_PAD) {
      for (int h = 0; h < H; ++h) {
        for (size_t r = 0; r < ROWS; ++r) E::dot(acc[h][r], row[r] + z, q + h * a.layout.stride() + z);
      }
    }
    for (int h = 0; h < H; ++h) sum_four(acc[h], a.scale, scores + h * padded + i);
  }
}

float highest(const float* s, size_t count) {
  float lanes[LANES];
  std::fill_n(lanes, LANES, s[0]);
  const size_t whole = count - count % LANES;
  for (size_t i = 0; i < whole; i += LANES) {
    for (size_t k = 0; k < LANES; ++k) lanes[k] = s[i + k] > lanes[k] ? s[i + k] : lanes[k];
  }
  float most = *std::max_element(lanes, lanes + LANES);
  for (size_t i = whole; i < count; ++i) most = s[i] > most ? s[i] : most;
  return most;
}

// Probabilities as the rows' own type and, as the last step, what to multiply the sums with.
template <class E>
float softmax(float* s, size_t count, size_t padded, typename E::Value* p) {
  const float largest = highest(s, count);
  for (size_t i = 0; i < count; ++i) s[i] = exp_fast(s[i] - largest);
  for (size_t i = count; i < padded; ++i) s[i] = 0.0f;
  narrow(s, padded, p);
  F16 total = F16::zero();
  for (size_t i = 0; i < padded; i += LANES) total = total + F16::load(p + i);
  return 1.0f / sum(total);
}

template <class E, int H>
void gather(const MlaArgs& a, const typename E::Value* p, size_t padded, const float* inverse, float* out) {
  const auto* pool = static_cast<const typename E::Value*>(a.rows);
  constexpr int BLOCKS = 2;  // of 32 values
  const size_t width = round_up(a.layout.latent, ROW_PAD);
  for (size_t c = 0; c < width; c += BLOCKS * ROW_PAD) {
    const int blocks = c + ROW_PAD < width ? BLOCKS : 1;
    F16 acc[H][BLOCKS][2];
    for (auto& of_head : acc) {
      for (auto& of_block : of_head) of_block[0] = of_block[1] = F16::zero();
    }
    for (size_t i = 0; i < a.count; i += 2) {
      const auto* x = pool + a.ids[i] * a.layout.stride() + c;
      const auto* y = pool + a.ids[std::min(i + 1, a.count - 1)] * a.layout.stride() + c;
      for (int b = 0; b < blocks; ++b) {
        const typename E::Two two(x + b * ROW_PAD, y + b * ROW_PAD);
        for (int h = 0; h < H; ++h) two.add(acc[h][b][0], acc[h][b][1], p + h * padded + i);
      }
    }
    for (int h = 0; h < H; ++h) {
      for (int b = 0; b < blocks; ++b) {
        float values[ROW_PAD];
        E::store(acc[h][b][0] * F16::all(inverse[h]), acc[h][b][1] * F16::all(inverse[h]), values);
        const size_t at = c + b * ROW_PAD;
        std::memcpy(out + h * a.layout.latent + at, values, std::min(ROW_PAD, a.layout.latent - at) * sizeof(float));
      }
    }
  }
}

template <class E, int H>
void attend_heads(const MlaArgs& a, size_t first, float* out) {
  using Value = typename E::Value;
  static thread_local Buffer<Value> queries, probabilities;
  static thread_local Buffer<float> scratch;
  const size_t padded = round_up(a.count, LANES);
  Value* q = queries.reserve(H * a.layout.stride());
  for (int h = 0; h < H; ++h) {
    Value* to = q + h * a.layout.stride();
    narrow(a.q_latent + (first + h) * a.layout.latent, a.layout.latent, to);
    narrow(a.q_rope + (first + h) * a.rope_stride, a.layout.rotary, to + a.layout.latent);
    std::memset(to + a.layout.latent + a.layout.rotary, 0,
                (a.layout.stride() - a.layout.latent - a.layout.rotary) * sizeof(Value));
  }
  float* scores = scratch.reserve(H * padded);
  Value* p = probabilities.reserve(H * padded);
  score<E, H>(a, q, scores, padded);
  float inverse[H];
  for (int h = 0; h < H; ++h) inverse[h] = softmax<E>(scores + h * padded, a.count, padded, p + h * padded);
  gather<E, H>(a, p, padded, inverse, out + first * a.layout.latent);
}

template <class E>
void attend_as(const MlaArgs& a, size_t begin, size_t end, float* out) {
  size_t h = begin;
  for (; h + 4 <= end; h += 4) attend_heads<E, 4>(a, h, out);
  for (; h + 2 <= end; h += 2) attend_heads<E, 2>(a, h, out);
  for (; h < end; ++h) attend_heads<E, 1>(a, h, out);
}

// The row as bfloat16, exactly, padded with zeros.
void widen_row(const uint8_t* row, const RowLayout& r, bf16* out) {
  float scale[64];
  for (size_t first = 0; first < r.groups(); first += 64) {
    const size_t groups = std::min<size_t>(64, r.groups() - first);
    std::memcpy(scale, row + r.latent + first * sizeof(float), groups * sizeof(float));
    for (size_t g = 0; g < groups; ++g) {
      const size_t begin = (first + g) * ROW_GROUP, end = std::min(begin + ROW_GROUP, r.latent);
      for (size_t i = begin; i < end; ++i) narrow(e4m3_value(row[i]) * scale[g], out[i]);
    }
  }
  std::memcpy(out + r.latent, row + r.latent + r.groups() * sizeof(float), r.rotary * sizeof(bf16));
  std::memset(out + r.latent + r.rotary, 0, (r.stride() - r.latent - r.rotary) * sizeof(bf16));
}

#if defined(__AMX_BF16__)

constexpr size_t PIECE = 32;  // values of a row, or rows, that one instruction sums

// scores[h][i], heads and rows padded to UNIT: rows are the unit's tokens and heads its weights, whose pairs stand in
// q [stride / 2][UNIT][2].
void score_unit(const MlaArgs& a, const bf16* q, size_t heads, float* scores, size_t padded) {
  static thread_local Buffer<bf16> gathered;
  const size_t stride = a.layout.stride();
  const auto* pool = static_cast<const bf16*>(a.rows);
  bf16* scratch = gathered.reserve(UNIT * stride);
  shape_tiles(UNIT, UNIT);
  for (size_t i = 0; i < a.count; i += UNIT) {
    const size_t last = std::min(i + UNIT, a.count) - 1;
    const bf16* rows = pool + a.ids[i] * stride;
    if (last - i < UNIT - 1 || a.ids[last] - a.ids[i] != UNIT - 1) {
      for (size_t r = 0; r < UNIT; ++r) {
        const bf16* row = pool + a.ids[std::min(i + r, last)] * stride;
        const bf16* later = pool + a.ids[std::min(i + UNIT + r, a.count - 1)] * stride;
        for (size_t z = 0; z < stride; z += PIECE) {
          __builtin_prefetch(later + z);
          Pairs::load(row + z).store(scratch + r * stride + z);
        }
      }
      rows = scratch;
    }
    before_tile_loads();
    // Two chains, for one alone waits for itself.
    _tile_zero(0);
    _tile_zero(1);
    for (size_t z = 0; z < stride; z += 2 * PIECE) {
      _tile_loadd(4, rows + z, stride * sizeof(bf16));
      _tile_loadd(6, q + z * UNIT, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (z + PIECE == stride) break;
      _tile_loadd(5, rows + z + PIECE, stride * sizeof(bf16));
      _tile_loadd(7, q + (z + PIECE) * UNIT, 64);
      _tile_dpbf16ps(1, 5, 7);
    }
    alignas(64) float sums[2][UNIT * UNIT];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    const __m512i row = _mm512_mullo_epi32(_mm512_set1_epi32(UNIT),
                                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (size_t h = 0; h < heads; ++h) {
      const F16 even = {_mm512_i32gather_ps(row, sums[0] + h, 4)}, odd = {_mm512_i32gather_ps(row, sums[1] + h, 4)};
      ((even + odd) * F16::all(a.scale)).store(scores + h * padded + i);
    }
  }
}

// Columns [c, c + 32 * blocks) of the rows as pairs of rows: to [padded / 32][2 * blocks][UNIT][UNIT][2].
void pair_rows(const MlaArgs& a, size_t c, size_t blocks, size_t padded, bf16* to) {
  const auto* pool = static_cast<const bf16*>(a.rows);
  const size_t stride = a.layout.stride(), tile = UNIT * UNIT * 2;
  for (size_t i = 0; i < padded; i += 2) {
    bf16* at = to + i / PIECE * 2 * blocks * tile + i % PIECE / 2 * 2 * UNIT;
    for (size_t b = 0; b < blocks; ++b) {
      const size_t column = c + b * ROW_PAD;
      Pairs low = {_mm512_setzero_si512()}, high = low;
      if (i < a.count) {
        const auto* x = pool + a.ids[i] * stride + column;
        Pairs::interleave(x, pool + a.ids[std::min(i + 1, a.count - 1)] * stride + column, low, high);
      }
      _mm512_store_si512(at + 2 * b * tile, low.v);
      _mm512_store_si512(at + (2 * b + 1) * tile, high.v);
    }
  }
  before_tile_loads();
}

// Of a few heads, the columns that ``pair_rows`` left: out [heads, latent].
void mix_unit(const MlaArgs& a, const bf16* p, const float* inverse, size_t heads, const bf16* paired, size_t c,
              size_t blocks, size_t padded, float* out) {
  const size_t tile = UNIT * UNIT * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t i = 0; i < padded; i += PIECE, paired += 2 * blocks * tile) {
    _tile_loadd(4, p + i, padded * sizeof(bf16));
    _tile_loadd(6, paired, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, paired + tile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (blocks == 1) continue;
    _tile_loadd(6, paired + 2 * tile, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, paired + 3 * tile, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
  alignas(64) float sums[4][UNIT * UNIT];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (size_t h = 0; h < heads; ++h) {
    for (size_t b = 0; b < blocks; ++b) {
      float values[ROW_PAD];
      const F16 scale = F16::all(inverse[h]);
      Half::store(F16::load(sums[2 * b] + h * UNIT) * scale, F16::load(sums[2 * b + 1] + h * UNIT) * scale, values);
      const size_t at = c + b * ROW_PAD;
      std::memcpy(out + h * a.layout.latent + at, values, std::min(ROW_PAD, a.layout.latent - at) * sizeof(float));
    }
  }
}

// Heads' queries as bfloat16 pairs, [stride / 2][UNIT][2], missing heads zero.
void pair_queries(const MlaArgs& a, size_t first, size_t heads, bf16* to) {
  static thread_local Buffer<bf16> row_of;
  const size_t stride = a.layout.stride();
  bf16* row = row_of.reserve(stride);
  std::memset(to, 0, stride * UNIT * sizeof(bf16));
  std::memset(row, 0, stride * sizeof(bf16));
  for (size_t h = 0; h < heads; ++h) {
    narrow(a.q_latent + (first + h) * a.layout.latent, a.layout.latent, row);
    narrow(a.q_rope + (first + h) * a.rope_stride, a.layout.rotary, row + a.layout.latent);
    for (size_t k = 0; k < stride; k += 2) std::memcpy(to + k * UNIT + 2 * h, row + k, 2 * sizeof(bf16));
  }
}

// The same as ``attend_as`` by the matrix unit, sixteen heads at a time.
void attend_units(const MlaArgs& a, size_t begin, size_t end, float* out) {
  static thread_local Buffer<bf16> queries, probabilities, pairs;
  static thread_local Buffer<float> scratch;
  const size_t H = end - begin, units = (H + UNIT - 1) / UNIT, padded = round_up(a.count, PIECE),
               stride = a.layout.stride();
  bf16* q = queries.reserve(UNIT * stride);
  bf16* p = probabilities.reserve(units * UNIT * padded);
  float* scores = scratch.reserve(UNIT * padded + units * UNIT);
  float* inverse = scores + UNIT * padded;
  for (size_t h = 0; h < H; h += UNIT) {
    const size_t heads = std::min(UNIT, H - h);
    pair_queries(a, begin + h, heads, q);
    score_unit(a, q, heads, scores, padded);
    for (size_t k = 0; k < heads; ++k)
      inverse[h + k] = softmax<Half>(scores + k * padded, a.count, padded, p + (h + k) * padded);
  }
  const size_t width = round_up(a.layout.latent, ROW_PAD);
  bf16* paired = pairs.reserve(padded * 2 * ROW_PAD);
  for (size_t c = 0; c < width; c += 2 * ROW_PAD) {
    const size_t blocks = c + ROW_PAD < width ? 2 : 1;
    pair_rows(a, c, blocks, padded, paired);
    for (size_t h = 0; h < H; h += UNIT) {
      const size_t heads = std::min(UNIT, H - h);
      shape_tiles(heads, heads);
      mix_unit(a, p + h * padded, inverse + h, heads, paired, c, blocks, padded, out + (begin + h) * a.layout.latent);
    }
  }
}

#endif

void attend_bf16(const MlaArgs& a, size_t begin, size_t end, float* out) {
#if defined(__AMX_BF16__)
  attend_units(a, begin, end, out);
#else
  attend_as<Half>(a, begin, end, out);
#endif
}

// Over fp8 the selected rows are first brought to a pool of their own.
void attend_widened(const MlaArgs& a, size_t begin, size_t end, float* out) {
  static thread_local Buffer<bf16> rows;
  static thread_local Buffer<int32_t> ids;
  const size_t stride = a.layout.stride(), bytes = a.layout.bytes();
  bf16* to = rows.reserve(a.count * stride);
  int32_t* places = ids.reserve(a.count);
  for (size_t i = 0; i < a.count; ++i) {
    widen_row(static_cast<const uint8_t*>(a.rows) + a.ids[i] * bytes, a.layout, to + i * stride);
    places[i] = static_cast<int32_t>(i);
  }
  MlaArgs widened = a;
  widened.layout.format = Format::bf16, widened.rows = to, widened.ids = places;
  attend_bf16(widened, begin, end, out);
}

void attend(const MlaArgs& a, size_t begin, size_t end, float* out) {
  if (a.layout.format == Format::f32)
    attend_as<Float>(a, begin, end, out);
  else if (a.layout.format == Format::bf16)
    attend_bf16(a, begin, end, out);
  else
    attend_widened(a, begin, end, out);
}

void write_fp8(const float* x, const RowLayout& r, uint8_t* row) {
  for (size_t g = 0; g < r.groups(); ++g) {
    const size_t begin = g * ROW_GROUP, end = std::min(begin + ROW_GROUP, r.latent);
    const float scale = power_of_two(x + begin, end - begin), inverse = 1.0f / scale;
    for (size_t i = begin; i < end; ++i) row[i] = e4m3(x[i] * inverse);
    std::memcpy(row + r.latent + g * sizeof(float), &scale, sizeof scale);
  }
  uint8_t* rest = row + r.latent + r.groups() * sizeof(float);
  for (size_t i = 0; i < r.rotary; ++i) {
    bf16 value;
    narrow(x[r.latent + i], value);
    std::memcpy(rest + i * sizeof value, &value, sizeof value);
  }
}

void write_row(const float* x, const RowLayout& r, void* pool, size_t row) {
  const size_t n = r.latent + r.rotary, stride = r.stride();
  const auto write = [&](auto* to) {
    narrow(x, n, to);
    std::memset(to + n, 0, (stride - n) * sizeof(*to));
  };
  if (r.format == Format::f32)
    write(static_cast<float*>(pool) + row * stride);
  else if (r.format == Format::bf16)
    write(static_cast<bf16*>(pool) + row * stride);
  else
    write_fp8(x, r, static_cast<uint8_t*>(pool) + row * r.bytes());
}

}  // namespace

extern const Mla mla;
const Mla mla = {MATRIX_UNIT<bf16> ? 4 * LANES : 4, attend, write_row};

}  // namespace NS
