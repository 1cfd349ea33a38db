// Decoders: a step of a panel becomes two vectors of pairs (values 0 and 1, values 2 and 3 of each row).
//
// Integers up to 8 bits and E4M3 are exact in bfloat16; their scale is applied to the sum of a group.
#pragma once

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

// E4M3 without infinities; the two NaN codes decode to 480, which no valid checkpoint holds.
inline float widen_e4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  const float magnitude = exponent ? std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - 7)
                                   : std::ldexp(static_cast<float>(mantissa), -9);
  return x & 128 ? -magnitude : magnitude;
}

// 64 bytes: the values in the order of the pairs.
struct INT8 {
  using Activation = bf16;
  static constexpr Format format = Format::int8;
  static constexpr size_t bytes = 64;
  static constexpr bool scaled = true;
#if defined(__AVX512F__)
  static Pairs half(const uint8_t* p) {
    const auto wide = [](const uint8_t* q) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
    };
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(wide(p + 16), wide(p)))};
  }
  static Step load(const uint8_t* p) { return {{half(p), half(p + 32)}}; }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
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
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        static_cast<int16_t>(0xc100), static_cast<int16_t>(0xc0e0), static_cast<int16_t>(0xc0c0),
        static_cast<int16_t>(0xc0a0), static_cast<int16_t>(0xc080), static_cast<int16_t>(0xc040),
        static_cast<int16_t>(0xc000), static_cast<int16_t>(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
        0x40e0));
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {{{_mm512_permutexvar_epi16(both, table)}, {_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table)}}};
  }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) { return static_cast<float>((p[i % 32] >> (i < 32 ? 0 : 4) & 15) - 8); });
  }
#endif
};

// 64 bytes of E4M3, in the order of the pairs.
struct FP8 {
  using Activation = bf16;
  static constexpr Format format = Format::fp8;
  static constexpr size_t bytes = 64;
  static constexpr bool scaled = true;
#if defined(__AVX512F__)
  // Sign, exponent and mantissa moved into a half float are the value over 2^8, subnormal ones included.
  static Pairs half(const uint8_t* p) {
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(x, 8), _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m512i rest = _mm512_and_si512(_mm512_slli_epi16(x, 7), _mm512_set1_epi16(0x3f80));
    const __m512i h = _mm512_or_si512(sign, rest);
    const __m512 scale = _mm512_set1_ps(256.0f);
    const __m512 low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(h)), scale);
    const __m512 high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1)), scale);
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))};
  }
  static Step load(const uint8_t* p) { return {{half(p), half(p + 32)}}; }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) { return widen_e4m3(p[i]); });
  }
#endif
};

struct F32 {
  using Activation = float;
  static constexpr Format format = Format::f32;
  static constexpr bool scaled = false;
};

}  // namespace NS
