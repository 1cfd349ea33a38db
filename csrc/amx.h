// Products of bfloat16 by the matrix unit (AMX): sixteen tokens, sixteen rows of weights and 32 values an instruction.
//
// A piece is an ``Extent`` of CHUNK values at most. Its first pairs (values 0 and 1 of each step) make one instruction,
// its second pairs another. The unit adds values with even and with odd index in two chains from zero, then their sum
// to what was there: bits depend neither on the tokens beside nor on the tiling.
#pragma once

#include <algorithm>

#include "formats.h"
#include "panels.h"

namespace NS {

constexpr size_t CHUNK = 64;        // values of a token that lie together
constexpr size_t HALF = CHUNK / 2;  // of them in one instruction
constexpr size_t CHUNK_STEPS = CHUNK / STEP;

// The weights of a piece: each panel's first pairs, `half` bytes on its second ones, `stride` bytes between steps.
struct Piece {
  const uint8_t* panel[BLOCK];
  size_t stride, half;
};

// A panel's part of a piece decoded to [first or second pairs][CHUNK_STEPS][64 bytes]; the rest of its chunk is zero.
template <class F>
void decode_panel(const Panels& b, size_t panel, const Extent& e, uint8_t* to) {
  constexpr size_t half = CHUNK_STEPS * 64;
  if (e.end - e.begin < CHUNK_STEPS) std::memset(to, 0, 2 * half);
  const uint8_t* from = b.step(panel, e.begin, e.group);
  to += e.begin % CHUNK_STEPS * 64;
  for (size_t s = e.begin; s < e.end; ++s, from += b.stride, to += 64) {
    if (b.ahead) fetch_ahead<BLOCK, F::bytes>(from);
    const Step step = F::load(from);
    _mm512_store_si512(to, step.pairs[0].v);
    _mm512_store_si512(to + half, step.pairs[1].v);
  }
  before_tile_loads();
}

// Sums of a block's panels for one unit of tokens, or of two panels for two units. The intrinsics take tiles as
// literals, so nothing here can be a loop over them.
template <bool TWO>
struct Sums {
  static constexpr size_t panels = TWO ? 2 : BLOCK, units = TWO ? 2 : 1;
  // x: a chunk of the tokens, [first or second pairs][tokens][HALF]. ``between(p)`` is called ahead of panel p, for
  // work that goes on while the unit multiplies.
  template <class Between>
  static void add(const Piece& w, const bf16* x, size_t tokens, Between between) {
    if constexpr (TWO) {
      for (size_t p = 0; p < panels; ++p) between(p);
      for (size_t half = 0; half < 2; ++half, x += tokens * HALF) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + UNIT * HALF, 64);
        _tile_loadd(6, w.panel[0] + half * w.half, w.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, w.panel[1] + half * w.half, w.stride);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      _tile_loadd(4, x, 64);
      _tile_loadd(5, x + tokens * HALF, 64);
      const auto load = [&](size_t p) {
        between(p);
        _tile_loadd(6, w.panel[p], w.stride);
        _tile_loadd(7, w.panel[p] + w.half, w.stride);
      };
      load(0);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(0, 5, 7);
      load(1);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(1, 5, 7);
      load(2);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(2, 5, 7);
      load(3);
      _tile_dpbf16ps(3, 4, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  // To out [panels][tokens, `width` apart][LANES].
  static void store(float* out, size_t width) {
    const auto to = [&](size_t sum) { return out + (sum / units * width + sum % units * UNIT) * LANES; };
    _tile_stored(0, to(0), 64);
    _tile_stored(1, to(1), 64);
    _tile_stored(2, to(2), 64);
    _tile_stored(3, to(3), 64);
  }
};

// The panels of ``Sums`` from the block's `first` on. The next piece is decoded while the unit multiplies the one
// before.
template <class F, bool TWO>
void multiply_tiles(const Panels& b, size_t first, size_t tokens, const bf16* x, float* out) {
  using S = Sums<TWO>;
  constexpr size_t P = S::panels, width = TILE<bf16>, own = S::units * UNIT, panel_size = 2 * CHUNK_STEPS * 64;
  alignas(64) uint8_t scratch[2][P * panel_size];
  size_t turn = 0;
  const auto as_is = [&](const Extent& e) { return F::format == Format::bf16 && e.end - e.begin == CHUNK_STEPS; };
  const auto piece_of = [&](const Extent& e) {
    Piece piece = {{}, as_is(e) ? b.stride : 64, as_is(e) ? 64 : CHUNK_STEPS * 64};
    for (size_t p = 0; p < P; ++p)
      piece.panel[p] = as_is(e) ? b.step(first + p, e.begin, e.group) : scratch[turn % 2] + p * panel_size;
    return piece;
  };
  const auto decode = [&](const Extent& e, size_t p) {
    if (e.begin >= b.steps) return;
    if (!as_is(e)) return decode_panel<F>(b, first + p, e, scratch[turn % 2] + p * panel_size);
    for (size_t s = e.begin; s < e.end && b.ahead; ++s) fetch_ahead<P, F::bytes>(b.step(first + p, s, e.group));
  };
  Extent now = extent_at<CHUNK, F>(b, 0, 0);
  for (size_t p = 0; p < P; ++p) decode(now, p);
  zero_sums();
  while (now.begin < b.steps) {
    const Piece piece = piece_of(now);
    const Extent next = extent_at<CHUNK, F>(b, now.end, now.group + now.closes);
    ++turn;
    S::add(piece, x + now.begin / CHUNK_STEPS * CHUNK * tokens, tokens, [&](size_t p) { decode(next, p); });
    if (F::scaled && now.closes) {
      alignas(64) float sums[P * own * LANES];
      S::store(sums, own);
      zero_sums();
      for (size_t p = 0; p < P; ++p) {
        const F16 scale = F16::load(b.scales(first + p, now.group));
        for (size_t t = 0; t < tokens; ++t) {
          float* to = out + (p * width + t) * LANES;
          F16 total = now.group ? F16::load(to) : F16::zero();
          total.fma(F16::load(sums + (p * own + t) * LANES), scale);
          total.store(to);
        }
      }
    }
    now = next;
  }
  if (!F::scaled) S::store(out, width);
}

// As the unit takes subnormal numbers: for zero, in what goes in and in what comes out.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

inline F16 even(Pairs x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16))}; }
inline F16 odd(Pairs x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
}

// One token by the unit's sums, bit for bit, in vectors: to decode and store weights for the unit takes longer.
template <class F>
void multiply_one(const Panels& b, const bf16* x, float* out) {
  constexpr size_t P = BLOCK;
  F16 sums[P], totals[P];
  for (size_t p = 0; p < P; ++p) sums[p] = totals[p] = F16::zero();
  for (Extent e = extent_at<CHUNK, F>(b, 0, 0); e.begin < b.steps;
       e = extent_at<CHUNK, F>(b, e.end, e.group + e.closes)) {
    F16 chains[2][2][P];  // of the first or second pairs, of even or odd values
    for (size_t c = 0; c < 4 * P; ++c) chains[c / 2 / P][c / P % 2][c % P] = F16::zero();
    const bf16* at = x + e.begin / CHUNK_STEPS * CHUNK + e.begin % CHUNK_STEPS * 2;
    const uint8_t* panel[P];
    for (size_t p = 0; p < P; ++p) panel[p] = b.step(p, e.begin, e.group);
    for (size_t s = e.begin; s < e.end; ++s, at += 2) {
      if (b.ahead) fetch_ahead<P, P * F::bytes>(panel[0]);
      const Pairs values[2] = {Pairs::all(at), Pairs::all(at + HALF)};
      for (size_t p = 0; p < P; ++p) {
        const Step w = F::load(panel[p]);
        panel[p] += b.stride;
        for (int half = 0; half < 2; ++half) {
          chains[half][0][p].fma(even(values[half]), even(w.pairs[half]));
          chains[half][1][p].fma(odd(values[half]), odd(w.pairs[half]));
        }
      }
    }
    for (size_t p = 0; p < P; ++p) {
      for (const auto& chain : chains) sums[p] = sums[p] + (chain[0][p] + chain[1][p]);
      if (!F::scaled || !e.closes) continue;
      totals[p].fma(sums[p], F16::load(b.scales(p, e.group)));
      sums[p] = F16::zero();
    }
  }
  for (size_t p = 0; p < b.count; ++p) (F::scaled ? totals : sums)[p].store(out + p * TILE<bf16> * LANES);
}

// out [BLOCK][TILE][LANES] = the block's panels times a tile of tokens.
template <class F>
void product_tiles(const Panels& b, size_t tokens, const bf16* x, float* out, Tiles& tiles) {
  const FlushSubnormals flush;
  if (tokens == 1) return multiply_one<F>(b, x, out);
  const bool two = tokens > UNIT;
  tiles.shape(std::min(tokens, UNIT), two ? tokens - UNIT : tokens);
  if (!two) return multiply_tiles<F, false>(b, 0, tokens, x, out);
  for (size_t p = 0; p < b.count; p += 2) multiply_tiles<F, true>(b, p, tokens, x, out + p * TILE<bf16> * LANES);
}

}  // namespace NS
