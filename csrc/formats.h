// Decoders: a step of a panel becomes two vectors of pairs (values 0 and 1, values 2 and 3 of each row).
//
// Integers up to 8 bits and E4M3 are exact in bfloat16; their scale is applied to the sum of a group.
#pragma once

#include <array>
#include <bit>

#include "matrix.h"
#include "simd.h"

namespace NS {

struct Step {
  Pairs pairs[2];
};

struct BF16 {
  using Activation = bf16;
  static constexpr Format format = Format::bf16;
  static constexpr size_t bytes = 128;  // of a step
  static constexpr bool scaled = false;
  static Step load(const uint8_t* p) {
    const auto* q = reinterpret_cast<const bf16*>(p);
    return {{Pairs::load(q), Pairs::load(q + 2 * LANES)}};
  }
};

// The same layout with scales: a panel of another format that was decoded into scratch.
struct ScaledBF16 : BF16 {
  static constexpr bool scaled = true;
};

// Portable decoding, the definition of each format: 64 values as bfloat16.
template <class Decode>
inline Step decode(Decode value) {
  bf16 out[4 * LANES];
  for (size_t i = 0; i < 4 * LANES; ++i) narrow(value(i), out[i]);
  return {{Pairs::load(out), Pairs::load(out + 2 * LANES)}};
}

// Codes of a sign and seven bits that stand for a magnitude.
constexpr float int8_magnitude(unsigned code) { return static_cast<float>(code); }
// E4M3 without infinities; the NaN code decodes to 480, which no valid checkpoint holds.
constexpr float e4m3_magnitude(unsigned code) {
  const unsigned exponent = code >> 3, mantissa = code & 7;
  float x = exponent ? 1.0f + static_cast<float>(mantissa) / 8.0f : static_cast<float>(mantissa) / 8.0f;
  for (unsigned e = exponent ? exponent : 1; e < 7; ++e) x *= 0.5f;
  for (unsigned e = 7; e < exponent; ++e) x *= 2.0f;
  return x;
}

// A format of one byte a value, 64 bytes a step, placed as ``byte_place`` says. With AVX-512 both halves of the
// bfloat16 are looked up, 64 at a time.
template <float (*magnitude)(unsigned), Format FORMAT>
struct Bytes {
  using Activation = bf16;
  static constexpr Format format = FORMAT;
  static constexpr size_t bytes = 64;
  static constexpr bool scaled = true;
#if defined(__AVX512VBMI__)
  struct Codes {
    alignas(64) uint8_t low[128], high[128];
    constexpr Codes() : low(), high() {
      for (unsigned c = 0; c < 128; ++c) {
        const auto bits = std::bit_cast<uint32_t>(magnitude(c));
        low[c] = static_cast<uint8_t>(bits >> 16);
        high[c] = static_cast<uint8_t>(bits >> 24);
      }
    }
  };
  static constexpr Codes codes = {};
  static Step load(const uint8_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(codes.low), x, _mm512_load_si512(codes.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(codes.high), x, _mm512_load_si512(codes.high + 64));
    const __m512i with_sign = _mm512_ternarylogic_epi64(high, x, _mm512_set1_epi8(-128), 0xf8);  // high | (x & 0x80)
    return {{{_mm512_unpacklo_epi8(low, with_sign)}, {_mm512_unpackhi_epi8(low, with_sign)}}};
  }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) {
      const uint8_t code = p[byte_place(i)];
      return code & 128 ? -magnitude(code & 127) : magnitude(code);
    });
  }
#endif
};

using INT8 = Bytes<int8_magnitude, Format::int8>;
using FP8 = Bytes<e4m3_magnitude, Format::fp8>;

// With -128 among the values: the code of a second zero.
struct INT8Lowest : INT8 {
#if defined(__AVX512BW__)
  static Step load(const uint8_t* p) {
    const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    const __m512i lowest = _mm512_set1_epi16(static_cast<int16_t>(std::bit_cast<uint32_t>(-128.0f) >> 16));
    Step step = INT8::load(p);
    for (Pairs& x : step.pairs) x.v = _mm512_mask_blend_epi16(_mm512_cmpeq_epi16_mask(x.v, zero), x.v, lowest);
    return step;
  }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) {
      const uint8_t code = p[byte_place(i)];
      return code == 128 ? -128.0f : code & 128 ? -int8_magnitude(code & 127) : int8_magnitude(code);
    });
  }
#endif
};

// 32 bytes: byte i holds value i in its low and value i + 32 in its high half, both plus 8.
struct INT4 {
  using Activation = bf16;
  static constexpr Format format = Format::int4;
  static constexpr size_t bytes = 32;
  static constexpr bool scaled = true;
#if defined(__AVX512F__)
  static Step load(const uint8_t* p) {
    // The index takes five bits, so the table stands twice and the other nibble's lowest bit does not matter.
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(static_cast<int16_t>(0xc100), static_cast<int16_t>(0xc0e0), static_cast<int16_t>(0xc0c0),
                          static_cast<int16_t>(0xc0a0), static_cast<int16_t>(0xc080), static_cast<int16_t>(0xc040),
                          static_cast<int16_t>(0xc000), static_cast<int16_t>(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080,
                          0x40a0, 0x40c0, 0x40e0));
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {{{_mm512_permutexvar_epi16(both, table)}, {_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table)}}};
  }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) { return static_cast<float>((p[i % 32] >> (i < 32 ? 0 : 4) & 15) - 8); });
  }
#endif
};

// The same values less a zero point for each row and group, -16 to 15.
struct INT4Zeros : INT4 {
#if defined(__AVX512F__)
  using Zeros = __m512i;  // of each row twice, as 16 bits
  static Zeros zeros(const float* after_scales) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(after_scales)));
    return _mm512_or_si512(x, _mm512_slli_epi32(x, 16));
  }
  static constexpr auto values = [] {
    std::array<uint16_t, 32> bits = {};
    for (int i = 0; i < 32; ++i) {
      bits[static_cast<size_t>(i)] = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(i - 16)) >> 16);
    }
    return bits;
  }();
  static Step load(const uint8_t* p, const Zeros& zeros) {
    const __m512i table = _mm512_loadu_si512(values.data());
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i low = _mm512_add_epi16(_mm512_and_si512(both, _mm512_set1_epi16(15)), zeros);
    const __m512i high = _mm512_add_epi16(_mm512_srli_epi16(both, 4), zeros);
    return {{ {_mm512_permutexvar_epi16(low, table)}, { _mm512_permutexvar_epi16(high, table) } }};
  }
#else
  using Zeros = const uint8_t*;
  static Zeros zeros(const float* after_scales) { return reinterpret_cast<const uint8_t*>(after_scales); }
  static Step load(const uint8_t* p, const Zeros& zeros) {
    return decode(
        [&](size_t i) { return static_cast<float>((p[i % 32] >> (i < 32 ? 0 : 4) & 15) + zeros[i % 32 / 2] - 16); });
  }
#endif
};

// A step of a group that has these scales.
template <class F>
inline Step load_step(const uint8_t* p, const float* scales) {
  if constexpr (requires { F::zeros(scales); }) {
    return F::load(p, F::zeros(scales + PANEL));
  } else {
    return F::load(p);
  }
}

struct F32 {
  using Activation = float;
  static constexpr Format format = Format::f32;
  static constexpr size_t bytes = 256;
  static constexpr bool scaled = false;
};

}  // namespace NS
