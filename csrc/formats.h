// Decoders. A step of a panel becomes two vectors of pairs, values 0 and 1, values 2 and 3 of each row, in bfloat16, or
// in the integer formats codes of a byte. Scales are applied to the sum of a group.
#pragma once

#include <array>
#include <bit>

#include "panels.h"

namespace NS {

struct Step {
  Pairs pairs[2];
};

struct BF16 {
  using Activation = bf16;
  using Decoded = BF16;
  static constexpr Format format = Format::bf16;
  static constexpr size_t values = STEP, bytes = 128;  // of a step
  static constexpr bool scaled = false;
  static Step load(const uint8_t* p) {
    const auto* q = reinterpret_cast<const bf16*>(p);
    return {{Pairs::load(q), Pairs::load(q + 2 * LANES)}};
  }
};

// The same layout with scales: a panel of another format that was decoded into scratch.
struct ScaledBF16 : BF16 {
  using Decoded = ScaledBF16;
  static constexpr bool scaled = true;
};

// Portable decoding, the definition of each format: 64 values as bfloat16.
template <class Decode>
inline Step decode(Decode value) {
  bf16 out[4 * LANES];
  for (size_t i = 0; i < 4 * LANES; ++i) narrow(value(i), out[i]);
  return {{Pairs::load(out), Pairs::load(out + 2 * LANES)}};
}

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
// time.
struct FP8 {
  using Activation = bf16;
  using Decoded = ScaledBF16;
  static constexpr Format format = Format::fp8;
  static constexpr size_t values = STEP, bytes = 64;
  static constexpr bool scaled = true;
#if defined(__AVX512VBMI__)
  static constexpr E4M3Halves halves = {};
  static Step load(const uint8_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(halves.low), x, _mm512_load_si512(halves.low + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_load_si512(halves.high), x, _mm512_load_si512(halves.high + 64));
    const __m512i with_sign = _mm512_ternarylogic_epi64(high, x, _mm512_set1_epi8(-128), 0xf8);  // high | (x & 0x80)
    return {{{_mm512_unpacklo_epi8(low, with_sign)}, {_mm512_unpackhi_epi8(low, with_sign)}}};
  }
#else
  static Step load(const uint8_t* p) {
    return decode([&](size_t i) {
      const uint8_t code = p[byte_place(i)];
      return code & 128 ? -e4m3_magnitude(code & 127) : e4m3_magnitude(code);
    });
  }
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
  static void load(const uint8_t* p, const Group&, Codes* out) { *out = Codes::load(p); }
};

using INT8 = Integers<INT8_OFFSET>;

struct INT4 : Integers<INT4_OFFSET> {
  static constexpr Format format = Format::int4;
  static constexpr size_t values = INT4_STEP, vectors = 2;
  static void load(const uint8_t* p, const Group&, Codes* out) {
    const Codes both = Codes::load(p);
    out[0] = both.low_half();
    out[1] = both.high_half();
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
  static void load(const uint8_t* p, const Group& group, Codes* out) {
    INT4::load(p, {}, out);
    out[0] = out[0] + group.zeros;
    out[1] = out[1] + group.zeros;
  }
};

struct F32 {
  using Activation = float;
  using Decoded = F32;
  static constexpr Format format = Format::f32;
  static constexpr size_t values = STEP, bytes = 256;
  static constexpr bool scaled = false;
};

}  // namespace NS
