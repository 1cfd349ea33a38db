// The matrix unit's (AMX) eight tiles of sixteen rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace NS {

constexpr size_t UNIT = 16;  // rows of a tile: the tokens of one instruction

// Shapes of the eight tiles: sums 0 to 3, tokens 4 and 5, weights 6 and 7. `first` tokens in 0, 2 and 4 and `second` in
// 1, 3 and 5.
inline void shape_tiles(size_t first, size_t second) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (size_t i = 0; i < 8; ++i) {
    shape.row_bytes[i] = 64;
    shape.rows[i] = static_cast<uint8_t>(i > 5 ? UNIT : i % 2 ? second : first);
  }
  _tile_loadconfig(&shape);
}

// What was written before is there for the tiles that are loaded after.
inline void before_tile_loads() { asm volatile("" ::: "memory"); }

}  // namespace NS
