// The matrix unit's (AMX) eight tiles of sixteen rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace NS {

constexpr size_t UNIT = 16;  // rows of a tile: the tokens of one instruction

// What was written before is there for the tiles that are loaded after.
inline void before_tile_loads() { asm volatile("" ::: "memory"); }

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The four, one behind another.
inline void store_sums(void* to) {
  constexpr size_t bytes = UNIT * 64;
  auto* at = static_cast<uint8_t*>(to);
  _tile_stored(0, at, 64);
  _tile_stored(1, at + bytes, 64);
  _tile_stored(2, at + 2 * bytes, 64);
  _tile_stored(3, at + 3 * bytes, 64);
}

// Shapes of the eight tiles: sums 0 to 3, tokens 4 and 5, weights 6 and 7. Others may use the unit between two calls of
// a kernel, so each call has its own and sets it anew; within one call setting what is set costs nothing.
class Tiles {
 public:
  // `first` tokens in 0, 2 and 4, `second` in 1, 3 and 5.
  void shape(size_t first, size_t second) {
    if (first == first_ && second == second_) return;
    first_ = first, second_ = second;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } all;
    for (size_t i = 0; i < 8; ++i) {
      all.row_bytes[i] = 64;
      all.rows[i] = static_cast<uint8_t>(i > 5 ? UNIT : i % 2 ? second : first);
    }
    before_tile_loads();
    _tile_loadconfig(&all);
  }

 private:
  size_t first_ = 0, second_ = 0;
};

}  // namespace NS
