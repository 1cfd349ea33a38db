// Decoders. A step of a panel becomes sixteen pairs of bfloat16, values 0 and 1 of each row, then sixteen of values 2
// and 3, or in the integer formats codes of a byte. Scales are applied to the sum of a group.
#pragma once

#include <array>
#include <bit>

#include "panels.h"

namespace NS {

#if defined(__AVX512F__)
struct Step {
  Pairs pairs[2];
};
#endif

struct BF16 {
  using Activation = Rounded;
  using Decoded = BF16;
  static constexpr Format format = Format::bf16;
  static constexpr size_t values = STEP, bytes = 128;  // of a step
  static constexpr bool scaled = false;
#if defined(__AVX512F__)
  static Step load(const uint8_t* p) {
    const auto* q = reinterpret_cast<const bf16*>(p);
    return {{Pairs::load(q), Pairs::load(q + 2 * LANES)}};
  }
#else
  using Scratch = struct {};
  static const uint8_t* decoded(const uint8_t* p, Scratch&) { return p; }
  // Value k of each row.
  static F16 column(const uint8_t* p, size_t k) {
    return F16::of_pairs(reinterpret_cast<const bf16*>(p) + k / 2 * 2 * LANES, k % 2);
  }
#endif
};

// The same layout with scales: a panel of another format that was decoded into scratch.
struct ScaledBF16 : BF16 {
  using Decoded = ScaledBF16;
  static constexpr bool scaled = true;
};

// E4M3 without infinities; the NaN code decodes to 480, which no valid checkpoint holds.
constexpr float e4m3_magnitude(unsigned code) {
  const unsigned exponent = code >> 3, mantissa = code & 7;
  float x = exponent ? 1.0f + static_cast<float>(mantissa) / 8.0f : static_cast<float>(mantissa) / 8.0f;
  for (unsigned e = exponent ? exponent : 1; e < 7; ++e) x *= 0.5f;
  for (unsigned e = 7; e < exponent; ++e) x *= 2.0f;
  return x;
}

// The upper two bytes of each magnitude as a float.
struct E4M3Halves {
  alignas(64) uint8_t low[128], high[128];
  constexpr E4M3Halves() : low(), high() {
    for (unsigned c = 0; c < 128; ++c) {
      const auto bits = std::bit_cast<uint32_t>(e4m3_magnitude(c));
      low[c] = static_cast<uint8_t>(bits >> 16);
      high[c] = static_cast<uint8_t>(bits >> 24);
    }
  }
};

// One byte a value, placed as ``byte_place`` says. With AVX-512 both halves of the bfloat16 are looked up, 64 at a
// time; with AVX2 they are computed, 32 at a time, and looked up only where a value is subnormal.
struct FP8 {
  using Activation = Rounded;
  using Decoded = ScaledBF16;
  static constexpr Format format = Format::fp8;
  static constexpr size_t values = STEP, bytes = 64;
  static constexpr bool scaled = true;
  static constexpr E4M3Halves halves = {};
#if defined(__AVX512F__)
  static Step load(const uint8_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(halves.low), x, _mm512_load_si512(halves.low + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_load_si512(halves.high), x, _mm512_load_si512(halves.high + 64));
    const __m512i with_sign = _mm512_ternarylogic_epi64(high, x, _mm512_set1_epi8(-128), 0xf8);  // high | (x & 0x80)
    return {{{_mm512_unpacklo_epi8(low, with_sign)}, {_mm512_unpackhi_epi8(low, with_sign)}}};
  }
  static void decode(const uint8_t* p, uint8_t* to) {
    const Step step = load(p);
    std::memcpy(to, &step, sizeof step);
  }
#else
  using Scratch = uint8_t[BF16::bytes];
  static const uint8_t* decoded(const uint8_t* p, Scratch& to) {
    decode(p, to);
    return to;
  }
  static constexpr auto column = BF16::column;
#if defined(__AVX2__)
  static void decode(const uint8_t* p, uint8_t* to) {
    for (size_t half = 0; half < 2; ++half, p += 32, to += 32) {
      __m256i low, high;
      halves_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), low, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(low, high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + BF16::bytes / 2), _mm256_unpackhi_epi8(low, high));
    }
  }
  // The bytes of 32 values: sign, exponent + 120, mantissa; the exponent's last bit is in the low one.
  static void halves_of(__m256i x, __m256i& low, __m256i& high) {
    const auto first_eight = [](const uint8_t* table) {
      int64_t bytes;
      std::memcpy(&bytes, table, sizeof bytes);
      return _mm256_set1_epi64x(bytes);
    };
    const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi8(0x7f));
    const __m256i subnormal = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), magnitude);
    low = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi8(0x0f)), 4);
    high = _mm256_srli_epi16(_mm256_and_si256(x, _mm256_set1_epi8(0x70)), 4);
    high = _mm256_add_epi8(high, _mm256_set1_epi8(120 / 2));
    low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(first_eight(halves.low), magnitude), subnormal);
    high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(first_eight(halves.high), magnitude), subnormal);
    high = _mm256_or_si256(high, _mm256_and_si256(x, _mm256_set1_epi8(-128)));
  }
#else
  static void decode(const uint8_t* p, uint8_t* to) {
    for (size_t i = 0; i < STEP * LANES; ++i) {
      const uint8_t code = p[byte_place(i)];
      bf16 value;
      narrow(code & 128 ? -e4m3_magnitude(code & 127) : e4m3_magnitude(code), value);
      std::memcpy(to + i * sizeof value, &value, sizeof value);
    }
  }
#endif
#endif
};

// Integer formats: a step is `vectors` codes, a value its code less `offset`. What differs between the groups of a
// panel besides its scales is `Group`.
template <int OFFSET>
struct Integers {
  using Activation = Fixed;
  using Decoded = Integers;
  struct Group {};
  static Group group(const float*) { return {}; }
  static constexpr Format format = Format::int8;
  static constexpr int offset = OFFSET;
  static constexpr size_t values = STEP, vectors = 1, bytes = 64;
  static constexpr bool scaled = true;
  static Codes load(const uint8_t* p, const Group&, size_t) { return Codes::load(p); }
};

using INT8 = Integers<INT8_OFFSET>;

struct INT4 : Integers<INT4_OFFSET> {
  static constexpr Format format = Format::int4;
  static constexpr size_t values = INT4_STEP, vectors = 2;
  static Codes load(const uint8_t* p, const Group&, size_t vector) {
    const Codes both = Codes::load(p);
    return vector ? both.high_half() : both.low_half();
  }
};

// The same values less a zero point for each row and group, -16 to 15.
struct INT4Zeros : INT4 {
  using Decoded = Integers<INT4_OFFSET + ZERO_POINT>;
  static constexpr int offset = Decoded::offset;
  struct Group {
    Codes zeros;
  };
  static Group group(const float* scales) { return {Codes::of_rows(reinterpret_cast<const uint8_t*>(scales + PANEL))}; }
  static Codes load(const uint8_t* p, const Group& group, size_t vector) {
    return INT4::load(p, {}, vector) + group.zeros;
  }
};

struct F32 {
  using Activation = float;
  using Decoded = F32;
  static constexpr Format format = Format::f32;
  static constexpr size_t values = STEP, bytes = 256;
  static constexpr bool scaled = false;
  using Scratch = struct {};
  static const uint8_t* decoded(const uint8_t* p, Scratch&) { return p; }
  static F16 column(const uint8_t* p, size_t k) { return F16::load(reinterpret_cast<const float*>(p) + k * LANES); }
};

}  // namespace NS
