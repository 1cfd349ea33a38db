// What an FP8 cache holds: E4M3 codes with scales that are powers of two, so that what is read is exact in bfloat16.
#pragma once

#include <algorithm>
#include <bit>

#include "simd.h"

namespace NS {

// The smallest power of two, not below 2^-126, that brings n magnitudes to E4M3's largest, 448, or below.
inline float power_of_two(const float* x, size_t n) {
  float largest = 0.0f;
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float ratio = std::max(largest / 448.0f, 0x1p-126f);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(ratio) + 0x7fffff) & ~0x7fffffu);
}

// Rounds to nearest, ties to even. |x| at most 448 or a rounding above it; not for NaN.
inline uint8_t e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // Below 2^-6 codes are multiples of 2^-9: adding 2^23 rounds to the integer that is left in the lowest bits.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::fabs(x) * 512.0f + 0x1p23f) & 0xff;
  const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  return static_cast<uint8_t>((magnitude < 0x3c800000u ? subnormal : normal) | (bits >> 24 & 0x80));
}

// As a float whose exponent is 120 too small: exact also where E4M3 is subnormal.
inline float e4m3_value(uint8_t code) {
  const uint32_t c = code;
  return std::bit_cast<float>((c & 0x7f) << 20 | (c & 0x80) << 24) * 0x1p120f;
}

}  // namespace NS
