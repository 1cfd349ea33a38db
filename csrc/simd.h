// Sixteen floats, and the few other vectors that every kernel is written against, once, in namespace NS.
//
// Each instruction set brings the same few operations. Their rounding may differ between sets; within one set the order
// of every sum is fixed, so an element's bits never depend on the batch, the tiling or the threads.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace NS {

constexpr size_t LANES = 16;

// A bfloat16 as stored: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Round to nearest, ties to even. Not for NaN.
inline void narrow(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, float& out) { out = x; }

#if defined(__AVX512F__)

// Pairs of bfloat16 are multiplied as they are.
constexpr bool PAIRS = true;
using Rounded = bf16;

struct F16 {
  __m512 v;
  static F16 zero() { return {_mm512_setzero_ps()}; }
  static F16 all(float x) { return {_mm512_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F16 load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void fma(F16 a, F16 b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  friend F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
};

struct Pairs {
  __m512i v;
  static Pairs load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  void store(bf16* p) const { _mm512_storeu_si512(p, v); }
  static Pairs all(const bf16* p) {
    int32_t both;
    std::memcpy(&both, p, sizeof both);
    return {_mm512_set1_epi32(both)};
  }
  static void dot(F16& sum, Pairs a, Pairs b) {
    sum.v = _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
  }
  // Two rows of 32 as pairs (a[c], b[c]), in an order that ``store_interleaved`` undoes.
  static void interleave(const bf16* a, const bf16* b, Pairs& low, Pairs& high) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    low.v = _mm512_unpacklo_epi16(x, y);
    high.v = _mm512_unpackhi_epi16(x, y);
  }
  static void store_interleaved(F16 low, F16 high, float* p) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(low.v, first, high.v));
    _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(low.v, second, high.v));
  }
};

// Four values of each of sixteen rows, as bytes from 0 to 255.
struct Codes {
  __m512i v;
  static Codes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
  Codes low_half() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
  Codes high_half() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
  friend Codes operator+(Codes a, Codes b) { return {_mm512_add_epi8(a.v, b.v)}; }
  // A byte for each row.
  static Codes of_rows(const uint8_t* p) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_mullo_epi32(x, _mm512_set1_epi32(0x01010101))};
  }
};

// Where the 16-bit integers of a stretch lie: all high bytes, then all low ones, both signed.
constexpr bool PLANES = true, EVEN_FIRST = false;

// Sums of codes times 16-bit integers, for each row: exact while they stay within 32 bits.
struct Dots {
  __m512i high, low;
  static Dots zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  // Four integers: their high bytes at x, the low ones `plane` bytes on.
  void add(Codes w, const uint8_t* x, size_t plane) {
    int32_t h, l;
    std::memcpy(&h, x, sizeof h);
    std::memcpy(&l, x + plane, sizeof l);
    high = _mm512_dpbusd_epi32(high, w.v, _mm512_set1_epi32(h));
    low = _mm512_dpbusd_epi32(low, w.v, _mm512_set1_epi32(l));
  }
  F16 less(int32_t x) const {
    const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_set1_epi32(x)))};
  }
};

#else

// There are no products of pairs: weights are widened when they are loaded, activations when they are rounded.
constexpr bool PAIRS = false;

// A float of bfloat16's precision.
struct Rounded {
  float value;
};
inline float widen(Rounded x) { return x.value; }
inline void narrow(float x, Rounded& out) {
  bf16 rounded;
  narrow(x, rounded);
  out.value = widen(rounded);
}

#if defined(__AVX2__)

struct F16 {
  __m256 a, b;
  static F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F16 load(const Rounded* p) { return load(&p->value); }
  // The first or the second of sixteen pairs.
  static F16 of_pairs(const bf16* p, size_t which) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    const __m256i a = _mm256_loadu_si256(q), b = _mm256_loadu_si256(q + 1);
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
    return which ? F16{_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))}
                 : F16{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  // Sixteen pairs (first, second).
  static void store_pairs(F16 first, F16 second, float* p) {
    const auto eight = [](__m256 x, __m256 y, float* to) {
      const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);
      _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
    };
    eight(first.a, second.a, p);
    eight(first.b, second.b, p + LANES);
  }
  void fma(F16 x, F16 y) {
    a = _mm256_fmadd_ps(x.a, y.a, a);
    b = _mm256_fmadd_ps(x.b, y.b, b);
  }
  friend F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  friend F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
};

struct Codes {
  __m256i a, b;
  static Codes load(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  void store(uint8_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, b);
  }
  static __m256i low_half(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  Codes low_half() const { return {low_half(a), low_half(b)}; }
  Codes high_half() const { return {low_half(_mm256_srli_epi16(a, 4)), low_half(_mm256_srli_epi16(b, 4))}; }
  friend Codes operator+(Codes x, Codes y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
  static Codes of_rows(const uint8_t* p) {
    const auto eight = [](const uint8_t* q) {
      const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
      return _mm256_mullo_epi32(x, _mm256_set1_epi32(0x01010101));
    };
    return {eight(p), eight(p + 8)};
  }
};

// Of four integers the first and third lie together, then the second and fourth: as codes of a byte come out of a mask
// and a shift.
constexpr bool EVEN_FIRST = true;

struct Dots {
  __m256i a, b;
  static Dots zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  void add(Codes w, const uint8_t* x, size_t) {
    int32_t first, second;
    std::memcpy(&first, x, sizeof first);
    std::memcpy(&second, x + sizeof first, sizeof second);
    const __m256i p = _mm256_set1_epi32(first), q = _mm256_set1_epi32(second), byte = _mm256_set1_epi16(255);
    const auto four = [&](__m256i w) {
      return _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(w, byte), p),
                              _mm256_madd_epi16(_mm256_srli_epi16(w, 8), q));
    };
    a = _mm256_add_epi32(a, four(w.a));
    b = _mm256_add_epi32(b, four(w.b));
  }
  F16 less(int32_t x) const {
    const __m256i all = _mm256_set1_epi32(x);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(a, all)), _mm256_cvtepi32_ps(_mm256_sub_epi32(b, all))};
  }
};

#else

struct F16 {
  float v[LANES];
  static F16 all(float x) {
    F16 out;
    for (float& lane : out.v) lane = x;
    return out;
  }
  static F16 zero() { return all(0.0f); }
  template <class T>
  static F16 load(const T* p) {
    F16 out;
    for (size_t i = 0; i < LANES; ++i) out.v[i] = widen(p[i]);
    return out;
  }
  static F16 of_pairs(const bf16* p, size_t which) {
    F16 out;
    for (size_t i = 0; i < LANES; ++i) out.v[i] = widen(p[2 * i + which]);
    return out;
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  static void store_pairs(const F16& first, const F16& second, float* p) {
    for (size_t i = 0; i < LANES; ++i) p[2 * i] = first.v[i], p[2 * i + 1] = second.v[i];
  }
  void fma(const F16& a, const F16& b) {
    for (size_t i = 0; i < LANES; ++i) v[i] += a.v[i] * b.v[i];
  }
  friend F16 operator+(const F16& a, const F16& b) {
    F16 out;
    for (size_t i = 0; i < LANES; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
  }
  friend F16 operator*(const F16& a, const F16& b) {
    F16 out;
    for (size_t i = 0; i < LANES; ++i) out.v[i] = a.v[i] * b.v[i];
    return out;
  }
  static F16 max(const F16& a, const F16& b) {
    F16 out;
    for (size_t i = 0; i < LANES; ++i) out.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return out;
  }
};

struct Codes {
  uint8_t v[4 * LANES];
  static Codes load(const uint8_t* p) {
    Codes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  void store(uint8_t* p) const { std::memcpy(p, v, sizeof v); }
  template <class Each>
  static Codes make(Each each) {
    Codes out;
    for (size_t i = 0; i < 4 * LANES; ++i) out.v[i] = static_cast<uint8_t>(each(i));
    return out;
  }
  Codes low_half() const {
    return make([&](size_t i) { return v[i] & 15; });
  }
  Codes high_half() const {
    return make([&](size_t i) { return v[i] >> 4; });
  }
  friend Codes operator+(const Codes& a, const Codes& b) {
    return make([&](size_t i) { return a.v[i] + b.v[i]; });
  }
  static Codes of_rows(const uint8_t* p) {
    return make([&](size_t i) { return p[i / 4]; });
  }
};

constexpr bool EVEN_FIRST = false;

struct Dots {
  int32_t v[LANES];
  static Dots zero() { return {}; }
  void add(const Codes& w, const uint8_t* x, size_t) {
    int16_t q[4];
    std::memcpy(q, x, sizeof q);
    for (size_t i = 0; i < 4 * LANES; ++i) v[i / 4] += w.v[i] * q[i % 4];
  }
  F16 less(int32_t x) const {
    F16 out;
    for (size_t i = 0; i < LANES; ++i) out.v[i] = static_cast<float>(v[i] - x);
    return out;
  }
};

#endif

constexpr bool PLANES = false;  // integers are not cut into bytes

#endif

// Whether sixteen registers hold all: sums of fewer products are kept at a time.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool FEW_REGISTERS = true;
#else
constexpr bool FEW_REGISTERS = false;
#endif

// Lanes added pairwise, always in the same order.
inline float sum(const F16& x) {
  float lanes[LANES];
  x.store(lanes);
  for (size_t half = LANES / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The sums of four vectors, each as ``sum`` or, where a set has shuffles for it, in an order of its own.
inline void sum_four(const F16* x, float scale, float* out) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  const __m512 abcd =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_mul_ps(quarter, _mm_set1_ps(scale)));
#elif defined(__AVX2__)
  const auto both = [](const F16& x) { return _mm256_add_ps(x.a, x.b); };
  const __m256 ab = _mm256_hadd_ps(both(x[0]), both(x[1])), cd = _mm256_hadd_ps(both(x[2]), both(x[3]));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_mul_ps(four, _mm_set1_ps(scale)));
#else
  for (size_t i = 0; i < 4; ++i) out[i] = sum(x[i]) * scale;
#endif
}

inline void narrow(const float* x, size_t n, float* out) { std::memcpy(out, x, n * sizeof(float)); }
inline void narrow(const float* x, size_t n, bf16* out) {
  size_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + LANES <= n; i += LANES) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(out + i, &half, sizeof half);
  }
#endif
  for (; i < n; ++i) narrow(x[i], out[i]);
}
#if !defined(__AVX512F__)
inline void narrow(const float* x, size_t n, Rounded* out) {
  for (size_t i = 0; i < n; ++i) narrow(x[i], out[i]);
}
#endif

// The nearest integers of at most 16 bits to n values times a power of two, the largest that they allow; returns its
// inverse. Values below 2^-126 are taken for zero; a value that is not finite makes the inverse NaN.
inline float fix(const float* x, size_t n, int16_t* out) {
  constexpr float MOST = 32639;  // whose bytes are both within -128 to 127: 127 * 256 + 127
  uint32_t largest = 0;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  // The power is 2^(14 - e) where the largest value's exponent is e, half of that if it would then be beyond MOST.
  const auto power = [](uint32_t biased) {
    const uint32_t bits = biased << 23;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  };
  float most;
  std::memcpy(&most, &largest, sizeof most);
  uint32_t exponent = largest >> 23 < 15 ? 15 : largest >> 23;
  const bool finite = exponent < 255;
  if (finite && most * power(268 - exponent) > MOST) ++exponent;
  const float scale = finite ? power(268 - exponent) : 0.0f;
  for (size_t i = 0; i < n; ++i) {
    const float shifted = x[i] * scale + 12582912.0f;  // 1.5 * 2^23: the nearest integer ends in the low bits
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    out[i] = static_cast<int16_t>(bits & 0xffffu);
  }
  return finite ? power(exponent - 14) : most - most;
}

// e^x within 2 ulp for x in [-87, 88]; below that 0, above it clamped. Branch-free, so that loops over it vectorise.
inline float exp_fast(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer ends in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

}  // namespace NS
