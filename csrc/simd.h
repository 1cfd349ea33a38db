// Sixteen floats and sixteen pairs of bfloat16: what every kernel is written against, once, in namespace NS.
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

#elif defined(__AVX2__)

struct F16 {
  __m256 a, b;
  static F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static __m256 wide(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F16 load(const bf16* p) { return {wide(p), wide(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  void fma(F16 x, F16 y) {
    a = _mm256_fmadd_ps(x.a, y.a, a);
    b = _mm256_fmadd_ps(x.b, y.b, b);
  }
  friend F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  friend F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
};

struct Pairs {
  __m256i a, b;
  static Pairs load(const bf16* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static Pairs all(const bf16* p) {
    int32_t both;
    std::memcpy(&both, p, sizeof both);
    return {_mm256_set1_epi32(both), _mm256_set1_epi32(both)};
  }
  static __m256 even(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
  static __m256 odd(__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
  static void dot(F16& sum, Pairs x, Pairs y) {
    sum.a = _mm256_fmadd_ps(odd(x.a), odd(y.a), _mm256_fmadd_ps(even(x.a), even(y.a), sum.a));
    sum.b = _mm256_fmadd_ps(odd(x.b), odd(y.b), _mm256_fmadd_ps(even(x.b), even(y.b), sum.b));
  }
  static void interleave(const bf16* x, const bf16* y, Pairs& low, Pairs& high) {
    bf16 pairs[64];
    for (int c = 0; c < 32; ++c) {
      pairs[2 * c] = x[c];
      pairs[2 * c + 1] = y[c];
    }
    low = load(pairs);
    high = load(pairs + 32);
  }
  static void store_interleaved(F16 low, F16 high, float* p) {
    low.store(p);
    high.store(p + 16);
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
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
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

struct Pairs {
  bf16 v[2 * LANES];
  static Pairs load(const bf16* p) {
    Pairs out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static Pairs all(const bf16* p) {
    Pairs out;
    for (size_t i = 0; i < 2 * LANES; ++i) out.v[i] = p[i % 2];
    return out;
  }
  static void dot(F16& sum, const Pairs& a, const Pairs& b) {
    for (size_t i = 0; i < LANES; ++i) {
      sum.v[i] += widen(a.v[2 * i]) * widen(b.v[2 * i]);
      sum.v[i] += widen(a.v[2 * i + 1]) * widen(b.v[2 * i + 1]);
    }
  }
  static void interleave(const bf16* x, const bf16* y, Pairs& low, Pairs& high) {
    for (size_t c = 0; c < LANES; ++c) {
      low.v[2 * c] = x[c];
      low.v[2 * c + 1] = y[c];
      high.v[2 * c] = x[LANES + c];
      high.v[2 * c + 1] = y[LANES + c];
    }
  }
  static void store_interleaved(const F16& low, const F16& high, float* p) {
    low.store(p);
    high.store(p + LANES);
  }
};

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
inline void sum_four(const F16 (&x)[4], float scale, float* out) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  const __m512 abcd =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_mul_ps(quarter, _mm_set1_ps(scale)));
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
