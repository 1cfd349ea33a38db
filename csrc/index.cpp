// The lightning indexer: scores of a stretch of keys, and the best of them, in one pass.
//
// Keys lie in panels of 16 rows like a weight matrix, so a score is a product of a panel with the heads of one token.
// Candidates are kept in a buffer of fixed size, whatever the context's length. Higher scores win, then lower
// positions.
#include <algorithm>
#include <bit>

#include "best.h"
#include "e4m3.h"
#include "gemm.h"
#include "table.h"

namespace NS {
namespace {

// E4M3 keys: one scale for each, which is left to the end, since it is positive and relu is homogeneous.
struct FP8Keys : FP8 {
  static constexpr bool scaled = false;
};

// A score and a position as one number that orders them.
uint64_t ranked(float score, uint32_t position) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - position);
}

float score_of(uint64_t rank) {
  const auto bits = static_cast<uint32_t>(rank >> 32);
  return std::bit_cast<float>(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// One token's scores of the keys in BLOCK panels, all heads. Those that will be scored after them, if any are at
// `next`, are fetched meanwhile.
template <class F>
void score(const IndexArgs& a, const IndexQuery& token, const uint8_t* const* panels, const uint8_t* next, float* out,
           Tiles& tiles) {
  using Activation = typename F::Activation;
  constexpr size_t tile = TILE<Activation>;
  Panels keys = {{BLOCK, F::bytes, a.depth / STEP, a.depth / STEP, 0}, {}, false, next};
  std::copy_n(panels, BLOCK, keys.panel);
  if (MATRIX_UNIT<Activation> && next) {  // whose products are too short to do it step by step
    for (size_t line = 0; line < BLOCK * keys.steps * F::bytes; line += 64) __builtin_prefetch(next + line);
  }
  F16 total[BLOCK];
  for (F16& t : total) t = F16::zero();
  alignas(64) float dots[BLOCK * tile * LANES];
  const auto* q = static_cast<const Activation*>(token.q);
  for (size_t x = 0; x < a.heads; x += tile) {
    const size_t live = std::min(tile, a.heads - x);
    product<F>(keys, live, q, dots, tiles);
    keys.next = nullptr;
    for (size_t h = 0; h < live; ++h) {
      const F16 weight = F16::all(token.weights[x + h]), scale = F16::all(a.scale);
      for (size_t p = 0; p < BLOCK; ++p) {
        total[p].fma(weight, F16::max(F16::load(dots + (p * tile + h) * LANES) * scale, F16::zero()));
      }
    }
    q += tile_bytes<Activation>(live, a.depth) / sizeof(Activation);
  }
  for (size_t p = 0; p < BLOCK; ++p) {
    if constexpr (F::format == Format::fp8) {
      total[p] = total[p] * F16::load(reinterpret_cast<const float*>(panels[p] + a.depth * PANEL));
    }
    total[p].store(out + p * LANES);
  }
}

// Adds to a token's candidates the scores of positions [at, at + live); when there is no room for another block, all
// but the best are dropped.
void keep_best(const float* scores, size_t at, size_t live, size_t keep, IndexQuery& token) {
  for (size_t p = 0; p < live; p += PANEL) {
    const size_t end = std::min(p + PANEL, live);
    bool any = false;
    for (size_t i = p; i < end; ++i) any |= !(scores[i] < token.floor);
    if (!any) continue;
    for (size_t i = p; i < end; ++i) {
      const uint64_t rank = ranked(scores[i], static_cast<uint32_t>(at + i));
      token.best[token.found] = rank;
      token.found += rank > token.threshold;
    }
  }
  if (token.found <= 2 * keep) return;
  token.threshold = keep_largest(token.best, token.found, keep);
  token.found = keep;
  token.floor = score_of(token.threshold);
}

template <class F>
void scan_as(const IndexArgs& a, size_t begin, IndexQuery* queries, size_t count) {
  const size_t panel_bytes = key_panel_bytes(a.format, a.depth);
  const auto* pool = static_cast<const uint8_t*>(a.keys);
  const auto panel_of = [&](size_t position) {
    const size_t row = static_cast<size_t>(a.table[position / a.page_size]) * a.page_size + position % a.page_size;
    return pool + row / PANEL * panel_bytes;
  };
  size_t end = 0;
  for (size_t i = 0; i < count; ++i) end = std::max(end, queries[i].end);
  Tiles tiles;
  for (size_t at = begin; at < end; at += BLOCK * PANEL) {
    const uint8_t* panels[BLOCK];
    for (size_t p = 0; p < BLOCK; ++p) panels[p] = panel_of(std::min(at + p * PANEL, (end - 1) / PANEL * PANEL));
    const uint8_t* next = at + 2 * BLOCK * PANEL <= end ? panel_of(at + BLOCK * PANEL) : nullptr;
    for (size_t i = 0; i < count; ++i) {
      if (queries[i].end <= at) continue;
      float scores[BLOCK * PANEL];
      score<F>(a, queries[i], panels, next, scores, tiles);
      next = nullptr;
      keep_best(scores, at, std::min(BLOCK * PANEL, queries[i].end - at), a.keep, queries[i]);
    }
  }
}

void scan(const IndexArgs& a, size_t begin, IndexQuery* queries, size_t count) {
  if (a.format == Format::f32)
    scan_as<F32>(a, begin, queries, count);
  else if (a.format == Format::bf16)
    scan_as<BF16>(a, begin, queries, count);
  else
    scan_as<FP8Keys>(a, begin, queries, count);
}

template <class T>
void write_key_as(const float* x, size_t depth, T* panel, size_t lane) {
  constexpr size_t together = sizeof(T) == 2 ? 2 : 1;
  for (size_t k = 0; k < depth; ++k)
    narrow(x[k], panel[k / together * together * PANEL + lane * together + k % together]);
}

void write_key_fp8(const float* x, size_t depth, uint8_t* panel, size_t lane) {
  const float scale = power_of_two(x, depth), inverse = 1.0f / scale;
  for (size_t k = 0; k < depth; ++k) {
    const size_t in_step = k % STEP / 2 * 2 * PANEL + 2 * lane + k % 2;
    panel[k / STEP * STEP * PANEL + byte_place(in_step)] = e4m3(x[k] * inverse);
  }
  std::memcpy(panel + depth * PANEL + lane * sizeof scale, &scale, sizeof scale);
}

void write_key(const float* x, size_t depth, Format format, void* pool, size_t row) {
  uint8_t* panel = static_cast<uint8_t*>(pool) + row / PANEL * key_panel_bytes(format, depth);
  if (format == Format::f32)
    write_key_as(x, depth, reinterpret_cast<float*>(panel), row % PANEL);
  else if (format == Format::bf16)
    write_key_as(x, depth, reinterpret_cast<bf16*>(panel), row % PANEL);
  else
    write_key_fp8(x, depth, panel, row % PANEL);
}

}  // namespace

extern const Index index;
const Index index = {scan, write_key};

}  // namespace NS
