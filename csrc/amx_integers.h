// Products of integer weights by the matrix unit: a unit of sixteen tokens, two panels, sums of high and of low bytes.
// The weights of int8 are read as they lie.
#pragma once

#include "amx.h"
#include "fixed.h"

namespace NS {

// Sixty-four values of two panels' codes, as they lie or decoded to scratch with zeros after them.
template <class F>
Piece codes_of(const Panels& b, size_t first, size_t begin, size_t end, size_t group, uint8_t* scratch) {
  constexpr size_t whole = CHUNK / F::values, panel_size = CHUNK_STEPS * 64;
  if (F::vectors == 1 && end - begin == whole)
    return {{b.step(first, begin, group), b.step(first + 1, begin, group)}, b.stride, 0};
  if (end - begin < whole) std::memset(scratch, 0, 2 * panel_size);
  for (size_t p = 0; p < 2; ++p) {
    const typename F::Group of_group = F::group(b.scales(first + p, group));
    const uint8_t* from = b.step(first + p, begin, group);
    uint8_t* to = scratch + p * panel_size + begin % whole * F::vectors * 64;
    for (size_t s = begin; s < end; ++s, from += b.stride, to += F::vectors * 64) {
      for (size_t v = 0; v < F::vectors; ++v) F::load(from, of_group, v).store(to + v * 64);
    }
  }
  before_tile_loads();
  return {{scratch, scratch + panel_size}, 64, 0};
}

// What is left to do with the sums of one extent, [panel][high or low][UNIT][LANES]: less what the offset put in, times
// the stretch's powers, they are added to the group's sums, and those, times the scales, to the result. It is done for
// a few tokens at a time, while the unit multiplies the next extent.
struct Rest {
  const int32_t* sums;
  const float *scales[2], *power;
  float *in_group, *out;
  bool opens, closes;  // the group
  alignas(64) int32_t offset[UNIT];

  void add(size_t begin, size_t end) const {
    if (begin == end) return;
    if (opens && closes) return add_as<true>(begin, end);
    add_as<false>(begin, end);
  }

 private:
  template <bool WHOLE>
  void add_as(size_t begin, size_t end) const {
    const F16 scale[2] = {F16::load(scales[0]), F16::load(scales[1])};
    for (size_t t = begin; t < end; ++t) {
      const F16 by = F16::all(power[t]);
      for (size_t p = 0; p < 2; ++p) {
        const int32_t* row = sums + (2 * p * UNIT + t) * LANES;
        float *partial = in_group + (p * UNIT + t) * LANES, *total = out + (p * TILE<Fixed> + t) * LANES;
        F16 sum = Dots{_mm512_load_si512(row), _mm512_load_si512(row + UNIT * LANES)}.less(offset[t]) * by;
        if (!WHOLE && !opens) sum = sum + F16::load(partial);
        if (!WHOLE && !closes) {
          sum.store(partial);
          continue;
        }
        F16 y = F16::load(total);
        y.fma(sum, scale[p]);
        y.store(total);
      }
    }
  }
};

// Adds to the sums, [panel][high or low], a piece of the weights times the high bytes at x and the low ones `plane` on.
// ``between()`` is called after each instruction, for work that goes on while the unit multiplies.
template <class Between>
void add_piece(const Piece& w, const uint8_t* x, size_t plane, Between between) {
  _tile_loadd(4, x, CHUNK);
  _tile_loadd(6, w.panel[0], w.stride);
  _tile_dpbsud(0, 4, 6);
  between();
  _tile_loadd(7, w.panel[1], w.stride);
  _tile_dpbsud(2, 4, 7);
  between();
  _tile_loadd(5, x + plane, CHUNK);
  _tile_dpbsud(1, 5, 6);
  between();
  _tile_dpbsud(3, 5, 7);
  between();
}

// Two panels from `first` on times a unit of tokens from `unit` on.
template <class F>
void multiply_codes(const Panels& b, size_t first, const FixedTile& x, size_t unit, size_t tokens, float* out) {
  constexpr size_t whole = CHUNK / F::values;
  alignas(64) uint8_t scratch[2 * CHUNK_STEPS * 64];
  alignas(64) int32_t sums[2][4 * UNIT * LANES];
  alignas(64) float in_group[2 * UNIT * LANES];
  for (size_t p = 0; p < 2; ++p) std::memset(out + p * TILE<Fixed> * LANES, 0, tokens * LANES * sizeof(float));
  Rest rest = {};
  bool opens = true;
  size_t turn = 0, done = tokens;
  for (Extent e = extent_at<STRETCH, F>(b, 0, 0); e.begin < b.steps;
       e = extent_at<STRETCH, F>(b, e.end, e.group + e.closes), turn ^= 1) {
    const size_t pieces = (e.end - 1) / whole - e.begin / whole + 1, share = (tokens + 4 * pieces - 1) / (4 * pieces);
    zero_sums();
    for (size_t begin = e.begin, end; begin < e.end; begin = end) {
      end = std::min((begin / whole + 1) * whole, e.end);
      if (b.ahead) {
        for (size_t s = begin; s < end; ++s) fetch_ahead<2, 2 * F::bytes>(b.step(first, s, e.group));
      }
      const Piece w = codes_of<F>(b, first, begin, end, e.group, scratch);
      add_piece(w, x.at(begin / whole * CHUNK) + unit * CHUNK, STRETCH * x.tokens, [&] {
        const size_t until = std::min(done + share, tokens);
        rest.add(done, until);
        done = until;
      });
    }
    store_sums(sums[turn]);
    const float* power = x.power(e.begin / (STRETCH / F::values)) + unit;
    rest = {sums[turn], {b.scales(first, e.group), b.scales(first + 1, e.group)}, power, in_group, out, opens, e.closes,
            {}};
    x.sums(e.begin * F::values, e.end * F::values, unit, tokens, F::offset, rest.offset);
    opens = e.closes;
    done = 0;
  }
  rest.add(done, tokens);
}

template <class F>
void codes_by_tiles(const Panels& b, size_t tokens, const FixedTile& x, float* out, Tiles& tiles) {
  for (size_t unit = 0; unit < tokens; unit += UNIT) {
    const size_t live = std::min(UNIT, tokens - unit);
    tiles.shape(live, live);
    for (size_t p = 0; p < b.count; p += 2)
      multiply_codes<F>(b, p, x, unit, live, out + (p * TILE<Fixed> + unit) * LANES);
  }
}

}  // namespace NS
