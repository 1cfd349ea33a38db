// Absorbed multi-head latent attention of one token over selected cache rows.
//
// A row is padded with zeros to a multiple of ROW_PAD values; one of an fp8 pool is widened first. Scores, softmax,
// then the weighted sum of the rows' first C values; rows in the order of their ids.
#include <algorithm>
#include <type_traits>

#include "e4m3.h"
#include "panels.h"
#include "table.h"

namespace NS {
namespace {

// What differs between pools of float and of bfloat16. ROW_PAD values of a row are two vectors, of queries too; which
// values are in which is a set's own matter.

// Sixteen values as floats.
inline F16 half_of(const float* row, size_t i) { return F16::load(row + i * LANES); }
#if !defined(__AVX512F__)
// Those at even places, or at odd ones.
inline F16 half_of(const bf16* row, size_t i) { return F16::of_pairs(row, i); }
#endif

// Where pairs are not multiplied as they are, and for floats everywhere.
template <class V, class Q>
struct ByFloats {
  using Value = V;
  using Query = Q;
  static void dot(F16& sum, const V* row, const Q* q) {
    for (size_t i = 0; i < 2; ++i) sum.fma(half_of(row, i), F16::load(q + i * LANES));
  }
  // Adds rows x and y, times p[h][0] and p[h][1], to sums of each head.
  template <size_t H>
  static void add(const V* x, const V* y, const Q* p, size_t stride, F16 (&sums)[H][2]) {
    for (size_t row = 0; row < 2; ++row) {
      for (size_t i = 0; i < 2; ++i) {
        const F16 values = half_of(row ? y : x, i);
        for (size_t h = 0; h < H; ++h) sums[h][i].fma(values, F16::all(widen(p[h * stride + row])));
      }
    }
  }
};

struct Float : ByFloats<float, float> {
  static void round_query(const float* x, size_t n, float* q) { narrow(x, n, q); }
  static void store(F16 low, F16 high, float* out) {
    low.store(out);
    high.store(out + LANES);
  }
};

#if defined(__AVX512F__)
struct Half {
  using Value = bf16;
  using Query = bf16;
  static void dot(F16& sum, const bf16* row, const bf16* q) { Pairs::dot(sum, Pairs::load(row), Pairs::load(q)); }
  template <size_t H>
  static void add(const bf16* x, const bf16* y, const bf16* p, size_t stride, F16 (&sums)[H][2]) {
    Pairs low, high;
    Pairs::interleave(x, y, low, high);
    for (size_t h = 0; h < H; ++h) {
      const Pairs both = Pairs::all(p + h * stride);
      Pairs::dot(sums[h][0], low, both);
      Pairs::dot(sums[h][1], high, both);
    }
  }
  static void round_query(const float* x, size_t n, bf16* q) { narrow(x, n, q); }
  static void store(F16 low, F16 high, float* out) { Pairs::store_interleaved(low, high, out); }
};
#else
struct Half : ByFloats<bf16, Rounded> {
  static void round_query(const float* x, size_t n, Rounded* q) {
    for (size_t k = 0; k < n; k += ROW_PAD) {
      for (size_t i = 0; i < LANES; ++i) {
        narrow(x[k + 2 * i], q[k + i]);
        narrow(x[k + 2 * i + 1], q[k + LANES + i]);
      }
    }
  }
  static void store(F16 even, F16 odd, float* out) { F16::store_pairs(even, odd, out); }
};
#endif

// Heads that are computed together at most.
constexpr size_t MOST_HEADS = FEW_REGISTERS ? 2 : 8;

// Sums of 32 columns, from `column` on, as a head's output.
template <class E>
void put(const MlaArgs& a, F16 low, F16 high, float inverse, size_t column, float* of_head) {
  float values[ROW_PAD];
  E::store(low * F16::all(inverse), high * F16::all(inverse), values);
  std::memcpy(of_head + column, values, std::min(ROW_PAD, a.layout.latent - column) * sizeof(float));
}

// Row number i of the selection; the last one stands in for those beyond it.
template <class V>
const V* row_of(const MlaArgs& a, size_t i) {
  return static_cast<const V*>(a.rows) + a.ids[std::min(i, a.count - 1)] * a.layout.stride();
}

// Query of a head, padded like a row.
template <class E>
void load_query(const MlaArgs& a, size_t head, typename E::Query* to) {
  static thread_local Buffer<float> scratch;
  float* q = scratch.reserve(a.layout.stride());
  float* rotary = std::copy_n(a.q_latent + head * a.layout.latent, a.layout.latent, q);
  float* end = std::copy_n(a.q_rope + head * a.rope_stride, a.layout.rotary, rotary);
  std::fill(end, q + a.layout.stride(), 0.0f);
  E::round_query(q, a.layout.stride(), to);
}

// scores[h][i] = scale * q[h] . row i
template <class E, size_t H>
void score_heads(const MlaArgs& a, const typename E::Query* q, size_t begin, size_t end, float* scores) {
  using Value = typename E::Value;
  constexpr size_t ROWS = H == MOST_HEADS ? 2 : 4, FETCHED = 8;  // rows scored together, and fetched ahead
  const size_t stride = a.layout.stride(), apart = a.apart();
  for (size_t i = begin; i < end; i += ROWS) {
    const Value *row[ROWS], *later[ROWS];
    for (size_t r = 0; r < ROWS; ++r) {
      row[r] = row_of<Value>(a, i + r);
      later[r] = row_of<Value>(a, i + FETCHED + r);
    }
    F16 acc[H][ROWS];
    for (auto& of_head : acc) {
      for (F16& s : of_head) s = F16::zero();
    }
    for (size_t z = 0; z < stride; z += ROW_PAD) {
      for (size_t r = 0; r < ROWS; ++r) fetch(later[r] + z);
      for (size_t h = 0; h < H; ++h) {
        for (size_t r = 0; r < ROWS; ++r) E::dot(acc[h][r], row[r] + z, q + h * stride + z);
      }
    }
    for (size_t h = 0; h < H; h += 4 / ROWS) {
      float four[4];
      sum_four(acc[h], a.scale, four);
      for (size_t k = 0; k < 4; ++k) scores[(h + k / ROWS) * apart + i + k % ROWS] = four[k];
    }
  }
}

// Calls of<H>(h) for all heads, as many at a time as may be.
template <size_t H = MOST_HEADS, class Of>
void by_heads(size_t heads, Of of, size_t h = 0) {
  for (; h + H <= heads; h += H) of(std::integral_constant<size_t, H>(), h);
  if constexpr (H > 1) by_heads<H / 2>(heads, of, h);
}

template <class E>
void score_as(const MlaArgs& a, size_t begin, size_t end, float* scores) {
  static thread_local Buffer<typename E::Query> queries;
  const size_t stride = a.layout.stride();
  auto* q = queries.reserve(a.heads * stride);
  for (size_t h = 0; h < a.heads; ++h) load_query<E>(a, h, q + h * stride);
  by_heads(a.heads,
           [&](auto H, size_t h) { score_heads<E, H()>(a, q + h * stride, begin, end, scores + h * a.apart()); });
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

// Probabilities, rounded, SCORE_PAD of them each `apart` values; returns what is left to multiply the sums with.
template <class V>
float soften_as(float* s, size_t count, size_t padded, V* p, size_t apart) {
  const float largest = highest(s, count);
  for (size_t i = 0; i < count; ++i) s[i] = exp_fast(s[i] - largest);
  std::fill(s + count, s + padded, 0.0f);
  F16 total = F16::zero();
  for (size_t i = 0; i < padded; i += SCORE_PAD, p += apart) {
    narrow(s + i, SCORE_PAD, p);
    for (size_t k = 0; k < SCORE_PAD; k += LANES) total = total + F16::load(p + k);
  }
  return 1.0f / sum(total);
}

// Heads' sums of BLOCKS times 32 columns from `column` on, all in registers.
template <class E, size_t H, size_t BLOCKS>
void mix_columns(const MlaArgs& a, const typename E::Query* p, const float* inverse, size_t column, float* out) {
  using Value = typename E::Value;
  const size_t padded = a.padded();
  F16 acc[BLOCKS][H][2];
  for (auto& of_block : acc) {
    for (auto& of_head : of_block) of_head[0] = of_head[1] = F16::zero();
  }
  for (size_t i = 0; i < a.count; i += 2) {
    const Value *x = row_of<Value>(a, i) + column, *y = row_of<Value>(a, i + 1) + column;
    for (size_t b = 0; b < BLOCKS; ++b) E::add(x + b * ROW_PAD, y + b * ROW_PAD, p + i, padded, acc[b]);
  }
  for (size_t h = 0; h < H; ++h) {
    for (size_t b = 0; b < BLOCKS; ++b)
      put<E>(a, acc[b][h][0], acc[b][h][1], inverse[h], column + b * ROW_PAD, out + h * a.layout.latent);
  }
}

template <class E, size_t H>
void mix_heads(const MlaArgs& a, const typename E::Query* p, const float* inverse, size_t begin, size_t end,
               float* out) {
  size_t c = begin;
  if constexpr (H < MOST_HEADS) {
    for (; c + ROW_PAD < end; c += 2 * ROW_PAD) mix_columns<E, H, 2>(a, p, inverse, c, out);
  }
  for (; c < end; c += ROW_PAD) mix_columns<E, H, 1>(a, p, inverse, c, out);
}

template <class E>
void mix_as(const MlaArgs& a, const Softened& s, size_t begin, size_t end, float* out) {
  const auto* p = static_cast<const typename E::Query*>(s.p);
  by_heads(a.heads, [&](auto H, size_t h) {
    mix_heads<E, H()>(a, p + h * a.padded(), s.inverse + h, begin, end, out + h * a.layout.latent);
  });
}

#if defined(__AMX_BF16__)

// The same by the matrix unit. Rows are its tokens when they are scored, heads when rows are mixed. What it multiplies
// next is brought into a ring of tiles meanwhile: a tile's load waits for stores that are still on their way.

constexpr size_t TILE_VALUES = UNIT * UNIT * 2;
constexpr size_t PIECE = 32;  // values of a row, or rows, that one instruction sums
constexpr size_t RING = 4;
static_assert(PIECE == SCORE_PAD && PIECE == ROW_PAD);

// Sixteen vectors of sixteen words.
void transpose(__m512i (&v)[UNIT]) {
  __m512i w[UNIT];
  for (size_t i = 0; i < UNIT; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (size_t i = 0; i < UNIT; i += 4) {
    for (size_t k = 0; k < 2; ++k) {
      v[i + 2 * k] = _mm512_unpacklo_epi64(w[i + k], w[i + k + 2]);
      v[i + 2 * k + 1] = _mm512_unpackhi_epi64(w[i + k], w[i + k + 2]);
    }
  }
  for (size_t i = 0; i < 4; ++i) {  // quarters
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (size_t i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
  }
}

// Queries of each sixteen heads in pairs, [stride / 2][UNIT][2]; those of missing heads are zero.
void pair_queries(const MlaArgs& a, bf16* to) {
  static thread_local Buffer<bf16> rounded;
  const size_t stride = a.layout.stride(), padded = round_up(a.heads, UNIT);
  bf16* rows = rounded.reserve(padded * stride);
  for (size_t h = 0; h < a.heads; ++h) load_query<Half>(a, h, rows + h * stride);
  std::memset(rows + a.heads * stride, 0, (padded - a.heads) * stride * sizeof(bf16));
  for (size_t first = 0; first < padded; first += UNIT) {
    for (size_t z = 0; z < stride; z += PIECE) {
      __m512i pairs[UNIT];
      for (size_t h = 0; h < UNIT; ++h) pairs[h] = Pairs::load(rows + (first + h) * stride + z).v;
      transpose(pairs);
      for (size_t k = 0; k < UNIT; ++k) Pairs{pairs[k]}.store(to + first * stride + (z + 2 * k) * UNIT);
    }
  }
}

// Adds a piece of UNITS times sixteen rows times GROUPS times sixteen heads, `group` values apart, to the sums: those
// of the first heads, then of the second. The intrinsics take tiles as literals.
template <size_t UNITS, size_t GROUPS>
void score_piece(const bf16* rows, size_t row_bytes, const bf16* q, size_t group) {
  const bf16* next = rows + UNIT * row_bytes / sizeof(bf16);
  _tile_loadd(6, q, 64);
  _tile_loadd(4, rows, row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, next, row_bytes);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (GROUPS == 2) {
    _tile_loadd(7, q + group, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  } else if constexpr (UNITS == 4) {
    next += UNIT * row_bytes / sizeof(bf16);
    _tile_loadd(4, next, row_bytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, next + UNIT * row_bytes / sizeof(bf16), row_bytes);
    _tile_dpbf16ps(3, 5, 6);
  }
}

// Sums of rows from i on: as they lie where they do so in a row, or copied piece by piece.
template <size_t UNITS, size_t GROUPS>
void score_sums(const MlaArgs& a, size_t i, const bf16* q) {
  constexpr size_t ROWS = UNITS * UNIT;
  const size_t stride = a.layout.stride(), group = UNIT * stride;
  const bf16* row[ROWS];
  bool in_a_row = true;  // each of them: pages may lie in any order
  for (size_t r = 0; r < ROWS; ++r) {
    row[r] = row_of<bf16>(a, i + r);
    in_a_row &= row[r] == row[0] + r * stride;
  }
  zero_sums();
  if (in_a_row) {
    for (size_t z = 0; z < stride; z += PIECE)
      score_piece<UNITS, GROUPS>(row[0] + z, stride * sizeof(bf16), q + z * UNIT, group);
    return;
  }
  alignas(64) bf16 ring[RING][ROWS * PIECE];
  const auto copy = [&](size_t z) {
    if (z >= stride) return;
    for (size_t r = 0; r < ROWS; ++r) Pairs::load(row[r] + z).store(ring[z / PIECE % RING] + r * PIECE);
  };
  copy(0);
  copy(PIECE);
  for (size_t z = 0; z < stride; z += PIECE) {
    copy(z + 2 * PIECE);
    before_tile_loads();
    score_piece<UNITS, GROUPS>(ring[z / PIECE % RING], 64, q + z * UNIT, group);
  }
}

// Scores of UNITS times sixteen rows from i on for GROUPS times sixteen heads from `first` on.
template <size_t UNITS, size_t GROUPS>
void score_tile(const MlaArgs& a, size_t i, size_t first, const bf16* q, float* scores) {
  score_sums<UNITS, GROUPS>(a, i, q + first * a.layout.stride());
  alignas(64) float sums[4][UNIT * UNIT];
  store_sums(sums);
  for (size_t s = 0; s < UNITS * GROUPS; ++s) {
    const size_t head = first + s / UNITS * UNIT;
    __m512i of[UNIT];
    for (size_t r = 0; r < UNIT; ++r) of[r] = _mm512_load_si512(sums[s] + r * UNIT);
    transpose(of);
    for (size_t h = 0; h < std::min(UNIT, a.heads - head); ++h) {
      const F16 row = {_mm512_castsi512_ps(of[h])};
      (row * F16::all(a.scale)).store(scores + (head + h) * a.apart() + i + s % UNITS * UNIT);
    }
  }
}

// Rows [begin, end), which are still in the second cache when further heads come.
void score_stretch(const MlaArgs& a, size_t begin, size_t end, const bf16* q, float* scores) {
  size_t first = 0;
  for (; first + UNIT < a.heads; first += 2 * UNIT) {
    for (size_t i = begin; i < end; i += 2 * UNIT) score_tile<2, 2>(a, i, first, q, scores);
  }
  if (first >= a.heads) return;
  size_t i = begin;
  for (; i + 4 * UNIT <= end; i += 4 * UNIT) score_tile<4, 1>(a, i, first, q, scores);
  if (i < end) score_tile<2, 1>(a, i, first, q, scores);
}

void score_tiles(const MlaArgs& a, size_t begin, size_t end, float* scores) {
  static thread_local Buffer<bf16> queries;
  constexpr size_t STRETCH = 256;
  bf16* q = queries.reserve(round_up(a.heads, UNIT) * a.layout.stride());
  pair_queries(a, q);
  Tiles tiles;
  tiles.shape(UNIT, UNIT);
  for (size_t i = begin; i < end; i += STRETCH) score_stretch(a, i, std::min(i + STRETCH, end), q, scores);
}

// BLOCKS times 32 columns from c on, `apart` columns from one to the next, of a piece of rows as pairs of rows:
// [2 * BLOCKS][UNIT][UNIT][2].
template <size_t BLOCKS>
void pair_rows(const bf16* const* row, size_t c, size_t apart, bf16* to) {
  for (size_t r = 0; r < PIECE; r += 2, to += 2 * UNIT) {
    for (size_t b = 0; b < BLOCKS; ++b) {
      Pairs low, high;
      Pairs::interleave(row[r] + c + b * apart, row[r + 1] + c + b * apart, low, high);
      low.store(to + 2 * b * TILE_VALUES);
      high.store(to + (2 * b + 1) * TILE_VALUES);
    }
  }
}

// Adds a piece of paired rows, weighed with p [heads][PIECE], to sums: of 32 columns for sixteen heads and sixteen
// more, or of 64 columns.
template <size_t GROUPS>
void mix_piece(const bf16* p, const bf16* pairs) {
  _tile_loadd(4, p, 64);
  _tile_loadd(6, pairs, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, pairs + TILE_VALUES, 64);
  _tile_dpbf16ps(2, 4, 7);
  if constexpr (GROUPS == 2) {
    _tile_loadd(5, p + UNIT * PIECE, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  } else {
    _tile_loadd(6, pairs + 2 * TILE_VALUES, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, pairs + 3 * TILE_VALUES, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
}

// Columns from c on, as many as ``mix_piece`` sums but none from `end` on, of GROUPS times sixteen heads from `first`
// on.
template <size_t GROUPS>
void mix_tile(const MlaArgs& a, const bf16* const* row, const Softened& s, size_t first, size_t c, size_t end,
              float* out) {
  constexpr size_t BLOCKS = 2 / GROUPS;
  const size_t apart = c + ROW_PAD < end ? ROW_PAD : 0;  // else the same columns again
  alignas(64) bf16 ring[RING][2 * BLOCKS * TILE_VALUES];
  const auto pair = [&](size_t i) {
    if (i < a.padded()) pair_rows<BLOCKS>(row + i, c, apart, ring[i / PIECE % RING]);
  };
  zero_sums();
  pair(0);
  const auto* p = static_cast<const bf16*>(s.p) + first * PIECE;
  for (size_t i = 0; i < a.padded(); i += PIECE, p += a.heads * PIECE) {
    pair(i + PIECE);
    before_tile_loads();
    mix_piece<GROUPS>(p, ring[i / PIECE % RING]);
  }
  alignas(64) float sums[4][UNIT * UNIT];
  store_sums(sums);
  for (size_t k = 0; k < 2; ++k) {  // the groups of heads, or the blocks of columns
    const size_t head = first + (GROUPS == 2 ? k * UNIT : 0), column = c + (GROUPS == 2 ? 0 : k * apart);
    for (size_t h = 0; h < std::min(UNIT, a.heads - head); ++h) {
      put<Half>(a, F16::load(sums[k] + h * UNIT), F16::load(sums[2 + k] + h * UNIT), s.inverse[head + h], column,
                out + (head + h) * a.layout.latent);
    }
  }
}

void mix_tiles(const MlaArgs& a, const Softened& s, size_t begin, size_t end, float* out) {
  static thread_local Buffer<const bf16*> selected;
  const bf16** row = selected.reserve(a.padded());
  for (size_t i = 0; i < a.padded(); ++i) row[i] = row_of<bf16>(a, i);
  Tiles tiles;
  for (size_t c = begin; c < end; c += 2 * ROW_PAD) {
    size_t first = 0;
    for (; first + UNIT < a.heads; first += 2 * UNIT) {
      tiles.shape(UNIT, std::min(UNIT, a.heads - first - UNIT));
      for (size_t of = c; of < std::min(c + 2 * ROW_PAD, end); of += ROW_PAD)
        mix_tile<2>(a, row, s, first, of, end, out);
    }
    if (first >= a.heads) continue;
    tiles.shape(a.heads - first, a.heads - first);
    mix_tile<1>(a, row, s, first, c, end, out);
  }
}

#endif

void score(const MlaArgs& a, size_t begin, size_t end, float* scores) {
  if (a.layout.format == Format::f32) return score_as<Float>(a, begin, end, scores);
#if defined(__AMX_BF16__)
  score_tiles(a, begin, end, scores);
#else
  score_as<Half>(a, begin, end, scores);
#endif
}

void soften(const MlaArgs& a, size_t begin, size_t end, float* scores, const Softened& s) {
  const bool is_f32 = a.layout.format == Format::f32, by_pieces = MATRIX_UNIT<bf16> && !is_f32;
  const size_t padded = a.padded(), next_head = by_pieces ? SCORE_PAD : padded,
               next_piece = by_pieces ? a.heads * SCORE_PAD : SCORE_PAD;
  for (size_t h = begin; h < end; ++h) {
    float* of_head = scores + h * a.apart();
    const size_t to = h * next_head;
    s.inverse[h] = is_f32 ? soften_as(of_head, a.count, padded, static_cast<float*>(s.p) + to, next_piece)
                          : soften_as(of_head, a.count, padded, static_cast<Half::Query*>(s.p) + to, next_piece);
  }
}

void mix(const MlaArgs& a, const Softened& s, size_t begin, size_t end, float* out) {
  if (a.layout.format == Format::f32) return mix_as<Float>(a, s, begin, end, out);
#if defined(__AMX_BF16__)
  mix_tiles(a, s, begin, end, out);
#else
  mix_as<Half>(a, s, begin, end, out);
#endif
}

// A row as bfloat16, exactly, padded with zeros.
void widen_row(const uint8_t* row, const RowLayout& r, bf16* out) {
  for (size_t g = 0; g < r.groups(); ++g) {
    float scale;
    std::memcpy(&scale, row + r.latent + g * sizeof scale, sizeof scale);
    const size_t begin = g * ROW_GROUP, end = std::min(begin + ROW_GROUP, r.latent);
    for (size_t i = begin; i < end; ++i) narrow(e4m3_value(row[i]) * scale, out[i]);
  }
  std::memcpy(out + r.latent, row + r.latent + r.groups() * sizeof(float), r.rotary * sizeof(bf16));
  std::memset(out + r.latent + r.rotary, 0, (r.stride() - r.latent - r.rotary) * sizeof(bf16));
}

void widen(const MlaArgs& a, size_t begin, size_t end, uint16_t* out) {
  for (size_t i = begin; i < end; ++i) {
    widen_row(static_cast<const uint8_t*>(a.rows) + a.ids[i] * a.layout.bytes(), a.layout,
              reinterpret_cast<bf16*>(out) + i * a.layout.stride());
  }
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
const Mla mla = {widen, score, soften, mix, write_row};

}  // namespace NS
